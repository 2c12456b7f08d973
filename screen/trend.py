"""Does the loss fall? A line, with likely causes, if it rose, did not move, or fell in training only."""

import statistics

from screen import report

ENOUGH = 20  # steps; fewer show no trend, unless the loss has risen to MANY times the first
MANY = 3
SMALL = 0.005  # a change of less than this fraction of the loss is none


class Trend:
    """The losses of a run, step by step.

    losses      of the training steps, in order
    epochs      epochs completed after each of them
    val_losses  [(step, val_loss), ...] after training steps
    val_tokens  the targets of the last validation; with another number, --val_data is other data
    """

    def __init__(self, path=None):
        """Read what a metrics.jsonl already has, if there is one."""
        self.losses, self.epochs, self.val_losses, self.val_tokens = [], [], [], None
        for line in report.read_lines(path) if path else ():  # a damaged line has no numbers
            self.add(**line)

    def add(self, step, loss=None, epoch=None, val_loss=None, val_tokens=None, **_):
        """Add a line of metrics.jsonl."""
        if val_loss is not None and step:
            if val_tokens != self.val_tokens:
                self.val_losses, self.val_tokens = [], val_tokens
            self.val_losses.append((step, val_loss))
        elif loss is not None and epoch is not None:
            self.losses.append(loss)
            self.epochs.append(epoch)

    def noise(self):
        """The standard deviation of a step's loss around the trend, at the end of the run.

        It comes from the median difference of neighbours, which neither outliers nor the trend change much.
        """
        end = self.losses[-(len(self.losses) // 4) :]
        return statistics.median(abs(b - a) for a, b in zip(end, end[1:])) / 0.954  # of normal noise: sigma

    def means(self):
        """(mean at the beginning, mean at the end, standard error of their difference).

        From two epochs on, these are the first and the last whole epoch of metrics.jsonl: they hold the same
        conversations, so the error is 0. Otherwise they are the first and the last quarter.
        """
        whole, start = round(self.epochs[-1], 6) // 1, (self.epochs[0] - 1e-6) // 1
        if self.epochs[0] - start > self.epochs[1] - self.epochs[0] + 1e-6:
            start += 1  # the run was resumed from another directory, within an epoch
        if whole - start >= 2:
            first = [loss for loss, epoch in zip(self.losses, self.epochs)
                     if start + 1e-6 < epoch < start + 1 + 1e-6]
            last = [loss for loss, epoch in zip(self.losses, self.epochs)
                    if whole - 1 + 1e-6 < epoch < whole + 1e-6]
            return statistics.fmean(first), statistics.fmean(last), 0.0
        quarter = len(self.losses) // 4
        return (statistics.fmean(self.losses[:quarter]), statistics.fmean(self.losses[-quarter:]),
                self.noise() * (2 / quarter) ** 0.5)

    @staticmethod
    def rise(first, last):
        return (f"the loss rose from {first:.4g} to {last:.4g}. Most likely --lr is too high: try a tenth of "
                "it. Otherwise answers contradict each other, or --chat_template is not the model's: look at "
                "the rows with tools/show.py")

    def diagnosis(self):
        """A line about losses that do not fall as they should; None if they do, or if there are too few."""
        if len(self.losses) < ENOUGH:
            later = self.losses[len(self.losses) // 2 :]
            if len(self.losses) > 1 and min(later) > MANY * self.losses[0]:
                return self.rise(self.losses[0], statistics.fmean(later))
            return None
        start, (first, last, error) = self.losses[0], self.means()
        if last - start > max(3 * self.noise(), SMALL * start):  # it may have fallen again since
            first, error = start, 0.0
        change = f"from {first:.4g} to {last:.4g}"
        if last - first > max(3 * error, SMALL * first):
            return self.rise(first, last)
        if first - last <= max(error, SMALL * first):
            return (f"the loss did not fall, {change}. Most likely --lr is too low: try ten times it (LoRA "
                    "needs more than full training), or more steps. Otherwise prompts do not determine their "
                    "answers, or the model knew them before: look at the rows with tools/show.py")
        if self.val_losses:
            best_step, best = min(self.val_losses, key=lambda pair: pair[1])
            step, now = self.val_losses[-1]
            if now - best > SMALL * best:
                return (f"val_loss rose from {best:.4g} at step {best_step} to {now:.4g} at step {step} "
                        f"while the loss fell {change}. The model learns its training data by heart: lower "
                        "--epochs, use more data, or keep the best step with --keep_best --early_stopping 2")
        return None
