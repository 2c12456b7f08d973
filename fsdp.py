"""FSDP2: parameters, gradients and optimizer state sharded over the ranks that read different conversations
(dp), offload to host memory, the reduction of gradients and their norm.

What ranks/tp.py has split is sharded once more.
"""

import torch
import torch.distributed as dist

from ops.memory import is_split, local


def shard(model, ranks, *, bf16, param_offload):
    """Shard the model, which is on meta, over dp: in place, each block and the root.

    bf16           gather and compute in bf16, from fp32 parameters
    param_offload  keep parameters and gradients in host memory
    """
    if ranks.world_size == 1 and not bf16 and not param_offload:
        return  # there is nothing to shard, cast or move: FSDP2 would only copy
    from torch.distributed.fsdp import (  # half a second, which other runs save
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    precision = MixedPrecisionPolicy(cast_forward_inputs=False)
    if bf16:
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    offload = OffloadPolicy()
    if param_offload:
        offload = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda")
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=ranks.mesh["dp"], mp_policy=precision, offload_policy=offload)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Summed, not averaged: the loss is divided by the targets of the step already.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum (torch 2.13)


def set_gradient_sync(model, enabled):
    """Whether the next backward reduces gradients over dp: once a step, with its last micro-batch."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(enabled)


def reshard(model):
    """Shard the root's parameters again, which FSDP2 leaves gathered after a forward without a backward."""
    if hasattr(model, "reshard"):
        model.reshard()


def grad_norm(model):
    """Norm of the whole gradient of what is trained, (), on its device.

    torch.nn.utils.clip_grad_norm_ refuses gradients of several meshes (torch 2.13): a matrix's is on
    (dp, tp), a norm's on (dp). So gradients that are split alike form a group, which gives a sum of squares.
    """
    groups = {}  # (mesh, axes that split the gradient) -> this rank's parts
    for p in (p for p in model.parameters() if p.requires_grad):
        key = (None,)
        if is_split(p.grad):
            axes = [i for i, place in enumerate(p.grad.placements) if not place.is_replicate()]
            key = (p.grad.device_mesh if axes else None, *axes)
        part = local(p.grad)
        if part.device.type == "cpu" and part.ndim > 1:
            # By rows first: a whole matrix in one fp32 sum is slower, and 6e-4 off at 16 M elements.
            part = torch.linalg.vector_norm(part, dim=-1)
        groups.setdefault(key, []).append(part)
    squares = []
    for (mesh, *axes), parts in groups.items():
        square = torch.nn.utils.get_total_norm(parts).square()
        for axis in axes:
            dist.all_reduce(square, group=mesh.get_group(axis))
        squares.append(square)
    return torch.stack(squares).sum().sqrt()


def all_reduce_max(values, ranks):
    """Each element's largest value over all ranks, as floats."""
    values = values.to(ranks.device, torch.float32)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()
