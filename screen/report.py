"""One page about a run, or several overlaid: sft.py writes it at every checkpoint, and tools/report.py.

The page is one file and needs no network: assets/report.html with the style and the scripts beside it put in,
and uPlot (assets/uplot), which draws the curves. What comes from data or settings is text, never markup:
Jinja escapes it, and the page's own policy lets nothing run but the script whose hash it names.
"""

import base64
import functools
import hashlib
import json
import math
import os
import shlex
import statistics
from array import array
from typing import NamedTuple

import jinja2
import yaml

from settings import venv
from settings.errors import UserError

AXES = ("step", "tokens", "seconds")
CURVES = ("loss", "grad_norm", "lr", "tokens_per_second", "peak_memory_gb")
MOST_POINTS, MOST_ANSWERS = 2000, 20  # of a curve; to a prompt, the newest


DECODER = json.JSONDecoder(parse_constant=lambda name: None)  # NaN and Infinity are gaps


class Assets(NamedTuple):
    style: str
    script: str
    page: jinja2.Template


@functools.cache
def assets():
    """What each page is made of. Called early in a run: a missing file stops it before its first step."""
    folder, texts = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets"), {}
    for name in ("uplot/uPlot.min.css", "report.css", "uplot/LICENSE", "uplot/uPlot.iife.min.js", "report.js",
                 "report.html"):
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            texts[name] = f.read()
    style = texts["uplot/uPlot.min.css"] + texts["report.css"]
    script = f"/* {texts['uplot/LICENSE']} */\n" + texts["uplot/uPlot.iife.min.js"] + texts["report.js"]
    jinja = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return Assets(style, script, jinja.from_string(texts["report.html"]))


def read_lines(path):
    """Yield the objects of a JSON Lines file, if it exists; skip incomplete lines, as the last may be one."""
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as f:
            for line in f:
                try:
                    yield DECODER.decode(line)
                except ValueError:
                    pass


def read_dict(path, read):
    """What `read` makes of a file; empty if it does not exist or is not whole yet."""
    try:
        with open(path, encoding="utf-8") as f:
            values = read(f)
    except (FileNotFoundError, ValueError, yaml.YAMLError):
        values = None
    return values if isinstance(values, dict) else {}


class Run:
    """What the files of an output directory say. All but metrics.jsonl may be missing."""

    def __init__(self, directory):
        metrics, config, ledger, samples = (os.path.join(directory, name) for name in (
            "metrics.jsonl", "config.yaml", "ledger.json", "samples.jsonl"))
        if not os.path.exists(metrics):
            raise UserError(f"{directory} is no run: it has no metrics.jsonl; give directories that were the "
                            f"--output_dir of sft.py, as in: {venv.command('tools/report.py')} ./outputs")
        self.directory, self.val, tokens, seconds = os.fspath(directory), [], 0, 0.0
        # Columns, NaN in the gaps: as dicts, the steps of a long run would take a kilobyte each.
        self.train = {name: array("d") for name in ("epoch", *AXES, *CURVES)}
        for line in read_lines(metrics):
            tokens, seconds = tokens + (line.get("tokens") or 0), seconds + (line.get("seconds") or 0)
            line.update(tokens=tokens, seconds=seconds)  # since the start: curves may be drawn over them
            if "loss" not in line:
                self.val.append(line)
                continue
            for name, values in self.train.items():
                values.append(math.nan if line.get(name) is None else line[name])
        self.config, ledger = read_dict(config, yaml.safe_load), read_dict(ledger, json.load)
        self.ranks = ledger.get("ranks", 1)
        self.ledger = [ledger["model"], *ledger["train"], *ledger["validation"]] if ledger else []
        self.name = str(self.config.get("run_name") or os.path.basename(os.path.abspath(directory)))
        texts, answers = list(read_lines(samples)), {}
        for text in (t for t in texts if t["kind"] == "sample"):
            answers.setdefault(text["prompt"], []).append(text)
        self.answers = {prompt: found[: -MOST_ANSWERS - 1 : -1] for prompt, found in answers.items()}
        last = max((t["step"] for t in texts if t["kind"] != "sample"), default=0)
        self.worst, self.best = ([t for t in texts if t["kind"] == kind and t["step"] == last]
                                 for kind in ("worst", "best"))

    def curves(self):
        """Columns for report.js. Of a long run's steps those stay that a look at the curves must not miss: of
        each group of neighbours the lowest and highest loss, the highest gradient norm and the last.
        Smoothing is over all steps: `weight` is how many a point stands for (itself and the skipped ones
        before it), `mean` is their mean loss."""
        loss, norm, kept = self.train["loss"], self.train["grad_norm"], set()
        n = len(loss)
        size = 1 if n <= MOST_POINTS else math.ceil(4 * n / MOST_POINTS)
        for start in range(0, n, size):
            group = range(start, min(start + size, n))
            kept.add(group[-1])
            for values, pick in (loss, min), (loss, max), (norm, max):
                known = (i for i in group if math.isfinite(values[i]))
                kept.add(pick(known, key=values.__getitem__, default=group[-1]))
        kept = sorted(kept)
        spans = [[x for x in loss[a + 1 : b + 1] if math.isfinite(x)] for a, b in zip([-1, *kept], kept)]
        train = {name: [shorter(self.train[name][i]) for i in kept] for name in (*AXES, *CURVES)}
        train["weight"] = [len(span) for span in spans]
        train["mean"] = [sum(span) / len(span) if span else None for span in spans]
        val = {name: [shorter(line.get(name)) for line in self.val] for name in (*AXES, "val_loss")}
        return {"name": self.name, "lines": n, "train": train, "val": val}

    def facts(self):
        """What one asks first: (label, value, note) each."""
        first, last = ({name: known(values[i]) for name, values in self.train.items() if values}
                       for i in (0, -1))
        evaluated = [line for line in self.val if line.get("val_loss") is not None]
        best = min(evaluated, key=lambda line: line["val_loss"], default={})
        speeds, memory = ([value for value in self.train[name] if math.isfinite(value)]
                          for name in ("tokens_per_second", "peak_memory_gb"))
        minutes = round(last.get("seconds", 0) / 60)
        duration = f"{minutes} min"
        if minutes < 2:
            duration = f"{last.get('seconds', 0):.3g} s"
        elif minutes >= 120:
            duration = f"{minutes // 60} h {minutes % 60} min"
        return [("Steps", show(last.get("step"), ","), f"{show(last.get('epoch'), '.3g')} epochs"),
                ("Last loss", show(last.get("loss"), ".4f"), f"{show(first.get('loss'), '.4f')} at first"),
                ("Best val_loss", show(best.get("val_loss"), ".4f"),
                 f"after step {show(best.get('step'), ',')}"),
                ("Tokens per second", show(statistics.median(speeds) if speeds else None, ",.0f"), "median"),
                ("Peak memory", show(max(memory, default=None), ".2f"), "GiB"),
                ("Time in steps", duration, f"for {show(last.get('tokens'), ',')} tokens")]


def known(value):
    """A float, None where it is not finite, an int where it is whole: counts are."""
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) else value


def shorter(value):
    """A number in seven digits, counts in all: more than a screen shows, and a third of the bytes."""
    value = None if value is None else known(value)
    return float(f"{value:.7g}") if isinstance(value, float) else value


def show(value, form):
    return "–" if value is None else format(value, form)


def setting(value):
    """As one types it."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def build(directories, path):
    """Write the page about these runs; return its path. A reader never sees half a page."""
    runs = [Run(directory) for directory in directories]
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = run.directory
    names = dict.fromkeys(name for run in runs for name in run.config)
    differ = [name for name in names if len({setting(run.config.get(name)) for run in runs}) > 1]
    style, script, page = assets()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = page.render(runs=runs, curves=[run.curves() for run in runs], differ=differ, style=style,
                       script=script, digest=digest, setting=setting, command=venv.command, path=venv.quoted,
                       shell=shlex.quote)
    # half a surrogate pair can be in the data
    with open(f"{path}.tmp", "w", encoding="utf-8", errors="replace") as f:
        f.write(text)
    os.replace(f"{path}.tmp", path)
    return path


def write(directory):
    """Write DIRECTORY/report.html; return its path."""
    return build([directory], os.path.join(directory, "report.html"))
