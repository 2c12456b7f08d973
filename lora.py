"""LoRA: low-rank adapters beside frozen linear layers.

Owns the adapted layer, which modules of a model get one, and its first values. Settings are those of PEFT's
adapter_config.json (disk/peft.py). Tensors have PEFT's names without the prefix `base_model.model.`.
Sources: LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353), QLoRA (2305.14314), peft 0.21.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from disk import peft, pretrained
from ops.memory import local
from ops.nf4 import NF4Weight
from ranks import tp
from settings.errors import UserError


class LoRALinear(nn.Module):
    """y = x W' + b + scaling · dropout(x) A' B', with W and b frozen; with DoRA each output is also rescaled.

    weight (out, in) and bias keep the names that they have without an adapter. lora_A (rank, in) starts
    random, lora_B (out, rank) zero, both fp32. lora_magnitude_vector (out,) is DoRA's.
    """

    def __init__(self, linear, rank, *, scaling, dropout=0.0, dora=False):
        super().__init__()
        self.weight, self.bias, self.scaling, self.dropout = linear.weight, linear.bias, scaling, dropout
        self.in_features, self.out_features = linear.in_features, linear.out_features
        new = dict(bias=False, device=linear.weight.device, dtype=torch.float32)
        self.lora_A = nn.Linear(self.in_features, rank, **new)
        self.lora_B = nn.Linear(rank, self.out_features, **new)
        magnitude = torch.empty(self.out_features, device=new["device"])
        self.lora_magnitude_vector = nn.Parameter(magnitude) if dora else None

    def forward(self, x):
        A, B = self.lora_A.weight, self.lora_B.weight
        return self.compute(x, self.weight, self.bias, A, B, self.lora_magnitude_vector)

    def compute(self, x, weight, bias, A, B, magnitude):
        """x (N, in) -> (N, out). The frozen weight gets no gradient, so autograd keeps no x for it."""
        h = F.linear(F.dropout(x, self.dropout, self.training), A)  # (N, rank)
        y = self.product(x, weight, bias if magnitude is None else None)
        y.addmm_(h, B.T, alpha=self.scaling)  # in place: y, the largest tensor here, is never copied
        if magnitude is None:
            return y
        y = y * (magnitude / self.row_norms(weight, A, B))
        return y if bias is None else y + bias

    def product(self, x, weight, bias):
        """x W' + b of the weight as it is stored."""
        return F.linear(x, weight, bias)

    @torch.no_grad()
    def row_norms(self, weight, A, B):
        """Norm of each row of W + scaling · B A, (out,): a constant in backward (DoRA, section 4.3).

        From ||w||² + 2 s b·(A w) + s² b·(A A')b, so that no second (out, in) matrix is made.
        """
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        mixed = 2 * (weight @ A.T) + self.scaling * (B @ (A @ A.T))  # (out, rank)
        squares += self.scaling * (mixed * B).sum(1)
        return self.sum_over_columns(squares).sqrt().to(weight.dtype)

    def sum_over_columns(self, squares):
        """Sum over the ranks that hold other columns of the weight: here none."""
        return squares


class NF4LoRALinear(NF4Weight, LoRALinear):
    """QLoRA: the frozen weight in 4 bits."""


class ColumnParallelLoRALinear(tp.ColumnParallelAdapter, LoRALinear):
    """The weight's rows and B are split over tp."""


class RowParallelLoRALinear(tp.RowParallelAdapter, LoRALinear):
    """The weight's columns and A are split over tp."""


def inject(model, config, lora_ranks, tp_size=1):
    """Freeze the model, put an adapter on each module of lora_ranks {name: rank}, and unfreeze what
    modules_to_save of config, PEFT's settings, names; in place.

    Raises UserError for a module that the model does not have: the adapter is another model's.
    """
    model.requires_grad_(False)
    model.peft_config = config
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    for name, rank in lora_ranks.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear) or name == "lm_head":
            raise UserError(f"the adapter has a part for {name}, which is no layer of this model that can "
                            f"have one; is it for another? Its base: {config.get('base_model_name_or_path')}")
        layer_class = NF4LoRALinear if isinstance(linear, NF4Weight) else LoRALinear
        if tp_size > 1:
            by_columns = name.endswith(tp.COLUMNS_SPLIT)
            layer_class = RowParallelLoRALinear if by_columns else ColumnParallelLoRALinear
        scaling, dropout = peft.scaling_of(name, rank, config), config.get("lora_dropout", 0.0)
        model.set_submodule(name, layer_class(
            linear, rank, scaling=scaling, dropout=dropout, dora=config.get("use_dora", False)))
    saved = tuple(f".{name}" for name in config.get("modules_to_save") or ())
    for name, p in parameters.items():
        if f".{name.rpartition('.')[0]}".endswith(saved):
            p.requires_grad_(True)
            p.data = p.data.float()


@torch.no_grad()
def initialize(model, weights, seed):
    """Fill {name: tensor}, which may be split, with the first values of a new adapter: A as PEFT draws it, B
    zero, DoRA's magnitudes the norms of the frozen rows. The same on any number of ranks."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if ".lora_A." in name:
            bound = 1 / math.sqrt(p.shape[1])  # Kaiming's for a = sqrt(5)
            whole = torch.empty(p.shape).uniform_(-bound, bound, generator=generator)
            pretrained.copy_slice(weights[name], whole)
        elif ".lora_B." in name:
            local(weights[name]).zero_()
        elif name.endswith(".lora_magnitude_vector"):
            module = model.get_submodule(name.rpartition(".")[0])
            squares = torch.linalg.vector_norm(local(module.weight), dim=1, dtype=torch.float32).square()
            local(weights[name]).copy_(module.sum_over_columns(squares).sqrt())
