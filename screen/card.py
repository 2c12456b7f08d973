"""The model card: README.md with the data's ledger, the settings, the command and a picture of the loss.

It goes with what is pushed to a hub or exported. Its last line has a digest of the text before: a README.md
without it, or that was edited, belongs to its user and is never replaced.
"""

import dataclasses
import hashlib
import io
import json
import math
import os
import re
import shlex

import yaml

from disk import checkpoint, files, hub, layout, peft, pretrained, resume
from screen import picture, report
from settings.errors import UserError
from text import sources

README, PICTURE = "README.md", "loss.png"
MARK = re.compile(r"\n<!-- written by sft\.py, ([0-9a-f]{16}); an edited file is kept -->\n\Z")
# Settings that say nothing about the result, or about this machine only
NOT_SHOWN = (*resume.NOT_OF_THE_RUN, "output_dir", "cache_dir", "logger", "project", "run_name",
             "push_to_hub", "timeout", "keep_checkpoints", "async_save")
# Directories of an absolute path, which say more about a machine than about a model
FOLDERS = re.compile(r"(?<![\w.:/~])~?/(?:[^\s,:'\"/]+/)+")
NOT_A_HUB_ID = re.compile(r"\.(jsonl?|parquet|csv|tsv|txt|gz|zst|arrow|ya?ml|jinja)$")
LARGEST_README = 2**18  # characters of another model's card that are read


def defaults_of(config_class):
    """{name: default} of a dataclass of settings."""
    return {field.name: field.default for field in dataclasses.fields(config_class)}


def is_ours(text):
    """Whether a README.md is as this module wrote it."""
    match = MARK.search(text)
    return match is not None and digest(text[: match.start()]) == match[1]


def digest(text):
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


def files_of(directories, defaults, notes=(), title=None, base=None, online=False):
    """{README.md: bytes, and loss.png: bytes if there is a loss to draw} for a model or adapter directory.

    directories  a step directory, or another model directory; several if the model is their average
    defaults     {name: default} of sft.Config: only other values are shown
    notes        what was done since: "in bf16"
    title        the heading; none: the directory's name
    base         hub id of the base model; none: as the run or the adapter names it
    online       ask the hub for the card of the base model, which says its license

    A README.md of the directory that a user wrote is returned as it is.
    """
    directory = directories[0]
    readme = os.path.join(directory, README)
    if os.path.isfile(readme):
        content = files.read_file(readme)
        if not is_ours(content.decode(errors="replace")):
            return {README: content}
        if len(directories) == 1 and not notes and not run_of(directory):
            return {README: content, **files.read_bytes(directory, [PICTURE])}  # of an exported directory
    origin = Origin(directory, defaults, base)
    steps = [checkpoint.step_of(path) for path in directories]
    drawn = drawing(origin)
    title = title or os.path.basename(os.path.abspath(directory))
    body = [f"# {plain(title)}", sentence(origin, steps, notes)]
    if drawn:
        body.append(f"![loss]({PICTURE})\n\nLoss in nats per target token, by step: each step grey, smoothed "
                    "blue" + ("; validations orange." if origin.val else "."))
    if origin.train:
        body.append(table(origin))
    if origin.ledger:
        body.append("## Data\n\n" + fenced("\n".join(without_folders(line) for line in origin.ledger)))
    if origin.settings:
        body.append("## Training\n\nSettings that differ from the defaults, and the command:\n\n"
                    + fenced("\n".join(f"{name}: {value}" for name, value in origin.settings.items()), "yaml")
                    + "\n\n" + fenced(command(origin), "bash"))
    front = yaml.safe_dump(front_matter(origin, online), sort_keys=False, allow_unicode=False)
    text = f"---\n{front}---\n\n" + "\n\n".join(body) + "\n"
    text += f"\n<!-- written by sft.py, {digest(text)}; an edited file is kept -->\n"
    return {README: text.encode(errors="replace"), **({PICTURE: drawn} if drawn else {})}


def run_of(directory):
    """The output directory of the run that a step directory is in; None outside a run."""
    return resume.owner(directory) if checkpoint.step_of(directory) is not None else None


class Origin:
    """Where a model comes from, as far as its directory and its run tell.

    is_adapter, is_multimodal  of the model
    base                       hub id of the model that was fine-tuned; None if it is a local directory
    local_base                 this directory, or None
    settings                   {name: text} of those that differ from the defaults
    data                       ids of the hub datasets
    ledger                     lines about the data
    ranks                      of the run
    train, val                 [(step, loss), ...] up to the step, finite
    last                       the last lines of metrics.jsonl up to the step: (training, validation)
    """

    def __init__(self, directory, defaults, base=None):
        self.directory, self.is_adapter = directory, pretrained.is_adapter(directory)
        config = report.read_dict(os.path.join(directory, "config.json"), json.load)
        step, run = checkpoint.step_of(directory), run_of(directory)
        values = settings_of(directory, run)
        name = values.get("model")
        if self.is_adapter:
            name = peft.read_config(directory).get("base_model_name_or_path") or name
        self.base = base or (name if is_hub_id(name) else None)
        self.local_base = name if isinstance(name, str) and os.path.isdir(name) else None
        self.is_multimodal = layout.is_multimodal(config)
        self.settings = {name: shown(value) for name, value in values.items() if name in defaults
                         and name not in NOT_SHOWN and value != defaults[name]}
        self.data = hub_datasets(values.get("train_data"))
        ledger = report.read_dict(os.path.join(run or "", "ledger.json"), json.load) if run else {}
        lines = [ledger.get(key) for key in ("train", "validation")]
        self.ledger = [line for part in lines if isinstance(part, list) for line in part
                       if isinstance(line, str)]
        self.ranks = ledger.get("ranks") if isinstance(ledger.get("ranks"), int) else 1
        self.read_metrics(run, step)

    def read_metrics(self, run, step):
        self.train, self.val, self.last = [], [], ({}, {})
        train_line, val_line = {}, {}
        for line in report.read_lines(os.path.join(run, "metrics.jsonl")) if run else ():
            if type(line.get("step")) is not int or line["step"] > step:
                continue
            for key, points in ("loss", self.train), ("val_loss", self.val):
                if is_finite(line.get(key)):
                    points.append((line["step"], line[key]))
            if "loss" in line:
                train_line = line
            elif "val_loss" in line:
                val_line = line
        self.last = train_line, val_line


def is_finite(value):
    return type(value) in (int, float) and math.isfinite(value)


def settings_of(directory, run):
    """{name: value} of the settings that a step directory has, or else its run's config.yaml."""
    path = os.path.join(directory, resume.SETTINGS)
    values = report.read_dict(path, json.load)
    if not values and run:
        values = report.read_dict(os.path.join(run, "config.yaml"), report.read_yaml)
    return values


def is_hub_id(name):
    """Whether a name of a model or of data is that of a hub, and not a local path."""
    return (isinstance(name, str) and re.fullmatch(pretrained.HUB_ID, name) is not None
            and not os.path.exists(name) and not NOT_A_HUB_ID.search(name))


def hub_datasets(spec):
    """The ids of the hub datasets among the sources of --train_data."""
    try:
        paths = [wanted.path for wanted in sources.parse(spec)] if isinstance(spec, str) else []
    except UserError:  # a local file that is gone
        return []
    return list(dict.fromkeys(filter(is_hub_id, paths)))


def drawing(origin):
    return picture.of_losses(origin.train, origin.val) if len(origin.train) > 1 else None


def front_matter(origin, online):
    """The YAML values at the head of the card, which the hub reads."""
    values = {}
    if origin.base:
        values["base_model"] = origin.base
    values["library_name"] = "peft" if origin.is_adapter else "transformers"
    values["pipeline_tag"] = "image-text-to-text" if origin.is_multimodal else "text-generation"
    values["tags"] = ["sft", *["lora"] * origin.is_adapter]
    if origin.data:
        values["datasets"] = origin.data
    return {**values, **license_of(origin, online)}


def license_of(origin, online):
    """{license, and license_name and license_link if it is no common one} of the base model's own card.

    Read from the base's directory, in the hub's cache or not, and, if `online`, from the hub; {} if there is
    no card.
    """
    path = card_of_base(origin, online)
    if path is None or not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8", errors="replace") as f:
        block = re.match(r"---\r?\n(.*?\n)---", f.read(LARGEST_README), re.DOTALL)
    try:
        values = report.read_yaml(io.StringIO(block[1])) if block else {}
    except (ValueError, yaml.YAMLError, RecursionError):
        return {}
    found = {key: str(values[key]) for key in ("license", "license_name", "license_link") if values.get(key)}
    link = found.get("license_link", "")
    if link and not link.startswith("https://"):  # a file of the base's repository
        found.pop("license_link")
        if origin.base:
            found["license_link"] = f"https://huggingface.co/{origin.base}/blob/main/{link}"
    return found if "license" in found else {}


def card_of_base(origin, online):
    """The path of the base model's README.md, which need not exist, or None."""
    if origin.base is None:
        return os.path.join(origin.local_base, README) if origin.local_base else None
    if online:
        hub.fetch_card(origin.base)
    from huggingface_hub import try_to_load_from_cache  # slow import

    path = try_to_load_from_cache(origin.base, README)
    return path if isinstance(path, str) else None  # it may be a mark that there is no such file


def sentence(origin, steps, notes):
    kind = "A LoRA adapter for" if origin.is_adapter else "A fine-tuned version of"
    of = f"[{origin.base}](https://huggingface.co/{origin.base})" if origin.base else "a local model"
    steps = [f"{step:,}" for step in steps if step is not None]
    at = f", step{'s' * (len(steps) > 1)} {', '.join(steps)}" if steps else ""
    return f"{kind} {of}{at}{''.join(f', {note}' for note in notes)}."


def table(origin):
    """First and last loss, and what the last validation found, as a Markdown table."""
    (first_step, first), (last_step, last) = origin.train[0], origin.train[-1]
    rows = [(f"loss, step {first_step:,}", f"{first:.4f}"), (f"loss, step {last_step:,}", f"{last:.4f}")]
    if origin.val:
        step, best = min(origin.val, key=lambda point: point[1])
        rows.append((f"validation loss, step {origin.val[-1][0]:,}", f"{origin.val[-1][1]:.4f}"))
        rows.append((f"lowest validation loss, step {step:,}", f"{best:.4f}"))
    train, val = origin.last
    for key, line, name, spec in (("accuracy", train, "token accuracy of the last step", ".1%"),
                                  ("val_accuracy", val, "token accuracy of the last validation", ".1%"),
                                  ("forgetting", val, "forgetting", "+.4f")):
        if is_finite(line.get(key)):
            rows.append((name, format(line[key], spec)))
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def command(origin):
    """The command that starts such a run: paths of this machine without their folders."""
    ranks = f" --n_gpus {origin.ranks}" if origin.ranks > 1 else ""
    flags = [f"--{name} {shlex.quote(value)}" for name, value in origin.settings.items()]
    return f"./train.sh{ranks} {' '.join(flags)}".strip()


def shown(value):
    """A setting's value as it is typed."""
    return without_folders(resume.text_of(value)) if isinstance(value, str) else resume.text_of(value)


def without_folders(text):
    return FOLDERS.sub("", text)


def plain(text):
    """A text on one line that Markdown does not take for a heading, a link or HTML."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", " ".join(text.split()))


def fenced(text, language=""):
    """A block of code. The fence is longer than any in the text, which may have come from anywhere."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
