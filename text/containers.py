"""A data file -> its rows. Containers: JSON, JSON Lines, CSV, TSV, text, their .gz and .zst, parquet, arrow.

A file may be untrusted and larger than host memory: it is read in chunks, and errors name the file and place.
"""

import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import re
import sys
import zlib

from settings.errors import UserError
from text import keys

CHUNK = 2**20  # characters of JSON text that are read at a time
MAX_ROW = 2**26  # characters of one row: without a limit, a gzip bomb would exhaust host memory
BATCH = 1000  # rows of parquet and arrow that are Python objects at a time
TOO_LONG = (f"a row may have at most {MAX_ROW:,} characters, and this one is longer; write the rows as JSON "
            "Lines, one object per line")
TEXT_ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
ENDINGS = (*(kind + packed for kind in TEXT_ENDINGS for packed in ("", ".gz", ".zst")), ".parquet", ".arrow")
SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation",
          "val": "validation", "dev": "validation", "eval": "validation", "evaluation": "validation",
          "test": "test", "testing": "test"}  # word in a name: the split that it means
WRAPPERS = {"data", "rows", "examples", "instances", "items", "samples", "records", "entries", "dataset",
            "results"}  # keys of the list of rows in an object
ROW_COLUMNS = {name for key in keys.ROW_KEYS for name in key.names.split()} - WRAPPERS - {*SPLITS}
ROW_KEYS = {"prompt", "response", "completion", "instruction", "output", "messages", "conversations", "text",
            "question", "answer", "input_ids", "chosen", "rejected"}  # an object with one of these is a row
BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
MESSAGE_KEYS = {"role", "from", "speaker"}
NOT_DATA = {b"PK\x03\x04": "a zip archive or an Excel file; unpack it, or save it as CSV",
            b"BZh": "compressed with bzip2; run bunzip2", b"\xfd7zXZ": "compressed with xz; run xz -d",
            b"version https://git-lfs": "a pointer of Git LFS, without the data; run git lfs pull"}


def read_rows(path, split=None, named=frozenset()):
    """Yield (where, row) for each row of a file. Only a chunk of the file is in memory at a time.

    where  "path[3]", the fourth row; in CSV and JSON Lines "path line 4", counted from 1
    row    as the file has it; in JSON Lines a UserError stands for a line that is not JSON, so that all such
           lines can be reported at once
    split  which rows of an object like {"train": [...], "test": [...]}: see split_order
    named  columns that the rows have, as dataset_info.json says; an object with one of them is a row

    The first bytes decide the container, the name only whether a text is CSV, TSV or plain text.
    Raises UserError, with file and place, for what can't be read.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # to open a pipe would block until somebody writes
        raise UserError(f"{path} is not a file; write the data to a file first: it is read more than once")
    with open(path, "rb") as f:
        magic = f.read(24)
    for start, what in NOT_DATA.items():
        if magic.startswith(start):
            raise UserError(f"{path} is {what}")
    if magic[:4] == b"PAR1" or magic[:6] == b"ARROW1" or magic[:4] == b"\xff" * 4:
        rows = parquet_rows(path) if magic[:4] == b"PAR1" else arrow_rows(path, magic[:6] == b"ARROW1")
        yield from numbered(path, rows)
        return
    name = re.sub(r"\.(gz|zst)$", "", path.lower())
    with reading(path):
        with open_text(path) as f:
            head = f.read(1000).lstrip("\ufeff \t\r\n")
        is_json = bool(re.match(r'\[\s*\{|\{\s*["\']', head))  # also in a file that is named .txt
        if name.endswith((".csv", ".tsv")) and not is_json:
            yield from csv_rows(path, "\t" if name.endswith(".tsv") else None)
        elif name.endswith(".txt") and not is_json:
            yield from text_rows(path)
        else:
            yield from json_rows(path, split, head[:1], named)


def numbered(path, rows):
    return ((f"{path}[{number}]", row) for number, row in enumerate(rows))


def split_order(split):
    """The splits to look for, in this order; None means --train_data, "validation" means --val_data."""
    return ("validation", "test") if split == "validation" else (SPLITS.get(split or "train", split),)


# ---- bytes -> text --------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(path):
    """Turn errors of decompression and decoding into UserErrors that name the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}; if it is GBK, convert it: iconv -f gbk -t utf-8 "
                        "OLD > NEW") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} can't be decompressed: {error}") from error


def open_text(path, newline=None):
    """Open a text file, decompressed. The byte order mark decides the encoding, UTF-8 is the default."""
    with open(path, "rb") as f:
        magic = f.read(4)
    if magic[:2] == b"\x1f\x8b":
        stream = gzip.open(path)
    elif magic == b"\x28\xb5\x2f\xfd":
        stream = open_zstd(path)
    else:
        stream = open(path, "rb")
    # detect_encoding also knows UTF-16 without a mark, by its zero bytes
    return io.TextIOWrapper(stream, json.detect_encoding(stream.peek(4)[:4]), newline=newline)


def open_zstd(path):
    try:
        from compression.zstd import ZstdDecompressor, ZstdError  # Python 3.14
    except ImportError:
        try:
            import zstandard  # optional package: only .zst files need it
        except ImportError as error:
            raise UserError(f"{path} is compressed with zstd and needs zstandard; run {sys.executable} -m "
                            "pip install zstandard") from error
        ZstdError = zstandard.ZstdError
        make = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
    else:
        make = ZstdDecompressor
    return io.BufferedReader(ZstdFile(path, make, ZstdError))


class ZstdFile(io.RawIOBase):
    """The decompressed bytes of a zstd file of one or more frames. A file that is cut raises EOFError.

    zstandard's own reader ends silently where a file is cut. Pieces are small: each may grow 30,000-fold.
    """

    def __init__(self, path, make, error_class):
        self.file, self.make, self.error_class = open(path, "rb"), make, error_class
        self.frame, self.rest, self.content = None, b"", b""

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.content:
            piece = self.rest or self.file.read(1024)
            if not piece:
                if self.frame is not None:
                    raise EOFError("the file is cut")
                return 0
            self.frame = self.frame or self.make()
            try:
                self.content = self.frame.decompress(piece)
            except self.error_class as error:
                raise EOFError(error) from error
            self.rest = self.frame.unused_data if self.frame.eof else b""
            if self.frame.eof:
                self.frame = None
        n = min(len(buffer), len(self.content))
        buffer[:n], self.content = self.content[:n], self.content[n:]
        return n

    def close(self):
        self.file.close()
        super().close()


def lines(f, path, first=1):
    """Yield (number, line) of a text file. Raises UserError for a line of more than MAX_ROW characters."""
    blank = 0
    for number, line in enumerate(iter(lambda: f.readline(MAX_ROW + 1), ""), first):
        if len(line) > MAX_ROW:
            raise not_json(path, number, 1, TOO_LONG)
        blank = blank + 1 if line.isspace() else 0
        if blank > 10**6:  # a gzip bomb of newlines would take minutes
            raise UserError(f"{path} line {number}: a million blank lines one after another; remove them")
        yield number, line


# ---- CSV, TSV, text -------------------------------------------------------------------------------------


def csv_rows(path, delimiter):
    """Yield (where, row) of a CSV file with a header; a cell that a row lacks at its end is None.

    delimiter  None: comma, semicolon or tab, which is in the header most often
    """
    csv.field_size_limit(MAX_ROW)  # of the process; the default is 131,072 characters
    with open_text(path, newline="") as f:
        content = (line for _, line in lines(f, path))
        header = next(content, "")
        delimiter = delimiter or max(",;\t", key=header.count)
        reader = csv.reader(itertools.chain([header], content), delimiter=delimiter, strict=True)
        names, before = None, 0  # of the header; the line where the row before ends
        try:
            for cells in reader:
                number, before = before + 1, reader.line_num
                if not any(map(str.strip, cells)):
                    continue
                if names is None:
                    names = [name.strip("\ufeff ") or f"column {i}" for i, name in enumerate(cells, 1)]
                    labels = [name for name in names if keys.row_use(name) == "label"]
                    twice = [name for name in names if names.count(name) > 1]
                    if twice:
                        raise UserError(f"{path} line {number}: the column {twice[0]!r:.60} appears twice in "
                                        "the header; rename one")
                elif len(cells) > len(names):
                    raise UserError(f"{path} line {number}: {len(cells)} cells, and the header has "
                                    f"{len(names)}; put a cell with {delimiter!r} in it into double quotes")
                else:
                    row = dict(itertools.zip_longest(names, cells))
                    for name in labels:  # a table has no booleans, and only those say that an answer is bad
                        row[name] = BOOLEANS.get(row[name], row[name])
                    yield f"{path} line {number}", row
        except csv.Error as error:
            raise UserError(f"{path} line {before + 1}: not valid CSV: {error}; a cell in double quotes must "
                            "end with one, and quotes inside it are doubled") from error


def text_rows(path):
    """Yield the one row {"text": ...} of a text file: it is one document, however many lines it has."""
    with open_text(path) as f:
        text = f.read(MAX_ROW + 1)
    if len(text) > MAX_ROW:
        raise UserError(f"{path}: a text file is one document of at most {MAX_ROW:,} characters; split it, "
                        'or write JSON Lines of {"text": ...}')
    if text.strip("\ufeff \t\r\n"):
        yield f"{path}[0]", {"text": text.lstrip("\ufeff")}


# ---- parquet and arrow ----------------------------------------------------------------------------------


def parquet_rows(path):
    """Yield the rows of a parquet file, a batch at a time."""
    pyarrow = import_pyarrow(path)
    import pyarrow.parquet

    with arrow_errors(pyarrow, path, "parquet"):
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=BATCH)
    yield from batch_rows(pyarrow, path, "parquet", batches)


def arrow_rows(path, is_file):
    """Yield the rows of an arrow file: of the IPC file format, or of the stream that save_to_disk writes."""
    pyarrow = import_pyarrow(path)
    import pyarrow.ipc

    with arrow_errors(pyarrow, path, "arrow"):
        source = pyarrow.memory_map(path)
        if is_file:
            reader = pyarrow.ipc.open_file(source)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(source))
    yield from batch_rows(pyarrow, path, "arrow", batches)


def import_pyarrow(path):
    try:
        import pyarrow  # optional package: only parquet and arrow files need it
    except ImportError as error:
        kind = "an arrow" if path.lower().endswith(".arrow") else "a parquet"
        raise UserError(f"{path} is {kind} file and needs pyarrow; run {sys.executable} -m pip install "
                        "pyarrow") from error
    return pyarrow


@contextlib.contextmanager
def arrow_errors(pyarrow, path, kind):
    try:
        yield
    except (pyarrow.ArrowException, ValueError, OSError) as error:  # a damaged file raises any of them
        raise UserError(f"{path} can't be read as {kind}: {error!s:.300}") from error


def batch_rows(pyarrow, path, kind, batches):
    while True:
        with arrow_errors(pyarrow, path, kind):
            batch = next(batches, None)
            if batch is None:
                return
            batch.validate(full=True)  # offsets of a damaged file would lead outside its memory
        for start in range(0, batch.num_rows, BATCH):
            with arrow_errors(pyarrow, path, kind):
                rows = batch.slice(start, BATCH).to_pylist()
            yield from rows


# ---- JSON -----------------------------------------------------------------------------------------------


def unique(pairs):
    """The object of a list of (key, value). Python's parser would drop the first of two values of a key."""
    value = dict(pairs)
    if len(value) < len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r:.60} appears twice in one object")
            seen.add(key)
    return value


SPACE, BLANK = re.compile(r"[ \t\n\r]*"), re.compile(r"[ \t\n\r\ufeff]*")  # BLANK: between rows
DECODER = json.JSONDecoder(object_pairs_hook=unique)


def json_rows(path, split, first, named=frozenset()):
    """Yield (where, row) of JSON text whose first character is `first`: an array, JSON Lines, other objects.

    An object that is no row but holds the rows stands for them, see rows_inside.
    """
    is_lines = True
    with open_text(path) as f:
        text = JsonText(f, path)
        if first == "[":
            check_split(path, split)
            text.peek(BLANK)
            yield from numbered(path, text.elements())
            text.end("array")
            return
        if first == "{":
            text.peek(BLANK)
            line, newline, _ = text.text[text.at :].partition("\n")
            is_lines = not (newline and continues(line))
            if text.is_long() and (key := text.key_of_rows(split, named)):
                yield from numbered(path, list_at_key(path, key))
                return
    with open_text(path) as f:
        rows = json_lines(f, path) if is_lines else numbered(path, JsonText(f, path).objects())
        some = list(itertools.islice(rows, 2))
        if len(some) == 1 and isinstance(some[0][1], dict):  # the only object of the file
            yield from rows_inside(path, *some[0], split, named)
            return
        check_split(path, split)
        yield from some
        yield from rows


def check_split(path, split):
    if split not in (None, "train", "validation"):
        raise UserError(f"{path}@{split}: this file has no splits; pass {path}")


def continues(line):
    """Whether a line is the beginning of JSON that needs more lines, such as {"prompt": 1,"""
    try:
        DECODER.decode(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line.rstrip()) and not error.msg.startswith("Unterminated")
    except (ValueError, RecursionError):
        pass
    return False


def json_lines(f, path):
    """Yield (where, row) of JSON Lines; for a line that is not JSON the row is a UserError."""
    for number, line in lines(f, path):
        line = line.lstrip("\ufeff")  # files that were joined may each begin with a byte order mark
        if line and not line.isspace():
            try:
                row = DECODER.decode(line.rstrip("\n"))
            except json.JSONDecodeError as error:
                row = not_json(path, number, error.colno, error.msg, line[error.colno - 1 :],
                               line[: error.colno - 1])
            except (ValueError, RecursionError) as error:  # a number of 5,000 digits, or too deep nesting
                row = not_json(path, number, 1, error)
            yield f"{path} line {number}", row


def rows_inside(path, where, value, split, named):
    """The (where, row) of a file that is one object: the rows in its list or columns, or itself.

    Columns are those of pandas: {"prompt": {"0": "a", "1": "b"}, ...}, {"prompt": ["a", "b"], ...},
    {"columns": ["prompt", ...], "data": [["a", ...], ...]}; also rows by index, {"0": {"prompt": "a"}, ...}.
    """
    key = list_of_rows(value, path, split, named)
    columns = list(value.values())
    if key is not None:
        return numbered(path, value[key])
    check_split(path, split)
    if value and all(map(str.isdigit, value)) and all(isinstance(row, dict) for row in columns):
        return numbered(path, columns)
    if isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):
        names = value["columns"]
        if all(isinstance(row, list) and len(row) == len(names) for row in value["data"]):
            return numbered(path, (dict(zip(names, row)) for row in value["data"]))
    if columns and all(isinstance(c, dict) and c and c.keys() == columns[0].keys() for c in columns):
        if all(index.isdigit() for index in columns[0]):
            return numbered(path, ({name: c[i] for name, c in value.items()} for i in columns[0]))
    if columns and all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns):
        has_texts = any(c and all(isinstance(x, (str, list)) for x in c) for c in columns)
        if has_texts and not any(isinstance(x, dict) for c in columns for x in c):
            return numbered(path, (dict(zip(value, cells)) for cells in zip(*columns)))
    return iter([(where, value)])


def list_of_rows(value, path, split, named):
    """The key of the list that holds the rows, if an object is no row itself; otherwise None.

    A list that begins with a message, {"role", "content"}, holds no rows. Nor does one of any name beside
    columns of a row, such as system or label: they would be lost.
    """
    columns = {key for key in value if key.lower() in ROW_COLUMNS}

    def may_hold_rows(key, items):
        if columns - {key} and key.lower() not in (*WRAPPERS, *SPLITS):
            return False
        if not isinstance(items, list) or not items:
            return items == [] and key in WRAPPERS
        if not isinstance(items[0], dict) or MESSAGE_KEYS & items[0].keys():
            return False
        if keys.row_use(key) == "messages" or key in named:  # or its turns have keys of their own
            return bool((ROW_KEYS - {"text"} | named) & items[0].keys())
        return key not in ROW_KEYS or bool(ROW_KEYS & items[0].keys())

    lists = [key for key, items in value.items() if may_hold_rows(key, items)]
    if (ROW_KEYS | named) & (value.keys() - set(lists)) or not lists:
        return None
    marked = {key: SPLITS[key.lower()] for key in lists if key.lower() in SPLITS}
    if marked:
        found = [key for wanted in split_order(split) for key in marked if wanted in (marked[key], key)]
        if not found:
            raise UserError(f"{path} has no rows of the split {' or '.join(split_order(split))}; it has "
                            f"{', '.join(marked)}: choose one, {path}@{next(iter(marked))}")
        return found[0]
    named = [key for key in lists if key.lower() in WRAPPERS] or lists
    if len(named) > 1:
        raise UserError(f"{path}: several lists could be its rows ({', '.join(lists):.200}); keep one")
    check_split(path, split)
    return named[0]


def list_at_key(path, key):
    """Yield the elements of the list with this key, of a file that is one object."""
    with open_text(path) as f:
        text = JsonText(f, path)
        text.peek(BLANK)
        for name in text.keys():
            if name == key:
                yield from text.elements()
            else:
                text.skip()


class JsonText:
    """JSON text of a file. Only a chunk of it is in memory at a time.

    Python's parser reads each value; if the chunk ends inside one, it starts again with twice the text.
    All raise UserError with line and column.
    """

    def __init__(self, f, path):
        self.file, self.path = f, path
        self.text, self.at = "", 0  # the chunk in memory, and the position in it
        self.line, self.column = 1, 0  # where the chunk begins in the file

    def grow(self):
        """Drop the text before `at` and read more. Returns False at the end of the file."""
        chunk = self.file.read(max(CHUNK, len(self.text) - self.at))
        if not chunk:
            return False
        done, self.text, self.at = self.text[: self.at], self.text[self.at :] + chunk, 0
        if "\n" in done:
            self.line, self.column = self.line + done.count("\n"), 0
        self.column += len(done) - done.rfind("\n") - 1
        return True

    def peek(self, space=SPACE):
        """Move to the next character that is not white space and return it; "" at the end of the file."""
        while True:
            self.at = space.match(self.text, self.at).end()
            if self.at < len(self.text) or not self.grow():
                return self.text[self.at : self.at + 1]

    def error_at(self, position, message):
        before = self.text[:position]
        column = len(before) - before.rfind("\n")
        if "\n" not in before:
            column += self.column
        return not_json(self.path, self.line + before.count("\n"), column, message, self.text[position:],
                        before[-1000:])

    def value(self):
        """The value that begins here."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # More text can only help near the end of the chunk, or in a string without its closing quote.
                may_continue = error.pos > len(self.text) - 20 or error.msg.startswith("Unterminated")
                if may_continue and len(self.text) - self.at > MAX_ROW:
                    raise self.error_at(self.at, TOO_LONG) from error
                if may_continue and self.grow():
                    continue
                raise self.error_at(error.pos, error.msg) from error
            except (ValueError, RecursionError) as error:
                raise self.error_at(self.at, error) from error
            if end - self.at > MAX_ROW:
                raise self.error_at(self.at, TOO_LONG)
            if end + 20 < len(self.text) or not self.grow():  # else a number may continue in the next chunk
                self.at = end
                return value

    def elements(self):
        """Yield the elements of the array that begins here, one by one."""
        self.at, char = self.at + 1, ","  # after the [
        if self.peek() == "]":
            self.at, char = self.at + 1, "]"
        while char == ",":
            self.peek()
            yield self.value()
            char = self.peek()
            self.at += 1
        if char != "]":
            raise self.error_at(self.at - 1, "expected , or ]")

    def keys(self):
        """Yield the keys of the object that begins here; after each the caller must read its value."""
        self.at, char = self.at + 1, ","  # after the {
        if self.peek() == "}":
            self.at, char = self.at + 1, "}"
        while char == ",":
            at_key = self.peek()
            key = self.value() if at_key == '"' else None
            if key is None or self.peek() != ":":
                raise self.error_at(self.at, "expected a key in double quotes and :")
            self.at += 1
            self.peek()
            yield key
            char = self.peek()
            self.at += 1
        if char != "}":
            raise self.error_at(self.at - 1, "expected , or }")

    def skip(self):
        """Read the value that begins here; returns it, of an array only the first element, in a list."""
        if self.text[self.at : self.at + 1] != "[":
            return self.value()
        first = []
        for element in self.elements():
            first = first or [element]
        return first

    def is_long(self):
        """Whether the object that begins here is longer than the chunk in memory."""
        try:
            DECODER.raw_decode(self.text, self.at)
        except json.JSONDecodeError as error:
            return error.pos > len(self.text) - 20 or error.msg.startswith("Unterminated")
        except (ValueError, RecursionError):
            pass
        return False

    def key_of_rows(self, split, named):
        """list_of_rows of the object that begins here, which is read; None if other text follows it."""
        outline = {key: self.skip() for key in self.keys()}
        return None if self.peek() else list_of_rows(outline, self.path, split, named)

    def objects(self):
        """Yield objects one after another, each of any number of lines."""
        while self.peek(BLANK):
            yield self.value()
            if self.peek(BLANK) not in ("", "{"):
                raise self.error_at(self.at, "expected { or the end of the file; objects with commas between "
                                             "them need [ before the first and ] after the last")

    def end(self, what):
        if self.peek():
            raise self.error_at(self.at, f"text after the {what}")


def json_array(f, path):
    """Yield the elements of a file that is a JSON array one by one."""
    text = JsonText(f, path)
    text.peek()
    yield from text.elements()
    text.end("array")


HINTS = [(r"'|[A-Za-z_]+\s*:", "keys and texts need double quotes"), (r"[}\]]", "remove the comma before it"),
         ("None|True|False", "JSON has null, true and false"), ("#|//", "JSON has no comments")]


def not_json(path, line, column, message, rest="", before=""):
    """The UserError for JSON text with a mistake.

    before, rest  the text before the mistake, and from it on
    """
    hints = [hint for pattern, hint in HINTS if re.match(pattern, rest) and "Expecting" in str(message)]
    if str(message).startswith("Unterminated"):  # "Unterminated string starting at"
        message, hints = f"{message} this column", ["its closing quote is missing"]
    if before.rstrip().endswith(":") and rest[:1] in ("}", "]", ","):
        hints = ["a value is missing"]
    return UserError("; ".join([f"{path} line {line}, column {column} is not JSON: {message}", *hints[:1]]))
