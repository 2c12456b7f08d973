"""Texts that show what a run has learned: answers to --sample_prompts, its easiest and hardest conversations.

They go into samples.jsonl and the report. This file only makes them; log.py writes them down.
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
    """[(last message, token ids), ...] of a .txt file with a prompt a line, or of a data file.

    In a data file the prompts are its conversations up to their last answers. Raises UserError if a prompt is
    empty or there is none.
    """
    if path.endswith(".txt"):
        with open(path, encoding="utf-8") as f:
            conversations = [[{"role": "user", "content": line.strip()}] for line in f if line.strip()]
    else:
        conversations = [formats.to_messages(row, where, keys) for where, row in formats.read_files(path)]
        conversations = [messages[: max(i for i, m in enumerate(messages) if m["role"] == "assistant")]
                         for messages in conversations]
    if not conversations or not all(conversations):
        raise UserError(f"--sample_prompts {path}: it must have prompts, one a line, or rows as "
                        "--train_data's, each with something before its last answer")
    texts = [tokenizer.render(messages, add_generation_prompt=True) for messages in conversations]
    ids = [tokenizer.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    return [(messages[-1]["content"], tokens) for messages, tokens in zip(conversations, ids)]


class Prompts:
    """The prompts of --sample_prompts, answered at validations; without that setting there are none."""

    def __init__(self, cfg, tokenizer, eos_ids):
        self.tokenizer, self.eos_ids, self.texts = tokenizer, eos_ids, []
        if cfg.sample_prompts:
            keys = cfg.prompt_key, cfg.response_key, cfg.messages_key
            self.texts = read_prompts(cfg.sample_prompts, tokenizer, keys)

    def answer(self, model, ranks):
        """[(prompt, answer), ...], greedy; fewer if a signal comes.

        All ranks compute each token together, and gather each block for each token.
        """
        found = []
        model.eval()
        for prompt, tokens in self.texts:
            if ranks.poll_signals():
                break
            new = generate(model, tokens, SAMPLE_TOKENS, self.eos_ids,
                           lambda logits: ranks.broadcast(int(logits.argmax())))
            found.append((prompt, self.tokenizer.tokenizer.decode(list(new), skip_special_tokens=True)))
        fsdp.reshard(model)
        model.train()
        return found


class ConversationLosses:
    """The loss of each conversation as last trained, in nats; -1 where it has not been trained."""

    def __init__(self, dataset, ranks):
        self.dataset, self.ranks = dataset, ranks
        self.sums = torch.full((len(dataset),), -1.0, device=ranks.device)

    def restart(self, ids):
        """Set the conversations of a step to 0, on every rank; return the tensor that backward adds to."""
        self.sums[torch.from_numpy(ids)] = 0.0
        return self.sums

    def extremes(self, tokenizer, count=10):
        """What samples.jsonl keeps of the conversations with the highest and the lowest loss per target.

        Returns a list of dicts. All ranks call it.
        """
        dataset, sums = self.dataset, self.ranks.all_reduce(self.sums.clone()).cpu()
        mean = sums / torch.from_numpy(np.array(dataset.n_targets))
        mean[sums < 0] = math.nan  # sorted to the end
        order = mean.argsort()[: int((sums >= 0).sum())]
        found = []
        for kind, ids in ("best", order[:count]), ("worst", order.flip(0)[:count]):
            for i in ids.tolist():
                tokens = dataset.tokens[dataset.starts[i] : dataset.starts[i + 1]].tolist()
                parts = [tokens] if len(tokens) <= 200 else [tokens[:100], tokens[-100:]]
                text = " … ".join(
                    tokenizer.tokenizer.decode(part, skip_special_tokens=False) for part in parts)
                found.append(dict(kind=kind, loss=mean[i].item(), target_tokens=int(dataset.n_targets[i]),
                                  source=dataset.source(i), text=text))
        return found
