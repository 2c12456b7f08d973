"""The token cache against damaged entries and planted files: it never trains on them and never harms others."""

import os

import pytest
from data_helpers import tiny
from helpers import target_texts, write

import data
from disk import files
from settings.errors import UserError
from text import token_cache


@pytest.fixture
def load(tmp_path):
    """A function: the target texts of tmp_path/rows.json, through the cache."""
    path = write(tmp_path / "rows.json", [{"prompt": "q", "response": text} for text in ("one", "two", "three")])

    def texts():
        dataset = data.load(path, tiny, 64, cache_dir=str(tmp_path / "cache"))
        return [target_texts(dataset, i) for i in range(len(dataset))]

    return texts


EXPECTED = [["one<|im_end|>"], ["two<|im_end|>"], ["three<|im_end|>"]]
DAMAGE = {
    "zeroed": lambda path, size: path.write_bytes(bytes(size)),
    "zeroed at its end": lambda path, size: path.write_bytes(path.read_bytes()[: size // 2] + bytes(size - size // 2)),
    "truncated": lambda path, size: path.write_bytes(path.read_bytes()[: size // 2]),
    "longer": lambda path, size: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path, size: path.write_bytes(b""),
    "missing": lambda path, size: path.unlink(),
    "a directory": lambda path, size: (path.unlink(), path.mkdir()),
    "other bytes": lambda path, size: path.write_bytes(b"\xff" * size),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [*data.ARRAYS, token_cache.METADATA])
def test_a_damaged_entry_is_made_again(name, damage, load, tmp_path, capfd):
    """One line says so, and the entry is whole afterwards."""
    assert load() == EXPECTED
    (entry,) = token_cache.entries(tmp_path / "cache")
    path = tmp_path / entry.path / name
    before = path.read_bytes()
    DAMAGE[damage](path, len(before))
    is_same = path.is_file() and path.read_bytes() == before  # an array of zeros, zeroed
    assert load() == EXPECTED
    error = capfd.readouterr().err
    if is_same:
        assert error == ""
    else:
        assert error.count("\n") == 1 and f"warning: the cached tokens in {entry.path} are damaged" in error
    assert path.read_bytes() == before
    assert load() == EXPECTED and capfd.readouterr().err == ""


@pytest.mark.parametrize("content", ["[]", "1", "{}", '{"arrays": []}', '{"arrays": {"tokens": 1}}', '{"arrays": null}',
                                     '{"arrays": {"../x": {}}}', "[" * 10**5])
def test_metadata_of_another_kind_is_damage(content, load, tmp_path):
    load()
    (entry,) = token_cache.entries(tmp_path / "cache")
    (tmp_path / entry.path / token_cache.METADATA).write_text(content)
    assert load() == EXPECTED


def test_an_entry_that_is_a_link_or_a_file_is_replaced(load, tmp_path):
    """What a link leads to is not touched."""
    load()
    (entry,) = token_cache.entries(tmp_path / "cache")
    other = tmp_path / "other"
    for plant in (lambda: os.symlink(other, entry.path), lambda: write(tmp_path / entry.path, [1])):
        os.rename(entry.path, f"{tmp_path}/moved{len(os.listdir(tmp_path))}")
        other.mkdir(exist_ok=True)
        (other / "kept").write_text("kept")
        plant()
        assert load() == EXPECTED
        assert not os.path.islink(entry.path) and os.listdir(other) == ["kept"]


PLANTS = {
    "a symbolic link": lambda victim, lock: os.symlink(victim, lock),
    "a symbolic link to nothing": lambda victim, lock: os.symlink(f"{victim}.none", lock),
    "a hard link": lambda victim, lock: os.link(victim, lock),
    "a pipe": lambda victim, lock: os.mkfifo(lock),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_lock_harms_no_other_file(plant, load, tmp_path):
    """The lock is truncated when it is taken, so it must not be another file. A pipe would block."""
    load()
    (entry,) = token_cache.entries(tmp_path / "cache")
    os.rename(entry.path, tmp_path / "moved")
    victim, lock = tmp_path / "victim", f"{entry.path}.lock"
    victim.write_text("precious")
    PLANTS[plant](victim, lock)
    with pytest.raises(UserError, match=r"\.lock is a .* remove it$"):
        load()
    assert victim.read_text() == "precious" and not os.path.exists(f"{victim}.none")
    os.unlink(lock)
    assert load() == EXPECTED


def test_a_lock_that_was_removed_is_not_held(tmp_path, monkeypatch):
    """While a process waits, the holder removes the file: the process then locks the file that is there, because
    others would not see the lock of the removed one."""
    path, take_lock, removed = str(tmp_path / "x.lock"), files.take_lock, []

    def slow(lock, timeout):
        if not removed:
            removed.append(os.unlink(path))
        take_lock(lock, timeout)

    monkeypatch.setattr(files, "take_lock", slow)
    with files.locked(path, 1):
        assert os.path.exists(path)
        with pytest.raises(files.LockTimeout):
            with files.locked(path, 0.2):
                pass
    assert not os.path.exists(path)
