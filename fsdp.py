"""Where the parameters lie, what a step does with them and the memory it takes: FSDP2, offload, norm, AdamW, heap.

FSDP2 shards parameters, gradients and moments over the ranks that read different conversations (dp); what tp.py has
split is split once more.
"""

import ctypes
import os
import resource

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw


def shard(model, ranks, bf16, param_offload):
    """Shard the model, which is on meta, over dp with FSDP2: in place, each block and the root.

    bf16  gather and compute in it, from fp32 parameters;  param_offload  keep parameters and gradients in host memory
    """
    if ranks.size == 1 and not bf16 and not param_offload:
        return  # FSDP2 would only copy: nothing to shard, cast or move
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

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


def reduce_gradients(model, now):
    """Whether the next backward reduces gradients over dp: once a step, with its last micro-batch."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(now)


def reshard(model):
    """Split the root's parameters again, which FSDP2 leaves whole after a forward pass that no backward follows."""
    if hasattr(model, "reshard"):
        model.reshard()


def grad_norm(parameters):
    """Norm of the whole gradient, (), on its device.

    torch.nn.utils.clip_grad_norm_ refuses gradients of several meshes (torch 2.13): a matrix's is on (dp, tp), a
    norm's on (dp). So each group of gradients that are split alike gives its sum of squares.
    """
    groups = {}
    for p in parameters:
        axes = [i for i, place in enumerate(p.grad.placements) if not place.is_replicate()] if is_split(p.grad) else []
        part = local(p.grad)
        if part.device.type == "cpu" and part.ndim > 1:
            # by rows first: a matrix's norm adds up in one fp32 number, 6e-4 off at 16 M elements, and is slower
            part = torch.linalg.vector_norm(part, dim=-1)
        groups.setdefault((p.grad.device_mesh if axes else None, *axes), []).append(part)
    squares = [torch.nn.utils.get_total_norm(parts).square() for parts in groups.values()]
    for square, (mesh, *axes) in zip(squares, groups):
        for axis in axes:
            dist.all_reduce(square, group=mesh.get_group(axis))
    return torch.stack(squares).sum().sqrt()


def is_split(tensor):
    """Whether it is a DTensor, told without its class, whose import takes half a second."""
    return hasattr(tensor, "device_mesh")


def local(tensor):
    """This rank's part of a tensor that may be split."""
    return tensor.to_local() if is_split(tensor) else tensor


def largest(values, ranks):
    """Each element's largest value of all ranks, as floats."""
    values = values.to(ranks.device, torch.float32)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


def settle_heap(keeps):
    """Tell glibc what becomes of the memory of freed tensors, on the CPU. By default it gives some of them back to the
    system and keeps others of up to 32 MiB in its heap, where small tensors settle in the holes.

    keeps  all of it: a step's large gradients and logits find last step's memory, which the system would have to clear
           anew. A quarter faster with hidden 256, 7 % with 512, for up to 5 % more memory. Otherwise what has 16 MiB
           and more goes back: a LoRA step of 0.5B, 1 × 1,024, peaked at 3.7 GiB instead of 3.2, for a tenth less time
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have no such thing
    if mallopt and keeps:
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    elif mallopt:
        mallopt(-3, 2**24)  # M_MMAP_THRESHOLD


def peak_memory_gb(device):
    """Most memory held so far, in GiB: the allocator's on CUDA, the process's on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if os.path.exists("/proc/self/status"):  # Linux, where getrusage's begins with that of the process that started us
        with open("/proc/self/status", encoding="utf-8") as f:
            return int(next(line for line in f if line.startswith("VmHWM")).split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # macOS counts bytes


def some_weights(optimizer):
    """A copy of about 64 k elements, spread over all that this rank updates; for the share that a step changes."""
    weights = [local(p).detach().flatten() for group in optimizer.param_groups for p in group["params"]]
    stride = 1 + sum(w.numel() for w in weights) // 2**16
    return torch.cat([w[::stride] for w in weights])


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019): torch's fused kernel on this rank's parts.

    torch.optim.AdamW is the same arithmetic, but imports torch's compiler, 0.7 s before the first step; and its
    gradients are clipped in a pass of their own over memory.

    param_groups  dicts with params, lr and weight_decay, as torch.optim's
    state         parameter -> dict(step, exp_avg, exp_avg_sq), as torch.optim's; empty before the first step
    """

    def __init__(self, groups, lr, betas, eps):
        self.param_groups, self.state = [{"lr": lr, **group} for group in groups], {}
        self.settings = dict(beta1=betas[0], beta2=betas[1], eps=eps, amsgrad=False, maximize=False, fused=True)

    @torch.no_grad()
    def step(self, grad_scale=1.0):
        """Update each parameter that has a gradient, which is divided by grad_scale first."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if p not in self.state:
                    self.state[p] = dict(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p),
                                         exp_avg_sq=torch.zeros_like(p))
            moments, variances, steps = ([local(self.state[p][key]) for p in params]
                                         for key in ("exp_avg", "exp_avg_sq", "step"))
            scale = torch.full((), grad_scale, device=params[0].device) if params and grad_scale != 1 else None
            adamw([local(p) for p in params], [local(p.grad) for p in params], moments, variances, [], steps,
                  lr=group["lr"], weight_decay=group["weight_decay"], grad_scale=scale, **self.settings)

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


class HostAdamW(AdamW):
    """AdamW whose moments and fp32 master weights lie in host memory; parameters and gradients stay on the device.

    Saves 12 bytes a parameter of device memory; costs a copy of the gradients down and of the weights up, each step.
    host maps each parameter to its master.
    """

    def __init__(self, groups, **settings):
        self.host = {p: torch.nn.Parameter(p.detach().to("cpu", torch.float32, copy=True))
                     for group in groups for p in group["params"]}
        super().__init__([{**group, "params": [self.host[p] for p in group["params"]]} for group in groups], **settings)

    @torch.no_grad()
    def step(self, grad_scale=1.0):
        for p, master in self.host.items():
            master.grad = p.grad.to("cpu", torch.float32)
        super().step(grad_scale)
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
