"""Data files -> rows: which containers are read, how errors name the place, and that memory stays bounded."""

import csv
import gzip
import io
import json
import os
import re
import tracemalloc

import pytest
from data_helpers import tiny
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


def rows_of(path, content=None, split=None):
    """The rows of a file, without their places; `content` is written first."""
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [row for _, row in containers.read_rows(str(path), split)]


def refusal(path, content=None, split=None):
    """The error of a file that can't be read, without the file's folder. A bad line is raised, as render does it."""
    with pytest.raises(UserError) as error:
        for row in rows_of(path, content, split):
            if isinstance(row, UserError):
                raise row
    assert str(path) in str(error.value)
    return str(error.value).replace(f"{path.parent}/", "")


# ---- JSON -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [
    ARRAY, LINES, BOM + ARRAY, BOM + LINES, gzip.compress(ARRAY), gzip.compress(LINES),
    gzip.compress(BOM + ARRAY), b" \n\t" + ARRAY, b"\n\n" + LINES, BOM + b"\r\n " + ARRAY,
    LINES.replace(b"\n", b"\r\n"), LINES.replace(b"\n", b"\n\n"), LINES.rstrip(), BOM + LINES.replace(b"\n",
        b"\n" + BOM),
    ARRAY.decode().encode("utf-16"), LINES.decode().encode("utf-16"), LINES.decode().encode("utf-32"),
    LINES.decode().encode("utf-16-le"), gzip.compress(ARRAY.decode().encode("utf-16")),
    json.dumps(ROWS, indent=1).encode(), json.dumps(ROWS).encode(),
    b"\n".join(json.dumps(row, indent=2).encode() for row in ROWS),
    json.dumps({"version": "1", "data": ROWS}).encode(), json.dumps({"train": ROWS, "test": [{"a": 1}]}).encode(),
    json.dumps({"about": {"by": ["me"]}, "my rows": ROWS}, indent=2).encode(),
    json.dumps({"conversations": ROWS}).encode(),
    json.dumps({k: {str(i): row[k] for i, row in enumerate(ROWS)} for k in ROWS[0]}).encode(),
    json.dumps({k: [row[k] for row in ROWS] for k in ROWS[0]}).encode(),
    json.dumps({str(i): row for i, row in enumerate(ROWS)}).encode(),
    json.dumps({"columns": list(ROWS[0]), "index": [0, 1], "data": [list(row.values()) for row in ROWS]}).encode(),
], ids=["array", "lines", "BOM array", "BOM lines", "gzip array", "gzip lines", "gzip BOM array", "space array",
        "blank lines first", "BOM space array", "CRLF lines", "blank lines between", "no last newline",
        "BOM in every line", "UTF-16 array", "UTF-16 lines", "UTF-32 lines", "UTF-16 without a mark", "gzip UTF-16",
        "indented array", "escaped array", "indented objects", "data", "train and test", "the only list of objects",
        "a list under a row's key", "pandas columns", "columns", "rows by index", "pandas split"])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows", "rows.txt"])
def test_the_first_bytes_decide_the_container(content, name, tmp_path):
    """JSON in all its forms is read alike, whatever the file's name, encoding and line ends."""
    assert rows_of(tmp_path / name, content) == ROWS


@pytest.mark.parametrize("row", [
    {"prompt": "a", "response": "b"}, {"messages": [{"role": "user", "content": "q"}]},
    {"conversations": [{"from": "human", "value": "q"}]}, {"messages": [{"content": "q"}, {"role": "user"}]},
    {"prompt": "a", "response": "b", "tools": [{"name": "f"}]}, {"data": {"q": "a"}, "id": 1},
    {"input_ids": [1, 2], "labels": [1, 2]}, {"prompt": "a", "response": "b", "data": [{"x": 1}]},
    {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
    {"messages": [{"role": "user", "content": "q"}], "tags": ["x"]}, {"data": [{"role": "user", "content": "q"}]},
    {"a": {"x": 1}, "b": {"x": 2}}, {}, {"dialogue": [{"who": "human", "text": "q"}]},
    {"conversations": [{"speaker": "human", "text": "q"}]}, {"turns": [{"speaker": "human", "text": "q"}]},
    {"Messages": [{"Type": "human", "text": "q"}]}], ids=str)
@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_that_is_a_row_stays_one(row, indent, tmp_path):
    """Its lists are conversation, tools or tokens, not rows."""
    assert rows_of(tmp_path / "row.json", json.dumps(row, indent=indent)) == [row]


def test_places_are_lines_in_json_lines_and_indices_elsewhere(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n" + LINES.replace(b"\n", b"\n\n"))
    assert [where for where, _ in read_files(str(path))] == [f"{path} line 2", f"{path} line 4"]
    path.write_bytes(ARRAY)
    assert [where for where, _ in read_files(str(path))] == [f"{path}[0]", f"{path}[1]"]


@pytest.mark.parametrize("content, expected", [
    ({"train": [{"a": 1}], "validation": [{"a": 2}], "test": [{"a": 3}]}, {None: 1, "validation": 2, "test": 3,
                                                                           "val": 2}),
    ({"train": [{"a": 1}], "test": [{"a": 3}]}, {None: 1, "validation": 3, "train": 1, "dev": None}),
    ({"train": [{"a": 1}]}, {None: 1, "validation": None}), ({"dev": [{"a": 2}]}, {None: None, "validation": 2})])
@pytest.mark.parametrize("chunk", [10, 2**20])
def test_splits_in_one_object(content, expected, chunk, tmp_path, monkeypatch):
    """--val_data never gets the list of train rows; what is missing is an error that lists what is there."""
    monkeypatch.setattr(containers, "CHUNK", chunk)
    path = tmp_path / "rows.json"
    for split, value in expected.items():
        if value is None:
            assert f"it has {', '.join(content)}" in refusal(path, json.dumps(content), split)
        else:
            assert rows_of(path, json.dumps(content), split) == [{"a": value}]
    assert refusal(path, LINES, "test") == "rows.json@test: this file has no splits; pass rows.json"


def test_several_lists_of_rows_are_not_guessed(tmp_path):
    content = json.dumps({"easy": [{"a": 1}], "hard": [{"a": 2}]})
    assert "several lists could be its rows (easy, hard)" in refusal(tmp_path / "rows.json", content)


GOOD_LINE = b'{"prompt": "a", "response": "b"}\n'


@pytest.mark.parametrize("content, line, column, hint", [
    (b'[\n {"prompt": "a", "response": "b"},\n {"prompt": "a" "response": "b"}\n]', 3, 17, ""),
    (b'[\n {"prompt": "a", "response": "b"}\n', 3, 1, "expected , or ]"),
    (b'[{"prompt": "a", "response": "b"},]', 1, "3[45]", "comma"),  # Python 3.13 points at the comma
    (b'[{"prompt": "a", "response": "b",}]', 1, "3[34]", "comma"),
    (GOOD_LINE + b"\n" + b'{"prompt": "a" "response": "b"}\n', 3, 16, ""),
    (GOOD_LINE + GOOD_LINE + b'{"prompt": "a", "resp', 3, 17,
     "Unterminated string starting at this column; its closing quote is missing"),
    (GOOD_LINE.strip() + GOOD_LINE, 1, 33, "Extra data"), (b'["a", "b"]\n["c", "d"]\n', 2, 1, "after the array"),
    (b"{'prompt': 'a', 'response': 'b'}\n", 1, 2, "double quotes"),
    (GOOD_LINE + b"{'prompt': 'a'}\n", 2, 2, "double quotes"),
    (b'{\n "prompt": "a",\n response: "b"\n}', 3, 2, "double quotes"),
    (b'{"prompt": "a", "response": None}', 1, 29, "null, true and false"),
    (b'{\n "prompt": "a"\n},\n{\n "prompt": "b"\n}', 3, 2, "objects with commas between them need \\["),
    (b'{"prompt": "a", "response": }', 1, 29, "a value is missing$"),
    (b'[{"prompt": "a", "response": , "id": 1}]', 1, 30, "a value is missing$"),
    (b'{"prompt": "a", "prompt": "b"}', 1, 1, "the key 'prompt' appears twice"),
    (b"prompt,response\na,b\n", 1, 1, "Expecting value"),
], ids=["array", "cut array", "trailing comma", "trailing comma in a row", "lines", "cut line", "two in a line",
        "lines of arrays", "single quotes", "single quotes later", "no quotes", "None", "commas between objects",
        "no value", "no value in an array", "a key twice", "CSV"])
def test_what_is_not_json_names_line_and_column(content, line, column, hint, tmp_path):
    """A syntax error is reported with file, line and column, what is wrong and what to write."""
    for packed in (content, gzip.compress(content)):
        say = refusal(tmp_path / "rows.json", packed)
        assert re.match(rf"rows.json line {line}, column {column} is not JSON: .*{hint}", say), say
        with pytest.raises(UserError, match=f"line {line}, column .* is not JSON"):
            data.load(str(tmp_path / "rows.json"), tiny, 100)


def test_every_bad_line_is_a_row_of_its_own(tmp_path):
    """So that the reader of rows can list all of them, or drop them, and still reads the lines between."""
    got = rows_of(tmp_path / "rows.jsonl", GOOD_LINE + b"{'a'}\n" + GOOD_LINE + b'{"cut": "x\n' + GOOD_LINE)
    assert [type(row).__name__ for row in got] == ["dict", "UserError", "dict", "UserError", "dict"]
    assert "line 4, column 9" in str(got[3])


PACKED = gzip.compress(os.urandom(200).hex().encode())


@pytest.mark.parametrize("content, say", [
    (ARRAY[:20] + b"\xff" + ARRAY[20:], "not UTF-8"),
    ('{"prompt": "河", "response": "江"}'.encode("gbk"), "iconv -f gbk -t utf-8"),
    (PACKED[:-12], "decompressed"), (PACKED[:-8] + b"\0" * 8, "decompressed"),
    (PACKED[:20] + b"\xff" * 20 + PACKED[40:], "decompressed"), (b"[" * 200_000, "is not JSON"),
    (b'[{"prompt": "a", "response": "b", "n": ' + b"1" * 5000 + b"}]", "is not JSON"),
    (b"PK\x03\x04" + b"x" * 99, "zip archive"), (b"BZh9" + b"x" * 99, "bunzip2"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
    (b"\n" * 1_000_010, "blank lines")],
    ids=["not UTF-8", "GBK", "cut gzip", "gzip with a wrong sum", "damaged gzip", "nested too deep", "long number",
         "zip", "bzip2", "LFS", "newlines"])
def test_a_file_that_cannot_be_read_is_named(content, say, tmp_path):
    """Bytes that are not text, a damaged archive, or JSON that Python can't parse: the error has the file."""
    assert say in refusal(tmp_path / "rows.jsonl", content)


@pytest.mark.parametrize("content", [b"", b" \n ", b"[]", BOM, gzip.compress(b""), b'{"data": []}'],
                         ids=["empty", "blank", "empty array", "BOM only", "gzip of nothing", "empty data"])
def test_a_file_without_rows_is_named(content, tmp_path):
    """A file without rows is an error that has its name."""
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(path)) + ": no rows"):
        data.load(str(path), tiny, 100)


def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    assert "is not a file" in refusal(tmp_path / "rows.jsonl")


# ---- in chunks ------------------------------------------------------------------------------------------

VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                      lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=6)


@settings(max_examples=100, deadline=None)
@given(st.lists(VALUES), st.sampled_from([1, 3, 17, 1000]), st.sampled_from([None, 1]), st.booleans(),
       st.none() | st.tuples(st.integers(0, 200), st.sampled_from(["", ",", "]", "}", "x", '"', "\n"])))
def test_an_array_in_chunks_equals_json_loads(rows, chunk, indent, ascii_only, damage):
    """For any array and chunk size: the values of json.loads, or its error with the same line and column."""
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    if damage:
        text = text[: 1 + damage[0]] + damage[1] + text[2 + damage[0] :]
    try:
        expected = json.loads(text, object_pairs_hook=containers.unique)
    except json.JSONDecodeError as error:
        expected = f"line {error.lineno}, column {error.colno}"
    except ValueError as error:
        expected = str(error)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(containers, "CHUNK", chunk)
        try:
            got = list(containers.json_array(io.StringIO(text), "rows.json"))
        except ValueError as error:
            assert isinstance(expected, str) and expected in str(error), (text, expected)
        else:
            assert got == expected, text


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(), VALUES, max_size=3), st.lists(st.fixed_dictionaries({"prompt": st.text()}),
                                                                min_size=1),
       st.sampled_from([1, 3, 17, 1000]), st.sampled_from([None, 1]))
def test_an_object_in_chunks_equals_json_loads(about, rows, chunk, indent):
    """A list of rows in an object is found and read in any chunk size."""
    about = {key + " ": value for key, value in about.items() if not (isinstance(value, list) and value and
                                                                      isinstance(value[0], dict))}
    path = os.path.join(containers.__file__, "..", "..", "x")
    text = json.dumps({**about, "data": rows}, indent=indent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(containers, "CHUNK", chunk)
        patch.setattr(containers, "open_text", lambda path: io.StringIO(text))
        assert [row for _, row in containers.json_rows(path, None, "{")] == rows


@pytest.mark.parametrize("form", ["array", "lines", "object", "indented object", "indented objects"])
def test_rows_are_read_in_chunks(form, tmp_path):
    """3,000 rows of 5 kB: only a few chunks of text are in memory, whatever holds the rows."""
    path, row = tmp_path / "rows.json", {"prompt": "p", "response": "word " * 1000}
    path.write_text({"array": json.dumps([row] * 3000, indent=0), "lines": (json.dumps(row) + "\n") * 3000,
                     "object": json.dumps({"by": {"a": [1]}, "data": [row] * 3000, "x": 1}),
                     "indented object": json.dumps({"data": [row] * 3000, "x": 1}, indent=1),
                     "indented objects": (json.dumps(row, indent=1) + "\n") * 3000}[form])
    tracemalloc.start()
    assert sum(row == r for _, r in containers.read_rows(str(path))) == 3000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * containers.CHUNK < path.stat().st_size


def test_an_error_near_the_end_has_the_right_place(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "p", "response": "word " * 1000}] * 2000, indent=0)[:-1] + ",\n{oops}]")
    assert f"line {2000 * 4 + 3}, column 2 is not JSON" in refusal(path)


@pytest.mark.parametrize("content", ['{"a": "' + "x" * 3000 + '"}', '[{"a": "' + "x" * 3000 + '"}]',
                                     '{\n"a": "' + "x" * 3000 + '"}', 'a,b\n"' + "x" * 3000 + '",y\n'])
def test_a_row_that_is_too_long_is_refused(content, tmp_path, monkeypatch):
    """Without a limit, a gzip bomb would exhaust host memory."""
    monkeypatch.setattr(containers, "MAX_ROW", 2000)
    monkeypatch.setattr(containers, "CHUNK", 100)
    name = "rows.csv" if content.startswith("a,b") else "rows.json"
    assert re.search("may have at most|larger than field limit", refusal(tmp_path / name,
                                                                         gzip.compress(content.encode())))


# ---- CSV, TSV, text -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, content", [
    ("rows.csv", "prompt,response\na,b\n为什么,d \u2028 e\n"),
    ("rows.CSV", "\ufeffprompt, response\r\na,b\r\n\r\n为什么,d \u2028 e\r\n,\r\n"),
    ("rows.csv", "prompt;response\na;b\n为什么;d \u2028 e"), ("rows.csv", "prompt\tresponse\na\tb\n为什么\td \u2028 e"),
    ("rows.tsv", "prompt\tresponse\na\tb\n为什么\td \u2028 e\n"), ("rows.csv",
                                                                '"prompt","response"\n"a","b"\n为什么,d \u2028 e')])
def test_a_table_is_its_rows(name, content, tmp_path):
    """The header names the columns; semicolons and tabs are detected; blank lines are skipped."""
    for packed in (content.encode(), content.encode("utf-16")):
        assert rows_of(tmp_path / name, packed) == ROWS
    assert rows_of(tmp_path / f"{name}.gz", gzip.compress(content.encode())) == ROWS


def test_cells_of_a_table(tmp_path):
    """Quotes, commas and newlines in cells stay; a missing cell is None, an empty one is empty; places are lines."""
    path = tmp_path / "rows.csv"
    path.write_bytes(b'prompt,response,\n"a\r\nb","say ""x"", y",1\n,c,\nd\n')
    got = list(containers.read_rows(str(path)))
    assert got == [(f"{path} line 2", {"prompt": "a\r\nb", "response": 'say "x", y', "column 3": "1"}),
                   (f"{path} line 4", {"prompt": "", "response": "c", "column 3": ""}),
                   (f"{path} line 5", {"prompt": "d", "response": None, "column 3": None})]


def test_a_label_in_a_table_is_a_boolean(tmp_path):
    """Judgements of answers (KTO) in CSV; any other label, and any other column, is a text."""
    content = "prompt,response,Label,x\nq,a,False,True\nq,b,TRUE,true\nq,c,sports,1\n"
    assert [(row["Label"], row["x"]) for row in rows_of(tmp_path / "rows.csv", content)] == [
        (False, "True"), (True, "true"), ("sports", "1")]
    assert data.load(str(tmp_path / "rows.csv"), tiny, 100).ledger.dropped == {"Label is false": 1}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff")), min_size=2,
                         max_size=2), max_size=5), st.sampled_from([",", "\t"]))
def test_any_table_that_python_writes_is_read_back(table, delimiter):
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([["q", "a"], *table])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(containers, "open_text", lambda path, newline: io.StringIO(text.getvalue(), newline=newline))
        got = [list(row.values()) for _, row in containers.csv_rows("x", delimiter)]
    assert got == [cells for cells in table if any(map(str.strip, cells))]


@pytest.mark.parametrize("content, say", [
    ("prompt,response\na,b\na,b,c\n", "rows.csv line 3: 3 cells, and the header has 2"),
    ("prompt,prompt\na,b\n", "rows.csv line 1: the column 'prompt' appears twice"),
    ('prompt,response\n"a"b,c\n', "rows.csv line 2: not valid CSV"),
    ('prompt,response\na,b\n"a,b\nc,d\n', "rows.csv line 3: not valid CSV")])
def test_a_damaged_table_names_the_line(content, say, tmp_path):
    assert refusal(tmp_path / "rows.csv", content).startswith(say)


def test_a_text_file_is_one_document(tmp_path):
    """All of its lines, blank ones too; only a byte order mark and CR are removed."""
    assert rows_of(tmp_path / "a.txt", "\ufeff One\r\n\r\n [x]\n") == [{"text": " One\n\n [x]\n"}]
    assert rows_of(tmp_path / "a.txt.gz", gzip.compress(b"[[Wiki]] page {x}")) == [{"text": "[[Wiki]] page {x}"}]
    assert rows_of(tmp_path / "a.txt", " \n") == []


# ---- zstd, parquet, arrow -------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [ARRAY, LINES], ids=["array", "lines"])
def test_zstd_is_read_like_gzip(content, tmp_path):
    """Of one and of several frames; a file that is cut is an error: zstandard itself would end silently."""
    zstandard = pytest.importorskip("zstandard")
    pack = zstandard.ZstdCompressor().compress
    assert rows_of(tmp_path / "rows.jsonl.zst", pack(content)) == ROWS
    assert rows_of(tmp_path / "rows.json.zst", pack(content[:30]) + pack(b"") + pack(content[30:])) == ROWS
    many = pack(b'{"a": "' + os.urandom(200_000).hex().encode() + b'"}\n')
    for broken in (pack(content)[:-3], many[:1000], many[:-1000], pack(content) + b"xx"):
        assert "can't be decompressed" in refusal(tmp_path / "rows.jsonl.zst", broken)


def test_zstd_without_the_package_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    monkeypatch.setitem(__import__("sys").modules, "compression.zstd", None)
    assert re.search("-m pip install zstandard$", refusal(tmp_path / "rows.jsonl.zst", b"\x28\xb5\x2f\xfdxx"))


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_parquet_and_arrow_files_are_their_rows(kind, tmp_path):
    """All rows of all batches; keys that a row does not have are None, at every depth."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": str(i), "response": "a" if i % 2 else None, "m": [{"x": i, "y": None}]} for i in range(5000)]
    table, path = pyarrow.Table.from_pylist(rows), tmp_path / "rows"
    if kind == "parquet":
        parquet.write_table(table, path, row_group_size=700)
    else:
        make = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
        with make(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2300)
    assert rows_of(path) == rows


@pytest.mark.parametrize("content", [b"PAR1", b"PAR1" + b"x" * 99 + b"PAR1", None, b"ARROW1\0\0" + b"x" * 99,
                                     b"\xff" * 4 + b"\1\0\0\0" + b"x" * 99],
                         ids=["short", "no footer", "page", "arrow", "stream"])
def test_a_damaged_parquet_or_arrow_file_is_named(content, tmp_path):
    """Both when its footer is read, and when its pages are."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    if content is None:
        parquet.write_table(pyarrow.Table.from_pylist([{"prompt": os.urandom(99).hex()}] * 99), path)
        content = path.read_bytes()
        content = content[:4] + bytes(byte ^ 255 for byte in content[4:60]) + content[60:]
    assert re.match("rows.parquet can't be read as (parquet|arrow): ", refusal(path, content))


def test_parquet_without_the_package_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert re.search("parquet file and needs pyarrow; .*-m pip install pyarrow$", refusal(tmp_path / "a.parquet",
        b"PAR1"))


@pytest.mark.full
def test_a_million_rows_stay_bounded(tmp_path):
    """1,000,000 JSON Lines rows: less than 8 MB of Python objects at a time."""
    path = tmp_path / "rows.jsonl"
    with open(path, "w") as f:
        for i in range(10**6):
            f.write(f'{{"prompt": "question {i}", "response": "answer {i}"}}\n')
    tracemalloc.start()
    assert sum(1 for _ in read_files(f"{path}")) == 10**6
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6


def test_two_files_are_read_one_after_another(tmp_path):
    first, second = write(tmp_path / "z.json", ROWS), write(tmp_path / "a.json", ROWS[:1])
    assert [where for where, _ in read_files(f"{first},{second}")] == [f"{first}[0]", f"{first}[1]", f"{second}[0]"]
