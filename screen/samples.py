"""Texts that show what a run has learned: answers to --sample_prompts, and its easiest and hardest conversations.

samples.jsonl and the report have them. This file only makes them; log.py writes them down.
"""

import math

import numpy as np
import torch

import fsdp
from model import generate
from settings.errors import UserError
from text import formats

SAMPLE_TOKENS = 256  # of the longest answer to --sample_prompts


def read_prompts(path, tokenizer, keys=formats.KEYS):
    """[(what was said last, token ids), ...] of a .txt file with a prompt a line, or of a data file's conversations up
    to their last answers."""
    if path.endswith(".txt"):
        with open(path, encoding="utf-8") as f:
            conversations = [[{"role": "user", "content": line.strip()}] for line in f if line.strip()]
    else:
        conversations = [formats.to_messages(row, where, keys) for where, row in formats.read_files(path)]
        conversations = [messages[: max(i for i, m in enumerate(messages) if m["role"] == "assistant")]
                         for messages in conversations]
    if not conversations or not all(conversations):
        raise UserError(f"--sample_prompts {path}: it must have prompts, one a line, or rows as --train_data's, each "
                        "with something before its last answer")
    texts = [tokenizer.render(messages, add_generation_prompt=True) for messages in conversations]
    ids = [tokenizer.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    return [(messages[-1]["content"], tokens) for messages, tokens in zip(conversations, ids)]


def answers(model, tokenizer, prompts, stops, ranks):
    """Yield (prompt, answer), greedy. All ranks compute each token together: a gather of each block a token."""
    model.eval()
    for prompt, tokens in prompts:
        if ranks.poll_signals():
            break
        new = generate(model, tokens, SAMPLE_TOKENS, stops, lambda logits: ranks.broadcast(int(logits.argmax())))
        yield prompt, tokenizer.tokenizer.decode(list(new), skip_special_tokens=True)
    fsdp.reshard(model)
    model.train()


def extremes(rows, losses, tokenizer, count=10):
    """What samples.jsonl keeps of the conversations with the highest and the lowest loss per target, as they were when
    each was last trained; `losses` (conversations,) are summed over a conversation, -1 if it has not been trained."""
    mean = losses / torch.from_numpy(np.array(rows.n_targets))
    mean[losses < 0] = math.nan  # sorted to the end
    n, order = int((losses >= 0).sum()), mean.argsort()
    for kind, ids in ("best", order[:n][:count]), ("worst", order[:n].flip(0)[:count]):
        for i in ids.tolist():
            tokens = rows.tokens[rows.starts[i] : rows.starts[i + 1]].tolist()
            parts = [tokens] if len(tokens) <= 200 else [tokens[:100], tokens[-100:]]
            text = " … ".join(tokenizer.tokenizer.decode(part, skip_special_tokens=False) for part in parts)
            yield dict(kind=kind, loss=mean[i].item(), target_tokens=int(rows.n_targets[i]), source=rows.source(i),
                       text=text)
