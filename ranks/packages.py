"""Print the requirements that this Python does not meet; exit with code 1 if there are any: packages.py FILE

A newer version than the range of the file is met: train.sh installs what is printed, and must not replace a
newer torch by an older one. settings/venv.py warns of it. train.sh runs this file with any Python 3, so it
imports only the standard library, and has no newer syntax. The exit code is 2 if that Python is too old.
"""

import os
import re
import sys


def numbers(text):
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def installed(package):
    """The version of a package, or None."""
    from importlib.metadata import PackageNotFoundError, version  # not in Python 3.7
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def requirements(path):
    """[(line, package, lowest version, the first version that is not tested, or None), ...] of a file."""
    found = []
    with open(path, encoding="utf-8") as f:
        lines = f.readlines()
    for line in lines:
        if line.startswith("-r "):
            found += requirements(os.path.join(os.path.dirname(path), line[3:].strip()))
        requirement = re.match(r"([\w-]+)>=([\d.]+)(?:,<([\d.]+))?", line)
        if requirement:
            found.append((requirement.group(),) + requirement.groups())
    return found


def unmet(path):
    """The lines of a requirements file whose package is missing or too old."""
    versions = [(line, installed(package), low) for line, package, low, _ in requirements(path)]
    return [line for line, have, low in versions if have is None or numbers(have) < numbers(low)]


if __name__ == "__main__":
    if sys.version_info < (3, 10):
        sys.stderr.write("train.sh: error: {} is older than Python 3.10; set PYTHON to a newer one\n".format(
            sys.executable))
        sys.exit(2)
    lines = unmet(sys.argv[1])
    print("\n".join(lines))
    sys.exit(1 if lines else 0)
