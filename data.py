"""Conversations -> masked tokens -> steps -> micro-batches, with every token accounted for.

load() reads the conversations, renders each one with the model's chat template, tokenises it and makes its
loss mask from character offsets. Sampler decides which conversations each step holds. micro_batches() packs a
step's conversations for one data-parallel rank. This file knows ranks only as integers.
"""

import bisect
import functools
import math
import tempfile
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch

from ops.attention import Documents
from ops.packing import ceil_div, mixed_quotas, pack
from settings.errors import UserError
from text.conversations import batches
from text.formats import KEYS
from text.ledger import Ledger, check_settings
from text.masks import mask
from text.sources import data_files
from text.token_cache import ArrayWriter, cache_key, cached, read_arrays

# The arrays of a Dataset, with their dtypes in the cache
ARRAYS = {"tokens": np.int32, "loss_mask": np.bool_, "n_tokens": np.int32, "n_inputs": np.int32,
          "n_targets": np.int32, "file": np.int32, "row": np.int32, "source_of": np.int32,
          "weighted": np.int64, "weight": np.float32}
HASHED = "tokens", "loss_mask", "n_tokens", "weighted", "weight"

# ---- conversations -> masked tokens -----------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """How conversations become masked tokens. The token cache's key includes all of it.

    A field is the setting of sft.py of this name, except the last four.
    """
    max_length: int  # plain texts are cut into pieces of this length, whatever too_long is
    too_long: str = "truncate"
    train_on: str = "all"
    train_on_prompt: bool = False
    train_reasoning: bool = True
    split_turns: bool = False
    bad_rows: str = "error"
    val_split: float | None = None
    is_validation: bool = False  # with val_split: read the rows of validation, not those of training
    keys: tuple = KEYS  # column names, see formats.read_row
    limit: int | None = None  # read at most this many rows
    compared: int = 1000  # rows of each file whose prompts are compared with those of inference


@dataclass
class Dataset:
    """n conversations as flat arrays, memory-mapped. Conversation i is tokens[starts[i]:starts[i + 1]]."""

    tokens: np.ndarray  # (T,) the tokens of all conversations, one after another
    loss_mask: np.ndarray  # (T,) bool: whether this token is a target, which the model learns to predict
    n_tokens: np.ndarray  # (n,) tokens of each conversation, after truncation
    n_inputs: np.ndarray  # (n,) tokens before its last target: the model computes no others
    n_targets: np.ndarray  # (n,) targets of each conversation
    file: np.ndarray  # (n,) the file that it comes from, an index of `files`
    row: np.ndarray  # (n,) its row in that file
    source_of: np.ndarray  # (n,) what it is called in losses by source, an index of `source_names`
    weighted: np.ndarray  # (K,) ascending positions in `tokens` of the targets whose weight is not 1
    weight: np.ndarray  # (K,) fp32, what the losses of these targets are multiplied by; > 0
    files: list  # paths
    source_names: list  # NAME=, or else the row's column "source", or else the file, see source_name
    weights: list  # per file: (number of its group, the group's mixing weight or None), see data_files
    ledger: Ledger
    digest: str  # hash of tokens, loss mask, order and all weights; a resumed run must have the same

    def __post_init__(self):
        self.starts = np.concatenate(([0], np.cumsum(self.n_tokens, dtype=np.int64)))

    def __len__(self):
        return len(self.n_inputs)

    def weights_of(self, i):
        """(tokens,) fp32: the weights of conversation i's tokens in the loss; 0: no target."""
        start, stop = self.starts[i : i + 2]
        weights = self.loss_mask[start:stop].astype(np.float32)
        here = slice(*np.searchsorted(self.weighted, (start, stop)))
        weights[self.weighted[here] - start] = self.weight[here]
        return weights

    def count(self, ids):
        """Counts of a step with these conversations, by their keys in metrics.jsonl.

        target_weight is what the step's loss is divided by, and positive: each conversation has a target.
        """
        n_targets = int(self.n_targets[ids].sum())
        weight = float(n_targets)
        if len(self.weight):  # every rank counts the whole step, so no call of weights_of
            ids, weights = np.sort(np.asarray(ids, np.int64)), np.asarray(self.weight)
            spans = (np.searchsorted(self.weighted, self.starts[ids + end]).tolist() for end in (0, 1))
            weights = np.concatenate([weights[:0], *(weights[start:stop] for start, stop in zip(*spans))])
            weight += float(weights.sum(dtype=np.float64)) - len(weights)
        return dict(tokens=int(self.n_tokens[ids].sum()), target_tokens=n_targets, target_weight=weight)

    def mix(self):
        """(group of each conversation, weight of each group), or None if no weights were given."""
        if self.weights[0][1] is None:
            return None
        groups = np.array([group for group, _ in self.weights])
        return groups[self.file], [weight for _, weight in sorted(dict(self.weights).items())]

    def by_source(self):
        """{name of a source: (k,) int64, its conversations}"""
        return {name: np.flatnonzero(self.source_of == i) for i, name in enumerate(self.source_names)}

    def source(self, i):
        """Where conversation i comes from: "file[row]"."""
        return f"{self.files[self.file[i]]}[{self.row[i]}]"

    def sources(self, ids, count=20):
        """Where several conversations come from, as text; only the first `count` are listed."""
        more = f" and {len(ids) - count} more" if len(ids) > count else ""
        return ", ".join(map(self.source, ids[:count])) + more


def options_of(cfg):
    """The arguments of load() that settings of sft.py decide, as a dict."""
    names = [f.name for f in fields(Options) if f.name not in ("too_long", "is_validation", "keys", "limit",
                                                                  "compared")]
    settings = {name: getattr(cfg, name) for name in (*names, "cache_dir", "timeout")}
    return dict(settings, too_long=cfg.too_long or "truncate",
                keys=(cfg.prompt_key, cfg.response_key, cfg.messages_key))


def load(spec, tokenizer, max_length, *, split=None, cache_dir=None, timeout=600, progress=None, **options):
    """Read, render, tokenise and mask the conversations of `spec` (--train_data). Returns a Dataset.

    split      "validation": which files of a directory are meant, see data_files
    cache_dir  keep the arrays there and memory-map them, see token_cache.cached
    timeout    seconds to wait for another process that holds the cache's lock and makes no progress
    progress   called again and again meanwhile, see Ranks.show_progress
    options    of Options

    Raises UserError, with file and row, for data that cannot be trained on.
    """
    options = Options(max_length, **options)
    sources = data_files(spec, split)
    write = functools.partial(tokenise, spec, sources, tokenizer, options)
    if cache_dir is not None:
        key = cache_key(sources, tokenizer, options, program=[__file__], progress=progress)
        return open_dataset(cached(cache_dir, key, timeout, write, progress))
    with tempfile.TemporaryDirectory() as directory:  # a mapped file stays readable after it is deleted
        write(directory, progress)
        return open_dataset(directory)


def load_sets(cfg, tokenizer, progress=None):
    """The training data and the validation data (or None) of an sft.Config, tokenised."""
    options, val_set = dict(options_of(cfg), progress=progress), None
    train_set = load(cfg.train_data, tokenizer, **options)
    if cfg.val_data:
        val_set = load(cfg.val_data, tokenizer, split="validation", **options)
    elif cfg.val_split:
        val_set = load(cfg.train_data, tokenizer, is_validation=True, **options)
    check_settings(cfg, train_set, val_set)
    return train_set, val_set


def open_dataset(directory):
    """The Dataset that tokenise() wrote into a directory."""
    arrays, metadata = read_arrays(directory, ARRAYS)
    return Dataset(**arrays, **{**metadata, "ledger": Ledger(**metadata["ledger"])})


def tokenise(spec, sources, tokenizer, options, directory, progress=None):
    """Write a Dataset's arrays and metadata into a directory; call progress() after each batch of rows."""
    files = [file for source in sources for file in source.files]
    weights = [[group, source.weight] for group, source in enumerate(sources) for _ in source.files]
    ledger, writer, names = Ledger(), ArrayWriter(directory, ARRAYS, HASHED), {}
    for batch, encodings in tokenizer.encode_ahead(batches(sources, tokenizer, options, names)):
        for pair in zip(batch, encodings, strict=True):
            append(*pair, options, tokenizer, ledger, writer)
        ledger.reasoning_tokens_dropped += tokenizer.count(
            text for item in batch if item.notes for text in item.notes.reasoning_dropped)
        writer.flush()
        del batch, encodings, pair  # 300 bytes a token, before the next batch is read
        if progress:
            progress()
    ledger.check(spec, options)
    writer.hash.update(repr(weights).encode())
    writer.close(dict(files=files, source_names=list(names), weights=weights, ledger=asdict(ledger),
                      digest=writer.hash.hexdigest()))


def append(conversation, encoding, options, tokenizer, ledger, writer):
    """Mask one row, account for its tokens, and write it if it has a target; a long text in pieces."""
    at, masked = ledger.written, mask(conversation, encoding, options, tokenizer)
    ledger.count(masked, conversation)
    ledger.compare(conversation.prompts, encoding)
    is_target = masked.weights > 0
    weighted = np.flatnonzero(is_target & (masked.weights != 1))
    writer.add(weighted=at + weighted, weight=masked.weights[weighted])
    for start, stop in masked.pieces:
        targets = np.flatnonzero(is_target[start:stop])
        writer.add(tokens=masked.ids[start:stop], loss_mask=is_target[start:stop], n_tokens=[stop - start],
                   n_inputs=targets[-1:], n_targets=[len(targets)], file=[conversation.file],
                   row=[conversation.row], source_of=[conversation.source])


# ---- masked tokens -> steps --------------------------------------------------------------------------------


class Step(NamedTuple):
    epoch: float  # epochs completed after this step
    ids: np.ndarray  # (k,) int64, the conversations of the step


class Sampler:
    """The conversations of steps 1, 2, ...: a pure function of (seed, epoch), so resume needs no state.

    A step holds batch_size conversations, or as many as fit into batch_tokens; the last one of an epoch may
    hold fewer. len(sampler) is max_steps if given, otherwise the steps of all epochs; of 1.5 epochs the
    second one ends after half of its steps, rounded up.

    n_inputs   (n,) Dataset.n_inputs, which batch_tokens limits
    mix        Dataset.mix(): each epoch draws a quota from each group, see mixed_quotas
    ends       the last step of each epoch, as far as they are known yet
    quotas     list, the conversations that an epoch draws from each group
    """

    def __init__(self, n_inputs, *, epochs, seed, batch_size, batch_tokens=None, max_steps=None, mix=None):
        self.n_inputs, self.seed = n_inputs, seed
        self.batch_size, self.batch_tokens = batch_size, batch_tokens
        self.groups, self.quotas = None, [len(n_inputs)]
        if mix:
            self.groups, weights = mix
            self.quotas = mixed_quotas(np.bincount(self.groups, minlength=len(weights)), weights)
        if batch_tokens and np.max(n_inputs) > batch_tokens:
            raise UserError(f"--batch_tokens {batch_tokens}: the longest conversation has {np.max(n_inputs)} "
                            "tokens; raise it to at least that, or lower --max_length")
        epochs = Fraction(str(epochs))  # exact: 1.1 epochs of 10 steps are 11 steps, not 12
        if batch_tokens:
            self.ends, self.total = [], max_steps
            self.plan(lambda: self.ends and (max_steps or len(self.ends) >= epochs))
            if not max_steps:
                last = self.steps_of(len(self.ends) - 1)
                self.total = self.ends[-1] - last + math.ceil(last * (epochs - len(self.ends) + 1))
        else:
            steps = ceil_div(sum(self.quotas), batch_size)
            self.total = max_steps or math.ceil(steps * epochs)
            self.ends = range(steps, self.total + steps, steps)
        self.epoch, self.order, self.cuts = None, None, None  # of the epoch that was used last

    def __len__(self):
        return self.total

    def plan(self, is_enough):
        """Cut more epochs into steps until is_enough(); only batch_tokens needs it."""
        while not is_enough():
            steps = len(self.epoch_order(len(self.ends))[1]) - 1
            self.ends.append((self.ends or [0])[-1] + steps)

    def steps_of(self, epoch):
        """The number of steps of a whole epoch."""
        return self.ends[epoch] - (self.ends[epoch - 1] if epoch else 0)

    def epoch_order(self, epoch):
        """(order, cuts) of an epoch: its steps are order[cuts[0]:cuts[1]], order[cuts[1]:cuts[2]], ..."""
        # Philox's raw stream is the same in all NumPy versions; the shuffle of a Generator may change.
        keys = np.random.Philox(key=[self.seed, epoch]).random_raw(len(self.n_inputs))
        order = np.argsort(keys, kind="stable")
        if self.groups is not None:  # draw each group's quota, then sort all that was drawn by key
            drawn = [order[self.groups[order] == group][:quota] for group, quota in enumerate(self.quotas)]
            order = np.concatenate(drawn)
            order = order[np.argsort(keys[order], kind="stable")]
        if not self.batch_tokens:
            return order, np.append(np.arange(0, len(order), self.batch_size), len(order))
        n_inputs, cuts = self.n_inputs[order], [0]
        ends = np.cumsum(n_inputs, dtype=np.int64)
        # next_cuts[i]: the cut after a step that starts at conversation i
        next_cuts = np.searchsorted(ends, ends - n_inputs + self.batch_tokens, "right")
        while cuts[-1] < len(order):
            cuts.append(int(next_cuts[cuts[-1]]))
        return order, np.array(cuts)

    def step(self, step):
        """The Step with this number, counted from 1."""
        self.plan(lambda: self.ends[-1] >= step)
        epoch = bisect.bisect_left(self.ends, step)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order, self.cuts = self.epoch_order(epoch)
        index = step - 1 - (self.ends[epoch - 1] if epoch else 0)
        ids = self.order[self.cuts[index] : self.cuts[index + 1]]
        return Step(epoch + (index + 1) / self.steps_of(epoch), ids)

    def is_due(self, step, every):
        """Whether an action that is due every `every` steps (None: once per epoch) is due after this step."""
        if every:
            return step % every == 0
        self.plan(lambda: self.ends[-1] >= step)
        return self.ends[bisect.bisect_left(self.ends, step)] == step or step == self.total


# ---- steps -> micro-batches --------------------------------------------------------------------------------


class MicroBatch:
    """Conversations one after another, without padding: N tokens, R of which are followed by a target.

    buffer     (S,) int64. The tensors below are views of it, so that one copy moves all of them to the device
    lengths    tuple of ints, the tokens of each conversation; sum sp_size * N: with --sp these N are a part
    n_targets  R
    ids        (conversations,) int64 array, their indices in the Dataset

    tokens                  (N,) int64
    target_positions        (R,) int64, ascending: the positions whose next token is a target
    targets                 (R,) int64: those next tokens
    conversation_of_target  (R,) int64: the conversation of each target, as an index of the Dataset
    weights                 (R,) fp32, what the loss of each target is multiplied by; None if all data has 1
    documents               ops.attention.Documents
    """

    def __init__(self, buffer, lengths, n_targets, ids, has_weights, sp_rank, sp_size):
        self.buffer, self.lengths, self.n_targets, self.ids = buffer, lengths, n_targets, ids
        self.has_weights, self.sp_rank, self.sp_size = has_weights, sp_rank, sp_size
        N, R = sum(lengths) // sp_size, n_targets
        n_offsets, n_weights = len(lengths) // 2 + 1, ceil_div(R, 2) if has_weights else 0
        (self.tokens, positions, self.target_positions, self.targets, self.conversation_of_target, offsets,
         weights) = buffer.split([N, N, R, R, R, n_offsets, n_weights])
        self.weights = weights.view(torch.float32)[:R] if has_weights else None
        self.documents = Documents(lengths, positions, offsets.view(torch.int32)[: len(lengths) + 1],
                                   first=sp_rank * N, is_part=sp_size > 1)

    def to(self, device):
        """The same MicroBatch on a device. If it is in pinned memory, the host does not wait for the copy."""
        return MicroBatch(self.buffer.to(device, non_blocking=True), self.lengths, self.n_targets, self.ids,
                          self.has_weights, self.sp_rank, self.sp_size)


def collate(dataset, ids, pin_memory=False, sp_rank=0, sp_size=1):
    """The MicroBatch of these conversations, in this order, in host memory. Each ends before its last target.

    Without conversations it has one token and no target: a rank that gets none must still take part in the
    collectives of a micro-batch. With --sp, a document without targets ends a micro-batch that sp_size does
    not divide.
    """
    spans = [(int(dataset.starts[i]), int(dataset.n_inputs[i])) for i in ids]
    padding = -sum(n for _, n in spans) % sp_size if spans else sp_size

    def flat(array, shift):
        """The elements of all conversations, each `shift` after an input."""
        pieces = [array[s + shift : s + shift + n] for s, n in spans]
        return np.concatenate([*pieces, np.zeros(padding, array.dtype)])

    lengths = (*(n for _, n in spans), *[padding] * (padding > 0))
    ends = np.cumsum(lengths)
    n_here = ends[-1] // sp_size
    here = slice(sp_rank * n_here, (sp_rank + 1) * n_here)
    offsets = np.zeros(len(lengths) + 2 & ~1, dtype=np.int32)  # an even number: they are stored as int64
    offsets[1 : len(lengths) + 1] = ends
    target_positions = here.start + np.flatnonzero(flat(dataset.loss_mask, 1)[here])
    positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    parts = [flat(dataset.tokens, 0)[here], positions[here],
             target_positions - here.start, flat(dataset.tokens, 1)[target_positions],
             ids[np.searchsorted(ends, target_positions, "right")], offsets.view(np.int64)]
    if has_weights := len(dataset.weight) > 0:
        weights = [dataset.weights_of(i)[1:][: n] for i, (_, n) in zip(ids, spans)]
        weights = np.concatenate(weights)[target_positions] if weights else np.zeros(0, np.float32)
        parts.append(np.append(weights, np.zeros(len(weights) % 2, np.float32)).view(np.int64))
    buffer = torch.empty(sum(map(len, parts)), dtype=torch.int64, pin_memory=pin_memory)
    np.concatenate(parts, out=buffer.numpy())
    return MicroBatch(buffer, lengths, len(target_positions), ids, has_weights, sp_rank, sp_size)


def micro_batches(dataset, ids, capacity, max_conversations=None, *, dp_rank=0, dp_size=1, sp_rank=0,
                  sp_size=1, pin_memory=False):
    """Yield a rank's MicroBatches of a step's conversations `ids`, its sp part of each; see packing.pack."""
    ids = np.asarray(ids, dtype=np.int64)
    for group in pack(dataset.n_inputs[ids], capacity, max_conversations, dp_rank=dp_rank, dp_size=dp_size):
        yield collate(dataset, ids[group], pin_memory, sp_rank, sp_size)
