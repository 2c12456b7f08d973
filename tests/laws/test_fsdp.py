"""Many ranks: the same losses, weights and checkpoints on any layout; what is communicated; where tensors lie.

Ranks are gloo processes on the CPU, one thread each.
"""

import fcntl
import itertools
import json
import math
import os
import re
import sys
import time

import pytest
import torch
import torch.distributed.fsdp as fsdp2
from helpers import EXAMPLES, LAYOUTS, ROOT, TINY, metrics, program, run_all, tensors_of, torchrun, two_layers


import fsdp
import sft
from disk import checkpoint, files, pretrained
from ops import optim

RUN = ("--train_data", EXAMPLES, "--lr", "1e-3", "--batch_size", "4", "--max_length", "256", "--max_steps", "6",
       "--timeout", "60")


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """tied: qwen2 with biases, bf16 on the disk. untied: qwen3, whose heads tp 4 can split, with q/k norm, in fp32."""
    return {"tied": two_layers(tmp_path_factory.mktemp("tied")), "untied": two_layers(
        tmp_path_factory.mktemp("untied"), model_type="qwen3", num_key_value_heads=4, head_dim=32,
        tie_word_embeddings=False)}


@pytest.fixture(scope="session")
def runs(tmp_path_factory, models, pytestconfig):
    """Every axis of the law, each layout once and, with --full, all pairs: name -> output directory."""
    root = tmp_path_factory.mktemp("runs")
    offloads = {"": (), "param": ("--param_offload",), "opt": ("--optimizer_offload",)}
    shapes = {"": (), "unpacked": ("--no-packing", "--no-gradient_checkpointing"),
              "plain": ("--no-gradient_checkpointing",)}
    plan = {f"{model} one  ": (1, ("--model", models[model])) for model in models}
    for (i, layout), (j, offload) in itertools.product(enumerate(LAYOUTS), enumerate(offloads)):
        if (i + j) % 3 and not pytestconfig.getoption("--full"):
            continue
        ranks, flags = LAYOUTS[layout]
        model = "untied" if ((i + 1) // 2 + j) % 2 or layout == "tp4" else "tied"  # tied: two key/value heads
        shape = list(shapes)[(2 * i + j) % 3]
        plan[f"{model} {layout} {offload} {shape}"] = ranks, ("--model", models[model], *flags, *offloads[offload],
                                                              *shapes[shape])
    found = {name: root / name.replace(" ", "_") for name in plan}
    run_all([(ranks, (*RUN, *flags, "--output_dir", found[name])) for name, (ranks, flags) in plan.items()], root)
    return found


def test_losses_do_not_depend_on_the_layout(runs):
    """The gradient law over ranks, tp, offload, packing and checkpointing, tied and untied: six steps, 1e-5."""
    worst = 0
    for name, directory in runs.items():
        base = metrics(runs[f"{name.split()[0]} one  "])
        for a, b in zip(base, metrics(directory), strict=True):
            worst = max(worst, abs(a["loss"] / b["loss"] - 1))
            assert math.isclose(a["loss"], b["loss"], rel_tol=1e-5), (name, a, b)
            assert math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=1e-4), (name, a, b)
            assert a["tokens"] == b["tokens"] and a["target_tokens"] == b["target_tokens"]
    assert len(runs) >= 7 and worst > 0  # a third of the 18 pairs of layout and offload, or all; and the bases


def test_checkpoints_do_not_depend_on_the_layout(runs):
    """The last step's directory holds the same tensors, under the same names, with the same moments."""
    for name, directory in runs.items():
        base = runs[f"{name.split()[0]} one  "] / "checkpoints" / "step_6"
        other = directory / "checkpoints" / "step_6"
        for part in ("", "training_state"):
            a, b = tensors_of(base / part), tensors_of(other / part)
            assert set(a) == set(b), name
            for key in a:
                if not key.startswith("rng."):  # Adam divides by what may be near zero, so not element by element
                    off = (a[key].float() - b[key].float()).norm() / a[key].float().norm()
                    assert off < 2e-3, (name, key, off)


def test_every_rank_writes_its_share(runs):
    """Four ranks: four files of about equal size, an index that names them, and transformers loads it."""
    from transformers import AutoModelForCausalLM

    step = next(runs[name] for name in runs if " dp4 " in name) / "checkpoints" / "step_6"
    names = sorted(f for f in os.listdir(step) if f.endswith(".safetensors"))
    assert len(names) == 4 and names[0] == "model-00001-of-00004.safetensors"
    index = files.read_json(step / "model.safetensors.index.json")["weight_map"]
    assert set(index.values()) == set(names) and set(index) == set(pretrained.weight_entries(step))
    theirs = AutoModelForCausalLM.from_pretrained(step, dtype=torch.float32)
    for name, tensor in tensors_of(step).items():
        assert torch.equal(theirs.state_dict()[name], tensor.float()), name


@pytest.mark.full
def test_a_run_goes_on_with_another_layout(models, tmp_path, train):
    """Saved by 4 ranks at step 2, resumed by 1, 2 (offloaded) and tp 2: the same conversations, losses to 1e-5."""
    common = [*RUN, "--model", models["tied"], "--save_steps", 2]
    resume = ["--resume_from", tmp_path / "four" / "checkpoints" / "step_2"]
    run_all([(4, (*common, "--output_dir", tmp_path / "four")), (4, (*common, *resume, "--output_dir", tmp_path / "same")),
           (2, (*common, *resume, "--param_offload", "--output_dir", tmp_path / "two")),
           (2, (*common, *resume, *LAYOUTS["tp2"][1], "--output_dir", tmp_path / "tp"))], tmp_path)
    train(*common, *resume, out="one", model=models["tied"])
    train(*common, *resume, "--optimizer_offload", out="host", model=models["tied"])
    base = metrics(tmp_path / "four")
    for name in ("one", "host", "two", "tp", "same"):
        lines = metrics(tmp_path / name)
        assert [line["step"] for line in lines] == list(range(3, 7))
        for a, b in zip(base[2:], lines, strict=True):
            assert a["tokens"] == b["tokens"] and math.isclose(a["loss"], b["loss"], rel_tol=1e-5), (name, a, b)
            assert name != "same" or (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])


def test_few_conversations_for_many_ranks(models, tmp_path, train):
    """One conversation a step for four ranks, and a short last step: no hang, the losses and val_loss of one rank."""
    with open(EXAMPLES, encoding="utf-8") as f:
        rows = json.load(f)[:5]
    (tmp_path / "five.json").write_text(json.dumps(rows))
    (tmp_path / "three.json").write_text(json.dumps(rows[:3]))
    common = ["--model", models["untied"], "--epochs", 1, "--val_data", tmp_path / "three.json", "--timeout", 60,
              "--train_data", tmp_path / "five.json"]
    run_all([(4, (*common, "--batch_size", n, "--output_dir", tmp_path / f"four{n}")) for n in (1, 3)], tmp_path)
    for n in (1, 3):
        one = train(*common, "--batch_size", n, out=f"one{n}", model=models["untied"])
        for a, b in zip(one, metrics(tmp_path / f"four{n}"), strict=True):
            if "val_loss" in a:
                assert a["val_tokens"] == b["val_tokens"] and math.isclose(a["val_loss"], b["val_loss"], rel_tol=1e-6)
            else:
                assert math.isclose(a["loss"], b["loss"], rel_tol=1e-5)


@pytest.fixture(scope="module")
def collectives(models, pytestconfig, tmp_path_factory):
    """(tp, "full" or "lora") -> (collectives of a micro-batch and of a step's last, elements held, elements in all),
    on two ranks; see tests/programs/count_collectives.py."""
    cases = [(1, "full"), (2, "full"), *([(2, "lora")] if pytestconfig.getoption("--full") else [])]
    words = "count_collectives", models["tied"], *(f"{tp}:{how}" for tp, how in cases)
    printed = run_all([(2, words)], tmp_path_factory.mktemp("count"))
    return dict(zip(cases, json.loads(re.search(r"RESULT (.*)", printed)[1]), strict=True))


def total(counts, word):
    return sum(n for op, n in counts.items() if word in op.replace("allreduce", "all_reduce"))


def test_gradients_are_reduced_once_a_step(collectives):
    """FSDP2 on two ranks: a micro-batch that is not the last reduces nothing, the last one each group once."""
    ((_, first), (_, last)), held, whole = collectives[1, "full"]
    assert total(first, "reduce_scatter") == 0 and total(last, "reduce_scatter") == 3  # two blocks and the root
    assert held == whole // 2


def test_two_all_reduces_a_block_and_direction(collectives):
    """tp 2, two blocks: Megatron's two all-reduces for each forward and backward; embedding one, the loss its own."""
    ((forward, backward), _), held, whole = collectives[2, "full"]
    # forward: 2 a block, embedding 1, loss: max and sum of one chunk, the hidden gradient
    assert total(forward, "all_reduce") == 2 * 2 + 1 + 3, forward
    assert total(backward, "all_reduce") == 2 * 2, backward
    assert held < 0.52 * whole


@pytest.mark.full
def test_adapters_add_no_all_reduce_to_a_micro_batch(collectives):
    """tp 2 with LoRA: the same two all-reduces a block and direction. What each adapter's unsplit matrix needs, one
    sum of its gradient, happens once a step. The first block's input needs no gradient: its first sum is not made."""
    ((forward, backward), (_, last)), held, whole = collectives[2, "lora"]
    assert total(forward, "all_reduce") == 2 * 2 + 1 + 3, forward
    assert total(backward, "all_reduce") == 2 * 2 - 1, backward
    assert total(last, "all_reduce") == 2 * 2 - 1 + 2 * 7, last  # seven adapted layers a block
    assert held < 0.55 * whole


@pytest.mark.parametrize("words, message", [
    (("--strategy", "megatron"), "type --strategy megatron --tp 2"), (("--tp", "2"), "type --strategy megatron --tp 2"),
    (("--strategy", "megatron", "--tp", "2"), "does not divide the 1 processes"),
])
def test_a_layout_that_does_not_fit_is_an_error(train, words, message):
    """The error says what to type."""
    with pytest.raises(ValueError, match=re.escape(message)):
        train("--max_steps", 1, *words)


@pytest.mark.full
def test_tp_must_divide_the_heads(tmp_path):
    """models/tiny has two key/value heads: tp 4 can't be, and the error lists what can."""
    result = torchrun(4, f"{ROOT}/sft.py", *RUN, "--model", TINY, "--strategy", "megatron", "--tp", 4,
                      "--output_dir", tmp_path)
    assert result.returncode and "these do: [1, 2]" in result.stderr


def test_adamw_is_torchs_behind_its_clipping():
    """Five steps on a matrix, a vector and one that has no gradient, with a rate and a decay for each group."""
    start = [torch.randn(40, 30), torch.randn(30), torch.randn(7)]
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    settings = dict(lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    groups = [[dict(params=[p[0]], weight_decay=0.1), dict(params=p[1:], weight_decay=0.0, lr=0.01)]
              for p in (ours, theirs)]
    optimizers = optim.AdamW(groups[0], **settings), torch.optim.AdamW(groups[1], **settings)
    for step, limit in enumerate((1.0, 0.1, 1e9, 1e9, 3.0)):
        for mine, other in zip(ours[:2], theirs[:2]):
            mine.grad = torch.randn_like(mine) * 3**step
            other.grad = mine.grad.clone()
        norm = fsdp.grad_norm(torch.nn.ParameterList(ours[:2])).item()
        assert math.isclose(norm, torch.nn.utils.clip_grad_norm_(theirs[:2], limit).item(), rel_tol=1e-6)
        optimizers[0].step(clip_divisor=max(1.0, (norm + 1e-6) / limit))
        optimizers[1].step()
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours[2], start[2]) and not torch.equal(ours[0], start[0])
    optimizers[0].zero_grad()
    assert all(p.grad is None for p in ours)


def test_the_norm_of_a_large_gradient_is_exact():
    """Sixteen million numbers: added up one after another in fp32, they are 6e-4 off."""
    p = torch.nn.Parameter(torch.empty(2**15, 512))
    p.grad = torch.randn(2**15, 512, generator=torch.Generator().manual_seed(0))
    assert math.isclose(fsdp.grad_norm(torch.nn.ParameterList([p])).item(), p.grad.double().norm().item(), rel_tol=1e-6)


def test_a_run_imports_only_what_it_uses(tmp_path):
    """A second before the first step: torch's compiler, and on one rank FSDP2 and DTensor."""
    result = program("what_is_imported", "--model", TINY, "--train_data", EXAMPLES, "--max_steps", 1,
                     "--no-gradient_checkpointing", cwd=tmp_path)
    assert "RESULT []" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("offload", ["", "param", "optimizer"])
def test_where_tensors_lie(offload, models, monkeypatch, train):
    """param_offload puts parameters and moments on the host (all is host here: FSDP2 gets the policy); with
    optimizer_offload the optimizer steps masters of its own and the parameters follow."""
    seen = {}
    monkeypatch.setattr(checkpoint, "save", lambda root, step, **parts: seen.update(parts))
    policies = []
    shard = fsdp2.fully_shard
    monkeypatch.setattr(fsdp2, "fully_shard", lambda module, **settings: (policies.append(settings["offload_policy"]),
                                                                          shard(module, **settings))[1])
    train("--max_steps", 2, "--batch_size", 2, *([f"--{offload}_offload"] if offload else []), model=models["untied"])
    stepped = [p for group in seen["optimizer"].param_groups for p in group["params"]]
    parameters = list(seen["model"].parameters())
    if offload == "param":
        assert len(policies) == 3 and all(isinstance(p, fsdp2.CPUOffloadPolicy) for p in policies)
    else:
        assert not policies  # one rank, fp32: FSDP2 would only copy
    if offload == "optimizer":
        host = seen["optimizer"].masters
        assert set(host) == set(parameters) and {id(p) for p in stepped} == {id(p) for p in host.values()}
        assert all(p.device.type == "cpu" and p.dtype == torch.float32 for p in host.values())
        assert all(torch.equal(p, master) and p.data_ptr() != master.data_ptr() for p, master in host.items())
    else:
        assert {id(p) for p in stepped} == {id(p) for p in parameters}
    assert all(state["exp_avg"].device.type == "cpu" for state in seen["optimizer"].state.values())


PHASES = ("start", "tokenise", "load", "step 2", "evaluation after step 2", "save of step 2")
USUAL = (("raise", "step 2", 1), ("kill", "evaluation after step 2", 0), ("stop", "save of step 2", 1))


@pytest.mark.parametrize("how, phase, rank", [
    pytest.param(*cell, marks=() if cell in USUAL else pytest.mark.full)
    for cell in itertools.product(("raise", "kill", "stop"), PHASES, (0, 1))])
def test_a_failing_rank_ends_all(how, phase, rank, models, tmp_path):
    """Raise, SIGKILL or SIGSTOP of one rank: the run ends, non-zero, and the screen names rank, phase and cause. With
    --full in every phase and on both ranks; -rA shows how long each took to end."""
    result = program("failing_rank", how, phase, rank, *RUN, "--model", models["tied"], "--save_steps", 2, "--val_data",
                     EXAMPLES, "--eval_steps", 2, "--no-gradient_checkpointing", "--timeout", 5, "--output_dir", "out",
                     ranks=2, cwd=tmp_path)
    seconds = time.time() - float((tmp_path / "planted").read_text())
    print(f"{how:5} on rank {rank} in {phase:24} all had ended {seconds:4.1f} s later")
    assert result.returncode != 0 and seconds < 30  # without a SIGKILL torchrun waits 30 s more for one that is stopped
    end = result.stderr.rsplit("Root Cause", 1)[1]  # torchrun's own last words
    if how == "raise":
        assert f"rank {rank} failed in {phase}: KeyError: 'planted'" in result.stderr
        assert f"rank      : {rank} (local_rank: {rank})" in end
    else:
        message = rf"rank {1 - rank} waited in .* for rank {rank}, which is gone, or stalled in {phase}"
        assert f"rank      : {rank} (local_rank: {rank})" in end or re.search(message, end)
        if how == "stop":  # torchrun ends the survivor of a kill sooner than that can speak, now and then
            assert re.search(message, result.stderr)
    assert checkpoint.steps_in(tmp_path / "out" / "checkpoints") == []


@pytest.mark.full
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stalls_when_all_is_done_is_given_up(rank, models, tmp_path):
    """The ranks wait for each other before they hang up: no longer than --timeout either."""
    result = program("failing_rank", "stop", "end", rank, *RUN, "--model", models["tied"], "--timeout", 5, "--output_dir",
                     "out", ranks=2, cwd=tmp_path)
    seconds = time.time() - float((tmp_path / "planted").read_text())
    print(f"stop  on rank {rank} in {'end':24} all had ended {seconds:4.1f} s later")
    assert result.returncode != 0 and seconds < 25
    assert f"rank {1 - rank} waited in end for rank {rank}, which is gone, or stalled in save of step" in result.stderr
    assert checkpoint.steps_in(tmp_path / "out" / "checkpoints")[-1] == 6  # and nothing is lost


@pytest.mark.full
def test_a_rank_that_stalls_while_it_tokenises_is_given_up(models, tmp_path):
    """The others wait for the token cache's lock: not for ever, and they say for whom. A lock that another program
    holds is not blamed on a rank."""
    words = [*RUN, "--model", models["tied"], "--timeout", 4, "--cache_dir", tmp_path / "cache", "--output_dir",
             tmp_path / "out"]
    result = program("failing_rank", "stop", "lock", 0, *words, ranks=3)
    waiter, holder = re.search(r"rank (\d) waited in tokenise for rank (\d), which is gone, or stalled in tokenise",
                               result.stderr).groups()
    assert result.returncode and waiter != holder and "has made no progress for 4 s" in result.stderr
    (lock,) = (tmp_path / "cache").glob("*.lock")
    with open(lock, "r+") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.truncate(0)
        print(os.getpid(), file=f, flush=True)
        result = torchrun(2, f"{ROOT}/sft.py", *words)
    assert result.returncode and f"process {os.getpid()} holds {lock}" in result.stderr
    assert re.search(r"rank \d failed in tokenise: LockTimeout", result.stderr)


def test_selfcheck_proves_the_law_and_catches_its_breach(models, tmp_path, monkeypatch, capsys):
    """It passes on one and on two ranks, and fails when the loss is averaged over micro-batches."""
    def check():
        monkeypatch.setattr(sys, "argv", ["sft.py", *map(str, (*RUN, "--model", models["tied"], "--selfcheck",
                                                               "--output_dir", tmp_path))])
        sft.main()

    printed = run_all([(2, (*RUN, "--model", models["tied"], "--selfcheck", "--output_dir", tmp_path))], tmp_path)
    assert "selfcheck: ok, 4 conversations" in printed and "one data-parallel rank" in printed
    check()
    screen = capsys.readouterr().out
    assert "selfcheck: ok, 4 conversations" in screen and "one data-parallel rank" not in screen
    forward = sft.CausalLM.forward

    def averaged(out):
        return out._replace(total=out.total / len(out.each))

    monkeypatch.setattr(sft.CausalLM, "forward", lambda self, tokens, doc_lengths, target_positions, targets: averaged(
        forward(self, tokens, doc_lengths, target_positions, targets)))
    with pytest.raises(ValueError, match="the gradient depends on the layout"):
        check()
