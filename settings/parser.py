"""Flags, YAML files, environment variables and a.b=c overrides -> one flat dataclass, which sft.py declares.

Owns spelling: every way to write a setting ends here, is checked against the dataclass's types, choices and
ranges, and remembers where it came from. Precedence: flag or override > environment > --config file > preset
> default; of two flags the later wins. An unknown name is an error that names the nearest one. verl.py knows
the names of other trainers.

The environment is read where the word --environment is given, as train.sh does.
"""

import collections
import dataclasses
import difflib
import inspect
import os
import re
import sys
import textwrap
import types
import typing

import yaml

from settings import verl
from settings.errors import UserError
from settings.venv import PROJECT

LARGEST_YAML = 2**18  # bytes: verl's whole configuration has 40,000
BOOLEANS = {"true": True, "yes": True, "on": True, "1": True,
            "false": False, "no": False, "off": False, "0": False}
FILE_FLAGS = ("config", "config-path", "config-name")
# Settings of tools/plan.py that sft.py had once: config.yaml of an older run has them, switched off.
MOVED = ("plan", "memory_gb", "ranks", "tflops", "gb_per_second", "tp_gb_per_second")


def setting(default, help, choices=(), *, group=None, env=None, low=-1e18, high=1e18, needs="", unless="",
         presets=()):
    """A field of the flat dataclass.

    group      begins a section of --help, at the first knob of that section
    env        the environment variable that sets it
    low, high  least and largest value of a number, which is finite at any rate
    needs      the knobs without which it has no effect: "val_data or sample_prompts", "n_gpus and tp"
    unless     the knobs with which it does not work: "tp or lora_dora", "scheduler=constant"
    presets    values for which configs/VALUE.yaml is applied; only the defaults are weaker
    """
    return dataclasses.field(default=default, metadata=dict(
        help=help, choices=choices, group=group, env=env, low=low, high=high, needs=needs, unless=unless,
        presets=presets))


# ------------------------------------------------------------------------------------------------------------
# values outside their range, and settings without effect


def check(config):
    """Check the values of a config; its __post_init__ calls this. parse() checks flags and variables as well.

    Raises UserError for a value outside its knob's range, or one without effect as another knob is (not) set.
    """
    fields = {f.name: f for f in dataclasses.fields(config)}
    check_values(fields, {name: getattr(config, name) for name in fields})


def check_values(fields, values, given=(), origins=None):
    """As check(), of {field: value}.

    given    fields that count as set though they may have their default: a flag or the environment sets them
    origins  {field: where its value came from}, so that an error about a variable names it
    """
    changed = {name for name, f in fields.items() if values[name] != f.default}
    for name, field in fields.items():
        value, variable = values[name], field.metadata["env"]
        from_environment = origins is not None and origins[name] == f"environment {variable}"
        said = f"--{name} {'none' if value is None else value}"
        if value in (True, False) and field.type is bool:
            said = f"--{name}" if value else f"--no-{name}"
        if from_environment:
            said = f"{variable}={value}"
        check_range(said, value, field)
        if name not in changed and not (name in given and value):  # off, and said to be off
            continue
        if need := unmet_need(field, changed):
            raise UserError(f"{said} has no effect without {need}; unset it or add {need}" if from_environment
                            else f"{said} does nothing without {need}")
        if other := excluded_by(field, values, changed):
            raise UserError(f"{said} does not work with {other}; leave one of them out")


def check_range(said, value, field):
    low, high = field.metadata["low"], field.metadata["high"]
    if isinstance(value, (int, float)) and not low <= value <= high:  # neither holds for nan
        most = f" and at most {high}" if high < 1e18 or value > high else ""
        raise UserError(f"{said}: it must be at least {low}{most}")


def unmet_need(field, changed):
    """What a setting needs and does not have, as flags: "--a or --b"; "" if it has all."""
    for need in filter(None, field.metadata["needs"].split(" and ")):
        if not changed & set(need.split(" or ")):
            return "--" + need.replace(" or ", " or --")
    return ""


def excluded_by(field, values, changed):
    """The first setting that a setting does not work with, as a flag; "" if none is set."""
    for name in filter(None, field.metadata["unless"].split(" or ")):
        name, has_value, value = name.partition("=")
        if has_value and values[name] == value:
            return f"--{name} {value}"
        if not has_value and name in changed:
            return f"--{name}"
    return ""


# ------------------------------------------------------------------------------------------------------------
# parse, and its steps in their order


def parse(cls, argv, positional=()):
    """Build cls from command-line words; return it with a dict field name -> where its value came from.

    positional  fields that the first words without a flag set, in this order

    Accepts --x v, --x=v, --x and --no-x for booleans, a.b=c (also with a leading +, ++ or --, and c a list
    [x,y]), --config FILE and --config-path DIR --config-name NAME, --environment. Handles --help and
    --explain, which print and exit. Prints verl's names that change nothing, on rank 0.

    Raises UserError for an unknown name, a value of the wrong type, one that is none of the choices or
    outside its range, and a setting that has no effect beside the others.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if "--help" in argv or "-h" in argv:
        show(help_text(cls, fields))
        sys.exit(0)
    line = read_words(argv, fields, positional)
    path = config_path(line.files)
    from_file = read_yaml(path, fields) if path else []
    settings, warnings = translated([*from_file, *line.environment, *line.flags], fields)
    values, origins, given = resolve(settings, fields)
    apply_presets(values, origins, fields)
    values = {name: values.get(name, field.default) for name, field in fields.items()}
    origins = {name: origins.get(name, "default") for name in fields}
    check_values(fields, values, given, origins)
    config = cls(**values)
    for warning in warnings:
        show(f"warning: {warning}", file=sys.stderr)
    if line.explain:
        width = max(map(len, fields))
        for name in fields:
            show(f"{name:{width}} = {getattr(config, name)!s:28} {origins[name]}")
        sys.exit(0)
    return config, origins


def show(text, file=None):
    """Print, in one process of torchrun's."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=file)


class Assignment(typing.NamedTuple):
    """A setting as it is written somewhere."""

    name: str  # a field or, until translated(), a key of verl's
    text: str
    source: str  # "file", "environment" or "flag"
    origin: str  # as --explain shows it
    is_verls: bool = False  # translated from a key of verl's


@dataclasses.dataclass
class CommandLine:
    flags: list = dataclasses.field(default_factory=list)  # a later one wins
    environment: list = dataclasses.field(default_factory=list)
    files: dict = dataclasses.field(default_factory=dict)  # {one of FILE_FLAGS, or CONFIG: its value}
    explain: bool = False


def read_words(argv, fields, positional):
    line, words, positional = CommandLine(), list(argv), list(positional)
    while words:
        word = words.pop(0)
        name, equals, value = word.lstrip("+-").partition("=")
        if word == "--explain":
            line.explain = True
        elif word == "--environment":
            line.environment = environment(fields)
            line.files["CONFIG"] = os.environ.get("CONFIG")
        elif positional and not word.startswith("-") and not equals:
            line.flags.append(Assignment(positional.pop(0), word, "flag", f"word {word}"))
        elif not word.startswith("--") and not equals:
            raise UserError(f"{word!r:.200} is neither a flag (--name value) nor an override (name=value)")
        elif name in FILE_FLAGS:
            line.files[name] = value if equals else take_value(words, name)
        else:
            line.flags.append(Assignment(*read_setting(word, words, fields), "flag", f"flag {word}"))
    return line


def read_setting(word, words, fields):
    """(name, text) of the setting in this word; where its value is the next word, it is taken off words."""
    name, equals, value = word.lstrip("+-").partition("=")
    if name.startswith("no-") and not equals:
        field = field_name(name[3:], fields)
        if field not in fields or fields[field].type is not bool:
            raise UserError(f"{word}: {field} can't be negated, it isn't true or false; give a value")
        return field, "false"
    field = field_name(name, fields)
    is_bool = field in fields and fields[field].type is bool
    if not equals and is_bool and (not words or words[0].lower() not in BOOLEANS):
        value = "true"  # it stands alone: the next word is its value only if it reads as one
    elif not equals:
        value = take_value(words, name)
    if field not in fields or not word.startswith("--"):
        value = without_brackets(value)
    return field, value


def take_value(words, name):
    if not words or (words[0].startswith("--") and len(words[0]) > 2):
        raise UserError(f"--{name} needs a value")
    return words.pop(0)


def without_brackets(value):
    """[a,'b'] of an override as a,b: a list as a file's is read."""
    match = re.fullmatch(r"\[([^\[\]]*)\]", value)
    return ",".join(item.strip().strip("'\"") for item in match[1].split(",")) if match else value


def environment(fields):
    """What the environment sets. An empty variable is none."""
    variables = [(f.metadata["env"], name) for name, f in fields.items()]
    return [Assignment(name, os.environ[variable], "environment", f"environment {variable}")
            for variable, name in variables if variable and os.environ.get(variable)]


def config_path(files):
    """The YAML file to read, or None. A flag's takes the place of the environment's."""
    if "config" in files and ("config-path" in files or "config-name" in files):
        raise UserError("--config and --config-path or --config-name name two files; give one")
    if "config-path" in files or "config-name" in files:
        path = os.path.join(files.get("config-path", "."), files.get("config-name", "config"))
        return path if os.path.exists(path) or path.endswith(".yaml") else path + ".yaml"
    return files.get("config") or files.get("CONFIG")


def translated(settings, fields):
    """Settings with verl's keys translated into ours, and the warnings about what of them changes nothing."""
    foreign = {s.name: (s.text, s.origin, i) for i, s in enumerate(settings) if s.name not in fields}
    if not foreign:
        return settings, []
    ours, warnings = verl.translate(foreign)
    found = [[setting] if setting.name in fields else [] for setting in settings]
    for i, name, text in ours:
        # null of a setting that can't be empty asks for what there is without it
        if text != "none" or types.NoneType in typing.get_args(fields[name].type):
            found[i].append(settings[i]._replace(name=name, text=text, is_verls=True))
    return [setting for group in found for setting in group], warnings


def resolve(settings, fields):
    """Settings, the weakest first -> {field: value}, {field: origin}, and the set of fields given explicitly.

    A flag or the environment gives a setting explicitly, but not by a name of verl's, whose commands repeat
    defaults, and not by taking back what a file says.
    """
    values, origins, given, last = {}, {}, set(), {}
    for setting in settings:
        name, default = setting.name, fields[setting.name].default
        value = convert(fields[name], setting.text, setting.origin)
        if name in last and last[name].source == setting.source == "file" and values[name] != value:
            raise UserError(f"{setting.origin}: {name} is {value} here, and {values[name]} at {origins[name]}"
                            "; leave one out")
        resets = value == default != values.get(name, default)
        given.discard(name)
        if setting.source in ("flag", "environment") and not setting.is_verls and not resets:
            given.add(name)
        values[name], origins[name], last[name] = value, setting.origin, setting
        if setting.origin == "environment WANDB_PROJECT":
            add_wandb(values, origins, fields)
    return values, origins, given


def add_wandb(values, origins, fields):
    """WANDB_PROJECT asks for wandb as well; a flag that names the loggers comes later."""
    loggers = values.get("logger", fields["logger"].default)
    if "wandb" not in loggers.split(","):
        values["logger"], origins["logger"] = f"{loggers},wandb", "environment WANDB_PROJECT"


def apply_presets(values, origins, fields):
    """Where a field's value NAME is a preset, add to values what only configs/NAME.yaml says.

    What would have no effect is skipped, such as a setting of LoRA without LoRA.
    """
    for field in fields.values():
        name = values.get(field.name, field.default)
        if name not in field.metadata["presets"]:
            continue
        for setting in read_yaml(os.path.join(PROJECT, "configs", f"{name}.yaml"), fields):
            target = fields[setting.name]
            resolved = {n: values.get(n, f.default) for n, f in fields.items()}
            changed = {n for n, value in resolved.items() if value != fields[n].default}
            has_effect = not unmet_need(target, changed) and not excluded_by(target, resolved, changed)
            if target.name not in values and has_effect:
                values[target.name] = convert(target, setting.text, setting.origin)
                origins[target.name] = f"preset configs/{name}.yaml"


def field_name(name, fields):
    """The field that a name means or, if it is one of verl's, the key of verl.py's tables."""
    known = name.replace("-", "_")
    if known in fields:
        return known
    if known in MOVED:
        raise UserError(f"{name} is no setting here: tools/plan.py plans; see python tools/plan.py --help")
    key = verl.key_of(name)
    knows_verl = verl.fields_set() <= fields.keys()  # chat.py has no settings of training
    if knows_verl and verl.row_name(key):
        return key
    others = verl.elsewhere()
    near = difflib.get_close_matches(known, [*fields, *others], n=1, cutoff=0.6)
    if knows_verl and ("." in name or not near):
        near = difflib.get_close_matches(key, verl.rows(), n=1, cutoff=0.6) or near
    near = [others.get(n, n) for n in near if n not in others or others[n] in fields]
    raise UserError(f"unknown setting {name!r:.200}" + (f"; the nearest is {near[0]!r}" if near else "")
                    + "; --help lists them all")


def convert(field, text, origin):
    """Turn the text of a value into the field's type."""
    kinds = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
    rule = f"{origin}: {field.name} can't be {text!r:.200}; it must be "
    if text.lower() in ("none", "null", "~", "", "{}"):
        if types.NoneType in kinds:
            return None
        raise UserError(rule + f"{kinds[0].__name__}, not empty")
    if kinds[0] is bool:
        if text.lower() not in BOOLEANS:
            raise UserError(rule + "true or false")
        return BOOLEANS[text.lower()]
    if kinds[0] in (int, float):
        try:
            return kinds[0](text)
        except ValueError:
            raise UserError(rule + ("a whole number" if kinds[0] is int else "a number")) from None
    choices = field.metadata["choices"]
    if choices and text not in choices:
        near = difflib.get_close_matches(text, choices, n=1)
        raise UserError(rule + f"one of {', '.join(choices)}" + (f" (nearest: {near[0]})" if near else ""))
    return text


# ------------------------------------------------------------------------------------------------------------
# YAML files and --help


def read_yaml(path, fields):
    """Settings of a YAML file. Nested keys read as a.b; lists join with commas.

    Only scalars' text is taken and then converted as a flag's would be: no tag is ever constructed, and an
    alias, by which a short file can mean billions of values, is refused.
    """
    with open(path, "rb") as f:
        content = f.read(LARGEST_YAML + 1)
    if len(content) > LARGEST_YAML:
        raise UserError(f"{path} has more than {LARGEST_YAML:,} bytes, so it is no file of settings")
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
    settings = []
    for name, text, where in list(yaml_values(root, "", path, set())):  # the file's form is checked first
        if name in MOVED and name not in fields and text in ("false", "null"):
            continue
        try:
            field = field_name(name, fields)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        settings.append(Assignment(field, text, "file", where if field in fields else f"{where} {name}"))
    return settings


def yaml_values(node, name, path, seen):
    """Yield (name with dots, text, file:line) of what is below a node of a YAML file.

    seen  ids of the nodes before it: one that comes again is an alias
    """
    where = f"{path}:{node.start_mark.line + 1}"
    if id(node) in seen:
        raise UserError(f"{where}: anchors and aliases are not supported; write the value out")
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        if name and not node.value:
            yield name, "{}", where
        for key, times in collections.Counter(str(key.value) for key, _ in node.value).items():
            if times > 1:
                raise UserError(f"{where}: {key:.200} is there twice")
        for key, value in node.value:
            yield from yaml_values(value, f"{name}.{key.value}".lstrip("."), path, seen)
    elif isinstance(node, yaml.ScalarNode):
        yield name, node.value, where
    elif name == "defaults":  # Hydra's list of other files
        yield name, "a list", where
    elif any(not isinstance(item, yaml.ScalarNode) for item in node.value):
        raise UserError(f"{where}: {name} must be a plain value or a list of plain values")
    else:
        yield name, ",".join(item.value for item in node.value), where


def write_yaml(config, path):
    """Save a resolved configuration; --config PATH starts the same run again."""
    values = dataclasses.asdict(config)
    # a line break of Unicode would be folded, not escaped
    readable = "".join(map(str, values.values())).isprintable()
    with open(path, "w", encoding="utf-8") as f:
        yaml.safe_dump(values, f, sort_keys=False, allow_unicode=readable)


def help_text(cls, fields):
    lines = [inspect.cleandoc(cls.__doc__)]
    for f in fields.values():
        if f.metadata["group"]:
            lines += ["", f.metadata["group"] + ":"]
        flag = f"--{f.name}" + (f", --no-{f.name}" if f.type is bool and f.default else "")
        choices = f" ({', '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
        text = f"{f.metadata['help']}{choices} [{default_text(f)}] {f.metadata['env'] or ''}".rstrip()
        if len(flag) > 22:
            lines.append(f"  {flag}")
            flag = ""
        lines += textwrap.wrap(text, 110, initial_indent=f"  {flag:24}", subsequent_indent=" " * 26)
    lines += ["", "configuration:", "  --config FILE           read a YAML file, name: value a line",
              "  --config-path DIR --config-name NAME",
              "                          the same, in Hydra's words",
              "  name=value              as --name value"]
    if any(f.metadata["env"] for f in fields.values()):
        lines += ["  a.b=value, +a.b=[x,y]   the same in verl's words, as its files are (docs/verl.md)",
                  "  --environment           read the variables in CAPITALS above, and CONFIG; train.sh does"]
    for field, value in [(f.name, preset) for f in fields.values() for preset in f.metadata["presets"]]:
        lines.append(f"  {f'{field}={value}':22}  applies configs/{value}.yaml; only the defaults are weaker")
    lines.append("  --explain               print every value and where it came from, start nothing")
    return "\n".join(lines)


def default_text(field):
    if field.default is None:
        return "none"
    return str(field.default).lower() if field.type is bool else str(field.default)
