"""disk/space.py: the size of a checkpoint and of all of them, before one is written; which ones are kept."""

import json
import os
import re
from collections import namedtuple

import pytest
from helpers import EXAMPLES, FAST, launch_all, two_layers, write

from disk import checkpoint, space

UNITS = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def shown(out):
    """(bytes of a checkpoint, of all of them at most) that the banners in a text say, for each run."""
    form = r"^disk     ([\d.]+) (\w+) a checkpoint, .*: at most ([\d.]+) (\w+); [\d.]+ [MGT]B free$"
    lines = re.findall(form, out, re.M)
    return [(float(size) * UNITS[unit], float(most) * UNITS[unit_of_most]) for size, unit, most, unit_of_most in lines]


@pytest.fixture
def short(tmp_path):
    """Flags of a run that takes a moment: a dozen of short rows, two in a step."""
    rows = [{"prompt": f"{i}?", "response": f"{i}!"} for i in range(12)]
    return ("--train_data", write(tmp_path / "short.json", rows), "--max_length", 32, "--batch_size", 2,
            "--gradient_checkpointing", "false")


def steps(directory):
    root = os.path.join(directory, "checkpoints")
    return {step: os.path.join(root, f"step_{step}") for step in checkpoint.steps_in(root)}


@pytest.mark.parametrize("flags", [
    (), ("--dtype", "bf16"), ("--dtype", "bf16", "--optimizer_offload"), ("--freeze", "embed_tokens"), ("--use_lora",),
    ("--use_lora", "--quantize", "nf4", "--lora_targets", "q_proj,down_proj", "--dtype", "bf16"),
    ("--use_lora", "--lora_modules_to_save", "embed_tokens", "--lora_dora")], ids=" ".join)
def test_the_banner_says_how_large_a_checkpoint_is(flags, short, train, tmp_path, capsys):
    """To 2 %, of the directory that the run then writes."""
    train(*short, "--max_steps", 1, *flags)
    (size, most), = shown(capsys.readouterr().out)
    written = space.used(steps(tmp_path / "out")[1])
    assert size == most == pytest.approx(written, rel=0.02)


@pytest.mark.full
def test_on_several_ranks_too(tmp_path):
    """With tp, with more ranks than weight files, and in the background."""
    two_layers(tmp_path / "model", tie_word_embeddings=False)
    layouts = {"tp": (2, "--strategy", "megatron", "--tp", 2, "--dtype", "bf16"), "three": (3, "--async_save"),
               "lora": (2, "--use_lora", "--strategy", "megatron", "--tp", 2), "offload": (2, "--param_offload")}
    common = ("--model", tmp_path / "model", "--train_data", EXAMPLES, *FAST, "--max_steps", 1)
    result = launch_all([(ranks, (*common, "--output_dir", name, *flags))
                         for name, (ranks, *flags) in layouts.items()], tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    for name, (size, _) in zip(layouts, shown(result.stdout), strict=True):
        assert size == pytest.approx(space.used(steps(tmp_path / name)[1]), rel=0.02), name


def test_an_optimizer_with_other_state_is_measured_as_it_is(short, train, tmp_path, capsys, monkeypatch):
    """As a fork writes it: matrices have one moment, vectors two."""
    from ops import optim

    monkeypatch.setattr(optim.AdamW, "new_state", lambda self, p: {
        name: p.detach().new_zeros(p.shape) for name in ("exp_avg", "exp_avg_sq")[: 1 if p.ndim > 1 else 2]})
    monkeypatch.setattr(optim.AdamW, "step", lambda self, *_, **__: None)
    train(*short, "--max_steps", 1)
    (size, _), = shown(capsys.readouterr().out)
    assert size == pytest.approx(space.used(steps(tmp_path / "out")[1]), rel=0.02)


def most_on_disk(monkeypatch):
    """A list to which each save adds the number of checkpoints while the disk has the most, and their bytes."""
    seen, move = [], checkpoint.move_into_place

    def moved(temporary, root, *rest):
        final = move(temporary, root, *rest)
        seen.append((len(checkpoint.steps_in(root)), space.used(root)))
        return final

    monkeypatch.setattr(checkpoint, "move_into_place", moved)
    return seen


@pytest.mark.parametrize("flags, n_kept, n_most", [
    ((), 3, 4), (("--keep_checkpoints", 1), 1, 2), (("--keep_checkpoints", "all"), 6, 6),
    (("--keep_checkpoints", "none"), 6, 6), (("--max_steps", 3), 3, 3), (("--max_steps", 4, "--async_save"), 3, 4)],
    ids=["default", "1", "all", "none", "few", "async"])
def test_what_is_kept_and_what_it_takes(flags, n_kept, n_most, short, train, tmp_path, capsys, monkeypatch):
    """The banner's figure is the most that the disk ever has."""
    seen = most_on_disk(monkeypatch)
    train(*short, "--save_steps", 1, "--use_lora", "--max_steps", 6, *flags)
    (_, most), = shown(capsys.readouterr().out)
    assert len(steps(tmp_path / "out")) == n_kept and max(seen)[0] == n_most
    assert most == pytest.approx(max(seen)[1], rel=0.02)


def test_the_best_saved_checkpoint_is_kept_by_default(short, train, tmp_path, capsys, monkeypatch):
    """Without --keep_best the step of the lowest val_loss may be unsaved: of the saved ones the best is kept, and
    `best` names it. A resume knows which one that is, and what is on the disk already."""
    flags = (*short, "--lr", "0.3", "--warmup_ratio", 1, "--val_data", short[1], "--eval_steps", 1, "--save_steps", 2,
             "--keep_checkpoints", 1)
    seen = most_on_disk(monkeypatch)
    lines = train(*flags, "--max_steps", 8)
    val = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    assert min(val, key=val.get) not in (2, 4, 6, 8) and min((2, 4, 6, 8), key=val.get) == 2  # or this shows nothing
    root = tmp_path / "out" / "checkpoints"

    def links():
        return [os.readlink(root / name) for name in ("best", "latest")]

    assert set(steps(tmp_path / "out")) == {2, 8} and links() == ["step_2", "step_8"]
    (_, most), = shown(capsys.readouterr().out)
    assert most == pytest.approx(max(seen)[1], rel=0.02) and max(seen)[0] == 3
    os.remove(root / "best")
    val = train(*flags, "--lr", 3, "--max_steps", 10, "--resume_from", "auto")[-1]["val_loss"]
    assert val > 10
    assert set(steps(tmp_path / "out")) == {2, 10} and links() == ["step_2", "step_10"]
    (_, after), = shown(capsys.readouterr().out)
    assert after == most
    state = json.loads((root / "latest" / "training_state" / "state.json").read_text())
    assert state["best_saved"]["step"] == 2


def test_a_run_of_before_the_default_keeps_all(short, train, tmp_path):
    """Its config.yaml says null."""
    flags = (*short, "--use_lora", "--save_steps", 1)
    train(*flags, "--max_steps", 2)
    path = tmp_path / "out" / "config.yaml"
    text = path.read_text()
    assert "keep_checkpoints: 3\n" in text
    path.write_text(text.replace("keep_checkpoints: 3\n", "keep_checkpoints: null\n"))
    train(*short[:2], "--resume_from", "auto", "--max_steps", 6)
    assert len(steps(tmp_path / "out")) == 6


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("free, keep, n_there, remedy", [
    (5000, 3, 0, None), (4999, 3, 0, "use --keep_checkpoints 2, or an --output_dir"),
    (999, 3, 0, "use an --output_dir"), (999, None, 0, "use an --output_dir"),
    (3000, "all", 0, "use --keep_checkpoints 1, or an --output_dir"), (2000, 3, 3, None),
    (1999, 3, 3, "use --keep_checkpoints 2, or an --output_dir"), (10_000, None, 0, None)])
def test_a_disk_without_room_is_a_warning(free, keep, n_there, remedy, monkeypatch):
    """Ten checkpoints of 1000 bytes, and the best is kept: what is there already takes no more room."""
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: Usage(0, 0, free))
    line, warning = space.lines(1000, keep=keep, has_best=True, n_there=n_there, n_left=10 - n_there, directory="o")
    assert ("all 10 are kept: at most 10.0 kB" in line) == (keep in (None, "all"))
    assert (warning is None) == (remedy is None)
    if warning:
        assert warning.startswith("warning: the disk of o has ") and remedy in warning
        fitting = re.search(r"--keep_checkpoints (\d+)", warning)
        if fitting:  # the next larger one does not fit
            assert [space.lines(1000, keep=int(fitting[1]) + more, has_best=True, n_there=n_there, n_left=10 - n_there,
                                directory="o")[1] is None for more in (0, 1)] == [True, False]


def test_the_warning_is_printed(short, train, monkeypatch, capsys):
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: Usage(0, 0, 10**6))
    train(*short, "--max_steps", 1)
    assert "warning: the disk of out has 1.00 MB free, and the checkpoints take up to" in capsys.readouterr().err


@pytest.mark.parametrize("step, total, every, per_epoch, n", [
    (0, 10, 4, 9, 3), (4, 10, 4, 9, 2), (5, 10, 4, 9, 2), (8, 10, 4, 9, 1), (10, 10, 4, 9, 0), (0, 18, None, 9, 2),
    (0, 20, None, 9, 3), (0, 3, None, 9, 1), (9, 18, None, 9, 1)])
def test_saves_left(step, total, every, per_epoch, n):
    due = [s for s in range(step + 1, total + 1) if s % (every or per_epoch) == 0 or s == total]
    assert space.saves_left(step, total, every, per_epoch) == len(due) == n


@pytest.mark.parametrize("n, text", [
    (0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (9_996, "10.0 kB"), (99_960, "100 kB"), (999_499, "999 kB"),
    (999_500, "1.00 MB"), (14_865_086, "14.9 MB"), (7_620_000_000, "7.62 GB"), (10**12, "1.00 TB"),
    (10**16, "10,000 TB")])
def test_bytes_as_text(n, text):
    assert space.text(n) == text
