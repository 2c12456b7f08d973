"""Tensor parallelism in Megatron's way (Shoeybi et al. 2019), from PyTorch's DTensor: --strategy megatron --tp N.

Each block's matrices are split over the ranks of a tp group, by output rows and then by input columns, so that a block
has two all-reduces a direction; embedding, head and loss are split by words. It knows Hugging Face's module names and
nothing else of the model; the model does not know it.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from settings.errors import UserError


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


def split(model, tp):
    """Split the model, which is on meta, over the mesh `tp` of one dimension, in place. FSDP2 comes after it, and
    shards the slices that it finds.

    Raises ValueError when its size does not divide what is split.
    """
    config = model.config
    parts = (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size, config.vocab_size)
    if any(n % tp.size() for n in parts):
        fit = [n for n in range(1, config.num_key_value_heads + 1) if not any(part % n for part in parts)]
        raise UserError(f"--tp {tp.size()} must divide the attention heads, key/value heads, intermediate_size "
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
