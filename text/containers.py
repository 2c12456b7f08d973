"""A data file -> its rows. Containers: JSON, JSON Lines, gzip of either, parquet.

A file may be untrusted and larger than host memory: it is read in chunks, and errors name the file and place.
"""

import contextlib
import gzip
import json
import re
import sys
import zlib

from settings.errors import UserError

CHUNK = 2**20  # characters of a JSON array that are read at a time
MAX_ROW = 2**26  # characters of one row: without a limit, a gzip bomb would exhaust host memory
SPACE, DECODER = re.compile(r"[ \t\n\r]*"), json.JSONDecoder()
TOO_LONG = f"a row may have at most {MAX_ROW:,} characters, and this one is longer"
ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")


def read_rows(path):
    """Yield the rows of one file. Only a chunk of the file is in memory at a time."""
    with open(path, "rb") as f:
        magic = f.read(4)
    if magic == b"PAR1":
        yield from parquet_rows(path)
        return
    open_text = gzip.open if magic[:2] == b"\x1f\x8b" else open
    with open_text(path, "rt", encoding="utf-8") as f:
        try:
            char = f.read(1)
            has_bom = char == "\ufeff"  # Python's utf-8-sig would also drop an incomplete byte order mark
            if has_bom:
                char = f.read(1)
            while char.isspace():
                char = f.read(1)
            f.seek(0)
            f.read(int(has_bom))
            if char == "[":
                yield from json_array(f, path)
                return
            for number, line in enumerate(iter(lambda: f.readline(MAX_ROW + 1), ""), 1):
                if len(line) > MAX_ROW:
                    raise not_json(path, number, 1, TOO_LONG)
                if line.strip():
                    yield parse_json(line, path, number)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8: {error}; if it is GBK, convert it: iconv -f gbk -t utf-8 "
                            "OLD > NEW") from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path} can't be decompressed: {error}") from error


def parquet_rows(path):
    """Yield the rows of a parquet file. Only one of its batches is in memory at a time."""
    try:
        import pyarrow.parquet  # optional package: only parquet files need it
    except ImportError as error:
        raise UserError(f"{path} is a parquet file and needs pyarrow; run {sys.executable} -m pip install "
                        "pyarrow") from error

    @contextlib.contextmanager
    def reading():
        try:
            yield
        except (pyarrow.ArrowException, ValueError, OSError) as error:  # a damaged file raises any of them
            raise UserError(f"{path} can't be read as parquet: {error!s:.300}") from error

    with reading():
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
    while True:
        with reading():
            batch = next(batches, None)
            rows = None if batch is None else batch.to_pylist()
        if rows is None:
            return
        yield from rows


def json_array(f, path):
    """Yield the elements of a JSON array one by one. Only a chunk of the text is in memory at a time.

    Python's parser reads each element; if the chunk ends inside one, it starts again with twice the text.
    Raises UserError with line and column.
    """
    text, at = "", 0  # the chunk in memory, and the position in it
    line, column = 1, 0  # where the chunk begins in the file

    def grow():
        """Drop the text before `at` and read more. Returns False at the end of the file."""
        nonlocal text, at, line, column
        chunk = f.read(max(CHUNK, len(text) - at))
        if not chunk:
            return False
        done, text, at = text[:at], text[at:] + chunk, 0
        if "\n" in done:
            line, column = line + done.count("\n"), 0
        column += len(done) - done.rfind("\n") - 1
        return True

    def peek():
        """Move to the next character that is not white space and return it; "" at the end of the file."""
        nonlocal at
        while True:
            at = SPACE.match(text, at).end()
            if at < len(text) or not grow():
                return text[at : at + 1]

    def error_at(position, message):
        before = text[:position]
        place = len(before) - before.rfind("\n")
        if "\n" not in before:
            place += column
        return not_json(path, line + before.count("\n"), place, message)

    def element():
        nonlocal at
        while True:
            try:
                value, end = DECODER.raw_decode(text, at)
            except json.JSONDecodeError as error:
                # More text can only help near the end of the chunk, or in a string without its closing quote.
                may_continue = error.pos > len(text) - 20 or error.msg.startswith("Unterminated")
                if may_continue and len(text) - at > MAX_ROW:
                    raise error_at(at, TOO_LONG) from error
                if may_continue and grow():
                    continue
                raise error_at(error.pos, error.msg) from error
            except (ValueError, RecursionError) as error:
                raise error_at(at, error) from error
            if end - at > MAX_ROW:
                raise error_at(at, TOO_LONG)
            if end + 20 < len(text) or not grow():  # otherwise a number may continue in the next chunk
                at = end
                return value

    peek()
    at, char = at + 1, ","  # after the [
    if peek() == "]":
        at, char = at + 1, "]"
    while char == ",":
        peek()
        yield element()
        char = peek()
        at += 1
    if char != "]":
        raise error_at(at - 1, "expected , or ]")
    if peek():
        raise error_at(at, "text after the array")


def parse_json(text, path, line):
    """The value of a JSON text that begins at `line` of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise not_json(path, error.lineno + line - 1, error.colno, error.msg) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or too deep nesting
        raise not_json(path, line, 1, error) from error


def not_json(path, line, column, message):
    return UserError(f"{path} is not JSON: line {line}, column {column}: {message}; expected a JSON array, "
                     "or one JSON object per line")
