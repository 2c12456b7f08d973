"""Tokenised data on the disk: arrays in a directory, and a cache of such directories by key, under a lock."""

import functools
import hashlib
import json
import os
import shutil
from datetime import datetime
from importlib.metadata import version

import numpy as np

from disk.files import take_lock
from text import formats, ledger, sandbox, template

FACTS = "facts.json"  # what is not an array


def cache_key(groups, tokenizer, options, program):
    """A hash of all that tokenised data depends on, as a hexadecimal string.

    groups     formats.data_files(spec): paths and weights of the data files, whose content counts too
    tokenizer  a template.ChatTokenizer
    options    an object whose repr says how conversations are tokenised and masked
    program    paths of the source files that do so; those of text/ are always included
    """
    versions = version("tokenizers"), version("jinja2")
    parts = [repr((groups, tokenizer.source, tokenizer.special, options, versions)), tokenizer.text]
    if "strftime_now" in tokenizer.source:
        parts.append(datetime.now().strftime("%Y-%m-%d"))  # the template prints the date
    key = hashlib.blake2b(digest_size=16)
    for part in parts:
        key.update(b"%d:" % len(part) + part.encode())
    modules = [module.__file__ for module in (formats, ledger, sandbox, template)]
    for path in (*program, __file__, *modules, *(file for _, files in groups for file in files)):
        with open(path, "rb") as f:
            while chunk := f.read(2**24):
                key.update(chunk)
            key.update(b":%d" % f.tell())  # so a row that moves from one file to the next changes the key
    return key.hexdigest()


def cached(cache_dir, key, timeout, write):
    """The directory of a key. Where there is none, write(directory, progress) fills it, under a lock.

    Other processes of the node wait for the lock, before any collective, as long as the process that writes
    calls progress() at least once in `timeout` seconds; then take_lock raises.
    """
    path = os.path.join(os.path.expanduser(cache_dir), key)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".lock", "a+") as lock:
        take_lock(lock, timeout)
        if not os.path.isdir(path):
            shutil.rmtree(path + ".tmp", ignore_errors=True)  # of a process that was killed while it wrote
            os.makedirs(path + ".tmp")
            write(path + ".tmp", functools.partial(os.utime, lock.fileno()))
            os.replace(path + ".tmp", path)
    return path


class ArrayWriter:
    """Appends to arrays, one file each in a directory, and hashes some of them.

    dtypes  name -> dtype of each array;  hashed  names of those that go into self.hash
    """

    def __init__(self, directory, dtypes, hashed):
        self.directory, self.dtypes, self.hashed = directory, dtypes, hashed
        self.hash = hashlib.blake2b(digest_size=16)
        self.pending = {name: [] for name in dtypes}

    def add(self, **values):
        """Append a sequence of values to each array; they are in memory until flush()."""
        for name, value in values.items():
            self.pending[name].append(np.asarray(value, dtype=self.dtypes[name]))

    def flush(self):
        for name, parts in self.pending.items():
            content = b"".join(part.tobytes() for part in parts)
            parts.clear()
            if name in self.hashed:
                self.hash.update(content)
            with open(os.path.join(self.directory, name), "ab") as f:
                f.write(content)

    def close(self, facts):
        """Write a JSON object beside the arrays."""
        self.flush()
        with open(os.path.join(self.directory, FACTS), "w", encoding="utf-8") as f:
            json.dump(facts, f)


def read_arrays(directory, dtypes):
    """(name -> array, mapped from the disk; the facts) of what an ArrayWriter wrote."""
    with open(os.path.join(directory, FACTS), encoding="utf-8") as f:
        facts = json.load(f)
    arrays = {name: np.memmap(os.path.join(directory, name), dtype, "r") for name, dtype in dtypes.items()}
    return arrays, facts
