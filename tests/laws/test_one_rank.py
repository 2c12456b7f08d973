"""One process without --param_offload pays for nothing that only several need: no collective, no FSDP2, no copies."""

import collections
import sys
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from helpers import EXAMPLES, FAST, TINY, write
from torch.utils._python_dispatch import TorchDispatchMode

import data
import fsdp
import sft
from disk.run import ModelPaths
from ops import optim
from ops.memory import is_split
from ranks import processes
from text.template import ChatTokenizer

CPU = torch.device("cpu")


class Casts(TorchDispatchMode):
    """Counts the elements that are copied or cast into parameters' shapes: {(dtype from, dtype to): elements}."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.elements = shapes, collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._foreach_copy_.default:
            for target, source in zip(*args[:2], strict=True):
                self.elements[source.dtype, target.dtype] += target.numel()
            return result
        copies = torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.ops.aten.clone.default
        if function in copies and tuple(result.shape) in self.shapes:
            source = args[1] if function is torch.ops.aten.copy_.default else args[0]
            self.elements[source.dtype, result.dtype] += result.numel()
        return result


@pytest.fixture(scope="module")
def dataset():
    return data.load(EXAMPLES, ChatTokenizer(TINY), 256)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_step_casts_each_trained_parameter_once(dataset, lora):
    """In bf16, over four micro-batches: the new fp32 weights are cast once, frozen ones never. Each micro-batch casts
    its gradient, which is summed in fp32."""
    cfg = sft.Config(model="tiny", dtype="bf16", use_lora=lora, lora_dropout=0.0, max_length=64, too_long="truncate")
    ranks = processes.single_process(CPU)
    model, optimizer = sft.build(cfg, ModelPaths.find(TINY), ranks)
    optimizer.publish()
    assert not hasattr(model, "unshard") and not any(map(is_split, model.parameters()))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    trained = [p for p in model.parameters() if p.requires_grad]
    n_trained = sum(p.numel() for p in trained)
    casts = Casts({tuple(p.shape) for p in model.parameters()})
    batches = list(data.micro_batches(dataset, range(4), 256, 1))
    assert len(batches) == 4
    with casts:
        loss = sft.backward(model, batches, 100, ranks)
        assert all(p.grad.dtype == torch.float32 for p in trained)
        optim.update(optimizer, loss, fsdp.grad_norm(model), lr=1e-3, grad_clip=1.0)
    bf16, fp32 = torch.bfloat16, torch.float32
    assert casts.elements.pop((fp32, bf16)) == n_trained
    assert casts.elements.pop((bf16, fp32)) <= 4 * n_trained
    assert not casts.elements, casts.elements


@pytest.mark.parametrize("flags", [
    (), ("--dtype", "bf16"), *(pytest.param(flags, marks=pytest.mark.full) for flags in (
        ("--dtype", "bf16", "--use_lora"), ("--optimizer_offload",), ("--param_offload",)))], ids=" ".join)
def test_one_process_has_no_collective(train, monkeypatch, tmp_path, flags):
    """A run with evaluation, samples and saves, in which any collective raises."""
    def refused(*args, **options):
        raise AssertionError("a collective")

    for name in ("all_reduce", "broadcast", "barrier", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor"):
        monkeypatch.setattr(dist, name, refused)
    prompts = write(tmp_path / "prompts.json", [{"prompt": "Hello", "response": "there"}])
    lines = train(*FAST, *flags, "--max_steps", 3, "--save_steps", 2, "--val_data", EXAMPLES, "--eval_steps", 2,
                  "--sample_prompts", prompts, "--max_grad_norm_factor", 5)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]


@pytest.mark.parametrize("world_size", [1, 2])
def test_nccl_is_only_for_several_processes(monkeypatch, world_size):
    """A single process on CUDA has gloo's process group, which starts nothing on the GPU."""
    started = []
    for name, value in dict(WORLD_SIZE=world_size, RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "rendezvous", lambda *args, **options: iter([(dist.HashStore(),)]))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: started.append(backend))
    mesh = Mock(**{"get_all_groups.return_value": []})
    monkeypatch.setattr(processes, "init_device_mesh", lambda *args, **options: mesh)
    monkeypatch.setattr(processes, "Watchdog", Mock())
    for name in ("wait_for_start", "agree"):
        monkeypatch.setattr(processes.Ranks, name, Mock())
    processes.start(1, 600)
    assert started == ["gloo" if world_size == 1 else "cpu:gloo,cuda:nccl"]
    assert processes.os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def test_evaluation_and_samples_leave_nothing_unsharded(train, monkeypatch, tmp_path):
    """With FSDP2 (--param_offload) a save after them meets shards only, of the root and of every block."""
    save, checked = sft.RunState.save, []

    def check(self, model, *args):
        assert all(map(is_split, model.parameters()))
        checked.append(1)
        save(self, model, *args)

    monkeypatch.setattr(sft.RunState, "save", check)
    prompts = write(tmp_path / "prompts.json", [{"prompt": "Hello", "response": "there"}])
    train(*FAST, "--param_offload", "--dtype", "bf16", "--max_steps", 1, "--val_data", EXAMPLES,
          "--sample_prompts", prompts)
    assert checked and "torch.distributed.fsdp" in sys.modules
