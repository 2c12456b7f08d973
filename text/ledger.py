"""The ledger of a dataset: where every row and token went."""

from dataclasses import dataclass, field

from settings.errors import UserError


@dataclass
class Ledger:
    """Counts of rows, tokens and assistant turns. Two sums have to be right, see check."""

    rows: int = 0  # trained + dropped
    trained: int = 0
    dropped: dict = field(default_factory=dict)  # reason -> rows
    tokens: int = 0  # target + context + truncated + in_dropped_rows
    target: int = 0
    context: int = 0
    truncated: int = 0
    in_dropped_rows: int = 0
    rows_truncated: int = 0
    turns: int = 0  # assistant turns that are trained and not truncated
    turns_stopped: int = 0  # those among them whose stop token is a target

    def drop(self, reason, tokens):
        """A row of so many tokens is not trained."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.in_dropped_rows += tokens

    def keep(self, n_targets, kept, length):
        """A row is trained: `kept` of its `length` tokens, among them n_targets targets."""
        self.trained += 1
        self.target += n_targets
        self.context += kept - n_targets
        self.truncated += length - kept
        self.rows_truncated += int(length > kept)

    def lines(self):
        """Two lines for the screen."""
        n_dropped = sum(self.dropped.values())
        dropped = "".join(f", {count} {reason}" for reason, count in self.dropped.items())
        cut = f" (of {self.rows_truncated} rows)" if self.rows_truncated else ""
        extra = f" + {self.in_dropped_rows:,} in dropped rows" if self.in_dropped_rows else ""
        return (f"rows     {self.rows:,} in = {self.trained:,} trained + {n_dropped:,} dropped{dropped}",
                f"tokens   {self.tokens:,} in = {self.target:,} target + {self.context:,} context + "
                f"{self.truncated:,} truncated{cut}{extra}")

    def check(self, spec, max_length):
        """Raise UserError if nothing is left to train on, or if the model would not learn to stop."""
        assert self.rows == self.trained + sum(self.dropped.values()), self
        assert self.tokens == self.target + self.context + self.truncated + self.in_dropped_rows, self
        if not self.trained:
            raise UserError(f"{spec}: no row is left to train on: {self.rows} in, dropped {self.dropped}; "
                            f"--max_length {max_length} may be too small for any answer")
        if self.turns_stopped < 0.99 * self.turns:
            raise UserError(f"{spec}: only {self.turns_stopped} of {self.turns} assistant turns train a "
                            "token that ends them: the model would never stop; use a chat template "
                            "(--tokenizer) that ends each turn with a special token")
