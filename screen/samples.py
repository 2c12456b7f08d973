"""Texts that show what a run has learned: answers to --sample_prompts, the easiest and hardest conversations.

log.py writes them to samples.jsonl, which the report reads.
"""

import math

import jinja2
import numpy as np
import torch

import fsdp
from model import generate
from ops import overlap
from screen.by_source import Sources
from settings.errors import UserError
from text import containers, formats, sources

SAMPLE_TOKENS = 256  # an answer to --sample_prompts has at most this many


def read_prompts(path, tokenizer, keys=formats.KEYS):
    """Return the prompts of a .txt file (one per line) or of a data file: [(last message, token ids), ...].

    A prompt from a data file is a conversation without its last answer. Raises UserError if the file has no
    prompts, or an empty one.
    """
    if path.endswith(".txt"):
        try:
            with containers.open_text(path) as f:
                conversations = [[{"role": "user", "content": line.strip()}] for line in f if line.strip()]
        except UnicodeDecodeError as error:
            raise UserError(f"--sample_prompts {path}: not UTF-8 text: {error}") from error
    else:
        try:
            conversations = [formats.to_messages(row, where, keys) for where, row in sources.read_files(path)]
        except UserError as error:
            raise UserError(f"--sample_prompts {error}") from error
        conversations = [messages[: max(i for i, m in enumerate(messages) if m["role"] == "assistant")]
                         for messages in conversations]
    if not conversations or not all(conversations):
        raise UserError(f"--sample_prompts {path}: expected prompts, one per line, or rows like those of "
                        "--train_data, each with a message before its last answer")
    try:
        texts = [tokenizer.render(messages, add_generation_prompt=True) for messages in conversations]
    except jinja2.TemplateError as error:
        raise UserError(f"--sample_prompts {path}: the chat template refuses a prompt: "
                        f"{error!s:.300}") from error
    ids = list(map(tokenizer.encode, texts))
    return [(messages[-1]["content"], tokens) for messages, tokens in zip(conversations, ids)]


class Prompts:
    """The prompts of --sample_prompts, which the model answers at each validation; empty if it is not set."""

    def __init__(self, cfg, tokenizer, eos_ids):
        self.tokenizer, self.eos_ids = tokenizer, eos_ids
        self.encoded = []  # see read_prompts
        if cfg.sample_prompts:
            keys = cfg.prompt_key, cfg.response_key, cfg.messages_key
            self.encoded = read_prompts(cfg.sample_prompts, tokenizer, keys)

    def answer(self, model, ranks):
        """Answer with greedy decoding; return [(prompt, answer), ...], fewer if a signal arrives.

        All ranks call it: they compute each token together, and all-gather each block once per token.
        """
        answers = []
        with fsdp.evaluation(model):
            for prompt, tokens in self.encoded:
                if ranks.poll_signals():
                    break
                new = generate(model, tokens, SAMPLE_TOKENS, self.eos_ids,
                               lambda logits: ranks.broadcast(int(logits.argmax())))
                text = self.tokenizer.tokenizer.decode(list(new), skip_special_tokens=True)
                answers.append((prompt, text))
        return answers


class ConversationLosses:
    """The loss of each conversation when it was last trained; extremes() reports the highest and lowest.

    And what is summed over a step beside its loss: how many targets are correct, and the loss by source.

    sums  (conversations,) fp32: nats summed over the targets that this rank computed; -1 if never trained
    step  {name: (1,) fp64, of "sources" (names,)}: sums over the targets that this rank computed in this step
    """

    def __init__(self, dataset, ranks):
        self.dataset, self.ranks, self.sources = dataset, ranks, Sources(dataset)
        self.sums = torch.full((len(dataset),), -1.0, device=ranks.device)
        if self.sources.names:
            self.source_of = overlap.to_device(self.sources.index, ranks.device)

    def restart(self, ids):
        """Begin a step: on every rank, its conversations are set to 0. Return self, for backward."""
        self.sums.index_fill_(0, overlap.to_device(ids, self.sums.device), 0.0)
        sizes = {"correct": 1, "sources": len(self.sources.names)}
        self.step = {name: self.sums.new_zeros(n, dtype=torch.float64) for name, n in sizes.items()}
        return self

    def add(self, batch, out):
        """Add a micro-batch, a data.MicroBatch, with its LossOut."""
        weights = 1.0 if batch.weights is None else batch.weights
        self.sums.index_add_(0, batch.conversation_of_target, out.each)
        self.step["correct"] += out.correct.sum()
        if self.sources.names:
            source_of_target = self.source_of.index_select(0, batch.conversation_of_target).int()
            self.step["sources"].index_add_(0, source_of_target, (out.each * weights).double())

    def all_reduce(self, loss):
        """{"loss": loss of the step, and the sums in `step`} over all ranks, for Figures.queue.

        loss  () what backward returned. All ranks call it: one all-reduce
        """
        sums = {"loss": loss.double()[None], **self.step}
        parts = self.ranks.all_reduce(torch.cat(list(sums.values()))).split([len(x) for x in sums.values()])
        return {name: part if name == "sources" else part[0] for name, part in zip(sums, parts)}

    def extremes(self, tokenizer, count=10):
        """Return the conversations of lowest and highest loss per target, as dicts for samples.jsonl.

        Texts above 200 tokens keep their first and last 100. All ranks call it: one all-reduce.
        """
        dataset, sums = self.dataset, self.ranks.all_reduce(self.sums.clone()).cpu()
        mean = sums / torch.from_numpy(np.array(dataset.n_targets))
        mean[sums < 0] = math.nan  # sorted to the end
        order = mean.argsort()[: int((sums >= 0).sum())]
        lines = []
        for kind, ids in ("best", order[:count]), ("worst", order.flip(0)[:count]):
            for i in ids.tolist():
                tokens = dataset.tokens[dataset.starts[i] : dataset.starts[i + 1]].tolist()
                excerpts = [tokens] if len(tokens) <= 200 else [tokens[:100], tokens[-100:]]
                text = " … ".join(
                    tokenizer.tokenizer.decode(excerpt, skip_special_tokens=False) for excerpt in excerpts)
                lines.append(dict(kind=kind, loss=mean[i].item(), target_tokens=int(dataset.n_targets[i]),
                                  source=dataset.source(i), text=text))
        return lines
