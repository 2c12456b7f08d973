"""The trainer end to end: a step's layout, an independent loop, exact resume, output, and errors of the input.

The gradient law: loss and gradient of a step do not depend on how it is split into micro-batches.
"""

import filecmp
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from helpers import EXAMPLES, FAST, ROOT, TINY, VALIDATION, metrics, model_directory, program, two_layers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import sft
from disk import checkpoint, files, pretrained
from families.config import ModelConfig
from model import CausalLM
from ops import forecast, optim
from ops.attention import Documents
from settings import errors, parser


def weights(directory):
    return load_file(os.path.join(directory, "model.safetensors"))


def masters(directory):
    """The fp32 weights and moments of a step directory."""
    return load_file(os.path.join(directory, "training_state", "tensors.safetensors"))


# ---- the gradient law -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [
    ("--micro_batch_size", 1, "--no-packing", "--gradient_checkpointing"),
    ("--micro_batch_size", 3, "--no-packing", "--no-gradient_checkpointing"),
    ("--micro_batch_size", 8, "--packing", "--no-gradient_checkpointing"),
    *(pytest.param(flags, marks=pytest.mark.full) for flags in (
        ("--micro_batch_size", 1, "--packing", "--no-gradient_checkpointing"),
        ("--micro_batch_size", "auto", "--gradient_checkpointing", "auto")))])
def test_a_step_does_not_depend_on_its_micro_batches(train, flags, tmp_path):
    """Loss, gradient norm and gradients are the same with packing on or off, for any micro_batch_size."""
    common = ("--lr", "1e-3", "--batch_size", "10", "--max_length", "256", "--max_steps", "5")
    base = train(*common, out="base")
    other = train(*common, *flags, out="other")
    for a, b in zip(base, other, strict=True):
        for key in ("loss", "grad_norm"):
            assert math.isclose(a[key], b[key], rel_tol=1e-5), (key, a, b)
        assert (a["tokens"], a["target_tokens"]) == (b["tokens"], b["target_tokens"])
    a, b = (masters(tmp_path / out / "checkpoints" / "step_5") for out in ("base", "other"))
    for name in a:
        if name.startswith("exp_avg."):  # a mean of five gradients; in weights, Adam's division amplifies rounding
            assert (a[name] - b[name]).norm() < 1e-4 * a[name].norm(), name


@pytest.mark.parametrize("k", [1, *(pytest.param(k, marks=pytest.mark.full) for k in (2, 3))])
@pytest.mark.parametrize("lora", [(), ("--use_lora",)], ids=("full", "lora"))
def test_a_step_does_not_depend_on_its_checkpointed_blocks(k, lora, train, tmp_path, monkeypatch):
    """k of four blocks: to the bit, as each block runs the same operations again."""
    common = ("--lr", "1e-3", "--batch_size", "10", "--max_length", "256", "--max_steps", "3", *lora)
    base = train(*common, "--no-gradient_checkpointing", out="base")
    blocks = []

    def counted(*args):
        blocks.append(k)
        return k

    monkeypatch.setattr(forecast, "checkpointed_blocks", counted)
    other = train(*common, out="other")
    assert blocks
    for a, b in zip(base, other, strict=True):
        assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])
    a, b = (masters(tmp_path / out / "checkpoints" / "step_3") for out in ("base", "other"))
    assert set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_the_micro_batches_differ(monkeypatch, train):
    """The test above is not trivial: packing and micro_batch_size change the number of forward passes."""
    calls = []
    forward = CausalLM.forward

    def counted(self, tokens, documents, *rest):
        calls.append(documents.lengths)
        return forward(self, tokens, documents, *rest)

    monkeypatch.setattr(CausalLM, "forward", counted)
    counts = {}
    for i, flags in enumerate((("--packing",), ("--no-packing",), ("--no-packing", "--micro_batch_size", 3))):
        calls.clear()
        train("--batch_size", 10, "--max_length", 256, "--max_steps", 1, *flags, out=f"out{i}")
        counts[i] = len(calls)
        assert sum(map(len, calls)) == 10
    assert counts[1] == 10 and counts[2] == 4 and 1 < counts[0] < 10, counts


# ---- an independent loop ----------------------------------------------------------------------------------------


def reference_rows():
    """The example conversations, prepared independently: transformers' tokenizer, targets by <|im_start|> tokens."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    header = tokenizer.encode("assistant\n", add_special_tokens=False)
    rows = []
    with open(EXAMPLES, encoding="utf-8") as f:
        for row in json.load(f):
            messages = row.get("messages") or [{"role": "user", "content": row["prompt"]},
                                               {"role": "assistant", "content": row["response"]}]
            ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
            labels = [-100] * len(ids)
            for i in range(len(ids)):
                if ids[i] == start and ids[i + 1 : i + 1 + len(header)] == header:
                    first = i + 1 + len(header)
                    last = ids.index(end, first)
                    labels[first : last + 1] = ids[first : last + 1]
            rows.append((ids, labels))
    return rows


def reference_lr(step, total, scheduler, peak, warmup_ratio, min_ratio):
    """A second implementation of the schedules."""
    W = math.ceil(warmup_ratio * total)
    if step <= W:
        return peak * step / W
    p, low = (step - 1 - W) / (total - W), peak * min_ratio
    return {"cosine": low + (peak - low) * (1 + math.cos(math.pi * p)) / 2, "linear": peak + (low - peak) * p,
            "constant": peak, "wsd": peak if p <= 0.8 else 5 * (peak * (1 - p) + low * (p - 0.8))}[scheduler]


@pytest.mark.parametrize("scheduler, min_ratio", [("cosine", 0.1), *(
    pytest.param(*rest, marks=pytest.mark.full) for rest in (("cosine", 0.0), ("linear", 0.1), ("constant", 0.0), ("wsd", 0.1)))])
def test_ten_steps_equal_a_loop_with_transformers(train, scheduler, min_ratio):
    """Ten steps have the losses of transformers' model and torch's AdamW on the same conversations, padded."""
    lines = train(*FAST, "--scheduler", scheduler, "--min_lr_ratio", min_ratio, "--warmup_ratio", 0.25,
                  "--max_steps", 10, "--weight_decay", 0.1, "--grad_clip", 0.5, model=TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    rows = reference_rows()
    sampler = data.Sampler([1] * len(rows), epochs=2, seed=42, batch_size=8)
    for step in range(1, 11):
        batch = [rows[i] for i in sampler.step(step).ids]
        T = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [0] * (T - len(ids)) for ids, _ in batch])
        labels = torch.tensor([labels + [-100] * (T - len(labels)) for _, labels in batch])
        mask = torch.tensor([[1] * len(ids) + [0] * (T - len(ids)) for ids, _ in batch])
        logits = model(ids, attention_mask=mask).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        lr = reference_lr(step, 10, scheduler, 1e-3, 0.25, min_ratio)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        line = lines[step - 1]
        assert math.isclose(line["loss"], loss.item(), rel_tol=1e-5), (step, line["loss"], loss.item())
        assert math.isclose(line["grad_norm"], norm.item(), rel_tol=1e-4)
        assert math.isclose(line["lr"], lr, rel_tol=1e-12)
        assert line["target_tokens"] == int((labels[:, 1:] != -100).sum())
        assert line["tokens"] == int(mask.sum())
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1


@pytest.mark.parametrize("scheduler, ratio", [("cosine", 0.0), ("cosine", 0.2), ("linear", 0.0), ("linear", 0.1),
                                              ("constant", 0.0), ("wsd", 0.0), ("wsd", 0.1)])
def test_learning_rates_equal_their_definition(scheduler, ratio):
    """At every step of runs of several lengths. The peak is reached, and no step has a learning rate of 0."""
    for total, warmup in itertools.product((1, 2, 10, 11, 97), (0.0, 0.1, 0.25)):
        cfg = sft.Config(lr=3.0, scheduler=scheduler, min_lr_ratio=ratio, warmup_ratio=warmup)
        rates = [sft.lr_at(step, total, cfg) for step in range(1, total + 1)]
        expected = [reference_lr(step, total, scheduler, 3.0, warmup, ratio) for step in range(1, total + 1)]
        assert rates == pytest.approx(expected, rel=1e-12)
        assert min(rates) > 0 and max(rates) == 3.0, (total, warmup, rates)


def test_wsd_is_constant_until_four_fifths():
    """A run of 11 steps, one of them warm-up: the peak up to p = 0.8, which is step 10, then half of the way down."""
    for low, last in ((0.0, 0.5), (0.2, 0.6)):
        cfg = sft.Config(lr=1.0, scheduler="wsd", warmup_ratio=0.09, min_lr_ratio=low)
        rates = [sft.lr_at(step, 11, cfg) for step in range(1, 12)]
        assert rates == pytest.approx([1.0] * 10 + [last], rel=1e-12)


def test_val_loss_is_weighted_by_tokens(train):
    """val_loss is the mean cross-entropy of all target tokens of the set, for any micro-batches."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    total = count = correct = 0
    with torch.no_grad():
        for ids, labels in reference_rows():
            logits, targets = model(torch.tensor([ids])).logits[0, :-1], torch.tensor(labels[1:])
            total += F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item()
            count += int((targets != -100).sum())
            correct += int((logits.argmax(-1) == targets).sum())
    for flags in ((), ("--no-packing",)):
        lines = train(*FAST, "--lr", 0, "--max_steps", 2, "--val_data", EXAMPLES, "--eval_steps", 2, *flags,
                      out=f"out{len(flags)}", model=TINY)
        assert [line for line in lines if "val_loss" in line] == [lines[0], lines[-1]] and "loss" not in lines[-1]
        assert (lines[0]["step"], lines[-1]["step"]) == (0, 2) and lines[0]["val_loss"] == lines[-1]["val_loss"]  # lr 0
        assert lines[-1]["val_tokens"] == count and lines[-1]["val_accuracy"] == correct / count > 0
        assert math.isclose(lines[-1]["val_loss"], total / count, rel_tol=1e-6)


def test_bf16_stays_near_fp32(train):
    """Five steps in bf16 with fp32 master weights have almost the losses of fp32."""
    fp32, bf16 = (train(*FAST, "--max_steps", 5, "--dtype", dtype, out=dtype) for dtype in ("fp32", "bf16"))
    for a, b in zip(fp32, bf16, strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-2) and a["loss"] != b["loss"]


# ---- resume -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Simulates SIGKILL: no code of the trainer catches it."""


def interrupt_after(monkeypatch, last_step):
    save = checkpoint.save

    def save_and_die(root, step, **contents):
        save(root, step, **contents)
        if step == last_step:
            raise Killed

    monkeypatch.setattr(checkpoint, "save", save_and_die)


EXACT = ("loss", "accuracy", "lr", "grad_norm", "epoch", "tokens", "target_tokens", "target_weight", "val_loss",
         "val_tokens", "val_weight", "val_accuracy", "forgetting")


def test_resume_is_exact(train, monkeypatch, tmp_path, pytestconfig):
    """A run is killed at step 5 (within an epoch) or 9 (at its end) and resumed: losses, weights and moments are
    bitwise those of an uninterrupted run."""
    common = (*FAST, "--max_steps", 12, "--val_data", VALIDATION)
    straight = train(*common, "--save_steps", 5, out="straight")
    kills = (5, "directory"), (9, "auto"), (5, "auto")
    for step, how in kills if pytestconfig.getoption("--full") else kills[:2]:
        killed, save = tmp_path / f"{how}_{step}", ("--save_steps", step)
        with monkeypatch.context() as patch:
            interrupt_after(patch, step)
            with pytest.raises(Killed):
                train(*common, *save, out=killed.name)
        with open(killed / "metrics.jsonl", "a", encoding="utf-8") as f:  # lines of steps without a checkpoint
            f.write('{"step": %d, "loss": 1.0}\n{"step": %d, "lo' % (step + 1, step + 2))
        source = "auto" if how == "auto" else killed / "checkpoints" / f"step_{step}"
        resumed = train(*common, *save, "--resume_from", source, out=killed.name)
        expected, found = (
            [{key: line[key] for key in EXACT if key in line} for line in lines] for lines in (straight, resumed))
        assert found == expected
        assert [line["step"] for line in resumed if "loss" in line] == list(range(1, 13))
        for file in ("model.safetensors", "training_state/tensors.safetensors", "training_state/state.json"):
            paths = [directory / "checkpoints" / "step_12" / file for directory in (tmp_path / "straight", killed)]
            assert filecmp.cmp(*paths, shallow=False), (step, how, file)


def test_a_killed_process_resumes_exactly(train, tmp_path):
    """SIGKILL at a random moment of a real process, then --resume_from auto: the same bytes as an uninterrupted run."""
    flags = (*FAST, "--batch_size", "4", "--max_length", "128", "--max_steps", "9", "--save_steps", "3",
             "--no-gradient_checkpointing")
    train(*flags, out="straight", model=TINY)
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, "sft.py"), "--model", TINY, "--train_data", EXAMPLES,
                                *flags, "--output_dir", "killed"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "checkpoints" / "step_3").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    train(*flags, "--resume_from", "auto", out="killed", model=TINY)
    for file in ("model.safetensors", "training_state/tensors.safetensors"):
        a, b = (tmp_path / out / "checkpoints" / "step_9" / file for out in ("straight", "killed"))
        assert filecmp.cmp(a, b, shallow=False), file


def test_auto_without_a_checkpoint_starts_a_new_run(train, capsys):
    """--resume_from auto in an empty directory starts a new run and prints that it does."""
    assert len(train(*FAST, "--max_steps", 1, "--resume_from", "auto")) == 1
    assert "no checkpoint in out/checkpoints; this is a new run" in capsys.readouterr().out


def test_auto_after_a_kill_before_the_first_checkpoint(train, tmp_path):
    """metrics.jsonl has steps, but there is no checkpoint: the run starts and removes these lines."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.0}\n{"step": 2, "lo')
    parser.write_yaml(sft.Config(model=TINY, output_dir="out"), tmp_path / "out" / "config.yaml")
    lines = train(*FAST, "--max_steps", 1, "--resume_from", "auto")
    assert [line["step"] for line in lines] == [1] and lines[0]["loss"] > 0


def test_best_is_repaired_after_a_kill_between_the_two_links(train, tmp_path):
    """`latest` has moved, `best` has not: the resumed run moves it."""
    flags = (*FAST, "--max_steps", 4, "--save_steps", 2, "--eval_steps", 2, "--val_data", EXAMPLES, "--keep_best")
    train(*flags)
    best = tmp_path / "out" / "checkpoints" / "best"
    assert os.readlink(best) == "step_4"
    best.unlink()
    best.symlink_to("step_2")
    train(*flags, "--resume_from", "auto")
    assert os.readlink(best) == "step_4"


@pytest.mark.parametrize("damage, message", [
    (lambda d: os.truncate(d / "model.safetensors", 1_000_000), "model.safetensors has 1,000,000 bytes"),
    (lambda d: os.truncate(d / "training_state" / "tensors.safetensors", 500_000),
     "tensors.safetensors has 500,000 bytes"),
    (lambda d: os.remove(d / "training_state" / "state.json"), "training_state/state.json is missing"),
    (lambda d: os.remove(d / "training_state" / "tensors.safetensors"), "tensors.safetensors is missing"),
    (lambda d: (d / "training_state" / "state.json").write_text("{"), "state.json has 1 bytes"),
    (lambda d: os.remove(d / "config.json"), "config.json is missing"),
])
def test_a_damaged_checkpoint_is_an_error(train, tmp_path, damage, message):
    """A failed resume never trains: no new run starts, and the metrics of the old run stay as they are."""
    train(*FAST, "--max_steps", 2)
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    damage(tmp_path / "out" / "checkpoints" / "step_2")
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        train(*FAST, "--max_steps", 4, "--resume_from", "auto")
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("flags, message", [
    (("--seed", 1), "seed 42 then, 1 now"), (("--batch_size", 4), "batch_size 8 then, 4 now"),
    (("--batch_tokens", 900), "batch_tokens none then, 900 now"), (("--max_length", 64), "max_length 512 then, 64 now"),
    (("--train_on_prompt",), "train_on_prompt false then, true now.*type --train_on_prompt false")])
def test_resume_with_other_data_or_order_is_an_error(train, flags, message):
    """The settings that decide which conversations a step has cannot change within a run."""
    train(*FAST, "--max_steps", 2)
    with pytest.raises(ValueError, match=message):
        train(*FAST, "--max_steps", 4, "--resume_from", "auto", *flags)


def test_a_second_run_in_the_same_directory_is_refused(train, tmp_path):
    """An output directory with a run in it is not overwritten."""
    train(*FAST, "--max_steps", 1)
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="--resume_from auto"):
        train(*FAST, "--max_steps", 1)
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before


def test_resuming_a_finished_run_changes_nothing(train, capsys):
    """The run ends at once with the same metrics, and prints that there is nothing to do."""
    first = train(*FAST, "--max_steps", 2)
    assert "saved    out/checkpoints/latest -> step_2 (Hugging Face model directory)" in capsys.readouterr().out
    assert train(*FAST, "--max_steps", 2, "--resume_from", "auto") == first
    out = capsys.readouterr().out
    assert "done     already complete: raise --max_steps to train longer (the checkpoint has step 2 of 2)" in out
    assert "saved " not in out


# ---- output -----------------------------------------------------------------------------------------------------


def test_a_step_directory_is_a_hugging_face_model(train, tmp_path):
    """Each step_N loads with transformers, has the same logits there, stops at the trained end of turn, and has the
    same tokenizer."""
    train(*FAST, "--max_steps", 2, "--save_steps", 1, model=TINY)
    assert os.readlink(tmp_path / "out" / "checkpoints" / "latest") == "step_2"
    for step in (1, 2):
        directory = tmp_path / "out" / "checkpoints" / f"step_{step}"
        reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        model = CausalLM(ModelConfig.from_dict(files.read_json(directory / "config.json")))
        pretrained.load_weights(model, directory)
        tokens = torch.arange(3, 60)
        with torch.no_grad():
            expected = reference(tokens[None]).logits[0]
            torch.testing.assert_close(model(tokens, Documents.of([57])), expected, rtol=1e-4, atol=1e-4)
        for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
            assert filecmp.cmp(directory / file, os.path.join(TINY, file), shallow=False), file
        tokenizer = AutoTokenizer.from_pretrained(directory)
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert reference.generation_config.eos_token_id == [0, end]
        assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == [0, end]
    a, b = (weights(directory.parent / step)["model.embed_tokens.weight"] for step in ("step_1", "step_2"))
    assert not torch.equal(a, b)


def test_every_weight_is_trained(train, tmp_path):
    """After three steps every tensor has changed."""
    train(*FAST, "--max_steps", 3, model=TINY)
    before, after = weights(TINY), masters(tmp_path / "out" / "checkpoints" / "step_3")
    assert set(before) == {n.removeprefix("master.") for n in after if n.startswith("master.")}
    for name, tensor in before.items():
        assert not torch.equal(tensor.float(), after[f"master.{name}"]), name


def test_the_screen_shows_the_run_and_its_result(train, capsys):
    """Before the first step: model, data (every token is counted), steps; after the last: result, how to try it."""
    lines = train(*FAST, "--epochs", 1, "--keep_checkpoints", 1, model=TINY)
    out, _ = capsys.readouterr()
    assert f"model    {TINY} (qwen2): 1,050,752 parameters, all trained, fp32 on 1 × cpu" in out
    assert "rows     72 in = 72 trained + 0 dropped" in out
    tokens = re.search(r"tokens   ([\d,]+) in = ([\d,]+) target \+ ([\d,]+) context \+ ([\d,]+) truncated", out)
    total, target, context, truncated = (int(n.replace(",", "")) for n in tokens.groups())
    assert total == target + context + truncated
    assert total == sum(line["tokens"] for line in lines)
    assert target == sum(line["target_tokens"] for line in lines)
    assert "steps    9 = 1 epoch × 9 steps; per step about 8 conversations, 787 tokens (498 trained)" in out
    assert "step 9 of 9: loss" in out
    assert "saved    out/checkpoints/latest -> step_9 (Hugging Face model directory)" in out
    assert re.search(r"try it   .*chat.py out/checkpoints/latest", out)
    assert set(lines[0]) == {"step", "epoch", "loss", "accuracy", "lr", "grad_norm", "tokens", "target_tokens",
                             "target_weight", "seconds", "tokens_per_second", "peak_memory_gb", "changed"}
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert lines[-1]["epoch"] == 1.0


def test_the_resolved_config_starts_the_same_run_again(train, tmp_path):
    """--config out/config.yaml repeats the run bit for bit."""
    first = train(*FAST, "--max_steps", 2)
    again = train("--config", "out/config.yaml", "--output_dir", "again", out="again")
    assert [line["loss"] for line in first] == [line["loss"] for line in again]


@pytest.mark.parametrize("file", ["example_alpaca.json", "example_conversations.json", "example_sharegpt.json",
                                  "example.jsonl"])
def test_every_example_format_trains(train, file):
    """Two steps on each of the small files in data/."""
    lines = train("--train_data", os.path.join(ROOT, "data", file), "--max_steps", 2, "--batch_size", 2)
    assert len(lines) == 2 and all(math.isfinite(line["loss"]) for line in lines)


def test_batch_tokens_fills_steps(train):
    """With --batch_tokens a step has at most that many tokens; an epoch still has each conversation once."""
    lines = train("--batch_tokens", 600, "--epochs", 2, "--max_length", 512)
    halves = [sum(line["tokens"] for line in lines if lo < line["epoch"] <= lo + 1) for lo in (0, 1)]
    assert halves[0] == halves[1] and max(line["tokens"] for line in lines) < 700


# ---- invalid input ----------------------------------------------------------------------------------------------


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def write_bytes(path, content):
    path.write_bytes(content)
    return path


NOT_TRAINED = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]}]
SYSTEM_LAST = [{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"},
                             {"role": "assistant", "content": "c"}]}]


def cut_embedding(tensors):
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name][:2000].clone()


def rows(path, value):
    """The flags of a data file with this content: a string as it is, other values as JSON."""
    return "--train_data", write(path / "x.json", value if isinstance(value, str) else json.dumps(value))


BAD = {  # name: (function of a directory that returns flags, text of the error)
    "no data file": (lambda p: ("--train_data", "nowhere.json"), "nowhere.json: no such data file"),
    "not JSON": (lambda p: rows(p, '[{"prompt": "a",\n "response": }]'), "line 2, column 14"),
    "unknown shape": (lambda p: rows(p, [{"words": "a"}]), "[0]: unrecognised columns 'words'; accepted"),
    "messages is a text": (lambda p: rows(p, [{"messages": "hello"}]), 'non-empty list of {"role", "content"} objects'),
    "messages is empty": (lambda p: rows(p, [{"messages": []}]), "it is []"),
    "conversations is a number": (lambda p: rows(p, [{"conversations": 7}]), '"conversations" must be a non-empty list'),
    "conversations is null": (lambda p: rows(p, [{"conversations": None}]), '"conversations" must be a non-empty list'),
    "content is null": (lambda p: rows(p, [{"messages": [{"role": "user", "content": None}]}]), "it is null; remove"),
    "no rows": (lambda p: rows(p, []), "no rows; pass a file with conversations"),
    "nothing to train": (lambda p: rows(p, NOT_TRAINED), "all dropped (1 without targets); mark at least one assistant"),
    "empty answer": (lambda p: rows(p, [{"prompt": "a", "response": " "}]), "an empty answer"),
    "role order": (lambda p: rows(p, SYSTEM_LAST), "a system message can only be the first"),
    "no such model": (lambda p: ("--model", "./nowhere"), "./nowhere: no such directory"),
    "no config.json": (lambda p: ("--model", os.path.join(ROOT, "data")), "no config.json, so it is not a model directory"),
    "no such adapter": (lambda p: ("--use_lora", "--resume_adapter", "./nowhere"), "--resume_adapter ./nowhere: no such"),
    "an empty directory as adapter": (lambda p: ("--use_lora", "--resume_adapter", p), "so it is not a LoRA adapter; use"),
    "no such tokenizer": (lambda p: ("--tokenizer", "./nowhere"), "--tokenizer ./nowhere: no such directory"),
    "no such file of settings": (lambda p: ("--config", "nowhere.yaml"), "nowhere.yaml: No such file or directory"),
    "prompts are not UTF-8": (lambda p: ("--sample_prompts", write_bytes(p / "x.txt", b"\xff")), "not UTF-8 text"),
    "n_gpus": (lambda p: ("--n_gpus", 2), "use ./train.sh --n_gpus N, or torchrun --nproc_per_node N sft.py"),
    "tp": (lambda p: ("--strategy", "megatron", "--tp", 2), "--tp 2 needs at least 2 processes, and this run has 1"),
    "model type": (lambda p: ("--model", model_directory(p / "m", {"model_type": "gpt2"})), "'gpt2' is not supported"),
    "rope scaling": (lambda p: ("--model", model_directory(p / "m", {"rope_scaling": {"type": "dynamic", "factor": 4}})),
                     "use yarn"),
    "missing tensor": (lambda p: ("--model", model_directory(p / "m", None, lambda t: t.pop("model.norm.weight"))),
                       "missing ['model.norm.weight']"),
    "unexpected tensor": (lambda p: ("--model", model_directory(p / "m", None, lambda t: t.update(x=torch.ones(2)))),
                          "unexpected ['x']"),
    "wrong shape": (lambda p: ("--model", model_directory(p / "m", {"intermediate_size": 385})), "not (128, 385)"),
    "tokenizer too large": (lambda p: ("--model", model_directory(p / "m", {"vocab_size": 2000}, cut_embedding)),
                            "--tokenizer must be"),
    "max_length": (lambda p: ("--max_length", 4), "raise --max_length 4"),
    "cannot write": (lambda p: ("--output_dir", write(p / "file", "") / "out"), "Not a directory"),
    "unknown flag": (lambda p: ("--learing_rate", "1"), "the nearest is 'lr'"),
    "flag of another trainer": (lambda p: ("--learning_rate", "1"), "'learning_rate', which other trainers have: type --lr X"),
    "bad scheduler": (lambda p: ("--scheduler", "cosin"), "nearest: cosine"),
    "resume from nothing": (lambda p: ("--resume_from", "./nowhere"), "./nowhere"),
    "hub": (lambda p: ("--model", "Qwen/Qwen2.5-0.5B"), "--model PATH with a local directory, or --model tiny"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case, tmp_path, monkeypatch, capsys):
    """Exit code 2 and one line that names the value and the remedy; no traceback."""
    flags, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", TINY, "--train_data", EXAMPLES, "--max_steps", 1, *flags(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["sft.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        errors.run(sft.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error
    assert error.count("\n") == 1, error
    assert "Traceback" not in error


@pytest.mark.parametrize("endpoint, example", [("mirror.example", "https://mirror.example"),
                                               ("ftp://mirror.example", "https://hf-mirror.com")])
@pytest.mark.parametrize("flags", [("--model", "some/model"), ("--train_data", "some/dataset")])
def test_a_mirror_needs_a_url(flags, endpoint, example, train, monkeypatch):
    """HF_ENDPOINT without https:// is named before anything is downloaded."""
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(ValueError, match=f"HF_ENDPOINT {endpoint}: it must start with https://; set it to {example}"):
        train(*flags)


def test_a_run_directory_means_its_newest_checkpoint(train):
    """The run, or its checkpoints/."""
    train("--max_steps", 1)
    for step, directory in ((2, "out"), (3, "out/checkpoints")):
        assert train("--max_steps", step, "--resume_from", directory)[-1]["step"] == step


@pytest.mark.parametrize("save_steps", [1, 5])
@pytest.mark.parametrize("planted", ["loss", "gradient"])
def test_a_non_finite_step_stops_before_the_weights_change(train, monkeypatch, tmp_path, planted, save_steps):
    """NaN in the loss of step 3, or infinity in its gradient alone: its update changes nothing, no other follows, and
    the error names its conversations. With save_steps 1 its numbers are read at once, with 5 only after the backward
    of step 4."""
    weights, calls, updates = [], [], []
    step, forward = optim.AdamW.step, CausalLM.forward

    def recorded(self, *args, **options):
        step(self, *args, **options)
        weights.append([p.detach().clone() for group in self.param_groups for p in group["params"]])
        weights[-1] += [t.clone() for state in self.state.values() for t in state.values()]
        updates.append(self.updates)

    monkeypatch.setattr(optim.AdamW, "step", recorded)

    def plant(self, *inputs):
        out = forward(self, *inputs)
        calls.append(1)
        if len(calls) == 3:
            if planted == "loss":
                return out._replace(total=out.total * math.nan)
            out.total.register_hook(lambda grad: grad * math.inf)
        return out

    monkeypatch.setattr(CausalLM, "forward", plant)
    with pytest.raises(FloatingPointError, match=r"step 3: loss .*example_sft.json\[\d+\]") as error:
        train(*FAST, "--max_length", 2048, "--max_steps", 5, "--save_steps", save_steps)
    assert updates == [1, 2, 2]
    assert all(map(torch.equal, weights[1], weights[2])) and not all(map(torch.equal, weights[0], weights[1]))
    assert checkpoint.steps_in(tmp_path / "out" / "checkpoints") == ([1, 2] if save_steps == 1 else [])
    assert [line["step"] for line in metrics(tmp_path / "out")] == [1, 2]
    named = {int(n) for n in re.findall(r"json\[(\d+)\]", str(error.value))}
    assert named == set(data.Sampler([1] * 72, epochs=1, seed=42, batch_size=8).step(3).ids.tolist())


# ---- the README's first screen ----------------------------------------------------------------------------------


@pytest.mark.full
def test_train_sh_then_chat(tmp_path):
    """./train.sh --model tiny from another folder; then chat.py recites answers of the training set and stops after
    them. .ci/run checks one answer."""
    env = {**os.environ, "PYTHON": sys.executable, "KEEP_CHECKPOINTS": "1"}
    result = subprocess.run([os.path.join(ROOT, "train.sh"), "--model", "tiny"], cwd=tmp_path, env=env,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(checkpoint.steps_in(tmp_path / "outputs" / "checkpoints")) == 1  # the environment overrides the preset
    with open(EXAMPLES, encoding="utf-8") as f:
        rows = [row for row in json.load(f) if "prompt" in row]
    for row in (rows[1], rows[20]):
        chat = [sys.executable, os.path.join(ROOT, "chat.py"), "outputs/checkpoints/latest"]
        result = subprocess.run([*chat, "--prompt", row["prompt"]], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result
        assert result.stdout == row["response"] + "\n"
    # the prompt from a pipe
    result = subprocess.run([sys.executable, os.path.join(ROOT, "chat.py")], input=rows[0]["prompt"], cwd=tmp_path,
                            capture_output=True, text=True)
    assert result.stdout == rows[0]["response"] + "\n", result


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.full
@pytest.mark.parametrize("flags", [("--no-gradient_checkpointing",), ("--use_lora",)])
def test_compiled_blocks_have_the_same_losses_and_compile_once(train, tmp_path, flags):
    """Each step packs differently, yet no graph is compiled after the first step; there are fewer than three per block.
    Losses equal those without --compile up to rounding."""
    model = two_layers(tmp_path / "model", intermediate_size=128)
    common = (*FAST, "--batch_size", 24, *flags)
    plain = train(*common, model=model)
    result = program("count_graphs", "--model", model, "--train_data", EXAMPLES, *common, "--output_dir", "compiled",
                     "--compile", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    graphs = [int(n) for n in result.stdout.split("graphs")[-1].split()]
    assert len(graphs) == 9
    assert graphs[0] == graphs[-1]
    assert 0 < graphs[0] < 3 * 2
    losses = [line["loss"] for line in metrics(tmp_path / "compiled")]
    assert losses == pytest.approx([line["loss"] for line in plain], rel=1e-5)


def test_compile_with_tp_is_refused(train):
    with pytest.raises(ValueError, match="--compile does not work with --tp"):
        train(*FAST, "--compile", "--strategy", "megatron", "--tp", 2)
