"""The columns of one row of a data file: what they are for, and which of them have been used."""

import itertools
import math

from settings.errors import UserError
from text.keys import row_use
from text.messages import EMPTY, listed

TURNS = '[{"role", "content"}, ...]'
SHAPES = ('{"prompt", "response"}, {"instruction", "input"?, "output"}, {"messages" or "conversations": '
          f'{TURNS}}} or {{"conversations": [{{"from", "value"}}, ...]}}')


class Columns:
    """The columns of one row. It remembers which have been used.

    given         the row as it is
    row           column -> value, without nulls
    uses          column of the row as it is -> use (see text/keys.py), of those that have one
    by_use        use -> the columns that have a value, in the order of the row
    used          columns
    message_keys  unknown keys of messages, as the keys of a dict, which keeps their order
    """

    def __init__(self, row, where, keys):
        if not isinstance(row, dict):
            raise UserError(f"{where}: a row must be an object, not {type(row).__name__}; accepted are "
                            f"{SHAPES}")
        self.where, self.keys, self.given = where, keys, row
        self.row = {name: value for name, value in row.items() if not is_null(value)}
        self.used, self.message_keys, self.by_use = set(), {}, {}
        self.uses = {name: use for name in row if (use := row_use(name))}
        for name, use in self.uses.items():
            if name in self.row and self.row[name] not in EMPTY:
                self.by_use.setdefault(use, []).append(name)

    def error(self, text):
        return UserError(f"{self.where}: {text}")

    def names(self, use):
        """The columns of this use that have a value, or else the first one that is an empty text or list."""
        found = (name for name, known in self.uses.items() if known == use and name in self.row)
        return self.by_use.get(use) or list(itertools.islice(found, 1))

    def value(self, name):
        """The value of a column, which counts as used; without nulls. "a.b" may be b inside a."""
        self.used.add(name if name in self.row else name.partition(".")[0])
        values = values_of(self.row, name)
        return without_nulls(values[0], self.where) if values and not is_null(values[0]) else None

    def take(self, use):
        """The value of the column of this use, or None. Two columns with different values are an error."""
        names = self.by_use.get(use, [])
        values = [self.value(name) for name in names]
        if any(value != values[0] for value in values):
            raise self.error(f"the columns {listed(names)} differ; remove all but one")
        return values[0] if values else None

    def unused(self):
        columns = [name for name, value in self.row.items() if name not in self.used and value not in EMPTY]
        return (*columns, *(f"messages.{key:.60}" for key in self.message_keys))


def is_null(value):
    """Whether a value counts as absent: null, or pandas' NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def without_nulls(value, where):
    """A JSON value without keys whose value is null, at any depth: Arrow gives all objects the same keys."""
    def copied(value):
        if isinstance(value, dict):
            return {key: copied(item) for key, item in value.items() if item is not None}
        return [copied(item) for item in value] if isinstance(value, list) else value

    try:
        return copied(value)
    except RecursionError as error:
        raise UserError(f"{where}: lists and objects are nested too deep") from error


def values_of(row, key):
    """[the value of a key], or [] if the row does not have it. If there is no key "a.b", it is b inside a."""
    if key in row:
        return [row[key]]
    outer, _, inner = key.partition(".")
    return values_of(row[outer], inner) if inner and isinstance(row.get(outer), dict) else []
