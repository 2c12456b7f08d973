"""Floating-point operations of a training step, and the fraction of a GPU's peak that they reach (MFU)."""

import functools
import time
from dataclasses import dataclass

import numpy as np
import torch

# Dense bf16 products with fp32 sums, operations per second, under the names of torch.cuda.get_device_name
# without "NVIDIA". From NVIDIA's data sheets, which print twice as much for sparse matrices; RTX 4090: from
# the whitepaper of the Ada architecture. The names must be equal: a part of an H100 (MIG) is not an H100.
PEAKS = {
    **dict.fromkeys(("A100-SXM4-40GB", "A100-SXM4-80GB", "A100-PCIE-40GB", "A100 80GB PCIe"), 312e12),
    "H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200": 989e12,
    "L4": 121e12, "L40S": 362e12, "GeForce RTX 4090": 165e12,
}


@dataclass(frozen=True)
class Matrices:
    """The matrices that a token is multiplied with, without those of adapters.

    blocks         (layers,) int: values of the matrices of each block
    trained        values of those that get a gradient
    first          number of the first block that backward passes through: what is below it is frozen.
                   The number of blocks if it is the final norm, one more if it is the head
    trains_head    whether the head gets a gradient
    """

    blocks: tuple
    trained: int
    first: int
    trains_head: bool

    @classmethod
    def of(cls, model):
        """The Matrices of a model, before or after its parameters are sharded."""
        blocks, trained = [], 0
        for block in model.model.layers:
            layers = [module for name, module in block.named_modules()
                      if hasattr(module, "in_features") and ".lora_" not in name]
            blocks.append(sum(layer.in_features * layer.out_features for layer in layers))
            trained += sum(layer.in_features * layer.out_features for layer in layers
                           if layer.weight.requires_grad)
        changes = [any(p.requires_grad for p in block.parameters()) for block in model.model.layers]
        changes = [*changes, model.model.norm.weight.requires_grad, True]
        first = 0 if model.model.embed_tokens.weight.requires_grad else changes.index(True)
        return cls(tuple(blocks), trained, first, model.lm_head.weight.requires_grad)


def step_flops(config, matrices, lengths, n_targets):
    """Floating-point operations that the loss of these conversations needs, forward and backward.

    config     ModelConfig
    matrices   Matrices of the model
    lengths    (conversations,) int: tokens of each that the model computes (Dataset.n_inputs)
    n_targets  target tokens: only they need the head

    A product takes two operations per weight and token forward, and backward as many for the gradient of its
    input and of its weight. Frozen matrices have none of their weight (LoRA, --freeze), and blocks below the
    first one that trains have neither. The adapters, about one per cent of the operations, are not counted.
    Attention counts the pairs of tokens that see each other. The recurrence of linear attention is not
    counted: beside its matrices it is small. Checkpointing's second forward is not counted either: the loss
    does not need it.
    """
    lengths = np.asarray(lengths, np.int64)
    attention = 0  # per head
    for i, (kind, window, head_dim) in enumerate(
            zip(config.layer_types, config.sliding_windows, config.head_dims)):
        if kind == "linear_attention":
            continue
        seen = np.minimum(lengths, window or lengths)  # by the last token, itself included
        pairs = int((seen * (seen + 1) // 2 + (lengths - seen) * seen).sum())
        attention += (12 if i >= matrices.first else 4) * head_dim * pairs  # 2 products, and 2 x 2 backward
    reached = sum(matrices.blocks[matrices.first :])
    products = (sum(matrices.blocks) + reached + matrices.trained) * int(lengths.sum())
    is_below = matrices.first <= len(matrices.blocks)  # what is trained: the head's input has a gradient
    head = config.vocab_size * config.hidden_size * (1 + is_below + matrices.trains_head)
    return 2 * (products + head * int(n_targets)) + config.num_attention_heads * attention


@functools.cache
def peak_flops(device):
    """Peak of a CUDA device in bf16, operations per second: from PEAKS, otherwise measured, once."""
    name = torch.cuda.get_device_name(device).removeprefix("NVIDIA ")
    return PEAKS[name] if name in PEAKS else product_flops(device, torch.bfloat16, 4096)


def product_flops(device, dtype, size, repeats=10):
    """Operations per second of a product of two size x size matrices: the median of `repeats`."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # waits for the product
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / float(np.median(seconds[1:]))  # the first call allocates


def mfu(config, matrices, lengths, n_targets, seconds, ranks):
    """Model FLOPs utilisation of a step: its step_flops per second, of the peak of all GPUs. None on the CPU.

    The peak is that of bf16, also for --dtype fp32.
    """
    if ranks.device.type != "cuda":
        return None
    needed = step_flops(config, matrices, lengths, n_targets)
    return needed / seconds / (ranks.world_size * peak_flops(ranks.device))
