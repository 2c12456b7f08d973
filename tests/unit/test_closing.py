"""screen/closing.py: what a run prints at its end: its result, and commands that work where they are printed."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from helpers import TINY, metrics, sft_main, write

import chat
import sft
from disk import space
from screen import closing


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory: another one than the project's, with a blank in its path; it has short rows."""
    folder = tmp_path / "an other folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    write(folder / "short.json", [{"prompt": f"{i}?", "response": f"{i}!"} for i in range(6)])
    return folder


FLAGS = ("--model", TINY, "--train_data", "short.json", "--max_length", 32, "--batch_size", 2, "--output_dir",
         "my run", "--gradient_checkpointing", "false")


def labelled(out):
    """{label: the rest} of the lines that a run prints after its last step."""
    return dict(re.findall(r"^([a-z_ ]{8}) (\S.*)$", out, re.M))


def test_the_closing_lines_are_those_of_the_run(folder, capsys):
    """First and last loss, lowest val_loss, speed, memory, disk, over a resume too; where things are."""
    flags = (*FLAGS, "--val_data", "short.json", "--eval_steps", 1, "--lr", 1e-2)
    sft_main(*flags, "--max_steps", 2)
    sft_main(*flags, "--max_steps", 4, "--resume_from", "auto")
    lines = metrics("my run")
    steps, val = [[line for line in lines if key in line] for key in ("loss", "val_loss")]
    best = min((line for line in val if line["step"]), key=lambda line: line["val_loss"])
    said = labelled(capsys.readouterr().out.split("resume   step 2")[1])
    assert said["loss    "] == f"{steps[0]['loss']:.4f} in step 1, {steps[3]['loss']:.4f} in step 4"
    assert said["val_loss"] == f"{best['val_loss']:.4f} after step 4 is the lowest: my run/checkpoints/best"
    assert best["step"] == 4
    speed = sorted(line["tokens_per_second"] for line in steps)
    memory = max(line["peak_memory_gb"] for line in steps)
    form = r"(.*) of training, ([\d,]+) tokens/s, (.*) GiB of memory at most, (.*) on the disk"
    took = re.fullmatch(form, said["took    "])
    assert took[1] == f"{sum(line['seconds'] for line in steps):.3g} s"
    assert took[2] == f"{(speed[1] + speed[2]) / 2:,.0f}" and took[3] == f"{memory:.2f}"
    assert took[4] == space.text(space.used("my run"))
    assert said["saved   "] == "my run/checkpoints/latest -> step_4 (Hugging Face model directory)"
    assert said["report  "] == "my run/report.html" and os.path.exists("my run/report.html")


def test_sets_and_forgetting(tmp_path):
    """The set that decides is the one that --keep_best names, or the first; forgetting is of each set."""
    lines = [{"step": step, "val_loss": 2.0, "forgetting": 0.1, "val_sets": {
        "math": {"loss": 3 - step / 4, "forgetting": -step / 4},
        "general": {"loss": 1 + step / 8, "forgetting": step / 8}}} for step in (0, 2, 4)]
    lines[1:1] = [{"step": step, "loss": 3.0 / step, "seconds": 1} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = closing.result_lines(tmp_path)
    assert "val_loss 2.0000 of math after step 4 is the lowest" in said
    assert "forgot   -1.0000 of math, +0.5000 of general: the last val_loss minus the one before training; above 0 it is worse" in said
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best").symlink_to("step_4")
    assert f"val_loss 2.0000 of math after step 4 is the lowest: {tmp_path}/checkpoints/best" in closing.result_lines(tmp_path)
    (tmp_path / "config.yaml").write_text("keep_best: general\n")  # whose lowest step was not saved
    assert "val_loss 1.2500 of general after step 2 is the lowest" in closing.result_lines(tmp_path)
    for line in lines:
        line.pop("val_sets", None)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "forgot   +0.1000: the last val_loss minus the one before training; above 0 it is worse" in closing.result_lines(tmp_path)


def test_only_the_sets_of_the_last_validation_count(tmp_path):
    """A resume may have renamed or removed sets: those of before have no last loss, and decide nothing."""
    lines = [{"step": 0, "val_loss": 2.0, "val_tokens": 9}, {"step": 1, "loss": 3.0, "seconds": 1},
             {"step": 1, "val_loss": 1.0, "val_tokens": 9, "forgetting": -1.0, "val_sets": {
                 "old": {"loss": 1.0, "forgetting": -1.0}, "b": {"loss": 1.5, "forgetting": 0.5}}},
             {"step": 2, "val_loss": 1.9, "val_tokens": 7, "val_sets": {
                 "b": {"loss": 1.25, "forgetting": 0.25}, "new": {"loss": 1.75}}}]

    def said():
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return closing.result_lines(tmp_path)

    assert "val_loss 1.2500 of b after step 2 is the lowest" in said()
    assert "forgot   +0.2500 of b: the last val_loss minus the one before training; above 0 it is worse" in said()
    del lines[-1]["val_sets"]  # one set, with fewer targets: other data than before
    assert "val_loss 1.9000 after step 2 is the lowest" in said()
    assert not any(line.startswith("forgot") for line in said())


def arguments_of(command, program):
    """The arguments of a printed command, whose program must be this file of the project, as a shell reads them."""
    python, path, *arguments = shlex.split(command)
    assert os.path.samefile(path, os.path.join(os.path.dirname(sft.__file__), program)) and python.endswith("python")
    return arguments


def test_the_commands_work_where_they_are_printed(folder, capsys, monkeypatch):
    """Trying the result and training on, from a folder with a blank in its path, with a blank in --output_dir."""
    sft_main(*FLAGS, "--epochs", 1)
    said = labelled(capsys.readouterr().out)
    monkeypatch.setattr(sys, "argv", ["chat.py", *arguments_of(said["try it  "], "chat.py"), "--prompt", "1?",
                                      "--max_new_tokens", "2"])
    chat.main()
    sft_main(*arguments_of(said["resume  "], "sft.py"))
    assert [line["step"] for line in metrics("my run")] == list(range(1, 7))  # twice as many as before
    sft_main("--output_dir", "my run", "--resume_from", "auto", "--max_steps", 2)  # fewer than it has
    more = arguments_of(labelled(capsys.readouterr().out)["resume  "], "sft.py")[-2:]
    assert more == ["--max_steps", "12"]
    assert re.search(r"tools/push.py 'my run/checkpoints/latest' ORG/NAME$", said["push    "])


def test_a_stopped_run_is_resumed_as_it_is():
    """Not with more epochs; on many ranks by train.sh, with the variables of several nodes."""
    cfg = sft.Config(output_dir="o", epochs=2)

    def resume(cfg, is_complete, world_size=1):
        lines = closing.command_lines(cfg, "o/checkpoints/latest", is_complete=is_complete, world_size=world_size)
        return next(line for line in lines if line.startswith("resume"))

    assert resume(cfg, False).endswith("sft.py --output_dir o --resume_from auto")
    assert resume(cfg, True).endswith("--resume_from auto --epochs 4")
    assert resume(sft.Config(output_dir="o", max_steps=5), True).endswith("--resume_from auto --max_steps 10")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "4")
        assert re.match(r"resume   bash \S*train.sh --n_gpus 4 --output_dir o", resume(cfg, False, 4))
        assert re.match(r"resume   NNODES=2 bash \S*train.sh --n_gpus 4 --output_dir o", resume(cfg, False, 8))


def test_the_command_trains_on_after_early_stopping(folder, capsys):
    """Which ends a resumed run at once, however many epochs it is given."""
    sft_main(*FLAGS, "--epochs", 2, "--val_data", "short.json", "--eval_steps", 1, "--early_stopping", 1, "--lr", 1)
    said = labelled(capsys.readouterr().out)
    steps = [line["step"] for line in metrics("my run") if "loss" in line]
    assert said["stopped "] and steps[-1] < 6
    sft_main(*arguments_of(said["resume  "], "sft.py"))
    assert [line["step"] for line in metrics("my run") if "loss" in line] == list(range(1, 7))


@pytest.mark.full
def test_a_shell_runs_the_commands(folder, capsys):
    """The same, as a user pastes them; push.py at least prints its help."""
    sft_main(*FLAGS, "--epochs", 1)
    said = labelled(capsys.readouterr().out)
    commands = [said["try it  "] + " --prompt '1?' --max_new_tokens 2", said["resume  "]]
    if os.path.exists(os.path.join(os.path.dirname(sft.__file__), "tools", "push.py")):
        commands.append(said["push    "] + " --help")
    for command in commands:
        done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics("my run")] == list(range(1, 7))
