"""Everything that knows of other processes: the mesh, sharding, offload, tensor parallelism, gradient norm.

Ranks are laid out as (dp, tp): ranks of one tp group read the same conversations and hold slices of each matrix,
ranks along dp read different ones and shard parameters, gradients and moments with FSDP2. It knows Hugging Face's
module names and nothing else of the model; the model does not know it.
"""

import datetime
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)


# What ends a run early, and the exit code then: Ctrl-C, Slurm's warning before a requeue, a shutdown.
STOPS = {signal.SIGINT: 130, signal.SIGUSR1: 0, signal.SIGTERM: 143}


@dataclass
class Ranks:
    """Where this process stands. dp_rank indexes data; mesh has the axes dp and tp.

    Used as `with start(...) as ranks`: a failure inside is reported with its rank and phase, and a signal of STOPS
    ends the run in good order. Before the first call of stopped() there is nothing to save: it ends at once.
    """

    rank: int
    size: int
    dp_rank: int
    dp_size: int
    mesh: DeviceMesh
    device: torch.device
    store: dist.Store
    phase: str = "start"
    noted: int = 0  # the signal that this rank has been sent
    stop: int = 0  # the one that all ranks know of
    is_polled: bool = False
    handlers: dict = field(default_factory=dict)  # those that were there before

    def at(self, phase):
        """Note what this rank is doing, for the others to see should it not come back."""
        self.phase = phase
        self.store.set(f"rank {self.rank}", f"{phase}|{time.time()}|{socket.gethostname()}|{os.getpid()}")

    def sum(self, tensor):
        """Sum a tensor over the data-parallel ranks, in place: one all-reduce."""
        if self.dp_size > 1:
            dist.all_reduce(tensor, group=self.mesh["dp"].get_group())
        return tensor

    def agree(self, number):
        """Rank 0's whole number, on every rank."""
        number = torch.tensor(number, device=self.device)
        dist.broadcast(number, 0)
        return int(number)

    def note(self, number, _):
        """The handler of STOPS. It writes without a buffer, for it may have come in the middle of a print."""
        if number == self.noted == signal.SIGINT:
            os.write(2, b"\nstopped at once: what came after the last checkpoint is lost\n")
            os._exit(STOPS[number])
        if self.rank == 0 and not self.noted:
            what = "the step in hand ends and is saved" if self.is_polled else "stopped before the first step"
            again = "; Ctrl-C again stops at once" if self.is_polled and number == signal.SIGINT else ""
            os.write(2, f"\n{signal.Signals(number).name}: {what}{again}\n".encode())
        self.noted = max(self.noted, number)
        if not self.is_polled:
            sys.exit(STOPS[self.noted])

    def stopped(self):
        """The signal that any rank has been sent, or 0. Every rank calls it and gets the same: none leaves alone."""
        self.is_polled = True
        number = torch.tensor(self.noted)  # of gloo, on the CPU: the device is not waited for
        if self.size > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)
        self.stop = int(number)
        return self.stop

    def __enter__(self):
        self.at("start")
        self.handlers = {number: signal.signal(number, self.note) for number in STOPS}
        return self

    def __exit__(self, kind, error, _):
        """Say which rank failed, where, and why; torchrun then ends the others. Where a collective failed, another
        rank is the cause: the one that noted its phase longest ago, or, where a lock was waited for, the one whose pid
        the error has. It is killed, for it may be stopped. One that a signal has ended is nobody's fault: all end."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if kind is SystemExit and self.noted:
            self.store.set("stopped", str(self.noted))
            return
        if error is not None and self.size > 1 and self.store.check(["stopped"]):
            sys.exit(STOPS[int(self.store.get("stopped"))])
        if error is None:  # none hangs up while another is still in the last collective, rank 0 (the store) last of all
            self.phase = "end"  # others read what this rank noted last: since then it is waited for
            try:
                for word in ("done", "left"):
                    self.store.set(f"{word} {self.rank}", "")
                    if word == "done" or self.rank == 0:
                        self.store.wait([f"{word} {rank}" for rank in range(self.size)])
            except dist.DistStoreError as stalled:
                kind, error = type(stalled), stalled
        if error is None or self.size == 1:
            return dist.destroy_process_group()
        noted = {}
        if issubclass(kind, (RuntimeError, TimeoutError)) and self.store.check([f"rank {r}" for r in range(self.size)]):
            noted = {r: self.store.get(f"rank {r}").decode().split("|") for r in range(self.size) if r != self.rank}
        if awaited := getattr(error, "pid", None):
            noted = {r: note for r, note in noted.items() if note[2:] == [socket.gethostname(), awaited]}
        if not noted:
            print(f"sft.py: rank {self.rank} failed in {self.phase}: {kind.__name__}: {error}", file=sys.stderr)
        else:
            rank, (phase, since, host, pid) = min(noted.items(), key=lambda item: float(item[1][1]))
            if host == socket.gethostname() and (awaited or "imed out" in str(error) or "timeout" in str(error)):
                os.kill(int(pid), signal.SIGKILL)
            raise RuntimeError(  # what torchrun then repeats, should it take this rank for the first to fail
                f"rank {self.rank} waited in {self.phase} for rank {rank}, which is gone, or stalled in {phase} since "
                f"{time.time() - float(since):.0f} s: {str(error).splitlines()[0]}") from error


def start(tp, timeout):
    """Join the process group that torchrun describes (one process alone makes its own) and lay out the mesh.

    tp       ranks that share each matrix;  timeout  seconds after which a rank that the others wait for is given up

    Raises ValueError when tp does not divide the number of processes.
    """
    rank, size, local = (int(os.environ.get(name, default)) for name, default in (
        ("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
    if size % tp:
        fit = [n for n in range(1, size + 1) if size % n == 0]
        raise ValueError(f"--tp {tp} does not divide the {size} processes; these do: {fit}")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # Offloaded gradients are CPU tensors, so their collectives need gloo beside nccl.
    store = next(dist.rendezvous("env://", rank, size))[0] if "WORLD_SIZE" in os.environ else dist.HashStore()
    store.set_timeout(datetime.timedelta(seconds=timeout))  # its own is 30 minutes, which __exit__ would wait
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=size,
                                timeout=datetime.timedelta(seconds=timeout))
    mesh = init_device_mesh(device.type, (size // tp, tp), mesh_dim_names=("dp", "tp"))
    return Ranks(rank, size, rank // tp, size // tp, mesh, device, store)


def replicated(others=0):
    """The whole input on each tp rank: one all-reduce in backward for all projections that read it, not one each.
    `others` counts the further positional inputs of the module, which stay as they are."""
    layouts = (Replicate(), *[None] * others)
    return PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts)


BLOCK_PLAN = {
    "self_attn": replicated(others=4), "mlp": replicated(),
    "self_attn.q_proj": ColwiseParallel(), "self_attn.k_proj": ColwiseParallel(),
    "self_attn.v_proj": ColwiseParallel(), "self_attn.o_proj": RowwiseParallel(),
    # each rank normalises its own heads (axis 1 of N, H, D) with the same weight, whose gradient is then summed
    "self_attn.q_norm": SequenceParallel(sequence_dim=1, use_local_output=True),
    "self_attn.k_norm": SequenceParallel(sequence_dim=1, use_local_output=True),
    "mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel(),
}


def shard(model, ranks, bf16, param_offload):
    """Split each block over tp (Megatron-style: two all-reduces a block and direction), then over dp with FSDP2.

    Changes the model, which is on meta, in place. tp comes first: FSDP2 then shards the slices it finds.

    Raises ValueError when tp does not divide what it splits.
    """
    tp = ranks.mesh["tp"]
    if tp.size() > 1:
        config = model.config
        parts = (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size, config.vocab_size)
        if any(n % tp.size() for n in parts):
            fit = [n for n in range(1, config.num_key_value_heads + 1) if not any(part % n for part in parts)]
            raise ValueError(f"--tp {tp.size()} must divide the attention heads, key/value heads, intermediate_size "
                             f"and vocab_size, here {parts}; these do: {fit}")
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        for block in model.model.layers:
            plan = {name: style for name, style in BLOCK_PLAN.items() if "norm" not in name or config.qk_norm}
            for name, module in block.named_modules():
                if hasattr(module, "lora_A"):
                    split_adapted(module, isinstance(plan.pop(name), ColwiseParallel), tp)
            parallelize_module(block, tp, plan)
        parallelize_module(model.model, tp, {"embed_tokens": RowwiseParallel(input_layouts=Replicate())})
        if config.tie_word_embeddings:
            model.tie_weights()
        else:
            head = model.lm_head.weight
            model.lm_head.weight = nn.Parameter(distribute_tensor(head, tp, [Shard(0)]), head.requires_grad)
        for name in frozen:  # a plan's styles make new parameters, some of which would be trained (torch 2.13)
            model.get_parameter(name).requires_grad_(False)
        split_vocabulary(model, tp)
    if ranks.size == 1 and not bf16 and not param_offload:
        return  # FSDP2 would only copy: nothing to shard, cast or move
    bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if bf16 else None
    settings = dict(mesh=ranks.mesh["dp"], mp_policy=bf16 or MixedPrecisionPolicy(cast_forward_inputs=False),
                    offload_policy=CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda") if param_offload
                    else OffloadPolicy())
    for block in model.model.layers:
        fully_shard(block, **settings)
    fully_shard(model, **settings)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # summed, not averaged: the loss is divided by the step's targets already
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum (torch 2.13)


def split_adapted(module, by_rows, tp):
    """Split a linear layer and its adapter over tp: by rows of the weight (column parallel, in Megatron's words; B is
    split with it) or by its columns (row parallel; A is). Nothing is communicated beyond what the layer does without
    an adapter: the base's and the adapter's part of the output are summed in one all-reduce. The small matrix that
    is not split gets a part of its gradient on each rank, and FSDP2 sums those once a step."""
    split = Shard(0) if by_rows else Shard(1)
    places = {"weight": split, "bias": split if by_rows else Replicate(), "lora_A.weight": Replicate() if by_rows
              else split, "lora_B.weight": split if by_rows else Replicate(),
              "lora_magnitude_vector": split if by_rows else Replicate()}
    for name, p in list(module.named_parameters()):
        part = nn.Parameter(distribute_tensor(p, tp, [places[name]]), requires_grad=p.requires_grad)
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, part)
    compute = module.compute

    def compute_part(x, weight, bias, *adapter):
        parts = [p if p is None else p.to_local(grad_placements=[
            Partial() if p.placements[0].is_replicate() else p.placements[0]]) for p in (weight, bias, *adapter)]
        if by_rows:
            return compute(x.to_local(grad_placements=[Partial()]), *parts)
        if tp.get_local_rank():
            parts[1] = None  # added once
        y = DTensor.from_local(compute(x, *parts), tp, [Partial()], run_check=False)
        return y.redistribute(placements=[Replicate()]).to_local()

    def combine(squares):
        dist.all_reduce(squares, group=tp.get_group())
        return squares

    module.compute = compute_part
    if not by_rows:
        module.combine = combine


def split_vocabulary(model, tp):
    """Let the loss work on this rank's rows of the head: no rank ever holds a chunk's whole logits. What the head
    itself gives, when a text is generated, is the whole logits of one token, gathered."""
    ops, group, whole = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}, tp.get_group(), model.loss
    first = tp.get_local_rank() * (model.config.vocab_size // tp.size())

    def combine(tensor, how):
        dist.all_reduce(tensor, ops[how], group)

    def logits(hidden):
        part = nn.functional.linear(hidden, model.lm_head.weight.to_local()).contiguous()
        parts = [torch.empty_like(part) for _ in range(tp.size())]
        dist.all_gather(parts, part, group=group)
        return torch.cat(parts, dim=-1)

    model.lm_head.forward = logits
    model.loss = lambda hidden, weight, targets, each: whole(hidden, weight.to_local(), targets, first=first,
                                                             combine=combine, each=each)


def reduce_gradients(model, now):
    """Whether the next backward reduces gradients over dp: once a step, with its last micro-batch."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)


def reshard(model):
    """Split the root's parameters again, which FSDP2 leaves whole after a forward pass that no backward follows."""
    if isinstance(model, FSDPModule):
        model.reshard()


def clip_grad_norm(parameters, max_norm):
    """Norm of the whole gradient before clipping, which happens once, in place; () on the gradients' device.

    torch.nn.utils.clip_grad_norm_ refuses gradients of several meshes (torch 2.13): a matrix's is on (dp, tp), a
    norm's on (dp). Grouped by mesh, each gives its part.
    """
    groups = {}
    for p in parameters:
        groups.setdefault(p.grad.device_mesh if isinstance(p.grad, DTensor) else None, []).append(p)
    norms = [torch.nn.utils.get_total_norm([p.grad for p in group]) for group in groups.values()]
    norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
    for group in groups.values():
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm


def local(tensor):
    """This rank's part of a tensor that may be split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def largest(values, ranks):
    """Each element's largest value of all ranks, as floats."""
    values = values.to(ranks.device, torch.float32)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


class HostAdamW(torch.optim.AdamW):
    """AdamW whose moments and fp32 master weights lie in host memory; parameters and gradients stay on the device.

    Saves 12 bytes a parameter of device memory; costs a copy of the gradients down and of the weights up, each step.
    host maps each parameter to its master.
    """

    def __init__(self, groups, **settings):
        self.host = {p: torch.nn.Parameter(p.detach().to("cpu", torch.float32, copy=True))
                     for group in groups for p in group["params"]}
        super().__init__([{**group, "params": [self.host[p] for p in group["params"]]} for group in groups], **settings)

    @torch.no_grad()
    def step(self):
        for p, master in self.host.items():
            master.grad = p.grad.to("cpu", torch.float32)
        super().step()
        super().zero_grad()
        self.publish()

    @torch.no_grad()
    def publish(self):
        """Copy the masters into the parameters."""
        for p, master in self.host.items():
            p.copy_(master)

    def zero_grad(self):
        for p in self.host:
            p.grad = None
