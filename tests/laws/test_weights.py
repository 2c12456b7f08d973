"""Weights of messages: the loss of a step is the sum of weight × loss / the sum of weights, in every layout.

The reference is plain torch in fp64 on the logits of one conversation at a time; it shares no code with ops/loss.py.
"""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_helpers import by_hand, tiny
from helpers import FAST, LAYOUTS, TINY, chat, metrics, run_all, tensors_of, write

import data
import sft
from disk import checkpoint
from disk.run import ModelPaths
from ops.attention import Documents
from ranks import processes
from screen import samples

CONTENTS = ["How far?", "Two miles.", "And back?", "Two more, by the same road.", "Sure?", "Yes."]


def weighted_rows(count=15):
    """Conversations of one to three turns. Their weights are 0.5, 2, 0, 1 and absent in turn, differently in each.

    They have three sources: a has a third of the conversations, b and c have others.
    """
    rows = []
    for i in range(count):
        messages = chat(f"{i} times", *(text * (i % 3 + 1) for text in CONTENTS[1 : 2 * (i % 3) + 2]))
        for j, message in enumerate(messages[1::2]):
            weight = (0.5, 2.0, 0.0, 1.0, None)[(i + 2 * j) % 5]
            if weight is not None:
                message["weight"] = weight
        rows.append({"messages": messages, "source": "cab"[i % 3]})
    return rows


def weights_by_hand(messages):
    """(ids, the weight of each token), from masks in which one turn at a time is trained."""
    weights = 0
    for j, message in enumerate(messages):
        if message["role"] == "assistant":
            ids, mask = by_hand([{**m, "train": k == j} for k, m in enumerate(messages)])
            weights = weights + message.get("weight", 1.0) * np.array(mask, dtype=float)
    return ids, weights


def by_reference(model, conversations):
    """(loss, gradients, weight, correct targets) of a step in fp64, from the logits of each conversation alone."""
    total = weight = correct = 0
    for ids, weights in conversations:
        logits = model(torch.tensor(ids), Documents.of((len(ids),), torch.device("cpu")))
        each = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
        total = total + (each * torch.tensor(weights[1:])).sum()
        weight = weight + weights[1:].sum()
        correct += ((logits[:-1].argmax(dim=1) == torch.tensor(ids[1:])) & (torch.tensor(weights[1:]) > 0)).sum().item()
    loss = total / weight
    return loss.item(), torch.autograd.grad(loss, list(model.parameters())), weight, correct


@pytest.fixture
def rows(tmp_path):
    return write(tmp_path / "rows.json", weighted_rows())


def test_the_dataset_has_the_weight_of_each_token(rows):
    """Those of the messages, 0 outside targets. The ledger counts them. A conversation of weight 0 is dropped."""
    dataset = data.load(rows, tiny, 256)
    expected = [pair for pair in (weights_by_hand(row["messages"]) for row in weighted_rows()) if pair[1].any()]
    assert 0 < len(expected) == len(dataset) == 14
    for i, (ids, weights) in enumerate(expected):
        assert dataset.tokens[dataset.starts[i] : dataset.starts[i + 1]].tolist() == ids
        assert dataset.weights_of(i).tolist() == weights.tolist()
        assert dataset.count([i])["target_weight"] == weights.sum()
    every = np.concatenate([weights for _, weights in expected])
    ledger = dataset.ledger
    assert (ledger.target, ledger.weight) == ((every > 0).sum(), every.sum())
    assert ledger.weighted == ((every > 0) & (every != 1)).sum()
    assert ledger.dropped == {"without targets": 1}
    assert f"weights  {ledger.weighted} targets have a weight other than 1; the sum over all targets is " in "".join(
        ledger.lines())


@pytest.mark.parametrize("shape", [dict(micro_batch_size=4), dict(micro_batch_size=1), dict(packing=False),
                                   dict(packing=False, micro_batch_size=3)], ids=str)
def test_loss_and_gradient_equal_the_definition(shape, rows):
    """In fp32, for any micro-batches, to 1e-5; ConversationLosses stay unweighted, the losses by source do not."""
    cfg = sft.Config(model="tiny", max_length=128, dtype="fp32", gradient_checkpointing=False, **shape)
    ranks = processes.single_process(torch.device("cpu"))
    model, _ = sft.build(cfg, ModelPaths.find(TINY), ranks)
    dataset = data.load(rows, tiny, cfg.max_length)
    ids = np.arange(len(dataset))
    batches = list(sft.micro_batches(dataset, ids, cfg, ranks))
    for _ in range(3):  # so that some targets are the likeliest tokens
        sft.backward(model, batches, 1000, ranks)
        with torch.no_grad():
            for p in model.parameters():
                p -= 2e-3 * p.grad.sign()
                p.grad = None
    losses = samples.ConversationLosses(dataset, ranks).restart(ids)
    loss = sft.backward(model, batches, dataset.count(ids)["target_weight"], ranks, losses).item()
    gradients = [p.grad.double() for p in model.parameters()]
    value, accuracy = sft.evaluate(model, dataset, ids, cfg, ranks)

    conversations = [pair for pair in map(weights_by_hand, (r["messages"] for r in weighted_rows())) if pair[1].any()]
    expected, expected_gradients, weight, correct = by_reference(model.double(), conversations)
    assert math.isclose(loss, expected, rel_tol=1e-5) and math.isclose(value, expected, rel_tol=1e-5)
    assert dataset.count(ids)["target_weight"] == weight
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    sums = losses.all_reduce(torch.tensor(loss))
    assert sums["correct"] == correct > 0 and sums["loss"] == loss
    assert math.isclose(accuracy, correct / dataset.count(ids)["target_tokens"])
    by_source = losses.sources.values(ids, sums["sources"].tolist())
    assert list(by_source) == ["c", "a", "b"]
    for name, part in by_source.items():
        mine = [pair for pair, i in zip(conversations, dataset.source_of) if dataset.source_names[i] == name]
        expected, _, weight, _ = by_reference(model, mine)
        assert part["target_weight"] == weight and math.isclose(part["loss"], expected, rel_tol=1e-5)
    unweighted, _, n, _ = by_reference(model, [(tokens, (weights > 0) * 1.0) for tokens, weights in conversations[:1]])
    assert math.isclose(losses.sums[0].item(), unweighted * n, rel_tol=1e-5)


def test_a_micro_batch_without_weights_has_none(tmp_path):
    """Ordinary data: no weight is stored, and the buffer is as small as before."""
    dataset = data.load(write(tmp_path / "rows.json", [{"prompt": "a", "response": "b c"}] * 3), tiny, 64)
    (batch,) = data.micro_batches(dataset, range(3), 192)
    assert batch.weights is None and len(dataset.weight) == len(dataset.weighted) == 0
    n_offsets = 2  # four int32
    assert len(batch.buffer) == 2 * len(batch.tokens) + 3 * batch.n_targets + n_offsets


@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_weights_are_a_view_of_the_buffer(count, rows):
    """For odd and even numbers of targets, and for a rank without conversations; to() keeps them."""
    dataset = data.load(rows, tiny, 256)
    for ids in (np.arange(min(count, len(dataset))), np.arange(0)):
        (batch,) = data.micro_batches(dataset, ids, 4096)
        moved = batch.to("cpu")
        for b in (batch, moved):
            assert b.weights.dtype == torch.float32 and b.weights.shape == b.targets.shape
            assert b.weights.untyped_storage().data_ptr() == b.buffer.untyped_storage().data_ptr()
        expected = [dataset.weights_of(i)[1:] for i in batch.ids]
        expected = np.concatenate([weights[weights > 0] for weights in expected] or [np.zeros(0)])
        assert batch.weights.tolist() == expected.tolist()


RUN = (*FAST, "--max_length", 128, "--batch_size", 3, "--max_steps", 6, "--timeout", 60)


def test_a_run_does_not_depend_on_its_layout(rows, train, tmp_path, pytestconfig, half):
    """Losses, norms and val_loss of several ranks, tensor and sequence parallelism, offload, no packing, to 1e-5.

    So are the losses by source, which add up to that of the step; tools/evaluate.py has the same of the
    checkpoint, on two ranks, with sequence parallelism.
    """
    common = (*RUN, "--max_steps", 3, "--train_data", rows, "--val_data", rows, "--eval_steps", 3, "--model", half)
    layouts = {"dp2": ("--no-packing",), "sp2tp2": ()}
    if pytestconfig.getoption("--full"):
        layouts |= {"tp2": (), "sp4": (), "dp4": (), "dp2 offload": ("--param_offload",),
                    "dp2tp2": ("--optimizer_offload",)}
    runs = [(LAYOUTS[name.split()[0]][0], (*common, *LAYOUTS[name.split()[0]][1], *more, "--output_dir",
                                           tmp_path / name)) for name, more in layouts.items()]
    evaluated = 2, ("tools/evaluate.py", tmp_path / "dp2/checkpoints/latest", rows, "--json", "--sp", 2)
    out = run_all([*runs, evaluated], tmp_path)
    (result,) = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    last = metrics(tmp_path / "dp2")[-1]
    assert math.isclose(result["loss"], last["val_loss"], rel_tol=1e-6)
    assert (result["accuracy"], result["tokens"]) == (last["val_accuracy"], last["val_tokens"])
    base = train(*common, out="base")
    assert any(line["target_weight"] != line["target_tokens"] for line in base if "loss" in line)
    for name in ("base", *layouts):
        for a, b in zip(base, metrics(tmp_path / name), strict=True):
            if "loss" in a:
                assert sums_up(b) and abs(a["accuracy"] - b["accuracy"]) < 1.5 / a["target_tokens"]
                assert a["sources"].keys() == b["sources"].keys() <= set("abc")
                for key, part in a["sources"].items():
                    assert part["target_weight"] == b["sources"][key]["target_weight"]
                    assert math.isclose(part["loss"], b["sources"][key]["loss"], rel_tol=1e-5)
            for key in "loss", "val_loss", "forgetting", "grad_norm":
                assert math.isclose(a.get(key, 1), b.get(key, 1), rel_tol=1e-4 if key == "grad_norm" else 1e-5), name
            for key in "target_tokens", "target_weight", "val_tokens", "val_weight":
                assert a.get(key) == b.get(key)


def sums_up(line):
    """Is a line's loss, to 1e-6, the mean of those of its sources?"""
    weights, losses = zip(*((part["target_weight"], part["loss"]) for part in line["sources"].values()))
    assert sum(weights) == line["target_weight"]
    return math.isclose(sum(map(math.prod, zip(weights, losses))) / sum(weights), line["loss"], rel_tol=1e-6)


class Killed(BaseException):
    """Simulates SIGKILL: no code of the trainer catches it."""


def test_resume_is_bitwise_and_other_weights_are_refused(rows, train, tmp_path, monkeypatch):
    """Six steps = three, kill, resume. Data that differ only in one weight are other data."""
    common = (*RUN, "--train_data", rows, "--save_steps", 3)
    straight = train(*common, out="straight")
    save = checkpoint.save

    def save_and_die(root, step, **contents):
        save(root, step, **contents)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_die)
        with pytest.raises(Killed):
            train(*common, out="killed")
    resumed = train(*common, "--resume_from", "auto", out="killed")
    keys = "step", "loss", "grad_norm", "target_weight", "accuracy", "sources"
    assert [[line[key] for key in keys] for line in resumed] == [[line[key] for key in keys] for line in straight]
    a, b = (tensors_of(tmp_path / out / "checkpoints" / "step_6") for out in ("straight", "killed"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    other = weighted_rows()
    other[0]["messages"][1]["weight"] = 0.25
    write(tmp_path / "rows.json", other)
    with pytest.raises(ValueError, match="train_data|data"):
        train(*common, "--resume_from", tmp_path / "killed" / "checkpoints" / "step_3", out="other")


def test_selfcheck_holds_with_weights(rows, train, capsys):
    """--selfcheck compares layouts of a weighted step; a loss that ignores the weights fails its test above."""
    with pytest.raises(FileNotFoundError):  # it writes no metrics
        train(*RUN, "--train_data", rows, "--selfcheck")
    assert "selfcheck: ok" in capsys.readouterr().out


@pytest.mark.parametrize("weight", [1e-30, 1e30])
def test_a_weight_that_fp32_can_not_sum_is_an_error(weight, tmp_path):
    """The error names the row, the weight and the range."""
    messages = chat("a", "b")
    messages[1]["weight"] = weight
    path = write(tmp_path / "rows.json", [{"messages": messages}])
    with pytest.raises(ValueError, match="must be 0, or from 1e-20 to 1e.20") as error:
        data.load(path, tiny, 100)
    assert f"{path}[0]: the weight {weight:g} " in str(error.value)
