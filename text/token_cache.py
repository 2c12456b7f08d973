"""Tokenised data on disk: a directory of arrays, and a cache of such directories by key, under a lock.

An entry is written beside its place, flushed and renamed, so it is complete or missing. Its arrays have
checksums: a damaged entry is made again. An entry that was not used for KEEP days is removed.
"""

import contextlib
import errno
import functools
import glob
import hashlib
import json
import os
import platform
import secrets
import shutil
import stat
import sys
import tempfile
import time
import zlib
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import numpy as np

from disk.files import NoLocks, locked, naming, sync, write_file
from settings.errors import UserError

FOLDER = os.path.dirname(os.path.realpath(__file__))
METADATA = "facts.json"  # everything but the arrays
ABOUT = "about.json"  # for people: where an entry comes from
KEEP = 30  # days
CHUNK = 2**22  # bytes that are read at a time
# The packages that text/ and data.py import. A missing one counts too: it may decide what can be read.
PACKAGES = ("httpx", "huggingface_hub", "jinja2", "numpy", "pyarrow", "pyyaml", "tokenizers", "torch",
            "zstandard")
# Attributes of a tokenizer that its result does not depend on: two are for people, `date` is part of
# `variant` for templates that print it, and two are what it remembers.
NOT_IN_KEY = "directory", "place", "date", "learned", "written"


# ---- the key ----------------------------------------------------------------------------------------------


def hash_of_program(folder=FOLDER):
    """A hash of the program that makes the data: of data.py and of every file under text/."""
    paths = [os.path.join(os.path.dirname(folder), "data.py")]
    for directory, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - {"__pycache__"})
        paths += [os.path.join(directory, name) for name in sorted(names)]
    key = hashlib.blake2b(digest_size=16)
    for path in paths:
        with open(path, "rb") as f:
            content = f.read()
        key.update(f"{os.path.relpath(path, folder)}:{len(content)}:".encode() + content)
    return key.hexdigest()


PROGRAM = hash_of_program()  # when it is loaded: the files may be edited while it runs


class Key:
    """Everything that the tokenised data depends on.

    name   its hash, as a hexadecimal string
    about  {"files", "model", "options"}, for people
    """

    def __init__(self, parts, files, about, progress=None):
        self.files, self.about = files, about
        self.contents = [content_of(file, progress) for file in files]
        key = hashlib.blake2b(digest_size=16)
        for part in (*parts, *(repr(digest) for digest, _ in self.contents)):
            part = part.encode("utf-8", "surrogatepass")
            key.update(b"%d:" % len(part) + part)
        self.name = key.hexdigest()

    def check(self, files, progress):
        """Raise UserError if the data is not what it was: it was hashed before it was read.

        files  those that were read
        """
        changed = next((file for file, before in zip(self.files, self.contents)
                        if content_of(file, progress) != before), None)
        if changed or files != self.files:
            changed = changed or (set(files) ^ set(self.files) or self.files).pop()
            raise UserError(f"{changed} was changed while it was read, so nothing is trained or cached; "
                            "start again when no program writes to it")


def content_of(path, progress=None):
    """(digest, state) of a file. A file that was replaced and restored has another state."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as f:
        state = os.fstat(f.fileno())
        while chunk := f.read(CHUNK):
            digest.update(chunk)
            if progress:
                progress()
    return digest.hexdigest(), (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)


def cache_key(groups, tokenizer, options, program=(), progress=None):
    """The Key of everything that the tokenised data depends on.

    groups     sources.data_files(spec); the content of their files is hashed too
    tokenizer  a template.ChatTokenizer: all its attributes count that are numbers, texts or made of these.
               The others are derived from them
    options    an object whose repr determines how conversations are tokenised and masked
    program    paths of more source files that determine it; PROGRAM is always included
    progress   called while the files are read
    """
    state = {name: value for name, value in sorted(vars(tokenizer).items())
             if is_plain(value) and name not in NOT_IN_KEY}
    files = [file for source in groups for file in source.files]
    parts = [repr((groups, options, versions(), PROGRAM, [content_of(path)[0] for path in program]))]
    for name, value in state.items():
        parts += name, value if isinstance(value, str) else repr(value)  # tokenizer.json has many megabytes
    model = getattr(tokenizer, "directory", None) or f"a tokenizer of {tokenizer.size:,} ids"
    return Key(parts, files, dict(files=files, model=str(model), options=repr(options)), progress)


def is_plain(value):
    """Whether a value consists of numbers and texts, so that its repr determines it."""
    if isinstance(value, dict):
        return all(is_plain(key) and is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (str, int, float, bool))


def versions():
    """The versions of Python, whose regular expressions know its Unicode, and of PACKAGES."""
    found = [platform.python_version(), sys.byteorder]
    for package in PACKAGES:
        try:
            found.append(version(package))
        except PackageNotFoundError:
            found.append(None)
    return found


# ---- entries ----------------------------------------------------------------------------------------------


def cached(cache_dir, key, timeout, write, progress=None):
    """The cache's directory for a Key. If it is missing, write(directory, progress) writes it, under a lock.

    Other processes of the node wait for the lock. The process that writes must call progress() at least once
    in `timeout` seconds; otherwise take_lock raises in those that wait. Call this before any collective.

    progress  called at least as often, while this process writes or reads

    An entry is used without the lock, so a cache that can't be written is still read. Raises UserError if the
    entry can't be written, or if a data file changes meanwhile; then nothing is left of the entry.
    """
    cache_dir = located(cache_dir)
    path = os.path.join(cache_dir, key.name)
    with contextlib.suppress(OSError):  # before it is read, so that nobody removes it
        os.utime(path)
    if fault(path, progress):
        with explained(cache_dir), contextlib.ExitStack() as stack:
            os.makedirs(cache_dir, exist_ok=True)
            try:
                touch = stack.enter_context(locked(f"{path}.lock", timeout))
            except NoLocks as error:
                say(f"{cache_dir} has no locks ({error.strerror}), so each process tokenises by itself; "
                    "--cache_dir DIR on a local disk avoids that")
                touch = None
            else:
                for leftover in glob.glob(f"{glob.escape(path)}.*.tmp"):  # of a process that was killed
                    remove(leftover)
            if reason := fault(path):
                if os.path.lexists(path):
                    say(f"the cached tokens in {path} are damaged ({reason}); they are made again")
                store(path, key, write, functools.partial(call_all, (touch, progress)))
    remove_unused(cache_dir)
    return path


def located(cache_dir):
    """The absolute path of a cache.

    The default is in the home directory. If that is missing, or this user can't write it (a container with
    --user), the cache is a temporary directory, with a warning.
    """
    path = os.path.expanduser(cache_dir)
    if not str(cache_dir).startswith("~"):
        return os.path.abspath(path)
    parent = path
    while not os.path.lexists(parent) and parent != os.path.dirname(parent):
        parent = os.path.dirname(parent)
    if os.path.isabs(path) and (os.path.isdir(path) or os.access(parent, os.W_OK | os.X_OK)):
        return path
    temporary = temporary_cache()
    say(f"--cache_dir {cache_dir}: there is no home directory that can be written (HOME is "
        f"{os.environ.get('HOME', 'not set')}), so tokens are cached in {temporary}; set --cache_dir")
    return temporary


@functools.cache
def temporary_cache():
    """A directory for the cache that only this user can write: others could plant tokens in it."""
    path = os.path.join(tempfile.gettempdir(), f"sft-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    status = os.lstat(path)
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    return path if is_own else tempfile.mkdtemp(prefix="sft-")


def call_all(functions):
    for function in filter(None, functions):
        function()


def store(path, key, write, progress):
    """Write an entry: complete and on the disk before it has its name."""
    directory = f"{path}.{secrets.token_hex(4)}.tmp"
    os.mkdir(directory)
    try:
        write(directory, progress)
        with open(os.path.join(directory, METADATA), encoding="utf-8") as f:
            key.check(json.load(f).get("files", key.files), progress)
        write_file(os.path.join(directory, ABOUT), key.about)
        for name in os.listdir(directory):
            sync(os.path.join(directory, name))
            progress()
        sync(directory)
        if os.path.lexists(path) and fault(path):
            remove(path)
        try:
            os.rename(directory, path)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise  # otherwise another process was faster, without a lock
        sync(os.path.dirname(path))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def fault(directory, progress=None):
    """What is wrong with an entry: a text, or None if all of its arrays are as they were written.

    This costs little beside the hash of the data files: they are larger, and crc32 is faster than blake2b.
    """
    try:
        with open(os.path.join(directory, METADATA), encoding="utf-8") as f:
            metadata = json.load(f)
        arrays = metadata.get("arrays") if isinstance(metadata, dict) else None
        if not isinstance(arrays, dict):
            return f"{METADATA} names no arrays"
        for name, expected in arrays.items():
            size, crc32 = extent(os.path.join(directory, name), progress)
            if {"bytes": size, "crc32": crc32} != expected:
                return f"{name}, {size:,} bytes, is not what was written"
    except (OSError, ValueError, RecursionError) as error:
        return f"{error!s:.200}"


def extent(path, progress=None):
    """(bytes, crc32) of a file."""
    size = crc32 = 0
    with open(path, "rb") as f:
        while chunk := f.read(CHUNK):
            size, crc32 = size + len(chunk), zlib.crc32(chunk, crc32)
            if progress:
                progress()
    return size, crc32


@contextlib.contextmanager
def explained(cache_dir):
    """Turn an OSError of a file of the cache into a UserError that says what to do."""
    try:
        yield
    except OSError as error:
        path = os.path.abspath(error.filename or os.sep)
        if os.path.commonpath([path, cache_dir]) not in (path, cache_dir) or not error.filename:
            raise  # it is about another file, such as the data
        remedy = "set --cache_dir to another directory, or none"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = f"nothing is left of what was written; free some space there, or {remedy}"
        raise UserError(f"--cache_dir {cache_dir} can't be written: {error.strerror} ({path}); "
                        f"{remedy}") from error


def say(text):
    """Print a warning, once on each node."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr, flush=True)


# ---- what is in a cache -----------------------------------------------------------------------------------


class Entry(NamedTuple):
    path: str
    size: int  # bytes
    made: float  # Unix time
    used: float  # Unix time of the last use
    about: dict  # of Key; {} if it can't be read


def entries(cache_dir):
    """The entries of a cache, the one that was used last first."""
    found = []
    for path in glob.glob(os.path.join(glob.escape(located(cache_dir)), "[0-9a-f]" * 32)):
        try:
            files = [os.stat(os.path.join(path, name)) for name in os.listdir(path)]
            made, used = os.stat(os.path.join(path, METADATA)).st_mtime, os.stat(path).st_mtime
        except OSError:
            continue  # not an entry, or another process has removed it
        try:
            with open(os.path.join(path, ABOUT), encoding="utf-8") as f:
                about = dict(json.load(f))
        except (OSError, ValueError, TypeError, RecursionError):
            about = {}
        found.append(Entry(path, sum(file.st_size for file in files), made, used, about))
    return sorted(found, key=lambda entry: -entry.used)


def remove(path):
    """Remove a directory at once for all who look for it by its name. Returns whether this process did."""
    name = f"{path.removesuffix('.tmp')}.{secrets.token_hex(4)}.tmp"
    try:
        os.rename(path, name)
        if os.path.islink(name) or os.path.isfile(name):
            os.unlink(name)
        else:
            shutil.rmtree(name)
    except OSError:  # another process was faster, or it belongs to another user
        return False
    return True


def remove_unused(cache_dir):
    """Remove entries that were not used for KEEP days, and what a killed process has left, after a day."""
    now = time.time()
    old = [entry for entry in entries(cache_dir) if now - entry.used > KEEP * 86400 and remove(entry.path)]
    if old:
        print(f"cache    {len(old)} entries of {cache_dir} not used for {KEEP} days are removed, "
              f"{sum(entry.size for entry in old) / 1e6:,.1f} MB", file=sys.stderr, flush=True)
    for path in glob.glob(os.path.join(glob.escape(cache_dir), "[0-9a-f]" * 32 + ".*.tmp")):
        contents = glob.glob(os.path.join(glob.escape(path), "*"))
        with contextlib.suppress(FileNotFoundError):
            if now - max(map(os.path.getmtime, [path, *contents])) > 86400:
                remove(path)


def clear(cache_dir):
    """Remove all entries of a cache. Returns those that were removed."""
    return [entry for entry in entries(cache_dir) if remove(entry.path)]


# ---- arrays -----------------------------------------------------------------------------------------------


class ArrayWriter:
    """Appends to arrays, each a file in a directory, and hashes some of them.

    dtypes  {name of an array: its dtype}
    hashed  names of the arrays that are hashed into self.hash
    """

    def __init__(self, directory, dtypes, hashed):
        self.directory, self.dtypes, self.hashed = directory, dtypes, hashed
        self.hash = hashlib.blake2b(digest_size=16)
        self.pending = {name: [] for name in dtypes}
        self.extents = {name: {"bytes": 0, "crc32": 0} for name in dtypes}  # of what is written

    def add(self, **values):
        """Append a sequence of values to each array. They stay in memory until flush()."""
        for name, value in values.items():
            self.pending[name].append(np.asarray(value, dtype=self.dtypes[name]))

    def flush(self):
        for name, pieces in self.pending.items():
            content = b"".join(piece.tobytes() for piece in pieces)
            pieces.clear()
            if name in self.hashed:
                self.hash.update(content)
            path, written = os.path.join(self.directory, name), self.extents[name]
            with naming(path), open(path, "ab") as f:
                f.write(content)
            written["bytes"] += len(content)
            written["crc32"] = zlib.crc32(content, written["crc32"])

    def close(self, metadata):
        """Write the remaining values, and a JSON object beside the arrays."""
        self.flush()
        path = os.path.join(self.directory, METADATA)
        with naming(path), open(path, "w", encoding="utf-8") as f:
            json.dump({**metadata, "arrays": self.extents}, f)


def read_arrays(directory, dtypes):
    """({name: array, memory-mapped}, metadata) that an ArrayWriter has written."""
    with open(os.path.join(directory, METADATA), encoding="utf-8") as f:
        metadata = json.load(f)
    del metadata["arrays"]
    arrays = {}
    for name, dtype in dtypes.items():
        path = os.path.join(directory, name)
        is_empty = os.path.getsize(path) == 0  # an empty file can't be mapped
        arrays[name] = np.empty(0, dtype) if is_empty else np.memmap(path, dtype, "r")
    return arrays, metadata
