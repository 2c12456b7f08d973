"""screen/bar.py: what the line of the progress bar has, in terminals of several widths, as they are drawn."""

import contextlib
import fcntl
import os
import re
import struct
import termios

import pytest

from screen import bar, report

STEP = dict(loss=1.23456, lr=1.234e-5, grad_norm=1.23, tokens_per_second=12345.6, peak_memory_gb=61.27, accuracy=0.7123,
            mfu=0.41)
LARGE = dict(STEP, loss=12.3456, tokens_per_second=1234567.8, peak_memory_gb=123.456)
LEFT, LONG_LEFT = r"(\d+:)?\d\d:\d\d left", r"\d+ days? \d+ h left"


class Terminal:
    """A pseudo-terminal, and the screen that its output makes: lines that are too long wrap."""

    def __init__(self, columns):
        self.master, self.slave = os.openpty()
        self.file, self.rows, self.cursor = os.fdopen(self.slave, "w"), [""], 0
        self.resize(columns)

    def resize(self, columns):
        self.columns = columns
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def read(self):
        """Draw what was written; return the rows of the screen, without blanks at their ends."""
        print(end="\0", file=self.file, flush=True)  # what was written arrives some time later, and this last
        written = b""
        while not written.endswith(b"\0"):
            written += os.read(self.master, 2**16)
        text = written[:-1].decode()
        for part in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|.", text, re.S):
            if part == "\x1b[K":
                self.rows[-1] = self.rows[-1][: self.cursor]
            elif part == "\r":
                self.cursor = 0
            elif part == "\n":
                self.rows.append("")
            else:
                assert len(part) == 1, f"an unknown sequence {part!r}"
                if self.cursor >= self.columns:
                    self.rows.append("")
                    self.cursor = 0
                row = self.rows[-1]
                self.rows[-1] = row[: self.cursor].ljust(self.cursor) + part + row[self.cursor + 1 :]
                self.cursor += 1
        return [row.rstrip() for row in self.rows]


@contextlib.contextmanager
def bar_in(columns, total=12_000):
    """A Bar in a Terminal that draws at each refresh(); it has run for 100 seconds."""
    terminal = Terminal(columns)
    line = bar.Bar(total=total, dynamic_ncols=True, file=terminal.file, mininterval=0, miniters=1)
    terminal.read()
    line.start_t -= 100
    try:
        yield line, terminal
    finally:
        line.close()
        terminal.file.close()
        os.close(terminal.master)


def draw(columns, values, days=0.0, val_loss=None):
    """The line that a bar draws after step 10,000 of 12,000."""
    with bar_in(columns) as (line, terminal):
        line.start_t -= 86400 * days
        line.shown, line.n = bar.parts(values, val_loss), 10_000
        line.refresh()
        rows = terminal.read()
    assert len(rows) == 1 and len(rows[0]) <= columns, rows
    return rows[0]


@pytest.mark.parametrize("values, days", [(STEP, 0), (LARGE, 0), (STEP, 12), (LARGE, 25), (LARGE, 100)])
def test_what_a_line_keeps(values, days):
    """At 80 columns loss, lr, speed, memory and time left; at 40 loss and time left; large numbers too."""
    left = LONG_LEFT if days else LEFT
    wanted = {40: [r"loss \d+\.\d{4}", left],
              80: [r"loss \d+\.\d{4}", r"lr 1\.23e-05", r"[\d,]+ tokens/s", r"\d+\.\d\d GiB", left],
              132: [r"83%", r"10,000/12,000", r"val_loss 2\.5000"], 220: ["accuracy 71.2 %", "norm 1.23", "41 % MFU"]}
    for columns in (40, 60, 80, 100, 132, 220):
        line = draw(columns, values, days, val_loss=2.5)
        for narrower, patterns in wanted.items():
            for pattern in patterns:
                assert narrower > columns or re.search(rf"(^|, |\| ){pattern}(, |$| )", line), (columns, pattern, line)
    assert re.match("83% \\|█+ +\\| 10,000/12,000, ", line)


def test_a_terminal_that_is_resized():
    """The next drawing has what fits then, on one row. A narrower one keeps no rest of the longer line."""
    with bar_in(120) as (line, terminal):
        line.shown, line.n = bar.parts(STEP), 10_000
        for columns in (120, 30, 80, 25, 200):
            terminal.resize(columns)
            terminal.rows[-1] = terminal.rows[-1][:columns]  # a terminal cuts or wraps it; this one cuts
            terminal.cursor = min(terminal.cursor, columns)
            line.refresh()
            rows = terminal.read()
            assert len(rows) == 1 and re.fullmatch("(83%|loss ).*" + LEFT, rows[0]) and len(rows[0]) <= columns, rows
            assert ("lr 1.23e-05" in rows[0]) == (columns >= 80), rows


def test_before_the_first_step_and_after_the_last():
    with bar_in(80, total=3) as (line, terminal):
        line.refresh()
        assert re.search(r"0%.*0/3, \? left$", terminal.read()[0])
        for _ in range(3):
            line.shown = bar.parts(STEP)
            line.update()
        assert terminal.read()[-1].endswith("00:00 left") and "100%" in terminal.read()[-1]


@pytest.mark.parametrize("seconds, text", [
    (0, "00:00"), (245, "04:05"), (11_045, "3:04:05"), (86_399, "23:59:59"), (86_400, "1 day 0 h"),
    (2 * 86_400 + 11_045, "2 days 3 h"), (1e8, "1,157 days 9 h")])
def test_durations(seconds, text):
    assert bar.duration(seconds) == text


def test_durations_of_a_report():
    assert [report.duration(n) for n in (0, 41.26, 600, 12_000)] == ["0 s", "41.3 s", "10 min", "3 h 20 min"]
