"""Resume means the same run: its own settings, what may change in them, and what must not.

The settings of a run are in OUTPUT_DIR/config.yaml, and in training_state/settings.json of each step
directory, so that a step directory alone is enough. The first is read, the second says what the checkpoint
was made with.
"""

import dataclasses
import os
import re

from disk import checkpoint, inputs, pretrained
from settings import parser
from settings.errors import UserError

SETTINGS = os.path.join(checkpoint.STATE_DIRECTORY, "settings.json")  # in a step directory
NOT_OF_THE_RUN = ("resume_from", "selfcheck", "profile")  # of one start only
# Settings that decide what an adapter is, and what a step holds
ADAPTER = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_rs", "lora_dora",
           "lora_modules_to_save", "quantize")
DATA = ("train_data", "tokenizer", "chat_template", "template_kwargs", "max_length", "too_long", "train_on",
        "train_on_prompt", "train_reasoning", "split_turns", "bad_rows", "prompt_key", "response_key",
        "messages_key", "val_split")
FROM_CHECKPOINT = ("resize_embeddings", "resume_adapter")  # a resumed run has their result already
SCHEDULE = ("lr", "scheduler", "warmup_ratio", "min_lr_ratio")


def owner(resume_from):
    """The output directory of the run that --resume_from DIR belongs to; None for a step directory alone."""
    for path in (os.path.abspath(resume_from), os.path.realpath(resume_from)):  # checkpoints/ may be a link
        for run in (path, os.path.dirname(path), os.path.dirname(os.path.dirname(path))):
            is_run = os.path.exists(os.path.join(run, "metrics.jsonl"))
            if is_run and os.path.isdir(os.path.join(run, "checkpoints")):
                return run if os.path.isabs(resume_from) else os.path.relpath(run)
    return None


def settings_file(resume_from, output_dir):
    """The file with the settings of the run that --resume_from names; None for a new run or an old version's.

    Raises UserError if --resume_from names no checkpoint.
    """
    directory = checkpoint.resume_directory(resume_from, os.path.join(output_dir, "checkpoints"))
    run = output_dir if resume_from == "auto" else owner(resume_from)
    paths = [os.path.join(directory, SETTINGS)] if directory else []
    # without metrics.jsonl it may be a file that a user put there for --config
    if run and os.path.exists(os.path.join(run, "metrics.jsonl")):
        paths.insert(0, os.path.join(run, "config.yaml"))
    return next(filter(os.path.exists, paths), None)


def settings(given, fields):
    """The Assignments of the run that is resumed, for settings.parser.parse; [] without --resume_from.

    given   {name: value} of the settings that were given
    fields  {name: field} of sft.Config

    Raises UserError for a step directory outside a run if --output_dir is not given.
    """
    resume_from = given.get("resume_from")
    if resume_from is None:
        return []
    output_dir, run = given.get("output_dir", fields["output_dir"].default), None
    path = settings_file(resume_from, output_dir)
    assignments = parser.read_yaml(path, fields) if path else []
    if resume_from != "auto":
        run = owner(resume_from)
    # the directory may have been moved since
    assignments = [a for a in assignments if a.name != "output_dir"]
    if not run and resume_from != "auto" and "output_dir" not in given:
        raise UserError(f"--resume_from {resume_from}: this step directory is not inside a run's directory; "
                        "add --output_dir DIR, where the run continues")
    if run:
        assignments.append(parser.Assignment("output_dir", run, "run", f"the run of {resume_from}"))
    has_checkpoint = checkpoint.resume_directory(resume_from, os.path.join(output_dir, "checkpoints"))
    return [a._replace(source="run") for a in assignments
            if a.name not in NOT_OF_THE_RUN and not (has_checkpoint and is_gone(a.name, a.text))]


def is_gone(name, text):
    """Whether a setting of the run names what is gone and not needed: the checkpoint has a copy of it."""
    if name == "chat_template":
        return inputs.is_template_file(text) and not os.path.isfile(text)
    is_local = name == "resume_adapter" or (name == "tokenizer" and not re.fullmatch(pretrained.HUB_ID, text))
    return is_local and text not in ("tiny", "null") and not os.path.exists(text)


def saved_settings(directory, cfg):
    """{name: value} of the settings that a checkpoint was made with.

    An older version did not save them there: then they are those of the run, or {} without its config.yaml.
    """
    path = os.path.join(directory, SETTINGS)
    if not os.path.exists(path):
        path = settings_file(cfg.resume_from, cfg.output_dir)
    fields = {field.name: field for field in dataclasses.fields(cfg)}
    assignments = parser.read_yaml(path, fields) if path else []
    return {a.name: parser.convert(fields[a.name], a.text, a.origin) for a in assignments if a.name in fields}


def export(cfg):
    """{file of a step directory: bytes}: the settings of a run, without those of one start."""
    fresh = {field.name: field.default for field in dataclasses.fields(cfg) if field.name in NOT_OF_THE_RUN}
    return {SETTINGS: parser.json_text(dataclasses.replace(cfg, **fresh)).encode()}


def changes(saved, cfg):
    """[(name, value then, value now)] of the settings that are not as the checkpoint was made with."""
    pairs = [(name, value, getattr(cfg, name)) for name, value in saved.items()
             if name not in (*NOT_OF_THE_RUN, "output_dir")]
    return [(name, then, now) for name, then, now in pairs if then != now]


def changed_lines(saved, cfg):
    """"changed: lr 1e-3 -> 2e-5" for each setting that changes. Raises UserError if that has no effect."""
    different = changes(saved, cfg)
    names = {name for name, _, _ in different}
    for name, by in (("epochs", "max_steps"), ("batch_size", "batch_tokens")):
        if name in names and by not in names and getattr(cfg, by) is not None:
            raise UserError(f"--{name} {getattr(cfg, name)} has no effect: the run has --{by} "
                            f"{getattr(cfg, by)}; change that, or add --{by} none")
    for name, then, now in different:
        if name in FROM_CHECKPOINT and now:
            raise UserError(f"--{name} {text_of(now)} has no effect on a run that is resumed, which has all "
                            f"weights from its checkpoint; type --{name} {text_of(then)}, or start a new run "
                            "with another --output_dir")
    return [f"changed: {name} {text_of(then)} -> {text_of(now)}" for name, then, now in different]


def lines(resumed, saved, cfg, origins):
    """The banner's lines about files of settings, the checkpoint that is resumed, and settings that change.

    resumed, saved, origins  the step directory or None; its settings; of cfg, from settings.parser.parse

    Raises UserError as changed_lines does.
    """
    read, of_run = parser.files_read(origins), []
    if cfg.resume_from and origins:
        of_run = [path for path in [settings_file(cfg.resume_from, cfg.output_dir)] if path in read]
    others = [path for path in read if path not in of_run]
    presets = sorted({origin for origin in origins.values() if origin.startswith("preset ")})
    none = f"{', '.join(presets)}; no other file" if presets else "none"
    result = [f"config   {', '.join(others) or f'{none} read (--config config.yaml reads it)'}"]
    if of_run and not others:
        result = []
    settings_of = f", settings of {of_run[0]}" if of_run else ""
    if resumed:
        lacking = "" if saved else ", saved by an older version: what is not given has its default"
        result.append(f"resume   step {checkpoint.step_of(resumed)} of {resumed}{settings_of}{lacking}")
    elif cfg.resume_from:
        root = os.path.join(cfg.output_dir, "checkpoints")
        result.append(f"resume   no checkpoint in {root}; this is a new run{settings_of}")
    return result + changed_lines(saved, cfg)


def first_model(name, before):
    """The directory of the model that a resumed full run started from, to compare its weights; or None.

    name, before  --model now and then

    The run does not need it, so it may be gone, or not downloaded: None if the name is the same. Raises
    UserError if another name was given and there is no such model on this machine.
    """
    if name == "tiny" or os.path.isdir(name):
        return pretrained.model_directory(name)
    if name == before:
        return None
    if not re.fullmatch(pretrained.HUB_ID, name):
        return pretrained.model_directory(name)  # raises
    raise UserError(f"--model {name} is not the name that the run had, {before}, and not on this machine to "
                    "compare the weights; remove --model: a resumed run has them from its checkpoint")


def text_of(value):
    """A value as a user writes it: none, true, 2e-5."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        digits = next(n for n in range(18) if float(f"{value:.{n}e}") == value)
        mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    return str(value)


def check_identity(then, now, saved, cfg):
    """Raise UserError where a checkpoint was made with other data, order of steps, adapter or base model.

    then, now  {key: value}, of the checkpoint and of this run: RunState.identity
    saved      its settings, see saved_settings
    """
    faults, remedies, again = [], [], "start a new run with another --output_dir"
    for key, value in now.items():
        before = then.get(key)
        if before == value:
            continue
        if key == "data":
            flag = f"--model {cfg.model} --use_lora --resume_adapter" if cfg.use_lora else "--model"
            step = checkpoint.resume_directory(cfg.resume_from, os.path.join(cfg.output_dir, "checkpoints"))
            again = (f"train other data in a new run from these weights: {flag} {os.path.relpath(step)} "
                     "--output_dir DIR in place of --resume_from (docs/continue.md)")
            reasons = [change for change in changes(saved, cfg) if change[0] in DATA]
            texts = [f"{name} {text_of(a)} then, {text_of(b)} now" for name, a, b in reasons]
            faults.append("other training data: " + ("; ".join(texts) or "other rows, or another template or "
                          "tokenizer, than the run had" if saved else f"or another of {', '.join(DATA)}"))
            remedies += [f"--{name} {text_of(a)}" for name, a, _ in reasons]
        elif f"--{key} {text_of(before)}" not in remedies:  # as a reason for other data
            faults.append(f"{key} {text_of(before)} then, {text_of(value)} now")
            remedies.append(f"--{key} {text_of(before)}")
    if faults:
        remedy = f"type {' '.join(remedies)}" if remedies else "give the data that the run had"
        raise UserError(f"--resume_from {cfg.resume_from}: this would be another run: "
                        f"{'; '.join(faults)}. Instead, {remedy}, or {again}")

