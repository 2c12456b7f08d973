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
    """Execute this program again with .venv's Python if this one has no torch, or end with one line.

    Called by entry points only, under `if __name__ == "__main__":`, before torch is imported. They have put
    the project first on sys.path, as `python -P` leaves a program's directory out. tools/ is taken off it
    here: files in it may have the name of a package, such as evaluate.
    """
    tools = os.path.join(os.path.realpath(PROJECT), "tools")
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) != tools]
    if importlib.util.find_spec("torch") is not None:
        return
    if not os.path.exists(PYTHON) or sys.prefix == os.path.dirname(os.path.dirname(PYTHON)):
        program, remedy = os.path.basename(sys.argv[0]), f"bash {quoted('train.sh')} --setup requirements.txt"
        print(f"{program}: error: {sys.executable} has no torch; {remedy} makes a .venv that has it",
              file=sys.stderr)
        sys.exit(2)
    os.execv(PYTHON, [PYTHON, *sys.orig_argv[1:]])  # with the interpreter's own flags, such as -u


def command(file):
    """How to start a program of the project with this Python from the current directory: "python chat.py"."""
    python = "python" if shutil.which("python") == sys.executable else quoted(sys.executable)
    return f"{python} {quoted(file)}"


def quoted(file):
    """A file's path for a shell: full, unless the project is the current directory and the file is in it."""
    path = os.path.join(PROJECT, file)
    if os.path.realpath(os.curdir) == os.path.realpath(PROJECT) and path.startswith(PROJECT + os.sep):
        path = os.path.relpath(path, PROJECT)
    return shlex.quote(path)
