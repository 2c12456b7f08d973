"""What a run shows and records: the screen, loggers' own files, samples, best and worst conversations, warnings."""

import fcntl
import json
import os
import re
import struct
import subprocess
import sys
import termios

import pytest
from helpers import EXAMPLES, FAST, ROOT, TINY, VALIDATION, chatml, program

import chat
from ops import memory
from disk import lock
from screen import log


def samples(directory, kind):
    with open(os.path.join(directory, "samples.jsonl"), encoding="utf-8") as f:
        return [line for line in map(json.loads, f) if line["kind"] == kind]


def expected_numbers(lines):
    """{(name, step): value} that every logger should have."""
    expected = {}
    for line in lines:
        kind = "val" if "val_loss" in line else "train"
        for name, value in line.items():
            if name != "step":
                expected[f"{kind}/{name.removeprefix('val_')}", line["step"]] = value
    return expected


def wandb_records(file):
    """Yield the records of a .wandb file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    content, offset, record = file.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while offset < len(content):
        if 2**15 - offset % 2**15 < 7:  # the rest of a block is padding
            offset += 2**15 - offset % 2**15
            continue
        _, length, kind = struct.unpack("<IHB", content[offset : offset + 7])
        record = record * (kind in (3, 4)) + content[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # a full record, or the last fragment of one
            yield record


def test_wandb_has_every_number(train, tmp_path, monkeypatch):
    """The real package, offline; its own file is read back. A resumed run keeps its id."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = (*FAST, "--logger", "wandb", "--project", "tests", "--run_name", "one", "--val_data", VALIDATION)
    train(*flags, "--max_steps", 2)
    lines = train(*flags, "--max_steps", 3, "--resume_from", "auto")
    files = sorted((tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and files[0].name == files[1].name
    numbers, names = {}, set()
    for file in files:
        for data in wandb_records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                names.add((record.run.project, record.run.display_name))
            items = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
            numbers.update({(name, items["_step"]): v for name, v in items.items() if not name.startswith("_")})
    assert names == {("tests", "one")}
    assert numbers == expected_numbers(lines)


def test_tensorboard_has_every_number(train, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = train(*FAST, "--logger", "console,tensorboard", "--val_data", VALIDATION, "--max_steps", 2)
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    numbers = {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    assert numbers == pytest.approx(expected_numbers(lines), rel=1e-6)  # tensorboard stores fp32


def test_trackio_has_every_number(train, tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")

    monkeypatch.setattr(trackio.sqlite_storage, "TRACKIO_DIR", tmp_path)
    lines = train(*FAST, "--logger", "trackio", "--project", "tests", "--run_name", "one", "--max_steps", 2)
    rows = trackio.sqlite_storage.SQLiteStorage.get_logs("tests", "one")
    numbers = {(name, row["step"]): v for row in rows for name, v in row.items() if name.startswith("train/")}
    assert numbers == expected_numbers(lines)


def test_an_unknown_or_missing_logger_is_an_error_before_anything_is_loaded(train, monkeypatch, tmp_path):
    """The error names the remedy; the output directory is not created."""
    monkeypatch.setattr(log.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wandb is not installed; run .* -m pip install wandb"):
        train("--logger", "console,wandb")
    with pytest.raises(ValueError, match="unknown logger 'logbook'; use console, quiet, wandb, tensorboard, trackio"):
        train("--logger", "logbook")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_logger_that_fails_or_hangs_never_ends_the_run(train, monkeypatch, capfd):
    """The logger raises at the second step; the run writes all its lines and prints one warning."""
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
    assert len(lines) == 6
    assert seen == [1, 2]
    assert error.count("--logger wandb has failed; the run continues without it") == 1
    hangs = log.threading.Event()
    monkeypatch.setitem(log.OPEN, "wandb", lambda *_: (lambda values, step: hangs.wait(), lambda: None))
    logger = log.Logger("wandb", {}, "", 0)
    logger.put(({}, 1))
    logger.close(seconds=0.1)
    assert "did not finish within 0.1 s" in capfd.readouterr().err
    hangs.set()


def in_terminal(rows, columns, *arguments):
    """Run a Python program in a terminal of this size; return all that it has drawn, in order."""
    master, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    process = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=terminal, stderr=terminal, cwd=ROOT)
    os.close(terminal)
    output = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # the program has closed the terminal
            break
        output += chunk
    os.close(master)
    assert process.wait() == 0, output.decode()
    return output.decode()


@pytest.mark.full
def test_the_bar_fits_a_narrow_terminal(tmp_path):
    """30 columns: the bar is redrawn in place and is never longer than the terminal is wide."""
    output = in_terminal(24, 30, *three_steps(tmp_path))
    drawn = [line for line in re.split(r"[\r\n]+", output) if line.rstrip().endswith(" left")]
    assert any(re.search(r"loss \d\.\d{4}, \d\d:\d\d left", line) for line in drawn), drawn
    assert all(len(line) <= 30 for line in drawn), drawn
    assert "step 1 of 3" not in output


def three_steps(directory):
    return ("sft.py", "--model", TINY, "--train_data", EXAMPLES, *FAST, "--max_steps", 3, "--output_dir", directory,
            "--no-gradient_checkpointing")


@pytest.mark.full
def test_a_terminal_without_a_size_has_plain_lines(tmp_path):
    """Some containers and recorders report a terminal of 0 × 0."""
    assert "step 3 of 3: loss" in in_terminal(0, 0, *three_steps(tmp_path))


def test_a_log_file_has_plain_lines(train, capsys):
    """Lines with loss, learning rate, norm, speed, memory and time left; no bar and no carriage return. val_loss is on
    lines of its own: that of a step is measured later."""
    train(*FAST, "--max_length", 128, "--epochs", 2, "--val_data", VALIDATION)
    out, err = capsys.readouterr()
    numbers = (r"loss \d\.\d+, accuracy \S+ %, lr \S+, norm \S+, [\d,]+ tokens/s, "
               r"\d\.\d\d GiB, \d\d:\d\d left")
    assert re.search("step 1 of 18: " + numbers, out)
    assert all(re.search(rf"^step {step}: val_loss \d", out, re.M) for step in (0, 9, 18))
    assert not re.search(r"^step \d+ of .*val_loss", out, re.M)
    assert "\r" not in out + err
    assert "%|" not in out + err


def test_a_part_of_an_epoch_is_no_factor():
    assert [log.in_epochs(steps, 9) for steps in (9, 1800, 3, 10)] == [
        "9 = 1 epoch × 9 steps", "1,800 = 200 epochs × 9 steps", "3, 0.3333 epochs of 9 steps",
        "10, 1.111 epochs of 9 steps"]


def test_mfu_is_shown_where_it_exists(train, capsys, monkeypatch):
    """On CUDA it is in the line of a step; reserved memory is in metrics.jsonl only. The CPU has neither."""
    assert not {"mfu", "reserved_memory_gb"} & train(*FAST, "--max_steps", 1)[0].keys()
    assert "MFU" not in capsys.readouterr().out
    record, gpu = log.Log.record, {"mfu": 0.414, "reserved_memory_gb": 61.5}
    monkeypatch.setattr(log.Log, "record", lambda self, step, values: record(self, step, {**values, **gpu}))
    line, = train(*FAST, "--max_steps", 1, out="gpu")
    assert gpu.items() <= line.items()
    assert re.search(r"norm \S+, 41 % MFU, [\d,]+ tokens/s, \d\.\d\d GiB, ", capsys.readouterr().out)


def test_reserved_memory_is_the_allocators(monkeypatch):
    monkeypatch.setattr(memory.torch.cuda, "max_memory_reserved", lambda device: 3 * 2**29)
    assert memory.reserved_memory_gb(memory.torch.device("cuda", 0)) == 1.5
    assert memory.reserved_memory_gb(memory.torch.device("cpu")) is None


def test_the_screen_is_on_unless_quiet_is_named(train, capsys):
    """Another logger does not switch it off. Of a quiet run, the result is printed and metrics.jsonl is written."""
    pytest.importorskip("tensorboard")
    for i, (names, is_shown) in enumerate([("tensorboard", True), ("console,tensorboard", True), ("quiet", False),
                                           ("tensorboard, quiet", False)]):
        lines = train(*FAST, "--max_steps", 2, "--logger", names, out=f"out{i}")
        out = capsys.readouterr().out
        assert ("step 1 of 2: loss" in out) == is_shown, names
        assert len(lines) == 2 and "saved    " in out


def test_a_prompt_that_is_not_utf_8_is_an_error(monkeypatch, capsys):
    """A byte outside UTF-8 reaches Python's argv as half a character."""
    monkeypatch.setattr(sys, "argv", ["chat.py", "tiny", "--prompt", "a\udcff"])
    with pytest.raises(ValueError, match="the prompt is not UTF-8 text"):
        chat.main()


def test_samples_are_what_chat_answers(train, tmp_path, capsys, monkeypatch):
    """Prompts are answered at each validation, on the screen and in samples.jsonl; the last answers are those that
    chat.py gives with the saved model."""
    (tmp_path / "prompts.txt").write_text("What is supervised fine-tuning?\n\n你好\n", encoding="utf-8")
    monkeypatch.setattr("screen.samples.SAMPLE_TOKENS", 60)
    train(*FAST, "--lr", "3e-4", "--epochs", 2, "--sample_prompts", "prompts.txt", "--eval_steps", 9)
    lines = samples("out", "sample")
    assert [(line["step"], line["prompt"]) for line in lines] == [
        (step, prompt) for step in (9, 18) for prompt in ("What is supervised fine-tuning?", "你好")]
    assert max(len(line["answer"]) for line in lines[2:]) > 20  # otherwise there is little to compare
    model, tokenizer, eos_ids = chat.load("out/checkpoints/latest")
    cfg = chat.Config(max_new_tokens=60)
    for line in lines[2:]:
        messages = [{"role": "user", "content": line["prompt"]}]
        assert line["answer"] == "".join(chat.answer(model, tokenizer, eos_ids, messages, cfg)).rstrip("\ufffd")
    assert "step 18: 'What is supervised fine-tuning?' -> " in capsys.readouterr().out


@pytest.mark.parametrize("flags", [(), ("--use_lora",)], ids=["full", "lora"])
def test_chat_renders_a_prompt_as_in_training(flags, train, tmp_path):
    """With the run's template and its variables, without a word about either; other variables may be given."""
    more = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{{- 'Now: ' if not thinks }}{%- endif %}"
    template = chatml("('Now: ' if m.role == 'assistant' and not thinks else '') + m.content")
    template = template.partition("{%- if add_generation_prompt")[0] + more
    (tmp_path / "mine.jinja").write_text(template, encoding="utf-8")
    train("--max_steps", 1, "--max_length", 128, "--chat_template", "mine.jinja", "--template_kwargs", '{"thinks": true}',
          *flags)
    step, messages = str(tmp_path / "out/checkpoints/latest"), [{"role": "user", "content": "q"}]
    prompt = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    for given, ends in ((None, ""), ('{"thinks": false}', "Now: ")):
        tokenizer = chat.load(step, template_kwargs=given)[1]
        assert tokenizer.render(messages, add_generation_prompt=True) == prompt + ends
    with pytest.raises(ValueError, match="--template_kwargs sets thinx, which the chat template does not read"):
        chat.load(step, template_kwargs='{"thinx": 1}')


def test_sample_prompts_may_be_rows(train, tmp_path):
    """A prompt from a data file is a conversation without its last answer."""
    rows = [{"messages": [{"role": "system", "content": "short"}, {"role": "user", "content": "one"},
                          {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"},
                          {"role": "assistant", "content": "SECRET"}]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    from screen import samples
    from text import template

    tokenizer = template.ChatTokenizer(TINY)
    (prompt, ids), = samples.read_prompts(str(tmp_path / "rows.json"), tokenizer)
    text = tokenizer.tokenizer.decode(ids, skip_special_tokens=False)
    assert prompt == "three"
    assert "SECRET" not in text
    assert text.endswith("three<|im_end|>\n<|im_start|>assistant\n")
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "prompts.txt").write_text("问题\n", encoding=encoding)
        assert samples.read_prompts(str(tmp_path / "prompts.txt"), tokenizer)[0][0] == "问题"
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="--sample_prompts .*empty.txt: expected prompts, one per line"):
        train(*FAST, "--sample_prompts", tmp_path / "empty.txt")


@pytest.mark.parametrize("ranks, flags", [
    pytest.param(4, ("--strategy", "megatron", "--tp", "2"), marks=pytest.mark.full),
    pytest.param(2, ("--param_offload",), marks=pytest.mark.full)])
def test_many_ranks_answer_as_one_and_warn_once(train, tmp_path, monkeypatch, ranks, flags):
    """dp × tp, and dp with offload, have the samples, best and worst of one rank; each warning is printed once."""
    (tmp_path / "prompts.txt").write_text("What is supervised fine-tuning?\n", encoding="utf-8")
    monkeypatch.setattr("screen.samples.SAMPLE_TOKENS", 12)
    common = (*FAST, "--epochs", 2, "--sample_prompts", tmp_path / "prompts.txt")
    train(*common, model=TINY)
    result = program("warns", "--model", TINY, "--train_data", EXAMPLES, *common, *flags, "--output_dir",
                     tmp_path / "many", ranks=ranks)
    assert result.returncode == 0, result.stderr
    assert samples(tmp_path / "many", "sample") == samples("out", "sample")
    for kind in ("best", "worst"):
        one, many = samples("out", kind), samples(tmp_path / "many", kind)
        assert len(one) == len(many) == 20  # two saves of ten
        assert [line["loss"] for line in many] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    stderr = result.stderr.splitlines()
    of_all = [line for line in stderr if "a warning of the test" in line]
    assert len(of_all) == 1 and "warning: " in of_all[0]
    of_others = [line for line in stderr if "not of rank 0" in line]
    assert len(of_others) == 1
    assert re.match("warning, rank [1-3](, [23])*: ", of_others[0])  # the ranks that had sent it by then
    assert result.stderr.index(of_others[0]) < result.stderr.index("the ninth")
    assert [line for line in stderr if re.match("warning[:,]", line)] == [*of_all, *of_others]


def test_best_and_worst_conversations_equal_transformers_losses(train, tmp_path):
    """At learning rate 0 the model does not change: each conversation's loss is its mean loss in transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with open(EXAMPLES, encoding="utf-8") as f:
        rows = [row for row in json.load(f) if "prompt" in row]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    train(*FAST, "--epochs", 1, "--lr", 0, "--train_data", tmp_path / "rows.json", model=TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    losses = {}
    for i, row in enumerate(rows):
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]}], add_generation_prompt=True,
                                               return_dict=False)
        ids = prompt + tokenizer(row["response"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
        losses[i] = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[len(prompt) :])).item()
    kept = {kind: {int(re.search(r"\[(\d+)\]", line["source"])[1]): line["loss"] for line in samples("out", kind)}
            for kind in ("best", "worst")}
    order = sorted(losses, key=losses.get)
    for kind, rows in ("best", order[:10]), ("worst", order[::-1][:10]):
        assert list(kept[kind]) == rows
        assert list(kept[kind].values()) == pytest.approx([losses[i] for i in rows], rel=1e-5)


def test_the_best_checkpoint_is_kept(train, tmp_path):
    """The learning rate becomes far too high, so an early val_loss is the lowest: pruning keeps that step, and `best`
    points to it."""
    flags = (*FAST, "--lr", "0.3", "--warmup_ratio", 1, "--val_data", VALIDATION, "--eval_steps", 1, "--save_steps", 4,
             "--keep_best", "--keep_checkpoints", 1)
    lines = train(*flags, "--max_steps", 8)
    val = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line and line["step"]}
    best = min(val, key=val.get)
    assert best not in (4, 8)
    root = tmp_path / "out" / "checkpoints"
    assert os.readlink(root / "best") == f"step_{best}" and os.readlink(root / "latest") == "step_8"
    assert sorted(os.listdir(root)) == sorted(["best", "latest", f"step_{best}", "step_8"])
    state = json.loads((root / "latest" / "training_state" / "state.json").read_text())
    assert state["best"] == {"val_loss": val[best], "step": best, "behind": 8 - best}


def test_early_stopping(train, tmp_path, capsys):
    """The run stops after 2 validations without a lower val_loss and saves its last step; a resume trains no more."""
    flags = (*FAST, "--lr", "0.3", "--warmup_ratio", 1, "--val_data", VALIDATION, "--eval_steps", 1,
             "--early_stopping", 2, "--max_steps", 20)
    lines = train(*flags)
    val = [line["val_loss"] for line in lines if "val_loss" in line][1:]  # without that before training
    assert len(val) < 20
    assert min(val) == val[-3]
    assert len(lines) == 2 * len(val) + 1
    assert os.readlink(tmp_path / "out" / "checkpoints" / "latest") == f"step_{len(val)}"
    assert f"stopped  after step {len(val)}: 2 validations without a lower val_loss" in capsys.readouterr().out
    assert train(*flags, "--resume_from", "auto") == lines


def test_validation_settings_without_validation_are_errors(train):
    for flags in (["--keep_best"], ["--early_stopping", 2], ["--eval_steps", 2]):
        with pytest.raises(ValueError, match=f"{flags[0]} .*has no effect without --val_data"):
            train(*FAST, *flags)


def test_a_clock_that_stands_still_and_a_report_that_fails_end_no_run(train, tmp_path, monkeypatch, capfd):
    """The time only shows, and so does the report: somebody has put a file of their own in its place."""
    monkeypatch.setattr(log.time, "perf_counter", lambda: 1.0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text("mine")
    monkeypatch.setattr(lock, "check_is_free", lambda directory: None)  # it came later
    assert len(train(*FAST, "--max_steps", 2)) == 2
    assert "warning: no report: " in capfd.readouterr().out
    assert (tmp_path / "out" / "report.html").read_text() == "mine"
