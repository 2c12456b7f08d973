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

    do: str | None = setting(None, "what to do", ("show", "stats"), group="data")
    data: str = setting("./data/example_sft.json", "as --train_data of sft.py")
    model: str = setting("tiny", "model whose tokenizer and chat template are used: directory, hub id or tiny")
    n: int = setting(3, "show: conversations", low=1)
    ids: bool = setting(False, "show: token ids instead of text")
    max_length: int = setting(2048, "show: tokens kept; stats: tokens of a micro-batch", low=2)
    batch_size: int = setting(64, "stats: conversations a step", low=1)
    train_on: str = setting("all", "which of the assistant's turns", ("all", "last"))
    prompt_key: str = setting(KEYS[0], "as of sft.py")
    response_key: str = setting(KEYS[1], "as of sft.py")
    messages_key: str = setting(KEYS[2], "as of sft.py")

    def __post_init__(self):
        check(self)


def show(dataset, tokenizer, count, ids, color):
    """Print conversations as the model sees them, targets in green, or between « and » without colours."""
    marks, decode = ("\033[32m", "\033[0m") if color else ("«", "»"), tokenizer.tokenizer.decode
    for i in range(min(count, len(dataset))):
        here = slice(dataset.starts[i], dataset.starts[i + 1])
        tokens, targets = dataset.tokens[here], dataset.loss_mask[here]
        print(f"--- {dataset.source(i)}: {len(tokens)} tokens, {dataset.n_targets[i]} targets")
        borders = [0, *(np.flatnonzero(np.diff(targets)) + 1), len(tokens)]
        for start, stop in itertools.pairwise(borders):
            part = tokens[start:stop].tolist()
            text = " ".join(map(str, part)) + " " if ids else decode(part, skip_special_tokens=False)
            print(f"{marks[0]}{text}{marks[1]}" if targets[start] else text, end="")
        print()


def stats(dataset, capacity, batch_size):
    """Print lengths, what some max_length would cut, and how full packed micro-batches are."""
    sizes, n_targets = dataset.n_tokens, int(dataset.n_targets.sum())
    shares = (0, 25, 50, 75, 90, 95, 99, 100)
    print("tokens   " + "   ".join(f"{q}%: {n:,.0f}" for q, n in zip(shares, np.percentile(sizes, shares))))
    edges = [0, *(2**k for k in range(4, int(sizes.max()).bit_length() + 1))]
    counts = np.histogram(sizes, edges)[0]
    for low, high, n in zip(edges, edges[1:], counts):
        print(f"{low:>9,} to {high - 1:<9,} {n:>11,} {'#' * round(40 * n / counts.max())}")
    for length in (512, 1024, 2048, 4096):
        long = np.flatnonzero(sizes > length)
        spans = (slice(dataset.starts[i] + length, dataset.starts[i + 1]) for i in long)
        lost = sum(int(dataset.loss_mask[span].sum()) for span in spans)
        print(f"--max_length {length:<5,} cuts {len(long):,} rows ({len(long) / len(sizes):.2%}) and "
              f"{lost:,} target tokens ({lost / n_targets:.2%})")
    lengths, used, made = np.minimum(dataset.n_inputs, capacity), 0, 0
    order, cuts = data.Sampler(lengths, epochs=1, seed=42, batch_size=batch_size).epoch_order(0)
    for ids in np.split(order, cuts[1:-1]):
        made += len(data.pack(lengths[ids], capacity))
        used += int(lengths[ids].sum())
    print(f"packing  {used / (made * capacity):.1%} of {made:,} micro-batches of {capacity:,} tokens are "
          f"filled, at --batch_size {batch_size}")


def main():
    words = ["--n" if word == "-n" else word for word in sys.argv[1:]]
    cfg, _ = parse(Config, words, positional=["do", "data"])
    if not cfg.do:
        program = venv.command("tools/show.py")
        raise UserError(f"what to do? {program} show FILE --model DIR, or {program} stats FILE --model DIR")
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
