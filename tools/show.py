"""Look at data before training: python tools/show.py show|stats FILE --model DIR"""

if __name__ == "__main__":
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from settings import venv

    venv.enter()  # where torch is missing, continue in the .venv that train.sh made

import itertools
import os
import sys
from dataclasses import dataclass

import numpy as np

import data
from disk import pretrained
from settings import venv
from settings.errors import UserError, run
from settings.parser import check, parse, setting
from text import template
from text.formats import KEYS


@dataclass
class Config:
    """Look at data before training: python tools/show.py show|stats FILE [flags]"""

    do: str | None = setting(None, "show: print conversations; stats: print lengths and packing",
                             ("show", "stats"), group="data")
    data: str = setting("./data/example_sft.json", "file, directory or hub dataset, as in sft.py")
    model: str = setting("tiny", "its tokenizer and chat template are used: directory, hub id or tiny")
    n: int = setting(3, "show: number of conversations", low=1)
    ids: bool = setting(False, "show: print token ids instead of text")
    max_length: int = setting(2048, "show: truncate to this length; stats: tokens per micro-batch", low=2)
    batch_size: int = setting(64, "stats: conversations per step", low=1)
    train_on: str = setting("all", "train all assistant turns, or the last one only", ("all", "last"))
    prompt_key: str = setting(KEYS[0], "column with the question, as in sft.py")
    response_key: str = setting(KEYS[1], "column with the answer, as in sft.py")
    messages_key: str = setting(KEYS[2], "column with the list of messages, as in sft.py")

    def __post_init__(self):
        check(self)


def show(dataset, tokenizer, count, ids, color):
    """Print the first `count` conversations as the model sees them.

    ids    print token ids instead of text
    color  print targets in green; otherwise between « and »
    """
    before, after = ("\033[32m", "\033[0m") if color else ("«", "»")
    for i in range(min(count, len(dataset))):
        conversation = slice(dataset.starts[i], dataset.starts[i + 1])
        tokens, loss_mask = dataset.tokens[conversation], dataset.loss_mask[conversation]
        print(f"--- {dataset.source(i)}: {len(tokens)} tokens, {dataset.n_targets[i]} targets")
        borders = [0, *(np.flatnonzero(np.diff(loss_mask)) + 1), len(tokens)]
        for start, stop in itertools.pairwise(borders):
            span = tokens[start:stop].tolist()
            if ids:
                text = " ".join(map(str, span)) + " "
            else:
                text = tokenizer.tokenizer.decode(span, skip_special_tokens=False)
            print(f"{before}{text}{after}" if loss_mask[start] else text, end="")
        print()


def stats(dataset, capacity, batch_size):
    """Print how long conversations are, what --max_length would truncate, and how full micro-batches are.

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
    for max_length in (512, 1024, 2048, 4096):
        long = np.flatnonzero(n_tokens > max_length)
        spans = (slice(dataset.starts[i] + max_length, dataset.starts[i + 1]) for i in long)
        lost = sum(int(dataset.loss_mask[span].sum()) for span in spans)
        print(f"--max_length {max_length:<5,} truncates {len(long):,} rows ({len(long) / len(n_tokens):.2%}) "
              f"and removes {lost:,} targets ({lost / n_targets:.2%})")
    lengths = np.minimum(dataset.n_inputs, capacity)
    n_used = n_batches = 0
    order, cuts = data.Sampler(lengths, epochs=1, seed=42, batch_size=batch_size).epoch_order(0)
    for ids in np.split(order, cuts[1:-1]):
        n_batches += len(data.pack(lengths[ids], capacity))
        n_used += int(lengths[ids].sum())
    print(f"packing  {n_batches:,} micro-batches of {capacity:,} tokens, "
          f"{n_used / (n_batches * capacity):.1%} full with --batch_size {batch_size}")


def main():
    arguments = ["--n" if argument == "-n" else argument for argument in sys.argv[1:]]
    cfg, _ = parse(Config, arguments, positional=["do", "data"])
    if not cfg.do:
        program = venv.command("tools/show.py")
        raise UserError(f"show or stats is missing; run {program} show FILE --model DIR, or "
                        f"{program} stats FILE --model DIR")
    tokenizer = template.ChatTokenizer(pretrained.model_directory(cfg.model))
    max_length, limit = (cfg.max_length, cfg.n) if cfg.do == "show" else (2**31 - 1, None)
    dataset = data.load(cfg.data, tokenizer, max_length, train_on=cfg.train_on, limit=limit,
                        keys=(cfg.prompt_key, cfg.response_key, cfg.messages_key))
    if cfg.do == "show":
        show(dataset, tokenizer, cfg.n, cfg.ids, sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    else:
        print(*dataset.ledger.lines(), sep="\n")
        stats(dataset, cfg.max_length, cfg.batch_size)


if __name__ == "__main__":
    run(main)
