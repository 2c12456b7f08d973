"""Start a program with any Python: if it has no torch, the program continues in the .venv of train.sh.

This module imports only the standard library: torch and other packages may be missing.
"""

import importlib.util
import os
import shlex
import shutil
import signal
import sys

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the directory of sft.py
PYTHON = os.path.join(PROJECT, ".venv", "bin", "python")


def enter():
    """If this Python has no torch, execute the program again with that of .venv, or exit with an error line.

    Entry points call it under `if __name__ == "__main__":`, before they import torch. They have put the
    project first on sys.path, because `python -P` does not add a program's directory. enter() removes tools/
    from the path: a file in it may have the name of a package, such as evaluate.
    """
    # Ctrl-C while packages are imported: no traceback. errors.run() installs Python's handler again
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    tools = os.path.join(os.path.realpath(PROJECT), "tools")
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) != tools]
    if importlib.util.find_spec("torch") is not None:
        return
    if not os.path.exists(PYTHON) or sys.prefix == os.path.dirname(os.path.dirname(PYTHON)):
        program = os.path.basename(sys.argv[0])
        print(f"{program}: error: {sys.executable} has no torch; bash {quoted('train.sh')} --setup "
              "requirements.txt makes a .venv that has it", file=sys.stderr)
        sys.exit(2)
    os.execv(PYTHON, [PYTHON, *sys.orig_argv[1:]])  # orig_argv keeps the interpreter's flags, such as -u


def command(file):
    """How to start a program of the project from the current directory with this Python: "python chat.py"."""
    python = "python" if shutil.which("python") == sys.executable else quoted(sys.executable)
    return f"{python} {quoted(file)}"


def quoted(file):
    """The path of a file, quoted for a shell: relative if the project is the current directory."""
    path = os.path.join(PROJECT, file)
    if os.path.realpath(os.curdir) == os.path.realpath(PROJECT) and path.startswith(PROJECT + os.sep):
        path = os.path.relpath(path, PROJECT)
    return shlex.quote(path)
