"""RMSNorm whose weight is stored as its distance from 1: Gemma 2 and 3, Qwen3.5."""

import torch
import torch.nn.functional as F
from torch import nn


class ZeroCenteredRMSNorm(nn.RMSNorm):
    """x / rms(x) * (1 + weight), in fp32, rounded to x's dtype once. RMSNorm (arXiv 1910.07467).

    1 + weight must not be rounded to bf16: near 1 that has steps of 1/128, and weights are smaller. So eager
    bf16 keeps an fp32 copy of x for backward; compiled, and in fp32, it keeps what nn.RMSNorm keeps.
    """

    def reset_parameters(self):
        nn.init.zeros_(self.weight)

    def forward(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)  # fp64 stays
        return F.rms_norm(x.to(wide), self.normalized_shape, 1 + self.weight.to(wide), self.eps).type_as(x)
