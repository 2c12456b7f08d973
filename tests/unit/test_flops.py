"""Floating-point operations of a step, against torch's counter and a count pair by pair; the peaks of GPUs."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from helpers import model_loss, small_model
from torch.utils.flop_counter import FlopCounterMode

from ops import flops, freezing

MATRICES = flops.Matrices((2, 2, 1), 5, first=0, trains_head=True)
ATTENTION = ("attention", "bmm")  # in the names of the operations that are not a product with a weight


def counted_products(model, length, n_targets):
    """Operations of products with weights in a forward and backward pass over one conversation."""
    in_place = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}
    targets = torch.full((length,), -100)
    targets[:n_targets] = 1
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        model_loss(model, torch.ones(length, dtype=torch.int64), [length], targets).backward()
    return sum(n for name, n in counter.get_flop_counts()["Global"].items()
               if not any(word in str(name) for word in ATTENTION))


@pytest.mark.parametrize("frozen", [
    None, "lm_head", "mlp", "q_proj,layers.2", "embed_tokens,layers.0", "embed_tokens,layers.0,layers.1",
    "layers,lm_head", "model", "embed_tokens,layers", "embed_tokens,layers,lm_head"])
def test_products_equal_the_counter_of_torch(frozen):
    """All matrices of all layers and the head on its targets. With --freeze, frozen ones have no gradient, and backward
    ends at the first block that trains; its attention, too."""
    model = small_model(tie_word_embeddings=False, num_hidden_layers=3)
    if frozen:
        freezing.freeze(model, frozen)
    length, n_targets = 11, 5
    matrices = flops.Matrices.of(model)
    needed = flops.step_flops(model.config, matrices, [length], n_targets)
    pairs = 96 * (length * (length + 1) // 2)  # 6 heads of 16
    attention = sum(12 if i >= matrices.first else 4 for i in range(3)) * pairs
    assert needed - attention == counted_products(model, length, n_targets)
    with_backward = [block.self_attn.o_proj.weight.grad is not None for block in model.model.layers]
    assert not any(with_backward[: matrices.first])


def test_adapters_leave_the_matrices_without_gradients():
    """LoRA: forward and the gradient of the input; the gradient reaches the embedding's output."""
    model = small_model(use_lora=True)
    full, matrices = (flops.Matrices.of(net) for net in (small_model(), model))
    assert (matrices.blocks, matrices.trained, matrices.first) == (full.blocks, 0, 0) and not matrices.trains_head
    assert full.trained == sum(full.blocks) and full.trains_head
    products = [flops.step_flops(dataclasses.replace(model.config, layer_types=()), m, [9], 4) for m in (matrices, full)]
    assert products[0] * 6 == products[1] * 4


def test_attention_counts_the_pairs_that_see_each_other():
    """Windows that are none, shorter than a conversation, and longer than all, each in its own layer."""
    config = dataclasses.replace(small_model().config, sliding_windows=(None, 3, 50), num_hidden_layers=3,
                                 layer_types=("full_attention", "sliding_attention", "sliding_attention"),
                                 head_dims=(16,) * 3)
    lengths = torch.tensor([1, 3, 4, 17], dtype=torch.int32).numpy()
    pairs = sum(1 for window in config.sliding_windows for length in lengths for i in range(length)
                for j in range(i + 1) if window is None or i - j < window)
    needed = flops.step_flops(config, MATRICES, lengths, 7)
    products = flops.step_flops(dataclasses.replace(config, sliding_windows=()), MATRICES, lengths, 7)
    per_pair = 2 * 2 * 3 * config.num_attention_heads * config.head_dim  # 2 products, a multiply and an add, 3 times
    assert needed - products == per_pair * pairs


def test_long_conversations_do_not_overflow():
    """Lengths are int32 in the data; the square of a length is not."""
    config = small_model().config
    lengths = torch.full((64,), 2**17, dtype=torch.int32).numpy()
    assert flops.step_flops(config, MATRICES, lengths, 0) > 12 * 2 * 96 * 64 * (2**34 // 2)


def test_mfu_is_the_rate_over_the_peak_of_all_gpus(monkeypatch):
    """A listed name has its peak; another one is measured, in bf16 and once; the CPU has none."""
    names, measured = {0: "NVIDIA H100 80GB HBM3", 1: "NVIDIA H100 80GB HBM3 MIG 1g.10gb"}, []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])
    monkeypatch.setattr(flops, "product_flops", lambda device, dtype, size: measured.append(dtype) or 1e12)
    flops.peak_flops.cache_clear()
    config = small_model().config
    needed = flops.step_flops(config, MATRICES, [9], 4)
    for index, peak in ((0, 989e12), (1, 1e12), (1, 1e12)):
        ranks = SimpleNamespace(device=torch.device("cuda", index), world_size=4)
        assert flops.mfu(config, MATRICES, [9], 4, 2.0, ranks) == pytest.approx(needed / 2 / (4 * peak))
    assert measured == [torch.bfloat16]
    assert flops.mfu(config, MATRICES, [9], 4, 2.0, SimpleNamespace(device=torch.device("cpu"))) is None
    flops.peak_flops.cache_clear()


def test_a_measured_product_has_a_plausible_rate():
    """Between a million and 10^16 operations per second: the unit is right."""
    assert 1e6 < flops.product_flops(torch.device("cpu"), torch.float32, 64, repeats=3) < 1e16
