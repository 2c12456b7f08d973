"""--replicas and --gradient_reduction: the same losses, weights and checkpoints as one rank; collectives; memory.

Ranks are gloo processes on the CPU, one thread each. 2 × 2 are four of them: two replicas, each of two shards.
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import EXAMPLES, TINY, calls, count_collectives, launch_all, metrics, tensors_of, two_layers

from disk import files
from disk.run import RunState
from ops import forecast, optim
from ops.memory import local
from settings.errors import UserError

# 16 conversations: four ranks have two micro-batches each
RUN = ("--train_data", EXAMPLES, "--lr", "1e-3", "--batch_size", "16", "--max_length", "256", "--max_steps", "4",
       "--save_steps", "2", "--val_data", EXAMPLES, "--eval_steps", "2", "--timeout", "60")
TP = ("--strategy", "megatron", "--tp", "2")
OFTEN = ("--gradient_reduction", "micro_batch")
LAYOUTS = {"2x2": ("--replicas", "2"), "4x1": ("--replicas", "4"), "2x1, tp 2": ("--replicas", "2", *TP), "1x4": (),
           "1x2, tp 2": TP}
OFFLOADS = {"": (), "param": ("--param_offload",), "optimizer": ("--optimizer_offload",)}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """tied, as models/tiny, and untied; tp 2 splits the heads of both."""
    root = tmp_path_factory.mktemp("models_of_replicas")
    return {"tied": two_layers(root / "tied"), "untied": two_layers(
        root / "untied", model_type="qwen3", num_key_value_heads=4, head_dim=32, tie_word_embeddings=False)}


def grid():
    """{"model layout, offload, reduction": flags} of all layouts, with --full; a third of the offloads for each."""
    cases = {}
    for (i, layout), (j, offload), (k, how) in itertools.product(
            enumerate(LAYOUTS), enumerate(OFFLOADS), enumerate(("step", "micro_batch"))):
        if layout.startswith("1") and how == "step" or (i + j + k) % 3:
            continue  # test_fsdp.py has the former
        model = ("tied", "untied")[(i + k) % 2]
        flags = *LAYOUTS[layout], *OFFLOADS[offload], "--gradient_reduction", how
        cases[f"{model} {layout}, {offload}, {how}"] = flags
    for layout, how in ("2x2", "step"), ("2x2", "micro_batch"), ("2x1, tp 2", "micro_batch"), ("1x4", "micro_batch"):
        cases[f"lora {layout}, {how}"] = *LAYOUTS[layout], "--gradient_reduction", how
    return cases


@pytest.fixture(scope="session")
def runs(tmp_path_factory, models, pytestconfig):
    """{"model layout ...": output directory} of runs of four steps; "model one" is the run of one rank.

    Two of them on four ranks: 2 × 2; and from its second step on with tp 2, optimizer offload and a reduction with each
    micro-batch. With --full those of grid(), and resumes from and into other layouts.
    """
    root = tmp_path_factory.mktemp("replicas")
    commands = {"untied one": (1, ()), "untied 2x2": (4, LAYOUTS["2x2"]),
                "untied 2x1, tp 2, from 2x2": (4, (*LAYOUTS["2x1, tp 2"], "--optimizer_offload", *OFTEN))}
    if pytestconfig.getoption("--full"):
        commands |= {"tied one": (1, ()), "lora one": (1, ())}
        commands |= {name: (4, flags) for name, flags in grid().items()}
        commands |= {"untied 2x2, from 2x2": (4, LAYOUTS["2x2"]), "untied 2x2, from one": (4, LAYOUTS["2x2"]),
                     "untied one, from 2x2": (1, ("--replicas", "1")),
                     "untied 1x2, from 2x2": (2, ("--replicas", "1", "--param_offload", *OFTEN))}
    outputs = {name: root / name.replace(" ", "_").replace(",", "") for name in commands}
    lines = []
    for name, (ranks, flags) in commands.items():
        kind = name.split()[0]
        model = ("--model", models["untied"], "--use_lora") if kind == "lora" else ("--model", models[kind])
        resume = ()
        if ", from " in name:
            resume = "--resume_from", outputs[f"{kind} {name.partition(', from ')[2]}"] / "checkpoints" / "step_2"
        lines.append((ranks, (*RUN, *model, *flags, *resume, "--output_dir", outputs[name])))
    result = launch_all(lines, root)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert "UserWarning" not in result.stderr, result.stderr[-3000:]
    return outputs


def of_one_rank(runs, name):
    return runs[f"{name.split()[0]} one"]


def test_losses_and_norms_are_those_of_one_rank(runs):
    """Each step's loss and gradient norm, and each val_loss; also of the steps after a resume in another layout."""
    for name, directory in runs.items():
        base = {(line["step"], "val_loss" in line): line for line in metrics(of_one_rank(runs, name))}
        lines = metrics(directory)
        steps = [line["step"] for line in lines if "loss" in line]
        assert steps == ([3, 4] if ", from " in name else [1, 2, 3, 4]), name
        assert sum("val_loss" in line for line in lines) >= 1
        for line in lines:
            expected = base[line["step"], "val_loss" in line]
            for key, tolerance in ("loss", 1e-5), ("val_loss", 1e-5), ("grad_norm", 1e-4):
                if key in line:
                    assert math.isclose(line[key], expected[key], rel_tol=tolerance), (name, key, line, expected)
            assert line.get("tokens") == expected.get("tokens")


def test_checkpoints_are_those_of_one_rank(runs):
    """The last step's directory: the same weights, moments and masters, each written once (tensors_of checks it)."""
    for name, directory in runs.items():
        for folder in ("", "training_state"):
            a, b = (tensors_of(path / "checkpoints" / "step_4" / folder)
                    for path in (of_one_rank(runs, name), directory))
            assert set(a) == set(b), (name, set(a) ^ set(b))
            for key in a:  # by norm: Adam may divide single elements by almost zero
                assert (a[key].float() - b[key].float()).norm() <= 2e-3 * a[key].float().norm(), (name, key)


@pytest.mark.full
def test_a_resume_in_the_same_layout_is_bitwise(runs):
    """Saved and resumed by 2 × 2 ranks: the same losses and norms as without a stop."""
    straight, resumed = ([line for line in metrics(runs[f"untied 2x2{end}"]) if "loss" in line and line["step"] > 2]
                         for end in ("", ", from 2x2"))
    assert [(line["loss"], line["grad_norm"]) for line in straight] == \
        [(line["loss"], line["grad_norm"]) for line in resumed]


@pytest.fixture(scope="session")
def measured(models, tmp_path_factory, pytestconfig):
    """{(model, tp, replicas, reduction): what count_collectives.py measures} on four ranks; "lora" is untied, too."""
    cases = [("untied", 1, 2, "micro_batch"), ("lora", 2, 2, "micro_batch")]
    if pytestconfig.getoption("--full"):
        cases += [("tied", 1, 2, "step"), ("tied", 1, 1, "step"), ("tied", 2, 2, "micro_batch"),
                  ("untied", 1, 1, "micro_batch"), ("untied", 1, 2, "step"), ("untied", 1, 4, "micro_batch"),
                  ("untied", 2, 2, "step"), ("lora", 1, 2, "step"), ("lora", 1, 2, "micro_batch"),
                  ("lora", 2, 2, "step")]
    arguments = [dict(model=str(models["untied" if model == "lora" else model]), tp=tp, replicas=replicas,
                      gradient_reduction=how, use_lora=model == "lora") for model, tp, replicas, how in cases]
    return dict(zip(cases, count_collectives(4, arguments, tmp_path_factory.mktemp("count_replicas")), strict=True))


def test_gathers_of_a_micro_batch(measured):
    """Tied: the root and both blocks in forward, the first block in backward. Untied: the embedding, both blocks, norm
    and head; the first block. The last block, norm and head are gathered once, the embedding for forward only."""
    for (model, tp, replicas, how), result in measured.items():
        n_groups = 3 if model == "tied" else 4
        for forward, backward in result["counts"]:
            is_sharded = tp * replicas < 4  # otherwise there is one shard
            assert calls(forward, "all_gather") == n_groups * is_sharded, (model, tp, replicas, how)
            assert calls(backward, "all_gather") == 1 * is_sharded, (model, tp, replicas, how)
            assert calls(forward, "reduce_scatter") == 0


def test_gradients_cross_replicas_once_a_step(measured):
    """One all-reduce for each group, in the last micro-batch only. Over the shards once a step, or with each one."""
    for (model, tp, replicas, how), result in measured.items():
        (_, first), (_, last) = result["counts"]
        n_groups = {"tied": 3, "untied": 4, "lora": 2}[model]  # those that train something
        n_scattered = n_groups * (tp * replicas < 4)
        assert calls(last, "reduce_scatter") == n_scattered, (model, tp, replicas, how)
        assert calls(first, "reduce_scatter") == n_scattered * (how == "micro_batch"), (model, tp, replicas, how)
        crossing = calls(last, "all_reduce") - calls(first, "all_reduce")
        if tp == 2 and how == "step":  # tp's all-reduces, of the unsplit matrix of each adapter; of q_norm and k_norm
            crossing -= {"tied": 0, "untied": 2 * 2, "lora": 2 * 7}[model]
        assert crossing == n_groups * (replicas > 1), (model, tp, replicas, how)
        if tp == 1:
            assert calls(first, "all_reduce") == 0


def test_what_a_rank_holds(measured, models):
    """Of the parameters its shard, also after an evaluation and a generated answer. Between micro-batches the gradient
    of all of them, or of its shard; after the last one, of its shard."""
    for (model, tp, replicas, how), result in measured.items():
        shards = 4 // (tp * replicas)
        if tp == 1:
            assert result["held"] == result["parameters"] // shards, (model, tp, replicas, how)
        assert result["evaluated"] == result["held"], (model, tp, replicas, how)
        between = result["reduced"] * (shards if how == "step" else 1)
        if (model, tp, how) == ("untied", 2, "step"):  # the embedding's gradient has the rows of both tp ranks
            config = files.read_json(models["untied"] / "config.json")
            between += config["vocab_size"] * config["hidden_size"] // 2
        assert result["gradient"] == between, (model, tp, replicas, how)
        if model != "lora":
            assert result["reduced"] == result["held"], (model, tp, replicas, how)


# ---- the choice -----------------------------------------------------------------------------------------------------


@pytest.fixture
def choices(train, tmp_path, monkeypatch, capsys):
    """A function from bytes of memory, steps and flags to (what the banner says, "chosen" of the last checkpoint)."""
    def run(memory, steps, *flags):
        monkeypatch.setattr(forecast, "device_memory", lambda device: memory)
        capsys.readouterr()
        resumes = ["--resume_from", "auto"] if steps > 1 else []
        train("--max_steps", steps, "--batch_size", 2, *flags, *resumes, model=TINY)
        [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("model")]
        state = files.read_json(tmp_path / "out" / "checkpoints" / f"step_{steps}" / "training_state" / "state.json")
        return line.partition("gradients reduced ")[2], state["chosen"]

    return run


def test_the_choice_is_shown_and_saved(choices):
    """models/tiny has 1,050,752 parameters in fp32. A resumed run takes the choice again, unless one is given."""
    gradient = 4 * 1_050_752
    place = {"world_size": 1, "tp": 1, "sp": 1, "replicas": 1, "max_length": 2048}
    offload = "--param_offload"
    often = {**place, "gradient_reduction": "micro_batch"}
    assert choices(10 * gradient - 1, 1, offload) == ("with each micro-batch", often)
    assert choices(2**40, 2, offload) == ("with each micro-batch", often)
    assert choices(2**40, 3, offload, "--gradient_reduction", "step") == ("once a step", {})
    assert choices(10 * gradient, 4, offload, "--gradient_reduction", "auto", "--max_length", 1024) == (
        "once a step", {**place, "max_length": 1024, "gradient_reduction": "step"})
    assert choices(10 * gradient - 1, 5, "--no-param_offload") == ("", {})  # one rank reduces nothing


def test_a_reduction_that_does_nothing_is_an_error(train):
    with pytest.raises(ValueError, match="--gradient_reduction step has no effect: one process has no others"):
        train("--gradient_reduction", "step")


def test_what_is_no_choice_is_an_error():
    """In state.json, which someone may have edited. An older version saved neither sp nor replicas."""
    def before(**chosen):
        return RunState.chosen_before(SimpleNamespace(saved={"chosen": chosen}, resumed="step_2"))

    assert before(tp=2, gradient_reduction="step") == dict(tp=2, gradient_reduction="step", sp=1, replicas=1)
    for chosen in dict(gradient_reduction="often"), dict(gradient_reduction=1), dict(replicas="2"), dict(other=1):
        with pytest.raises(UserError, match="`chosen` in its state.json"):
            before(**chosen)


def test_micro_batches_are_summed_in_fp32(train, monkeypatch):
    """With --optimizer_offload the parameters are bf16, and FSDP2 would sum their gradients in bf16: 16 micro-batches
    would lose the small ones. Against one reduction per step, which sums in fp32 and rounds once."""
    gradients, update = {}, optim.update

    def recorded(optimizer, *rest, **named):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        masters = {id(master): p for p, master in optimizer.masters.items()}
        gradients[how] = [local(masters[id(p)].grad).clone() for p in parameters]
        return update(optimizer, *rest, **named)

    monkeypatch.setattr(optim, "update", recorded)
    for how in ("step", "micro_batch"):
        train("--max_steps", 1, "--batch_size", 16, "--no-packing", "--param_offload", "--optimizer_offload", "--dtype",
              "bf16", "--gradient_reduction", how, out=how)
    assert {g.dtype for g in gradients["step"]} == {torch.bfloat16}
    assert {g.dtype for g in gradients["micro_batch"]} == {torch.float32}
    for a, b in zip(gradients["step"], gradients["micro_batch"], strict=True):
        assert (a.float() - b).norm() < 4e-3 * b.norm()
