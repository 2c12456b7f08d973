"""Rows that cannot be used: all of a file are named in one error, or dropped and counted (--bad_rows)."""

from settings.errors import UserError

SHOWN = 20  # bad rows that an error names
HOPELESS = 1000  # so many bad rows without a good one, and no more are read


class BadRows:
    """Collects the errors of rows.

    drop  function(file, number, row, where, error): what attempt() returns for a bad row. None: bad rows are
          errors
    """

    def __init__(self, drop=None):
        self.drop, self.errors, self.n_bad, self.n_good, self.file = drop, [], 0, 0, None

    def attempt(self, render, file, number, row, where, *arguments):
        """The list that render() makes of a row; [] for a bad row. Raises UserError as check() does."""
        if file != self.file or (self.n_bad >= HOPELESS and not self.n_good):
            self.check()
        self.file = file
        try:
            conversations = render(file, number, row, where, *arguments)
        except UserError as error:
            if self.drop:
                return self.drop(file, number, row, where, error)
            self.n_bad += 1
            self.errors = [*self.errors, str(error)][:SHOWN]
            return []
        self.n_good += 1
        return conversations

    def check(self):
        """Raise a UserError that names the bad rows so far, if there are any."""
        if not self.errors:
            return
        if self.n_bad == 1:
            raise UserError(self.errors[0] + "; --bad_rows drop leaves it out" * (self.n_good > 0))
        way = ", or drop them with --bad_rows drop" * (self.n_good > 0)
        more = f"\n  and {self.n_bad - SHOWN:,} more" if self.n_bad > SHOWN else ""
        lines = "\n  ".join(self.errors)
        what = f"{self.n_bad:,} rows can't be used"
        if self.n_bad >= HOPELESS and not self.n_good:  # the others were not read
            what = f"none of the first {self.n_bad:,} rows can be used"
        raise UserError(f"{what}; correct them{way}:\n  {lines}{more}")
