"""Where the parameters lie, what a step does with them and the memory it takes: FSDP2, offload, norm, AdamW, heap.

FSDP2 shards parameters, gradients and moments over the ranks that read different conversations (dp); what tp.py has
split is split once more.
"""

import torch
import torch.distributed as dist

from ops.memory import is_split, local


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


def largest(values, ranks):
    """Each element's largest value of all ranks, as floats."""
    values = values.to(ranks.device, torch.float32)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()
