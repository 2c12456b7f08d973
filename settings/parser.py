"""Flags, YAML files, environment variables and a.b=c overrides -> one flat dataclass, which sft.py declares.

Every way to write a setting is read here, checked against the type, choices and range in the dataclass, and
kept with its origin. Precedence: flag or override > environment > --config file > on resume the settings of
the run > preset > default. If a flag appears twice, the last one counts. An unknown name is an error that
suggests the nearest one. settings/verl.py knows the names of other trainers.

The environment is read only if the argument --environment is given; ranks/launch.py adds it.
"""

import collections
import contextlib
import dataclasses
import difflib
import inspect
import json
import numbers
import os
import re
import shutil
import sys
import textwrap
import types
import typing

import yaml

from disk import files
from settings import other_trainers, verl
from settings.errors import UserError
from settings.venv import PROJECT

LARGEST_YAML = 2**18  # bytes: verl's full configuration has 40,000
BOOLEANS = {"true": True, "yes": True, "on": True, "1": True,
            "false": False, "no": False, "off": False, "0": False}
TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a non-empty text"}
SOURCES = ("train_data", "val_data")  # may be lists or mappings, which text/sources.py reads
NAME = "NAME"  # the word of a setting that may be any text
CONFIG_FLAGS = ("config", "config-path", "config-name")
# Settings of tools/plan.py that sft.py once had: the config.yaml of an older run has them, switched off.
PLAN_SETTINGS = ("plan", "memory_gb", "ranks", "tflops", "gb_per_second", "tp_gb_per_second")


def setting(default, help, choices=(), *, group=None, env=None, low=-1e18, high=1e18, needs="", unless="",
            presets=(), word=None):
    """A field of the flat dataclass.

    default    its value if nothing sets it; None is shown as "none"
    help       one line for --help and config.yaml: what it does, and its unit
    choices    the values that are allowed, all if empty
    group      title of a section of --help; the section begins at this field
    env        the environment variable that sets it
    low, high  smallest and largest value of a number; nan and infinity are always errors
    needs      settings without which it has no effect: "val_data or sample_prompts", "n_gpus and tp"
    unless     settings that it does not work with: "tp or lora_dora", "scheduler=constant"
    presets    values for which configs/VALUE.yaml is applied; only defaults have lower precedence
    word       a text that is allowed beside the type, as in `size: int | str = setting(1, word="auto")`;
               NAME stands for any text, for a bool
    """
    return dataclasses.field(default=default, metadata=dict(
        help=help, choices=choices, group=group, env=env, low=low, high=high, needs=needs, unless=unless,
        presets=presets, word=word))


def type_of(field):
    """The type of a field's value: int for int | None and for int | str, an integer or a word."""
    return (typing.get_args(field.type) or (field.type,))[0]


def is_optional(field):
    return types.NoneType in typing.get_args(field.type)


def type_name(field):
    """What a value of the field must be: "an integer", "an integer of at least 1, or auto"."""
    word, low = field.metadata["word"], field.metadata["low"]
    if word is None:
        return TYPE_NAMES[type_of(field)]
    if type_of(field) is bool:
        return f"true, false or {word if word != NAME else 'a name'}"
    return f"{TYPE_NAMES[type_of(field)]} of at least {low}, or {word}"


# ------------------------------------------------------------------------------------------------------------
# values outside their range, and settings without effect


def check(config):
    """Check the values of a config; its __post_init__ calls this. parse() checks flags and variables as well.

    Raises UserError for a value outside its range, and for one that has no effect because of other settings.
    """
    fields = {f.name: f for f in dataclasses.fields(config)}
    for name in vars(config).keys() - fields.keys() - {"given", "origins"}:  # config.learing_rate = 1
        raise UserError(f"unknown setting {name!r:.200}: {type(config).__name__} has none of that name")
    check_values(fields, {name: getattr(config, name) for name in fields})


def check_values(fields, values, explicit=(), origins=None):
    """Like check(), for {field: value}.

    explicit  names of fields that a flag or the environment sets: they must have an effect, even if the value
              is the default
    origins   {field: where its value came from}, so that an error names the variable, not the flag
    """
    changed = {name for name, f in fields.items() if values[name] != f.default}
    for name, field in fields.items():
        value, variable = values[name], field.metadata["env"]
        from_environment = origins is not None and origins[name] == f"environment {variable}"
        written = f"{variable}={value}" if from_environment else flag_of(field, value)
        check_range(written, value, field)
        if name not in changed and not (name in explicit and value):
            continue  # at its default, or switched off explicitly
        if field.metadata["word"] and value in (False, field.default):
            continue  # the same: switched off explicitly, or the word that is the default
        need = unmet_need(field, changed)
        if need:
            if from_environment:
                raise UserError(f"{written} has no effect without {need}; unset it or add {need}")
            raise UserError(f"{written} has no effect without {need}; add {need}, or remove it")
        if other := excluded_by(field, values, changed):
            of_run = f" ({origins[name]})" if origins and name not in explicit else ""
            raise UserError(f"{written}{of_run} does not work with {other}; remove one of them")


def flag_of(field, value):
    """How a value is written on the command line: "--lr 0.1", "--no-packing"."""
    if type_of(field) is bool and value in (True, False):
        return f"--{field.name}" if value else f"--no-{field.name}"
    return f"--{field.name} {'none' if value is None else value}"


def check_range(written, value, field):
    low, high, word = (field.metadata[key] for key in ("low", "high", "word"))
    if word and value is not None:
        is_valid = word in (value, NAME) if isinstance(value, str) else low <= value <= high
        if not is_valid:
            raise UserError(f"{written}: it must be {type_name(field)}")
    if isinstance(value, (int, float)) and not low <= value <= high:  # also true for nan
        at_most = f" and at most {high}" if high < 1e18 or value > high else ""
        raise UserError(f"{written}: it must be at least {low}{at_most}")


def unmet_need(field, changed):
    """The settings that a field needs and that are not set, as flags: "--a or --b"; "" if none is missing."""
    for need in filter(None, field.metadata["needs"].split(" and ")):
        if not changed & set(need.split(" or ")):
            return "--" + need.replace(" or ", " or --")
    return ""


def excluded_by(field, values, changed):
    """The first setting that is set and that a field does not work with, as a flag; "" if there is none."""
    for name in filter(None, field.metadata["unless"].split(" or ")):
        name, has_value, value = name.partition("=")
        if has_value and values[name] == value:
            return f"--{name} {value}"
        if not has_value and name in changed:
            return f"--{name}"
    return ""


# ------------------------------------------------------------------------------------------------------------
# parse, and its steps in their order


def parse(cls, argv, positional=(), resumed=None):
    """Build cls from command-line arguments. Returns it and a dict: field name -> where its value came from.

    positional  fields that the arguments without a flag set, in this order
    resumed     a function: ({field: value that was given}, fields) -> Assignments of the run that is resumed

    Accepts --x v, --x=v, --x and --no-x for booleans, a.b=c (also with a leading +, ++ or --, and c a list
    [x,y]), --config FILE and --config-path DIR --config-name NAME, --environment. --help and --explain print
    and exit. Rank 0 prints a warning for each key of verl that changes nothing.

    Raises UserError for an unknown name, a value of the wrong type, outside its range or not among the
    choices, and a setting that has no effect because of others.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if "--help" in argv or "-h" in argv:
        show(help_text(cls, fields))
        sys.exit(0)
    line = read_arguments(argv, fields, positional)
    path = config_path(line.files)
    from_file = read_yaml(path, fields) if path else []
    assignments, warnings = translate_verl([*from_file, *line.environment, *line.flags], fields)
    values, origins = settle(assignments, fields, resumed)
    config = cls(**values)
    for warning in warnings:
        show(f"warning: {warning}", file=sys.stderr)
    if line.explain:
        width = max(map(len, fields))
        for name in fields:
            show(f"{name:{width}} = {getattr(config, name)!s:28} {origins[name]}")
        sys.exit(0)
    return config, origins


def settle(assignments, fields, resumed=None):
    """Assignments, lowest precedence first -> ({field: value}, {field: origin}) of all fields, checked.

    resumed  as in parse()
    """
    if resumed:
        of_run = resumed(resolve(assignments, fields)[0], fields)
        assignments = [*translate_verl(of_run, fields)[0], *assignments]
    values, origins, explicit = resolve(assignments, fields)
    drop_inert(values, origins, assignments, fields)
    apply_presets(values, origins, fields)
    values = {name: values.get(name, field.default) for name, field in fields.items()}
    origins = {name: origins.get(name, "default") for name in fields}
    check_values(fields, values, explicit, origins)
    return values, origins


class Settings:
    """Base of a flat dataclass whose keyword arguments behave as flags: Config(model="tiny", lr=1e-4).

    The constructor of a dataclass can't see which arguments were given: a preset replaces a default, and not
    the same value if it was given. So __new__, which gets the same arguments, notes their names.

    origins  {field: where its value came from}; {} if all fields were given, as dataclasses.replace() does
    """

    def __new__(cls, *args, **given):
        fields, config = cls.__dataclass_fields__, super().__new__(cls)
        for name in given:
            if name not in fields:
                field_name(name, fields)  # raises, with the nearest name
                raise UserError(f"unknown setting {name!r:.200}: from Python, only the names of --help")
        config.given, config.origins = {*list(fields)[:len(args)], *given}, {}
        return config

    def complete(self, resumed=None):
        """Set what was not given: by the run that is resumed, a preset, the default. Then check all values.

        resumed  as in parse()

        __post_init__ calls this. Raises UserError as parse() does.
        """
        fields = {f.name: f for f in dataclasses.fields(self)}
        if self.given != fields.keys():
            assignments = [Assignment(name, text_of(fields[name], getattr(self, name)), "flag",
                                      f"argument {name}") for name in fields if name in self.given]
            values, self.origins = settle(assignments, fields, resumed)
            for name, value in values.items():
                setattr(self, name, value)
        check(self)

    def check_again(self):
        """Check what was set since, by cfg.lr = 1 or dataclasses.replace(), as the constructor does."""
        for field in dataclasses.fields(self):
            value = convert(field, text_of(field, getattr(self, field.name)), f"argument {field.name}")
            setattr(self, field.name, value)
        check(self)


def text_of(field, value):
    """A value from Python as the text of a flag. Raises UserError for one that no flag could have."""
    if value is None or (isinstance(value, numbers.Real) and type_of(field) is not str):
        return str(value).lower()
    if type_of(field) is str and isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    if isinstance(value, str):
        return value
    if type_of(field) is str and isinstance(value, (list, tuple, dict)):
        is_plain = not isinstance(value, dict) and all(isinstance(item, (str, os.PathLike)) for item in value)
        with contextlib.suppress(TypeError):  # neither JSON nor a path
            return ",".join(map(os.fspath, value)) if is_plain else json.dumps(value, default=os.fspath)
    raise UserError(f"argument {field.name}: {field.name} can't be {value!r:.200}; it must be "
                    f"{type_name(field)}")


def show(text, file=None):
    """Print on rank 0 only: torchrun starts several processes."""
    if (os.environ.get("RANK") or "0") == "0":
        print(text, file=file)


class Assignment(typing.NamedTuple):
    """One `name = value` as it was written."""

    name: str  # a field; before translate_verl(), possibly a key of verl
    text: str
    source: str  # "run" (the settings of the run that is resumed), "file", "environment" or "flag"
    origin: str  # as --explain shows it
    from_verl: bool = False  # translated from a key of verl


@dataclasses.dataclass
class CommandLine:
    """What the arguments say, before values are checked."""

    flags: list = dataclasses.field(default_factory=list)  # Assignments; a later one wins
    environment: list = dataclasses.field(default_factory=list)  # Assignments
    files: dict = dataclasses.field(default_factory=dict)  # {one of CONFIG_FLAGS, or CONFIG: its value}
    explain: bool = False


def read_arguments(argv, fields, positional):
    line, arguments, positional = CommandLine(), list(argv), list(positional)
    while arguments:
        argument = arguments.pop(0)
        name, equals, value = argument.lstrip("+-").partition("=")
        if argument == "--explain":
            line.explain = True
        elif argument == "--environment":
            line.environment = read_environment(fields)
            line.files["CONFIG"] = os.environ.get("CONFIG")
        elif positional and not argument.startswith("-") and not equals:
            line.flags.append(Assignment(positional.pop(0), argument, "flag", f"argument {argument}"))
        elif not argument.startswith("--") and not equals:
            is_known = name.replace("-", "_") in fields
            remedy = f"did you mean --{name}?" if is_known else "write --name value or name=value"
            before = line.flags[-1] if line.flags else None
            if before and before.text == "true" and before.name in fields:  # --packing maybe
                remedy = f"--{before.name} must be {type_name(fields[before.name])}"
            raise UserError(f"unknown argument {argument!r:.200}; {remedy}")
        elif name in CONFIG_FLAGS:
            line.files[name] = value if equals else next_value(arguments, name)
        else:
            field, text = read_setting(argument, arguments, fields)
            line.flags.append(Assignment(field, text, "flag", f"flag {argument}"))
    return line


def read_setting(argument, arguments, fields):
    """(name, text) of the setting in an argument.

    If its value is the next argument, that is removed from arguments.
    """
    name, equals, value = argument.lstrip("+-").partition("=")
    if name.startswith("no-") and not equals:
        field = field_name(name[3:], fields)
        if field not in fields or type_of(fields[field]) is not bool:
            raise UserError(f"{argument}: {field} can't be negated, it isn't true or false; set a value")
        return field, "false"
    field = field_name(name, fields)
    is_bool = field in fields and type_of(fields[field]) is bool
    word, following = fields[field].metadata["word"] if is_bool else None, arguments[0] if arguments else "--"
    is_value = following.lower() in (*BOOLEANS, word)
    if word == NAME:
        is_value = not following.startswith("-") and "=" not in following
    if not equals and is_bool and not is_value:
        value = "true"  # a flag without a value: the next argument is something else
    elif not equals:
        value = next_value(arguments, name)
    if field not in fields or not argument.startswith("--"):
        value = without_brackets(value)
    return field, value


def next_value(arguments, name):
    if not arguments or (arguments[0].startswith("--") and len(arguments[0]) > 2):
        raise UserError(f"--{name} needs a value")
    return arguments.pop(0)


def without_brackets(value):
    """[a,'b'] of an override -> a,b, as lists of a file are joined."""
    match = re.fullmatch(r"\[([^\[\]]*)\]", value)
    return ",".join(item.strip().strip("'\"") for item in match[1].split(",")) if match else value


def read_environment(fields):
    """The Assignments of the environment. An empty variable counts as not set."""
    variables = [(f.metadata["env"], name) for name, f in fields.items()]
    return [Assignment(name, os.environ[variable], "environment", f"environment {variable}")
            for variable, name in variables if variable and os.environ.get(variable)]


def config_path(files):
    """The YAML file to read, or None. A file that a flag names replaces that of the environment."""
    if "config" in files and ("config-path" in files or "config-name" in files):
        raise UserError("--config does not work with --config-path or --config-name; remove one of them")
    if "config-path" in files or "config-name" in files:
        path = os.path.join(files.get("config-path", "."), files.get("config-name", "config"))
        return path if os.path.exists(path) or path.endswith(".yaml") else path + ".yaml"
    return files.get("config") or files.get("CONFIG")


def translate_verl(assignments, fields):
    """Replace verl's keys by settings of sft.py.

    Returns the new list of assignments, and warnings about keys that change nothing.
    """
    verl_keys = {a.name: (a.text, a.origin, i) for i, a in enumerate(assignments) if a.name not in fields}
    if not verl_keys:
        return assignments, []
    translations, warnings = verl.translate(verl_keys)
    groups = [[a] if a.name in fields else [] for a in assignments]
    for i, name, text in translations:
        # null for a setting that can't be empty means its default
        if text != "none" or is_optional(fields[name]):
            groups[i].append(assignments[i]._replace(name=name, text=text, from_verl=True))
    return [assignment for group in groups for assignment in group], warnings


def resolve(assignments, fields):
    """Assignments in order of precedence, lowest first -> {field: value}, {field: origin}, explicit fields.

    A field is explicit if a flag or the environment sets it, with two exceptions: keys of verl, whose
    commands repeat defaults, and a value that resets to the default what a file has set. Raises UserError if
    one file sets a field to two values.
    """
    values, origins, explicit, previous = {}, {}, set(), {}
    for assignment in assignments:
        name, default = assignment.name, fields[assignment.name].default
        value = convert(fields[name], assignment.text, assignment.origin)
        before = previous.get(name)
        if before and before.source == assignment.source == "file" and values[name] != value:
            # config.yaml has the defaults of all settings: a key of verl that was added to it wins over them
            is_mixed = before.from_verl != assignment.from_verl
            if is_mixed and before.from_verl and value == default:
                continue
            if not (is_mixed and assignment.from_verl and values[name] == default):
                raise UserError(f"{assignment.origin}: {name} is {value} here, and {values[name]} at "
                                f"{origins[name]}; remove one of them")
        is_reset = value == default and values.get(name, default) != default
        explicit.discard(name)
        if assignment.source in ("flag", "environment") and not assignment.from_verl and not is_reset:
            explicit.add(name)
        values[name], origins[name], previous[name] = value, assignment.origin, assignment
        if assignment.origin == "environment WANDB_PROJECT":
            add_wandb(values, origins, fields)
    return values, origins, explicit


def drop_inert(values, origins, assignments, fields):
    """Reset what only the resumed run sets and what a given setting makes void.

    keep_best after --val_data none, min_lr_ratio after --scheduler constant.
    """
    given = {assignment.name for assignment in assignments if assignment.source != "run"}
    for name, field in fields.items():
        resolved = {n: values.get(n, f.default) for n, f in fields.items()}
        changed = {n for n, value in resolved.items() if value != fields[n].default}
        is_void = unmet_need(field, changed) or excluded_by(field, resolved, changed)
        if name in changed - given and is_void:
            del values[name], origins[name]


def add_wandb(values, origins, fields):
    """WANDB_PROJECT switches on wandb too. A flag --logger comes later and replaces this."""
    loggers = values.get("logger", fields["logger"].default)
    if "wandb" not in loggers.split(","):
        values["logger"], origins["logger"] = f"{loggers},wandb", "environment WANDB_PROJECT"


def apply_presets(values, origins, fields):
    """Add to values the settings of configs/VALUE.yaml for each field whose value has a preset.

    A setting of the preset is skipped if values has it already, or if it would have no effect, such as a
    setting of LoRA without --use_lora.
    """
    for field in fields.values():
        preset = values.get(field.name, field.default)
        if preset not in field.metadata["presets"]:
            continue
        for assignment in read_yaml(os.path.join(PROJECT, "configs", f"{preset}.yaml"), fields):
            name, target = assignment.name, fields[assignment.name]
            resolved = {n: values.get(n, f.default) for n, f in fields.items()}
            changed = {n for n, value in resolved.items() if value != fields[n].default}
            has_effect = not unmet_need(target, changed) and not excluded_by(target, resolved, changed)
            is_excluded = any(name in fields[n].metadata["unless"].split(" or ") for n in changed)
            if name not in values and has_effect and not is_excluded:
                values[name] = convert(target, assignment.text, assignment.origin)
                origins[name] = f"preset configs/{preset}.yaml"


def field_name(name, fields):
    """The field that a name means; for a key of verl, the key as in the tables of settings/verl.py.

    Raises UserError for an unknown name, with the nearest known one.
    """
    candidate = name.replace("-", "_")
    if candidate in fields:
        return candidate
    if candidate in PLAN_SETTINGS:
        raise UserError(f"{name} is a setting of tools/plan.py; see python tools/plan.py --help")
    if candidate == "n_gpus":
        raise UserError("--n_gpus is for train.sh, which starts the processes: use ./train.sh --n_gpus N, or "
                        "torchrun --nproc_per_node N sft.py")
    key = verl.key_of(name)
    accepts_verl = verl.fields_set() <= fields.keys()  # chat.py lacks the settings of training
    if accepts_verl and verl.entry_name(key):
        return key
    other_names = other_trainers.settings()
    if accepts_verl and (advice := other_trainers.suggestion(name)):
        raise UserError(f"unknown setting {name!r:.200}, which other trainers have: {advice}")
    near = difflib.get_close_matches(candidate, [*fields, *other_names], n=1, cutoff=0.6)
    if accepts_verl and ("." in name or not near):
        near = difflib.get_close_matches(key, verl.entries(), n=1, cutoff=0.6) or near
    same = [field for field in fields if other_trainers.letters(field) == other_trainers.letters(name)]
    near = same or near  # batch.size, Batch_Size
    near = [other_names.get(n, n) for n in near if n not in other_names or other_names[n] in fields]
    nearest = f"; the nearest is {near[0]!r}" if near else ""
    raise UserError(f"unknown setting {name!r:.200}{nearest}; --help lists them all")


def convert(field, text, origin):
    """Turn the text of a value into the field's type. Raises UserError if it does not fit."""
    kind = type_of(field)
    rule = f"{origin}: {field.name} can't be {text!r:.200}; it must be "
    if not text and kind is str:  # often a variable of the shell that is not set
        raise UserError(rule + type_name(field) + ("; none: no value" if is_optional(field) else ""))
    if text.lower() in ("none", "null", "~", "", "{}"):
        if is_optional(field):
            return None
        raise UserError(rule + type_name(field))
    if text.strip().lower() == field.metadata["word"]:
        return field.metadata["word"]
    if kind is bool:
        if text.lower() not in BOOLEANS:
            if field.metadata["word"] == NAME and text:
                return text
            raise UserError(rule + type_name(field))
        return BOOLEANS[text.lower()]
    if kind in (int, float):
        try:
            return number(text, kind, field.default)
        except ValueError:
            raise UserError(rule + type_name(field)) from None
    choices = field.metadata["choices"]
    if choices and text not in choices:
        near = difflib.get_close_matches(text, choices, n=1)
        if field.name == "scheduler" and text in other_trainers.SCHEDULES:
            near = [other_trainers.SCHEDULES[text]]
        nearest = f" (nearest: {near[0]})" if near else ""
        raise UserError(f"{rule}one of {', '.join(choices)}{nearest}")
    stays = field.name in ("prompt", "system") or text == field.default  # prose of chat.py; --cache_dir
    # a shell expands ~ only at the beginning of a word, not in a YAML file or in --output_dir=~/x
    return os.path.expanduser(text) if re.match(r"~[\w.-]*/", text) and not stays else text


def number(text, kind, default):
    """The number in a text. A whole one may be written 3.0 or 1e3: other programs write their files so.

    A number may be a fraction (kind is float) and have a default that is an int: then 3 stays 3 and does not
    become 3.0. Raises ValueError if the text is no such number.
    """
    if kind is float and not isinstance(default, int):
        return float(text)
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if value.is_integer() and abs(value) < 2**53:  # beyond, floats skip integers
            return int(value)
        if kind is int:
            raise
        return value


# ------------------------------------------------------------------------------------------------------------
# YAML files and --help


def read_yaml(path, fields):
    """The Assignments of a YAML file. Nested keys become a.b; lists are joined with commas, or become JSON.

    Only the text of scalars is used and converted like that of a flag, so no tag constructs an object.
    Aliases are errors: with them a short file can mean billions of values.

    Raises UserError, with the file and line, for what is not YAML or not a setting.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would block, and each process reads it
        raise UserError(f"{path} is not a file; write the settings to a file")
    with open(path, "rb") as f:
        content = f.read(LARGEST_YAML + 1)
    if len(content) > LARGEST_YAML:
        raise UserError(f"{path} has more than {LARGEST_YAML:,} bytes; a file of settings can't be so large")
    try:
        root = yaml.compose(content.decode(), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split()):.300}") from error
    except RecursionError as error:
        raise UserError(f"{path}: lists or settings are nested hundreds deep; a setting is name: value, or "
                        "a.b.c at most") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: the file must be `name: value` lines")
    assignments = []
    for name, text, place in list(yaml_values(root, "", path, set())):  # a list: checks the full file first
        if name in PLAN_SETTINGS and name not in fields and text in ("false", "null"):
            continue
        try:
            field = field_name(name, fields)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        origin = place if field in fields else f"{place} {name}"
        assignments.append(Assignment(field, text, "file", origin))
    return assignments


def yaml_values(node, name, path, seen):
    """Yield (dotted name, text, "file:line") for every value below a node of a YAML file.

    seen  ids of the nodes visited so far: a node that comes again is an alias
    """
    place = f"{path}:{node.start_mark.line + 1}"
    if id(node) in seen:
        raise UserError(f"{place}: anchors and aliases are not supported; write the value out")
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        if name and not node.value:
            yield name, "{}", place
        if name == "template_kwargs":  # an object of its own
            yield name, json.dumps(yaml.safe_load(yaml.serialize(node))), place
            return
        for key, times in collections.Counter(str(key.value) for key, _ in node.value).items():
            if times > 1:
                raise UserError(f"{place}: the key {key:.200} appears twice")
        for key, value in node.value:
            inner = f"{name}.{key.value}".lstrip(".")
            values = yaml_values(value, inner, path, seen)
            if inner in SOURCES and value.tag == "tag:yaml.org,2002:map" and value.value:
                texts = {key.removeprefix(f"{inner}."): text for key, text, _ in values}
                values = [(inner, json.dumps(texts), f"{path}:{value.start_mark.line + 1}")]
            yield from values
    elif isinstance(node, yaml.ScalarNode):
        yield name, "null" if node.tag == "tag:yaml.org,2002:null" else node.value, place
    elif name == "defaults":  # Hydra's list of other files
        yield name, "a list", place
    elif name in SOURCES and any(isinstance(item, yaml.MappingNode) for item in node.value):
        values = [item.value if isinstance(item, yaml.ScalarNode) else
                  {key.removeprefix(f"{name}."): text for key, text, _ in yaml_values(item, name, path, seen)}
                  for item in node.value]
        yield name, json.dumps(values), place
    elif any(not isinstance(item, yaml.ScalarNode) for item in node.value):
        raise UserError(f"{place}: {name} must be a plain value or a list of plain values")
    else:
        yield name, ",".join(item.value for item in node.value), place


def files_read(origins):
    """The YAML files in the origins that parse() returned: those of --config, and of the resumed run."""
    others = "default", "flag ", "argument ", "environment ", "preset ", "the run of "
    return sorted({origin.rpartition(":")[0] for origin in origins.values() if not origin.startswith(others)})


def write_yaml(config, path):
    """Save a resolved configuration; --config PATH starts the same run again.

    The first line is how disk/lock.py knows that a run wrote it.
    """
    values = dataclasses.asdict(config)
    # With other characters allow_unicode would fold a Unicode line break instead of escaping it.
    is_printable = "".join(map(str, values.values())).isprintable()
    with files.replaced(path, encoding="utf-8") as f:
        print("# Settings of a run, written by sft.py; --config and this file start the same run.", file=f)
        yaml.safe_dump(values, f, sort_keys=False, allow_unicode=is_printable)


def json_text(config):
    """A configuration as JSON that read_yaml reads too: without pairs of surrogates and raw controls."""
    text = json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False)
    is_plain = [char.isprintable() or char == "\n" or ord(char) > 0xFFFF for char in text]
    return "".join(char if plain else f"\\u{ord(char):04x}" for char, plain in zip(text, is_plain))


def help_text(cls, fields):
    """The text of --help: the docstring of cls, then its fields and the ways to write them.

    As wide as the terminal, at most 110 columns.
    """
    width = min(110, shutil.get_terminal_size((110, 24)).columns)
    lines = []

    def add(flag, text):
        if len(flag) > 22:
            lines.append(f"  {flag}")
            flag = ""
        lines.extend(textwrap.wrap(text, width, initial_indent=f"  {flag:24}", subsequent_indent=" " * 26))

    for paragraph in inspect.cleandoc(cls.__doc__).split("\n\n"):
        lines += [*textwrap.wrap(paragraph, width), ""]
    lines.pop()
    for f in fields.values():
        if f.metadata["group"]:
            lines += ["", f.metadata["group"] + ":"]
        flag = f"--{f.name}" + (f", --no-{f.name}" if type_of(f) is bool and f.default else "")
        choices = f" ({', '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
        text = f"{f.metadata['help']}{choices} [{default_text(f)}] {f.metadata['env'] or ''}".rstrip()
        add(flag, text)
    lines += ["", "configuration:"]
    add("--config FILE", "read a YAML file with lines of name: value")
    add("--config-path DIR --config-name NAME", "the same, with Hydra's flags")
    add("name=value", "same as --name value")
    if any(f.metadata["env"] for f in fields.values()):
        add("a.b=value, +a.b=[x,y]", "a key of verl, here and in files (docs/verl.md)")
        add("--environment", "read variables in CAPITALS, and CONFIG; train.sh adds this")
    for field, value in [(f.name, preset) for f in fields.values() for preset in f.metadata["presets"]]:
        add(f"{field}={value}", f"applies configs/{value}.yaml; only defaults have lower precedence")
    add("--explain", "print every value and where it came from, then exit")
    return "\n".join(lines)


def default_text(field):
    if field.default is None:
        return "none"
    return str(field.default).lower() if type_of(field) is bool else str(field.default)
