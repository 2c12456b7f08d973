"""Tokenised data on disk: a directory of arrays, and a cache of such directories by key, under a lock."""

import functools
import glob
import hashlib
import json
import os
import shutil
from importlib.metadata import version

import numpy as np

from disk.files import take_lock

FOLDER = os.path.dirname(os.path.realpath(__file__))
METADATA = "facts.json"  # everything but the arrays


def cache_key(groups, tokenizer, options, program):
    """A hash of everything that the tokenised data depends on, as a hexadecimal string.

    groups     sources.data_files(spec): paths and weights of the data files; their content is hashed too
    tokenizer  a template.ChatTokenizer
    options    an object whose repr determines how conversations are tokenised and masked
    program    paths of source files that determine it too; those of text/ are always included
    """
    versions = version("tokenizers"), version("jinja2")
    texts = [repr((groups, tokenizer.source, tokenizer.special, options, versions)), tokenizer.text]
    texts.append(tokenizer.variant)  # with the date, if the template prints it
    key = hashlib.blake2b(digest_size=16)
    for text in texts:
        key.update(b"%d:" % len(text) + text.encode())
    modules = sorted(glob.glob(os.path.join(FOLDER, "*.py")))
    for path in (*program, *modules, *(file for _, files in groups for file in files)):
        with open(path, "rb") as f:
            while chunk := f.read(2**24):
                key.update(chunk)
            key.update(b":%d" % f.tell())  # the size: the key changes if a row moves to the next file
    return key.hexdigest()


def cached(cache_dir, key, timeout, write):
    """The cache's directory for a key. If it is missing, write(directory, progress) writes it, under a lock.

    Other processes of the node wait for the lock. The process that writes must call progress() at least once
    in `timeout` seconds; otherwise take_lock raises in those that wait. Call this before any collective.
    """
    path = os.path.join(os.path.expanduser(cache_dir), key)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".lock", "a+") as lock:
        take_lock(lock, timeout)
        if not os.path.isdir(path):
            shutil.rmtree(path + ".tmp", ignore_errors=True)  # left by a process that was killed
            os.makedirs(path + ".tmp")
            write(path + ".tmp", functools.partial(os.utime, lock.fileno()))
            os.replace(path + ".tmp", path)
    return path


class ArrayWriter:
    """Appends to arrays, each a file in a directory, and hashes some of them.

    dtypes  {name of an array: its dtype}
    hashed  names of the arrays that are hashed into self.hash
    """

    def __init__(self, directory, dtypes, hashed):
        self.directory, self.dtypes, self.hashed = directory, dtypes, hashed
        self.hash = hashlib.blake2b(digest_size=16)
        self.pending = {name: [] for name in dtypes}

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
            with open(os.path.join(self.directory, name), "ab") as f:
                f.write(content)

    def close(self, metadata):
        """Write the remaining values, and a JSON object beside the arrays."""
        self.flush()
        with open(os.path.join(self.directory, METADATA), "w", encoding="utf-8") as f:
            json.dump(metadata, f)


def read_arrays(directory, dtypes):
    """({name: array, memory-mapped}, metadata) that an ArrayWriter has written."""
    with open(os.path.join(directory, METADATA), encoding="utf-8") as f:
        metadata = json.load(f)
    arrays = {name: np.memmap(os.path.join(directory, name), dtype, "r") for name, dtype in dtypes.items()}
    return arrays, metadata
