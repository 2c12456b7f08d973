"""Law 11: a step makes no data-dependent device sync. The host queues work and never waits for the device.

Without a GPU: device meta has shapes but no values, so .item() and nonzero() raise there. A step that runs on meta
waits for no value.
"""

import threading

import numpy as np
import pytest
import torch
from helpers import EXAMPLES, FAST, TINY
from torch.utils._python_dispatch import TorchDispatchMode

import data
import fsdp
import sft
from disk.run import ModelPaths
from ops import nf4, optim, overlap
from ranks import processes
from screen import samples
from text.template import ChatTokenizer

META = torch.device("meta")
tokenizer = ChatTokenizer(TINY)


class Copies(TorchDispatchMode):
    """Records the copies from the host to another device: [whether the host goes on without waiting, ...]."""

    def __init__(self):
        super().__init__()
        self.non_blocking = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_copy = function is torch.ops.aten._to_copy.default
        if is_copy and args[0].device.type == "cpu" and kwargs.get("device", META).type == "meta":
            self.non_blocking.append(bool(kwargs.get("non_blocking")))
        return function(*args, **kwargs)


@pytest.fixture(scope="module")
def dataset():
    return data.load(EXAMPLES, tokenizer, 256)


def one_step(dataset, **settings):
    """A step of several micro-batches on meta, as train() computes it; returns the copies and the micro-batches."""
    nf4.pairs(META)  # a table that is copied to a device once per process
    cfg = sft.Config(model="tiny", batch_size=16, max_length=256, max_grad_norm_factor=2.0, **settings)
    ranks = processes.single_process(META)
    model, _ = sft.build(cfg, ModelPaths.find(TINY), ranks)
    groups = optim.parameter_groups(model, cfg.weight_decay)
    optimizer = optim.build(optim.AdamW, groups, lr=cfg.lr, betas=(0.9, 0.95), eps=1e-8)
    meter, losses = optim.ChangeMeter(optimizer), samples.ConversationLosses(dataset, ranks)
    ids = np.arange(16)
    with Copies() as copies:
        batches = list(sft.micro_batches(dataset, ids, cfg, ranks))
        loss = sft.backward(model, batches, 1000, ranks, losses.restart(ids))
        norm = fsdp.grad_norm(model)
        meter.start(1)
        sums = losses.all_reduce(loss)
        optim.update(optimizer, sums["loss"], norm, lr=cfg.lr, grad_clip=cfg.grad_clip, norm_limit=3.0)
        overlap.Figures(META).queue(**sums, grad_norm=norm, changed=meter.changed())
    assert all(p.grad is None for p in model.parameters())
    return copies, batches


@pytest.mark.parametrize("settings", [
    dict(dtype="bf16"), dict(dtype="fp32"), dict(dtype="bf16", gradient_checkpointing=False),
    dict(dtype="bf16", use_lora=True), dict(dtype="bf16", use_lora=True, lora_dora=True, lora_dropout=0.1),
    dict(dtype="bf16", use_lora=True, quantize="nf4")], ids=lambda s: " ".join(f"{k}={v}" for k, v in s.items()))
def test_a_step_runs_on_meta(dataset, settings):
    """Forward, backward, norm, clipping, update, and what is measured. One copy to the device per micro-batch, and one
    with the step's conversations. The host waits for none of them."""
    copies, batches = one_step(dataset, **settings)
    assert len(batches) > 2
    assert copies.non_blocking == [True] * (1 + len(batches))


def test_a_sync_is_seen(dataset, monkeypatch):
    """The test above is not trivial: a host that asks whether the norm is finite raises on meta."""
    norm = fsdp.grad_norm
    monkeypatch.setattr(fsdp, "grad_norm", lambda model: norm(model) if norm(model).isfinite() else None)
    with pytest.raises(RuntimeError, match="meta"):
        one_step(dataset, dtype="bf16")


@pytest.mark.parametrize("build", [torch.float32, torch.bfloat16], ids=["weights", "masters"])
def test_a_skipped_update_changes_no_bit(build):
    """Not finite, or above the limit: weights, moments and the number of updates stay. Then a valid step counts one."""
    parameters = [torch.nn.Parameter(torch.randn(8, 5).to(build)), torch.nn.Parameter(torch.randn(5).to(build))]
    groups = [dict(params=parameters, weight_decay=0.1, lr_ratio=1.0)]
    optimizer = optim.build(optim.AdamW, groups, lr=0.1, betas=(0.9, 0.95), eps=1e-8)

    def step(loss=1.0, factor=1.0, limit=1e9):
        for i, p in enumerate(parameters):
            p.grad = torch.full(p.shape, factor * (i + 1))
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        optim.update(optimizer, torch.tensor(loss), norm, lr=0.1, grad_clip=1.0, norm_limit=limit)
        state = [t for p in parameters for t in optimizer.state_of(optimizer.master(p)).values()]
        tensors = [*parameters, *map(optimizer.master, parameters), *state]
        return [t.detach().clone() for t in tensors], optimizer.updates

    before, n = step()
    assert n == 1
    inf, nan = float("inf"), float("nan")
    for bad in (dict(loss=nan), dict(loss=-inf), dict(factor=nan), dict(factor=inf), dict(limit=0.5)):
        after, n = step(**bad)
        assert n == 1 and all(map(torch.equal, before, after)), bad
    after, n = step()
    assert n == 2 and not any(map(torch.equal, before, after))


# ---- host and device at work at the same time ---------------------------------------------------------------------


def test_the_next_item_is_made_meanwhile():
    """While the consumer has item i, a thread makes item i + 1; never more, and in order."""
    made = [threading.Event() for _ in range(5)]

    def items():
        for i, event in enumerate(made):
            event.set()
            yield i

    for i in overlap.ahead(items(), torch.device("cpu")):
        if i < 4:
            assert made[i + 1].wait(30)
        assert i >= 3 or not made[i + 2].is_set()
    assert i == 4


def test_a_wait_for_data_counts_as_time_of_the_step(train, monkeypatch):
    """Each step begins before the loop asks for its data."""
    events, start, ahead = [], overlap.Figures.__init__, overlap.ahead

    def begun(self, device):
        events.append("begin")
        start(self, device)

    def asked(items, device):
        for item in ahead(items, device):
            events.append("data")
            yield item

    monkeypatch.setattr(overlap.Figures, "__init__", begun)
    monkeypatch.setattr(overlap, "ahead", asked)
    train(*FAST, "--max_steps", 3)
    assert events == ["begin", "data"] * 3 + ["begin"]  # the last one asks in vain


def test_numbers_on_a_gpu_reach_the_optimizer_of_the_host():
    """--param_offload: weights in host memory, scale and skip on the GPU. torch's kernel would copy them without waiting
    and might read them before they are there; the optimizer waits."""
    class OnGPU:
        def __init__(self, number):
            self.number = number

        def cpu(self):
            return torch.tensor(self.number)

    weights = []
    for scale, skip in ((2.0, 0.0), (1.0, 0.0), (1.0, 1.0)):
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.tensor([1.0, 2.0, 3.0])
        optimizer = optim.AdamW([dict(params=[p], weight_decay=0.0)], lr=0.1, betas=(0.9, 0.95), eps=1.0)
        optimizer.step(OnGPU(scale), OnGPU(skip))
        weights.append(p.detach().clone())
    assert torch.equal(weights[2], torch.ones(3)) and (weights[1] < weights[0]).all() and (weights[0] < 1).all()


def test_an_error_in_the_thread_is_raised_by_the_loop():
    def items():
        yield 1
        raise KeyError("planted")

    seen = []
    with pytest.raises(KeyError, match="planted"):
        for item in overlap.ahead(items(), torch.device("cpu")):
            seen.append(item)
    assert seen == [1]


def test_when_the_numbers_of_a_step_are_read(train, monkeypatch):
    """After the next backward and before its update; at once in the first step and before an evaluation, a save, the end."""
    events = []

    def recording(owner, name, label):
        function = getattr(owner, name)

        def recorded(*args, **options):
            events.append(label)
            return function(*args, **options)

        monkeypatch.setattr(owner, name, recorded)

    recording(sft, "backward", "backward")
    recording(optim, "update", "update")
    recording(overlap.Figures, "read", "read")
    recording(sft, "evaluate", "evaluate")
    recording(sft.RunState, "save", "save")
    train(*FAST, "--max_steps", 6, "--save_steps", 5, "--val_data", EXAMPLES, "--eval_steps", 3)
    first, later = ["backward", "update"], ["backward", "read", "update"]  # nothing is unread, or the step before is
    assert events == ["evaluate", *first, "read", *first, *later, "read", "evaluate",  # steps 0, 1, 2, 3
                      *first, *later, "read", "save", *first, "read", "evaluate", "save"]  # 4, 5, 6


def test_numbers_of_the_host_and_the_device_are_read_together():
    """With --optimizer_offload the fraction of changed weights is computed on the host."""
    figures = overlap.Figures(META)
    figures.queue(loss=torch.zeros((), device=META), changed=torch.zeros(()))
    assert list(figures.shapes) == ["loss", "changed"] and figures.numbers.device == META


class FakeEvent:
    """torch.cuda.Event: counts what was queued before it."""

    log = []

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.log.append("record")

    def synchronize(self):
        self.log.append("synchronize")

    def elapsed_time(self, end):
        return 1500.0


def test_numbers_on_cuda_wait_for_their_own_event(monkeypatch):
    """begin; copy to pinned memory without waiting; end. read() waits for the end alone and reads milliseconds."""
    empty, pinned = torch.empty, []

    def unpinned(*args, pin_memory=False, **options):
        pinned.append(pin_memory)
        return empty(*args, **options)

    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    figures = overlap.Figures(torch.device("cuda"))
    figures.device = torch.device("cpu")  # nothing can be moved to CUDA here
    figures.queue(a=torch.tensor(2.5), b=None, c=torch.tensor(0.1, dtype=torch.float64))
    assert FakeEvent.log == ["record", "record"] and pinned == [True]
    assert figures.read() == ({"a": 2.5, "c": 0.1}, 1.5)
    assert FakeEvent.log == ["record", "record", "synchronize"]
