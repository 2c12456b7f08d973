"""--val_split: which rows of the training data are for validation, by a hash of what each one says."""

import hashlib
import json

from settings.errors import UserError


SAID = "role", "name", "content", "reasoning_content", "tool_calls"  # the keys of a message that count


def is_validation(row, share):
    """Whether a formats.Row belongs to the share (0 to 1) of the rows that are for validation.

    It depends on the row's messages, tools, text or tokens alone: not on the file, the order, the names of
    the columns, ids beside the text, or the model. So equal rows are on the same side, and a larger share has
    the rows of a smaller one. A row that is not trained has nothing to validate with.
    """
    if row.dropped:
        return False
    messages = [{key: message[key] for key in SAID if message.get(key) is not None}
                for message in row.messages or ()]
    ids = row.tokens and list(map(int, row.tokens[0]))
    content = json.dumps([messages, row.tools, row.text, ids], sort_keys=True, default=str)
    digest = hashlib.blake2b(content.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def check(spec, options, rows):
    """Raise UserError if --val_split leaves no row for a side; `rows`: those of the side in data.Options."""
    if options.val_split and not rows:
        side, way = ("validation", "raise") if options.is_validation else ("training", "lower")
        raise UserError(f"{spec}: --val_split {options.val_split}: no row is for {side}. A hash of each row "
                        f"decides, so of few rows it may be none; {way} it, or pass --val_data FILE")
