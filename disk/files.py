"""Files: untrusted ones read safely, written ones flushed to the disk, and errors that name the file."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import time

from safetensors import SafetensorError

from settings.errors import UserError

LARGEST_FILE = 2**28  # bytes of any other file than weights: tokenizer.json of 35 MB is the largest there is


def read_file(path):
    """The bytes of a file of a model directory, which may be untrusted.

    What is read here is shown in errors and copied into checkpoints, so a link must not lead out of the
    directory. Links of the hub's cache are allowed: models--NAME/snapshots/REVISION/FILE -> ../../blobs/HASH.

    Raises UserError for any other such link, for a pipe or a directory, and above LARGEST_FILE bytes.
    """
    real, home = os.path.realpath(path), os.path.realpath(os.path.dirname(path))
    in_cache = re.search(r"/(models|datasets)--[^/]+/blobs/[^/]+$", real)
    if os.path.islink(path) and not in_cache and os.path.commonpath([real, home]) != home:
        raise UserError(f"{path} is a link to {real}, outside its directory; "
                        "put a copy of that file there instead")
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for, for ever
        raise UserError(f"{path} is not a file")
    with open(path, "rb") as f:
        content = f.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise UserError(f"{path} has more than {LARGEST_FILE:,} bytes, and no such file of a model has")
    return content


def read_json(path):
    """Parse a JSON file. Raises UserError with its name, line and column if it is not JSON."""
    content = read_file(path)
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:  # nested without end, a number of thousands of digits
        raise UserError(f"{path} is not JSON: {error!s:.300}") from error


def read_bytes(directory, names):
    """{name: bytes} of those files that the directory has: read once, as it may be gone at the last save."""
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
    """Flush a file or a directory. A rename lasts only once the directory that holds the name is flushed."""
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
    """Put the path into the OSErrors of a block: a failed write or fsync does not say which file it was.

    A SafetensorError that an OSError caused becomes that OSError.
    """
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or path) from error
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if not code:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), path) from error


class LockTimeout(UserError):
    """The process that holds a lock has made no progress for too long. pid: its id, None if it wrote none."""

    def __init__(self, message, pid):
        super().__init__(message)
        self.pid = pid


def take_lock(lock, timeout):
    """Lock a file, whose holder names itself in it and touches it at every sign of progress.

    Raises LockTimeout, with the holder as its pid, when there was none for `timeout` seconds.
    """
    seen = since = None
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.truncate(0)
            return print(os.getpid(), file=lock, flush=True)
        except BlockingIOError:
            now = os.fstat(lock.fileno()).st_mtime_ns  # of whatever clock: only a change of it counts
            seen, since = (seen, since) if now == seen else (now, time.monotonic())
        if time.monotonic() - since > timeout:
            lock.seek(0)
            holder = lock.read().strip()
            raise LockTimeout(f"process {holder} holds {lock.name} and has made no progress for {timeout} s; "
                              "end it, or give another --cache_dir",
                              int(holder) if holder.isdigit() else None)
        time.sleep(0.1)  # flock takes no time-out; nothing but how soon we look again depends on this
