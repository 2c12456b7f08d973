"""The cache of tokenised data: what its key depends on, and one process that writes while others wait."""

import json
import os
import shutil

import numpy as np
import pytest
from data_helpers import tiny
from helpers import EXAMPLES, TINY, VALIDATION, chat, chatml, make_directory, started, target_texts, write

import data
from text import formats, token_cache
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
    """On template, tokenizer and special tokens."""
    tokenizer = ChatTokenizer(TINY)
    assert made(tokenizer)
    for name, value in (("source", tokenizer.source + " "), ("text", tokenizer.text + " "),
                        ("special", {**tokenizer.special, "x_token": "y"}), ("variant", "other")):
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, name, value)
            assert made(tokenizer) and not made(tokenizer), name


def test_the_key_depends_on_what_the_template_reads(made, tmp_path):
    """On template_kwargs and named templates, and on the date of the run only if a template prints it."""
    tool_use = {"name": "tool_use", "template": chatml("m.content + 'tool'")}
    prints = "{{- strftime_now('%Y') }}" + chatml("m.content")
    for template, dated in ((chatml("m.content"), False), (prints, True)):
        directory = make_directory(tmp_path / f"model{dated}", template)
        assert made(ChatTokenizer(directory, date="2000-01-01"))
        assert made(ChatTokenizer(directory, date="2001-01-01")) == dated
        assert not made(ChatTokenizer(directory, date="2001-01-01"))
        assert made(ChatTokenizer(directory, date="2001-01-01", template_kwargs={"x": 1}))
    directory = make_directory(tmp_path / "named", [{"name": "default", "template": chatml("m.content")}])
    assert not made(ChatTokenizer(directory))  # the same text, from another place
    directory = make_directory(tmp_path / "named", [{"name": "default", "template": chatml("m.content")}, tool_use])
    assert made(ChatTokenizer(directory))


def test_the_key_depends_on_the_program(made, tmp_path, monkeypatch):
    """On the text of data.py and of every file of text/, which read, render, mask and count."""
    shutil.copytree(token_cache.FOLDER, tmp_path / "text")
    shutil.copy(data.__file__, tmp_path / "data.py")
    monkeypatch.setattr(token_cache, "FOLDER", str(tmp_path / "text"))
    monkeypatch.setattr(data, "__file__", str(tmp_path / "data.py"))
    assert made() and not made()
    for path in [*(tmp_path / "text").glob("*.py"), tmp_path / "data.py"]:
        with open(path, "a", encoding="utf-8") as f:
            f.write("# changed\n")
        assert made(), path
        assert not made(), path


@pytest.mark.parametrize("package", ["tokenizers", "jinja2"])
def test_the_key_depends_on_versions(package, made, monkeypatch):
    """Another version of tokenizers or jinja2 may tokenise or render differently."""
    assert made()
    version = token_cache.version
    monkeypatch.setattr(token_cache, "version", lambda name: "0.0" if name == package else version(name))
    assert made() and not made()


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
        formats.to_messages({"a": 1}, "here", ("q", "r", "messages"))
    with pytest.raises(ValueError, match="the content of the user message must be a string, it is null"):
        formats.to_messages({"q": None, "r": "a"}, "here", ("q", "r", "messages"))


def test_a_crash_while_caching_leaves_no_entry(tmp_path, monkeypatch):
    """An error while writing leaves no entry, and the next load writes it."""
    tokenizer, spec = ChatTokenizer(TINY), VALIDATION
    with monkeypatch.context() as patch:
        patch.setattr(token_cache.json, "dump", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            data.load(spec, tokenizer, 64, cache_dir=str(tmp_path))
    assert not [f for f in os.listdir(tmp_path) if not f.endswith((".tmp", ".lock"))]
    assert same(data.load(spec, tokenizer, 64, cache_dir=str(tmp_path)), data.load(spec, tokenizer, 64))
    assert not [f for f in os.listdir(tmp_path) if f.endswith(".tmp")]


def test_processes_tokenise_once_and_wait_for_each_other(tmp_path):
    """Of three processes at once, one writes the entry. The others wait for its lock and read the same."""
    processes = [started("slow_tokenise", EXAMPLES, TINY, tmp_path) for _ in range(3)]
    outputs = [process.communicate()[0].split() for process in processes]
    assert sorted(map(len, outputs)) == [1, 1, 2]
    assert len({lines[-1] for lines in outputs}) == 1


def test_the_holder_of_the_lock_shows_progress(tmp_path, monkeypatch):
    """Every thousand rows the time of the lock's file is updated, so processes in take_lock keep waiting."""
    path = write(tmp_path / "rows.json", [{"prompt": "q", "response": "a"}] * 3001)
    tokenizer, times = ChatTokenizer(TINY), []
    render = tokenizer.render_spans

    def watching(messages, where, *options):
        if where.endswith("000]"):
            (lock,) = (tmp_path / "cache").glob("*.lock")
            times.append(lock.stat().st_mtime)
            os.utime(lock, (0, 0))
        return render(messages, where, *options)

    monkeypatch.setattr(tokenizer, "render_spans", watching)
    data.load(path, tokenizer, 100, cache_dir=str(tmp_path / "cache"))
    assert len(times) == 3 and all(times)
