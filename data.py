"""From files of conversations to micro-batches of token ids, with every token accounted for.

    python data.py show my.json --model DIR       # conversations as the model sees them, targets marked
    python data.py stats my.json --model DIR      # lengths, what max_length would cut, how full micro-batches are

Owns: the target mask, the ledger, the cache, which conversations a step holds and how they are laid into micro-batches.
It knows ranks as two integers and nothing else of other processes. A conversation is read (formats.py) and rendered
(template.py) once, tokenised once and masked by the character offsets of its answers.
"""

import contextlib
import hashlib
import heapq
import inspect
import itertools
import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime
from fractions import Fraction

import numpy as np
import torch

from disk.files import take_lock
from settings.errors import UserError
from text.formats import KEYS, data_files, read_file, to_messages

IGNORE = -100  # a target that is not trained: model.py's, and PyTorch's own


def token_range(encoding, start, stop, text_length):
    """The tokens that lie wholly inside the characters [start, stop). One that a merge has pulled over the border
    is left out: the model can't generate it, as its first half is already in the prompt."""

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
        end += 1  # the turn's last token takes white space behind it in
    return first, max(first, end)


# ---------------------------------------------------------------------------------------------------------------------
# rows -> flat arrays, with a ledger


@dataclass
class Ledger:
    """Where every row and token went. `check` proves that it balances and decides whether the run may start."""

    rows: int = 0
    trained: int = 0
    dropped: dict = field(default_factory=dict)  # reason -> rows
    tokens: int = 0
    target: int = 0
    context: int = 0
    truncated: int = 0
    in_dropped_rows: int = 0
    rows_truncated: int = 0
    turns: int = 0  # assistant turns that are trained and not truncated
    turns_stopped: int = 0  # those among them whose end is a target

    def drop(self, reason, tokens):
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.in_dropped_rows += tokens

    def lines(self):
        n_dropped = sum(self.dropped.values())
        dropped = "".join(f", {count} {reason}" for reason, count in self.dropped.items())
        cut = f" (of {self.rows_truncated} rows)" if self.rows_truncated else ""
        extra = f" + {self.in_dropped_rows:,} in dropped rows" if self.in_dropped_rows else ""
        return (f"rows     {self.rows:,} in = {self.trained:,} trained + {n_dropped:,} dropped{dropped}",
                f"tokens   {self.tokens:,} in = {self.target:,} target + {self.context:,} context + "
                f"{self.truncated:,} truncated{cut}{extra}")

    def check(self, spec, max_length):
        assert self.rows == self.trained + sum(self.dropped.values()), self
        assert self.tokens == self.target + self.context + self.truncated + self.in_dropped_rows, self
        if not self.trained:
            raise UserError(f"{spec}: no row is left to train on: {self.rows} in, dropped {self.dropped}; "
                            f"--max_length {max_length} may be too small for any answer")
        if self.turns_stopped < 0.99 * self.turns:
            raise UserError(f"{spec}: only {self.turns_stopped} of {self.turns} assistant turns train a token that "
                            "ends them: the model would never stop; use a chat template (--tokenizer) that ends each "
                            "turn with a special token")


ARRAYS = {"tokens": np.int32, "is_target": np.bool_, "sizes": np.int32, "lengths": np.int32, "n_targets": np.int32,
          "file": np.int32, "row": np.int32}  # a Dataset's, one file each in its directory


@dataclass
class Dataset:
    """Conversations as flat arrays, mapped from the disk; conversation i is tokens[starts[i]:starts[i + 1]]."""

    tokens: np.ndarray
    is_target: np.ndarray
    sizes: np.ndarray  # tokens of each
    lengths: np.ndarray  # the inputs of each, up to its last target; what follows that can't change the loss
    n_targets: np.ndarray  # of each
    file: np.ndarray  # where each came from: an index of files
    row: np.ndarray  # and the row in that
    files: list
    weights: list  # of each file: the number of its group, and the group's weight, see data_files
    ledger: Ledger
    digest: str  # a hash of tokens, targets, their order and weights: resume goes on with the same data or not at all

    def __post_init__(self):
        self.starts = np.concatenate(([0], np.cumsum(self.sizes, dtype=np.int64)))

    def __len__(self):
        return len(self.lengths)

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
        """The same of several, in words."""
        more = f" and {len(ids) - count} more" if len(ids) > count else ""
        return ", ".join(map(self.source, ids[:count])) + more


def load(spec, tokenizer, max_length, too_long="truncate", train_on_prompt=False, train_on="all", cache_dir=None,
         timeout=600, limit=None, keys=KEYS):
    """Read, render, tokenise and mask everything that `spec` names; return a checked Dataset.

    train_on   all: the assistant's turns; last: the last of each conversation
    too_long   what happens to a conversation of more than max_length tokens: truncate (from the right), drop, error
    cache_dir  keep the result there, and map it into memory from there: under a lock, so one process of a node makes
               it while the others wait, before any collective, for as long as it goes on
    timeout    seconds without progress after which it is given up (take_lock)
    limit      rows that are read, without cache_dir
    keys       see formats.to_messages
    """
    options = max_length, too_long, train_on_prompt, train_on, keys
    if cache_dir is None:
        with tempfile.TemporaryDirectory() as directory:  # what is mapped stays when its name is gone
            tokenise(spec, tokenizer, *options, directory, lambda: None, limit)
            return read_arrays(directory)
    # The key is all that the result depends on, this program and, for templates that print it, the date included.
    groups = data_files(spec)
    key = hashlib.blake2b(repr((groups, tokenizer.source, tokenizer.special, options)).encode(), digest_size=16)
    key.update(tokenizer.text.encode())
    if "strftime_now" in tokenizer.source:
        key.update(datetime.now().strftime("%Y-%m-%d").encode())
    program = (__file__, *map(inspect.getfile, (read_file, type(tokenizer))))
    for file in (*program, *(file for _, files in groups for file in files)):
        with open(file, "rb") as f:
            while chunk := f.read(2**24):
                key.update(chunk)
    path = os.path.join(os.path.expanduser(cache_dir), key.hexdigest())
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".lock", "a+") as lock:
        take_lock(lock, timeout)
        if not os.path.isdir(path):
            shutil.rmtree(path + ".tmp", ignore_errors=True)  # of a process that was killed here
            os.makedirs(path + ".tmp")
            tokenise(spec, tokenizer, *options, path + ".tmp", lambda: os.utime(lock.fileno()))
            os.replace(path + ".tmp", path)
    return read_arrays(path)


def read_arrays(directory):
    """The Dataset that tokenise wrote."""
    with open(os.path.join(directory, "facts.json"), encoding="utf-8") as f:
        facts = json.load(f)
    arrays = {name: np.memmap(os.path.join(directory, name), dtype, mode="r") for name, dtype in ARRAYS.items()}
    return Dataset(**arrays, **{**facts, "ledger": Ledger(**facts["ledger"])})


def tokenise(spec, tokenizer, max_length, too_long, train_on_prompt, train_on, keys, directory, progress, limit=None):
    """See load. Writes a Dataset's arrays and facts into a directory; calls progress() every thousand rows."""
    ledger, state, groups = Ledger(), hashlib.blake2b(digest_size=16), data_files(spec)
    files = [file for _, names in groups for file in names]
    weights = [[group, weight] for group, (weight, names) in enumerate(groups) for _ in names]

    def render(rows):
        """A thousand rows as (file, row number, text, spans)."""
        rendered = []
        for file, number, row in rows:
            where = f"{files[file]}[{number}]"
            messages = to_messages(row, where, keys)
            if train_on == "last":
                for message in [m for m in messages if m["role"] == "assistant"][:-1]:
                    message["train"] = False
            text, spans = tokenizer.render_spans(messages, where, row.get("tools"))
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"{where}: half a character (a lone surrogate): {error}") from error
            rendered.append((file, number, text, spans))
        return rendered

    def encode(rendered):
        return tokenizer.tokenizer.encode_batch([text for *_, text, _ in rendered], add_special_tokens=False)

    def write(rendered, encodings):
        """Mask them and append them to the arrays."""
        found = {name: [] for name in ARRAYS}
        for (file, number, text, spans), encoding in zip(rendered, encodings):
            ids = np.array(encoding.ids, dtype=np.int32)
            length, kept = len(ids), min(len(ids), max_length)
            ledger.rows += 1
            ledger.tokens += length
            if length > max_length and too_long == "error":
                raise UserError(f"{files[file]}[{number}] has {length} tokens, more than --max_length {max_length}; "
                                "raise it, or set --too_long to truncate or drop")
            if length > max_length and too_long == "drop":
                ledger.drop("too long", length)
                continue
            is_target = np.full(length, train_on_prompt)
            for start, stop, whole, trained in spans:
                first, end = token_range(encoding, start, stop, len(text))
                if first >= kept < length:
                    break  # cut off, and all behind it: finding its place takes a walk over all tokens
                is_target[first:end] = trained or train_on_prompt
                if trained and end <= kept:
                    ledger.turns += 1
                    ledger.turns_stopped += int(whole and tokenizer.stop_id in ids[first:end])
            is_target[0] = False  # nothing predicts the first token
            is_target = is_target[:kept]
            if not is_target.any():
                ledger.drop("without targets" + (" after truncation" if length > kept else ""), length)
                continue
            n_targets = int(is_target.sum())
            ledger.trained += 1
            ledger.target += n_targets
            ledger.context += kept - n_targets
            ledger.truncated += length - kept
            ledger.rows_truncated += length > kept
            values = ids[:kept], is_target, [kept], is_target.nonzero()[0][-1:], [n_targets], [file], [number]
            for name, part in zip(ARRAYS, values):
                found[name].append(part)
        for name, dtype in ARRAYS.items():
            if found[name]:
                block = np.concatenate(found[name]).astype(dtype).tobytes()
                state.update(block if name in ("tokens", "is_target", "sizes") else b"")
                outputs[name].write(block)

    with contextlib.ExitStack() as stack:
        outputs = {name: stack.enter_context(open(os.path.join(directory, name), "wb")) for name in ARRAYS}
        rows = ((i, number, row) for i, file in enumerate(files) for number, row in enumerate(read_file(file)))
        rows = itertools.islice(rows, limit)
        # The tokenizer works on all cores and without Python's lock: the next thousand are rendered meanwhile.
        waiting, pool = None, stack.enter_context(ThreadPoolExecutor(1))
        while (batch := list(itertools.islice(rows, 1000))) or waiting:
            rendered = render(batch)
            if waiting:
                write(waiting[0], waiting[1].result())
                progress()
            waiting = (rendered, pool.submit(encode, rendered)) if batch else None
    ledger.check(spec, max_length)
    state.update(repr(weights).encode())
    facts = {"files": files, "weights": weights, "ledger": asdict(ledger), "digest": state.hexdigest()}
    with open(os.path.join(directory, "facts.json"), "w", encoding="utf-8") as f:
        json.dump(facts, f)


# ---------------------------------------------------------------------------------------------------------------------
# which conversations a step holds, and how they are laid into micro-batches


class Sampler:
    """Which conversations step 1, 2, ... holds: a pure function of (seed, epoch), so resume needs the step only.

    batch_size conversations a step, or as many as batch_tokens tokens hold where that is given. The last step of an
    epoch takes what is left. len(sampler) is the number of steps: max_steps where given, else that of all epochs.

    mix  Dataset.mix(): groups are drawn from by weight. An epoch is as long as it can be without a conversation twice:
         the group that is shortest for its weight is in it whole, others in part, another part each epoch
    """

    def __init__(self, sizes, epochs, seed, batch_size, batch_tokens=None, max_steps=None, mix=None):
        self.sizes, self.seed, self.batch_size, self.batch_tokens = sizes, seed, batch_size, batch_tokens
        self.groups, self.quotas = None, [len(sizes)]
        if mix:
            self.groups, weights = mix
            counts = np.bincount(self.groups, minlength=len(weights))
            if not counts.all():
                raise UserError(f"part {counts.argmin() + 1} of the mixed data has no conversation to train on")
            # exact fractions of the decimals as they were written: the same number on every machine
            shares = [Fraction(str(weight)) for weight in weights]
            most = min(int(count) / share for count, share in zip(counts, shares))
            self.quotas = [int(most * share) for share in shares]
            if not all(self.quotas):
                raise UserError(f"weights {weights} of {counts.tolist()} conversations leave a part without any; give "
                                "it a larger weight, or leave it out")
        if batch_tokens and np.max(sizes) > batch_tokens:
            raise UserError(f"--batch_tokens {batch_tokens}: the longest conversation has {np.max(sizes)} tokens")
        self.per_epoch = []  # steps
        while sum(self.per_epoch) < max_steps if max_steps else len(self.per_epoch) < epochs:
            steps = len(self.plan(len(self.per_epoch))[1]) - 1 if batch_tokens else -(-sum(self.quotas) // batch_size)
            self.per_epoch.append(steps)
        self.ends = np.cumsum(self.per_epoch)
        self.total = max_steps or int(self.ends[-1])
        self.epoch, self.cached = None, None

    def __len__(self):
        return self.total

    def plan(self, epoch):
        """The epoch's conversations in order, and where in it each step starts and the last one stops."""
        # Philox's raw stream is the same on every machine and NumPy version, a Generator's shuffle may change.
        keys = np.random.Philox(key=[self.seed, epoch]).random_raw(len(self.sizes))
        order = np.argsort(keys, kind="stable")
        if self.groups is not None:
            drawn = [order[self.groups[order] == g][:quota] for g, quota in enumerate(self.quotas)]
            order = np.concatenate(drawn)
            order = order[np.argsort(keys[order], kind="stable")]
        if not self.batch_tokens:
            return order, np.append(np.arange(0, len(order), self.batch_size), len(order))
        sizes, cuts = self.sizes[order], [0]
        ends = np.cumsum(sizes, dtype=np.int64)
        stops = np.searchsorted(ends, ends - sizes + self.batch_tokens, "right")  # of a step that starts at each
        while cuts[-1] < len(order):
            cuts.append(int(stops[cuts[-1]]))
        return order, np.array(cuts)

    def step(self, step):
        """(epochs done after it as a float, conversation ids) of a step, counted from 1."""
        epoch = int(np.searchsorted(self.ends, step))
        if epoch != self.epoch:
            self.epoch, self.cached = epoch, self.plan(epoch)
        index = step - 1 - (int(self.ends[epoch - 1]) if epoch else 0)
        order, cuts = self.cached
        return epoch + (index + 1) / self.per_epoch[epoch], order[cuts[index] : cuts[index + 1]]

    def ends_epoch(self, step):
        return step in self.ends or step == self.total


def pack(lengths, capacity, max_rows=None, dp_rank=0, dp_size=1):
    """Lay conversations into micro-batches of at most `capacity` tokens (and max_rows conversations); return those of
    one rank as lists of indices into lengths. Every rank gets equally many.

    Longest first into the emptiest. All ranks compute the same plan, in integers, so none has to ask another.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    n, places, longest = lengths[order], np.arange(len(order)), int(lengths.max(initial=1))
    assert longest <= capacity, (lengths, capacity)
    if max_rows:
        room = min(max_rows, capacity // longest)  # so many fit, whichever they are
        turn = places % (2 * dp_size)
        ranks = np.minimum(turn, 2 * dp_size - 1 - turn)  # there and back: as many for each, and as long each time
        count = max(1, -(-len(order) // (room * dp_size)))
    else:
        room, ranks = capacity, share(n, dp_size)
        by_rank = np.argsort(ranks, kind="stable")
        first = np.searchsorted(ranks[by_rank], ranks[by_rank])  # the place of its rank's longest
        before = np.cumsum(n[by_rank]) - n[by_rank]
        # When a conversation's turn comes, the emptiest of `count` micro-batches holds at most before / count tokens,
        # and none while there are more of them than conversations before: this many leave room for each.
        enough = np.minimum((before - before[first]) // (capacity - n[by_rank] + 1), places - first) + 1
        count = int(enough.max(initial=1))
    mine, n = order[ranks == dp_rank], n[ranks == dp_rank]
    bins, batches = [], [[] for _ in range(count)]
    fill(bins, np.ones_like(n) if max_rows else n, n, [room] * count)
    for i, b in zip(mine.tolist(), bins, strict=True):
        batches[b].append(i)
    return batches


def share(n, dp_size):
    """The rank of each of `n` tokens, given longest first: even in tokens and in squared length, attention's cost.

    The longest go where the cost so far is least, up to an even share of the tokens; the last 16th levels the tokens.
    A rank still short of tokens will get more of the short ones: its cost counts what those cost a token beforehand.
    """
    if dp_size == 1 or len(n) <= dp_size:
        return np.arange(len(n)) % dp_size
    tokens, squares = (np.append(np.cumsum(x[::-1])[::-1], 0) for x in (n, n * n))  # from each one on
    ranks, room = [], [-(-int(tokens[0]) // dp_size)] * dp_size
    for part in 4, 8, 16:
        stop = int((tokens > tokens[0] // part).sum())
        fill(ranks, n[:stop], n * (n - squares[stop] // max(1, tokens[stop])), room)
    fill(ranks, n, n, [int(tokens[0])] * dp_size)
    return np.array(ranks)


def fill(bins, sizes, costs, room):
    """Go on with `bins`, the bin of each item: that of least cost so far, without bins from when they lacked room."""
    loads, sizes, costs = [0] * len(room), sizes.tolist(), costs.tolist()
    for b, cost in zip(bins, costs):
        loads[b] += cost
    heap = sorted((load, b) for b, load in enumerate(loads))
    for size, cost in zip(sizes[len(bins) :], costs[len(bins) :]):
        while heap and room[heap[0][1]] < size:
            heapq.heappop(heap)
        if not heap:
            break
        load, b = heap[0]
        bins.append(b)
        room[b] -= size
        heapq.heapreplace(heap, (load + cost, b))


@dataclass
class MicroBatch:
    """Conversations one after another, without padding."""

    tokens: torch.Tensor  # (N,) int64
    targets: torch.Tensor  # (N,) int64: the next token where that is a target, IGNORE elsewhere
    lengths: tuple  # of each conversation; their sum is N
    ids: np.ndarray  # which conversations they are

    def owners(self):
        """(N,) int64: the conversation of each token."""
        return torch.from_numpy(self.ids).repeat_interleave(torch.tensor(self.lengths))


def micro_batches(dataset, ids, capacity, max_rows=None, dp_rank=0, dp_size=1):
    """The micro-batches of a step's conversations for one rank."""
    ids = np.asarray(ids)
    for group in pack(dataset.lengths[ids], capacity, max_rows, dp_rank, dp_size):
        spans = [(int(dataset.starts[i]), int(dataset.lengths[i])) for i in ids[group]]
        if not group:  # fewer conversations than ranks: one token without a target, as all ranks step together
            yield MicroBatch(torch.zeros(1, dtype=torch.long), torch.full((1,), IGNORE), (1,), ids[:1])
            continue
        inputs = np.concatenate([dataset.tokens[s : s + n] for s, n in spans])
        targets = np.concatenate([np.where(dataset.is_target[s + 1 : s + n + 1], dataset.tokens[s + 1 : s + n + 1],
                                           IGNORE) for s, n in spans])
        yield MicroBatch(torch.from_numpy(inputs).long(), torch.from_numpy(targets).long(), tuple(n for _, n in spans),
                         ids[group])
