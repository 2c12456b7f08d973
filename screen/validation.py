"""Validation: loss and token accuracy of each set, before training and after it, and what is forgotten."""

import hashlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from settings.errors import UserError
from text.sources import listed, set_names


class Result(NamedTuple):
    """What was measured on a set, or on several together."""

    loss: float  # nats: the mean over the targets, by their weights
    accuracy: float  # share of the targets that are the likeliest token
    tokens: int  # targets
    weight: float  # sum of their weights
    forgetting: float | None = None  # loss minus that before training; None: not known


@dataclass
class ValidationSet:
    """Some conversations of a Dataset."""

    ids: np.ndarray  # (k,) int64
    tokens: int  # targets
    weight: float  # sum of their weights
    digest: str  # a hash of their tokens, targets and weights


def sets_of(dataset, spec):
    """{name: ValidationSet} of the Dataset that --val_data `spec` names, in order; None names the only one.

    spec  None: --val_split, one set. Raises UserError for a set without a conversation
    """
    names = set_names(spec) if spec else []
    parts = dataset.by_source()
    chosen = {name: parts[name] for name in names} or {None: np.arange(len(dataset))}
    empty = [name for name, ids in chosen.items() if not len(ids)]
    if empty:
        raise UserError(f"{spec}: {listed(empty)} has no rows, or all are dropped, so this set has nothing "
                        "to measure; remove it, or pass its file alone to see why")
    result = {}
    for name, ids in chosen.items():
        counts = dataset.count(ids)
        result[name] = ValidationSet(ids, counts["target_tokens"], counts["target_weight"],
                                     digest_of(dataset, ids))
    return result


def digest_of(dataset, ids):
    """A hash of what is measured on these conversations: their tokens, targets and weights."""
    is_in = np.isin(np.arange(len(dataset)), ids)
    is_token = np.repeat(is_in, dataset.n_tokens)
    is_weight = is_token[dataset.weighted]
    place = np.cumsum(is_token)[dataset.weighted[is_weight]]
    digest = hashlib.blake2b(digest_size=16)
    for array in (dataset.n_tokens[is_in], dataset.tokens[is_token], dataset.loss_mask[is_token], place,
                  dataset.weight[is_weight]):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def n_trained_too(dataset, ids, train_set):
    """How many of the conversations `ids` of a Dataset have the tokens of a conversation in train_set."""
    def keys(dataset, ids):
        """(k,) int64: a hash of the length and of eight tokens of each conversation."""
        result = np.zeros(len(ids), np.int64)
        for eighth in range(8):
            tokens = dataset.tokens[dataset.starts[ids] + dataset.n_tokens[ids] * eighth // 8]
            result = 1_000_003 * result + tokens
        return 1_000_003 * result + dataset.n_tokens[ids]

    def hashes(dataset, ids):
        return [hash(dataset.tokens[dataset.starts[i] : dataset.starts[i + 1]].tobytes()) for i in ids]

    alike = np.flatnonzero(np.isin(train_set.n_tokens, dataset.n_tokens[ids]))
    alike = alike[np.isin(keys(train_set, alike), keys(dataset, ids))]
    trained = set(hashes(train_set, alike))
    return sum(found in trained for found in hashes(dataset, ids))


def measure(evaluate, model, dataset, sets, cfg, ranks):
    """{name: Result} of ValidationSets. All ranks call it.

    evaluate  sft.evaluate
    """
    results = {}
    for name, part in sets.items():
        loss, accuracy = evaluate(model, dataset, part.ids, cfg, ranks)
        results[name] = Result(loss, accuracy, part.tokens, part.weight)
    return results


def together(results):
    """The Result of all sets together, from {name: Result}; its forgetting is known if that of each is."""
    parts = list(results.values())
    weight, tokens = sum(part.weight for part in parts), sum(part.tokens for part in parts)
    forgetting = None
    if all(part.forgetting is not None for part in parts):
        forgetting = sum(part.forgetting * part.weight for part in parts) / weight
    return Result(sum(part.loss * part.weight for part in parts) / weight,
                  sum(part.accuracy * part.tokens for part in parts) / tokens, tokens, weight, forgetting)


class Validation:
    """The validation sets of a run and its --sample_prompts.

    dataset  the Dataset of all sets, or None
    sets     {name: ValidationSet}
    judged   the name of the set by whose loss --keep_best and --early_stopping go
    prompts  samples.Prompts

    The losses before training are in the RunState, by the digest of their set: `run.baseline`.
    """

    def __init__(self, cfg, dataset, prompts, run, ranks):
        self.dataset, self.prompts, self.run, self.ranks = dataset, prompts, run, ranks
        self.sets = sets_of(dataset, cfg.val_data) if dataset else {}
        if not self.sets:
            return
        self.judged = cfg.keep_best if isinstance(cfg.keep_best, str) else next(iter(self.sets))
        run.judge_by(self.sets[self.judged].digest)
        unknown = [name for name, part in self.sets.items() if part.digest not in run.baseline]
        if run.step and unknown:
            of = "" if unknown == [None] else f" of {listed(unknown)}"
            run.lines.append(f"forgetting is not known{of}: the checkpoint has no loss from before training")

    def lines(self, train_set):
        """The banner's lines about rows that are trained too, about several sets, or about --val_split."""
        lines = []
        for name, part in self.sets.items():
            if n := n_trained_too(self.dataset, part.ids, train_set):
                of_set = f" of {name}" if name else ""
                lines.append(f"overlap  {n:,} of {len(part.ids):,} validation conversations{of_set} are in "
                             "the training data too: their loss is lower than on new data")
        if self.run.cfg.val_split:
            n, n_train = self.dataset.ledger.of_rows, train_set.ledger.of_rows
            return [*lines, f"split    {n:,} of {n + n_train:,} rows are for validation, by a hash of each "
                            f"one (--val_split {self.run.cfg.val_split})"]
        if len(self.sets) < 2:
            return lines
        sizes = [f"{name} {len(part.ids):,} conversations, {part.tokens:,} targets"
                 for name, part in self.sets.items()]
        return [*lines, f"sets     {'; '.join(sizes)}"]

    def before_training(self, evaluate, model, cfg, log):
        """In a new run, measure and log the losses with which later ones are compared. All ranks call it.

        evaluate  sft.evaluate

        A signal ends the run at once: there is nothing to save yet.
        """
        if self.run.step or not self.sets:
            return
        self.ranks.set_phase("evaluation before step 1")
        results = measure(evaluate, model, self.dataset, self.sets, cfg, self.ranks)
        self.run.baseline = {self.sets[name].digest: result.loss for name, result in results.items()
                             if math.isfinite(result.loss)}
        log.validation(0, self.compared(results), [])

    def after_step(self, step, evaluate, model, cfg, log):
        """Measure, answer and log; return whether the judged loss is the lowest so far. All ranks call it.

        A signal ends it early. Then nothing is logged, and the run owes the evaluation: resume repeats it.
        """
        run, ranks = self.run, self.ranks
        if not self.sets and not self.prompts.encoded:
            return False
        ranks.set_phase(f"evaluation after step {step}")
        results = measure(evaluate, model, self.dataset, self.sets, cfg, ranks)
        answers = self.prompts.answer(model, ranks)
        run.owes_evaluation = bool(ranks.poll_signals())
        if run.owes_evaluation:
            return False
        log.validation(step, self.compared(results), answers)
        for name, result in results.items():
            run.note_lowest(self.sets[name].digest, step, result.loss)
        return bool(results) and run.judge(step, results[self.judged].loss)

    def compared(self, results):
        """The same {name: Result} with what was forgotten, where the loss before training is known."""
        known = {}
        for name, result in results.items():
            before = self.run.baseline.get(self.sets[name].digest)
            known[name] = result if before is None else result._replace(forgetting=result.loss - before)
        return known
