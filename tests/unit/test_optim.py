"""ops/optim.py: what decays, what each optimizer keeps, and that a checkpoint holds all of it, offloaded or
not."""

import os

import pytest
import torch
from safetensors.torch import load_file
from checkpoint_helpers import TIED, UNTIED, adamw, loaded, published, train_step

import lora
from disk import checkpoint
from ops import optim
from settings.errors import UserError

SETTINGS = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8)


class Lion(optim.AdamW):
    """As in docs/fork.md: one moment."""

    def new_state(self, p):
        return {"exp_avg": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, clip_divisor=1.0):
        beta1, beta2 = self.betas
        for group in self.param_groups:
            for p in group["params"]:
                moment, grad = self.state_of(p)["exp_avg"], p.grad / clip_divisor
                direction = moment.lerp(grad, 1 - beta1).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                moment.lerp_(grad, 1 - beta2)
        self.updates += 1


class TwoKinds(optim.AdamW):
    """As Muon beside AdamW: matrices have one momentum, vectors AdamW's two moments and its bias
    correction."""

    def new_state(self, p):
        return {"momentum": torch.zeros_like(p)} if p.ndim > 1 else super().new_state(p)

    @torch.no_grad()
    def step(self, clip_divisor=1.0):
        for group in self.param_groups:
            for p in group["params"]:
                state, grad = self.state_of(p), p.grad / clip_divisor
                if p.ndim > 1:
                    update = state["momentum"].mul_(0.9).add_(grad)
                else:
                    first = state["exp_avg"].lerp_(grad, 0.1) / (1 - 0.9 ** (self.updates + 1))
                    update = first / (state["exp_avg_sq"].lerp_(grad.square(), 0.05).sqrt() + 1e-8)
                p.sub_(group["lr"] * update)
        self.updates += 1


def keys_of(kind, p):
    """What an optimizer keeps for a parameter, said here once more."""
    if kind is Lion:
        return ["exp_avg"]
    return ["momentum"] if kind is TwoKinds and p.ndim > 1 else ["exp_avg", "exp_avg_sq"]


# What decays


def names(model, groups):
    found = {p: name for name, p in model.named_parameters()}
    return [[found[p] for p in group["params"]] for group in groups]


def test_matrices_decay_and_vectors_do_not(tmp_path):
    """In the model's order, a tied weight once; a frozen parameter is in no group."""
    model, _ = loaded(published(tmp_path / "base", TIED))
    model.model.norm.requires_grad_(False)
    groups = optim.parameter_groups(model, 0.1)
    vectors, matrices, lora_b = names(model, groups)
    assert [group["weight_decay"] for group in groups] == [0.0, 0.1, 0.1]
    assert [group["lr_ratio"] for group in groups] == [1.0, 1.0, 1.0]
    assert lora_b == [] and matrices[0] == "model.embed_tokens.weight"
    assert [n for n in matrices if not n.endswith(("proj.weight", "embed_tokens.weight"))] == []
    assert [n for n in vectors if not n.endswith(("norm.weight", "layernorm.weight", "bias"))] == []
    assert len(matrices) == 1 + 2 * 7 and len(vectors) == 2 * (2 + 3)
    order = [name for name, _ in model.named_parameters()]
    assert all(sorted(group, key=order.index) == group for group in (vectors, matrices))


def test_lora_b_has_a_rate_of_its_own(tmp_path):
    """And DoRA's magnitudes do not decay."""
    model, _ = loaded(published(tmp_path / "base", TIED))
    lora.inject(model, {"lora_alpha": 8, "use_dora": True}, {"model.layers.0.mlp.up_proj": 2})
    groups = optim.parameter_groups(model, 0.1, lora_plus_ratio=4.0)
    assert names(model, groups) == [[f"model.layers.0.mlp.up_proj.{last}"] for last in (
        "lora_magnitude_vector", "lora_A.weight", "lora_B.weight")]
    assert [group["weight_decay"] for group in groups] == [0.0, 0.1, 0.1]
    assert [group["lr_ratio"] for group in groups] == [1.0, 1.0, 4.0]


# The optimizer


def test_bias_correction_counts_updates():
    """The third update after two, whatever was done to `updates` in between, is torch's third."""
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)) for _ in range(2))
    optimizer = optim.AdamW([dict(params=[ours], weight_decay=0.1)], **SETTINGS)
    other = torch.optim.AdamW([theirs], weight_decay=0.1, fused=True, **SETTINGS)
    for i in range(3):
        ours.grad = torch.sin(torch.arange(12.0) + i).view(3, 4)
        theirs.grad = ours.grad.clone()
        optimizer.updates = i
        optimizer.step()
        other.step()
        assert torch.equal(ours, theirs) and optimizer.updates == i + 1


def test_offloaded_steps_are_those_of_fp32_masters(tmp_path):
    """bf16 parameters follow fp32 masters, which go the way of an fp32 model with the same gradients."""
    model, _ = loaded(published(tmp_path / "base", UNTIED))
    plain = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters()]
    model.to(torch.bfloat16)
    optimizer = adamw(model, offload=True)
    masters = [optimizer.master(p) for p in model.parameters()]
    with torch.no_grad():
        for master, p in zip(masters, plain):
            p.copy_(master)
    kept = optim.AdamW([dict(params=[p for p in plain if (p.ndim < 2) == vectors], weight_decay=0.0 if vectors
                             else 0.01) for vectors in (True, False)], **SETTINGS)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for p, copy in zip(model.parameters(), plain):
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
            copy.grad = p.grad.float()
        optimizer.step(clip_divisor=2.0)
        kept.step(clip_divisor=2.0)
        assert all(p.grad is not None for p in model.parameters()) and all(m.grad is None for m in masters)
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())
        for p, master, expected in zip(model.parameters(), masters, plain, strict=True):
            assert master.dtype == torch.float32 and torch.equal(master, expected)
            assert torch.equal(p, master.bfloat16())
    assert optimizer.updates == kept.updates == 3


# Checkpoints of any optimizer


class Run:
    """A run of the tied model with an optimizer of some kind; bf16 on the disk."""

    def __init__(self, directory, kind, offload):
        self.model, self.shard_map = loaded(directory)
        self.kind, self.optimizer = kind, adamw(self.model, kind, offload)

    def train(self, steps):
        for step in steps:
            train_step(self.model, self.optimizer, step)

    def save(self, root, step):
        return checkpoint.save(root, step, model=self.model, optimizer=self.optimizer, shard_map=self.shard_map,
                               exported={"config.json": b"{}"}, state={})

    def resume(self, saved):
        checkpoint.load_training_tensors(saved, self.model, self.optimizer)
        if isinstance(self.optimizer, optim.Offloaded):
            self.optimizer.publish()
        return self


@pytest.mark.parametrize("offload", [False, True], ids=["plain", "offload"])
@pytest.mark.parametrize("kind", [optim.AdamW, Lion, TwoKinds])
def test_resume_is_bitwise_with_any_optimizer(tmp_path, kind, offload):
    """Two steps, a checkpoint, two more: the same from the checkpoint, by weights and state, offloaded or not
    then and now. The files hold what new_state says for each parameter, and nothing else."""
    base = published(tmp_path / "base", TIED, torch.bfloat16)
    straight = Run(base, kind, offload)
    straight.train((1, 2))
    saved = straight.save(tmp_path / "out", 2)
    tensors = load_file(os.path.join(saved, "training_state", "tensors.safetensors"))
    assert set(tensors) == {f"{key}.{name}" for name, p in straight.model.named_parameters()
                            for key in (*keys_of(kind, p), "master")}
    straight.train((3, 4))
    for now in (offload, not offload):
        resumed = Run(base, kind, now).resume(saved)
        assert resumed.optimizer.updates == 2
        resumed.train((3, 4))
        assert resumed.optimizer.updates == straight.optimizer.updates == 4
        for ours, theirs in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
            expected, state = (run.optimizer.state_of(run.optimizer.master(p))
                               for run, p in ((straight, ours), (resumed, theirs)))
            assert expected.keys() == state.keys() and all(torch.equal(expected[k], state[k]) for k in state)


@pytest.mark.parametrize("then, now", [(Lion, optim.AdamW), (optim.AdamW, Lion), (TwoKinds, optim.AdamW)])
def test_another_optimizers_checkpoint_is_refused(tmp_path, then, now):
    """Its tensors are named, and nothing is restored."""
    base = published(tmp_path / "base", TIED)
    first, second = Run(base, then, False), Run(base, now, False)
    first.train([1])
    saved = first.save(tmp_path / "out", 1)
    with pytest.raises(UserError, match="does not belong to this model and optimizer: .*exp_avg"):
        second.resume(saved)
    assert not second.optimizer.state and second.optimizer.updates == 0


def test_a_run_saved_before_its_first_update_resumes(tmp_path):
    """Its state is what new_state says, and it has taken no update."""
    base = published(tmp_path / "base", TIED, torch.bfloat16)
    straight = Run(base, optim.AdamW, False)
    resumed = Run(base, optim.AdamW, False).resume(straight.save(tmp_path / "out", 1))
    assert resumed.optimizer.updates == 0
    straight.train([1])
    resumed.train([1])
    assert all(torch.equal(a, b) for a, b in zip(straight.model.parameters(), resumed.model.parameters()))


@pytest.mark.parametrize("key, shape", [("master", None), ("rows", (1,))])
def test_state_that_could_not_be_restored_is_not_saved(tmp_path, key, shape):
    """A name that is the weights', a tensor that is not shaped like its parameter: no checkpoint appears."""
    class Odd(Lion):
        def new_state(self, p):
            return {**super().new_state(p), key: torch.zeros(shape or p.shape)}

    run = Run(published(tmp_path / "base", TIED), Odd, False)
    run.train([1])
    with pytest.raises(AssertionError, match=key):
        run.save(tmp_path / "out", 1)
    assert checkpoint.steps_in(tmp_path / "out") == []


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code catches it."""


@pytest.mark.parametrize("flags", [(), ("--optimizer_offload",)], ids=["plain", "offload"])
def test_a_run_with_lion_that_is_killed_resumes_to_the_bit(train, tmp_path, monkeypatch, flags):
    """One name in sft.py is replaced, as docs/fork.md says, and --optimizer_offload works with it as well."""
    monkeypatch.setattr(optim, "AdamW", Lion)
    words = (*flags, "--batch_size", 8, "--max_length", 128, "--lr", 1e-4, "--save_steps", 2,
             "--max_steps", 4)
    lines = train(*words, out="straight")
    save = checkpoint.save

    def save_and_die(*args, **kwargs):
        save(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_die)
        with pytest.raises(Killed):
            train(*words)
    again = train(*words, "--resume_from", "auto")
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]
    for name in ("model.safetensors", "training_state/tensors.safetensors"):
        expected, found = (load_file(tmp_path / out / "checkpoints" / "latest" / name)
                           for out in ("straight", "out"))
        assert expected.keys() == found.keys() and all(torch.equal(expected[n], found[n]) for n in found)
    assert {name.split(".")[0] for name in found} == {"exp_avg", "master"}  # models/tiny is bf16 on the disk
