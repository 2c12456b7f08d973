"""The ledger of a dataset: an account of every row and token, trained or not."""

import math
from dataclasses import dataclass, field

import numpy as np

from settings.errors import UserError, printable
from text import inference, split
from text.keys import misspelled
from text.sources import describe_files

N_WARNINGS = 3  # that are printed
N_CHARACTERS = 5  # that the tokenizer lacks and are printed
MOST_EPOCHS = 10_000  # that are cut into steps of --batch_tokens before the first one, without --max_steps
N_COLUMNS = 1000  # that are not used and remembered: a file may have new ones in each row


@dataclass
class Ledger:
    """Counts of rows, tokens and assistant turns.

    Two sums must balance, see check(): rows = trained + dropped, and tokens = target + context + truncated +
    in_dropped_rows.
    """

    rows: int = 0
    trained: int = 0  # rows
    dropped: dict = field(default_factory=dict)  # reason -> rows
    tokens: int = 0
    target: int = 0  # tokens that the loss predicts
    context: int = 0  # tokens that are input only
    truncated: int = 0  # tokens beyond max_length, in rows that are trained
    in_dropped_rows: int = 0  # tokens
    rows_truncated: int = 0
    turns: int = 0  # assistant turns that are trained and not truncated
    turns_stopped: int = 0  # turns among these whose stop token is a target
    kinds: dict = field(default_factory=dict)  # "chat", "text" or "tokens" -> rows
    chats_trained: int = 0  # rows
    unasked: int = 0  # rows whose first message, without a system message, is a trained answer
    cut: int = 0  # plain texts longer than max_length
    pieces: int = 0  # into which these were cut
    weighted: int = 0  # targets whose weight is not 1
    weight: float = 0.0  # sum of the weights of all targets
    unused: dict = field(default_factory=dict)  # column -> rows that have it, see formats.Row
    of_rows: int = 0  # rows of the files; `rows` counts more with --split_turns, where each turn is one
    reasoning_rendered: int = 0  # trained answers whose reasoning the template renders
    reasoning_tokens: int = 0  # tokens of reasoning in trained turns, also if they are no targets
    reasoning_masked: int = 0  # tokens among these that are no targets, by --train_reasoning false
    reasoning_dropped: int = 0  # trained answers whose reasoning the template does not render
    reasoning_tokens_dropped: int = 0
    unknown: int = 0  # tokens that are the tokenizer's unknown token
    lost: int = 0  # characters that have no token, as the tokenizer lacks them
    rows_unknown: int = 0  # rows with either
    lacking: list = field(default_factory=list)  # some of these characters
    compared: int = 0  # trained turns whose prompt is compared with that of inference
    differing: dict = field(default_factory=dict)  # how it differs -> [turns, the first one]
    warned: int = 0  # warnings about rows
    warnings: list = field(default_factory=list)  # the first few

    @property
    def written(self):
        """Tokens of the rows that are trained."""
        return self.target + self.context

    def count(self, masked, conversation):
        """Count a row: its masks.Masked and its conversations.Conversation."""
        notes = conversation.notes
        self.rows += 1
        self.of_rows += conversation.is_first
        self.tokens += masked.length
        self.turns += masked.turns
        self.turns_stopped += masked.stopped
        self.reasoning_tokens += masked.reasoning
        self.reasoning_masked += masked.reasoning_masked
        self.unknown += masked.unknown.tokens
        self.lost += masked.unknown.characters
        self.rows_unknown += masked.unknown.tokens + masked.unknown.characters > 0
        self.lacking = list(dict.fromkeys([*self.lacking, *masked.unknown.examples]))[:N_CHARACTERS]
        for name in conversation.unused if conversation.is_first else ():
            if name not in self.unused and len(self.unused) < N_COLUMNS and (near := misspelled(name)):
                self.warn(f'{conversation.where}: "{name:.60}" is not used; should it be "{near}"?')
            if name in self.unused or len(self.unused) < N_COLUMNS:
                self.unused[name] = self.unused.get(name, 0) + 1
        if notes:
            self.reasoning_rendered += notes.reasoning_rendered
            self.reasoning_dropped += len(notes.reasoning_dropped)
        if notes and notes.warning and conversation.is_first:
            self.warn(notes.warning)
        if masked.kind:
            self.kinds[masked.kind] = self.kinds.get(masked.kind, 0) + 1
        if masked.dropped:
            self.drop(masked.dropped, masked.length)
        else:
            self.keep(masked)
            self.unasked += conversation.is_first and conversation.is_unasked

    def warn(self, text):
        """Count a warning about a row; the first few are kept."""
        self.warned += 1
        self.warnings = [*self.warnings, text][:N_WARNINGS]

    def compare(self, prompts, encoding):
        """Count the inference.Prompts of a conversation, whose text has this encoding."""
        for end, difference, example in prompts:
            self.compared += 1
            if not difference and inference.crosses(encoding, end):
                difference = inference.TOKEN
            if difference:
                self.differing.setdefault(difference, [0, example])[0] += 1

    def drop(self, reason, length):
        """Count a row of `length` tokens that is not trained."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.in_dropped_rows += length

    def keep(self, masked):
        """Count a row that is trained."""
        weights, n_pieces = masked.weights[masked.weights > 0], len(masked.pieces)
        self.trained += 1
        self.chats_trained += masked.kind == "chat"
        self.target += len(weights)
        self.context += len(masked.weights) - len(weights)
        self.truncated += masked.length - len(masked.weights)
        self.rows_truncated += masked.length > len(masked.weights)
        if n_pieces > 1:
            self.cut += 1
            self.pieces += n_pieces
        n_weighted = int(np.count_nonzero(weights != 1))
        self.weighted += n_weighted
        self.weight += float(weights.sum(dtype="float64")) if n_weighted else len(weights)

    def lines(self, files=()):
        """The lines on the screen: files if they are given, rows, tokens, and what else there is to say."""
        n_dropped = sum(self.dropped.values())
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
        dropped = f" ({reasons})" if reasons else ""
        cut = f" (of {self.rows_truncated} rows)" if self.rows_truncated else ""
        extra = f" + {self.in_dropped_rows:,} in dropped rows" if self.in_dropped_rows else ""
        name, turns = "rows", ""
        if self.rows > self.of_rows:
            name, turns = "samples", f"; one for each trained turn of {self.of_rows:,} rows"
        lines = [f"files    {describe_files(files)}"] if files else []
        lines += [f"{name:<8} {self.rows:,} in = {self.trained:,} trained + {n_dropped:,} dropped{dropped}"
                  f"{turns}",
                  f"tokens   {self.tokens:,} in = {self.target:,} target + {self.context:,} context + "
                  f"{self.truncated:,} truncated{cut}{extra}"]
        if self.cut:
            lines.append(f"pieces   {self.cut:,} texts longer than --max_length are cut into {self.pieces:,}")
        if self.weighted:
            lines.append(f"weights  {self.weighted:,} targets have a weight other than 1; the sum over all "
                         f"targets is {self.weight:,.10g}")
        if self.rows_unknown:
            what = f"{self.unknown:,} tokens are its unknown token"
            if self.lost:
                what = f"{self.lost:,} characters have no token and vanish"
            examples = ": " * bool(self.lacking) + " ".join(self.lacking)
            lines.append(f"unknown  the tokenizer lacks characters{examples}; {what}, in "
                         f"{self.rows_unknown:,} {name}")
        if self.unasked:
            begin = "row begins" if self.unasked == 1 else "rows begin"
            lines.append(f"unasked  {self.unasked:,} {begin} with an answer, which no question asks for; it "
                         'is a target too, unless its message has "train": false')
        if self.trained and not self.chats_trained:
            lines.append("turns    no row has messages, so whether turns end was not checked")
        if n_thoughts := self.reasoning_rendered + self.reasoning_dropped:
            masked = ", no targets" if self.reasoning_masked else ""
            lost = (f"; the chat template drops that of {self.reasoning_dropped:,} "
                    f"({self.reasoning_tokens_dropped:,} tokens)" if self.reasoning_dropped else "")
            hint = "; --split_turns may keep it" if lost and self.rows == self.of_rows else ""
            lines.append(f"thoughts {self.reasoning_rendered:,} of {n_thoughts:,} answers have their "
                         f"reasoning in the text ({self.reasoning_tokens:,} tokens, with tags and empty "
                         f"blocks{masked}){lost}{hint}")
        lines += self.inference_lines()
        if self.unused:
            near = {name: misspelled(name) for name in self.unused}
            names = [" ".join(name[:60].split()) + (f" ({near[name]}?)" if near[name] else "")
                     for name in sorted(near, key=lambda name: not near[name])]
            more = f" and {len(names) - 20} more" if len(names) > 20 else ""
            lines.append(f"columns not used: {', '.join(names[:20])}{more}")
        lines += [f"warning  {warning}" for warning in self.warnings]
        if self.warned > len(self.warnings):
            lines.append(f"warning  and {self.warned - len(self.warnings):,} more")
        return tuple(map(printable, lines))  # names of columns and files may hold anything

    def inference_lines(self):
        """How many trained turns follow the prompt that inference renders, and how the others differ."""
        n_same = self.compared - sum(count for count, _ in self.differing.values())
        if not self.compared:
            return []
        share = math.floor(1000 * n_same / self.compared) / 10  # 100 % only if it is all of them
        lines = [f"prompts  {n_same:,} of {self.compared:,} trained turns ({share:g} %) follow the prompt "
                 "that inference renders"]
        lines += [f"prompts  {count:,} not: {difference}, e.g. {example}"
                  for difference, (count, example) in self.differing.items()]
        return lines + ["prompts  what to do: docs/data.md, Reasoning"] * bool(self.differing)

    def check(self, spec, options):
        """Raise UserError if no row is trained, or if the model would not learn to end its turn.

        It would not if less than 99 % of the trained turns have their stop token as a target, or if all turns
        are truncated. Rows without messages do not count. Nothing is said of the first rows alone
        (options.limit).
        """
        assert self.rows == self.trained + sum(self.dropped.values()), self
        assert self.tokens == self.target + self.context + self.truncated + self.in_dropped_rows, self
        max_length = options.max_length
        split.check(spec, options, self.rows)
        if not self.rows:
            raise UserError(f"{spec}: no rows; pass a file with conversations")
        if options.limit is not None:
            return
        if not self.trained:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
            remedy = "mark at least one assistant message as trained"
            if "bad" in self.dropped:
                remedy = f"the first: {self.warnings[0]}"
            if any("too long" in reason or "truncation" in reason for reason in self.dropped):
                remedy = f"raise --max_length {max_length}"
            raise UserError(f"{spec}: no row is left to train on: {self.rows} in, all dropped ({reasons}); "
                            f"{remedy}")
        if self.chats_trained and not self.turns:
            raise UserError(f"{spec}: all assistant turns of the {self.chats_trained} conversations are "
                            "truncated, so no end of a turn is trained: the model would never stop; raise "
                            f"--max_length {max_length}")
        if self.turns_stopped < 0.99 * self.turns:
            raise UserError(f"{spec}: only {self.turns_stopped} of {self.turns} assistant turns train a "
                            "token that ends them: the model would never stop; use a chat template that ends "
                            "each turn with a special token (--chat_template, or --tokenizer DIR)")


def check_settings(cfg, train_set, val_set):
    """Raise UserError for a setting without effect on the rows of two Datasets; val_set may be None.

    Also for more epochs than the Sampler can cut into steps: with --batch_tokens it has to cut each one.
    """
    if cfg.batch_tokens and not cfg.max_steps and cfg.epochs > MOST_EPOCHS:
        raise UserError(f"--epochs {cfg.epochs} with --batch_tokens: at most {MOST_EPOCHS:,} epochs can be "
                        "cut into steps before the first one; give the number of steps with --max_steps")
    kinds = {*train_set.ledger.kinds, *(val_set.ledger.kinds if val_set else ())}
    no_chats = "chat" not in kinds
    for is_ignored, flag, reason in [
        (cfg.too_long and kinds == {"text"}, f"--too_long {cfg.too_long}",
         "plain texts are cut into pieces of --max_length tokens"),
        (cfg.train_on != "all" and no_chats, f"--train_on {cfg.train_on}", "no row has messages"),
        (cfg.train_on_prompt and no_chats, "--train_on_prompt", "no row has messages"),
        (cfg.split_turns and no_chats, "--split_turns", "no row has messages"),
        (not cfg.train_reasoning and not any(s.ledger.reasoning_tokens for s in (train_set, val_set) if s),
         "--train_reasoning false", "no trained answer has reasoning in the text"),
        (cfg.val_data and val_set.mix(), f"the weights in --val_data {cfg.val_data}",
         "validation reads every conversation"),
    ]:
        if is_ignored:
            raise UserError(f"{flag}: no effect, because {reason}; remove it")
