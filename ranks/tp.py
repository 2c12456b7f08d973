"""Tensor parallelism as in Megatron (Shoeybi et al. 2019), by PyTorch's DTensor: --strategy megatron --tp N.

The matrices of each block are split over the ranks of a tp group: first by output rows, then by input
columns, so that a block has two all-reduces in each direction. Embedding, head and loss are split by the
vocabulary. Of the model, this file knows only Hugging Face's module names.

torch.distributed.tensor is imported where it is used: it takes half a second, and most runs have no tp.
"""

import torch
import torch.distributed as dist
from torch import nn

from ops.loss import Head
from settings.errors import UserError

# their weights are split by input columns; the other layers' by output rows
COLUMNS_SPLIT = ("o_proj", "down_proj")


def split(model, mesh):
    """Split the model, which is on meta, over `mesh` of one dimension, in place.

    FSDP2 comes after it and shards the slices that it finds.

    Raises UserError when the mesh's size does not divide what is split.
    """
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    config, size = model.config, mesh.size()
    divided = (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size,
               config.vocab_size)
    if any(n % size for n in divided):
        fit = [n for n in range(1, config.num_key_value_heads + 1) if not any(m % n for m in divided)]
        raise UserError(f"--tp {size} must divide the attention heads, key/value heads, intermediate_size "
                        f"and vocab_size, here {divided}; these do: {fit}")
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    for block in model.model.layers:
        styles = parallel_styles(config)
        for name, module in block.named_modules():
            if isinstance(module, ParallelAdapter):
                module.distribute(mesh)
                del styles[name]
        parallelize_module(block, mesh, styles)
    parallelize_module(model.model, mesh, {"embed_tokens": RowwiseParallel(input_layouts=Replicate())})
    model.lm_head = VocabParallelHead(model.lm_head, mesh)
    model.tie_weights()
    # parallelize_module makes new parameters, some of which would be trained (torch 2.13)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)


def parallel_styles(config):
    """Module name in a block -> how it is split.

    The inputs of attention and MLP are declared as replicated, so that backward has one all-reduce for all
    layers that read them, not one for each (five instead of two in a block).
    """
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
    )

    def replicated_input(n_other_inputs=0):
        layouts = (Replicate(), *[None] * n_other_inputs)
        return PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts)

    styles = {
        "self_attn": replicated_input(n_other_inputs=5),  # the further positional inputs stay as they are
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(),
        "mlp": replicated_input(),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }
    if config.qk_norm:
        # each rank normalises its own heads (dim 1 of N, H, D) with the same weight; its gradient is summed
        for name in ("self_attn.q_norm", "self_attn.k_norm"):
            styles[name] = SequenceParallel(sequence_dim=1, use_local_output=True)
    return styles


class VocabParallelHead(Head):
    """lm_head of which this rank holds the rows of its part of the vocabulary.

    The loss works on that part: no rank ever holds the whole logits of a chunk. forward, with which text is
    generated, gathers the whole logits.
    """

    def __init__(self, head, mesh):
        from torch.distributed.tensor import Shard, distribute_tensor

        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = head.in_features, head.out_features, None
        weight = distribute_tensor(head.weight, mesh, [Shard(0)])
        self.weight = nn.Parameter(weight, requires_grad=head.weight.requires_grad)
        self.group, self.tp_size = mesh.get_group(), mesh.size()
        self.first_id = mesh.get_local_rank() * (head.out_features // mesh.size())

    def local_weight(self):
        return self.weight.to_local()

    def all_reduce(self, tensor, op):
        dist.all_reduce(tensor, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op], self.group)

    def forward(self, hidden):
        part = nn.functional.linear(hidden, self.local_weight()).contiguous()
        parts = [torch.empty_like(part) for _ in range(self.tp_size)]
        dist.all_gather(parts, part, group=self.group)
        return torch.cat(parts, dim=-1)


class ParallelAdapter:
    """Mixin for lora.LoRALinear: this rank has a slice of the weight, and of A or of B.

    The layer computes with plain tensors, this rank's parts. An adapter adds no communication to the layer:
    the base's and the adapter's part of the output are summed in one all-reduce. The small matrix that is not
    split gets a part of its gradient on each rank, and FSDP2 sums those once a step.
    """

    split_dims = {}  # parameter name -> dimension that is split; the others are whole on each rank

    def distribute(self, mesh):
        """Replace the parameters by DTensors over the tp mesh."""
        from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

        self.mesh, self.partial = mesh, Partial()
        for name, p in list(self.named_parameters()):
            dim = self.split_dims.get(name)
            placement = Replicate() if dim is None else Shard(dim)
            part = nn.Parameter(distribute_tensor(p, mesh, [placement]), requires_grad=p.requires_grad)
            owner, _, last = name.rpartition(".")
            setattr(self.get_submodule(owner), last, part)

    def local_part(self, p):
        """This rank's part of a parameter; the gradient of one that is whole here is a part of a sum."""
        if p is None:
            return None
        placement = self.partial if p.placements[0].is_replicate() else p.placements[0]
        return p.to_local(grad_placements=[placement])

    def local_parts(self):
        return [self.local_part(p) for p in (self.weight, self.bias, self.lora_A.weight, self.lora_B.weight,
                                             self.lora_magnitude_vector)]


class ColumnParallelAdapter(ParallelAdapter):
    """Column parallel in Megatron's words: the weight is split by output rows, and B with it."""

    split_dims = {"weight": 0, "bias": 0, "lora_B.weight": 0, "lora_magnitude_vector": 0}

    def forward(self, x):
        return self.compute(x.to_local(grad_placements=[self.partial]), *self.local_parts())


class RowParallelAdapter(ParallelAdapter):
    """Row parallel in Megatron's words: the weight is split by input columns, and A with it."""

    split_dims = {"weight": 1, "lora_A.weight": 1}

    def forward(self, x):
        from torch.distributed.tensor import DTensor, Replicate

        weight, bias, *adapter = self.local_parts()
        if self.mesh.get_local_rank():
            bias = None  # added once
        y = DTensor.from_local(
            self.compute(x, weight, bias, *adapter), self.mesh, [self.partial], run_check=False)
        return y.redistribute(placements=[Replicate()]).to_local()

    def sum_over_columns(self, squares):
        dist.all_reduce(squares, group=self.mesh.get_group())
        return squares
