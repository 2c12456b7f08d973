"""Every way to write a setting, the order of precedence, and the error for each mistake."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, first
from hypothesis import given, settings
from hypothesis import strategies as st

import chat
import data
import make_config
import sft
from ops import packing
from settings import errors, parser
from text.template import ChatTokenizer

FIELDS = dataclasses.fields(sft.Config)
DEFAULTS = dataclasses.asdict(sft.Config())


def parse(*arguments):
    return parser.parse(sft.Config, list(arguments))[0]


def changed(*arguments):
    """What these arguments change: {name: value} of all fields that are not at their default."""
    values = dataclasses.asdict(parse(*arguments))
    return {name: value for name, value in values.items() if value != DEFAULTS[name]}


@pytest.fixture
def yaml_file(tmp_path):
    """A function: text -> path of a YAML file with that text."""

    def write(text, name="run.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


# ------------------------------------------------------------------------------------------------------------
# spellings


def test_without_arguments_all_is_default():
    """Every field has the default of its declaration, and the origin "default"."""
    parsed, origins = parser.parse(sft.Config, [])
    assert parsed == sft.Config()
    assert origins == {field.name: "default" for field in FIELDS}


@pytest.mark.parametrize("arguments", [
    ["--seed", "7"], ["--seed=7"], ["seed=7"], ["+seed=7"], ["++seed=7"], ["trainer.seed=7"],
    ["+trainer.seed=7"],
    ["++trainer.seed=7"], ["--trainer.seed=7"], ["--trainer.seed", "7"], ["--seed", " 7 "]], ids=" ".join)
def test_a_number_in_every_spelling(arguments):
    """--x v, --x=v, x=v, a.b=c and --a.b, with or without Hydra's plus signs, mean the same."""
    assert changed(*arguments) == {"seed": 7}


@pytest.mark.parametrize("text, value", [("16", 16), ("16.0", 16), ("16.", 16), ("1e3", 1000), ("1.6E1", 16),
                                         ("+2e+2", 200), ("1_000", 1000), (" 7.0 ", 7),
                                         ("9007199254740993", 2**53 + 1)])
def test_a_whole_number_may_be_written_as_a_float(text, value, yaml_file, monkeypatch):
    """On the command line, in a file and in the environment; also where a word is allowed."""
    monkeypatch.setenv("LORA_ALPHA", text)
    for name in ("lora_alpha", "seed", "max_steps", "micro_batch_size"):
        needs = ("--use_lora",) if name == "lora_alpha" else ()
        path = yaml_file(f"{name}: {text}\n")
        for arguments in (f"--{name}={text}",), (f"{name}={text}",), ("--config", path):
            found = getattr(parse(*needs, *arguments), name)
            assert found == value and type(found) is int, (name, arguments)
    found = parse("--environment", "--use_lora").lora_alpha
    assert found == value and type(found) is int


def test_a_fraction_with_a_whole_default(yaml_file):
    """A whole value stays an int, so that banners and config.yaml say 3 and not 3.0."""
    @dataclasses.dataclass
    class Config:
        epochs: float = parser.setting(3, "passes", low=0)

    path = yaml_file("")
    for text, value in (("0.5", 0.5), ("3", 3), ("3.0", 3), ("2e0", 2), ("1e-2", 0.01)):
        config, _ = parser.parse(Config, ["--epochs", text])
        assert config.epochs == value and type(config.epochs) is type(value)
        parser.write_yaml(config, path)
        with open(path, encoding="utf-8") as f:
            assert f.read().splitlines()[1:] == [f"epochs: {value}"]
        assert parser.parse(Config, ["--config", path])[0] == config
    for text in ("1e300", "nan", "inf", "half"):
        with pytest.raises(ValueError, match="epochs"):
            parser.parse(Config, ["--epochs", text])


@pytest.mark.parametrize("arguments, packing", [
    (["--packing"], True), (["--packing", "true"], True), (["--packing=true"], True),
    (["--packing", "YES"], True),
    (["--packing=1"], True), (["packing=on"], True), (["--no-packing"], False),
    (["--packing", "false"], False),
    (["--packing=false"], False), (["--packing=False"], False), (["--packing", "0"], False),
    (["packing=no"], False),
    (["++packing=off"], False)], ids=str)
def test_a_boolean_in_every_spelling(arguments, packing):
    """A boolean may have no value, be negated, or have a value. The argument after it is the next flag."""
    for before, after in (("--seed=5", "--lr=1"), ("seed=5", "lr=1")):
        parsed = parse(before, *arguments, after)
        assert (parsed.packing, parsed.seed, parsed.lr) == (packing, 5, 1.0)


@pytest.mark.parametrize("arguments, value", [
    (["--gradient_checkpointing"], True), (["--no-gradient_checkpointing"], False),
    (["--gradient_checkpointing", "auto"], "auto"), (["--gradient_checkpointing=auto"], "auto"),
    (["gradient_checkpointing=auto"], "auto"), (["--gradient_checkpointing", "AUTO"], "auto"),
    (["model.enable_gradient_checkpointing=auto"], "auto"),
    (["--gradient_checkpointing", "false"], False), (["gradient_checkpointing=true"], True)], ids=str)
def test_a_boolean_or_a_word_in_every_spelling(arguments, value):
    """A setting that may be auto is written like a boolean, and like any other value."""
    for before, after in (("--seed=5", "--lr=1"), ("seed=5", "lr=1")):
        parsed = parse(before, *arguments, after)
        assert (parsed.gradient_checkpointing, parsed.seed, parsed.lr) == (value, 5, 1.0)


def test_a_word_in_a_file_and_in_the_environment(yaml_file, monkeypatch):
    """Like any value; config.yaml of a run has it too. An integer or a boolean stays what it is."""
    path = yaml_file("micro_batch_size: auto\ngradient_checkpointing: auto\ncompile: false\n")
    expected = {"micro_batch_size": "auto", "gradient_checkpointing": "auto", "compile": False}
    assert changed("--config", path) == expected
    parser.write_yaml(parse("--config", path), path)
    assert changed("--config", path) == expected
    for name in ("MICRO_BATCH_SIZE", "GRADIENT_CHECKPOINTING"):
        monkeypatch.setenv(name, "auto")
    monkeypatch.setenv("COMPILE", "false")
    assert changed("--environment") == expected
    monkeypatch.setenv("MICRO_BATCH_SIZE", "3")
    assert changed("--environment")["micro_batch_size"] == 3


def test_a_word_that_is_the_default_and_a_setting_that_is_off_have_no_conflict():
    """compile does not work with tp. Its default, auto, and false do not compile, so they are no conflict."""
    tp = ("--strategy", "megatron", "--tp", "2")
    for value in ("auto", "false"):
        parse(*tp, "--compile", value)
    with pytest.raises(ValueError, match="--compile does not work with --tp"):
        parse(*tp, "--compile")


@pytest.mark.parametrize("arguments, message", [
    (["--micro_batch_size", "many"],
     "micro_batch_size can't be 'many'; it must be an integer of at least 1, or auto"),
    (["--micro_batch_size", "0"], "--micro_batch_size 0: it must be an integer of at least 1, or auto"),
    (["--micro_batch_size", "none"],
     "micro_batch_size can't be 'none'; it must be an integer of at least 1, or auto"),
    (["--gradient_checkpointing=some"],
     "gradient_checkpointing can't be 'some'; it must be true, false or auto"),
    (["--batch_size", "auto"], "batch_size can't be 'auto'; it must be an integer"),
    (["--packing", "auto"], "unknown argument 'auto'")], ids=str)
def test_a_value_that_is_neither_of_the_type_nor_the_word(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(*arguments)


def test_a_config_made_in_code_is_checked_too():
    """Not only the text of arguments."""
    for values in dict(micro_batch_size="many"), dict(gradient_checkpointing="some"), dict(compile="perhaps"):
        with pytest.raises(ValueError, match="or auto"):
            sft.Config(**values)


def test_dashes_and_underscores_name_the_same_field():
    """--batch-size is --batch_size; the same holds for negations."""
    assert changed("--batch-size", "8", "--no-gradient-checkpointing", "--train-on-prompt") == {
        "batch_size": 8, "gradient_checkpointing": False, "train_on_prompt": True}
    assert changed("--no-gradient_checkpointing") == {"gradient_checkpointing": False}


def test_values_get_the_type_of_their_field():
    """Integers are int, floats may have any notation, text is unchanged, none resets an optional setting."""
    parsed = parse("--lr", "1e-5", "--grad_clip=3", "--max_steps", "10", "--output_dir=a=b",
                   "--train_data", "x.json,y.json")
    assert (parsed.lr, parsed.grad_clip, parsed.max_steps) == (1e-5, 3.0, 10)
    assert type(parsed.grad_clip) is float and type(parsed.max_steps) is int
    assert (parsed.output_dir, parsed.train_data) == ("a=b", "x.json,y.json")
    assert parse("--model", "1e-5").model == "1e-5"
    for empty in ("none", "None", "null", "~", ""):
        assert parse("--max_steps=5", f"--max_steps={empty}").max_steps is None
        if empty:
            assert parse("--val_data=v.json", f"val_data={empty}").val_data is None
    for name in ("val_data", "resume_adapter", "resume_from", "output_dir", "tokenizer", "model"):
        for arguments in ([f"--{name}", ""], [f"--{name}="], [f"{name}="]):  # a variable that is not set
            with pytest.raises(ValueError, match=f"{name} can't be ''; it must be a non-empty text"):
                parse(*arguments, "--use_lora")


def test_keys_of_verl_set_our_settings(yaml_file):
    """verl's nested names work as override, flag and nested YAML, also with the prefixes of its RL
    configurations. test_verl.py has all keys."""
    name, expected = "actor_rollout_ref.actor.optim.lr_scheduler_type", {"scheduler": "linear"}
    for arguments in [f"{name}=linear"], [f"--{name}", "linear"], [f"+{name}=linear"]:
        assert changed(*arguments) == expected
    text = "actor_rollout_ref:\n  actor:\n    optim:\n      lr_scheduler_type: linear\n"
    assert changed("--config", yaml_file(text)) == expected


# ------------------------------------------------------------------------------------------------------------
# YAML, and precedence


@pytest.mark.parametrize("text", [
    "seed: 7\nlr: 1e-5\nmodel: m\npacking: false\n",
    "model:\n  path: m\noptim: {lr: 1.0e-05}\ntrainer:\n  seed: 7\npacking: no\n",
    "actor_rollout_ref:\n  model:\n    path: m\n  actor:\n    optim:\n      lr: 0.00001\n"
    "trainer.seed: 7\npacking: 'False'\n",
    "# a comment\n---\n\"seed\": '7'\nlr: 1E-5 # another\nmodel: \"m\"\n'packing': off\n...\n"], ids=range(4))
def test_yaml_flat_or_nested(text, yaml_file):
    """Flat, nested and dotted keys are read alike. 1e-5, which is text in YAML, is a number."""
    assert changed("--config", yaml_file(text)) == {"seed": 7, "lr": 1e-5, "model": "m", "packing": False}


def test_yaml_lists_and_null(yaml_file):
    """A list, in either notation of YAML, is joined with commas. null and ~ reset an optional setting."""
    both = ["train_data: [a.json, b.json]\nval_data: null\n",
            "train_data:\n- a.json\n- 'b.json'\nval_data: ~\nmax_steps:\n"]
    for text in both:
        assert changed("--config", yaml_file(text)) == {"train_data": "a.json,b.json"}
    assert changed("--config", yaml_file("val_data:\n  math: a.json\n  qa: b.json\n")) == {
        "val_data": '{"math": "a.json", "qa": "b.json"}'}
    assert changed("--config", yaml_file("")) == changed("--config", yaml_file("# nothing\n")) == {}


def test_flag_beats_yaml_beats_default(yaml_file):
    """Precedence: flag or override > YAML > default, wherever --config is. The origin names the source."""
    path = yaml_file("lr: 1e-3\nseed: 7\n")
    for arguments in (["--config", path, "--lr", "1e-4"], ["--lr", "1e-4", "--config", path],
                  ["optim.lr=1e-4", f"--config={path}"]):
        parsed, origins = parser.parse(sft.Config, arguments)
        assert (parsed.lr, parsed.seed, parsed.epochs) == (1e-4, 7, DEFAULTS["epochs"])
        assert (origins["seed"], origins["epochs"]) == (f"{path}:2", "default")
        assert origins["lr"].startswith("flag ")


def test_the_later_of_two_flags_wins():
    """If two arguments set one setting, the later counts, however the first is written."""
    assert parse("--lr", "1e-3", "--lr", "1e-4").lr == 1e-4
    assert parse("--lr", "1e-3", "optim.lr=1e-4").lr == 1e-4
    assert parse("optim.lr=1e-4", "lr=1e-3").lr == 1e-3
    assert parse("--no-packing", "--packing").packing and not parse("--packing", "--no-packing").packing


def test_hydra_names_a_file_by_directory_and_name(yaml_file, tmp_path, monkeypatch):
    """--config-path and --config-name find DIR/NAME.yaml, with or without the extension. Each has a default."""
    yaml_file("seed: 7\n", "mine.yaml")
    yaml_file("seed: 8\n", "config.yaml")
    directory = str(tmp_path)
    for arguments in (["--config-path", directory, "--config-name", "mine"],
                  [f"--config-path={directory}", "--config-name=mine"],
                  ["--config-name", "mine.yaml", "--config-path", directory]):
        assert parse(*arguments, "--lr=1").seed == 7
    assert parse("--config-path", directory).seed == 8
    monkeypatch.chdir(tmp_path)
    assert parse("--config-name", "mine").seed == 7


@pytest.mark.full
def test_a_configuration_survives_being_written(tmp_path):
    """write_yaml and then --config give an equal configuration; so does json_text, which is JSON too."""
    path = str(tmp_path / "config.yaml")
    characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
    text = st.text(characters, min_size=1, max_size=12).filter(
        lambda value: value.lower() not in ("none", "null", "~"))
    integer, fraction = st.integers(2, 10**9), st.floats(0, 1)

    @settings(deadline=None, derandomize=True, database=None, max_examples=100)
    @given(st.fixed_dictionaries({}, optional=dict(
        model=text, tokenizer=st.none() | text, train_data=text, val_data=text, output_dir=text,
        max_length=integer,
        too_long=st.sampled_from(["truncate", "drop", "error"]), packing=st.booleans(),
        batch_tokens=st.none() | integer,
        lr=st.floats(0, 1e18), weight_decay=st.floats(0, 10), warmup_ratio=fraction, beta2=st.floats(0, 0.999),
        scheduler=st.sampled_from(["cosine", "linear"]), min_lr_ratio=fraction, seed=st.integers(0, 10**18),
        dtype=st.sampled_from([None, "bf16", "fp32"]), max_steps=st.none() | integer)))
    def check(values):
        written = sft.Config(**values)
        parser.write_yaml(written, path)
        parsed, origins = parser.parse(sft.Config, ["--config", path])
        assert parsed == written
        assert all(origin.startswith(path) for origin in origins.values())
        as_json = tmp_path / "settings.json"
        as_json.write_text(parser.json_text(written), encoding="utf-8")
        assert parser.parse(sft.Config, ["--config", str(as_json)])[0] == written
        assert json.loads(as_json.read_text(encoding="utf-8")) == dataclasses.asdict(written)

    check()


def test_the_configuration_file_of_the_repository_is_all_defaults():
    """config.yaml, which people copy and edit, changes nothing by itself."""
    parsed, origins = parser.parse(sft.Config, ["--config", os.path.join(ROOT, "config.yaml")])
    stale = [name for name, value in dataclasses.asdict(parsed).items() if value != DEFAULTS[name]]
    assert stale == [], "config.yaml has other defaults than sft.py; type: python tests/make_config.py"


@pytest.mark.repo
def test_the_configuration_file_of_the_repository_is_complete():
    """It has every setting in its group, with its default and its help."""
    with open(os.path.join(ROOT, "config.yaml"), encoding="utf-8") as f:
        text = f.read()
    assert text == make_config.text(sft.Config), "type: python tests/make_config.py"
    assert [line for line in text.splitlines() if len(line) > 110] == []
    parsed, origins = parser.parse(sft.Config, ["--config", os.path.join(ROOT, "config.yaml")])
    assert parsed == sft.Config()
    assert [name for name, origin in origins.items() if origin == "default"] == []


@pytest.mark.parametrize("text, say", [
    ("a: &x 5\nseed: *x\n", "anchors and aliases"),
    ("seed: &s 7\nmax_steps: *s\n", ":1: anchors and aliases|:2"),
    ("optim: &o {lr: 1e-3}\nactor: *o\n", "anchors and aliases"),
    ("optim: &o\n  lr: *o\n", "anchors and aliases"),
    ("- lr\n- 1\n", "must be `name: value` lines"), ("just text\n", "must be `name: value` lines"),
    ("lr: [1, [2]]\n", ":1: lr must be a plain value or a list of plain values"),
    ("seed: 1\nlora_targets:\n - {a: b}\n", "lora_targets must be a plain value"),
    ("lr: 1\n lr: 2\n", "is not YAML: .*line 2"), ("lr: [1\n", "is not YAML: "),
    ("a: b: c\n", "is not YAML: .*line 1"),
    ("lr: 1\n---\nlr: 2\n", "is not YAML"), ("lr: \x00\n", "is not YAML"), ("\tlr: 1\n", "is not YAML"),
    ("seed: 1\nlr: fast\n", r":2: lr can't be 'fast'; it must be a number"),
    ("learning_rat: 1\n", "unknown setting"),
    ("optim:\n  lrr: 1\n", "unknown setting 'optim.lrr'; the nearest is 'optim.lr'"),
    ("packing: maybe\n", ":1: packing can't be 'maybe'; it must be true or false"),
    ("bogus: {}\n", ":1: unknown setting 'bogus'"),
    ("seed: 1\nlr: {}\n", ":2: lr can't be '{}'; it must be a number"),
    ("seed: 1\nseeds: 2\n", ":2: unknown setting 'seeds'; the nearest is 'seed'"),
    ("? [a, b]\n: 1\n", "unknown setting|is not YAML"),
    ("seed: 7\nlr: 1\nseed: 8\n", "seed")])
def test_a_wrong_yaml_file_is_named(text, say, yaml_file):
    """What can't be read, or appears twice, is an error of one line that begins with the file."""
    path = yaml_file(text)
    with pytest.raises(ValueError, match=say) as caught:
        parse("--config", path)
    assert str(caught.value).startswith(path) and "\n" not in str(caught.value)


def test_a_yaml_file_that_is_not_text_is_named(tmp_path):
    """Bytes that are not UTF-8 are an error with the file's name."""
    (tmp_path / "run.yaml").write_bytes(b"lr: \xff\xfe\n")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "run.yaml")) + " is not YAML"):
        parse("--config", str(tmp_path / "run.yaml"))


def test_two_ways_to_name_a_file_are_not_mixed(yaml_file, tmp_path):
    """--config together with --config-path or --config-name is an error: one of them would be ignored."""
    path = yaml_file("seed: 7\n")
    for arguments in (["--config-name", "run"], [f"--config-path={tmp_path}", "--config-name=run"]):
        with pytest.raises(ValueError, match="--config"):
            parse("--config", path, *arguments)


def test_a_missing_yaml_file_is_named(tmp_path):
    """The error for a file that does not exist has its name."""
    for arguments in (["--config", "no.yaml"], ["--config-path", str(tmp_path), "--config-name", "no"]):
        with pytest.raises(FileNotFoundError, match="no.yaml"):
            parse(*arguments)


@pytest.mark.parametrize("value", [
    "!!python/object/apply:os.mkdir [{path}]", "!!python/object/new:os.mkdir [{path}]",
    "!!python/object/apply:os.mkdir {{args: [{path}]}}", "!!python/name:os.system",
    "!!python/object/apply:os.mkdir\n- {path}"])
@pytest.mark.parametrize("key", ["model", "train_data", "bogus"])
def test_tags_of_yaml_run_no_code(key, value, yaml_file, tmp_path):
    """A tag that names Python code is an error or plain text."""
    path = yaml_file(f"{key}: " + value.format(path=tmp_path / "made") + "\n")
    try:
        parsed = parse("--config", path)
    except ValueError as error:
        assert path in str(error)
    else:
        assert type(parsed.model) is str and type(parsed.train_data) is str
    assert not (tmp_path / "made").exists()


# ------------------------------------------------------------------------------------------------------------
# errors for wrong arguments


@pytest.mark.parametrize("arguments, say", [
    (["--batchsize", "4"], "unknown setting 'batchsize'; the nearest is 'batch_size'"),
    (["--learning_rate=1"], "unknown setting 'learning_rate', which other trainers have: type --lr X"),
    (["--learning-rate", "1"], "unknown setting 'learning-rate', which other trainers have: type --lr X"),
    (["learning.rate=1"], "unknown setting 'learning.rate', which other trainers have: type --lr X"),
    (["--deep-speed", "a.json"], "unknown setting 'deep-speed', which other trainers have: ./train.sh --n_gpus N"),
    (["batch.size=1"], "unknown setting 'batch.size'; the nearest is 'batch_size'"),
    (["--Batch-Size", "1"], "unknown setting 'Batch-Size'; the nearest is 'batch_size'"),
    (["--LR", "1"], "unknown setting 'LR'; the nearest is 'lr'"),
    (["--max_seq_length", "9"], "type --max_length N"),
    (["--num-train-epochs", "9"], "type --epochs N"),
    (["epoch=3"], "unknown setting 'epoch'; the nearest is 'epochs'"),
    (["++optim.lrr=3"], "unknown setting 'optim.lrr'; the nearest is 'optim.lr'"),
    (["--no-pakcing"], "unknown setting 'pakcing'; the nearest is 'packing'"),
    (["--no-packing=true"], "unknown setting 'no-packing'"),
    (["--zzzzzz", "1"], "unknown setting 'zzzzzz'; --help lists them all"),
    (["--__class__", "1"], "unknown setting '__class__'"),
    (["lr"], "unknown argument 'lr'; did you mean --lr"), (["-lr"], r"argument '-lr'; did you mean --lr\?"),
    (["--packing", "maybe"], "unknown argument 'maybe'; --packing must be true or false"),
    (["-v"], "unknown argument '-v'"), (["--lr", "1", "2"], "unknown argument '2'"),
    (["--lr"], "--lr needs a value"), (["--lr", "--seed", "3"], "--lr needs a value"),
    (["--config"], "--config needs a value"), (["--config-name", "--lr=1"], "--config-name needs"),
    (["--max_steps"], "--max_steps needs a value"),
    (["--lr", "fast"], "flag --lr: lr can't be 'fast'; it must be a number"),
    (["--seed=1.5"], "flag --seed=1.5: seed can't be '1.5'; it must be an integer"),
    (["--max_steps", "1.5e0"], "max_steps can't be '1.5e0'; it must be an integer"),
    (["--max_steps", "1e16"], "max_steps can't be '1e16'; it must be an integer"),  # a float is not exact there
    (["--max_steps", "inf"], "max_steps can't be 'inf'; it must be an integer"),
    (["--max_steps", "nan"], "max_steps can't be 'nan'; it must be an integer"),
    (["--max_steps", "3.0.0"], "max_steps can't be '3.0.0'; it must be an integer"),
    (["--packing=maybe"], "packing can't be 'maybe'; it must be true or false"),
    (["--packing="], "packing can't be ''"), (["--lr="], "lr can't be ''; it must be a number"),
    (["--model", "none"], "model can't be 'none'; it must be a non-empty text"),
    (["--scheduler", "cosin"],
     r"scheduler can't be 'cosin'; it must be one of cosine, .* \(nearest: cosine\)"),
    (["--scheduler", "warmup_stable_decay"], r"scheduler can't be .* \(nearest: wsd\)"),
    (["--too_long", "left"], "too_long can't be 'left'; it must be one of truncate, drop, error"),
    (["--dtype", "fp16"], "dtype can't be 'fp16'; it must be one of bf16, fp32"),
    (["--no-lr"], "lr can't be"), (["--no-max_steps"], "max_steps can't be"), (["--no-val_data"], "val_data"),
    (["--no-output_dir"], "output_dir"), (["--no-train_data"], "train_data"),
    ([""], "unknown argument ''"), (["--"], "unknown setting ''"), (["="], "unknown setting ''"),
], ids=str)
def test_a_wrong_argument_is_an_error_with_the_rule(arguments, say):
    """For an unknown name the error suggests the nearest one, for a bad value it has the rule. Nothing is
    ignored."""
    with pytest.raises(ValueError, match=say) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value)


def test_negative_numbers_are_values():
    """-1 after a flag is its value, not a flag: it reaches the range check however it is written."""
    for arguments in (["--lr", "-1"], ["--lr=-1"], ["lr=-1"], ["--lr", "-1e0"]):
        with pytest.raises(ValueError, match=r"--lr -1.0: it must be at least 0"):
            parse(*arguments)
    with pytest.raises(ValueError, match="--seed -3: it must be at least 0"):
        parse("--packing", "--seed", "-3")


NUMBERS = {field.name: field for field in FIELDS if field.type in (int, float, int | None, float | None)}


def other_value(field):
    """A valid value of a field that is not its default."""
    if field.type in (bool, bool | str):
        return not field.default
    if field.name not in NUMBERS:
        return [choice for choice in (*field.metadata["choices"], "x") if choice != field.default][0]
    low, high = field.metadata["low"], field.metadata["high"]
    kind = int if field.type in (int, int | None) else float
    return [kind(v) for v in (low, low + 1, high) if v != field.default and low <= v <= high][0]


def needed(field):
    """{name: value} of settings that let a field have an effect."""
    names = [need.split(" or ")[0] for need in field.metadata["needs"].split(" and ") if need]
    values = {}
    for other in (other for other in FIELDS if other.name in names):
        values |= {**needed(other), other.name: other_value(other)}
    return values


def check_values(**values):
    """Check values by each setting's own line; rules about several settings are in Config.__post_init__."""
    parser.check_values({field.name: field for field in FIELDS}, {**DEFAULTS, **values})


def just_outside(field, bound, towards):
    """The nearest value beyond a bound of a number's range."""
    if field.type in (int, int | None):
        return int(bound + math.copysign(1, towards))
    return math.nextafter(bound, towards)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_has_a_range(name):
    """Every number has a minimum, and some a maximum. The error has the flag, the value and the bounds."""
    field = NUMBERS[name]
    low, high = field.metadata["low"], field.metadata["high"]
    assert low > -1e18, f"give {name} a range in sft.py: setting(..., low=0)"
    refused = [(just_outside(field, low, -math.inf), f"at least {low}")]
    if high < 1e18:
        refused.append((just_outside(field, high, math.inf), f"at least {low} and at most {high}"))
    for value, rule in refused:
        with pytest.raises(ValueError, match=re.escape(f"--{name} {value}: it must be {rule}")):
            check_values(**needed(field), **{name: value})
    for value in (low, high):
        check_values(**needed(field), **{name: value})


@pytest.mark.parametrize("values, message", [
    (dict(batch_size=0), "--batch_size 0: it must be at least 1"),
    (dict(seed=-1), "--seed -1: it must be at least 0"),
    (dict(max_length=1), "--max_length 1: it must be at least 2"),
    (dict(lr=-1e-9), "--lr -1e-09: it must be at least"),
    (dict(epochs=0), "--epochs 0: it must be at least 1e-06"),
    (dict(max_steps=0), "--max_steps 0: it must be at least 1"),
    (dict(micro_batch_size=0), "--micro_batch_size 0: it must be"),
    (dict(tp=0), "--tp 0: it must be at least 1"),
    (dict(use_lora=True, lora_rank=0), "--lora_rank 0: it must be at least 1")], ids=str)
def test_a_number_below_its_range_is_refused(values, message):
    """Values that would divide by zero, or maximise the loss."""
    with pytest.raises(ValueError, match=re.escape(message)):
        sft.Config(**values)


@pytest.mark.parametrize("values, message", [
    (dict(top_p=0.5), "--top_p 0.5 has no effect without --temperature"),
    (dict(temperature=-1.0), "--temperature -1.0: it must be at least 0 and at most 100"),
    (dict(temperature=1.0, top_p=1.5), "--top_p 1.5: it must be at least 1e-06 and at most 1"),
    (dict(max_new_tokens=0), "--max_new_tokens 0: it must be at least 1"),
    (dict(seed=-1), "--seed -1: it must be at least 0"),
    (dict(seed=math.inf), "--seed inf: it must be at least 0 and at most 1e+18")])
def test_settings_of_chat_have_ranges_too(values, message):
    """Ranges and needs are checked in every program."""
    with pytest.raises(ValueError, match=re.escape(message)):
        chat.Config(**values)
    chat.Config(temperature=1.0, top_p=0.5)


@pytest.mark.parametrize("name, high, highest", [("warmup_ratio", 1.01, 1.0), ("min_lr_ratio", 2.0, 1.0),
                                                 ("beta1", 1.0, 0.999), ("beta2", 1.0, 0.999)])
def test_a_number_above_its_range_is_refused(name, high, highest):
    """Ratios are at most 1, and a moment with decay 1 would never change. The error has both bounds."""
    with pytest.raises(ValueError, match=rf"--{name} {high}: it must be at least 0 and at most \d"):
        sft.Config(**{name: high})
    assert getattr(sft.Config(**{name: highest}), name) == highest


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_number_may_be_infinite_or_nan(value):
    """nan and inf are floats in Python, but not a learning rate, decay or ratio."""
    for field in FIELDS:
        if field.type is float:
            with pytest.raises(ValueError, match=f"--{field.name} "):
                parse(f"--{field.name}={value}")
            assert math.isfinite(DEFAULTS[field.name])


def test_settings_without_effect_are_refused():
    """eval_steps without validation data, and min_lr_ratio with a constant rate, are errors."""
    with pytest.raises(ValueError, match="--eval_steps 5 has no effect without --val_data"):
        parse("--eval_steps", "5")
    assert parse("--eval_steps", "5", "--val_data", "v.json").eval_steps == 5
    with pytest.raises(ValueError, match="--min_lr_ratio 0.1 does not work with --scheduler constant"):
        parse("--min_lr_ratio", "0.1", "--scheduler", "constant")
    for scheduler in ("cosine", "linear", "wsd"):
        assert parse("--min_lr_ratio", "0.1", "--scheduler", scheduler).min_lr_ratio == 0.1
    assert parse("--scheduler", "constant").scheduler == "constant"


# ------------------------------------------------------------------------------------------------------------
# the environment, which train.sh reads


VARIABLES = {  # name: (setting, a value that is not its default)
    "MODEL_PATH": ("model", "m"), "TOKENIZER_PATH": ("tokenizer", "t"),
    "TRAIN_DATA": ("train_data", "a.json,b.json"),
    "VAL_DATA": ("val_data", "v.json"), "MAX_LENGTH": ("max_length", "64"), "BATCH_SIZE": ("batch_size", "7"),
    "MICRO_BATCH_SIZE": ("micro_batch_size", "3"), "PACKING": ("packing", "false"),
    "NUM_EPOCHS": ("epochs", "9"),
    "MAX_STEPS": ("max_steps", "5"), "SEED": ("seed", "1"), "LEARNING_RATE": ("lr", "0.5"),
    "SCHEDULER": ("scheduler", "linear"), "WARMUP_RATIO": ("warmup_ratio", "0.2"),
    "WEIGHT_DECAY": ("weight_decay", "0.3"), "GRAD_CLIP": ("grad_clip", "2.0"),
    "USE_LORA": ("use_lora", "true"),
    "LORA_RANK": ("lora_rank", "4"), "LORA_ALPHA": ("lora_alpha", "5"), "STRATEGY": ("strategy", "fsdp2"),
    "TP": ("tp", "2"), "PARAM_OFFLOAD": ("param_offload", "true"),
    "OPTIMIZER_OFFLOAD": ("optimizer_offload", "true"),
    "GRADIENT_CHECKPOINTING": ("gradient_checkpointing", "false"), "DTYPE": ("dtype", "fp32"),
    "OUTPUT_DIR": ("output_dir", "o"), "RESUME_FROM": ("resume_from", "auto"),
    "SAVE_STEPS": ("save_steps", "6"),
    "KEEP_CHECKPOINTS": ("keep_checkpoints", "2"), "EVAL_STEPS": ("eval_steps", "8"),
    "COMPILE": ("compile", "true"), "LOGGER": ("logger", "tensorboard"), "WANDB_PROJECT": ("project", "p")}
NEEDS = {"LORA_RANK": ["--use_lora"], "LORA_ALPHA": ["--use_lora"], "TP": ["--strategy", "megatron"],
         "EVAL_STEPS": ["--val_data", "v.json"]}  # flags without which the variable has no effect


@pytest.fixture
def variables(monkeypatch):
    """A function that sets environment variables, and unsets all others that sft.py reads."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # all loggers are installed

    def set(**values):
        for name in (*VARIABLES, "CONFIG"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    set()
    return set


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_sets_its_setting_and_a_flag_beats_it(name, variables, yaml_file):
    """A variable alone sets the value, a flag has precedence over it, and it has precedence over a file.
    Empty, or without --environment, it has no effect."""
    field, value = VARIABLES[name]
    needs = NEEDS.get(name, [])
    variables(**{name: value})
    parsed, origins = parser.parse(sft.Config, ["--environment", *needs])
    assert str(getattr(parsed, field)).lower() == value and origins[field] == f"environment {name}"
    default = DEFAULTS[field] if DEFAULTS[field] is not None else "none"
    parsed, origins = parser.parse(sft.Config,
                                   ["--environment", *needs, f"--{field}={default}", "--strategy=fsdp2"])
    assert getattr(parsed, field) == (DEFAULTS[field] if name != "STRATEGY" else "fsdp2")
    assert origins[field].startswith("flag")
    path = yaml_file(f"{field}: {default}\n")
    parsed, origins = parser.parse(sft.Config,
                                   ["--environment", "--config", path, *needs])
    assert str(getattr(parsed, field)).lower() == value and origins[field] == f"environment {name}"
    assert parse(*(["--use_lora"] if "lora" in field else [])) == dataclasses.replace(
        sft.Config(), use_lora="lora" in field)
    variables(**{name: ""})
    assert parse("--environment") == sft.Config()


def test_every_variable_belongs_to_a_setting():
    """The variables that existing scripts set have a setting, and the comment of train.sh lists them."""
    declared = {field.metadata["env"]: field.name for field in FIELDS}
    for name, (field, _) in VARIABLES.items():
        assert declared.get(name) == field, name
    with open(os.path.join(ROOT, "train.sh"), encoding="utf-8") as f:
        names = {word.strip(".") for line in f if line.startswith("# ") for word in line.split()}
    assert names >= {*VARIABLES, "CONFIG"}


@pytest.mark.parametrize("given, arguments, logger", [
    ({"WANDB_PROJECT": "p"}, [], "console,wandb"),
    ({"WANDB_PROJECT": "p", "LOGGER": "console"}, [], "console,wandb"),
    ({"WANDB_PROJECT": "p", "LOGGER": "wandb,console"}, [], "wandb,console"),
    ({"WANDB_PROJECT": "p", "LOGGER": "trackio"}, [], "trackio,wandb"),
    ({"WANDB_PROJECT": "p"}, ["--logger", "tensorboard"], "tensorboard"),
    ({"WANDB_PROJECT": "p"}, ["trainer.logger=[console]"], "console"),
    ({"WANDB_PROJECT": ""}, [], "console")], ids=str)
def test_the_project_of_wandb_adds_its_logger(given, arguments, logger, variables):
    """WANDB_PROJECT adds wandb to the loggers, unless a flag sets the loggers."""
    variables(**given)
    parsed = parse("--environment", *arguments)
    assert (parsed.logger, parsed.project) == (logger, given["WANDB_PROJECT"] or None)


def test_the_environment_may_name_a_file(variables, yaml_file):
    """CONFIG works like --config; a file that a flag names replaces it."""
    first, second = yaml_file("seed: 7\nlr: 1\n", "first.yaml"), yaml_file("seed: 8\n", "second.yaml")
    variables(CONFIG=first, LEARNING_RATE="2")
    assert changed("--environment") == {"seed": 7, "lr": 2.0}
    assert changed("--environment", "--seed=9") == {"seed": 9, "lr": 2.0}
    assert changed("--environment", "--config", second) == {"seed": 8, "lr": 2.0}
    assert changed("--environment", f"--config-path={os.path.dirname(first)}",
                   "--config-name=second")["seed"] == 8
    assert changed() == {}


def test_an_empty_home_is_none(monkeypatch):
    """Otherwise ~/.cache would be /.cache."""
    monkeypatch.setenv("HOME", "")
    found = []
    errors.run(lambda: found.append(os.path.expanduser("~/x")))
    assert found[0] not in ("/x", "~/x")


def test_a_wrong_value_in_a_variable_is_an_error(variables):
    """The error names the variable."""
    variables(LEARNING_RATE="fast")
    with pytest.raises(ValueError,
                       match="environment LEARNING_RATE: lr can't be 'fast'; it must be a number"):
        parse("--environment")


def explained(tmp_path, *arguments, **env):
    """What ./train.sh ... --explain prints in tmp_path, without defaults: {setting: (value, origin)}."""
    env = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "PYTHON": sys.executable, **env}
    done = subprocess.run([os.path.join(ROOT, "train.sh"), *arguments, "--explain"], cwd=tmp_path, env=env,
                          text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    form = re.compile(r"(\w+) += (.*?) +(default|(?:flag|preset|environment) .*|\S+:\d+.*)")
    lines = [form.fullmatch(line).groups() for line in done.stdout.splitlines()]
    return {name: (value, origin) for name, value, origin in lines if origin != "default"}


EXAMPLES = os.path.join(ROOT, "data", "example_sft.json")
PRESET = {name: (value, "preset configs/tiny.yaml") for name, value in {
    "lr": "0.004", "epochs": "60", "batch_size": "8", "gradient_checkpointing": "False",
    "keep_checkpoints": "2"}.items()}


@pytest.mark.parametrize("arguments, env, expected", first(2, [
    (["--model", "tiny"], {}, {**PRESET, "model": ("tiny", "flag --model")}),
    (["--lr=1", "--use_lora"], {"MODEL_PATH": "tiny", "NUM_EPOCHS": "2", "BATCH_SIZE": ""},
     {**PRESET, "model": ("tiny", "environment MODEL_PATH"), "epochs": ("2", "environment NUM_EPOCHS"),
      "lr": ("1.0", "flag --lr=1"), "use_lora": ("True", "flag --use_lora"),
      "lora_modules_to_save": ("embed_tokens", "preset configs/tiny.yaml")}),
    (["--no-use_lora", "model=tiny"], {"USE_LORA": "true", "MODEL_PATH": "m"},
     {**PRESET, "model": ("tiny", "flag model=tiny"), "use_lora": ("False", "flag --no-use_lora")}),
    (["--model=m", "--train_data", "a b.json"], {"MODEL_PATH": "tiny"},
     {"model": ("m", "flag --model=m"), "train_data": ("a b.json", "flag --train_data")}),
    (["--model", "tiny"], {"CONFIG": os.path.join(ROOT, "config.yaml"), "SEED": "5"},
     {**{name: (str(value), None) for name, value in DEFAULTS.items()}, "model": ("tiny", "flag --model"),
      "seed": ("5", "environment SEED")}),
    ([], {}, {}),
]), ids=range(6))
def test_presets_environment_and_flags_of_train_sh(arguments, env, expected, tmp_path):
    """Precedence: preset < file < environment < flag. The preset is that of the model in the end. The example
    data is found from another directory than the project's."""
    found = explained(tmp_path, *arguments, **env)
    for name, (value, origin) in found.items():
        assert value == expected[name][0] and expected[name][1] in (origin, None)
    assert found.keys() == expected.keys()


# ------------------------------------------------------------------------------------------------------------
# --help, --explain, and errors on the screen


def test_help_is_as_wide_as_the_terminal(monkeypatch, capsys):
    """On 80 columns no line is broken by the terminal. A word that is longer stays in one piece."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse("--help")
    lines = capsys.readouterr().out.splitlines()
    assert 70 < max(map(len, lines)) <= 80


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--lr", "--help"], ["nonsense", "--help"]],
                         ids=" ".join)
def test_help_lists_every_setting_with_its_default(arguments, capsys):
    """Every field has its name, help, choices and default. --help works beside any other argument."""
    with pytest.raises(SystemExit) as stopped:
        parse(*arguments)
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 110
    entries = re.split(r"\n  (?=--)", printed)
    for field in FIELDS:
        (entry,) = [e for e in entries if re.match(rf"--{field.name}[ ,\n]", e)]
        entry = " ".join(re.split(r"\n\n", entry)[0].split())
        default = field.default
        if default is None or type(default) is bool:
            default = str(default).lower()
        choices = f" ({', '.join(field.metadata['choices'])})" if field.metadata["choices"] else ""
        variable = f" {field.metadata['env']}" if field.metadata["env"] else ""
        assert field.metadata["help"]
        assert entry.endswith(f" {field.metadata['help']}{choices} [{default}]{variable}")
        assert (f"--no-{field.name}" in entry) == (field.default is True or field.name == "compile")
    for word in ("--config FILE", "--config-path DIR --config-name NAME", "--explain", "--n_gpus N", "NNODES",
                 "model=tiny              applies configs/tiny.yaml"):
        assert word in printed
    groups = [field.metadata["group"] for field in FIELDS if field.metadata["group"]] + ["configuration"]
    assert re.findall(r"^(\S.*):$", printed, re.M) == groups and len(groups) > 6


def test_explain_prints_each_value_and_where_it_came_from(yaml_file, capsys):
    """--explain prints the resolved settings with their origins, one per line, and starts nothing."""
    path = yaml_file("# run\nlr: 1e-3\ntrainer:\n  seed: 7\nmodel: m\n")
    with pytest.raises(SystemExit) as stopped:
        parse("--config", path, "--explain", "--model", "other", "data.max_length=64", "--no-packing")
    assert stopped.value.code == 0
    lines = [re.fullmatch(r"(\w+) += (.*?) +(default|flag \S+|\S+:\d+( \S+)?)", line).groups()[:3]
             for line in capsys.readouterr().out.splitlines()]
    set_values = {"lr": ("0.001", f"{path}:2"), "seed": ("7", f"{path}:4 trainer.seed"),
                  "model": ("other", "flag --model"),
                  "max_length": ("64", "flag data.max_length=64"), "packing": ("False", "flag --no-packing")}
    assert lines == [(name, *set_values.get(name, (str(value), "default"))) for name, value in DEFAULTS.items()]


def test_only_rank_0_explains(monkeypatch, capsys):
    """Under torchrun only rank 0 prints, and all ranks exit."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for word in "--help", "--explain":
        with pytest.raises(SystemExit):
            parse(word)
    assert capsys.readouterr().out == ""


def stopped_with(capsys, main):
    """The exit code and standard error of errors.run(main)."""
    with pytest.raises(SystemExit) as stopped:
        errors.run(main)
    out, err = capsys.readouterr()
    assert out == ""
    return stopped.value.code, err


@pytest.mark.parametrize("main, say", [
    (lambda: sft.Config(lr=-1.0), "--lr -1.0: it must be at least 0"),
    (lambda: parse("--batchsize", "4"), "unknown setting 'batchsize'; the nearest is 'batch_size'"),
    (lambda: parse("--config", "missing.yaml"), "missing.yaml"),
    (lambda: sft.data.load("missing.json", None, 10), "missing.json: no such data file"),
    (lambda: ChatTokenizer("missing"), "missing has no tokenizer.json"),
], ids=["range", "unknown name", "missing YAML", "missing data", "missing tokenizer"])
def test_an_error_about_the_input_is_one_line_and_code_2(main, say, capsys, monkeypatch):
    """A UserError, or an OSError with a file name, is one line on standard error without a traceback."""
    monkeypatch.setattr(sys, "argv", ["some/where/sft.py"])
    code, err = stopped_with(capsys, main)
    assert code == 2 and err.count("\n") == 1
    assert err.startswith("sft.py: error: ") and say in err


@pytest.mark.parametrize("error", [ValueError, TypeError, KeyError, AssertionError, RuntimeError, OSError])
def test_other_errors_are_never_hidden(error):
    """Only errors in the input and non-finite losses become one line; bugs keep their traceback."""
    def fail():
        raise error("a bug")

    with pytest.raises(error, match="a bug"):
        errors.run(fail)


def test_a_diverged_run_is_one_line(capsys):
    """A NonFiniteError is not a bug: one line and exit code 1."""
    def fail():
        raise errors.NonFiniteError("step 3: loss nan")

    code, err = stopped_with(capsys, fail)
    assert code == 1 and err.endswith("error: step 3: loss nan\n")


def test_ctrl_c_ends_a_command_without_a_traceback(capsys):
    """The exit code is 128 + the signal's number, as in a shell."""
    def fail():
        raise KeyboardInterrupt

    assert stopped_with(capsys, fail) == (130, "")


def test_run_returns_when_all_is_well(capsys):
    """run() returns if main() does. A broken pipe is a bug unless standard output is closed, which
    tests/laws/test_errors.py tests."""
    def fail():
        raise BrokenPipeError

    called = []
    assert errors.run(lambda: called.append(1)) is None and called == [1]
    with pytest.raises(BrokenPipeError):
        errors.run(fail)


@pytest.mark.full
def test_a_misspelt_flag_of_the_program_is_one_line(tmp_path):
    """python sft.py --batchsize 4: exit code 2, one line with the nearest name, and no files written."""
    done = subprocess.run([sys.executable, os.path.join(ROOT, "sft.py"), "--batchsize", "4"], cwd=tmp_path,
                          text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("sft.py: error: unknown setting 'batchsize'; the nearest is 'batch_size'; "
                           "--help lists them all\n")
    assert list(tmp_path.iterdir()) == []


def test_positional_arguments_set_fields():
    """chat.py DIR, tools/merge.py ADAPTER OUT: arguments without a flag, in order, with flags between them."""
    found, origins = parser.parse(sft.Config, ["tiny", "--lr", "1", "data.json"], ["model", "train_data"])
    assert (found.model, found.train_data, found.lr) == ("tiny", "data.json", 1.0)
    assert origins["train_data"] == "argument data.json"
    with pytest.raises(ValueError, match="unknown argument 'more'"):
        parser.parse(sft.Config, ["tiny", "more"], ["model"])
    with pytest.raises(ValueError, match="unknown argument '-x'"):
        parser.parse(sft.Config, ["-x"], ["model"])


def test_the_config_of_an_older_run_still_starts(yaml_file):
    """It has settings that are now those of tools/plan.py. Switched off they are ignored, else an error says
    where they are."""
    path = yaml_file("lr: 1e-3\nplan: false\nmemory_gb: null\nranks: null\n")
    assert parse("--config", path).lr == 1e-3
    for arguments in (["--plan"], ["--config", yaml_file("plan: true\n")], ["--memory_gb", "80"]):
        with pytest.raises(ValueError, match="tools/plan.py"):
            parse(*arguments)


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e300", "-1e300", "-0.001", "-1"])
def test_a_number_out_of_range_is_refused_for_every_setting(value):
    """With the name of the setting; a negative one only where the setting has a lower limit of 0 or more."""
    for field in FIELDS:
        if parser.type_of(field) in (int, float):
            with pytest.raises(errors.UserError, match=field.name):
                parse(f"--{field.name}={value}", "--use_lora", "--val_data=x", "--strategy=megatron")


@pytest.mark.parametrize("name", ["output_dir", "model", "tokenizer", "chat_template", "resume_from", "sample_prompts"])
def test_a_tilde_is_the_home_directory_in_every_path(name, yaml_file, monkeypatch):
    """In a file and behind an =, where the shell does not expand it. A question to chat.py is no path."""
    monkeypatch.setenv("HOME", "/home/me")
    for arguments in (["--config", yaml_file(f"{name}: ~/x")], [f"--{name}=~/x"], [f"{name}=~/x"]):
        assert getattr(parse(*arguments), name) == "/home/me/x"
    assert getattr(parse(f"--{name}=~root/x"), name) == os.path.expanduser("~root/x") != "~root/x"
    assert parser.parse(chat.Config, ["--prompt", "~/x?"])[0].prompt == "~/x?"


def at_limits():
    """(name, value) of each number at its limits, or at 10^18, beyond which no number is accepted."""
    for name, field in NUMBERS.items():
        kind = int if field.type in (int, int | None) else float
        for value in field.metadata["low"], min(field.metadata["high"], 10**18):
            yield name, kind(value)
    yield "micro_batch_size", 10**18


def test_numbers_at_their_limits_make_a_schedule(monkeypatch):
    """No overflow and no division by zero: parsed, then the steps, the rates, the micro-batches and what is due."""
    lengths = np.arange(2, 12)
    for name, value in at_limits():
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", str(value if name in ("tp", "sp", "replicas") else 1))
        field = {field.name: field for field in FIELDS}[name]
        strategy = {"strategy": "megatron"} if name == "tp" and value > 1 else {}
        cfg = sft.Config(**{**needed(field), **strategy, name: value})
        if cfg.batch_tokens == 1:
            continue  # no conversation has one token
        sampler = data.Sampler(lengths, epochs=cfg.epochs, seed=cfg.seed, batch_size=cfg.batch_size,
                               batch_tokens=cfg.batch_tokens, max_steps=cfg.max_steps)
        for step in {1, len(sampler) // 2 or 1, len(sampler)}:
            assert 0 <= sft.lr_at(step, len(sampler), cfg) <= 10**18
            assert len(sampler.step(step).ids) and sampler.is_due(step, cfg.save_steps) in (True, False)
        capacity, most = packing.limits(cfg)
        if capacity >= 11:
            for rank in range(2):
                assert packing.pack(lengths, capacity, most, dp_rank=rank, dp_size=2)
