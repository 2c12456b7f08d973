"""Flags, YAML files and a.b=c overrides -> one flat dataclass, which sft.py declares.

Owns spelling: every way to write a setting ends here, is checked against the dataclass's types and choices, and
remembers where it came from. Strength: flag or override > YAML > default; of two flags the later one wins. An unknown
name is an error that names the nearest one. It reads no environment variable (train.sh turns those into flags).
"""

import dataclasses
import difflib
import os
import sys
import textwrap
import traceback
import types
import typing

import yaml

# Names of verl's SFT configurations that mean exactly what one of ours means. docs of verl write them nested, with
# or without the RL prefixes stripped in `field_name`.
VERL = {
    "data.train_files": "train_data", "data.val_files": "val_data", "data.max_length": "max_length",
    "data.train_batch_size": "batch_size", "data.micro_batch_size_per_gpu": "micro_batch_size",
    "data.truncation": "too_long", "model.partial_pretrain": "model", "model.path": "model",
    "model.tokenizer_path": "tokenizer", "model.enable_gradient_checkpointing": "gradient_checkpointing",
    "optim.lr": "lr", "optim.weight_decay": "weight_decay", "optim.clip_grad": "grad_clip",
    "optim.grad_clip": "grad_clip", "optim.lr_warmup_steps_ratio": "warmup_ratio",
    "optim.min_lr_ratio": "min_lr_ratio", "optim.lr_scheduler": "scheduler", "optim.lr_scheduler_type": "scheduler",
    "optim.warmup_style": "scheduler", "trainer.total_epochs": "epochs", "trainer.total_training_steps": "max_steps",
    "trainer.default_local_dir": "output_dir", "trainer.max_ckpt_to_keep": "keep_checkpoints", "trainer.seed": "seed",
    "trainer.resume_from_path": "resume_from",
}
# What a setting is called elsewhere: not accepted, but the error names ours.
ELSEWHERE = {"learning_rate": "lr", "num_train_epochs": "epochs", "num_epochs": "epochs", "model_path": "model",
             "model_name_or_path": "model", "dataset_name": "train_data", "max_seq_length": "max_length",
             "lr_scheduler_type": "scheduler", "max_grad_norm": "grad_clip", "save_total_limit": "keep_checkpoints",
             "per_device_train_batch_size": "batch_size", "gradient_accumulation_steps": "batch_size"}
SPELLINGS = {"too_long": {"right": "truncate"}}  # values that have another name here


def knob(default, help, choices=(), group=None):
    """A field of the flat dataclass. `group` begins a section of --help, at the first knob of that section."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "group": group})


def parse(cls, argv, positional=()):
    """Build cls from command-line words; return it with a dict field name -> where its value came from.

    positional  fields that the first words without a flag set, in this order

    Accepts --x v, --x=v, --x and --no-x for booleans, a.b=c (also with a leading +, ++ or --), --config FILE and
    --config-path DIR --config-name NAME. Handles --help and --explain, which print and exit.

    Raises ValueError for an unknown name, a value of the wrong type, a value that is none of the choices.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, fields))
        sys.exit(0)
    explain, settings, files = False, [], {}
    words, positional = list(argv), list(positional)
    while words:
        word = words.pop(0)
        name, equals, value = word.lstrip("+-").partition("=")
        if word == "--explain":
            explain = True
        elif positional and not word.startswith("-") and not equals:
            settings.append((positional.pop(0), word, f"word {word}"))
        elif not word.startswith("--") and not equals:
            raise ValueError(f"{word!r} is neither a flag (--name value) nor an override (name=value)")
        elif name in ("config", "config-path", "config-name"):
            files[name] = value if equals else take_value(words, name)
        elif name.startswith("no-") and not equals:
            field = field_name(name[3:], fields)
            if fields[field].type is not bool:
                raise ValueError(f"{word}: {field} can't be negated, it isn't true or false; give a value")
            settings.append((field, "false", f"flag {word}"))
        else:
            field = field_name(name, fields)
            # a boolean may stand alone: its next word is its value only if it reads as one
            alone = fields[field].type is bool and (not words or words[0].lower() not in BOOLEANS)
            if not equals:
                value = "true" if alone else take_value(words, name)
            settings.append((field, value, f"flag {word}"))

    path = files.get("config")
    if path and len(files) > 1:
        raise ValueError("--config and --config-path or --config-name name two files; give one")
    if "config-path" in files or "config-name" in files:
        path = os.path.join(files.get("config-path", "."), files.get("config-name", "config"))
        path += "" if os.path.exists(path) or path.endswith(".yaml") else ".yaml"
    values, origins = {}, {name: "default" for name in fields}
    for name, value, origin in (read_yaml(path, fields) if path else []) + settings:
        values[name], origins[name] = convert(fields[name], value, origin), origin
    config = cls(**values)
    if explain:
        width = max(map(len, fields))
        for name in fields:
            print(f"{name:{width}} = {getattr(config, name)!s:28} {origins[name]}")
        sys.exit(0)
    return config, origins


def take_value(words, name):
    if not words or (words[0].startswith("--") and len(words[0]) > 2):
        raise ValueError(f"--{name} needs a value")
    return words.pop(0)


def field_name(name, fields):
    """The field that a name means: its own, or one of verl's, whatever RL prefix stands before that."""
    known = name.replace("-", "_")
    if known in fields:
        return known
    short = name
    for prefix in ("actor_rollout_ref.", "actor."):
        short = short.removeprefix(prefix)
    if short in VERL and VERL[short] in fields:
        return VERL[short]
    near = difflib.get_close_matches(known, [*fields, *ELSEWHERE], n=1, cutoff=0.6)
    near = near or difflib.get_close_matches(name, list(VERL), n=1, cutoff=0.6)
    near = [ELSEWHERE.get(n, n) for n in near if ELSEWHERE.get(n, n) in fields or n in VERL]
    raise ValueError(f"unknown setting {name!r}" + (f"; the nearest is {near[0]!r}" if near else "")
                     + "; --help lists them all")


BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def convert(field, value, origin):
    """Turn the text of a value into the field's type."""
    kinds = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
    value = SPELLINGS.get(field.name, {}).get(value, value)
    rule = f"{origin}: {field.name} can't be {value!r}; it must be "
    if value.lower() in ("none", "null", "~", ""):
        if types.NoneType in kinds:
            return None
        raise ValueError(rule + f"{kinds[0].__name__}, not empty")
    if kinds[0] is bool:
        if value.lower() not in BOOLEANS:
            raise ValueError(rule + "true or false")
        return BOOLEANS[value.lower()]
    if kinds[0] in (int, float):
        try:
            return kinds[0](value)
        except ValueError:
            raise ValueError(rule + ("a whole number" if kinds[0] is int else "a number")) from None
    choices = field.metadata["choices"]
    if choices and value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        raise ValueError(rule + f"one of {', '.join(choices)}" + (f" (nearest: {near[0]})" if near else ""))
    return value


def read_yaml(path, fields):
    """Settings of a YAML file as (field, text, file:line). Nested keys read as a.b; lists join with commas.

    Only scalars' text is taken and then converted as a flag's would be: no tag is ever constructed.
    """
    with open(path, encoding="utf-8") as f:
        try:
            root = yaml.compose(f, Loader=yaml.SafeLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    settings, seen = [], set()

    def walk(node, name):
        where = f"{path}:{node.start_mark.line + 1}"
        if id(node) in seen:
            raise ValueError(f"{where}: anchors and aliases are not supported; write the value out")
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            if name and not node.value:
                raise ValueError(f"{where}: {name} is empty")
            keys = [key.value for key, _ in node.value]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise ValueError(f"{where}: {twice[0]} is there twice")
            for key, value in node.value:
                walk(value, f"{name}.{key.value}".lstrip("."))
        elif isinstance(node, yaml.SequenceNode):
            if any(not isinstance(item, yaml.ScalarNode) for item in node.value):
                raise ValueError(f"{where}: {name} must be a plain value or a list of plain values")
            settings.append((name, ",".join(item.value for item in node.value), where))
        else:
            settings.append((name, node.value, where))

    if root is not None:
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(f"{path}: the file must be `name: value` lines")
        walk(root, "")
    try:
        return [(field_name(name, fields), value, where) for name, value, where in settings]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_yaml(config, path):
    """Save a resolved configuration; --config PATH starts the same run again."""
    values = dataclasses.asdict(config)
    readable = "".join(map(str, values.values())).isprintable()  # a line break of Unicode would be folded, not escaped
    with open(path, "w", encoding="utf-8") as f:
        yaml.safe_dump(values, f, sort_keys=False, allow_unicode=readable)


def help_text(cls, fields):
    lines = [textwrap.dedent(cls.__doc__).strip()]
    for f in fields.values():
        if f.metadata["group"]:
            lines += ["", f.metadata["group"] + ":"]
        flag = f"--{f.name}" + (f", --no-{f.name}" if f.type is bool and f.default else "")
        choices = f" ({', '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
        default = "none" if f.default is None else str(f.default).lower() if f.type is bool else f.default
        text = f"{f.metadata['help']}{choices} [{default}]"
        if len(flag) > 22:
            lines.append(f"  {flag}")
            flag = ""
        lines += textwrap.wrap(text, 110, initial_indent=f"  {flag:24}", subsequent_indent=" " * 26)
    lines += ["", "configuration:", "  --config FILE           read a YAML file (config.yaml lists every knob)",
              "  --config-path DIR --config-name NAME", "                          the same, in Hydra's words",
              "  name=value, a.b=value   override one setting; verl's nested names work too",
              "  --explain               print every value and where it came from, start nothing"]
    return "\n".join(lines)


def run(main):
    """Call main(); answer an error that our own code raised about its input with one line and exit code 2.

    A ValueError or OSError from inside a library is a bug, or news for us, and keeps its traceback.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        main()
    except BrokenPipeError:  # `| head` closed our output: not an error
        sys.exit(0)
    except (ValueError, OSError, FloatingPointError) as error:
        frame = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")][-1]
        if os.path.dirname(os.path.abspath(frame.filename)) != here:
            raise
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)
