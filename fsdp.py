"""FSDP2: shard parameters, gradients and optimizer state over the data-parallel ranks (dp).

Also replicas (HSDP), offload to host memory, gradient reduction and the gradient norm. Parameters that
ranks/tp.py has split are sharded again, over dp.
"""

import contextlib
import warnings

import torch
import torch.distributed as dist

from ops.memory import is_split, local


def is_used(ranks, param_offload):
    """Whether FSDP2 is used. On one rank it would only add copies, unless it moves parameters to the host."""
    return ranks.world_size > 1 or param_offload


def shard(model, ranks, *, bf16, param_offload, gradient_reduction="step"):
    """Apply fully_shard to each block and to the model, in place. The model is on meta.

    bf16                all-gather and compute in bf16, from fp32 parameters
    param_offload       keep parameters and gradients in host memory
    gradient_reduction  "step" or "micro_batch", see set_gradient_sync

    Groups, whose parameters are gathered together: each block; and with a tied head the rest, from the start
    of forward to the end of backward. Otherwise the embedding, for its forward only, and norm and head, from
    the norm's forward to its backward. The last block stays gathered, as backward begins with it. So the
    gathers of a micro-batch, with L blocks, are 2 L if the head is tied, otherwise 2 L + 1.
    """
    if not is_used(ranks, param_offload):
        return
    from torch.distributed.fsdp import (  # takes half a second, so only where it is used
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
    has_replicas = ranks.mesh["replicas"].size() > 1
    mesh = ranks.mesh["replicas", "shards"] if has_replicas else ranks.mesh["shards"]
    options = dict(mesh=mesh, mp_policy=precision, offload_policy=offload)
    decoder, head = model.model, model.lm_head
    *blocks, last_block = decoder.layers
    for block in blocks:
        fully_shard(block, **options)
    fully_shard(last_block, reshard_after_forward=False, **options)
    if head.weight is not decoder.embed_tokens.weight:
        fully_shard(decoder.embed_tokens, **options)
        decoder.embed_tokens.set_unshard_in_backward(False)  # its gradient needs the tokens only
        # With tp its output is a view. Nothing changes it in place, and FSDP2's hook on it has nothing to do.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .FSDPEmbedding")
        fully_shard([decoder.norm, head], reshard_after_forward=False, **options)
    fully_shard(model, **options)
    model.gradient_reduction = gradient_reduction
    for module in model.modules():
        if isinstance(module, FSDPModule) and mesh.size() > 1:  # a factor would cost one rank a copy
            # Sum the gradients, as backward() already divides the loss by the target tokens of the step.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum (torch 2.13)


def set_gradient_sync(model, is_last):
    """Set which gradients the next backward reduces. Call it before each micro-batch.

    is_last  whether it is the last micro-batch of its step

    "step": only the last micro-batch reduces gradients; until then each rank holds its own sum, unsharded.
    "micro_batch": each one reduces them over `shards`, so that a rank holds its shard; only the last one
    reduces them over `replicas`.
    """
    if not hasattr(model, "set_requires_gradient_sync"):
        return
    is_often = model.gradient_reduction == "micro_batch"
    model.set_requires_gradient_sync(is_last or is_often)
    model.set_requires_all_reduce(is_last)
    for p in model.parameters() if is_often else ():
        # --optimizer_offload: FSDP2 would sum the micro-batches in bf16, the dtype of the parameters
        if p.grad is not None and p.grad.dtype == torch.bfloat16:
            p.grad_dtype = None  # any
            p.grad = p.grad.to(torch.float32)


@contextlib.contextmanager
def evaluation(model):
    """Without dropout. At the end all is resharded: FSDP2 leaves some groups unsharded without a backward."""
    model.eval()
    yield
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    model.train()


def grad_norm(model):
    """Global norm of all gradients, a scalar tensor on their device.

    torch.nn.utils.clip_grad_norm_ refuses gradients on several meshes (torch 2.13): with tp, a matrix's
    gradient is on (shards, tp), an RMSNorm's on (shards). So the gradients are grouped by mesh and sharding;
    the squares of each group are summed locally, then over the ranks that hold its other shards.
    """
    groups = {}  # (mesh, mesh axes that shard the gradient) -> local shards
    for p in model.parameters():
        if not p.requires_grad:
            continue
        key = (None,)
        if is_split(p.grad):
            axes = [i for i, place in enumerate(p.grad.placements) if not place.is_replicate()]
            key = (p.grad.device_mesh if axes else None, *axes)
        grad = local(p.grad)
        if grad.device.type == "cpu" and grad.ndim > 1:
            # Row norms first: one fp32 sum over a 16 M-element matrix is slower and has an error of 6e-4.
            grad = torch.linalg.vector_norm(grad, dim=-1)
        groups.setdefault(key, []).append(grad)
    squares = []
    for (mesh, *axes), grads in groups.items():
        square = torch.nn.utils.get_total_norm(grads).square()
        for axis in axes:
            if mesh.size(axis) > 1:
                dist.all_reduce(square, group=mesh.get_group(axis))
        squares.append(square)
    return torch.stack(squares).sum().sqrt()
