"""The progress bar, and the numbers of a step as text: those that fit, the most important ones first.

At 40 columns loss and time left, at 80 also learning rate, speed and memory; with more room the step, the
validation, the accuracy, the gradient norm and a bar. The width is read at each drawing: a terminal may be
resized.
"""

from tqdm import tqdm

# the parts of the line, the most important first
ORDER = ("loss", "left", "lr", "speed", "memory", "percent", "step", "val_loss", "accuracy", "mfu", "norm")
NARROWEST_BAR = 10  # columns; with less room there is none


def parts(values, val_loss=None):
    """{name: text} of a training line of metrics.jsonl, in the order in which it is shown.

    val_loss  of the last validation, or None
    """
    shown = {"loss": f"loss {values['loss']:.4f}"}
    if "accuracy" in values:
        shown["accuracy"] = f"accuracy {100 * values['accuracy']:.1f} %"
    if val_loss is not None:
        shown["val_loss"] = f"val_loss {val_loss:.4f}"
    shown["lr"] = f"lr {values['lr']:.2e}"
    shown["norm"] = f"norm {values['grad_norm']:.3g}"
    if "mfu" in values:
        shown["mfu"] = f"{100 * values['mfu']:.0f} % MFU"
    shown["speed"] = f"{values['tokens_per_second']:,.0f} tokens/s"
    shown["memory"] = f"{values['peak_memory_gb']:.2f} GiB"
    return shown


def fitted(shown, columns):
    """The texts of `shown` that fit into the columns, joined in its order; ORDER says which come first."""
    line, kept = "", set()
    for name in sorted(shown, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER)):
        longer = ", ".join(text for key, text in shown.items() if key in {*kept, name})
        if len(longer) <= columns:
            line, kept = longer, {*kept, name}
    return line


def duration(seconds):
    """Seconds as text: "04:05", "3:04:05", "2 days 3 h"."""
    hours = int(seconds) // 3600
    if hours < 24:
        return tqdm.format_interval(seconds)
    days, hours = divmod(hours, 24)
    return f"{days:,} day{'s' * (days > 1)} {hours} h"


class Bar(tqdm):
    """A tqdm whose line has `shown`, the texts of the last step, as far as they fit."""

    shown, columns = {}, 0

    def display(self, msg=None, pos=None):
        """Draw the line. tqdm pads it to the length of the one before: not in a terminal that has become
        narrower, where that would fill several lines.
        """
        columns = self.format_dict["ncols"] or 0
        if columns < self.columns:
            self.fp.write("\r\x1b[K")
            self.sp = self.status_printer(self.fp)
        self.columns = columns
        return super().display(msg, pos)

    def __str__(self):
        values = self.format_dict
        n, total, rate, columns = (values[key] for key in ("n", "total", "rate", "ncols"))
        if rate is None and values["elapsed"]:
            rate = (n - values["initial"]) / values["elapsed"]
        left = f"{duration((total - n) / rate)} left" if rate else "? left"
        shown = {"percent": f"{n / total:.0%}", "step": f"{n:,}/{total:,}", **self.shown, "left": left}
        line = fitted(shown, columns)
        room = columns - len(line) - 2
        if line.startswith(shown["percent"]) and room >= NARROWEST_BAR:
            done = ("#" if values["ascii"] else "█") * round(room * n / total)
            line = line.replace(", ", f" |{done:{room}}| ", 1)
        return line
