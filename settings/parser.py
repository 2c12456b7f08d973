"""Flags, YAML files and a.b=c overrides -> one flat dataclass, which sft.py declares.

Owns spelling: every way to write a setting ends here, is checked against the dataclass's types and choices, and
remembers where it came from. Strength: flag or override > environment > YAML > default; of two flags the later wins.
An unknown name is an error that names the nearest one. verl.py, imported when a name is not ours, knows others'. The
environment counts from where the word --environment stands, which train.sh puts before the flags.
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

from settings.errors import UserError

LARGEST_YAML = 2**18  # bytes: verl's whole configuration has 40,000


def knob(default, help, choices=(), group=None, env=None, low=-1e18, high=1e18, needs=None, unless=None):
    """A field of the flat dataclass.

    group      begins a section of --help, at the first knob of that section
    env        the environment variable that sets it
    low, high  least and largest value of a number, which is finite at any rate
    needs      the knobs without which it does nothing, as in "plan", "val_data or sample_prompts", "ranks and tp"
    """
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, group=group, env=env, low=low,
                                                            high=high, needs=needs))


def check(config):
    """Raise ValueError for a value outside its knob's range, or one that does nothing as another knob is not set."""
    given = {f.name: f for f in dataclasses.fields(config) if getattr(config, f.name) != f.default}
    for name, f in given.items():
        value, low, high = getattr(config, name), f.metadata["low"], f.metadata["high"]
        said = f"--no-{name}" if value is False else f"--{name} {value}"
        if isinstance(value, (int, float)) and not low <= value <= high:
            most = f" and at most {high}" if high < 1e18 or value > high else ""
            raise UserError(f"{said}: it must be at least {low}{most}")
        for need in f.metadata["needs"].split(" and ") if f.metadata["needs"] else ():
            if not given.keys() & need.split(" or "):
                raise UserError(f"{said} does nothing without --{need.replace(' or ', ' or --')}")


def parse(cls, argv, positional=()):
    """Build cls from command-line words; return it with a dict field name -> where its value came from.

    positional  fields that the first words without a flag set, in this order

    Accepts --x v, --x=v, --x and --no-x for booleans, a.b=c (also with a leading +, ++ or --, and c a list [x,y]),
    --config FILE and --config-path DIR --config-name NAME, --environment. Handles --help and --explain, which print and
    exit. Prints verl's names that change nothing, on rank 0.

    Raises ValueError for an unknown name, a value of the wrong type, a value that is none of the choices.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    show = print if os.environ.get("RANK", "0") == "0" else (lambda *text, **options: None)  # one process of torchrun's
    if "--help" in argv or "-h" in argv:
        show(help_text(cls, fields))
        sys.exit(0)
    explain, settings, files, default_file = False, [], {}, None
    words, positional = list(argv), list(positional)
    while words:
        word = words.pop(0)
        name, equals, value = word.lstrip("+-").partition("=")
        if word == "--explain":
            explain = True
        elif word == "--environment":
            settings = [(field, value, origin.replace("flag", "preset", 1)) for field, value, origin in settings]
            settings += environment(fields)
            default_file = os.environ.get("CONFIG")
        elif positional and not word.startswith("-") and not equals:
            settings.append((positional.pop(0), word, f"word {word}"))
        elif not word.startswith("--") and not equals:
            raise UserError(f"{word!r:.200} is neither a flag (--name value) nor an override (name=value)")
        elif name in ("config", "config-path", "config-name"):
            files[name] = value if equals else take_value(words, name)
        elif name.startswith("no-") and not equals:
            field = field_name(name[3:], fields)
            if field not in fields or fields[field].type is not bool:
                raise UserError(f"{word}: {field} can't be negated, it isn't true or false; give a value")
            settings.append((field, "false", f"flag {word}"))
        else:
            field = field_name(name, fields)
            # a boolean may stand alone: its next word is its value only if it reads as one
            alone = field in fields and fields[field].type is bool and (not words or words[0].lower() not in BOOLEANS)
            if not equals:
                value = "true" if alone else take_value(words, name)
            if field not in fields or not word.startswith("--"):
                value = without_brackets(value)
            settings.append((field, value, f"flag {word}"))

    path = files.get("config")
    if path and len(files) > 1:
        raise UserError("--config and --config-path or --config-name name two files; give one")
    if "config-path" in files or "config-name" in files:
        path = os.path.join(files.get("config-path", "."), files.get("config-name", "config"))
        path += "" if os.path.exists(path) or path.endswith(".yaml") else ".yaml"
    path = path or default_file
    from_file = read_yaml(path, fields) if path else []
    settings, warnings = ours(from_file + settings, fields)
    values, origins = {}, {name: "default" for name in fields}
    for name, value, origin in settings:
        value = convert(fields[name], value, origin)
        if path and origin.startswith(f"{path}:") and name in values and values[name] != value:
            raise UserError(f"{origin}: {name} is {value} here, and {values[name]} at {origins[name]}; leave one out")
        values[name], origins[name] = value, origin
        if origin == "environment WANDB_PROJECT" and "wandb" not in values.get("logger", "").split(","):
            values["logger"] = f"{values.get('logger', fields['logger'].default)},wandb"
            origins["logger"] = origin
    config = cls(**values)
    for warning in warnings:
        show(f"warning: {warning}", file=sys.stderr)
    if explain:
        width = max(map(len, fields))
        for name in fields:
            show(f"{name:{width}} = {getattr(config, name)!s:28} {origins[name]}")
        sys.exit(0)
    return config, origins


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
    known = {f.metadata["env"]: name for name, f in fields.items() if f.metadata["env"]}
    return [(field, os.environ[name], f"environment {name}") for name, field in known.items() if os.environ.get(name)]


def field_name(name, fields):
    """The field that a name means or, if it is one of verl's, the key of verl.py's tables."""
    known = name.replace("-", "_")
    if known in fields:
        return known
    from settings import verl  # only here: most runs are in our own words

    key = verl.key_of(name)
    if verl.row_of(key) and verl.FIELDS <= fields.keys():
        return key
    near = difflib.get_close_matches(known, [*fields, *verl.ELSEWHERE], n=1, cutoff=0.6)
    if verl.FIELDS <= fields.keys() and ("." in name or not near):
        near = difflib.get_close_matches(key, [*verl.TAKEN, *verl.WARNED, *verl.REFUSED], n=1, cutoff=0.6) or near
    near = [verl.ELSEWHERE.get(n, n) for n in near if verl.ELSEWHERE.get(n, n) in fields or n not in verl.ELSEWHERE]
    raise UserError(f"unknown setting {name!r:.200}" + (f"; the nearest is {near[0]!r}" if near else "")
                    + "; --help lists them all")


def ours(settings, fields):
    """Settings by field or key of verl.py, in order of strength -> by field, and warnings of what changes nothing."""
    foreign = {name: (value, origin, i) for i, (name, value, origin) in enumerate(settings) if name not in fields}
    if not foreign:
        return settings, []
    from settings import verl

    translated, warnings = verl.translate(foreign)
    found = [[(name, value, origin)] if name in fields else [] for name, value, origin in settings]
    for i, field, value in translated:
        # null of a setting that can't be empty asks for what there is without it
        if value != "none" or types.NoneType in typing.get_args(fields[field].type):
            found[i].append((field, value, settings[i][2]))
    return [setting for group in found for setting in group], warnings


BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def convert(field, value, origin):
    """Turn the text of a value into the field's type."""
    kinds = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
    rule = f"{origin}: {field.name} can't be {value!r:.200}; it must be "
    if value.lower() in ("none", "null", "~", "", "{}"):
        if types.NoneType in kinds:
            return None
        raise UserError(rule + f"{kinds[0].__name__}, not empty")
    if kinds[0] is bool:
        if value.lower() not in BOOLEANS:
            raise UserError(rule + "true or false")
        return BOOLEANS[value.lower()]
    if kinds[0] in (int, float):
        try:
            return kinds[0](value)
        except ValueError:
            raise UserError(rule + ("a whole number" if kinds[0] is int else "a number")) from None
    choices = field.metadata["choices"]
    if choices and value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        raise UserError(rule + f"one of {', '.join(choices)}" + (f" (nearest: {near[0]})" if near else ""))
    return value


def read_yaml(path, fields):
    """Settings of a YAML file as (field, text, file:line). Nested keys read as a.b; lists join with commas.

    Only scalars' text is taken and then converted as a flag's would be: no tag is ever constructed, and an alias, by
    which a short file can mean billions of values, is refused.
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
        raise UserError(f"{path}: lists or settings are nested hundreds deep; a setting is name: value, or a.b.c at "
                        "most") from error
    settings, seen = [], set()

    def walk(node, name):
        where = f"{path}:{node.start_mark.line + 1}"
        if id(node) in seen:
            raise UserError(f"{where}: anchors and aliases are not supported; write the value out")
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            if name and not node.value:
                settings.append((name, "{}", where))
            keys = collections.Counter(str(key.value) for key, _ in node.value)
            if keys and (most := keys.most_common(1)[0])[1] > 1:
                raise UserError(f"{where}: {most[0]:.200} is there twice")
            for key, value in node.value:
                walk(value, f"{name}.{key.value}".lstrip("."))
        elif isinstance(node, yaml.SequenceNode):
            if name == "defaults":  # Hydra's list of other files
                settings.append((name, "a list", where))
            elif any(not isinstance(item, yaml.ScalarNode) for item in node.value):
                raise UserError(f"{where}: {name} must be a plain value or a list of plain values")
            else:
                settings.append((name, ",".join(item.value for item in node.value), where))
        else:
            settings.append((name, node.value, where))

    if root is not None:
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path}: the file must be `name: value` lines")
        walk(root, "")
    found = []
    for name, value, where in settings:
        try:
            field = field_name(name, fields)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
        found.append((field, value, where if field in fields else f"{where} {name}"))
    return found


def write_yaml(config, path):
    """Save a resolved configuration; --config PATH starts the same run again."""
    values = dataclasses.asdict(config)
    readable = "".join(map(str, values.values())).isprintable()  # a line break of Unicode would be folded, not escaped
    with open(path, "w", encoding="utf-8") as f:
        yaml.safe_dump(values, f, sort_keys=False, allow_unicode=readable)


def help_text(cls, fields):
    lines = [inspect.cleandoc(cls.__doc__)]
    for f in fields.values():
        if f.metadata["group"]:
            lines += ["", f.metadata["group"] + ":"]
        flag = f"--{f.name}" + (f", --no-{f.name}" if f.type is bool and f.default else "")
        choices = f" ({', '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
        default = "none" if f.default is None else str(f.default).lower() if f.type is bool else f.default
        text = f"{f.metadata['help']}{choices} [{default}] {f.metadata['env'] or ''}".rstrip()
        if len(flag) > 22:
            lines.append(f"  {flag}")
            flag = ""
        lines += textwrap.wrap(text, 110, initial_indent=f"  {flag:24}", subsequent_indent=" " * 26)
    lines += ["", "configuration:", "  --config FILE           read a YAML file, name: value a line",
              "  --config-path DIR --config-name NAME", "                          the same, in Hydra's words",
              "  name=value              as --name value"]
    if any(f.metadata["env"] for f in fields.values()):
        lines += ["  a.b=value, +a.b=[x,y]   the same in verl's words, as its files are (docs/verl.md)",
                  "  --environment           read the variables in CAPITALS above, and CONFIG; train.sh does"]
    lines.append("  --explain               print every value and where it came from, start nothing")
    return "\n".join(lines)


