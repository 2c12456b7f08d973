"""Programs start with any Python: where it lacks torch, they continue in the .venv that train.sh made.

It imports the standard library only, as nothing else can be there yet.
"""

import importlib.util
import os
import shlex
import shutil
import sys

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the directory of sft.py
PYTHON = os.path.join(PROJECT, ".venv", "bin", "python")


def enter():
    """Execute this program again with .venv's Python if this one has no torch, or end with one line if there is none.

    Called by entry points only, under `if __name__ == "__main__":`, before torch is imported. They put the project
    first on the path before, as `python -P` leaves a program's directory out. tools/ leaves it here: its files have
    names of packages, such as evaluate.
    """
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) != os.path.join(os.path.realpath(PROJECT), "tools")]
    if importlib.util.find_spec("torch") is not None:
        return
    if not os.path.exists(PYTHON) or sys.prefix == os.path.dirname(os.path.dirname(PYTHON)):
        print(f"{os.path.basename(sys.argv[0])}: error: {sys.executable} has no torch; bash {quoted('train.sh')} "
              "--setup requirements.txt makes a .venv that has it", file=sys.stderr)
        sys.exit(2)
    os.execv(PYTHON, [PYTHON, *sys.orig_argv[1:]])  # with the interpreter's own flags, such as -u


def command(file):
    """How to start a program of the project with this Python from the current directory: "python chat.py"."""
    python = "python" if shutil.which("python") == sys.executable else quoted(sys.executable)
    return f"{python} {quoted(file)}"


def quoted(file):
    """A file's path for a shell: relative if the project is the current directory and has it, else the full path."""
    path = os.path.join(PROJECT, file)
    if os.path.realpath(os.curdir) == os.path.realpath(PROJECT) and path.startswith(PROJECT + os.sep):
        path = os.path.relpath(path, PROJECT)
    return shlex.quote(path)
