"""Floating-point operations of a training step, and the fraction of a GPU's peak that they reach (MFU)."""

import functools
import time

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


def block_matrices(model):
    """Values of the matrices of all blocks, without adapters: each is multiplied with every token."""
    return sum(module.in_features * module.out_features for name, module in model.model.layers.named_modules()
               if hasattr(module, "in_features") and ".lora_" not in name)


def step_flops(config, matrices, lengths, n_targets, is_lora):
    """Floating-point operations that the loss of these conversations needs, forward and backward.

    config     ModelConfig
    matrices   block_matrices of the model
    lengths    (conversations,) int: tokens of each that the model computes (Dataset.n_inputs)
    n_targets  target tokens: only they need the head

    A product takes two operations per weight and token forward and twice as many backward, for the gradients
    of its input and of its weight. With LoRA the matrices are frozen and have no gradient; the adapters, of
    about one per cent of the operations, are not counted. Attention counts the pairs of tokens that see each
    other. The recurrence of linear attention is not counted: beside its matrices it is small. Checkpointing's
    second forward is not counted either: the loss does not need it.
    """
    lengths = np.asarray(lengths, np.int64)
    head = config.vocab_size * config.hidden_size
    pairs = 0  # over all layers, times the width of a head
    for kind, window, head_dim in zip(config.layer_types, config.sliding_windows, config.head_dims):
        if kind == "linear_attention":
            continue
        seen = np.minimum(lengths, window or lengths)  # by the last token, itself included
        pairs += head_dim * int((seen * (seen + 1) // 2 + (lengths - seen) * seen).sum())
    products = matrices * int(lengths.sum()) + head * int(n_targets)
    heads = config.num_attention_heads
    return (4 if is_lora else 6) * products + 12 * heads * pairs  # 12: 2 products, and 2 x 2 backward


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


def mfu(config, matrices, lengths, n_targets, is_lora, seconds, ranks):
    """Model FLOPs utilisation of a step: its step_flops per second, of the peak of all GPUs. None on the CPU.

    The peak is that of bf16, also for --dtype fp32.
    """
    if ranks.device.type != "cuda":
        return None
    needed = step_flops(config, matrices, lengths, n_targets, is_lora)
    return needed / seconds / (ranks.world_size * peak_flops(ranks.device))
