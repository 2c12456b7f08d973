"""Exit with code 0 if this Python has the packages of a requirements file: packages.py FILE

Versions newer than those tested pass, with a note on file descriptor 3. train.sh runs this file with any
Python 3, so it imports only the standard library, and has no newer syntax.
"""

import os
import re
import sys


def numbers(text):
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def check(path):
    """Exit with code 1 if a package of the file is missing or too old."""
    from importlib.metadata import PackageNotFoundError, version  # not in Python 3.7
    for line in open(path, encoding="utf-8"):
        if line.startswith("-r "):
            check(os.path.join(os.path.dirname(path), line[3:].strip()))
        requirement = re.match(r"([\w-]+)>=([\d.]+)(?:,<([\d.]+))?", line)
        if requirement is None:
            continue
        package, low, below = requirement.groups()
        try:
            have = version(package)
        except PackageNotFoundError:
            sys.exit(1)
        if numbers(have) < numbers(low):
            sys.exit(1)
        if below and numbers(have) >= numbers(below):
            note = "train.sh: {} {} is newer than what is tested ({})\n"
            os.write(3, note.format(package, have, requirement.group()).encode())


if sys.version_info < (3, 10):
    sys.exit(1)
check(sys.argv[1])
