"""Data files: what is read, and the error for a wrong file."""

import gzip
import io
import json
import os
import re
import tracemalloc

import pytest
from data_helpers import sources, tiny
from helpers import write
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from settings.errors import UserError
from text import containers
from text.sources import read_files

ROWS = [{"prompt": "a", "response": "b"}, {"prompt": "为什么", "response": "d \u2028 e"}]
ARRAY = json.dumps(ROWS, ensure_ascii=False).encode()
LINES = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS)
BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("content", [
    ARRAY, LINES, BOM + ARRAY, BOM + LINES, gzip.compress(ARRAY), gzip.compress(LINES),
    gzip.compress(BOM + ARRAY), b" \n\t" + ARRAY, b"\n\n" + LINES, BOM + b"\r\n " + ARRAY,
    LINES.replace(b"\n", b"\r\n"), LINES.replace(b"\n", b"\n\n"), LINES.rstrip(),
    json.dumps(ROWS, indent=1).encode(), json.dumps(ROWS).encode()],
                         ids=["array", "lines", "BOM array", "BOM lines", "gzip array", "gzip lines",
                              "gzip BOM array", "space array",
         "blank lines first", "BOM space array", "CRLF lines", "blank lines between", "no last newline",
         "indented array", "escaped array"])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows"])
def test_the_first_bytes_decide_the_container(content, name, tmp_path):
    """A JSON array, JSON Lines and gzip of either are read alike, whatever the file's name, with a byte order
    mark, blanks and CRLF."""
    (tmp_path / name).write_bytes(content)
    path = str(tmp_path / name)
    assert list(read_files(path)) == [(f"{path}[0]", ROWS[0]), (f"{path}[1]", ROWS[1])]


def test_a_directory_is_its_data_files_in_order_of_name(tmp_path):
    """A directory stands for its .json, .jsonl and .gz files, sorted by name; other files are ignored."""
    for name, row in (("b.json", 1), ("a.jsonl", 0), ("c.jsonl.gz", 2), ("d.json.gz", 3)):
        content = json.dumps({"row": row}).encode() + b"\n"
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    for name in ("README.md", "notes.txt", "x.json.bak"):
        (tmp_path / name).write_text("not data", encoding="utf-8")
    expected = [(str(tmp_path / name) + "[0]", {"row": i})
                for i, name in enumerate(("a.jsonl", "b.json", "c.jsonl.gz", "d.json.gz"))]
    assert list(read_files(str(tmp_path))) == expected


def test_several_files_keep_the_order_in_which_they_are_named(tmp_path):
    """Commas separate files and directories. Each row has its own file and its index there."""
    (tmp_path / "sub").mkdir()
    first = write(tmp_path / "z.json", [{"row": 0}, {"row": 1}])
    second = write(tmp_path / "a.json", [{"row": 2}])
    write(tmp_path / "sub" / "m.json", [{"row": 3}])
    got = list(read_files(f"{first},{second},{tmp_path / 'sub'}"))
    assert got == [(f"{first}[0]", {"row": 0}), (f"{first}[1]", {"row": 1}), (f"{second}[0]", {"row": 2}),
                   (f"{tmp_path / 'sub' / 'm.json'}[0]", {"row": 3})]


def test_a_missing_file_is_named(tmp_path):
    """UserError has the path, also of one file among several, and what may be passed."""
    good, missing = write(tmp_path / "rows.json", ROWS), str(tmp_path / "missing.json")
    for spec in (missing, f"{good},{missing}"):
        with pytest.raises(UserError, match=re.escape(missing) + ": no such data file; pass a JSON"):
            data.load(spec, tiny, 100)


def test_a_directory_without_data_is_named(tmp_path):
    """UserError has the directory and the extensions of data files."""
    (tmp_path / "rows.txt").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(str(tmp_path)) + r": no data file .*\.jsonl"):
        data.load(str(tmp_path), tiny, 100)


GOOD_LINE = b'{"prompt": "a", "response": "b"}\n'


@pytest.mark.parametrize("content, line, column", [
    (b'[\n {"prompt": "a", "response": "b"},\n {"prompt": "a" "response": "b"}\n]', 3, 17),
    (b'[\n {"prompt": "a", "response": "b"}\n', 3, 1),
    (b'[{"prompt": "a", "response": "b"},]', 1, "3[45]"),  # Python 3.13 points at the comma
    (GOOD_LINE + b"\n" + b'{"prompt": "a" "response": "b"}\n', 3, 16),
    (GOOD_LINE + GOOD_LINE + b'{"prompt": "a", "resp', 3, 17),
    (GOOD_LINE.strip() + GOOD_LINE, 1, 33),
    (b'["a", "b"]\n["c", "d"]\n', 2, 1),
    (b'{\n "prompt": "a",\n "response": "b"\n}\n', 2, 1),
    (b"prompt,response\na,b\n", 1, 1),
], ids=["array", "cut array", "trailing comma", "lines", "cut line", "two in a line", "lines of arrays",
        "one object over several lines", "CSV"])
def test_what_is_not_json_names_line_and_column(content, line, column, tmp_path):
    """A syntax error is reported with file, line and column, and what a file must be."""
    path = tmp_path / "rows.json"
    for packed in (content, gzip.compress(content)):
        path.write_bytes(packed)
        say = re.escape(f"{path} is not JSON: line {line}, column ")
        say += f"{column}: .*expected a JSON array, or one JSON object per line"
        with pytest.raises(ValueError, match=say):
            data.load(str(path), tiny, 100)


PACKED = gzip.compress(os.urandom(200).hex().encode())


@pytest.mark.parametrize("content", [
    ARRAY[:20] + b"\xff" + ARRAY[20:], '[{"prompt": "a", "response": "b"}]'.encode("utf-16"), PACKED[:-12],
    PACKED[:-8] + b"\0" * 8, PACKED[:20] + b"\xff" * 20 + PACKED[40:], b"[" * 200_000,
    b'[{"prompt": "a", "response": "b", "n": ' + b"1" * 5000 + b"}]"],
    ids=["not UTF-8", "UTF-16", "cut gzip", "gzip with a wrong sum", "damaged gzip", "nested too deep",
         "long number"])
def test_a_file_that_cannot_be_read_is_named(content, tmp_path):
    """Bytes that are not text, a damaged archive, or JSON that Python can't parse: the error has the file."""
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        data.load(str(path), tiny, 100)


@pytest.mark.parametrize("content", [b"", b" \n ", b"[]", BOM, gzip.compress(b"")],
                         ids=["empty", "blank", "empty array", "BOM only", "gzip of nothing"])
def test_a_file_without_rows_is_named(content, tmp_path):
    """A file without rows is an error that has its name."""
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        data.load(str(path), tiny, 100)


# ---- arrays are read in chunks --------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.lists(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
                             | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
                             max_leaves=6)),
       st.sampled_from([1, 3, 17, 1000]), st.sampled_from([None, 1]), st.booleans(),
       st.none() | st.tuples(st.integers(0, 200), st.sampled_from(["", ",", "]", "}", "x", '"', "\n"])))
def test_an_array_in_chunks_equals_json_loads(rows, chunk, indent, ascii_only, damage):
    """For any array and chunk size: the values of json.loads, or its error with the same line and column."""
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    if damage:
        text = text[: 1 + damage[0]] + damage[1] + text[2 + damage[0] :]
    try:
        expected = json.loads(text)
    except json.JSONDecodeError as error:
        expected = f"line {error.lineno}, column {error.colno}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(containers, "CHUNK", chunk)
        try:
            got = list(containers.json_array(io.StringIO(text), "rows.json"))
        except ValueError as error:
            assert isinstance(expected, str) and expected in str(error), (text, expected)
        else:
            assert got == expected, text


def test_an_array_is_read_in_chunks(tmp_path):
    """2,000 rows of 5 kB: only a few chunks of text are in memory, and an error near the end has the right
    place."""
    path = tmp_path / "rows.json"
    rows = [{"prompt": "p", "response": "word " * 1000}] * 2000
    path.write_text(json.dumps(rows, indent=0) + "\n")
    tracemalloc.start()
    assert sum(1 for _ in containers.read_rows(str(path))) == 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * containers.CHUNK < path.stat().st_size
    path.write_text(path.read_text().rstrip()[:-1] + ",\n{oops}]")
    with pytest.raises(ValueError, match=rf"is not JSON: line {2000 * 4 + 3}, column 2: "):
        list(containers.read_rows(str(path)))


# ---- parquet --------------------------------------------------------------------------------------------


def test_a_parquet_file_is_its_rows(tmp_path):
    """All rows of all of its batches; keys that a row does not have are None."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": str(i), "response": "a" if i % 2 else None} for i in range(5000)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=700)
    assert list(containers.read_rows(str(tmp_path / "rows.parquet"))) == rows


@pytest.mark.parametrize("content", [b"PAR1", b"PAR1" + b"x" * 99 + b"PAR1", None],
                         ids=["short", "no footer", "page"])
def test_a_damaged_parquet_file_is_named(content, tmp_path):
    """Both when its footer is read, and when its pages are."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    if content is None:
        parquet.write_table(pyarrow.Table.from_pylist([{"prompt": os.urandom(99).hex()}] * 99), path)
        content = path.read_bytes()
        content = content[:4] + bytes(byte ^ 255 for byte in content[4:60]) + content[60:]
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{path} can't be read as parquet: ")):
        list(containers.read_rows(str(path)))


# ---- datasets of the hub --------------------------------------------------------------------------------


def test_a_hub_dataset_is_downloaded(tmp_path, monkeypatch):
    """owner/name that is not a path is downloaded by the hub's client; only the training split is read."""
    import huggingface_hub

    calls = []
    (tmp_path / "data").mkdir()
    for name in ("train-00000.json", "test-00000.json"):
        write(tmp_path / "data" / name, [{"prompt": name, "response": "r"}])

    def snapshot_download(name, **options):
        calls.append((name, options["repo_type"]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    dataset = data.load("owner/name", tiny, 100)
    assert sources(dataset) == [f"{tmp_path}/data/train-00000.json[0]"]
    assert calls[0] == ("owner/name", "dataset")


def test_an_unreachable_hub_is_one_line(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError
    import huggingface_hub

    def fail(*_, **__):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match="name is neither a local file nor reachable as a hub dataset: no network"):
        data.load("owner/name", tiny, 100)
