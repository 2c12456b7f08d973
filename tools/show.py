"""Look at data before training: python tools/show.py show|stats FILE --model DIR"""

if __name__ == "__main__":
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from settings import venv

    venv.enter()  # where torch is missing, continue in the .venv that train.sh made

import collections
import dataclasses
import inspect
import itertools
import os
import re
import shlex
import sys
import time
from typing import NamedTuple

import numpy as np

import data
import sft
from disk import pretrained
from settings import venv
from settings.errors import UserError, printable, run
from settings.parser import check, parse, setting
from text import token_cache
from text.sources import data_files, read_sources
from text.template import ChatTokenizer

EVERYTHING = 2**31 - 1  # --max_length that truncates nothing
LENGTHS = 512, 1024, 2048, 4096
SHOWN = 200  # characters of a truncated part


@dataclasses.dataclass
class Own:
    """The settings that only this program has."""

    do: str | None = setting(None, "show: print conversations; stats: print lengths, keys and packing",
                             ("show", "stats"), group="data")
    data: str = setting("./data/example_sft.json", "what --train_data of sft.py takes")
    n: int = setting(3, "show: number of conversations", low=1, unless="row or random or do=stats")
    row: int | None = setting(None, "show: this row of the file; the first one is 0", low=0,
                           unless="random or do=stats")
    random: int | None = setting(None, "show: so many conversations, drawn with --seed", low=1,
                                 unless="do=stats")
    seed: int = setting(42, "decides which ones --random draws", low=0, needs="random")
    ids: bool = setting(False, "show: print token ids instead of text", unless="do=stats")
    batch_size: int = setting(64, "stats: conversations per step", low=1, unless="do=show")
    cache: bool | str = setting(False, "list the token cache in --cache_dir; clear: remove its entries",
                                word="clear", unless="do")

    def __post_init__(self):
        check(self)


def data_settings():
    """The fields of sft.Config that decide what is trained: its first group.

    Except what `data` replaces, and what changes the model only.
    """
    fields = dataclasses.fields(sft.Config)
    after = next(i for i, field in enumerate(fields) if field.metadata["group"] and i)
    others = "train_data", "val_data", "resize_embeddings"
    return [field for field in fields[:after] if field.name not in others]


def config_class():
    """The dataclass of all settings: those of Own, and those of sft.py about data, with the same defaults."""
    changes = {"model": {"group": "as in sft.py"}, "cache_dir": {"needs": "cache"}}
    fields = []
    for field in data_settings():
        metadata = {**field.metadata, "env": None, "presets": (), **changes.get(field.name, {})}
        default = "tiny" if field.name == "model" else field.default
        fields.append((field.name, field.type, dataclasses.field(default=default, metadata=metadata)))
    cls = dataclasses.make_dataclass("Config", fields, bases=(Own,))
    cls.__doc__ = "Look at data before training: python tools/show.py show|stats FILE [flags]"
    return cls


Config = config_class()


def arguments_of(function, cfg):
    """{name: value} of the settings that are parameters of a function or class, which have the same names."""
    return {name: getattr(cfg, name) for name in inspect.signature(function).parameters if hasattr(cfg, name)}


def load(cfg, tokenizer, **changes):
    """The Dataset that sft.py would train on, not cached."""
    keys = cfg.prompt_key, cfg.response_key, cfg.messages_key
    options = {**arguments_of(data.Options, cfg), "too_long": cfg.too_long or "truncate", "keys": keys}
    return data.load(cfg.data, tokenizer, **{**options, **changes})


# ---- show -------------------------------------------------------------------------------------------------


class Style(NamedTuple):
    """What is printed around targets, and around what was truncated."""

    target: tuple
    truncated: tuple


PLAIN = Style(("«", "»"), ("⟪", "⟫"))
COLOURS = Style(("\033[32m", "\033[0m"), ("\033[31m", "\033[0m"))


def show(dataset, tokenizer, chosen, ids, style, full=None):
    """Print conversations as the model sees them.

    chosen  indices of conversations
    ids     print token ids instead of text
    style   how targets are marked; a weight that is not 1 follows its targets as ×0.5
    full    the same data without truncation, if some of `chosen` may be truncated
    """
    def text_of(tokens):
        if ids:
            return " ".join(map(str, tokens.tolist())) + " "
        return printable(tokenizer.tokenizer.decode(tokens.tolist(), skip_special_tokens=False))

    for i in chosen:
        span = slice(dataset.starts[i], dataset.starts[i + 1])
        tokens, loss_mask, weights = dataset.tokens[span], dataset.loss_mask[span], dataset.weights_of(i)
        lost, lost_targets = truncated_part(dataset, full, i)
        more = f", {len(lost):,} more tokens with {lost_targets:,} targets truncated" if len(lost) else ""
        print(f"--- {printable(dataset.source(i))}: {len(tokens)} tokens, {dataset.n_targets[i]} targets"
              f"{more}")
        changes = np.flatnonzero(np.diff(loss_mask) | (np.diff(weights) != 0)) + 1
        for start, stop in itertools.pairwise([0, *changes, len(tokens)]):
            before, after = style.target if loss_mask[start] else ("", "")
            weight = f"×{weights[start]:g}" if weights[start] not in (0, 1) else ""
            print(f"{before}{text_of(tokens[start:stop])}{after}{weight}", end="")
        if len(lost):
            (before, after), text = style.truncated, text_of(lost[:SHOWN])
            is_all = len(lost) <= SHOWN and len(text) <= SHOWN
            print(f"{before}truncated: {text[:SHOWN]}{'' if is_all else '…'}{after}", end="")
        print()


def truncated_part(dataset, full, i):
    """(tokens, number of targets among them) that --max_length has removed from conversation i."""
    if full is None:
        return np.zeros(0, np.int32), 0

    def same_row(dataset):
        return np.flatnonzero((dataset.file == file) & (dataset.row == row))

    file, row = dataset.file[i], dataset.row[i]
    here, there = same_row(dataset), same_row(full)
    if len(here) != len(there):  # a text that is cut into several pieces, or samples without targets
        return np.zeros(0, np.int32), 0
    j = there[np.searchsorted(here, i)]
    return (full.tokens[full.starts[j] + dataset.n_tokens[i] : full.starts[j + 1]],
            int(full.n_targets[j] - dataset.n_targets[i]))


def choose(dataset, cfg):
    """Indices of the conversations that --row, --random or --n names."""
    if cfg.row is not None:
        chosen = np.flatnonzero(dataset.row == cfg.row)
        if not len(chosen):
            raise UserError(f"--row {cfg.row}: no conversation comes from this row; {cfg.data} has "
                            f"{dataset.ledger.lines()[0].split(maxsplit=1)[1]}; rows count from 0")
        return chosen
    if cfg.random:
        count = min(cfg.random, len(dataset))
        return np.random.default_rng(cfg.seed).choice(len(dataset), count, replace=False)
    return np.arange(min(cfg.n, len(dataset)))


def show_command(cfg, tokenizer):
    limit = None if cfg.random else cfg.n
    if cfg.row is not None:
        n_files = sum(len(source.files) for source in data_files(cfg.data))
        limit = cfg.row + 1 if n_files == 1 else None
    dataset = load(cfg, tokenizer, limit=limit)
    chosen = choose(dataset, cfg)
    is_long = cfg.too_long in (None, "truncate") and np.any(dataset.n_tokens[chosen] == cfg.max_length)
    full = load(cfg, tokenizer, limit=limit, max_length=EVERYTHING) if is_long else None
    show(dataset, tokenizer, chosen, cfg.ids,
         COLOURS if sys.stdout.isatty() and "NO_COLOR" not in os.environ else PLAIN, full)
    counts, _, *remarks = dataset.ledger.lines()
    if dataset.ledger.of_rows > len(set(dataset.row[chosen])):
        print(f"--- of the {dataset.ledger.of_rows:,} rows that were read:")
    for line in [counts] * bool(dataset.ledger.dropped) + remarks:
        print(line)


# ---- stats ------------------------------------------------------------------------------------------------


def keys_of(rows):
    """(Counter of the keys of rows, Counter of the keys of their messages), without those that are null.

    Messages are the objects of any list in a row that have a "role" or a "from".
    """
    of_rows, of_messages = collections.Counter(), collections.Counter()
    for row in rows:
        for key, value in row.items() if isinstance(row, dict) else ():
            of_rows[key] += value is not None
            for item in value if isinstance(value, list) else ():
                if isinstance(item, dict) and ("role" in item or "from" in item):
                    of_messages.update(name for name, content in item.items() if content is not None)
    return of_rows, of_messages


def print_keys(rows, most=40):
    for name, counts in zip(("row keys", "message keys"), keys_of(rows)):
        found = [f"{printable(str(key)):.60} {count:,}" for key, count in counts.most_common(most) if count]
        more = f", and {len(counts) - most:,} more" if len(counts) > most else ""
        if found:
            print(f"{name:<12} {', '.join(found)}{more}")


def stats(dataset, capacity, batch_size, too_long=None):
    """Print how long conversations are, what --max_length would truncate, and how full micro-batches are.

    dataset   without truncation
    capacity  tokens per micro-batch
    """
    n_tokens, n_targets = dataset.n_tokens, int(dataset.n_targets.sum())
    percents = (0, 25, 50, 75, 90, 95, 99, 100)
    percentiles = zip(percents, np.percentile(n_tokens, percents))
    print("length   " + "  ".join(f"{percent}%: {n:,.0f}" for percent, n in percentiles))
    edges = [0, *(2**k for k in range(4, int(n_tokens.max()).bit_length() + 1))]
    counts = np.histogram(n_tokens, edges)[0]
    print(f"{'tokens':>22} {'conversations':>18}")
    for low, high, n in zip(edges, edges[1:], counts):
        print(f"{low:>9,} to {high - 1:<9,} {n:>18,} {'#' * round(34 * n / counts.max())}")
    verb = {"drop": "drops", "error": "refuses"}.get(too_long, "truncates")
    for max_length in sorted({*LENGTHS, capacity}):
        long = np.flatnonzero(n_tokens > max_length)
        kept = 0 if too_long in ("drop", "error") else max_length
        spans = (slice(dataset.starts[i] + kept, dataset.starts[i + 1]) for i in long)
        lost = sum(int(dataset.loss_mask[span].sum()) for span in spans)
        print(f"--max_length {max_length:<5,} {verb} {len(long):,} rows ({len(long) / len(n_tokens):.2%}) "
              f"and removes {lost:,} targets ({lost / n_targets:.2%})")
    lengths = np.minimum(dataset.n_inputs, capacity)
    n_used = n_batches = 0
    order, cuts = data.Sampler(lengths, epochs=1, seed=42, batch_size=batch_size).epoch_order(0)
    for ids in np.split(order, cuts[1:-1]):
        n_batches += len(data.pack(lengths[ids], capacity))
        n_used += int(lengths[ids].sum())
    print(f"packing  {n_batches:,} micro-batches of {capacity:,} tokens, "
          f"{n_used / (n_batches * capacity):.1%} full with --batch_size {batch_size}")


def stats_command(cfg, tokenizer):
    dataset = load(cfg, tokenizer, max_length=EVERYTHING, compared=EVERYTHING)
    print(*dataset.ledger.lines(dataset.files), sep="\n")
    print_keys(row for _, _, row, _ in read_sources(data_files(cfg.data)))
    stats(dataset, cfg.max_length, cfg.batch_size, cfg.too_long)


# ---- the cache --------------------------------------------------------------------------------------------


def cache_command(cache_dir, clears):
    """List the entries of the token cache, the one that was used last first, or remove them."""
    if not cache_dir:
        raise UserError("--cache needs a --cache_dir that is not none")
    entries = token_cache.clear(cache_dir) if clears else token_cache.entries(cache_dir)
    if not clears:
        print(f"{'MB':>10} {'made':>12} {'last used':>12}  model, data")
    for entry in [] if clears else entries:
        ages = [f"{days:,.1f} days" for days in ((time.time() - t) / 86400 for t in (entry.made, entry.used))]
        files = entry.about.get("files")
        files = files if files and isinstance(files, list) else ["?"]
        more = f" and {len(files) - 1:,} more" if len(files) > 1 else ""
        print(f"{entry.size / 1e6:>10,.1f} {ages[0]:>12} {ages[1]:>12}  "
              f"{printable(str(entry.about.get('model', '?')))}, {printable(str(files[0]))}{more}")
    total = f"{len(entries):,} entries, {sum(entry.size for entry in entries) / 1e6:,.1f} MB"
    command = f"{venv.command('tools/show.py')} --cache clear"
    if clears:
        print(f"{total} removed from {printable(cache_dir)}")
    else:
        print(f"{total} in {printable(cache_dir)}; {command} removes them")


def main():
    arguments = ["--n" if argument == "-n" else argument for argument in sys.argv[1:]]
    program = venv.command("tools/show.py")
    first = arguments[0] if arguments else "show"
    is_file = os.path.exists(first) or re.search("[./]", first)
    if first not in ("show", "stats") and not first.startswith("-") and is_file:
        raise UserError(f"{first}: what to do with it comes first: {program} show {shlex.join(arguments)}, "
                        "or stats in place of show")
    cfg, _ = parse(Config, arguments, positional=["do", "data"])
    if cfg.cache:
        cache_command(cfg.cache_dir, cfg.cache == "clear")
        return
    if not cfg.do:
        raise UserError(f"show or stats is missing; run {program} show FILE --model DIR, or "
                        f"{program} stats FILE --model DIR")
    directory = pretrained.model_directory(cfg.tokenizer or cfg.model, *["--tokenizer"] * bool(cfg.tokenizer))
    tokenizer = ChatTokenizer(directory, **arguments_of(ChatTokenizer, cfg))
    (show_command if cfg.do == "show" else stats_command)(cfg, tokenizer)


if __name__ == "__main__":
    run(main)
