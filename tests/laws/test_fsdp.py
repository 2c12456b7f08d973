"""Many ranks: the same losses, weights and checkpoints in any layout; collectives; where tensors are; failing ranks.

Ranks are gloo processes on the CPU, one thread each.
"""

import itertools
import json
import math
import os
import re
import sys

import pytest
import torch
import torch.distributed.fsdp as fsdp2
from helpers import (
    EXAMPLES,
    LAYOUTS,
    ROOT,
    TINY,
    calls,
    count_collectives,
    metrics,
    program,
    run_all,
    tensors_of,
    torchrun,
    two_layers,
)

import fsdp
import sft
from disk import checkpoint, files, pretrained
from model import CausalLM
from ops import optim

RUN = ("--train_data", EXAMPLES, "--lr", "1e-3", "--batch_size", "4", "--max_length", "256", "--max_steps", "6",
       "--timeout", "60")


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """tied: qwen2 with biases, stored in bf16. untied: qwen3 with q/k norm, stored in fp32; tp 4 splits its heads."""
    return {"tied": two_layers(tmp_path_factory.mktemp("tied")), "untied": two_layers(
        tmp_path_factory.mktemp("untied"), model_type="qwen3", num_key_value_heads=4, head_dim=32,
        tie_word_embeddings=False)}


@pytest.fixture(scope="session")
def runs(tmp_path_factory, models, pytestconfig):
    """{"model layout offload shape": output directory} of runs over all axes of the gradient law.

    A third of the pairs of layout and offload, on one and two ranks and as dp 2 × tp 2; with --full all of them.
    """
    root = tmp_path_factory.mktemp("runs")
    offloads = {"": (), "param": ("--param_offload",), "opt": ("--optimizer_offload",)}
    shapes = {"": (), "unpacked": ("--no-packing", "--no-gradient_checkpointing"),
              "plain": ("--no-gradient_checkpointing",),
              "auto": ("--micro_batch_size", "auto", "--gradient_checkpointing", "auto")}
    commands = {f"{model} one  ": (1, ("--model", models[model])) for model in models}
    for (i, layout), (j, offload) in itertools.product(enumerate(LAYOUTS), enumerate(offloads)):
        is_first = (i + j) % 3 == 0 and layout not in ("dp4", "tp4", "sp4", "sp2tp2")
        if not is_first and not pytestconfig.getoption("--full"):
            continue
        ranks, flags = LAYOUTS[layout]
        model = "untied" if ((i + 1) // 2 + j) % 2 or layout == "tp4" else "tied"  # tied has two key/value heads
        shape = list(shapes)[(2 * i + j) % 4]
        flags = ("--model", models[model], *flags, *offloads[offload], *shapes[shape])
        commands[f"{model} {layout} {offload} {shape}"] = ranks, flags
    outputs = {name: root / name.replace(" ", "_") for name in commands}
    run_all([(ranks, (*RUN, *flags, "--output_dir", outputs[name])) for name, (ranks, flags) in commands.items()], root)
    return outputs


def test_losses_do_not_depend_on_the_layout(runs):
    """The gradient law (test_sft.py) over ranks, tp, sp, offload, packing, checkpointing, tied or not: six steps, 1e-5."""
    worst = 0
    for name, directory in runs.items():
        base = metrics(runs[f"{name.split()[0]} one  "])
        for a, b in zip(base, metrics(directory), strict=True):
            worst = max(worst, abs(a["loss"] / b["loss"] - 1))
            assert math.isclose(a["loss"], b["loss"], rel_tol=1e-5), (name, a, b)
            assert math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=1e-4), (name, a, b)
            assert a["tokens"] == b["tokens"]
            assert a["target_tokens"] == b["target_tokens"]
    assert len(runs) >= 6 and worst > 0  # at least the two base runs and some layouts, which do differ in rounding


def test_checkpoints_do_not_depend_on_the_layout(runs):
    """The last step's directory has the same weights and moments under the same names."""
    for name, directory in runs.items():
        base = runs[f"{name.split()[0]} one  "] / "checkpoints" / "step_6"
        other = directory / "checkpoints" / "step_6"
        for folder in ("", "training_state"):
            a, b = tensors_of(base / folder), tensors_of(other / folder)
            assert set(a) == set(b), name
            for key in a:
                if not key.startswith("rng."):  # by norm: Adam may divide single elements by almost zero
                    difference = (a[key].float() - b[key].float()).norm() / a[key].float().norm()
                    assert difference < 2e-3, (name, key, difference)


def test_every_rank_writes_a_file(runs):
    """Four ranks write four files and an index that names them; transformers loads the same tensors."""
    from transformers import AutoModelForCausalLM

    step = next(runs[name] for name in runs if " dp2tp2 " in name) / "checkpoints" / "step_6"
    names = sorted(f for f in os.listdir(step) if f.endswith(".safetensors"))
    assert len(names) == 4
    assert names[0] == "model-00001-of-00004.safetensors"
    index = files.read_json(step / "model.safetensors.index.json")["weight_map"]
    assert set(index.values()) == set(names)
    assert set(index) == set(pretrained.weight_entries(step))
    reference = AutoModelForCausalLM.from_pretrained(step, dtype=torch.float32)
    for name, tensor in tensors_of(step).items():
        assert torch.equal(reference.state_dict()[name], tensor.float()), name


@pytest.mark.full
def test_a_run_resumes_in_another_layout(models, tmp_path, train):
    """Saved by 4 ranks at step 2; resumed by 1, by 2 with offload, by tp 2 and by sp 2: the same conversations, losses to
    1e-5. Resumed by 4 ranks, losses are bitwise the same. So are those of sp 2 that resumes from sp 2."""
    common = [*RUN, "--model", models["tied"], "--save_steps", 2]
    resume = ["--resume_from", tmp_path / "four" / "checkpoints" / "step_2"]
    run_all([(4, (*common, "--output_dir", tmp_path / "four")),
             (4, (*common, *resume, "--output_dir", tmp_path / "same")),
             (2, (*common, *resume, "--param_offload", "--output_dir", tmp_path / "two")),
             (2, (*common, *resume, *LAYOUTS["tp2"][1], "--output_dir", tmp_path / "tp")),
             (2, (*common, *resume, *LAYOUTS["sp2"][1], "--save_steps", 1, "--output_dir", tmp_path / "sp")),
             (2, (*common, *LAYOUTS["sp2"][1], "--resume_from", tmp_path / "sp" / "checkpoints" / "step_4",
                  "--output_dir", tmp_path / "sp again"))], tmp_path)
    train(*common, *resume, out="one", model=models["tied"])
    train(*common, *resume, "--optimizer_offload", out="host", model=models["tied"])
    base = metrics(tmp_path / "four")
    straight, again = (metrics(tmp_path / name)[-2:] for name in ("sp", "sp again"))
    assert [(a["loss"], a["grad_norm"]) for a in straight] == [(a["loss"], a["grad_norm"]) for a in again]
    for name in ("one", "host", "two", "tp", "sp", "same"):
        lines = metrics(tmp_path / name)
        assert [line["step"] for line in lines] == list(range(3, 7))
        for a, b in zip(base[2:], lines, strict=True):
            assert a["tokens"] == b["tokens"], (name, a, b)
            assert math.isclose(a["loss"], b["loss"], rel_tol=1e-5), (name, a, b)
            if name == "same":
                assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])


@pytest.mark.full
def test_few_conversations_for_many_ranks(models, tmp_path, train):
    """Four ranks with one conversation per step, or a short last step: no hang, losses and val_loss of one rank."""
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
                assert a["val_tokens"] == b["val_tokens"]
                assert math.isclose(a["val_loss"], b["val_loss"], rel_tol=1e-6)
            else:
                assert math.isclose(a["loss"], b["loss"], rel_tol=1e-5)


@pytest.fixture(scope="module")
def collectives(models, pytestconfig, tmp_path_factory):
    """{(tp, "full" or "lora"): what tests/programs/count_collectives.py measures} of the tied model on two ranks."""
    cases = [(1, "full"), (2, "full")]
    if pytestconfig.getoption("--full"):
        cases.append((2, "lora"))
    arguments = [dict(model=str(models["tied"]), tp=tp, use_lora=how == "lora") for tp, how in cases]
    return dict(zip(cases, count_collectives(2, arguments, tmp_path_factory.mktemp("count")), strict=True))


def test_gradients_are_reduced_once_per_step(collectives):
    """FSDP2 on two ranks: only the last micro-batch of a step reduces gradients, once per group."""
    measured = collectives[1, "full"]
    (_, not_last), (_, last) = measured["counts"]
    assert calls(not_last, "reduce_scatter") == 0
    assert calls(last, "reduce_scatter") == 3  # two blocks and the root
    assert measured["held"] == measured["parameters"] // 2


def test_two_all_reduces_per_block_and_direction(collectives):
    """tp 2, two blocks: Megatron's two all-reduces per block in forward and in backward, plus embedding and loss."""
    (forward, backward), _ = collectives[2, "full"]["counts"]
    # forward: 2 per block, 1 for the embedding, 3 for the loss (max and sum of a chunk, gradient of hidden states)
    assert calls(forward, "all_reduce") == 2 * 2 + 1 + 3, forward
    assert calls(backward, "all_reduce") == 2 * 2, backward
    assert collectives[2, "full"]["held"] < 0.52 * collectives[2, "full"]["parameters"]


@pytest.mark.full
def test_adapters_add_no_all_reduce_to_a_micro_batch(collectives):
    """tp 2 with LoRA: the same two all-reduces per block and direction; the first block has one less in backward, as
    its input needs no gradient. Once per step, the gradient of each adapter's unsplit matrix is all-reduced."""
    (forward, backward), (_, last) = collectives[2, "lora"]["counts"]
    assert calls(forward, "all_reduce") == 2 * 2 + 1 + 3, forward
    assert calls(backward, "all_reduce") == 2 * 2 - 1, backward
    assert calls(last, "all_reduce") == 2 * 2 - 1 + 2 * 7, last  # seven adapted layers per block
    assert collectives[2, "lora"]["held"] < 0.55 * collectives[2, "lora"]["parameters"]


@pytest.mark.parametrize("flags, message", [
    (("--strategy", "megatron"), "use --strategy megatron --tp 2"), (("--tp", "2"), "or --strategy fsdp --tp 1"),
    (("--strategy", "megatron", "--tp", "2"), "--tp 2 needs at least 2 processes, and this run has 1; start it with "
     "./train.sh --n_gpus 2 or torchrun --nproc_per_node 2, or, also to resume a run with fewer, use --strategy fsdp --tp 1"),
])
def test_an_impossible_tp_is_an_error(train, flags, message):
    """The error names flags that work."""
    with pytest.raises(ValueError, match=re.escape(message)):
        train("--max_steps", 1, *flags)


@pytest.mark.full
def test_tp_must_divide_the_heads(tmp_path):
    """models/tiny has two key/value heads: tp 4 is an error that lists the valid numbers."""
    result = torchrun(4, f"{ROOT}/sft.py", *RUN, "--model", TINY, "--strategy", "megatron", "--tp", 4,
                      "--output_dir", tmp_path)
    assert result.returncode
    assert "these do: [1, 2]" in result.stderr


def test_adamw_with_clipping_equals_torchs():
    """Five steps on a matrix, a vector and a vector without gradient, each group with its own lr and weight decay."""
    start = [torch.randn(40, 30), torch.randn(30), torch.randn(7)]
    parameters, reference = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    hyperparameters = dict(lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    groups = [[dict(params=[p[0]], weight_decay=0.1), dict(params=p[1:], weight_decay=0.0, lr=0.01)]
              for p in (parameters, reference)]
    optimizer = optim.AdamW(groups[0], **hyperparameters)
    reference_optimizer = torch.optim.AdamW(groups[1], **hyperparameters)
    for step, limit in enumerate((1.0, 0.1, 1e9, 1e9, 3.0)):
        for p, expected in zip(parameters[:2], reference[:2]):
            p.grad = torch.randn_like(p) * 3**step
            expected.grad = p.grad.clone()
        norm = fsdp.grad_norm(torch.nn.ParameterList(parameters[:2]))
        assert math.isclose(norm, torch.nn.utils.clip_grad_norm_(reference[:2], limit).item(), rel_tol=1e-6)
        optimizer.step(grad_scale=((norm + 1e-6) / limit).clamp(min=1))
        reference_optimizer.step()
    for p, expected in zip(parameters, reference):
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(parameters[2], start[2])
    assert not torch.equal(parameters[0], start[0])
    optimizer.zero_grad()
    assert all(p.grad is None for p in parameters)


def test_the_norm_of_a_large_gradient_is_exact():
    """Sixteen million numbers: a sequential sum in fp32 would be off by 6e-4."""
    p = torch.nn.Parameter(torch.empty(2**15, 512))
    p.grad = torch.randn(2**15, 512, generator=torch.Generator().manual_seed(0))
    assert math.isclose(fsdp.grad_norm(torch.nn.ParameterList([p])).item(), p.grad.double().norm().item(), rel_tol=1e-6)


def test_a_run_imports_only_what_it_uses(tmp_path):
    """A plain run on one rank imports neither torch's compiler nor FSDP2 and DTensor, which saves a second."""
    result = program("what_is_imported", "--model", TINY, "--train_data", EXAMPLES, "--max_steps", 1,
                     "--no-gradient_checkpointing", cwd=tmp_path)
    assert "RESULT []" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("offload", ["", "param", "optimizer"])
def test_where_tensors_are(offload, models, monkeypatch, train):
    """With param_offload, FSDP2 gets the policy that puts parameters and moments on the host (here everything is on the
    host). With optimizer_offload, the optimizer updates its own fp32 masters, which are copied to the parameters."""
    saved, policies, shard = {}, [], fsdp2.fully_shard
    monkeypatch.setattr(checkpoint, "save", lambda root, step, **contents: saved.update(contents))

    def recorded(module, **options):
        policies.append(options["offload_policy"])
        return shard(module, **options)

    monkeypatch.setattr(fsdp2, "fully_shard", recorded)
    train("--max_steps", 2, "--batch_size", 2, *([f"--{offload}_offload"] if offload else []), model=models["untied"])
    optimizer, parameters = saved["optimizer"], list(saved["model"].parameters())
    updated = [p for group in optimizer.param_groups for p in group["params"]]
    if offload == "param":
        assert len(policies) == 5  # two blocks, the embedding, norm and head, the root
        assert all(isinstance(p, fsdp2.CPUOffloadPolicy) for p in policies)
    else:
        assert not policies  # one rank in fp32: FSDP2 would only copy
    if offload == "optimizer":
        masters = optimizer.masters
        assert set(masters) == set(parameters)
        assert {id(p) for p in updated} == {id(master) for master in masters.values()}
        assert all(master.device.type == "cpu" and master.dtype == torch.float32 for master in masters.values())
        assert all(torch.equal(p, master) and p.data_ptr() != master.data_ptr() for p, master in masters.items())
    else:
        assert {id(p) for p in updated} == {id(p) for p in parameters}
    assert all(state["exp_avg"].device.type == "cpu" for state in optimizer.state.values())


def test_selfcheck_passes_and_detects_a_wrong_loss(models, tmp_path, monkeypatch, capsys):
    """It passes on one rank and on dp 2 × sp 2, and fails if the loss is averaged within each micro-batch."""
    flags = (*RUN, "--model", models["tied"], "--selfcheck", "--output_dir", tmp_path)

    def check():
        monkeypatch.setattr(sys, "argv", ["sft.py", *map(str, flags)])
        sft.main()

    printed = run_all([(4, (*flags, "--sp", 2))], tmp_path)
    assert "selfcheck: ok, 4 conversations, all differences below 1e-05" in printed
    assert "one data-parallel rank" in printed and "no sequence parallelism" in printed
    check()
    printed = capsys.readouterr().out
    assert "selfcheck: ok, 4 conversations, all differences below 1e-05" in printed
    assert "one data-parallel rank" not in printed
    forward = CausalLM.forward

    def averaged(self, tokens, documents, target_positions, targets, weights):
        out = forward(self, tokens, documents, target_positions, targets, weights)
        return out._replace(total=out.total / len(out.each))

    monkeypatch.setattr(CausalLM, "forward", averaged)
    with pytest.raises(ValueError, match="the gradient depends on the layout"):
        check()
