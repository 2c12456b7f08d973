"""Resume means the same run: its settings, its data and model by their content, the newest checkpoint that is valid."""

import errno
import filecmp
import json
import os
import shutil
import zlib

import pytest
import torch
from helpers import ROOT, model_directory, sft_main, tensors_of, write
from safetensors.torch import save_file

import chat
import sft
from disk import checkpoint, files, peft, pretrained, resume, run, saving
from settings import parser
from settings.errors import UserError
from tools import merge

ROWS = [{"prompt": f"Question {i}", "response": f"Answer {i * i}"} for i in range(12)]
WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A directory with x.json, m (a model) and out: a run of 4 steps, of which 2 and 4 are saved."""
    directory = tmp_path_factory.mktemp("first")
    model_directory(directory / "m")
    write(directory / "x.json", ROWS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setattr("sys.argv", [])
        sft_main("--model", "m", "--train_data", "x.json", "--output_dir", "out", "--max_length", 64, "--batch_size", 2,
                 "--max_steps", 4, "--save_steps", 2, "--lr", "1e-3", "--no-gradient_checkpointing")
    return directory


@pytest.fixture
def copy(first, tmp_path, monkeypatch):
    """A copy of `first`, which is the current directory."""
    shutil.copytree(first, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setattr("sys.argv", [])
    return tmp_path / "copy"


def steps_of(root):
    return root / "out" / "checkpoints"


def same_end(first, out):
    """Whether a run has ended with the weights and moments of `first`, byte by byte."""
    paths = ("model.safetensors", "training_state/tensors.safetensors")
    ends = steps_of(first) / "step_4", out / "checkpoints" / "step_4"
    return all(filecmp.cmp(*(end / path for end in ends), shallow=False) for path in paths)


# ---- the settings of the run --------------------------------------------------------------------------------------


def test_auto_alone_continues_the_same_run(first, copy, capsys):
    """Its settings are those of its config.yaml; the newest step is gone, and the banner says so."""
    shutil.rmtree(steps_of(copy) / "step_4")
    sft_main("--output_dir", "out", "--resume_from", "auto")
    assert same_end(first, copy / "out")
    out = capsys.readouterr().out
    assert f"resume   step 2 of {steps_of(copy)}/step_2, settings of out/config.yaml\n" in out
    assert "skipped  step_4: `latest` means it, but it is not there\n" in out and "changed:" not in out
    assert os.readlink(steps_of(copy) / "latest") == "step_4"


def test_a_step_directory_alone_is_enough(first, copy, capsys):
    """Moved, without its run: its own settings are used. It is in no run, so --output_dir has to be given."""
    shutil.move(steps_of(copy) / "step_2", copy / "backup")
    shutil.rmtree("out")
    with pytest.raises(UserError, match="backup: this step directory is not inside a run's directory; add --output_dir"):
        sft_main("--resume_from", "backup")
    sft_main("--resume_from", "backup", "--output_dir", "other")
    assert same_end(first, copy / "other")
    assert "settings of" in capsys.readouterr().out


def test_a_step_that_is_not_there_names_those_that_are(copy):
    with pytest.raises(UserError, match="step_99 is not a directory; beside it are step_2, step_4; use a step"):
        sft_main("--resume_from", "out/checkpoints/step_99")


def test_what_links_in_a_run_lead_to_stays(copy):
    """The run may be somebody else's: what it writes replaces a link, and its temporary names are new."""
    (copy / "mine").write_text("mine")
    for name in ("config.yaml.tmp", "metrics.jsonl.tmp", "samples.jsonl.tmp", "ledger.json.tmp", "report.html.tmp",
                 "ledger.json"):
        (copy / "out" / name).unlink(missing_ok=True)
        os.symlink("../mine", copy / "out" / name)
    config = (copy / "out" / "config.yaml").rename(copy / "settings.yaml")
    os.symlink("../settings.yaml", copy / "out" / "config.yaml")
    before = config.read_bytes()
    sft_main("--resume_from", "out", "--max_steps", 5)
    assert (copy / "mine").read_text() == "mine" and config.read_bytes() == before
    assert "max_steps: 5\n" in (copy / "out" / "config.yaml").read_text()


def test_a_finished_run_keeps_its_settings(copy, capsys):
    """Nothing was trained with those that were given."""
    before = (copy / "out" / "config.yaml").read_bytes()
    sft_main("--resume_from", "out", "--max_steps", "3")
    assert "already complete: raise --max_steps" in capsys.readouterr().out
    assert (copy / "out" / "config.yaml").read_bytes() == before


def test_a_step_of_a_run_continues_in_that_run(first, copy, tmp_path, monkeypatch):
    """From another directory: also where the model was moved, which a full run does not need, and the data renamed."""
    shutil.rmtree(steps_of(copy) / "step_4")
    shutil.move("m", "model")
    shutil.move("x.json", "y.json")
    monkeypatch.chdir(tmp_path)
    sft_main("--resume_from", "copy/out/checkpoints/step_2", "--train_data", "copy/y.json", "--model", "copy/model")
    assert same_end(first, copy / "out") and os.listdir(tmp_path) == ["copy"]


def test_changes_are_printed_and_a_jump_of_the_rate_too(copy, capsys):
    """More steps and another lr on a finished run; the settings of config.yaml then are the new ones."""
    sft_main("--resume_from", "out", "--lr", "2e-5", "--max_steps", "5")
    out = capsys.readouterr().out
    assert "changed: lr 1e-3 -> 2e-5\n" in out and "changed: max_steps 4 -> 5\n" in out and "saved" in out
    rates = [json.loads(line)["lr"] for line in open("out/metrics.jsonl")]
    assert f"for 5 steps (it was 4): lr {rates[3]:.2e} at step 4 -> {rates[4]:.2e} at step 5" in out
    assert rates[4] == sft.lr_at(5, 5, sft.Config(lr=2e-5))
    sft_main("--output_dir", "out", "--resume_from", "auto")
    out = capsys.readouterr().out
    assert "already complete: raise --max_steps to train longer" in out
    assert "changed:" not in out and "saved " not in out


def test_another_number_of_ranks_is_printed(copy, monkeypatch, capsys):
    """state.json has it; the checkpoint of an older version does not."""
    load_state = checkpoint.load_state
    for ranks, line in ((4, "changed: ranks 4 -> 1 (steps hold the same)\n"), (1, ""), (None, "")):
        def load(directory, ranks=ranks):
            state = load_state(directory)
            assert state.pop("ranks") == 1
            return {**state, "ranks": ranks} if ranks else state

        monkeypatch.setattr(checkpoint, "load_state", load)
        sft_main("--resume_from", "out")
        out = capsys.readouterr().out
        assert line in out and out.count("changed:") == bool(line)


@pytest.mark.parametrize("flags, words", [
    (("--seed", 1), ["seed 42 then, 1 now", "type --seed 42"]),
    (("--batch_size", 4), ["batch_size 2 then, 4 now", "type --batch_size 2"]),
    (("--train_on_prompt",), ["train_on_prompt false then, true now", "type --train_on_prompt false"]),
    (("--train_data", "z.json"), ["train_data x.json then, z.json now", "type --train_data x.json"]),
    (("--epochs", 9), ["--epochs 9 has no effect", "--max_steps 4", "--max_steps none"]),
    (("--model", "other"), ["another base model than --model other", "Type --model m"]),
    (("--model", "./gone"), ["--model ./gone: no such directory"]),
    (("--model", "owner/name"), ["--model owner/name", "remove --model"]),
    (("--resize_embeddings",), ["--resize_embeddings true has no effect", "type --resize_embeddings false"]),
    (("--use_lora",), ["is a full model"]), (("--train_data", ""), ["train_data can't be ''", "non-empty text"])],
    ids=lambda value: " ".join(map(str, value))[:24])
def test_what_would_be_another_run_is_refused_by_name(copy, flags, words):
    """With what to type. Nothing of the run changes. `other` differs in one value of one row of one matrix."""
    write(copy / "z.json", ROWS[1:])
    model_directory(copy / "other", change_tensors=lambda tensors: tensors[WEIGHT][77, 5].add_(1))
    shutil.rmtree(steps_of(copy) / "step_4")
    before = [(copy / "out" / name).read_bytes() for name in ("metrics.jsonl", "config.yaml")]
    with pytest.raises(UserError) as info:
        sft_main("--resume_from", "out", *flags)
    assert [word for word in words if word not in str(info.value)] == [], info.value
    assert [(copy / "out" / name).read_bytes() for name in ("metrics.jsonl", "config.yaml")] == before


def test_another_model_at_the_same_path_is_refused(copy):
    shutil.rmtree("m")
    model_directory(copy / "m", change_tensors=lambda tensors: tensors["model.norm.weight"][-1].add_(1))
    with pytest.raises(UserError, match="than --model m: their weights differ. Type --model DIR with that model"):
        sft_main("--output_dir", "out", "--resume_from", "auto", "--max_steps", 5)


def test_a_checkpoint_of_an_older_version_resumes(first, copy, capsys):
    """It has neither settings nor fingerprints; without its run, what is not given has its default, and that is said."""
    step = steps_of(copy) / "step_2"
    state = files.read_json(step / "training_state" / "state.json")
    for key in ("model", "val_data", "lr", "total_steps"):
        del state[key]
    (step / "training_state" / "settings.json").unlink()
    files.write_file(step / "training_state" / "state.json", state)
    listed = json.loads((step / checkpoint.MANIFEST).read_bytes())["files"]
    del listed["training_state/settings.json"]
    listed["training_state/state.json"] = list(checkpoint.checksum(step / "training_state" / "state.json"))
    (step / checkpoint.MANIFEST).write_bytes(checkpoint.manifest(2, listed))
    shutil.copytree(step, copy / "old")
    sft_main("--resume_from", step)
    assert same_end(first, copy / "out") and "settings of out/config.yaml" not in capsys.readouterr().out
    sft_main("--resume_from", "old", "--output_dir", "other", "--model", "m", "--train_data", "x.json", "--max_length",
             64, "--batch_size", 2, "--max_steps", 4, "--lr", "1e-3", "--no-gradient_checkpointing")
    assert same_end(first, copy / "other")
    assert "saved by an older version: what is not given has its default" in capsys.readouterr().out


def of_run(*pairs):
    """An argument `resumed` of parser.parse: the run has these settings."""
    return lambda given, fields: [parser.Assignment(name, text, "run", f"out/config.yaml:{i}")
                                  for i, (name, text) in enumerate(pairs, 1)]


def test_precedence_of_the_settings_of_the_run(tmp_path, monkeypatch, capsys):
    """flag > environment > --config file > the run > preset > default, and --explain shows it."""
    (tmp_path / "c.yaml").write_text("lr: 3\nseed: 3\nepochs: 3.5")
    monkeypatch.setenv("LEARNING_RATE", "2")
    monkeypatch.setenv("SEED", "2")
    resumed = of_run(("lr", "4"), ("seed", "4"), ("epochs", "4"), ("weight_decay", "0.4"), ("max_length", "44"))
    arguments = ["--config", str(tmp_path / "c.yaml"), "--environment", "--lr", "1", "--model", "tiny"]
    cfg, origins = parser.parse(sft.Config, arguments, resumed=resumed)
    assert (cfg.lr, cfg.seed, cfg.epochs, cfg.weight_decay, cfg.max_length) == (1, 2, 3.5, 0.4, 44)
    assert origins["weight_decay"] == "out/config.yaml:4"
    with pytest.raises(SystemExit):
        parser.parse(sft.Config, [*arguments, "--explain"], resumed=resumed)
    assert "out/config.yaml:5\n" in capsys.readouterr().out


def test_the_banner_names_the_files_of_settings(tmp_path, monkeypatch):
    """config.yaml edited in place is not read, and the line says how to."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("lr: 3\n")
    cfg, origins = parser.parse(sft.Config, ["--model", "tiny"])
    assert cfg.lr != 3 and resume.lines(None, {}, cfg, origins) == [
        "config   preset configs/tiny.yaml; no other file read (--config config.yaml reads it)"]
    _, origins = parser.parse(sft.Config, ["--model", "dir"])
    assert resume.lines(None, {}, cfg, origins) == ["config   none read (--config config.yaml reads it)"]
    cfg, origins = parser.parse(sft.Config, ["--config", "config.yaml"])
    assert cfg.lr == 3 and resume.lines(None, {}, cfg, origins) == ["config   config.yaml"]


def test_a_key_of_verl_added_to_the_shipped_file_wins_over_its_default(tmp_path):
    """In front of it or behind; a value that the user has changed there is a conflict, as before."""
    with open(os.path.join(ROOT, "config.yaml"), encoding="utf-8") as f:
        shipped = f.read()
    path = tmp_path / "config.yaml"
    for text in (f"{shipped}\noptim:\n  lr: 3e-4\n", f"optim:\n  lr: 3e-4\n{shipped}"):
        path.write_text(text)
        assert parser.parse(sft.Config, ["--config", str(path)])[0] == sft.Config(lr=3e-4)
        path.write_text(text.replace("\nlr: 2e-05", "\nlr: 1e-5"))
        with pytest.raises(UserError, match="lr is .* here, and .*remove one of them"):
            parser.parse(sft.Config, ["--config", str(path)])


def test_a_path_of_the_run_that_is_gone_names_the_file_it_is_written_in(copy, monkeypatch):
    shutil.move("x.json", "y.json")
    with pytest.raises(UserError, match=r"--train_data x.json: no such .*\(train_data is set in out/config.yaml:\d+\)"):
        sft_main("--output_dir", "out", "--resume_from", "auto")


def test_files_that_the_checkpoint_has_copies_of_may_be_gone(copy, capsys):
    """--tokenizer, --chat_template and --resume_adapter of the run. Data that is gone is an error."""
    shutil.copytree("m", "tok", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    template = json.loads((copy / "m" / "tokenizer_config.json").read_text())["chat_template"]
    (copy / "t.jinja").write_text(template + "{# mine #}")
    flags = ("--train_data", "x.json", "--max_length", 64, "--no-gradient_checkpointing", "--batch_size", 2,
             "--use_lora")
    sft_main("--model", "m", "--output_dir", "l", "--max_steps", 1, *flags)
    given = {"resume_adapter": "l/checkpoints/latest", "tokenizer": "tok", "chat_template": "t.jinja"}
    sft_main("--model", "m", "--output_dir", "l2", "--max_steps", 1, *flags,
             *(word for name, value in given.items() for word in (f"--{name}", value)))
    for name in ("tok", "l"):
        shutil.rmtree(name)
    os.remove("t.jinja")
    capsys.readouterr()
    sft_main("--resume_from", "l2", "--max_steps", 2)
    out = capsys.readouterr().out
    for name, value in given.items():
        assert f"changed: {name} {value} -> none\n" in out
    assert len((copy / "l2" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_template_that_was_chosen_by_name_is_the_only_one_of_a_checkpoint(copy, capsys):
    config = json.loads((copy / "m" / "tokenizer_config.json").read_text())
    templates = {"default": config["chat_template"], "mine": config["chat_template"] + "{# mine #}"}
    config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    write(copy / "m" / "tokenizer_config.json", config)
    flags = ("--model", "m", "--train_data", "x.json", "--max_length", 64, "--no-gradient_checkpointing",
             "--batch_size", 2, "--output_dir", "named", "--chat_template", "mine")
    sft_main(*flags, "--max_steps", 1)
    capsys.readouterr()
    sft_main(*flags, "--resume_from", "auto", "--max_steps", 2)
    assert "changed: chat_template" not in capsys.readouterr().out
    step = copy / "named" / "checkpoints" / "step_2"
    assert (step / "chat_template.jinja").read_text() == templates["mine"]
    with pytest.raises(UserError, match="--chat_template other is neither a file nor a template of"):
        sft_main("--resume_from", "named", "--chat_template", "other")


def test_a_given_setting_drops_what_it_excludes():
    """min_lr_ratio of the run after --scheduler constant; a given one is still an error."""
    resumed = of_run(("min_lr_ratio", "0.1"))
    cfg, _ = parser.parse(sft.Config, ["--scheduler", "constant"], resumed=resumed)
    assert (cfg.scheduler, cfg.min_lr_ratio) == ("constant", 0)
    with pytest.raises(UserError, match="--min_lr_ratio 0.2 does not work with --scheduler constant"):
        parser.parse(sft.Config, ["--scheduler", "constant", "--min_lr_ratio", "0.2"], resumed=resumed)


def test_what_has_no_effect_any_more_is_dropped():
    """keep_best and eval_steps of the run after --val_data none; a given one is still an error."""
    resumed = of_run(("val_data", "v.json"), ("keep_best", "true"), ("eval_steps", "3"))
    cfg, _ = parser.parse(sft.Config, ["--val_data", "none"], resumed=resumed)
    assert not cfg.keep_best and cfg.eval_steps is None
    with pytest.raises(UserError, match="--keep_best has no effect without --val_data"):
        parser.parse(sft.Config, ["--val_data", "none", "--keep_best"], resumed=resumed)


@pytest.mark.parametrize("value, text", [(1e-3, "1e-3"), (2e-5, "2e-5"), (1.25e-4, "1.25e-4"), (0.1, "0.1"), (0.0, "0.0"),
                                         (None, "none"), (True, "true"), (3, "3"), ("a b", "a b"), (-1e-7, "-1e-7")])
def test_values_are_printed_as_they_are_typed(value, text):
    assert resume.text_of(value) == text


# ---- which checkpoint ---------------------------------------------------------------------------------------------


def test_auto_skips_a_damaged_checkpoint_and_says_why(first, copy, capsys):
    """If the older one is damaged as well, resume is refused; a step directory that is named is never replaced."""
    (steps_of(copy) / "step_4" / "config.json").unlink()
    with pytest.raises(UserError, match="step_4 is not as it was saved: config.json is missing"):
        sft_main("--resume_from", "out/checkpoints/step_4")
    sft_main("--output_dir", "out", "--resume_from", "auto")
    assert same_end(first, copy / "out")
    assert "step_4 is not as it was saved: config.json is missing\n" in capsys.readouterr().out
    for step in (2, 4):
        (steps_of(copy) / f"step_{step}" / "config.json").unlink()
    with pytest.raises(UserError, match=r"step_4 is not.*\(1 other checkpoints are not valid either\)"):
        sft_main("--output_dir", "out", "--resume_from", "auto")


def test_abandoned_checkpoints_are_skipped_with_a_line(copy):
    """`latest` means an earlier step: the run resumed from it, and later steps are of the run before."""
    checkpoint.set_link(steps_of(copy), 2)
    directory, lines = checkpoint.open_newest("auto", steps_of(copy))
    assert directory.endswith("step_2") and len(lines) == 1 and lines[0].startswith("skipped  step_4: `latest` means step_2")
    assert checkpoint.open_newest(str(steps_of(copy) / "step_2"), steps_of(copy))[1] == []


@pytest.mark.parametrize("has_steps", [True, False])
def test_a_copy_with_links_followed_resumes(first, copy, has_steps):
    """`latest` is a directory; it becomes a link, and nothing is lost, also where it is the only copy of its step."""
    shutil.rmtree("out/checkpoints/step_4")
    checkpoint.set_link(steps_of(copy), 2)
    shutil.copytree("out", "followed", symlinks=False)
    if not has_steps:
        shutil.rmtree("followed/checkpoints/step_2")
    assert not os.path.islink("followed/checkpoints/latest")
    sft_main("--output_dir", "followed", "--resume_from", "auto")
    assert same_end(first, copy / "followed")
    assert sorted(os.listdir("followed/checkpoints")) == ["latest", "step_2", "step_4"]
    assert os.readlink("followed/checkpoints/latest") == "step_4"


def test_a_directory_named_latest_that_is_no_copy_is_not_removed(copy):
    os.remove("out/checkpoints/latest")
    os.makedirs("out/checkpoints/latest/mine")
    with pytest.raises(UserError, match="latest must be a link to a checkpoint.*move it elsewhere"):
        checkpoint.set_link("out/checkpoints", 4)
    assert os.path.isdir("out/checkpoints/latest/mine")


def test_a_file_system_without_links(first, copy, monkeypatch):
    """`latest` is a file, which resume, chat.py and tools/merge.py follow."""
    def symlink(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    shutil.rmtree(steps_of(copy) / "step_4")
    os.remove(steps_of(copy) / "latest")
    monkeypatch.setattr(os, "symlink", symlink)
    sft_main("--output_dir", "out", "--resume_from", "auto")
    latest = steps_of(copy) / "latest"
    assert same_end(first, copy / "out") and latest.read_text() == "step_4\n"
    assert checkpoint.resume_directory("auto", str(steps_of(copy))) == str(latest.with_name("step_4"))
    assert checkpoint.resume_directory(str(latest), "") == files.follow(str(latest)) == str(latest.with_name("step_4"))
    assert chat.load(str(latest))
    shutil.rmtree(steps_of(copy) / "step_4")
    assert checkpoint.resume_directory("auto", str(steps_of(copy))) == str(latest.with_name("step_2"))


@pytest.mark.parametrize("key, value", [
    ("best", []), ("best", {}), ("best", {"val_loss": "1", "step": 1, "behind": 0}), ("norms", 3), ("norms", [None]),
    ("best", {"val_loss": 1.0, "step": True, "behind": 0}), ("is_cut", 1), ("date", "today"), ("date", "2026-02-31"),
    ("date", 3), ("lr", "1"), ("total_steps", -1), ("template_kwargs", {}), ("base", 1), ("model", []), ("val_data", 1),
    ("lowest", "x"), ("lowest", {"a": {}}), ("lowest", {"a": []}), ("lowest", {"a": {"val_loss": None, "step": 1}}),
    ("lowest", {"a": {"val_loss": "1", "step": 1}}), ("updates", 10**30), ("step", 10**30), ("ranks", None), ("ranks", [])])
def test_a_damaged_state_is_one_line(tmp_path, key, value):
    (tmp_path / "training_state").mkdir()
    write(tmp_path / "training_state" / "state.json", {"step": 7, key: value})
    with pytest.raises(UserError, match=f"state.json: {key} must be .*, it is .*--resume_from"):
        checkpoint.load_state(str(tmp_path))


# ---- the best checkpoint ------------------------------------------------------------------------------------------


def test_best_begins_anew_with_another_validation_set(copy, capsys):
    """The val_loss of one set is no limit for another; of the same set under another name it is."""
    write(copy / "v.json", ROWS[:2])
    write(copy / "w.json", ROWS[2:5])
    shutil.copy("v.json", "v2.json")
    flags = ("--eval_steps", 1, "--keep_best", "--resume_from", "out", "--lr", 0)
    sft_main(*flags, "--max_steps", 5, "--val_data", "v.json")
    best = files.read_json("out/checkpoints/latest/training_state/state.json")["best"]
    sft_main(*flags, "--max_steps", 6, "--val_data", "v2.json")
    assert "begins anew" not in capsys.readouterr().out
    assert files.read_json("out/checkpoints/latest/training_state/state.json")["best"] == {**best, "behind": 1}
    sft_main(*flags, "--max_steps", 7, "--val_data", "w.json")
    assert f"best     begins anew: the val_loss {best['val_loss']:.4f} of step 5 is of other" in capsys.readouterr().out
    assert files.read_json("out/checkpoints/latest/training_state/state.json")["best"]["step"] == 7


def test_a_val_loss_that_is_not_finite_is_never_the_best():
    """Also not one that an older version saved."""
    state = run.RunState.__new__(run.RunState)
    state.best = {"val_loss": float("nan"), "step": 1, "behind": 0}
    assert [state.judge(step, loss) for step, loss in enumerate((float("nan"), 2.0, float("inf"), 3.0, 1.0), 2)] == [
        False, True, False, False, True]
    assert state.best == {"val_loss": 1.0, "step": 6, "behind": 0}


# ---- the model ----------------------------------------------------------------------------------------------------


def test_every_byte_of_the_weights_counts(tmp_path):
    """Any one value of any tensor; not the files, their order and their names."""
    base = pretrained.fingerprint(model_directory(tmp_path / "m"))
    tensors = tensors_of(tmp_path / "m")
    for i, (name, tensor) in enumerate(tensors.items()):
        position = zlib.crc32(name.encode()) % tensor.numel()
        value = tensor.view(-1)[position].clone()
        tensor.view(-1)[position] = value + 1
        save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
        assert pretrained.fingerprint(tmp_path / "m") != base, (i, name)
        tensor.view(-1)[position] = value
    parts = {f"model-0000{i + 1}-of-00002.safetensors": list(tensors)[i::2] for i in range(2)}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, tmp_path / "m" / file)
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(saving.index_content(parts, 0)))
    assert pretrained.fingerprint(tmp_path / "m") == base


def test_ranks_share_the_reading_and_each_node_gets_its_own(tmp_path, monkeypatch):
    """Two nodes of two ranks; the model of the second differs in one value."""
    models = [model_directory(tmp_path / "a"), model_directory(
        tmp_path / "b", change_tensors=lambda tensors: tensors[WEIGHT][-1, -1].add_(1))]
    alone, parts, found = [pretrained.fingerprint(model) for model in models], [], []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for collected in (False, True):
        total = sum(parts) if collected else None
        for rank in range(4):
            monkeypatch.setattr(pretrained, "rank_and_world_size", lambda rank=rank: (rank, 4))
            monkeypatch.setattr(pretrained.dist, "all_reduce", lambda sums: (
                sums.copy_(total) if collected else parts.append(sums.clone())))
            found.append(pretrained.fingerprint(models[rank // 2], shares=True))
    assert found[4:] == [alone[0], alone[0], alone[1], alone[1]] and alone[0] != alone[1]
    assert all(part.count_nonzero() == 2 for part in parts) and not torch.equal(parts[0], parts[1])


def test_a_fingerprint_of_an_older_version_is_compared_as_far_as_it_goes(tmp_path):
    now = pretrained.fingerprint(model_directory(tmp_path / "m"))
    assert pretrained.is_same(now.partition("-")[0], now) and pretrained.is_same(now, now)
    assert not pretrained.is_same("0" * 32, now) and not pretrained.is_same(now[:-1] + "x", now)


def test_chat_and_merge_refuse_another_model_at_the_path_of_the_base(copy):
    """And resume does. `latest` of a running training is resolved once."""
    sft_main("--model", "m", "--train_data", "x.json", "--output_dir", "lora", "--max_length", 64, "--use_lora",
             "--max_steps", 1)
    adapter = os.path.abspath("lora/checkpoints/latest")
    merge.merge(merge.Config(adapter=adapter, out="merged"))
    assert peft.base_directory(adapter) == os.path.abspath("m")
    tensors = tensors_of("m")
    tensors[WEIGHT][-1, -1] += 1
    save_file(tensors, "m/model.safetensors", {"format": "pt"})
    for attempt in (lambda: chat.load(adapter), lambda: merge.merge(merge.Config(adapter=adapter, out="again")),
                    lambda: chat.load(adapter, "m")):
        with pytest.raises(UserError, match="m has other weights than the model that the adapter .*--base DIR"):
            attempt()
    with pytest.raises(UserError, match="another base model than --model m: their weights differ"):
        sft_main("--output_dir", "lora", "--resume_from", "auto", "--max_steps", 2)
