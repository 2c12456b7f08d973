"""A picture of the loss as PNG, without a plotting package: the hub's page of a model shows it.

Everything is drawn at twice the size and averaged, which smooths the edges.
"""

import math
import struct
import zlib

import numpy as np

WIDTH, HEIGHT, SCALE = 900, 360, 2  # pixels of the picture; it is drawn SCALE times as large
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 16, 34  # margins around the plot, in pixels of the picture
GREY, LIGHT, BLACK = (205, 210, 216), (232, 234, 237), (60, 64, 70)
BLUE, ORANGE = (37, 99, 235), (234, 88, 12)
# Five rows of three pixels for each character of a number: a row is an octal digit
GLYPHS = {"0": "75557", "1": "26227", "2": "71747", "3": "71717", "4": "55711", "5": "74717", "6": "74757",
          "7": "71111", "8": "75757", "9": "75717", ".": "00002", "-": "00700", "e": "25743"}


class Plot:
    """A plot with axes from the lowest to the highest x and y, as an array of pixels."""

    def __init__(self, xs, ys):
        self.pixels = np.full((HEIGHT * SCALE, WIDTH * SCALE, 3), 255, np.uint8)
        self.x_range, self.y_range = limits(xs), limits(ys)

    def place(self, xs, ys):
        """Pixels of the large picture, (n,) columns and (n,) rows."""
        (left, right), (low, high) = self.x_range, self.y_range
        columns = LEFT + (np.asarray(xs, float) - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        rows = HEIGHT - BOTTOM - (np.asarray(ys, float) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return columns * SCALE, rows * SCALE

    def dots(self, columns, rows, colour, size):
        """Squares of `size` pixels around these points."""
        columns, rows = (np.rint(values).astype(int) - size // 2 for values in (columns, rows))
        for i in range(size):
            for j in range(size):
                self.pixels[np.clip(rows + i, 0, HEIGHT * SCALE - 1),
                            np.clip(columns + j, 0, WIDTH * SCALE - 1)] = colour

    def line(self, xs, ys, colour, size):
        """Straight lines from each point to the next one."""
        columns, rows = self.place(xs, ys)
        longest = np.maximum(np.abs(np.diff(columns)), np.abs(np.diff(rows)))
        for i, length in enumerate(longest):
            n = int(length) + 2
            self.dots(np.linspace(columns[i], columns[i + 1], n), np.linspace(rows[i], rows[i + 1], n),
                      colour, size)

    def number(self, text, right, middle):
        """A number whose right edge and middle are at this pixel of the picture."""
        size = 2 * SCALE  # of a pixel of a glyph
        column, top = right * SCALE - 4 * size * len(text), middle * SCALE - 5 * size // 2
        for char in text:
            for row, bits in enumerate(GLYPHS[char]):
                for bit in range(3):
                    if int(bits) >> (2 - bit) & 1:
                        y, x = top + row * size, column + bit * size
                        self.pixels[max(y, 0) : y + size, max(x, 0) : x + size] = BLACK
            column += 4 * size

    def axes(self):
        """Lines at round numbers, with the numbers."""
        for y in ticks(*self.y_range):
            (left, right), rows = self.place(self.x_range, [y, y])
            self.dots(np.arange(left, right), np.full(int(math.ceil(right - left)), rows[0]), LIGHT, SCALE)
            self.number(f"{y:.4g}".replace("e+", "e"), LEFT - 6, int(rows[0]) // SCALE)
        for x in ticks(*self.x_range, is_whole=True):
            text = f"{x:.0f}"
            column = int(self.place([x], self.y_range[:1])[0][0]) // SCALE
            self.number(text, min(column + 4 * len(text), WIDTH), HEIGHT - BOTTOM // 2)

    def png(self):
        """The bytes of a PNG file."""
        parts = [self.pixels[i::SCALE, j::SCALE] for i in range(SCALE) for j in range(SCALE)]
        small = sum(part.astype(np.uint16) for part in parts) // len(parts)
        rows = small.astype(np.uint8).reshape(HEIGHT, -1)
        no_filter = np.zeros((HEIGHT, 1), np.uint8)  # a row begins with its filter
        lines = np.concatenate([no_filter, rows], 1)

        def chunk(kind, data):
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        header = struct.pack(">2I5B", WIDTH, HEIGHT, 8, 2, 0, 0, 0)  # 8 bits of red, green and blue
        return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                + chunk(b"IDAT", zlib.compress(lines.tobytes())) + chunk(b"IEND", b""))


def limits(values):
    """(lowest, highest) of some numbers, which are never equal."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def ticks(low, high, is_whole=False):
    """Round numbers from low to high, about five."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= max(factor for factor in (1, 2, 5) if factor * step <= (high - low) / 4)
    step = max(step, 1) if is_whole else step
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def smooth(losses, share=50):
    """Exponential moving average over about 1/share of the losses, corrected for the start."""
    decay = 1 - min(1, share / max(len(losses), 1))
    average, weight, result = 0.0, 0.0, []
    for loss in losses:
        average, weight = decay * average + (1 - decay) * loss, decay * weight + (1 - decay)
        result.append(average / weight)
    return result


def thinned(xs, ys):
    """The lowest and the highest of each of WIDTH groups of neighbours: as many as the picture can show."""
    if len(xs) <= 2 * WIDTH:
        return xs, ys
    kept = []
    for group in np.array_split(np.arange(len(xs)), WIDTH):
        kept += sorted({min(group, key=ys.__getitem__), max(group, key=ys.__getitem__)})
    return [xs[i] for i in kept], [ys[i] for i in kept]


def of_losses(train, val):
    """The PNG of a run's losses: each step grey, smoothed blue, validations orange.

    train, val  [(step, loss), ...], finite, in order; `train` is not empty
    """
    steps, losses = [step for step, _ in train], [loss for _, loss in train]
    plot = Plot([*steps, *(step for step, _ in val)], [*losses, *(loss for _, loss in val)])
    plot.axes()
    plot.line(*thinned(steps, losses), GREY, SCALE)
    plot.line(*thinned(steps, smooth(losses)), BLUE, 2 * SCALE)
    if val:
        val_steps, val_losses = zip(*val)
        plot.line(val_steps, val_losses, ORANGE, SCALE)
        plot.dots(*plot.place(val_steps, val_losses), ORANGE, 4 * SCALE)
    return plot.png()
