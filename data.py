"""Conversations -> masked tokens -> steps -> micro-batches, with every token accounted for.

load() reads conversations, renders each once with the model's chat template, tokenises it once and masks it
by the character offsets of its answers. Sampler says which conversations a step holds. micro_batches() lays
them out for one rank; ranks are two integers here.
"""

import functools
import itertools
import tempfile
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch

from ops.packing import ceil_div, pack
from settings.errors import UserError
from text.formats import KEYS, data_files, read_file, to_messages
from text.ledger import Ledger
from text.token_cache import ArrayWriter, cache_key, cached, read_arrays

ARRAYS = {"tokens": np.int32, "loss_mask": np.bool_, "n_tokens": np.int32, "n_inputs": np.int32,
          "n_targets": np.int32, "file": np.int32, "row": np.int32}  # of a Dataset, as they are on the disk

# ---- conversations -> masked tokens -----------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """How conversations become masked tokens; see load. A part of the cache's key."""
    max_length: int
    too_long: str
    train_on: str
    train_on_prompt: bool
    keys: tuple
    limit: int | None


@dataclass
class Dataset:
    """n conversations as flat arrays, mapped from the disk; the i-th is tokens[starts[i]:starts[i + 1]]."""

    tokens: np.ndarray  # (T,) of all conversations, one after another
    loss_mask: np.ndarray  # (T,) bool, the loss mask: whether the model has to predict this token
    n_tokens: np.ndarray  # (n,) tokens of each, after truncation; the metric `tokens` counts these
    n_inputs: np.ndarray  # (n,) inputs of each: what precedes its last target; later tokens don't matter
    n_targets: np.ndarray  # (n,)
    file: np.ndarray  # (n,) where each came from: an index of files
    row: np.ndarray  # (n,) and the row in that file
    files: list
    weights: list  # of each file: the number of its group and the group's weight, see data_files
    ledger: Ledger
    digest: str  # a hash of tokens, targets, order and weights; a run resumes with the same data only

    def __post_init__(self):
        self.starts = np.concatenate(([0], np.cumsum(self.n_tokens, dtype=np.int64)))

    def __len__(self):
        return len(self.n_inputs)

    def mix(self):
        """(group of each conversation, weight of each group), or None where no weights were given."""
        if self.weights[0][1] is None:
            return None
        groups = np.array([group for group, _ in self.weights])
        return groups[self.file], [weight for _, weight in sorted(dict(self.weights).items())]

    def source(self, i):
        """Where a conversation came from: "file[row]"."""
        return f"{self.files[self.file[i]]}[{self.row[i]}]"

    def sources(self, ids, count=20):
        """Where several came from, of which the first `count` are named."""
        more = f" and {len(ids) - count} more" if len(ids) > count else ""
        return ", ".join(map(self.source, ids[:count])) + more


def load(spec, tokenizer, max_length, *, too_long="truncate", train_on="all", train_on_prompt=False,
         keys=KEYS, cache_dir=None, timeout=600, limit=None):
    """Read, render, tokenise and mask everything that `spec` names; return a checked Dataset.

    too_long   for conversations of more than max_length tokens: truncate (from the right), drop or error
    train_on   all: every assistant turn; last: the last one of each conversation
    train_on_prompt  every token is a target
    keys       see formats.to_messages
    cache_dir  keep the result there and map it into memory from there, see token_cache.cached
    timeout    seconds that another process may hold the cache's lock without progress
    limit      read so many rows
    Raises UserError, with file and row, for data that can't be trained.
    """
    options = Options(max_length, too_long, train_on, train_on_prompt, tuple(keys), limit)
    write = functools.partial(tokenise, spec, tokenizer, options)
    if cache_dir is not None:
        key = cache_key(data_files(spec), tokenizer, options, program=[__file__])
        return open_dataset(cached(cache_dir, key, timeout, write))
    with tempfile.TemporaryDirectory() as directory:  # a mapped file stays readable when its name is gone
        write(directory)
        return open_dataset(directory)


def open_dataset(directory):
    """The Dataset that tokenise wrote."""
    arrays, facts = read_arrays(directory, ARRAYS)
    return Dataset(**arrays, **{**facts, "ledger": Ledger(**facts["ledger"])})


def tokenise(spec, tokenizer, options, directory, progress=None):
    """Write the arrays and facts of a Dataset into a directory; call progress() after every thousand rows."""
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
    where: str  # "file[row]"
    text: str
    spans: list  # of text, see ChatTokenizer.render_spans


def conversations(files, tokenizer, options):
    """Yield lists of a thousand Conversations."""
    rows = ((file, *row) for file, path in enumerate(files) for row in enumerate(read_file(path)))
    rows = itertools.islice(rows, options.limit)
    while batch := list(itertools.islice(rows, 1000)):
        yield [render(file, number, row, f"{files[file]}[{number}]", tokenizer, options)
               for file, number, row in batch]


def render(file, number, row, where, tokenizer, options):
    """The Conversation of one row. Raises UserError, which names the row."""
    messages = to_messages(row, where, options.keys)
    if options.train_on == "last":
        for message in [m for m in messages if m["role"] == "assistant"][:-1]:
            message["train"] = False
    text, spans = tokenizer.render_spans(messages, where, row.get("tools"))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: half a character (a lone surrogate): {error}") from error
    return Conversation(file, number, where, text, spans)


def append(conversation, encoding, options, stop_token_id, ledger, writer):
    """Mask one conversation, account for all of its tokens, and write it if it has a target."""
    length, kept = len(encoding), min(len(encoding), options.max_length)
    ledger.rows, ledger.tokens = ledger.rows + 1, ledger.tokens + length
    if length > kept and options.too_long == "error":
        raise UserError(f"{conversation.where} has {length} tokens, more than --max_length {kept}; raise it, "
                        "or set --too_long to truncate or drop")
    if length > kept and options.too_long == "drop":
        ledger.drop("too long", length)
        return
    loss_mask, turns, stopped = make_loss_mask(encoding, conversation.spans, conversation.text, kept=kept,
                                     train_on_prompt=options.train_on_prompt, stop_token_id=stop_token_id)
    ledger.turns += turns
    ledger.turns_stopped += stopped
    places = np.flatnonzero(loss_mask)
    if not len(places):
        ledger.drop("without targets" + (" after truncation" if length > kept else ""), length)
        return
    ledger.keep(len(places), kept, length)
    writer.add(tokens=encoding.ids[:kept], loss_mask=loss_mask, n_tokens=[kept], n_inputs=places[-1:],
               n_targets=[len(places)], file=[conversation.file], row=[conversation.row])


def make_loss_mask(encoding, spans, text, *, kept, train_on_prompt, stop_token_id):
    """The loss mask of one conversation: a token is a target if it lies wholly inside a trained span.

    encoding  of `text`, by the tokenizers library: n tokens
    spans     [(start, stop, whole, trained), ...] of the assistant's turns, in order: the characters from the
              end of the turn's header to the end of the token that ends it, and whether that token is there
    kept      n, or fewer if the tokens after that are truncated
    train_on_prompt  every token is a target; not the first, as nothing predicts it
    stop_token_id   the token that ends a turn, or None
    returns   (kept,) bool; int, trained turns that are not truncated; int, those whose stop token is a target
    """
    ids, loss_mask, turns, stopped = encoding.ids, np.full(len(encoding), train_on_prompt), 0, 0
    for start, stop, whole, trained in spans:
        first, end = token_range(encoding, start, stop, len(text))
        if kept < len(ids) and first >= kept:
            break  # truncated, as later turns are: each search for the tokens of a span takes long
        loss_mask[first:end] = trained or train_on_prompt
        if trained and end <= kept:
            turns += 1
            stopped += int(whole and stop_token_id in ids[first:end])
    loss_mask[:1] = False
    return loss_mask[:kept], turns, stopped


def token_range(encoding, start, stop, text_length):
    """(first, end) of the tokens that lie wholly inside the characters [start, stop). One that a merge made
    of characters on both sides does not: the model can't generate it, as its first half is in the prompt."""
    def first_from(char):
        while char < text_length:
            token = encoding.char_to_token(char)
            if token is not None:
                return token
            char += 1
        return len(encoding)

    first = first_from(start)
    if first < len(encoding) and encoding.token_to_chars(first)[0] < start:
        first += 1
    end = first_from(stop)
    if end < len(encoding) and encoding.token_to_chars(end)[0] < stop:
        end += 1  # the turn's last token includes white space that follows it
    return first, max(first, end)


# ---- masked tokens -> steps --------------------------------------------------------------------------------


class Step(NamedTuple):
    epoch: float  # epochs that are done after it
    ids: np.ndarray  # (k,) int64, the conversations that it holds


class Sampler:
    """Which conversations step 1, 2, ... holds: a pure function of (seed, epoch), so resume needs no state.

    A step has batch_size conversations, or as many as fit into batch_tokens; the last of an epoch has what
    is left. len(sampler) is max_steps where given, else the steps of all epochs.

    lengths    (n,) Dataset.lengths, which batch_tokens limits: not sizes, which the metric `tokens` counts
    mix        Dataset.mix(), see mixed_quotas
    per_epoch  list, the steps of each epoch
    quotas     list, how many conversations of each group an epoch holds
    """

    def __init__(self, n_inputs, *, epochs, seed, batch_size, batch_tokens=None, max_steps=None, mix=None):
        self.n_inputs, self.seed, self.batch_size, self.batch_tokens = n_inputs, seed, batch_size, batch_tokens
        self.groups, self.quotas = None, [len(n_inputs)]
        if mix:
            self.groups, weights = mix
            self.quotas = mixed_quotas(np.bincount(self.groups, minlength=len(weights)), weights)
        if batch_tokens and np.max(n_inputs) > batch_tokens:
            raise UserError(f"--batch_tokens {batch_tokens}: a conversation has {np.max(n_inputs)} tokens")
        self.per_epoch, self.total, n = [], 0, sum(self.quotas)
        for epoch in itertools.count() if max_steps else range(epochs):
            steps = len(self.epoch_order(epoch)[1]) - 1 if batch_tokens else ceil_div(n, batch_size)
            self.per_epoch.append(steps)
            self.total += steps
            if max_steps and self.total >= max_steps:
                self.total = max_steps
                break
        self.ends = np.cumsum(self.per_epoch)  # the last step of each epoch
        self.epoch, self.order, self.cuts = None, None, None  # the epoch that was last asked for

    def __len__(self):
        return self.total

    def epoch_order(self, epoch):
        """(order, cuts) of an epoch's conversations: its steps hold order[cuts[0]:cuts[1]] and so on."""
        # Philox's raw stream is the same on every machine and NumPy version; a Generator's shuffle may vary.
        keys = np.random.Philox(key=[self.seed, epoch]).random_raw(len(self.n_inputs))
        order = np.argsort(keys, kind="stable")
        if self.groups is not None:  # the first ones of each group, then all of these in order of their keys
            drawn = [order[self.groups[order] == group][:quota] for group, quota in enumerate(self.quotas)]
            order = np.concatenate(drawn)
            order = order[np.argsort(keys[order], kind="stable")]
        if not self.batch_tokens:
            return order, np.append(np.arange(0, len(order), self.batch_size), len(order))
        n_inputs, cuts = self.n_inputs[order], [0]
        ends = np.cumsum(n_inputs, dtype=np.int64)
        next_cuts = np.searchsorted(ends, ends - n_inputs + self.batch_tokens, "right")  # of a step from each on
        while cuts[-1] < len(order):
            cuts.append(int(next_cuts[cuts[-1]]))
        return order, np.array(cuts)

    def step(self, step):
        """The Step of a number, counted from 1."""
        epoch = int(np.searchsorted(self.ends, step))
        if epoch != self.epoch:
            self.epoch, (self.order, self.cuts) = epoch, self.epoch_order(epoch)
        index = step - 1 - (int(self.ends[epoch - 1]) if epoch else 0)
        ids = self.order[self.cuts[index] : self.cuts[index + 1]]
        return Step(epoch + (index + 1) / self.per_epoch[epoch], ids)

    def is_due(self, step, every):
        """Whether what happens every so many steps (None: once per epoch) happens after this one."""
        return step % every == 0 if every else step in self.ends or step == self.total


def mixed_quotas(counts, weights):
    """How many conversations of each group an epoch holds: as many as the weights allow without one of them
    twice. The group that is smallest for its weight is in it whole, of others another part each epoch."""
    if not counts.all():
        raise UserError(f"part {counts.argmin() + 1} of the mixed data has no conversation to train on")
    # exact fractions of the decimals as they were written: the same number on every machine
    shares = [Fraction(str(weight)) for weight in weights]
    most = min(int(count) / share for count, share in zip(counts, shares))
    quotas = [int(most * share) for share in shares]
    if not all(quotas):
        raise UserError(f"weights {weights} of {counts.tolist()} conversations leave a part without any; "
                        "give it a larger weight, or leave it out")
    return quotas


# ---- steps -> micro-batches --------------------------------------------------------------------------------


@dataclass
class MicroBatch:
    """Conversations one after another, without padding: N tokens, of which R are followed by a target."""

    tokens: torch.Tensor  # (N,) int64
    doc_lengths: tuple  # ints, the tokens of each conversation; their sum is N
    target_positions: torch.Tensor  # (R,) int64, ascending: the positions whose next token is a target
    targets: torch.Tensor  # (R,) int64: that next token
    ids: np.ndarray  # (conversations,) int64: which ones they are

    def inputs(self, device):
        """The arguments of the model's forward, on its device."""
        return self.tokens.to(device), self.doc_lengths, self.target_positions.to(device), self.targets.to(device)

    def owners(self):
        """(R,) int64: the conversation of each target, an index of the Dataset."""
        document = np.searchsorted(np.cumsum(self.doc_lengths), self.target_positions.numpy(), "right")
        return torch.from_numpy(self.ids[document])


def micro_batches(dataset, ids, capacity, max_conversations=None, dp_rank=0, dp_size=1):
    """Yield the MicroBatches of a step's conversations `ids` for one of dp_size ranks; see packing.pack."""
    ids = np.asarray(ids)
    for group in pack(dataset.n_inputs[ids], capacity, max_conversations, dp_rank=dp_rank, dp_size=dp_size):
        if not group:  # fewer conversations than ranks: one token without a target, as all ranks take part
            none = torch.zeros(0, dtype=torch.long)
            yield MicroBatch(torch.zeros(1, dtype=torch.long), (1,), none, none, ids[:1])
            continue
        spans = [(int(dataset.starts[i]), int(dataset.n_inputs[i])) for i in ids[group]]
        tokens = np.concatenate([dataset.tokens[s : s + n] for s, n in spans])
        next_tokens = np.concatenate([dataset.tokens[s + 1 : s + n + 1] for s, n in spans])
        rows = np.flatnonzero(np.concatenate([dataset.loss_mask[s + 1 : s + n + 1] for s, n in spans]))
        yield MicroBatch(torch.from_numpy(tokens).long(), tuple(n for _, n in spans), torch.from_numpy(rows),
                         torch.from_numpy(next_tokens[rows]).long(), ids[group])
