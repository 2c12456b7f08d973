"""ops/norm.py against the formula of transformers."""

import pytest
import torch

from ops.norm import ZeroCenteredRMSNorm


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0)])
def test_zero_centered_norm_equals_transformers(dtype, limit):
    """Values and gradients. In bf16 the values have the same bits: one rounding, at the end."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    rng = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(7, 3, 32, generator=rng, dtype=torch.float64).to(dtype) for _ in range(2))
    oracle, norm = Gemma3RMSNorm(32, eps=1e-3), ZeroCenteredRMSNorm(32, eps=1e-3)
    assert norm.state_dict().keys() == oracle.state_dict().keys() and not norm.weight.any()
    weight = torch.randn(32, generator=rng, dtype=torch.float64) / 100
    results = []
    for module in (norm, oracle):
        module.to(dtype)
        module.weight.data.copy_(weight)
        one = x.clone().requires_grad_()
        y = module(one)
        y.backward(grad)
        results.append((y.detach(), one.grad, module.weight.grad))
    for i, (result, expected) in enumerate(zip(*results)):
        if dtype == torch.float64:  # transformers computes in fp32; here fp64 stays
            wide = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * (1 + weight)
            expected, tolerance = (wide, limit) if i == 0 else (expected, 1e-5)
        else:
            tolerance = limit if i == 0 else max(limit, 1e-2 * (dtype == torch.bfloat16))
        assert result.dtype == dtype
        torch.testing.assert_close(result, expected, atol=tolerance, rtol=tolerance)
