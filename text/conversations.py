"""A row of a data file -> its conversations, rendered, with the places of their answers."""

import collections
import itertools
from typing import NamedTuple

from settings.errors import UserError
from text import inference, split
from text.bad_rows import BadRows
from text.formats import read_row
from text.masks import check_text
from text.sources import read_sources, source_name
from text.template import Notes

BATCH_CHARACTERS = 2**20  # tokenised in a second or two: --timeout counts from one batch to the next
MOST_ROWS = 10_000  # read for one batch: --val_split skips most of them on the side of validation
MOST_SOURCES, OTHER = 1000, "other"  # different names that are kept; the name of all the others


class Conversation(NamedTuple):
    """What is trained of a row, before it is tokenised: a chat, a plain text, or tokens."""

    file: int
    row: int
    where: str  # "file[row]" or "file line 7", for messages
    text: str = ""  # rendered with the chat template, or a plain text
    spans: list | None = None  # the assistant's turns in the text, see turns.Span; None: no messages
    tokens: tuple | None = None  # (ids, weights) if the row is tokens already
    dropped: str | None = None  # why the row is not trained, from its reader
    unused: tuple = ()  # columns, see formats.Row
    notes: Notes | None = None  # what else the template's owner should know, see template.Notes
    prompts: list = []  # of inference.Prompts, one for each trained turn that is compared
    is_first: bool = True  # False: --split_turns has made another one of the same row
    is_unasked: bool = False  # a trained answer is its first message
    source: int = 0  # number of the name of its source


def batches(sources, tokenizer, options, names):
    """Yield lists of Conversations: a thousand, or what exceeds BATCH_CHARACTERS, or those of MOST_ROWS rows.

    sources  of sources.data_files
    options  data.Options
    names    a dict, which gets {name of a source: its number}, see sources.source_name
    """
    rows = itertools.islice(read_sources(sources), options.limit)
    of_file = [(source.name, file) for source in sources for file in source.files]
    names.update({name: i for i, name in enumerate(dict.fromkeys(name for name, _ in of_file if name))})
    seen = collections.Counter()
    bad = BadRows(dropped if options.bad_rows == "drop" else None)
    batch, size, n_rows = [], 0, 0
    for file, number, row, where in rows:
        seen[file] += 1
        compares = seen[file] <= options.compared
        for conversation in bad.attempt(render, file, number, row, where, tokenizer, options, compares):
            name = source_name(row, *of_file[file])
            if name not in names and len(names) >= MOST_SOURCES:
                name = OTHER
            unused = conversation.unused
            if not of_file[file][0]:  # the name of the source is one use of this column
                unused = tuple(column for column in unused if column != "source")
            batch.append(conversation._replace(source=names.setdefault(name, len(names)), unused=unused))
            size += len(conversation.text)
        n_rows += 1
        if len(batch) >= 1000 or size > BATCH_CHARACTERS or n_rows == MOST_ROWS:
            yield batch
            batch, size, n_rows = [], 0, 0
    if batch:
        yield batch
    bad.check()


def dropped(file, number, row, where, error):
    """[the Conversation] of a row that can't be used, for --bad_rows drop."""
    return [Conversation(file, number, where, dropped="bad", notes=Notes(0, (), str(error)))]


def render(file, number, row, where, tokenizer, options, compares):
    """The Conversations of a row: one, or with --split_turns one for each trained turn.

    [] if --val_split has put it on the other side.

    options   data.Options
    compares  whether its prompts are compared with those of inference

    Raises UserError, which names the row.
    """
    row = read(row, where, options)
    if row is None:
        return []
    if row.messages is None:
        check_text(row.text or "", where)
        return [Conversation(file, number, where, row.text or "", None, row.tokens, row.dropped, row.unused)]
    if options.train_on == "last":
        for message in [m for m in row.messages if m["role"] == "assistant"][:-1]:
            message["weight"] = 0.0
    made, unused = [], row.unused + tokenizer.unread(row.template_kwargs, row.tools)
    samples = split_turns(row.messages) if options.split_turns else [row.messages]
    opening = next(message for message in row.messages if message["role"] != "system")
    if len(samples[-1]) < len(row.messages):
        unused += ("messages after the last trained turn",)
    for messages in samples:
        text, spans, notes = tokenizer.render_spans(messages, where, row.tools, row.template_kwargs)
        check_text(text, where)
        if not options.train_reasoning and any(span.answer is None and span.weight for span in spans):
            raise UserError(f"{where}: the chat template writes reasoning, but where it ends can't be found, "
                            "so --train_reasoning false can't mask it; write it between <think> and </think> "
                            "at the start of the answer")
        if not made and any(str(m["name"]) not in text for m in messages if m.get("name")):
            unused += ("messages.name",)
        prompts = inference.compare(tokenizer, messages, text, spans, row, where) if compares else []
        made.append(Conversation(file, number, where, text, spans, unused=unused, notes=notes,
                                 prompts=prompts, is_first=not made,
                                 is_unasked=opening["role"] == "assistant" and opening["weight"] > 0))
    return made


def read(row, where, options):
    """The formats.Row of a row, or None if --val_split has put it on the other side.

    One that can't be read is on the side of training. Raises UserError there, which names the row.
    """
    try:
        if isinstance(row, UserError):  # a line that is not JSON
            raise row
        found = read_row(row, where, options.keys)
    except UserError:
        if options.is_validation:
            return None
        raise
    share = options.val_split
    return None if share and split.is_validation(found, share) != options.is_validation else found


def split_turns(messages):
    """A conversation as several: each ends with a trained turn, and trains that turn only.

    A conversation without a trained turn stays as it is.
    """
    ends = [i for i, m in enumerate(messages, 1) if m["role"] == "assistant" and m["weight"]]
    return [[*({**m, "weight": 0.0} if m["role"] == "assistant" else m for m in messages[: end - 1]),
             messages[end - 1]] for end in ends] or [messages]
