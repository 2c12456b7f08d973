"""The cache of tokenised data: what its key depends on, and one process that writes while others wait."""

import ast
import errno
import glob
import json
import os
import shutil
import sys
import time

import numpy as np
import pytest
from data_helpers import tiny
from helpers import (
    EXAMPLES, ROOT, TINY, VALIDATION, chat, chatml, make_directory, program, target_texts, write)

import data
from disk import files
from settings.errors import UserError
from text import formats, token_cache
from text.sources import Source
from text.template import ChatTokenizer


def same(a, b):
    return (all(np.array_equal(getattr(a, name), getattr(b, name)) for name in data.ARRAYS)
            and a.files == b.files and a.ledger == b.ledger and a.digest == b.digest)


def test_a_cached_dataset_equals_a_tokenised_one(tmp_path, monkeypatch):
    """A second load maps the arrays of the first and tokenises nothing."""
    tokenizer, spec = ChatTokenizer(TINY), EXAMPLES
    fresh = data.load(spec, tokenizer, 64)
    assert same(fresh, data.load(spec, tokenizer, 64, cache_dir=str(tmp_path)))
    monkeypatch.setattr(data, "tokenise", lambda *_: pytest.fail("tokenised again"))
    cached = data.load(spec, tokenizer, 64, cache_dir=str(tmp_path))
    assert same(fresh, cached) and isinstance(cached.tokens, np.memmap)


def test_progress_is_shown_while_data_is_read_written_or_found(tmp_path, monkeypatch):
    """Other nodes wait for as long: at each chunk of the data file and of the cached arrays, and at each thousand rows."""
    monkeypatch.setattr(token_cache, "CHUNK", 100)
    path = write(tmp_path / "rows.json", [{"messages": chat("q", "answer")}] * 2500)
    chunks, calls = os.path.getsize(path) // 100, []

    def load():
        calls.clear()
        data.load(path, tiny, 64, cache_dir=str(tmp_path / "cache"), progress=lambda: calls.append(1))
        return len(calls)

    assert load() >= 2 * chunks + 3  # the file is hashed before and after it is tokenised
    size = sum(f.stat().st_size for f in (tmp_path / "cache").rglob("*") if f.name in data.ARRAYS)
    assert load() >= chunks + size // 100 - len(data.ARRAYS) > chunks + 100
    calls.clear()
    data.load(path, tiny, 64, progress=lambda: calls.append(1))
    assert len(calls) == 3


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A function: options of load -> whether load() has tokenised tmp_path/rows.json again."""
    write(tmp_path / "rows.json", [{"messages": chat("q", "answer")}])
    tokenise, calls = data.tokenise, []

    def counted(*arguments):
        calls.append(1)
        tokenise(*arguments)

    def load(tokenizer=tiny, spec="rows.json", max_length=64, **options):
        before = len(calls)
        data.load(str(tmp_path / spec), tokenizer, max_length, cache_dir=str(tmp_path / "cache"), **options)
        return len(calls) > before

    monkeypatch.setattr(data, "tokenise", counted)
    return load


def test_the_key_depends_on_each_option(made):
    """On all options that change tokens or the loss mask, but not on the time-out."""
    assert made() and not made() and not made(timeout=5)
    for options in (dict(max_length=65), dict(too_long="drop"), dict(train_on_prompt=True),
                    dict(train_on="last"), dict(limit=1), dict(keys=("q", "a", "messages"))):
        assert made(**options) and not made(**options), options
    assert not made(max_length=64, too_long="truncate", train_on_prompt=False, train_on="all")


def test_the_key_depends_on_the_data(made, tmp_path):
    """On the content, and on the file of each row: errors name it, and a file may have a weight."""
    assert made()
    write(tmp_path / "rows.json", [{"messages": chat("q", "answers")}])
    assert made() and not made()
    (tmp_path / "directory").mkdir()
    lines = [json.dumps({"prompt": "q", "response": str(i)}) + "\n" for i in range(3)]
    for first in (1, 2):
        (tmp_path / "directory" / "a.jsonl").write_text("".join(lines[:first]))
        (tmp_path / "directory" / "b.jsonl").write_text("".join(lines[first:]))
        assert made(spec="directory") and not made(spec="directory"), first


def test_the_key_depends_on_the_tokenizer(made, monkeypatch):
    """On each of its attributes, also on one that it gets later; not on what it derives or remembers."""
    def key(tokenizer):
        return token_cache.cache_key([Source(None, None, [VALIDATION])], tokenizer, None).name

    tokenizer = ChatTokenizer(TINY)
    others = {name for name, value in vars(tokenizer).items() if not token_cache.is_plain(value)}
    before = key(tokenizer)
    assert before == key(ChatTokenizer(TINY))
    for name in {*vars(tokenizer), "added_later"} - others - {*token_cache.NOT_IN_KEY}:
        value = getattr(tokenizer, name, {"x": [1, None, 2.5, True]})
        changed = {str: "changed", int: 99999999, bool: not value, dict: {"y": [1, None, 2.5, True]},
                   tuple: (99999999,), list: [99999999]}[type(value)]
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, name, changed, raising=False)
            assert key(tokenizer) != before, name
    tokenizer.directory = "elsewhere"
    assert key(tokenizer) == before
    monkeypatch.setattr(tokenizer, "variant", tokenizer.variant + " ")
    assert made(tokenizer) and not made(tokenizer)


def test_the_key_depends_on_what_the_template_reads(made, tmp_path):
    """On template_kwargs and named templates, and on the date of the run only if a template prints it."""
    tool_use = {"name": "tool_use", "template": chatml("m.content + 'tool'")}
    reads = "{{- x }}" + chatml("m.content")
    for template, dated in ((reads, False), ("{{- strftime_now('%Y') }}" + reads, True)):
        directory = make_directory(tmp_path / f"model{dated}", template)
        assert made(ChatTokenizer(directory, date="2000-01-01"))
        assert made(ChatTokenizer(directory, date="2001-01-01")) == dated
        assert not made(ChatTokenizer(directory, date="2001-01-01"))
        assert made(ChatTokenizer(directory, date="2001-01-01", template_kwargs={"x": 1}))
    directory = make_directory(tmp_path / "named", [{"name": "default", "template": reads}])
    assert not made(ChatTokenizer(directory))  # the same text, from another place
    directory = make_directory(tmp_path / "named", [{"name": "default", "template": reads}, tool_use])
    assert made(ChatTokenizer(directory))


def test_the_key_depends_on_the_program(made, tmp_path, monkeypatch):
    """On the text of data.py and of every file under text/, which read, render, mask and count. It is read when the
    program is loaded: an edit while it runs must not give its tokens the name of another program's."""
    folder = tmp_path / "text"
    shutil.copytree(token_cache.FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(data.__file__, tmp_path / "data.py")
    (folder / "tables").mkdir()
    (folder / "tables" / "keys.json").write_text("{}")
    seen = {token_cache.hash_of_program(str(folder))}
    for path in [*filter(os.path.isfile, folder.rglob("*")), tmp_path / "data.py"]:
        with open(path, "a", encoding="utf-8") as f:
            f.write("# changed\n")
        hashed = token_cache.hash_of_program(str(folder))
        assert hashed not in seen, path
        seen.add(hashed)
    (folder / "added.py").write_text("")
    assert token_cache.hash_of_program(str(folder)) not in seen
    assert token_cache.PROGRAM == token_cache.hash_of_program()
    assert made() and not made()
    monkeypatch.setattr(token_cache, "PROGRAM", "changed")
    assert made() and not made()


@pytest.mark.parametrize("package", token_cache.PACKAGES)
def test_the_key_depends_on_versions(package, made, monkeypatch):
    """Another version of a package may read, render or tokenise differently."""
    assert made()
    version = token_cache.version
    monkeypatch.setattr(token_cache, "version", lambda name: "0.0" if name == package else version(name))
    assert made() and not made()


def test_the_key_depends_on_python(made, monkeypatch):
    """Its version decides what counts as white space, for one."""
    assert made()
    monkeypatch.setattr(token_cache.platform, "python_version", lambda: "3.99.0")
    assert made() and not made()


def test_packages_are_those_that_the_program_imports():
    """All that text/ and data.py import, inside functions too, except what belongs to Python or the project."""
    found = set()
    for path in [*glob.glob(f"{ROOT}/text/*.py"), f"{ROOT}/data.py"]:
        with open(path, encoding="utf-8") as f:
            for node in ast.walk(ast.parse(f.read())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    found.add(node.module.partition(".")[0])
    found -= sys.stdlib_module_names | {"compression"}  # of Python 3.14
    assert {{"yaml": "pyyaml"}.get(name, name) for name in found if not os.path.exists(f"{ROOT}/{name}")} == {*token_cache.PACKAGES}


def test_the_cache_depends_on_the_keys_of_rows(tmp_path):
    """The same file read by other keys is other data. A row that has neither is refused; the error names the
    flags."""
    path = write(tmp_path / "rows.json", [{"prompt": "q", "response": "one", "question": "q",
                                           "answer": "two"}])
    keys = dict.fromkeys(["prompt", "question"])
    for question, answer in ("prompt", "response"), ("question", "answer"), ("prompt", "response"):
        keys[question] = data.load(path, tiny, 100, cache_dir=str(tmp_path / "cache"),
                                   keys=(question, answer, "messages"))
    assert [target_texts(dataset) for dataset in keys.values()] == [["one<|im_end|>"], ["two<|im_end|>"]]
    with pytest.raises(ValueError,
                       match="unrecognised columns 'a'; .* instead of --prompt_key q --response_key r$"):
        formats.read_row({"a": 1}, "here", ("q", "r", "messages"))
    with pytest.raises(ValueError, match="the content of the user message must be a string, it is null"):
        formats.read_row({"q": None, "r": "a"}, "here", ("q", "r", "messages"))


@pytest.fixture
def cache(tmp_path):
    """The path of a cache that does not exist yet."""
    return tmp_path / "cache"


@pytest.fixture
def rows(tmp_path):
    return write(tmp_path / "rows.json", [{"prompt": "q", "response": "first"}])


def load(rows, cache):
    return target_texts(data.load(str(rows), tiny, 64, cache_dir=str(cache)))


def test_a_crash_while_caching_leaves_nothing(cache, rows, monkeypatch):
    """An error while writing leaves neither an entry nor a part of one, and the next load writes it."""
    with monkeypatch.context() as patch:
        patch.setattr(token_cache.json, "dump", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            load(rows, cache)
    assert os.listdir(cache) == []
    assert load(rows, cache) == ["first<|im_end|>"]
    (entry,) = token_cache.entries(cache)
    assert os.listdir(cache) == [os.path.basename(entry.path)]


def replaced(path, text, restores_time=False):
    status = os.stat(path)
    path.unlink()
    path.write_text(text)
    if restores_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


OTHER = json.dumps([{"prompt": "q", "response": "other"}])  # as many bytes as `rows`
CHANGES = {
    "replaced": lambda path: replaced(path, OTHER),
    "replaced by as many bytes with the same time": lambda path: replaced(path, OTHER, restores_time=True),
    "appended": lambda path: path.write_text(path.read_text() + " "),
    "replaced, and replaced again by what it was": lambda path: replaced(path, path.read_text()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_it_is_read_is_not_cached(change, cache, tmp_path, monkeypatch):
    """Its hash is the name of the entry. Later runs must not find tokens of something else under this name."""
    path, tokenise = tmp_path / "data" / "rows.json", data.tokenise
    path.parent.mkdir()
    write(path, [{"prompt": "q", "response": "first"}])
    assert len(OTHER) == len(path.read_text())

    def change_and_tokenise(*arguments):
        CHANGES[change](path)
        tokenise(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(data, "tokenise", change_and_tokenise)
        with pytest.raises(UserError, match=r"data/\w+.json was changed while it was read"):
            load(path.parent, cache)
    assert os.listdir(cache) == []
    expected = target_texts(data.load(str(path.parent), tiny, 64))
    assert load(path.parent, cache) == load(path.parent, cache) == expected


def test_an_entry_is_on_the_disk_before_it_has_its_name(cache, rows, monkeypatch):
    """All files and their directory are flushed, then it is renamed, then the cache is flushed."""
    events, sync, rename = [], files.sync, os.rename
    monkeypatch.setattr(token_cache, "sync", lambda path: (events.append(path), sync(path)))
    monkeypatch.setattr(os, "rename", lambda old, new: (events.append("rename"), rename(old, new)))
    load(rows, cache)
    (entry,) = token_cache.entries(cache)
    names = {os.path.basename(path) for path in events[:-3]}
    assert names == {*os.listdir(entry.path)} == {*data.ARRAYS, token_cache.METADATA, token_cache.ABOUT}
    assert {os.path.dirname(path) for path in events[:-3]} == {events[-3]}
    assert events[-3].endswith(".tmp") and events[-2:] == ["rename", str(cache)]


@pytest.mark.parametrize("code", files.NO_LOCKS)
def test_a_cache_without_locks_works(code, cache, rows, monkeypatch, capfd):
    """One line names the cache and the flag."""
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    assert load(rows, cache) == ["first<|im_end|>"]
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert f"warning: {cache} has no locks ({os.strerror(code)})" in error and "--cache_dir" in error
    assert load(rows, cache) == ["first<|im_end|>"] and capfd.readouterr().err == ""
    assert len(os.listdir(cache)) == 1


def test_without_locks_the_first_entry_stays(cache, rows, monkeypatch):
    """Where two processes write the same entry, the second finds that of the first and uses it."""
    tokenise = data.tokenise

    def twice(*arguments):
        tokenise(*arguments)
        monkeypatch.setattr(data, "tokenise", tokenise)
        load(rows, cache)
        (first,) = token_cache.entries(cache)
        inodes.append(os.stat(first.path).st_ino)

    inodes = []
    monkeypatch.setattr(token_cache, "locked", raising(files.NoLocks(errno.ENOLCK, "none")))
    monkeypatch.setattr(data, "tokenise", twice)
    assert load(rows, cache) == ["first<|im_end|>"]
    (path,) = cache.iterdir()
    assert [os.stat(path).st_ino] == inodes


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("where", ["array", "metadata", "sync"])
def test_a_full_disk_is_one_error_and_leaves_nothing(code, where, cache, rows, monkeypatch):
    """The error names the cache, and how to do without."""
    class Full:  # a file on a full disk
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        write = raising(OSError(code, os.strerror(code)))

    def open_full(path, mode="r", **options):
        is_full = mode == ("ab" if where == "array" else "w") and "cache" in str(path)
        return Full() if is_full else open(path, mode, **options)

    if where == "sync":
        monkeypatch.setattr(files.os, "fsync", raising(OSError(code, os.strerror(code))))
    else:
        monkeypatch.setattr(token_cache, "open", open_full, raising=False)
    with pytest.raises(UserError, match=rf"--cache_dir {cache} can't be written: {os.strerror(code)} .*nothing is "
                                        "left .* free some space .* or none"):
        load(rows, cache)
    assert os.listdir(cache) == []


def test_an_error_of_another_file_is_not_the_caches(cache, rows, monkeypatch):
    """A data file that can't be read keeps its own error."""
    monkeypatch.setattr(data, "tokenise", raising(PermissionError(errno.EACCES, "Permission denied", str(rows))))
    with pytest.raises(PermissionError):
        load(rows, cache)


def test_a_read_only_cache_is_read(cache, rows, monkeypatch):
    """An entry that is there is used. One that is not can't be written: the error names the flag."""
    load(rows, cache)
    read_only = OSError(errno.EROFS, "Read-only file system", str(cache / "x"))
    monkeypatch.setattr(files.os, "open", raising(read_only))
    monkeypatch.setattr(os, "utime", raising(read_only))
    monkeypatch.setattr(os, "mkdir", raising(read_only))
    assert load(rows, cache) == ["first<|im_end|>"]
    os.remove(token_cache.entries(cache)[0].path + "/tokens")
    with pytest.raises(UserError, match=rf"--cache_dir {cache} can't be written: Read-only .* set --cache_dir"):
        load(rows, cache)


def test_another_error_of_the_lock_is_not_hidden(cache, rows, monkeypatch):
    """Only file systems without locks are used without one."""
    monkeypatch.setattr(files.fcntl, "flock", raising(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(UserError, match=rf"--cache_dir {cache} can't be written: Input/output error .*\.lock"):
        load(rows, cache)


@pytest.fixture
def homeless(tmp_path, monkeypatch):
    """A user without a home directory; returns the temporary directory of the machine."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.setattr(token_cache.tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(token_cache.os, "access", lambda path, mode: path != str(tmp_path / "home"))  # root may write
    (tmp_path / "tmp").mkdir()
    token_cache.temporary_cache.cache_clear()
    yield tmp_path / "tmp"
    token_cache.temporary_cache.cache_clear()


@pytest.mark.parametrize("home", ["read-only", None])
def test_without_a_home_the_cache_is_a_temporary_directory(home, homeless, rows, monkeypatch, capfd):
    """One line says so, at each run. A --cache_dir that was typed is not replaced."""
    if not home:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(token_cache.os.path, "expanduser", lambda path: path)  # as for a user without a name
    for _ in range(2):
        assert load(rows, "~/.cache/sft") == ["first<|im_end|>"]
        error = capfd.readouterr().err
        assert error.count("\n") == 1 and f"so tokens are cached in {homeless}/sft-{os.getuid()}" in error
    assert len(token_cache.entries("~/.cache/sft")) == 1
    assert os.stat(homeless / f"sft-{os.getuid()}").st_mode & 0o777 == 0o700
    assert token_cache.located("/x") == "/x" and not os.path.exists("~")


@pytest.mark.parametrize("plant", ["a link", "open to all"])
def test_a_temporary_cache_of_somebody_else_is_not_used(plant, homeless, tmp_path):
    """Tokens that another user has planted there would be trained."""
    path = homeless / f"sft-{os.getuid()}"
    if plant == "a link":
        (tmp_path / "theirs").mkdir(0o700)
        path.symlink_to(tmp_path / "theirs")
    else:
        path.mkdir()
        path.chmod(0o777)
    other = token_cache.located("~/.cache/sft")
    assert other != str(path) and os.path.dirname(other) == str(homeless) and os.stat(other).st_mode & 0o777 == 0o700


def test_a_cache_that_is_a_file_is_an_error(tmp_path, rows):
    with pytest.raises(UserError, match=r"rows.json can't be written: File exists .* set --cache_dir to another"):
        load(rows, rows)


def test_entries_that_are_not_used_are_removed(cache, tmp_path, capfd):
    """After 30 days, by the next run that uses the cache. A use counts, a file of somebody else does not."""
    paths = [write(tmp_path / f"{i}.json", [{"prompt": "q", "response": str(i)}]) for i in range(3)]
    for path in paths[:2]:
        load(path, cache)
    by_file = {entry.about["files"][0]: entry for entry in token_cache.entries(cache)}
    foreign = cache / ("a" * 32)
    leftovers = [cache / f"{'b' * 32}.{name}.tmp" for name in ("old", "new")]
    for directory in (foreign, *leftovers):
        directory.mkdir()
    ago = time.time() - token_cache.KEEP * 86400
    for directory in (foreign, leftovers[0], *(entry.path for entry in by_file.values())):
        os.utime(directory, (0, ago - 60))
    load(paths[0], cache)
    assert os.path.exists(by_file[paths[0]].path) and not os.path.exists(by_file[paths[1]].path)
    assert "1 entries" in capfd.readouterr().err
    assert foreign.exists() and [path.exists() for path in leftovers] == [False, True]
    os.utime(by_file[paths[0]].path, (0, ago + 60))
    load(paths[2], cache)
    assert len(token_cache.entries(cache)) == 2 and capfd.readouterr().err == ""


def test_progress_is_shown_while_an_entry_is_written(cache, rows):
    """cached() calls its own `progress` too: another node may wait for this one."""
    calls = []
    key = token_cache.cache_key([Source(None, None, [rows])], tiny, "options", progress=lambda: calls.append("hash"))
    assert calls == ["hash"]

    def write_entry(directory, progress):
        for _ in range(3):
            progress()
        token_cache.ArrayWriter(directory, {}, ()).close({})

    token_cache.cached(cache, key, 5, write_entry, progress=lambda: calls.append("write"))
    assert calls.count("write") > 3


def test_processes_tokenise_once_and_wait_for_each_other(tmp_path):
    """Of three processes at once, one writes the entry. The others wait for its lock and read the same."""
    lines = program("slow_tokenise", 3, EXAMPLES, TINY, tmp_path).stdout.split()
    assert len(lines) == 4 and lines.count("MADE") == 1 and len(set(lines)) == 2  # and three times the same digest


def test_the_holder_of_the_lock_shows_progress(tmp_path, monkeypatch):
    """Every thousand rows the time of the lock's file is updated, so processes in take_lock keep waiting."""
    path = write(tmp_path / "rows.json", [{"prompt": "q", "response": "a"}] * 5001)
    tokenizer, times = ChatTokenizer(TINY), []
    render = tokenizer.render_spans

    def watching(messages, where, *options):
        if where.endswith("000]"):
            (lock,) = (tmp_path / "cache").glob("*.lock")  # it is there while the entry is written
            times.append(lock.stat().st_mtime)
            os.utime(lock, (0, 0))
        return render(messages, where, *options)

    monkeypatch.setattr(tokenizer, "render_spans", watching)
    data.load(path, tokenizer, 100, cache_dir=str(tmp_path / "cache"))
    assert len(times) == 5 and all(times[2:])  # the first time when a batch is encoded and two more are read
