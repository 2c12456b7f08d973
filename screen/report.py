"""The HTML page about a run, or about several runs overlaid.

sft.py writes it at every checkpoint, tools/report.py on request. The page is one file that needs no network:
assets/report.html with its style and scripts inlined, and uPlot (assets/uplot), which draws the curves. Text
from data and settings is untrusted: Jinja escapes it, and the page's Content-Security-Policy runs only the
script whose hash it names.
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

from disk import files
from settings import venv
from settings.errors import UserError

AXES = ("step", "tokens", "seconds")
CURVES = ("loss", "grad_norm", "lr", "tokens_per_second", "peak_memory_gb")
MOST_POINTS, MOST_ANSWERS = 2000, 20  # points per curve; answers per prompt, the newest

LARGEST_CONFIG = 2**18  # bytes of config.yaml, as in settings/parser.py
MARK = "img-src data:; style-src 'unsafe-inline'; script-src 'sha256-"  # in the head of every report
# the keys of a line of samples.jsonl that the page shows, with their types
SAMPLE = {"step": int, "prompt": str, "answer": str}
EXTREME = {"step": int, "loss": (int, float), "source": str, "target_tokens": int, "text": str}
KINDS = {"sample": SAMPLE, "best": EXTREME, "worst": EXTREME}

DECODER = json.JSONDecoder(parse_constant=lambda name: None)  # NaN and Infinity become gaps


class Assets(NamedTuple):
    style: str
    script: str
    page: jinja2.Template


@functools.cache
def assets():
    """Read the files that a page needs. A run calls it early: a missing file stops it before step 1."""
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
    """Yield the objects of a JSON Lines file, if it exists. Skips invalid lines: the last may be cut off.

    Values of metrics that are no numbers become None: a damaged file must not end a run.
    """
    if os.path.isfile(path):  # to open a pipe would block
        with open(path, encoding="utf-8", errors="replace") as f:
            for line in f:
                try:
                    values = DECODER.decode(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(values, dict):
                    for name in {*AXES, *CURVES, "epoch", "val_loss"} & values.keys():
                        if type(values[name]) not in (int, float) or abs(values[name]) > 1e300:
                            values[name] = None
                    yield values


def is_sample(line):
    """Whether a line of samples.jsonl is of a known kind and has what the page shows."""
    keys = KINDS.get(str(line.get("kind")))
    return keys is not None and all(isinstance(line.get(key), kinds) for key, kinds in keys.items())


def read_yaml(f):
    """The plain values of a config.yaml, without lists and mappings: with aliases they can have billions."""
    root, loader = yaml.compose(f.read(LARGEST_CONFIG), Loader=yaml.SafeLoader), yaml.SafeLoader("")
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    return {str(name.value): loader.construct_object(value) for name, value in pairs
            if isinstance(value, yaml.ScalarNode)}


def read_dict(path, read):
    """Return the dict that `read` parses from a file; empty if the file is missing or incomplete."""
    values = None
    try:
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as f:
                values = read(f)
    except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError):
        values = None
    return values if isinstance(values, dict) else {}


class Run:
    """The contents of an output directory. Raises UserError without metrics.jsonl, the only required file."""

    def __init__(self, directory):
        metrics = os.path.join(directory, "metrics.jsonl")
        if not os.path.isfile(metrics):
            raise UserError(f"{directory} is not a run: it has no metrics.jsonl; pass the --output_dir of an "
                            f"sft.py run: {venv.command('tools/report.py')} ./outputs")
        self.directory = os.fspath(directory)
        self.val = []  # the lines of validations
        # Columns with NaN for gaps: a dict per step would take a kilobyte each.
        self.train = {name: array("d") for name in ("epoch", *AXES, *CURVES)}
        tokens, seconds = 0, 0.0
        for line in read_lines(metrics):
            tokens += line.get("tokens") or 0
            seconds += line.get("seconds") or 0
            line.update(tokens=tokens, seconds=seconds)  # totals since the start, for the x-axis
            if "loss" not in line and line.get("step") is not None:
                self.val.append(line)
            if "loss" not in line:
                continue
            for name, values in self.train.items():
                values.append(math.nan if line.get(name) is None else line[name])
        self.config = read_dict(os.path.join(directory, "config.yaml"), read_yaml)
        ledger = read_dict(os.path.join(directory, "ledger.json"), json.load)
        ranks, lines = ledger.get("ranks"), [ledger.get(key) for key in ("model", "train", "validation")]
        self.ranks = ranks if isinstance(ranks, int) else 1
        self.ledger = [line for part in lines for line in (part if isinstance(part, list) else [part])
                       if isinstance(line, str)]
        self.name = str(self.config.get("run_name") or os.path.basename(os.path.abspath(directory)))
        texts = list(filter(is_sample, read_lines(os.path.join(directory, "samples.jsonl"))))
        by_prompt = {}
        for text in texts:
            if text["kind"] == "sample":
                by_prompt.setdefault(text["prompt"], []).append(text)
        # the newest answers, newest first
        self.answers = {prompt: answers[: -MOST_ANSWERS - 1 : -1] for prompt, answers in by_prompt.items()}
        last_step = max((text["step"] for text in texts if text["kind"] != "sample"), default=0)
        last_texts = [text for text in texts if text["step"] == last_step]
        self.worst = [text for text in last_texts if text["kind"] == "worst"]
        self.best = [text for text in last_texts if text["kind"] == "best"]

    def curves(self):
        """Return the columns that report.js draws.

        A long run is thinned to at most MOST_POINTS: each group of neighbouring steps keeps the steps of its
        lowest loss, highest loss and highest gradient norm, and its last step. Smoothing still covers all
        steps: `weight` counts the steps that a point represents (itself and the dropped ones before it), and
        `mean` is their mean loss.
        """
        loss, norm, kept = self.train["loss"], self.train["grad_norm"], set()
        n = len(loss)
        size = 1 if n <= MOST_POINTS else math.ceil(4 * n / MOST_POINTS)
        for start in range(0, n, size):
            group = range(start, min(start + size, n))
            kept.add(group[-1])
            for values, pick in (loss, min), (loss, max), (norm, max):
                finite = (i for i in group if math.isfinite(values[i]))
                kept.add(pick(finite, key=values.__getitem__, default=group[-1]))
        kept = sorted(kept)
        spans = []
        for previous, point in zip([-1, *kept], kept):
            spans.append([x for x in loss[previous + 1 : point + 1] if math.isfinite(x)])
        train = {name: [rounded(self.train[name][i]) for i in kept] for name in (*AXES, *CURVES)}
        train["weight"] = [len(span) for span in spans]
        train["mean"] = [sum(span) / len(span) if span else None for span in spans]
        val = {name: [rounded(line.get(name)) for line in self.val] for name in (*AXES, "val_loss")}
        return {"name": self.name, "lines": n, "train": train, "val": val}

    def summary(self):
        """Return the figures at the top of the page: [(label, value, note), ...]."""
        def values_at(i):
            return {name: as_number(values[i]) for name, values in self.train.items() if values}

        def finite(name):
            return [value for value in self.train[name] if math.isfinite(value)]

        first, last = values_at(0), values_at(-1)
        evaluated = [line for line in self.val if line.get("val_loss") is not None]
        best = min(evaluated, key=lambda line: line["val_loss"], default={})
        speeds, memory = finite("tokens_per_second"), finite("peak_memory_gb")
        best_note = f"after step {show(best['step'], ',')}" if best else "no validation"
        minutes = round(last.get("seconds", 0) / 60)
        duration = f"{minutes} min"
        if minutes < 2:
            duration = f"{last.get('seconds', 0):.3g} s"
        elif minutes >= 120:
            duration = f"{minutes // 60} h {minutes % 60} min"
        return [("Steps", show(last.get("step"), ","), f"{show(last.get('epoch'), '.3g')} epochs"),
                ("Last loss", show(last.get("loss"), ".4f"), f"{show(first.get('loss'), '.4f')} at step 1"),
                ("Best val_loss", show(best.get("val_loss"), ".4f"), best_note),
                ("Tokens per second", show(statistics.median(speeds) if speeds else None, ",.0f"), "median"),
                ("Peak memory", show(max(memory, default=None), ".2f"), "GiB"),
                ("Training time", duration, f"for {show(last.get('tokens'), ',')} tokens")]


def as_number(value):
    """Convert a float from a column: None if not finite, an int if integral (a count)."""
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) else value


def rounded(value):
    """Round to seven digits: more than a screen shows, in a third of the bytes. Counts stay exact."""
    value = None if value is None else as_number(value)
    return float(f"{value:.7g}") if isinstance(value, float) else value


def show(value, spec):
    """Format a value; None is shown as a dash."""
    return "–" if value is None else format(value, spec)


def setting_text(value):
    """Write a setting's value as on the command line."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def build(directories, path):
    """Write the page about these runs, atomically; return its path.

    Raises UserError if there is a file with this path that is not such a page.
    """
    check_replaceable(path)
    runs = [Run(directory) for directory in directories]
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = run.directory
    names = dict.fromkeys(name for run in runs for name in run.config)
    differ = [name for name in names if len({setting_text(run.config.get(name)) for run in runs}) > 1]
    style, script, page = assets()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = page.render(runs=runs, curves=[run.curves() for run in runs], differ=differ, style=style,
                       script=script, digest=digest, setting_text=setting_text, command=venv.command,
                       path=venv.quoted, shell=shlex.quote)
    # errors="replace": the data may contain an unpaired surrogate
    with files.replaced(path, encoding="utf-8", errors="replace") as f:
        f.write(text)
    return path


def check_replaceable(path):
    """Raise UserError if a path exists and is not a report: --output may name somebody's data by mistake."""
    if not os.path.lexists(path):
        return
    is_report = False
    if os.path.isfile(path):
        with open(path, "rb") as f:
            is_report = MARK.encode() in f.read(1000)
    if not is_report:
        raise UserError(f"{path} exists and is not a report of this program; choose another --output, or "
                        "remove it")


def write(directory):
    """Write DIRECTORY/report.html; return its path."""
    return build([directory], os.path.join(directory, "report.html"))
