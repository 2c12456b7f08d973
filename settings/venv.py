"""Start a program with any Python: if it has no torch, the program continues in the .venv of train.sh.

This module needs only the standard library: torch and other packages may be missing.
"""

import importlib.util
import os
import shlex
import shutil
import signal
import sys

from ranks import packages

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the directory of sft.py
PYTHON = os.path.join(PROJECT, ".venv", "bin", "python")


def enter():
    """If this Python lacks torch, execute the program again with that of .venv, or exit with an error line.

    A torch below the range of requirements.txt counts as none; of one above, a line warns.

    Entry points call it under `if __name__ == "__main__":`, before they import torch. They have put the
    project first on sys.path, because `python -P` does not add a program's directory. enter() removes tools/
    from the path: a file in it may have the name of a package, such as evaluate.
    """
    # Ctrl-C while packages are imported: no traceback. errors.run() installs Python's handler again
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    tools = os.path.join(os.path.realpath(PROJECT), "tools")
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) != tools]
    program, lacks = os.path.basename(sys.argv[0]), "no torch"
    if importlib.util.find_spec("torch") is not None:
        is_old, text = check_torch()
        if not is_old:
            if text and (os.environ.get("RANK") or "0") == "0":
                print(f"{program}: warning: {text}", file=sys.stderr)
            return
        lacks = text
    if not os.path.exists(PYTHON) or sys.prefix == os.path.dirname(os.path.dirname(PYTHON)):
        print(f"{program}: error: {sys.executable} has {lacks}; bash {quoted('train.sh')} --setup "
              "requirements.txt makes a .venv that has it", file=sys.stderr)
        sys.exit(2)
    os.execv(PYTHON, [PYTHON, *sys.orig_argv[1:]])  # orig_argv keeps the interpreter's flags, such as -u


def check_torch():
    """(whether torch is older than requirements.txt allows, a text if it is outside of that range)"""
    have = packages.installed("torch")
    (line, low, below), = [(line, low, below) for line, package, low, below in packages.requirements(
        os.path.join(PROJECT, "requirements.txt")) if package == "torch"]
    if have and packages.numbers(have) < packages.numbers(low):
        return True, f"torch {have}, and the trainer needs {line}"
    if have and packages.numbers(have) >= packages.numbers(below):
        return False, f"torch {have} is newer than what is tested ({line})"
    return False, ""


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
