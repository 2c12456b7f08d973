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
CURVES = ("loss", "grad_norm", "lr", "tokens_per_second", "peak_memory_gb", "accuracy", "mfu")
OPTIONAL = ("sources", "val_sets", "forgetting", "accuracy", "mfu")  # charts for which a run may lack numbers
OF_SET = ("loss", "accuracy", "tokens", "forgetting")  # of a validation set in a line of metrics.jsonl
MOST_NAMES = 30  # validation sets and sources; the trainer writes at most 21 sources
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
                    clear(values, (*AXES, *CURVES, "epoch", "val_loss", "val_accuracy", "forgetting"))
                    yield values


def clear(values, names):
    """Replace what is no number, among values that have to be numbers, by None."""
    for name in {*names} & values.keys():
        if type(values[name]) not in (int, float) or abs(values[name]) > 1e300:
            values[name] = None


def groups(value, names):
    """{name: {key: number}} of a `sources` or `val_sets` in a line; without what is not of this form."""
    if not isinstance(value, dict):
        return {}
    found = {name: group for name, group in list(value.items())[:MOST_NAMES] if isinstance(group, dict)}
    for group in found.values():
        clear(group, names)
    return found


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


def read_ledger(directory):
    """The content of a run's ledger.json; empty if it has none."""
    return read_dict(os.path.join(directory, "ledger.json"), json.load)


def resumes_in(ledger):
    """The steps after which a run was resumed, from its ledger.json."""
    steps = ledger.get("resumes")
    return [step for step in (steps if isinstance(steps, list) else ()) if type(step) is int]


class Run:
    """The contents of an output directory. Raises UserError without metrics.jsonl, the only required file."""

    def __init__(self, directory):
        metrics = os.path.join(directory, "metrics.jsonl")
        if not os.path.isfile(metrics):
            raise UserError(f"{directory} is not a run: it has no metrics.jsonl; pass the --output_dir of an "
                            f"sft.py run: {venv.command('tools/report.py')} ./outputs")
        self.directory = os.fspath(directory)
        self.val = []  # the lines of validations
        self.sources = {}  # {name: [(index of a training line, loss), ...]}
        # Columns with NaN for gaps: a dict per step would take a kilobyte each.
        self.train = {name: array("d") for name in ("epoch", *AXES, *CURVES)}
        tokens, seconds = 0, 0.0
        for line in read_lines(metrics):
            tokens += line.get("tokens") or 0
            seconds += line.get("seconds") or 0
            line.update(tokens=tokens, seconds=seconds)  # totals since the start, for the x-axis
            if "loss" not in line and line.get("step") is not None:
                self.val.append({"val_loss": None, **line, "val_sets": groups(line.get("val_sets"), OF_SET)})
            if "loss" not in line:
                continue
            for name, values in self.train.items():
                values.append(math.nan if line.get(name) is None else line[name])
            for name, group in groups(line.get("sources"), ("loss", "target_weight")).items():
                is_known = name in self.sources or len(self.sources) < MOST_NAMES
                if is_known and group.get("loss") is not None:
                    self.sources.setdefault(name, []).append((len(self.train["loss"]) - 1, group["loss"]))
        names = dict.fromkeys(name for line in self.val for name in line["val_sets"])
        self.val_sets = list(names)[:MOST_NAMES]
        self.config = read_dict(os.path.join(directory, "config.yaml"), read_yaml)
        ledger = read_ledger(directory)
        self.resumes = resumes_in(ledger)
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
        val = {name: [rounded(line.get(name)) for line in self.val]
               for name in (*AXES, "val_loss", "val_accuracy", "forgetting")}
        val["sets"] = {name: {key: [rounded(line["val_sets"].get(name, {}).get(key)) for line in self.val]
                              for key in ("loss", "accuracy", "forgetting")} for name in self.val_sets}
        sources = {name: self.source_curve(losses, kept) for name, losses in self.sources.items()}
        return {"name": self.name, "lines": n, "train": train, "val": val, "sources": sources,
                "resumes": self.resume_marks()}

    @staticmethod
    def source_curve(losses, kept):
        """{"weight", "mean"} of a source's losses [(index, loss)] at the kept steps, as in curves()."""
        spans, losses = [], iter([*losses, (math.inf, 0)])
        index, loss = next(losses)
        for point in kept:
            spans.append([])
            while index <= point:
                spans[-1].append(loss)
                index, loss = next(losses)
        return {"weight": [len(span) for span in spans],
                "mean": [rounded(statistics.fmean(span)) if span else None for span in spans]}

    def resume_marks(self):
        """Where the run was resumed, on each axis: {axis: [position, ...]}."""
        marks = {name: [] for name in AXES}
        steps = self.train["step"]
        for resumed in self.resumes:
            i = max((i for i, step in enumerate(steps) if step <= resumed), default=None)
            if i is not None and i + 1 < len(steps):  # it has trained since
                for name in AXES:
                    marks[name].append(rounded(self.train[name][i]))
        return marks

    def values_at(self, i):
        """{name: number} of a training step; empty if there is none."""
        return {name: as_number(values[i]) for name, values in self.train.items() if values}

    def median(self, name):
        """The median of a column, None if it is empty."""
        finite = [value for value in self.train[name] if math.isfinite(value)]
        return statistics.median(finite) if finite else None

    def peak_memory(self):
        """GiB, None if unknown."""
        return max((value for value in self.train["peak_memory_gb"] if math.isfinite(value)), default=None)

    def last_sets(self):
        """The names of the validation sets of the last validation; [None] if they had none.

        A resume may have changed --val_data, so `val_sets` may have more.
        """
        return (list(self.val[-1]["val_sets"]) if self.val else []) or [None]

    def judged_set(self):
        """The name of the validation set whose loss decides which step is best; None: all sets together."""
        wanted, names = self.config.get("keep_best"), self.last_sets()
        return wanted if wanted in names else names[0]

    def val_losses(self, name=None):
        """[(step, loss)] of the validations of a set, of all sets together (None), with that of step 0."""
        losses = [(line["step"], line["val_loss"]) for line in self.val]
        if name is not None:
            losses = [(line["step"], line["val_sets"].get(name, {}).get("loss")) for line in self.val]
        return [(step, loss) for step, loss in losses if loss is not None]

    def lowest(self, name=None):
        """(step, loss): the lowest of a validation set after a training step; (None, None) without one.

        Losses of all sets together are compared with those of the same number of targets: before a resume,
        --val_data may have been other data.
        """
        n = self.val[-1].get("val_tokens") if self.val and name is None else None
        steps = {line["step"] for line in self.val if n is None or line.get("val_tokens") == n}
        after = [(step, loss) for step, loss in self.val_losses(name) if step and step in steps]
        return min(after, key=lambda pair: pair[1], default=(None, None))

    def forgetting(self, name=None):
        """The last loss of a validation set minus the one before training; None if one is not known."""
        for line in reversed(self.val):
            part, key = (line, "val_loss") if name is None else (line["val_sets"].get(name, {}), "loss")
            if line["step"] and part.get(key) is not None:
                return part.get("forgetting")
        return None

    def has(self, chart):
        """Whether there are numbers for one of the OPTIONAL charts."""
        if chart in ("val_sets", "sources"):
            return bool(self.val_sets) if chart == "val_sets" else len(self.sources) > 1
        if chart == "forgetting":
            return any(part.get(chart) is not None for line in self.val
                       for part in (line, *line["val_sets"].values()))
        of_val = chart == "accuracy" and any(line.get("val_accuracy") is not None for line in self.val)
        return of_val or self.median(chart) is not None

    def summary(self):
        """Return the figures at the top of the page: [(label, value, note), ...].

        The page drops those that no run has: a dash with an empty note.
        """
        first, last = self.values_at(0), self.values_at(-1)
        judged = self.judged_set()
        best_step, best = self.lowest(judged)
        of_set = f" of {judged}" if judged else ""
        best_note = "no validation" if best is None else f"after step {show(best_step, ',')}{of_set}"
        forgetting = {name or "all": self.forgetting(name) for name in self.last_sets()}
        forgotten = {name: value for name, value in forgetting.items() if value is not None}
        worst = max(forgotten, key=forgotten.get, default=None)
        mfu = self.median("mfu")
        return [("Steps", show(last.get("step"), ","), f"{show(last.get('epoch'), '.3g')} epochs"),
                ("Last loss", show(last.get("loss"), ".4f"), f"{show(first.get('loss'), '.4f')} at step 1"),
                ("Best val_loss", show(best, ".4f"), best_note),
                ("Forgetting", show(forgotten.get(worst), "+.4f"),
                 f"val_loss since step 0{f', {worst}' * (worst != 'all')}" if forgotten else ""),
                ("Tokens per second", show(self.median("tokens_per_second"), ",.0f"), "median"),
                ("MFU", show(mfu, ".0%"), "median" if mfu is not None else ""),
                ("Peak memory", show(self.peak_memory(), ".2f"), "GiB"),
                ("Training time", duration(last.get("seconds") or 0),
                 f"for {show(last.get('tokens'), ',')} tokens")]


def duration(seconds):
    """Seconds as text: "41.3 s", "12 min", "3 h 20 min"."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.3g} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


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


def distinct(losses):
    """Texts of losses: three decimals, or so many that the difference to a neighbour has two digits."""
    def text(loss, other):
        decimals = 3
        if other is not None and 1e-11 < abs(loss - other) < 0.01:
            decimals = 1 - math.floor(math.log10(abs(loss - other)))
        return f"{loss:.{decimals}f}"

    neighbours = zip(losses, [None, *losses[:-1]], [*losses[1:], None])
    return [max(text(loss, before), text(loss, after), key=len) for loss, before, after in neighbours]


def tiles(runs):
    """The summary() of each run, without the figures that none of them has."""
    columns = zip(*(run.summary() for run in runs))
    shown = [column for column in columns if any(value != "–" or note for _, value, note in column)]
    return list(zip(*shown))


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
    has = {name: any(run.has(name) for run in runs) for name in OPTIONAL}
    text = page.render(runs=runs, summaries=tiles(runs), has=has, distinct=distinct, show=show,
                       curves=[run.curves() for run in runs], differ=differ, style=style,
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
