"""The ledger of a dataset: an account of every row and token, trained or not."""

from dataclasses import dataclass, field

from settings.errors import UserError


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
    unused: dict = field(default_factory=dict)  # column -> rows that have it, see formats.Row

    def read(self, length, unused=()):
        """Count a row of `length` tokens, and the columns of it that are not used."""
        self.rows += 1
        self.tokens += length
        for name in unused:
            self.unused[name] = self.unused.get(name, 0) + 1

    def drop(self, reason, length):
        """Count a row of `length` tokens that is not trained."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.in_dropped_rows += length

    def keep(self, n_targets, kept, length):
        """Count a row that is trained: `kept` of its `length` tokens, n_targets of them targets."""
        self.trained += 1
        self.target += n_targets
        self.context += kept - n_targets
        self.truncated += length - kept
        self.rows_truncated += int(length > kept)

    def lines(self):
        """The lines on the screen: rows, tokens, and the columns that are not used if there are any."""
        n_dropped = sum(self.dropped.values())
        dropped = "".join(f", {count} {reason}" for reason, count in self.dropped.items())
        cut = f" (of {self.rows_truncated} rows)" if self.rows_truncated else ""
        extra = f" + {self.in_dropped_rows:,} in dropped rows" if self.in_dropped_rows else ""
        names = [f"{name:.60}" for name in self.unused]
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        columns = (f"columns not used: {', '.join(names[:20])}{more}",) if names else ()
        return (f"rows     {self.rows:,} in = {self.trained:,} trained + {n_dropped:,} dropped{dropped}",
                f"tokens   {self.tokens:,} in = {self.target:,} target + {self.context:,} context + "
                f"{self.truncated:,} truncated{cut}{extra}", *columns)

    def check(self, spec, max_length):
        """Raise UserError if no row is trained, or if the model would not learn to end its turn.

        It would not if less than 99 % of the trained turns have their stop token as a target.
        """
        assert self.rows == self.trained + sum(self.dropped.values()), self
        assert self.tokens == self.target + self.context + self.truncated + self.in_dropped_rows, self
        if not self.rows:
            raise UserError(f"{spec}: no rows; pass a file with conversations")
        if not self.trained:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
            remedy = "mark at least one assistant message as trained"
            if any("too long" in reason or "truncation" in reason for reason in self.dropped):
                remedy = f"raise --max_length {max_length}"
            raise UserError(f"{spec}: no row is left to train on: {self.rows} in, all dropped ({reasons}); "
                            f"{remedy}")
        if self.turns_stopped < 0.99 * self.turns:
            raise UserError(f"{spec}: only {self.turns_stopped} of {self.turns} assistant turns train a "
                            "token that ends them: the model would never stop; use a tokenizer directory "
                            "(--tokenizer) whose chat template ends each turn with a special token")
