"""LoRA: trainable low-rank adapters next to frozen linear layers.

The adapted layer, its injection into a model, and its initial values. The configuration is PEFT's
adapter_config.json (disk/peft.py); tensors have PEFT's names without the prefix `base_model.model.`.
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
    """y = x W' + b + scaling · dropout(x) A' B', where W and b are frozen. DoRA also rescales each output.

    weight (out, in) and bias keep the names that they have without an adapter. lora_A (rank, in) starts
    random and lora_B (out, rank) zero, both in fp32. lora_magnitude_vector (out,) exists with DoRA only.
    """

    def __init__(self, linear, rank, *, scaling, dropout=0.0, dora=False):
        super().__init__()
        self.weight, self.bias, self.scaling, self.dropout = linear.weight, linear.bias, scaling, dropout
        self.in_features, self.out_features = linear.in_features, linear.out_features
        device = linear.weight.device
        self.lora_A = nn.Linear(self.in_features, rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False, device=device, dtype=torch.float32)
        magnitude = torch.empty(self.out_features, device=device)
        self.lora_magnitude_vector = nn.Parameter(magnitude) if dora else None

    def forward(self, x):
        A, B = self.lora_A.weight, self.lora_B.weight
        return self.compute(x, self.weight, self.bias, A, B, self.lora_magnitude_vector)

    def compute(self, x, weight, bias, A, B, magnitude):
        """x (N, in) -> (N, out). The weight is frozen, so autograd does not keep x for its gradient."""
        if self.dropout:  # the compiler would copy x for a dropout of 0, and keep the copy
            h = F.linear(F.dropout(x, self.dropout, self.training), A)  # (N, rank)
        else:
            h = F.linear(x, A)
        y = self.product(x, weight, bias if magnitude is None else None)
        y.addmm_(h, B.T, alpha=self.scaling)  # in place: y is the largest tensor here
        if magnitude is None:
            return y
        y = y * (magnitude / self.row_norms(weight, A, B))
        return y if bias is None else y + bias

    def product(self, x, weight, bias):
        """x W' + b. Subclasses store the weight in another form."""
        return F.linear(x, weight, bias)

    @torch.no_grad()
    def row_norms(self, weight, A, B):
        """Norm of each row of W + scaling · B A, (out,). A constant in backward (DoRA, section 4.3).

        Computed as ||w||² + 2 s b·(A w) + s² b·(A A')b, so that no second (out, in) matrix is allocated.
        """
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        mixed = 2 * (weight @ A.T) + self.scaling * (B @ (A @ A.T))  # (out, rank)
        squares += self.scaling * (mixed * B).sum(1)
        return self.sum_over_columns(squares).sqrt().to(weight.dtype)

    def sum_over_columns(self, squares):
        """Sum over the ranks that hold other columns of the weight. Here every column is local."""
        return squares


class NF4LoRALinear(NF4Weight, LoRALinear):
    """QLoRA: the frozen weight is stored in 4 bits."""


class ColumnParallelLoRALinear(tp.ColumnParallelAdapter, LoRALinear):
    """Tensor parallel: the weight's output rows and B are split over tp."""


class RowParallelLoRALinear(tp.RowParallelAdapter, LoRALinear):
    """Tensor parallel: the weight's input columns and A are split over tp."""


def inject(model, peft_config, lora_ranks, tp_size=1):
    """Freeze the model and add the adapters, in place.

    peft_config  PEFT's adapter_config.json; the modules in its modules_to_save are trained fully
    lora_ranks   {module name: LoRA rank} of the linear layers that get an adapter

    Raises UserError for a module that the model does not have: the adapter is for another model.
    """
    model.requires_grad_(False)
    model.peft_config = peft_config
    model.model.has_dropout = peft_config.get("lora_dropout", 0.0) > 0
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    for name, rank in lora_ranks.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear) or name == "lm_head":
            base = peft_config.get("base_model_name_or_path")
            raise UserError(f"the adapter has tensors for {name}, but this model has no such linear layer; "
                            f"the adapter was trained on {base}, use that model")
        if isinstance(linear, NF4Weight):
            layer_class = NF4LoRALinear
        elif tp_size == 1:
            layer_class = LoRALinear
        elif name.endswith(tp.COLUMNS_SPLIT):
            layer_class = RowParallelLoRALinear
        else:
            layer_class = ColumnParallelLoRALinear
        model.set_submodule(name, layer_class(
            linear, rank, scaling=peft.scaling_of(name, rank, peft_config),
            dropout=peft_config.get("lora_dropout", 0.0), dora=peft_config.get("use_dora", False)))
    saved = tuple(f".{name}" for name in peft_config.get("modules_to_save") or ())
    for name, p in parameters.items():
        if f".{name.rpartition('.')[0]}".endswith(saved):
            p.requires_grad_(True)
            p.data = p.data.float()


@torch.no_grad()
def initialize(model, weights, seed):
    """Write the initial values of a new adapter into `weights`, {name: tensor, possibly sharded}.

    A is drawn as in PEFT, B is zero, DoRA's magnitudes are the norms of the frozen rows. The values do not
    depend on the number of ranks.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if ".lora_A." in name:
            bound = 1 / math.sqrt(p.shape[1])  # kaiming_uniform_ with a = sqrt(5)
            values = torch.empty(p.shape).uniform_(-bound, bound, generator=generator)
            pretrained.copy_slice(weights[name], values)
        elif ".lora_B." in name:
            local(weights[name]).zero_()
        elif name.endswith(".lora_magnitude_vector"):
            module = model.get_submodule(name.rpartition(".")[0])
            squares = torch.linalg.vector_norm(local(module.weight), dim=1, dtype=torch.float32).square()
            local(weights[name]).copy_(module.sum_over_columns(squares).sqrt())
