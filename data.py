"""Conversations -> masked tokens -> steps -> micro-batches, with every token accounted for.

load() reads the conversations, renders each one with the model's chat template, tokenises it and makes its
loss mask from character offsets. Sampler decides which conversations each step holds. micro_batches() packs a
step's conversations for one data-parallel rank. This file knows ranks only as two integers.
"""

import functools
import itertools
import tempfile
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch

from ops.attention import Documents
from ops.packing import ceil_div, pack
from settings.errors import UserError
from text.containers import read_rows
from text.formats import KEYS, to_messages
from text.ledger import Ledger
from text.sources import data_files
from text.template import token_range
from text.token_cache import ArrayWriter, cache_key, cached, read_arrays

# The arrays of a Dataset, with their dtypes in the cache
ARRAYS = {"tokens": np.int32, "loss_mask": np.bool_, "n_tokens": np.int32, "n_inputs": np.int32,
          "n_targets": np.int32, "file": np.int32, "row": np.int32}

# ---- conversations -> masked tokens -----------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """How conversations become masked tokens; see load. The token cache's key includes them."""
    max_length: int
    too_long: str
    train_on: str
    train_on_prompt: bool
    keys: tuple
    limit: int | None


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
    files: list  # paths
    weights: list  # per file: (number of its group, the group's mixing weight or None), see data_files
    ledger: Ledger
    digest: str  # hash of tokens, loss mask, order and weights; a resumed run must have the same

    def __post_init__(self):
        self.starts = np.concatenate(([0], np.cumsum(self.n_tokens, dtype=np.int64)))

    def __len__(self):
        return len(self.n_inputs)

    def mix(self):
        """(group of each conversation, weight of each group), or None if no weights were given."""
        if self.weights[0][1] is None:
            return None
        groups = np.array([group for group, _ in self.weights])
        return groups[self.file], [weight for _, weight in sorted(dict(self.weights).items())]

    def source(self, i):
        """Where conversation i comes from: "file[row]"."""
        return f"{self.files[self.file[i]]}[{self.row[i]}]"

    def sources(self, ids, count=20):
        """Where several conversations come from, as text; only the first `count` are listed."""
        more = f" and {len(ids) - count} more" if len(ids) > count else ""
        return ", ".join(map(self.source, ids[:count])) + more


def load(spec, tokenizer, max_length, *, too_long="truncate", train_on="all", train_on_prompt=False,
         keys=KEYS, cache_dir=None, timeout=600, limit=None):
    """Read, render, tokenise and mask the conversations of `spec` (--train_data). Returns a Dataset.

    max_length       tokens per conversation
    too_long         what happens to longer ones: truncate (from the right), drop or error
    train_on         all: every assistant turn is trained; last: the last turn of each conversation
    train_on_prompt  every token is a target
    keys             column names, see formats.to_messages
    cache_dir        keep the arrays there and memory-map them, see token_cache.cached
    timeout          seconds to wait for another process that holds the cache's lock and makes no progress
    limit            read at most this many rows

    Raises UserError, with file and row, for data that cannot be trained on.
    """
    options = Options(max_length, too_long, train_on, train_on_prompt, tuple(keys), limit)
    write = functools.partial(tokenise, spec, tokenizer, options)
    if cache_dir is not None:
        key = cache_key(data_files(spec), tokenizer, options, program=[__file__])
        return open_dataset(cached(cache_dir, key, timeout, write))
    with tempfile.TemporaryDirectory() as directory:  # a mapped file stays readable after it is deleted
        write(directory)
        return open_dataset(directory)


def open_dataset(directory):
    """The Dataset that tokenise() wrote into a directory."""
    arrays, metadata = read_arrays(directory, ARRAYS)
    return Dataset(**arrays, **{**metadata, "ledger": Ledger(**metadata["ledger"])})


def tokenise(spec, tokenizer, options, directory, progress=None):
    """Write a Dataset's arrays and metadata into a directory; call progress() after every thousand rows."""
    groups = data_files(spec)
    files = [file for _, names in groups for file in names]
    weights = [[group, weight] for group, (weight, names) in enumerate(groups) for _ in names]
    ledger, writer = Ledger(), ArrayWriter(directory, ARRAYS, hashed=("tokens", "loss_mask", "n_tokens"))
    for batch, encodings in tokenizer.encode_ahead(conversations(files, tokenizer, options)):
        for conversation, encoding in zip(batch, encodings, strict=True):
            append(conversation, encoding, options, tokenizer.stop_token_id, ledger, writer)
        writer.flush()
        if progress:
            progress()
    ledger.check(spec, options.max_length)
    writer.hash.update(repr(weights).encode())
    writer.close(dict(files=files, weights=weights, ledger=asdict(ledger), digest=writer.hash.hexdigest()))


class Conversation(NamedTuple):
    file: int
    row: int
    where: str  # "file[row]", for messages
    text: str  # rendered with the chat template
    spans: list  # the assistant's turns in text, see ChatTokenizer.render_spans


def conversations(files, tokenizer, options):
    """Yield lists of up to a thousand Conversations."""
    rows = ((file, n, row) for file, path in enumerate(files) for n, row in enumerate(read_rows(path)))
    rows = itertools.islice(rows, options.limit)
    while batch := list(itertools.islice(rows, 1000)):
        yield [render(file, n, row, f"{files[file]}[{n}]", tokenizer, options) for file, n, row in batch]


def render(file, number, row, where, tokenizer, options):
    """The Conversation of one row. Raises UserError, which names the row."""
    messages = to_messages(row, where, options.keys)
    if options.train_on == "last":
        for message in [m for m in messages if m["role"] == "assistant"][:-1]:
            message["weight"] = 0.0
    text, spans, _ = tokenizer.render_spans(
        messages, where, row.get("tools"), row.get("chat_template_kwargs"))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: the text contains half a character (a lone surrogate): {error}; "
                        "correct the row") from error
    return Conversation(file, number, where, text, spans)


def append(conversation, encoding, options, stop_token_id, ledger, writer):
    """Mask one conversation, account for its tokens, and write it if it has a target."""
    length, kept = len(encoding), min(len(encoding), options.max_length)
    ledger.rows += 1
    ledger.tokens += length
    if length > kept and options.too_long == "error":
        raise UserError(f"{conversation.where} has {length} tokens, more than --max_length {kept}; raise it, "
                        "or set --too_long to truncate or drop")
    if length > kept and options.too_long == "drop":
        ledger.drop("too long", length)
        return
    loss_mask, turns, stopped = make_loss_mask(
        encoding, conversation.spans, conversation.text, kept=kept, train_on_prompt=options.train_on_prompt,
        stop_token_id=stop_token_id)
    ledger.turns += turns
    ledger.turns_stopped += stopped
    targets = np.flatnonzero(loss_mask)
    if not len(targets):
        ledger.drop("without targets" + (" after truncation" if length > kept else ""), length)
        return
    ledger.keep(len(targets), kept, length)
    writer.add(tokens=encoding.ids[:kept], loss_mask=loss_mask, n_tokens=[kept], n_inputs=targets[-1:],
               n_targets=[len(targets)], file=[conversation.file], row=[conversation.row])


def make_loss_mask(encoding, spans, text, *, kept, train_on_prompt, stop_token_id):
    """The loss mask of one conversation. A token is a target if it lies entirely inside a trained span.

    encoding         of `text`, by the tokenizers library: n tokens
    spans            [(start, end, has_stop_token, weight), ...], the assistant's turns in order: the
                     characters from the end of the turn's header to the end of its stop token; whether the
                     template rendered that token; the weight of its losses, 0 if it is not trained
    kept             n, or fewer if the conversation is truncated
    train_on_prompt  every token is a target, except the first, which nothing predicts
    stop_token_id    the token that ends a turn, or None

    Returns (kept,) bool, the number of trained turns that are not truncated, and how many of these have their
    stop token among the targets.
    """
    ids, loss_mask = encoding.ids, np.full(len(encoding), train_on_prompt)
    turns = stopped = 0
    for start, end, has_stop_token, weight in spans:
        first, after = token_range(encoding, start, end, len(text))
        if kept < len(ids) and first >= kept:
            break  # this turn and all later ones are truncated; searching for their tokens would take long
        loss_mask[first:after] = weight > 0 or train_on_prompt
        if weight and after <= kept:
            turns += 1
            stopped += int(has_stop_token and stop_token_id in ids[first:after])
    loss_mask[:1] = False
    return loss_mask[:kept], turns, stopped


# ---- masked tokens -> steps --------------------------------------------------------------------------------


class Step(NamedTuple):
    epoch: float  # epochs completed after this step
    ids: np.ndarray  # (k,) int64, the conversations of the step


class Sampler:
    """The conversations of steps 1, 2, ...: a pure function of (seed, epoch), so resume needs no state.

    A step holds batch_size conversations, or as many as fit into batch_tokens; the last one of an epoch may
    hold fewer. len(sampler) is max_steps if given, otherwise the steps of all epochs.

    n_inputs   (n,) Dataset.n_inputs, which batch_tokens limits
    mix        Dataset.mix(): each epoch draws a quota from each group, see mixed_quotas
    per_epoch  list, the steps of each epoch
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
        self.per_epoch, self.total = [], 0
        n = sum(self.quotas)
        for epoch in itertools.count() if max_steps else range(epochs):
            steps = len(self.epoch_order(epoch)[1]) - 1 if batch_tokens else ceil_div(n, batch_size)
            self.per_epoch.append(steps)
            self.total += steps
            if max_steps and self.total >= max_steps:
                self.total = max_steps
                break
        self.ends = np.cumsum(self.per_epoch)  # the last step of each epoch
        self.epoch, self.order, self.cuts = None, None, None  # of the epoch that was used last

    def __len__(self):
        return self.total

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
        epoch = int(np.searchsorted(self.ends, step))
        if epoch != self.epoch:
            self.epoch = epoch
            self.order, self.cuts = self.epoch_order(epoch)
        index = step - 1 - (int(self.ends[epoch - 1]) if epoch else 0)
        ids = self.order[self.cuts[index] : self.cuts[index + 1]]
        return Step(epoch + (index + 1) / self.per_epoch[epoch], ids)

    def is_due(self, step, every):
        """Whether an action that is due every `every` steps (None: once per epoch) is due after this step."""
        if every:
            return step % every == 0
        return step in self.ends or step == self.total


def mixed_quotas(counts, weights):
    """How many conversations an epoch draws from each group, in proportion to the weights.

    No conversation is drawn twice in an epoch, so the group with the fewest conversations for its weight
    decides how long the epoch is: all of it is drawn. The other groups are drawn anew in each epoch.
    Raises UserError if a group has no conversation, or if its quota is zero.
    """
    if not counts.all():
        raise UserError(f"source {counts.argmin() + 1} of the mixed data has no conversation to train on; "
                        "remove it from --train_data")
    # exact fractions instead of floats: the same result on every machine
    fractions = [Fraction(str(weight)) for weight in weights]
    most = min(int(count) / fraction for count, fraction in zip(counts, fractions))
    quotas = [int(most * fraction) for fraction in fractions]
    if not all(quotas):
        raise UserError(f"weights {weights} of {counts.tolist()} conversations: source {quotas.index(0) + 1} "
                        "would get none; raise its weight, or remove it from --train_data")
    return quotas


# ---- steps -> micro-batches --------------------------------------------------------------------------------


class MicroBatch:
    """Conversations one after another, without padding: N tokens, R of which are followed by a target.

    buffer     (S,) int64. The tensors below are views of it, so that one copy moves all of them to the device
    lengths    tuple of ints with sum N, the tokens of each conversation
    n_targets  R
    ids        (conversations,) int64 array, their indices in the Dataset

    tokens                  (N,) int64
    target_positions        (R,) int64, ascending: the positions whose next token is a target
    targets                 (R,) int64: those next tokens
    conversation_of_target  (R,) int64: the conversation of each target, as an index of the Dataset
    documents               ops.attention.Documents
    """

    def __init__(self, buffer, lengths, n_targets, ids):
        self.buffer, self.lengths, self.n_targets, self.ids = buffer, lengths, n_targets, ids
        N, R = sum(lengths), n_targets
        (self.tokens, positions, self.target_positions, self.targets, self.conversation_of_target,
         offsets) = buffer.split([N, N, R, R, R, len(buffer) - 2 * N - 3 * R])
        self.documents = Documents(lengths, positions, offsets.view(torch.int32)[: len(lengths) + 1])

    def to(self, device):
        """The same MicroBatch on a device. If it is in pinned memory, the host does not wait for the copy."""
        return MicroBatch(self.buffer.to(device, non_blocking=True), self.lengths, self.n_targets, self.ids)


def collate(dataset, ids, pin_memory=False):
    """The MicroBatch of these conversations, in this order, in host memory. Each ends before its last target.

    Without conversations it has one token and no target: a rank that gets none must still take part in the
    collectives of a micro-batch.
    """
    spans = [(int(dataset.starts[i]), int(dataset.n_inputs[i])) for i in ids]

    def flat(array, shift):
        """The elements of all conversations, each `shift` after an input."""
        pieces = [array[s + shift : s + shift + n] for s, n in spans]
        return np.concatenate(pieces or [np.zeros(1, array.dtype)])

    lengths = tuple(n for _, n in spans) or (1,)
    ends = np.cumsum(lengths)
    offsets = np.zeros(len(lengths) + 2 & ~1, dtype=np.int32)  # an even number: they are stored as int64
    offsets[1 : len(lengths) + 1] = ends
    target_positions = np.flatnonzero(flat(dataset.loss_mask, 1))
    parts = [flat(dataset.tokens, 0), np.arange(ends[-1]) - np.repeat(ends - lengths, lengths),
             target_positions, flat(dataset.tokens, 1)[target_positions],
             ids[np.searchsorted(ends, target_positions, "right")], offsets.view(np.int64)]
    buffer = torch.empty(sum(map(len, parts)), dtype=torch.int64, pin_memory=pin_memory)
    np.concatenate(parts, out=buffer.numpy())
    return MicroBatch(buffer, lengths, len(target_positions), ids)


def micro_batches(dataset, ids, capacity, max_conversations=None, *, dp_rank=0, dp_size=1, pin_memory=False):
    """Yield one data-parallel rank's MicroBatches of a step's conversations `ids`; see packing.pack."""
    ids = np.asarray(ids, dtype=np.int64)
    for group in pack(dataset.n_inputs[ids], capacity, max_conversations, dp_rank=dp_rank, dp_size=dp_size):
        yield collate(dataset, ids[group], pin_memory)
