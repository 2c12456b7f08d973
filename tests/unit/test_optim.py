"""ops/optim.py: parameter groups, AdamW, offload, and checkpoints with the complete state of any optimizer."""

import contextlib
import math
import os
import sys
import types

import pytest
import torch
import torch.distributed as dist
from checkpoint_helpers import TIED, UNTIED, adamw, loaded, published, train_step
from helpers import TINY, tensors_of
from safetensors.torch import load_file
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora
from disk import checkpoint
from ops import optim
from settings.errors import UserError
from tools import plan

SETTINGS = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8)


class Lion(optim.AdamW):
    """An optimizer with one moment."""

    def new_state(self, p):
        return {"exp_avg": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, grad_scale=None, skip=None):
        if skip is not None and skip.item():
            return
        (beta1, beta2), scale = self.betas, 1.0 if grad_scale is None else grad_scale
        for group in self.param_groups:
            for p in group["params"]:
                moment, grad = self.state_of(p)["exp_avg"], p.grad / scale
                direction = moment.lerp(grad, 1 - beta1).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                moment.lerp_(grad, 1 - beta2)
        self.updates += 1


class TwoKinds(optim.AdamW):
    """Like Muon beside AdamW: the groups with decay, of matrices, have one momentum, the others AdamW's moments."""

    def __init__(self, groups, **hyperparameters):
        super().__init__(groups, **hyperparameters)
        self.matrices = {p for group in groups if group["weight_decay"] for p in group["params"]}

    def new_state(self, p):
        return {"momentum": torch.zeros_like(p)} if p in self.matrices else super().new_state(p)

    def update_group(self, group, counts, grad_scale, skip):
        if not group["weight_decay"]:
            super().update_group(group, counts, grad_scale, skip)
            return
        for p in group["params"]:
            grad = p.grad / (1.0 if grad_scale is None else grad_scale)
            p.sub_(group["lr"] * self.state_of(p)["momentum"].mul_(0.9).add_(grad))
        counts += 1


def keys_of(kind, p):
    """The names that new_state should return for a parameter, written down independently."""
    if kind is Lion:
        return ["exp_avg"]
    return ["momentum"] if kind is TwoKinds and p.ndim > 1 else ["exp_avg", "exp_avg_sq"]


# Parameter groups


def names(model, groups):
    name_of = {p: name for name, p in model.named_parameters()}
    return [[name_of[p] for p in group["params"]] for group in groups]


def test_matrices_decay_and_vectors_do_not(tmp_path):
    """Groups have the model's order and a tied weight once; a frozen parameter is in no group."""
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


def test_lora_b_has_its_own_learning_rate(tmp_path):
    """Also, DoRA's magnitudes do not decay."""
    model, _ = loaded(published(tmp_path / "base", TIED))
    lora.inject(model, {"lora_alpha": 8, "use_dora": True}, {"model.layers.0.mlp.up_proj": 2})
    groups = optim.parameter_groups(model, 0.1, lora_plus_ratio=4.0)
    assert names(model, groups) == [[f"model.layers.0.mlp.up_proj.{last}"] for last in (
        "lora_magnitude_vector", "lora_A.weight", "lora_B.weight")]
    assert [group["weight_decay"] for group in groups] == [0.0, 0.1, 0.1]
    assert [group["lr_ratio"] for group in groups] == [1.0, 1.0, 4.0]


# The optimizer


def test_bias_correction_counts_updates():
    """With `updates` set before each update, as by a resume, three updates are bitwise those of torch.optim.AdamW."""
    p, expected = (torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)) for _ in range(2))
    optimizer = optim.AdamW([dict(params=[p], weight_decay=0.1)], **SETTINGS)
    oracle = torch.optim.AdamW([expected], weight_decay=0.1, fused=True, **SETTINGS)
    for i in range(3):
        p.grad = torch.sin(torch.arange(12.0) + i).view(3, 4)
        expected.grad = p.grad.clone()
        optimizer.updates = i
        optimizer.step()
        oracle.step()
        assert torch.equal(p, expected)
        assert optimizer.updates == i + 1


PLACES = {"plain": (torch.float32, False), "masters": (torch.bfloat16, False), "host": (torch.float32, True),
          "host_bf16": (torch.bfloat16, True)}  # name: (dtype of the model, whether the optimizer is offloaded)


def placed(directory, place, kind=optim.AdamW):
    """(a model, its optimizer), see PLACES. The masters have bits that bf16 has not."""
    dtype, offload = PLACES[place]
    model, _ = loaded(directory)
    weights = [p.detach().clone() for p in model.parameters()]
    model.to(dtype)
    optimizer = adamw(model, kind, offload)
    with torch.no_grad():
        for p, weight in zip(model.parameters(), weights, strict=True):
            optimizer.master(p).copy_(weight)
    return model, optimizer


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator) for p in model.parameters()]


def give(model, grads):
    """Make copies of fp32 tensors the gradients of a model; a step may write to them."""
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = grad.clone()


def weights_and_state(model, optimizer):
    """Copies of all that an update changes, but for the number of updates."""
    masters = [optimizer.master(p) for p in model.parameters()]
    states = [optimizer.state_of(master) for master in masters]
    return [t.detach().clone() for t in (*masters, *(t for state in states for t in state.values()))]


def all_equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", [optim.AdamW, Lion, TwoKinds])
@pytest.mark.parametrize("place", [place for place in PLACES if place != "plain"])
def test_masters_equal_an_fp32_model(tmp_path, place, kind):
    """Masters and state equal bitwise those of an fp32 model that gets the same fp32 gradients, clipped or not. The
    parameters are copies of the masters, and no gradient is left behind."""
    base = published(tmp_path / "base", UNTIED)
    (plain, oracle), (model, optimizer) = placed(base, "plain", kind), placed(base, place, kind)
    for seed, scale in enumerate((None, torch.tensor(2.5), torch.tensor(1.0))):
        for m, o in ((plain, oracle), (model, optimizer)):
            give(m, gradients(m, seed))
            o.step(scale, torch.tensor(0.0))
            o.zero_grad()
        assert all_equal(weights_and_state(model, optimizer), weights_and_state(plain, oracle))
        for p in model.parameters():
            assert torch.equal(p, optimizer.master(p).to(p.dtype))
            assert p.grad is None and optimizer.master(p).grad is None
    assert optimizer.updates == oracle.updates == 3


@pytest.mark.parametrize("place", PLACES)
def test_a_parameter_without_gradient_stays(tmp_path, place):
    """Any of them: the first, a middle one, the last, all. It keeps its state, and the others are updated as ever."""
    base = published(tmp_path / "base", TIED)
    (model, optimizer), (expected, oracle) = placed(base, place), placed(base, place)
    n = len(list(model.parameters()))
    without = {0, 4, 5, n - 1}
    for m, o in ((model, optimizer), (expected, oracle)):
        give(m, gradients(m, 0))
        o.step()
        o.zero_grad()
    before = [optimizer.master(p).detach().clone() for p in model.parameters()]
    give(expected, gradients(expected, 1))
    oracle.step()
    grads = gradients(model, 1)
    for i, p in enumerate(model.parameters()):
        p.grad = None if i in without else grads[i]
    optimizer.step()
    for i, (p, q) in enumerate(zip(model.parameters(), expected.parameters(), strict=True)):
        assert torch.equal(optimizer.master(p), before[i] if i in without else oracle.master(q))
        assert torch.equal(p, optimizer.master(p).to(p.dtype))
    optimizer.zero_grad()
    optimizer.step()


@pytest.mark.parametrize("place", PLACES)
def test_a_skipped_step_changes_nothing(tmp_path, place):
    """Neither weights nor state nor the number of updates, whatever the gradient is. Later steps are the same."""
    base = published(tmp_path / "base", TIED)
    (model, optimizer), (expected, oracle) = placed(base, place), placed(base, place)
    for seed in range(3):
        for m, o in ((model, optimizer), (expected, oracle)):
            give(m, gradients(m, seed))
            o.step(torch.tensor(2.5), torch.tensor(0.0))
            o.zero_grad()
        before, updates = weights_and_state(model, optimizer), optimizer.updates
        parameters = [p.detach().clone() for p in model.parameters()]
        give(model, [torch.full_like(grad, (1.0, math.nan, math.inf)[seed]) for grad in gradients(model, 0)])
        optimizer.step(torch.tensor(math.nan), torch.tensor(1.0))
        optimizer.zero_grad()
        assert all_equal(weights_and_state(model, optimizer), before) and optimizer.updates == updates == seed + 1
        assert all_equal(list(model.parameters()), parameters)
        assert all(p.grad is None for p in model.parameters())
    assert all_equal(weights_and_state(model, optimizer), weights_and_state(expected, oracle))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("loss, norm, limit, updated", [
    (1.0, 4.0, math.inf, True), (1.0, 4.0, 4.0, True), (1.0, 4.0, 3.9, False), (math.nan, 4.0, math.inf, False),
    (math.inf, 4.0, math.inf, False), (1.0, math.nan, math.inf, False), (1.0, math.inf, math.inf, False)])
def test_update_clips_or_skips(tmp_path, place, loss, norm, limit, updated):
    """The gradient is divided by (norm + 1e-6) / grad_clip. A step is skipped if its loss or norm is not finite, or its
    norm exceeds the limit. Each group gets its rate, and the gradients are dropped."""
    base = published(tmp_path / "base", TIED)
    (model, optimizer), (expected, oracle) = placed(base, place), placed(base, "plain")
    give(model, gradients(model, 0))
    optim.update(optimizer, torch.tensor(loss), torch.tensor(norm), lr=3e-3, grad_clip=0.5, norm_limit=limit)
    assert {group["lr"] for group in optimizer.param_groups} == {3e-3}
    assert all(p.grad is None for p in model.parameters())
    if updated:
        give(expected, gradients(expected, 0))
        optim.set_lr(oracle, 3e-3)
        oracle.step(torch.tensor((norm + 1e-6) / 0.5, dtype=torch.float64).float())
    assert all_equal(weights_and_state(model, optimizer), weights_and_state(expected, oracle))
    assert optimizer.updates == updated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_on_the_device_does_not_wait(dtype):
    """On meta, reading a number raises; only the optimizer in host memory has to read."""
    p = torch.nn.Parameter(torch.empty(3, 4, dtype=dtype, device="meta"))
    optimizer = optim.build(optim.AdamW, [dict(params=[p], weight_decay=0.1, lr_ratio=1.0)], **SETTINGS)
    p.grad = torch.empty(3, 4, device="meta")
    optim.update(optimizer, torch.empty((), device="meta"), torch.empty((), device="meta"), lr=1e-3, grad_clip=1.0)
    with pytest.raises(RuntimeError, match="meta"):
        optimizer.updates


# The optimizer in host memory


class Stream:
    """torch.cuda.Stream: runs its work as soon as it is queued, or not before somebody waits for it."""

    def __init__(self, is_eager):
        self.is_eager, self.work, self.n_done = is_eager, [], 0

    def submit(self, work):
        self.work.append(work)
        if self.is_eager:
            self.run(len(self.work))

    def run(self, count):
        """Do the first `count` pieces of work."""
        while self.n_done < count:
            self.n_done += 1
            self.work[self.n_done - 1]()

    def wait_stream(self, other):
        count = len(other.work)
        self.submit(lambda: other.run(count))

    def record_event(self):
        return Event(self, len(self.work))


class Event:
    def __init__(self, stream, count):
        self.stream, self.count = stream, count

    def synchronize(self):
        self.stream.run(self.count)


class Device(TorchFunctionMode):
    """A CUDA device with the model's tensors, whose copies run on its streams. Entered, it replaces torch.cuda.

    log  (what, number of the parameter) in the order in which it happens: "gradient queued", "gradient copied",
         "update", "weight queued", "weight copied"
    n_pinned  the number of pinned buffers
    """

    def __init__(self, monkeypatch, main_is_eager, side_is_eager):
        super().__init__()
        self.main, self.side, self.log, self.names = Stream(main_is_eager), Stream(side_is_eager), [], {}
        self.current, self.n_pinned = self.main, 0
        real = optim.CopyStream
        monkeypatch.setattr(optim, "CopyStream", lambda device: real(types.SimpleNamespace(type="cuda")))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.side)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.entered)

    @contextlib.contextmanager
    def entered(self, stream):
        self.current, before = stream, self.current
        yield
        self.current = before

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.pop("pin_memory", False):
            self.n_pinned += 1
            return torch.full(args, math.nan)  # the CPU wheel cannot pin
        if func in (torch.Tensor.item, torch.Tensor.cpu):
            self.main.run(len(self.main.work))
        if func is not torch.Tensor.copy_ or not kwargs.get("non_blocking"):
            return func(*args, **kwargs)
        target, source = args
        what = next((self.names[id(t)] for t in args if id(t) in self.names), None)

        def copy():
            with torch.no_grad():
                target.copy_(source)
            self.note(what, "copied")

        self.note(what, "queued")
        self.current.submit(copy)
        return target

    def note(self, what, verb):
        if what:
            self.log.append((f"{what[0]} {verb}", what[1]))


SCHEDULES = pytest.mark.parametrize("main_is_eager, side_is_eager", [
    (False, False), (False, True), (True, False), (True, True)])


def run_on_a_device(device, directory, kind, skips):
    """Three steps of a bf16 model whose optimizer is offloaded from `device`; return (model, optimizer).

    skips  the step that is skipped; None: `skip` and grad_scale are None, so the host does not wait for the device
    """
    with device:
        model, optimizer = placed(directory, "host_bf16", kind)
        number = {p: i for i, p in enumerate(optimizer.masters)}
        for seed in range(3):
            for p, grad in zip(model.parameters(), gradients(model, seed), strict=True):
                p.grad = torch.full_like(grad, math.nan)  # until the device has computed it
                p.grad.copy_(grad, non_blocking=True)
            kept = [(p, p.grad) for p in model.parameters()]  # so that no other tensor gets their ids
            device.names = {id(p): ("weight", number[p]) for p, _ in kept}
            device.names.update({id(grad): ("gradient", number[p]) for p, grad in kept})
            device.log.append(("step", seed))
            optimizer.step(*(() if skips is None else (torch.tensor(2.5), torch.tensor(float(seed == skips)))))
            optimizer.zero_grad()
            device.names = {}
        device.main.run(len(device.main.work))
    return model, optimizer


@SCHEDULES
@pytest.mark.parametrize("kind", [optim.AdamW, Lion])
@pytest.mark.parametrize("skips", [None, 1])
def test_streams_do_not_change_the_result(tmp_path, monkeypatch, main_is_eager, side_is_eager, kind, skips):
    """Copies as early or as late as the waits allow: weights and state are bitwise those of an fp32 model."""
    base = published(tmp_path / "base", UNTIED)
    plain, oracle = placed(base, "plain", kind)
    for seed in (seed for seed in range(3) if seed != skips):
        give(plain, gradients(plain, seed))
        oracle.step(None if skips is None else torch.tensor(2.5))
    device = Device(monkeypatch, main_is_eager, side_is_eager)
    model, optimizer = run_on_a_device(device, base, kind, skips)
    assert all(p.dtype == torch.bfloat16 and torch.equal(p, optimizer.master(p).bfloat16()) for p in model.parameters())
    assert all_equal(weights_and_state(model, optimizer), weights_and_state(plain, oracle))
    assert optimizer.updates == oracle.updates == 3 - (skips is not None)
    assert device.n_pinned == 2  # copies from and to other memory would wait


@SCHEDULES
def test_the_order_of_copies_and_updates(tmp_path, monkeypatch, main_is_eager, side_is_eager):
    """Before the host updates a parameter, its gradient has arrived and the next is queued; its weight leaves after.
    A gradient takes a buffer only when the weight has left it, also across steps. A skipped step copies nothing."""
    class Noted(optim.AdamW):
        def step(self, *numbers):
            device.log.append(("update", number[self.param_groups[0]["params"][0]]))
            super().step(*numbers)

    class Numbers(dict):
        """The number of each master, in the order of creation, which is that of the updates."""

        def __missing__(self, master):
            self[master] = len(self)
            return self[master]

    number, device = Numbers(), Device(monkeypatch, main_is_eager, side_is_eager)
    model, _ = run_on_a_device(device, published(tmp_path / "base", TIED), Noted, skips=1)
    n = len(list(model.parameters()))
    starts = [i for i, event in enumerate(device.log) if event[0] == "step"]
    steps = [device.log[start:end] for start, end in zip(starts, (*starts[1:], None))]
    # the weights of a step may be copied later than it ends
    assert [event for event in steps[1] if event[0] not in ("step", "weight copied")] == []
    device.log = steps[0] + [event for event in steps[1] if event[0] != "step"] + steps[2]
    assert len(device.log) == 2 * (1 + 5 * n)
    times = {}
    for time, (what, i) in enumerate(device.log):
        times.setdefault((what, i), []).append(time)
    for step in range(2):
        def at(what, i):
            return times[what, i][step]

        for i in range(n):
            assert at("gradient queued", i) < at("gradient copied", i) < at("update", i) < at("weight queued", i)
            if i + 1 < n:
                assert at("gradient queued", i + 1) < at("update", i) < at("update", i + 1)
            if i + 2 < n:
                assert at("weight copied", i) < at("gradient copied", i + 2)
    for i in (n - 2, n - 1):
        assert times["weight copied", i][0] < times["gradient copied", i % 2][1]


class HostBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that exist at the same time; `others` are not counted."""

    def __init__(self, others):
        super().__init__()
        self.others = {StorageWeakRef(t.untyped_storage()).cdata for t in others}
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = StorageWeakRef(tensor.untyped_storage())
                if storage.cdata not in self.others and storage not in self.sizes:
                    self.sizes[storage] = tensor.untyped_storage().nbytes()
        self.sizes = {storage: size for storage, size in self.sizes.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_host_memory(dtype):
    """Per parameter 12 bytes for master and moments, and two buffers of the largest parameter in fp32, to the byte.
    Only the counts of updates, 4 bytes for each parameter, are beside them."""
    shapes = (7, 3), (40, 16), (16,), (40, 16), (25, 9)
    parameters = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    with HostBytes(parameters) as host:
        optimizer = optim.build(optim.AdamW, [dict(params=parameters, weight_decay=0.1)], offload=True, **SETTINGS)
    for _ in range(3):
        for p in parameters:
            p.grad = torch.randn(p.shape)
        host.others |= HostBytes([p.grad for p in parameters]).others
        grads = [p.grad for p in parameters]  # as on a GPU: the device's memory is not the host's
        with host:
            optimizer.step()
        assert all(p.grad is None for p in parameters) and len(grads) == len(shapes)
    sizes = [math.prod(shape) for shape in shapes]
    assert host.peak == 12 * sum(sizes) + 2 * 4 * max(sizes) + 4 * len(sizes)


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_are_updated_in_place(mesh, dtype):
    """With FSDP2, gradients have the dtype of the parameters. The optimizer gets them as shards in a buffer in host
    memory; DTensor.from_local would move them to the device of the mesh, here to meta."""
    seen = []

    class Seen(optim.AdamW):
        def step(self, *numbers):
            grad = self.param_groups[0]["params"][0].grad
            seen.append((grad.placements, grad.device.type, grad.to_local().data_ptr()))
            super().step(*numbers)

    start, grad = torch.randn(6, 4).to(dtype), torch.randn(6, 4).to(dtype)
    p, expected = torch.nn.Parameter(distribute_tensor(start, mesh, [Shard(0)])), torch.nn.Parameter(start.float())
    optimizer = optim.build(Seen, [dict(params=[p], weight_decay=0.1)], offload=True, **SETTINGS)
    oracle = optim.AdamW([dict(params=[expected], weight_decay=0.1)], **SETTINGS)
    for _ in range(2):
        p.grad, expected.grad = distribute_tensor(grad, mesh, [Shard(0)]), grad.float()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(mesh), "device_type", "meta")
            optimizer.step(torch.tensor(2.0), torch.tensor(0.0))
        oracle.step(torch.tensor(2.0), torch.tensor(0.0))
        assert torch.equal(optimizer.master(p).to_local(), expected)
        assert torch.equal(p.to_local(), expected.to(dtype))
    assert seen == [((Shard(0),), "cpu", optimizer.buffers[0].data_ptr())] * 2


def test_plan_says_what_param_offload_moves(monkeypatch, capsys):
    """Weights to the GPU in forward and in backward of each micro-batch, but embedding, norm and last block only in
    forward; the gradient back once. Other runs move nothing that the plan would have to name."""
    def printed(*flags):
        monkeypatch.setattr(sys, "argv", ["plan.py", "--model", TINY, "--n_gpus", "1", "--batch_size", "4096",
                                          "--micro_batch_size", "2", *flags])
        plan.main()
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("PCIe")]

    sizes = {name: 4 * t.numel() for name, t in tensors_of(TINY).items()}
    last = f".layers.{max(int(name.split('.')[2]) for name in sizes if '.layers.' in name)}."
    blocks = sum(size for name, size in sizes.items() if ".layers." in name and last not in name)
    moved = 2048 * (sum(sizes.values()) + blocks) + sum(sizes.values())
    [line] = printed("--param_offload")
    assert f"{moved / 2**30:.3f} GiB  per rank and step" in line and "prefer --optimizer_offload" in line
    assert printed() == printed("--optimizer_offload") == []


# Checkpoints of any optimizer


class Run:
    """A run of a model directory with an optimizer of class `kind`."""

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
        if isinstance(self.optimizer, optim.MasterWeights):
            self.optimizer.publish()
        return self


@pytest.mark.parametrize("offload", [False, True], ids=["plain", "offload"])
@pytest.mark.parametrize("kind", [optim.AdamW, Lion, TwoKinds])
def test_resume_is_bitwise_with_any_optimizer(tmp_path, kind, offload):
    """Two steps, a checkpoint, two more steps: a resume takes the same two steps, in weights and state, also if the
    run was offloaded and the resume is not, or the reverse. The files contain exactly the tensors of new_state."""
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
        for p, q in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(p, q)
            expected = straight.optimizer.state_of(straight.optimizer.master(p))
            state = resumed.optimizer.state_of(resumed.optimizer.master(q))
            assert expected.keys() == state.keys()
            assert all(torch.equal(expected[key], state[key]) for key in state)


@pytest.mark.parametrize("then, now", [(Lion, optim.AdamW), (optim.AdamW, Lion), (TwoKinds, optim.AdamW)])
def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path, then, now):
    """The error names the tensors, and nothing is restored."""
    base = published(tmp_path / "base", TIED)
    first, second = Run(base, then, False), Run(base, now, False)
    first.train([1])
    saved = first.save(tmp_path / "out", 1)
    with pytest.raises(UserError, match="does not belong to this model and optimizer: .*exp_avg"):
        second.resume(saved)
    assert not second.optimizer.state and second.optimizer.updates == 0


def test_a_run_saved_before_its_first_update_resumes(tmp_path):
    """Its state is that of new_state, and its number of updates is 0."""
    base = published(tmp_path / "base", TIED, torch.bfloat16)
    straight = Run(base, optim.AdamW, False)
    resumed = Run(base, optim.AdamW, False).resume(straight.save(tmp_path / "out", 1))
    assert resumed.optimizer.updates == 0
    straight.train([1])
    resumed.train([1])
    assert all(torch.equal(a, b) for a, b in zip(straight.model.parameters(), resumed.model.parameters()))


@pytest.mark.parametrize("key, shape", [("master", None), ("rows", (1,))])
def test_state_that_could_not_be_restored_is_not_saved(tmp_path, key, shape):
    """A reserved name, or a tensor without its parameter's shape: an error, and no checkpoint."""
    class BadState(Lion):
        def new_state(self, p):
            return {**super().new_state(p), key: torch.zeros(shape or p.shape)}

    run = Run(published(tmp_path / "base", TIED), BadState, False)
    run.train([1])
    with pytest.raises(AssertionError, match=key):
        run.save(tmp_path / "out", 1)
    assert checkpoint.steps_in(tmp_path / "out") == []


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code catches it."""


@pytest.mark.parametrize("flags", [(), pytest.param(("--optimizer_offload",), marks=pytest.mark.full)],
                         ids=["plain", "offload"])
def test_a_killed_run_with_lion_resumes_bitwise(train, tmp_path, monkeypatch, flags):
    """Only the class that `choose` returns has to be replaced. --optimizer_offload works with Lion too."""
    monkeypatch.setattr(optim, "choose", lambda model, cfg: (Lion, optim.parameter_groups(model, cfg.weight_decay)))
    flags = (*flags, "--batch_size", 8, "--max_length", 128, "--lr", 1e-4, "--save_steps", 2,
             "--max_steps", 4)
    lines = train(*flags, out="straight")
    save = checkpoint.save

    def save_and_die(*args, **kwargs):
        save(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_die)
        with pytest.raises(Killed):
            train(*flags)
    again = train(*flags, "--resume_from", "auto")
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]
    for name in ("model.safetensors", "training_state/tensors.safetensors"):
        expected, tensors = (load_file(tmp_path / out / "checkpoints" / "latest" / name)
                             for out in ("straight", "out"))
        assert expected.keys() == tensors.keys()
        assert all(torch.equal(expected[n], tensors[n]) for n in tensors)
    assert {name.split(".")[0] for name in tensors} == {"exp_avg", "master"}  # models/tiny is bf16 on the disk
