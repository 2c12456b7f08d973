"""What is seen of a run: the screen, loggers read back from their own files, samples, the best and worst, warnings."""

import fcntl
import json
import os
import re
import struct
import subprocess
import sys
import termios

import pytest
from helpers import EXAMPLES, FAST, ROOT, TINY, VALIDATION, program

import chat
from screen import log


def samples(directory, kind):
    with open(os.path.join(directory, "samples.jsonl"), encoding="utf-8") as f:
        return [line for line in map(json.loads, f) if line["kind"] == kind]


def expected_numbers(lines):
    """{(name, step): value} as every logger should have it."""
    found = {}
    for line in lines:
        kind = "val" if "val_loss" in line else "train"
        for name, value in line.items():
            if name != "step":
                found[f"{kind}/{name.removeprefix('val_')}", line["step"]] = value
    return found


def wandb_records(file):
    """The records of a .wandb file: LevelDB's log format, in blocks of 32 KiB, behind a header of 7 bytes."""
    content, at, record = file.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while at < len(content):
        if 2**15 - at % 2**15 < 7:  # what is left of a block is padding
            at += 2**15 - at % 2**15
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        record = record * (kind in (3, 4)) + content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record


def test_wandb_has_every_number(train, tmp_path, monkeypatch):
    """The real package, offline; its own file read back. A resumed run goes on under the same id."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = (*FAST, "--logger", "wandb", "--project", "tests", "--run_name", "one", "--val_data", VALIDATION)
    train(*flags, "--max_steps", 2)
    lines = train(*flags, "--max_steps", 3, "--resume_from", "auto")
    files = sorted((tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and files[0].name == files[1].name
    found, named = {}, set()
    for file in files:
        for data in wandb_records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                named.add((record.run.project, record.run.display_name))
            items = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
            found.update({(name, items["_step"]): v for name, v in items.items() if not name.startswith("_")})
    assert named == {("tests", "one")} and found == expected_numbers(lines)


def test_tensorboard_has_every_number(train, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = train(*FAST, "--logger", "console,tensorboard", "--val_data", VALIDATION, "--max_steps", 2)
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    found = {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    assert found == pytest.approx(expected_numbers(lines), rel=1e-6)  # it keeps fp32


def test_trackio_has_every_number(train, tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")

    monkeypatch.setattr(trackio.sqlite_storage, "TRACKIO_DIR", tmp_path)
    lines = train(*FAST, "--logger", "trackio", "--project", "tests", "--run_name", "one", "--max_steps", 2)
    rows = trackio.sqlite_storage.SQLiteStorage.get_logs("tests", "one")
    found = {(name, row["step"]): v for row in rows for name, v in row.items() if name.startswith("train/")}
    assert found == expected_numbers(lines)


def test_a_logger_that_is_not_there_is_an_error_before_anything_is_loaded(train, monkeypatch, tmp_path):
    """It names what to type; the directory is not touched."""
    monkeypatch.setattr(log.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wandb is not installed; type: .* -m pip install wandb"):
        train("--logger", "console,wandb")
    with pytest.raises(ValueError, match="'mlflow' is none of console, wandb, tensorboard, trackio"):
        train("--logger", "mlflow")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_logger_that_fails_or_hangs_never_ends_the_run(train, monkeypatch, capfd):
    """It raises at the second step; the run goes on with all its lines, and says so once."""
    seen, find_spec = [], log.importlib.util.find_spec
    monkeypatch.setattr(log.importlib.util, "find_spec", lambda name, *rest: name == "wandb" or find_spec(name, *rest))

    def broken(settings, directory, last_step):
        def put(values, step):
            seen.append(step)
            if step == 2:
                raise ConnectionError("the server is gone")

        return put, lambda: None

    monkeypatch.setitem(log.OPEN, "wandb", broken)
    lines = train(*FAST, "--logger", "wandb", "--max_steps", 6)
    error = capfd.readouterr().err
    assert len(lines) == 6 and seen == [1, 2]
    assert error.count("--logger wandb has failed; the run goes on without it") == 1
    hangs = log.threading.Event()
    monkeypatch.setitem(log.OPEN, "wandb", lambda *_: (lambda values, step: hangs.wait(), lambda: None))
    logger = log.Logger("wandb", {}, "", 0)
    logger.put(({}, 1))
    logger.close(seconds=0.1)
    assert "has not finished" in capfd.readouterr().err
    hangs.set()


def in_terminal(rows, columns, *words):
    """The screen of a command on a terminal of this size: what was drawn, in order."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    process = subprocess.Popen([sys.executable, *map(str, words)], stdout=theirs, stderr=theirs, cwd=ROOT)
    os.close(theirs)
    seen = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        seen += piece
    os.close(ours)
    assert process.wait() == 0, seen.decode()
    return seen.decode()


def test_the_bar_fits_a_narrow_terminal(tmp_path):
    """30 columns: the bar's line is redrawn in place, never longer than the terminal is wide."""
    words = ["sft.py", "--model", TINY, "--train_data", EXAMPLES, *FAST, "--max_steps", 3, "--output_dir", tmp_path,
             "--no-gradient_checkpointing"]
    seen = in_terminal(24, 30, *words)
    drawn = [line for line in re.split(r"[\r\n]+", seen) if "|" in line or "it/s" in line or "%" in line]
    assert drawn and all(len(line) <= 30 for line in drawn), drawn
    assert "step 1 of 3" not in seen


def test_a_terminal_without_a_size_has_plain_lines(tmp_path):
    """As some containers and recorders give it: 0 × 0."""
    words = ["sft.py", "--model", TINY, "--train_data", EXAMPLES, *FAST, "--max_steps", 3, "--output_dir", tmp_path,
             "--no-gradient_checkpointing"]
    assert "step 3 of 3: loss" in in_terminal(0, 0, *words)


def test_a_log_file_has_plain_lines(train, capsys):
    """Loss, val_loss, rate, norm, speed, memory and the time left, one line at a time: no bar, no carriage return."""
    train(*FAST, "--max_length", 128, "--epochs", 2, "--val_data", VALIDATION)
    out, err = capsys.readouterr()
    assert re.search(r"step 1 of 18: loss \d\.\d+, lr \S+, norm \S+, [\d,]+ tokens/s, \d\.\d\d GiB, \d\d:\d\d left", out)
    assert re.search(r"step 18 of 18: loss \S+, val_loss \d", out) and "step 9: val_loss" in out
    assert "\r" not in out + err and "%|" not in out + err


def test_without_console_nothing_is_shown_while_it_runs(train, capsys):
    pytest.importorskip("tensorboard")
    train(*FAST, "--max_steps", 2, "--logger", "tensorboard")
    assert "step 1 of" not in capsys.readouterr().out


def test_samples_are_what_chat_answers(train, tmp_path, capsys, monkeypatch):
    """At each validation, greedy, on the screen and in samples.jsonl; the last ones are those of the saved model."""
    (tmp_path / "prompts.txt").write_text("What is supervised fine-tuning?\n\n你好\n", encoding="utf-8")
    monkeypatch.setattr("screen.samples.SAMPLE_TOKENS", 60)
    train(*FAST, "--lr", "3e-4", "--epochs", 2, "--sample_prompts", "prompts.txt", "--eval_steps", 9)
    found = samples("out", "sample")
    assert [(line["step"], line["prompt"]) for line in found] == [
        (step, prompt) for step in (9, 18) for prompt in ("What is supervised fine-tuning?", "你好")]
    assert max(len(line["answer"]) for line in found[2:]) > 20  # something to compare
    model, tokenizer, eos_ids = chat.load("out/checkpoints/latest")
    cfg = chat.Config(max_new_tokens=60)
    for line in found[2:]:
        messages = [{"role": "user", "content": line["prompt"]}]
        assert line["answer"] == "".join(chat.answer(model, tokenizer, eos_ids, messages, cfg)).rstrip("\ufffd")
    assert "step 18: 'What is supervised fine-tuning?' -> " in capsys.readouterr().out


def test_sample_prompts_may_be_rows(train, tmp_path):
    """A data file's conversations up to their last answers, which are not given away."""
    rows = [{"messages": [{"role": "system", "content": "short"}, {"role": "user", "content": "one"},
                          {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"},
                          {"role": "assistant", "content": "SECRET"}]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    from screen import samples
    from text import template

    tokenizer = template.ChatTokenizer(TINY)
    (prompt, ids), = samples.read_prompts(str(tmp_path / "rows.json"), tokenizer)
    text = tokenizer.tokenizer.decode(ids, skip_special_tokens=False)
    assert prompt == "three" and "SECRET" not in text and text.endswith("three<|im_end|>\n<|im_start|>assistant\n")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="--sample_prompts .*empty.txt: it must have prompts, one a line"):
        train(*FAST, "--sample_prompts", tmp_path / "empty.txt")


@pytest.mark.parametrize("ranks, flags", [
    pytest.param(4, ("--strategy", "megatron", "--tp", "2"), marks=pytest.mark.full),
    pytest.param(2, ("--param_offload",), marks=pytest.mark.full)])
def test_many_ranks_answer_as_one_and_warn_once(train, tmp_path, monkeypatch, ranks, flags):
    """Samples, best and worst of dp x tp and of dp with offload are those of one rank; a warning is printed once."""
    (tmp_path / "prompts.txt").write_text("What is supervised fine-tuning?\n", encoding="utf-8")
    monkeypatch.setattr("screen.samples.SAMPLE_TOKENS", 12)
    common = (*FAST, "--epochs", 2, "--sample_prompts", tmp_path / "prompts.txt")
    train(*common)
    result = program("warns", "--model", TINY, "--train_data", EXAMPLES, *common, *flags, "--output_dir",
                     tmp_path / "many", ranks=ranks)
    assert result.returncode == 0, result.stderr
    assert samples(tmp_path / "many", "sample") == samples("out", "sample")
    for kind in ("best", "worst"):
        ours, theirs = samples("out", kind), samples(tmp_path / "many", kind)
        assert len(ours) == len(theirs) == 20  # two saves of ten
        assert [line["loss"] for line in theirs] == pytest.approx([line["loss"] for line in ours], rel=1e-4)
    lines = [line for line in result.stderr.splitlines() if "a warning of the test" in line]
    assert len(lines) == 1 and "warning: " in lines[0]
    others = [line for line in result.stderr.splitlines() if "not of rank 0" in line]
    assert len(others) == 1 and re.match("warning, rank [1-3](, [23])*: ", others[0])  # who was there at that moment
    assert result.stderr.index(others[0]) < result.stderr.index("the ninth")
    assert [line for line in result.stderr.splitlines() if re.match("warning[:,]", line)] == [*lines, *others]  # no more


def test_best_and_worst_are_those_of_a_plain_reading(train, tmp_path):
    """At rate zero the losses of all conversations are the untouched model's: each one's mean by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with open(EXAMPLES, encoding="utf-8") as f:
        rows = [row for row in json.load(f) if "prompt" in row]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    train(*FAST, "--epochs", 1, "--lr", 0, "--train_data", tmp_path / "rows.json")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), AutoTokenizer.from_pretrained(TINY)
    losses = {}
    for i, row in enumerate(rows):
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]}], add_generation_prompt=True,
                                               return_dict=False)
        whole = prompt + tokenizer(row["response"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0, len(prompt) - 1 : -1]
        losses[i] = torch.nn.functional.cross_entropy(logits, torch.tensor(whole[len(prompt) :])).item()
    kept = {kind: {int(re.search(r"\[(\d+)\]", line["source"])[1]): line["loss"] for line in samples("out", kind)}
            for kind in ("best", "worst")}
    order = sorted(losses, key=losses.get)
    for kind, ids in ("best", order[:10]), ("worst", order[::-1][:10]):
        assert list(kept[kind]) == ids and list(kept[kind].values()) == pytest.approx([losses[i] for i in ids], rel=1e-5)


def test_the_best_checkpoint_is_kept(train, tmp_path):
    """The lowest val_loss is early (the rate is absurd later); pruning leaves it, `best` names it, a resume keeps it."""
    flags = (*FAST, "--lr", "0.3", "--warmup_ratio", 1, "--val_data", VALIDATION, "--eval_steps", 1, "--save_steps", 4,
             "--keep_best", "--keep_checkpoints", 1)
    lines = train(*flags, "--max_steps", 8)
    val = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    best = min(val, key=val.get)
    assert best not in (4, 8)
    root = tmp_path / "out" / "checkpoints"
    assert os.readlink(root / "best") == f"step_{best}" and os.readlink(root / "latest") == "step_8"
    assert sorted(os.listdir(root)) == sorted(["best", "latest", f"step_{best}", "step_8"])
    state = json.loads((root / "latest" / "training_state" / "state.json").read_text())
    assert state["best"] == {"val_loss": val[best], "step": best, "behind": 8 - best}


def test_early_stopping(train, tmp_path, capsys):
    """Ends after so many validations without a lower val_loss, with the last step saved; a resume does not go on."""
    flags = (*FAST, "--lr", "0.3", "--warmup_ratio", 1, "--val_data", VALIDATION, "--eval_steps", 1, "--early_stopping", 2,
             "--max_steps", 20)
    lines = train(*flags)
    val = [line["val_loss"] for line in lines if "val_loss" in line]
    assert len(val) < 20 and min(val) == val[-3] and len(lines) == 2 * len(val)
    assert os.readlink(tmp_path / "out" / "checkpoints" / "latest") == f"step_{len(val)}"
    assert f"stopped  after step {len(val)}: 2 validations without a lower val_loss" in capsys.readouterr().out
    assert train(*flags, "--resume_from", "auto") == lines


def test_what_does_nothing_is_refused(train):
    for flags in (["--keep_best"], ["--early_stopping", 2], ["--eval_steps", 2]):
        with pytest.raises(ValueError, match=f"{flags[0]} .*does nothing without --val_data"):
            train(*FAST, *flags)
