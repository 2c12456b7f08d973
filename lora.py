"""LoRA: low-rank adapters beside frozen linear layers, in PEFT's own format.

    python lora.py merge outputs/checkpoints/latest OUT     # adapter and base -> a full model directory

Owns the adapted layer, which layers get one, PEFT's adapter_config.json, and first values. An adapter's
settings are that file's dict, by PEFT's names; its tensors have PEFT's names less the prefix `base_model.model.`,
which are the model's own. Sources: LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353), peft 0.21.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from disk.peft import scaling_of
from ops.nf4 import NF4Weight
from settings.errors import UserError


LARGEST_RANK = 2**14  # a header may claim any where the matrix has no columns


class LoRALinear(nn.Module):
    """y = x W' + b + scaling · dropout(x) A' B', with W and b frozen; with DoRA each output is also rescaled.

    weight (out, in) and bias keep the names that they have without an adapter. lora_A (rank, in) is random, lora_B
    (out, rank) zero at first, both fp32: training starts from the base model. lora_magnitude_vector (out,): DoRA's.
    """

    def __init__(self, linear, rank, scaling, dropout, dora):
        super().__init__()
        self.weight, self.bias, self.scaling, self.dropout = linear.weight, linear.bias, scaling, dropout
        self.in_features, self.out_features = columns, rows = linear.in_features, linear.out_features
        self.product = getattr(linear, "product", F.linear)  # of a 4-bit weight, or a plain one
        new = dict(bias=False, device=linear.weight.device, dtype=torch.float32)
        self.lora_A, self.lora_B = nn.Linear(columns, rank, **new), nn.Linear(rank, rows, **new)
        self.lora_magnitude_vector = nn.Parameter(torch.empty(rows, device=new["device"])) if dora else None
        self.combine = lambda tensor: tensor  # sums over processes that hold other columns of the weight

    def forward(self, x):
        return self.compute(x, self.weight, self.bias, self.lora_A.weight, self.lora_B.weight,
                            self.lora_magnitude_vector)

    def compute(self, x, weight, bias, A, B, magnitude):
        """x (N, in) -> (N, out). A frozen weight gets no gradient: autograd then makes neither that product nor a copy
        of x for it."""
        h = F.linear(F.dropout(x, self.dropout, self.training), A)  # (N, rank)
        # Added in place: the base's output, the largest tensor here, is never copied.
        y = self.product(x, weight, bias if magnitude is None else None).addmm_(h, B.T, alpha=self.scaling)
        if magnitude is None:
            return y
        y = y * (magnitude / self.row_norms(weight, A, B))
        return y if bias is None else y + bias

    @torch.no_grad()
    def row_norms(self, weight, A, B):
        """Norm of each row of W + scaling · B A, (out,): a constant in backward (DoRA, section 4.3).

        From ||w||² + 2 s b·(A w) + s² b·(A A')b, so that no second (out, in) matrix is made.
        """
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        mixed = 2 * (weight @ A.T) + self.scaling * (B @ (A @ A.T))  # (out, rank)
        squares += self.scaling * (mixed * B).sum(1)
        return self.combine(squares).sqrt().to(weight.dtype)


class NF4LoRALinear(NF4Weight, LoRALinear):
    """An adapted layer whose frozen weight is stored in 4 bits."""


def inject(model, config, ranks):
    """Freeze the model, put an adapter on each module of `ranks` and thaw what modules_to_save names; in place.

    Raises ValueError for a module that the model does not have: the adapter is another model's.
    """
    model.requires_grad_(False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    for name, rank in ranks.items():
        if not isinstance(modules.get(name), nn.Linear) or name == "lm_head":
            raise UserError(f"the adapter has a part for {name}, which is no layer of this model that can have one; "
                            f"is it for another? Its base is {config.get('base_model_name_or_path')}")
        if not 1 <= rank <= LARGEST_RANK:
            raise UserError(f"the adapter's part for {name} has rank {rank}; it may be from 1 to {LARGEST_RANK:,}")
        parent, _, child = name.rpartition(".")
        adapted = NF4LoRALinear if isinstance(modules[name], NF4Weight) else LoRALinear
        setattr(modules[parent], child, adapted(modules[name], rank, scaling_of(name, rank, config), config.get(
            "lora_dropout", 0.0), config.get("use_dora", False)))
    for name, p in parameters.items():
        if any(f".{name.rpartition('.')[0]}".endswith(f".{saved}") for saved in config.get("modules_to_save") or ()):
            p.requires_grad_(True)
            p.data = p.data.float()


def first_values(model, seed):
    """Yield (name, whole tensor) of every A and B, as PEFT draws them: the same on any number of ranks."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if ".lora_A." in name:
            bound = 1 / math.sqrt(p.shape[1])  # Kaiming's for a = sqrt(5)
            yield name, torch.empty(p.shape).uniform_(-bound, bound, generator=generator)
        elif ".lora_B." in name:
            yield name, torch.zeros(p.shape)


if __name__ == "__main__":
    from tools import merge  # here this file is an entry point; for sft.py and chat.py it is a leaf
    from settings.errors import run

    run(merge.main)
