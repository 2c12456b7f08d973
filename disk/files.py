"""Files: read untrusted ones safely, flush written ones to the disk, lock them, name them in every error."""

import contextlib
import errno
import fcntl
import functools
import json
import os
import secrets
import re
import shutil
import stat
import time

from settings.errors import UserError

LARGEST_FILE = 2**28  # bytes, except weights; the largest file we know is a tokenizer.json of 35 MB
POLL = 0.1  # seconds between two attempts to take a lock
# What flock raises on file systems without locks: NFS without its lock daemon, Lustre, some of FUSE.
NO_LOCKS = errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL


def read_file(path):
    """The bytes of a file in a model directory, which may be untrusted.

    Raises UserError for a link out of the directory, for a pipe or a directory, and for more than
    LARGEST_FILE bytes.
    """
    check_link(path)
    if os.path.exists(path) and not os.path.isfile(path):  # to open a pipe would block until somebody writes
        raise UserError(f"{path} is not a file")
    with open(path, "rb") as f:
        content = f.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise UserError(f"{path} has more than {LARGEST_FILE:,} bytes, too many for this file of a model")
    return content


def check_link(path):
    """Raise UserError if a file of a model directory is a link that leads out of the directory.

    What is read of such a directory is shown in errors, copied into checkpoints and pushed to hubs. Links of
    the hub's cache may lead out: models--NAME/snapshots/REVISION/FILE -> ../../blobs/HASH.
    """
    target, directory = os.path.realpath(path), os.path.realpath(os.path.dirname(path))
    in_cache = re.search(r"/(models|datasets)--[^/]+/blobs/[^/]+$", target)
    if os.path.islink(path) and not in_cache and os.path.commonpath([target, directory]) != directory:
        raise UserError(f"{path} is a link to {target}, outside its directory; replace it with a copy of "
                        "that file")


def read_json(path):
    """Parse a JSON file. Raises UserError with file name, line and column if it is not JSON."""
    content = read_file(path)
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:  # also for deep nesting, and numbers of thousands of digits
        raise UserError(f"{path} is not JSON: {error!s:.300}") from error


def read_bytes(directory, names):
    """{name: bytes} of those of the named files that exist in the directory."""
    contents = {}
    for name in names:
        path = os.path.join(directory, name)
        if os.path.exists(path):
            contents[name] = read_file(path)
    return contents


def follow(path):
    """The directory that a path means, with its links resolved.

    On a file system without links, `latest` and `best` are files with the name of a directory beside them.
    A program that reads several files of `latest` resolves it once: a run may move it meanwhile.
    """
    if "\0" in path:  # realpath raises ValueError; any check of the path finds nothing
        return path
    path = os.path.realpath(path)
    if os.path.isfile(path) and os.path.getsize(path) < 64:
        with open(path, "rb") as f:
            name = f.read().decode(errors="replace").strip()
        if re.fullmatch(r"step_\d+", name):
            return os.path.join(os.path.dirname(path), name)
    return path


def write_file(path, content):
    """Write bytes or a JSON value to a file and flush it to the disk."""
    with naming(path), open(path, "wb") as f:
        f.write(content if isinstance(content, bytes) else encoded(content))
    sync(path)


@contextlib.contextmanager
def replaced(path, mode="w", **options):
    """A new file in place of `path`, complete or not at all. A link is replaced; what it leads to stays.

    mode, options  as of open()
    """
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        with naming(path), open(temporary, mode.replace("w", "x"), **options) as f:
            yield f
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def encoded(value):
    """The bytes of a JSON value as write_file writes it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def sync(path):
    """Flush a file or a directory. A rename is permanent only after its directory is flushed."""
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
    """Add the path to OSErrors raised in the block: a failed write or fsync does not name its file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or path) from error


class LockTimeout(UserError):
    """The process that holds a lock has made no progress for too long.

    pid  its process id; None if the lock file does not contain it
    """

    def __init__(self, message, pid):
        super().__init__(message)
        self.pid = pid


class NoLocks(OSError):
    """The file system of a lock file has no locks."""


@contextlib.contextmanager
def locked(path, timeout):
    """Hold the lock of a file, which is created for it and removed afterwards.

    Yields progress(), which the holder must call at least once in `timeout` seconds, see take_lock.
    Raises UserError if the path is a link or no file, NoLocks if the file system has no locks.
    """
    while True:
        with open(path, "a+", encoding="utf-8", opener=open_regular) as lock:
            try:
                take_lock(lock, timeout)
            except NoLocks:
                os.unlink(path)
                raise
            try:
                is_current = os.path.samestat(os.fstat(lock.fileno()), os.lstat(path))
            except FileNotFoundError:
                is_current = False
            if not is_current:
                continue  # the holder before has removed this file: the next one may lock another
            try:
                yield functools.partial(os.utime, lock.fileno())
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
            return


def open_regular(path, flags):
    """os.open() of a file that is about to be truncated: a link could lead to somebody else's file."""
    if os.path.islink(path):
        raise UserError(f"{path} is a symbolic link, it must be a file of its own; remove it")
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)  # a pipe would block
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(handle)
        raise UserError(f"{path} is a pipe, a device or a second name of another file, it must be a file of "
                        "its own; remove it")
    return handle


def take_lock(lock, timeout):
    """Lock an open file, and write this process's id into it.

    The holder of a lock touches the file whenever it makes progress. Raises LockTimeout, with the holder's
    pid, if the holder makes no progress for `timeout` seconds, and NoLocks if the file system has no locks.
    Only the time in which this process ran counts: a suspended one may wait for a suspended holder.
    """
    last_touch, waited, last = None, 0, time.monotonic()
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with naming(lock.name):
                lock.truncate(0)
                print(os.getpid(), file=lock, flush=True)
            return
        except BlockingIOError:
            # This may be another machine's clock (a network drive), so only its changes count.
            touch = os.fstat(lock.fileno()).st_mtime_ns
            if touch != last_touch:
                last_touch, waited = touch, 0
        except OSError as error:
            kind = NoLocks if error.errno in NO_LOCKS else OSError
            raise kind(error.errno, error.strerror, lock.name) from error
        now = time.monotonic()
        waited, last = waited + min(now - last, 5 * POLL), now  # after a longer time it was suspended
        if waited > timeout:
            lock.seek(0)
            holder = lock.read().strip()
            raise LockTimeout(f"process {holder} holds {lock.name} and has made no progress for {timeout} s; "
                              "stop that process, or use another --cache_dir",
                              int(holder) if holder.isdigit() else None)
        time.sleep(POLL)  # flock has no timeout


def check_hub_endpoint():
    """Raise UserError if HF_ENDPOINT, the address of a mirror of the hub, is not a URL."""
    endpoint = os.environ.get("HF_ENDPOINT", "")
    if endpoint and not endpoint.startswith(("http://", "https://")):
        example = f"https://{endpoint}" if ":" not in endpoint else "https://hf-mirror.com"
        raise UserError(f"HF_ENDPOINT {endpoint}: it must start with https://; set it to {example}")
