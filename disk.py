"""Files: read so that a stranger's do no harm, flushed to the disk, and named in whatever goes wrong with them."""

import contextlib
import json
import os
import re
import shutil

from safetensors import SafetensorError

LARGEST_FILE = 2**28  # bytes of any other file than weights: tokenizer.json of 35 MB is the largest there is


def read_file(path):
    """The bytes of a file of a model directory, which may be a stranger's: what is read here is shown in errors and
    copied into checkpoints, so a link must not lead to a file that is not the model's own.

    The hub's cache is made of links, and they stay good: models--NAME/snapshots/REVISION/FILE -> ../../blobs/HASH.
    """
    real, home = os.path.realpath(path), os.path.realpath(os.path.dirname(path))
    in_cache = re.search(r"/(models|datasets)--[^/]+/blobs/[^/]+$", real)
    if os.path.islink(path) and not in_cache and os.path.commonpath([real, home]) != home:
        raise ValueError(f"{path} is a link to {real}, outside its directory; put a copy of that file there instead")
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for, for ever
        raise ValueError(f"{path} is not a file")
    with open(path, "rb") as f:
        content = f.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise ValueError(f"{path} has more than {LARGEST_FILE:,} bytes, and no such file of a model has")
    return content


def read_json(path):
    """Parse a JSON file; ValueError with its name, line and column if it is not JSON."""
    content = read_file(path)
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:  # nested without end, a number of thousands of digits
        raise ValueError(f"{path} is not JSON: {error!s:.300}") from error


def read_bytes(directory, names):
    """name -> bytes of those files that the directory has; read once, as the directory may be gone at the last save."""
    found = {}
    for name in names:
        if os.path.exists(path := os.path.join(directory, name)):
            found[name] = read_file(path)
    return found


def write_file(path, content):
    """Write bytes, or a JSON value, and flush it to the disk."""
    with naming(path), open(path, "wb") as f:
        f.write(content if isinstance(content, bytes) else encoded(content))
    sync(path)


def encoded(value):
    """A JSON value as it is written."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def sync(path):
    """Flush a file, or a directory: a rename is on the disk only when the directory that holds the name is."""
    with naming(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove(directory):
    with naming(directory):
        shutil.rmtree(directory)


@contextlib.contextmanager
def naming(path):
    """Name the file in what goes wrong with it: a failed write or fsync says "No space left on device" and not where,
    and safetensors has an error of its own."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or path) from error
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if not code:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), path) from error
