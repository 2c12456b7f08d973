"""Tensor parallelism as in Megatron (Shoeybi et al. 2019), in PyTorch's DTensor: --strategy megatron --tp N.

The matrices of each block are sharded over the ranks of a tp group: first by output rows, then by input
columns, so that a block needs two all-reduces in forward and two in backward. Embedding, head and loss are
sharded by the vocabulary. This file knows nothing of the model but Hugging Face's module names.

torch.distributed.tensor is imported inside functions: the import takes half a second, and most runs have no
tp.
"""

import torch
import torch.distributed as dist
from torch import nn

from ops.loss import Head
from settings.errors import UserError

# Layers whose weights are sharded by input columns; the others are sharded by output rows.
COLUMNS_SPLIT = ("o_proj", "down_proj")


def split(model, mesh):
    """Shard a model, which is on meta, over a mesh of one dimension, in place.

    Call it before fsdp.shard: FSDP2 then shards the tp shards.

    Raises UserError if the model's family has no tp, or the mesh's size does not divide the heads, the MLP's
    width or the vocabulary.
    """
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    config, size = model.config, mesh.size()
    config.check_tp(size)
    sharded_sizes = (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size,
                     config.vocab_size)
    if any(n % size for n in sharded_sizes):
        divisors = [n for n in range(1, config.num_key_value_heads + 1)
                    if not any(m % n for m in sharded_sizes)]
        raise UserError(f"--tp {size} must divide the attention heads, key/value heads, intermediate_size "
                        f"and vocab_size, here {sharded_sizes}; these do: {divisors}")
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
    # parallelize_module creates new parameters, and some of them require gradients (torch 2.13)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)


def parallel_styles(config):
    """{module name in a block: how it is sharded}

    The inputs of attention and MLP are declared as replicated. Backward then has one all-reduce for all
    layers that read an input: two per block. Without the declaration each layer has its own: five per block.
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
        "self_attn": replicated_input(n_other_inputs=5),  # the other positional inputs are left alone
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
        # Each rank normalises its own heads, dim 1 of (N, H, D), with the same weight. The weight's gradient
        # is summed over the ranks.
        for name in ("self_attn.q_norm", "self_attn.k_norm"):
            styles[name] = SequenceParallel(sequence_dim=1, use_local_output=True)
    return styles


class VocabParallelHead(Head):
    """lm_head with the vocabulary sharded over tp: this rank holds V / tp rows of the weight.

    The loss works on the shard, so no rank ever holds the full logits of a chunk. logits(), which is for
    generation, all-gathers them.
    """

    def __init__(self, head, mesh):
        from torch.distributed.tensor import Shard, distribute_tensor

        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = head.in_features, head.out_features, None
        weight = distribute_tensor(head.weight, mesh, [Shard(0)])
        self.weight = nn.Parameter(weight, requires_grad=head.weight.requires_grad)
        self.group, self.tp_size = mesh.get_group(), mesh.size()
        self.soft_cap = head.soft_cap
        self.first_id = mesh.get_local_rank() * (head.out_features // mesh.size())

    def local_weight(self):
        return self.weight.to_local()

    def all_reduce(self, tensor, op):
        dist.all_reduce(tensor, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op], self.group)

    def logits(self, hidden):
        logits = nn.functional.linear(hidden, self.local_weight()).contiguous()  # (N, V / tp)
        shards = [torch.empty_like(logits) for _ in range(self.tp_size)]
        dist.all_gather(shards, logits, group=self.group)
        return self.capped(torch.cat(shards, dim=-1))


class ParallelAdapter:
    """Mixin for lora.LoRALinear: the weight, and either A or B, are sharded over tp.

    The layer computes with plain tensors, this rank's shards. An adapter adds no communication: one
    all-reduce sums the outputs of the weight and of the adapter together. The small matrix that is replicated
    gets a partial gradient on each rank, and FSDP2 sums these once per step.
    """

    shard_dims = {}  # parameter name -> dimension that is sharded; other parameters are replicated
    mesh = None  # until distribute(): a forecast measures such a layer on meta

    def distribute(self, mesh):
        """Replace the parameters by DTensors over the tp mesh."""
        from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

        self.mesh, self.partial = mesh, Partial()
        for name, p in list(self.named_parameters()):
            dim = self.shard_dims.get(name)
            placement = Replicate() if dim is None else Shard(dim)
            distributed = distribute_tensor(p, mesh, [placement])
            module, _, attribute = name.rpartition(".")
            setattr(self.get_submodule(module), attribute, nn.Parameter(distributed, p.requires_grad))

    def local_shard(self, p):
        """This rank's shard of a parameter. For a replicated one, backward treats the gradient as partial."""
        if p is None:
            return None
        placement = self.partial if p.placements[0].is_replicate() else p.placements[0]
        return p.to_local(grad_placements=[placement])

    def local_shards(self):
        """Shards of the weight, bias, A, B and DoRA's magnitudes, the arguments of compute()."""
        parameters = (self.weight, self.bias, self.lora_A.weight, self.lora_B.weight,
                      self.lora_magnitude_vector)
        return [self.local_shard(p) for p in parameters]


class ColumnParallelAdapter(ParallelAdapter):
    """Column parallel (Megatron's term): the weight is sharded by output rows, and so is B."""

    shard_dims = {"weight": 0, "bias": 0, "lora_B.weight": 0, "lora_magnitude_vector": 0}

    def forward(self, x):
        if self.mesh is None:
            return super().forward(x)
        return self.compute(x.to_local(grad_placements=[self.partial]), *self.local_shards())


class RowParallelAdapter(ParallelAdapter):
    """Row parallel (Megatron's term): the weight is sharded by input columns, and so is A."""

    shard_dims = {"weight": 1, "lora_A.weight": 1}

    def forward(self, x):
        from torch.distributed.tensor import DTensor, Replicate

        if self.mesh is None:
            return super().forward(x)
        weight, bias, *adapter = self.local_shards()
        if self.mesh.get_local_rank():
            bias = None  # the outputs are summed, so only one rank adds the bias
        partial_output = self.compute(x, weight, bias, *adapter)
        y = DTensor.from_local(partial_output, self.mesh, [self.partial], run_check=False)
        return y.redistribute(placements=[Replicate()]).to_local()  # an all-reduce

    def sum_over_columns(self, squares):
        dist.all_reduce(squares, group=self.mesh.get_group())
        return squares
