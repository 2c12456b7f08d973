"""Programs start with any Python: where it lacks torch, they continue in the .venv that train.sh made."""

import importlib.util
import os
import sys

PYTHON = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), ".venv", "bin", "python")


def enter():
    """Execute this program again with .venv's Python if this one has no torch. Called before torch is imported, by
    entry points only (under `if __name__ == "__main__":`)."""
    if importlib.util.find_spec("torch") is not None:
        return
    if not os.path.exists(PYTHON) or sys.prefix == os.path.dirname(os.path.dirname(PYTHON)):
        sys.exit(f"{os.path.basename(sys.argv[0])}: error: {sys.executable} has no torch; ./train.sh --setup "
                 "requirements.txt makes a .venv that has it")
    os.execv(PYTHON, [PYTHON, *sys.orig_argv[1:]])  # with the interpreter's own flags, such as -u
