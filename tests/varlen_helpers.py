"""torch's varlen_attn as a reference on the CPU, in the signatures of torch 2.11 and of 2.12 and 2.13."""

import torch
import torch.nn.attention.varlen

from ops import attention


def scores_mask(n, before, device):
    """(n, n) bool: which keys a query sees: itself and the `before` tokens before it; -1: all."""
    mask = torch.ones(n, n, dtype=torch.bool, device=device).tril()
    return mask if before < 0 else mask.triu(-before)


def probabilities(q, k, before):
    """softmax(q k' / sqrt(D)) of one document: q and k (H, n, D) -> (H, n, n)."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(~scores_mask(q.shape[1], before, q.device), -torch.inf).softmax(dim=-1)


def documents_of(offsets, *tensors):
    """Each document's (heads, n, D) views of tensors (N, heads, D)."""
    for start, end in zip(offsets.tolist(), offsets.tolist()[1:]):
        yield [x[start:end].transpose(0, 1) for x in tensors]


# A custom op, as torch's own is one: torch.compile would trace a Python function and its loop over documents.
@torch.library.custom_op("reference::varlen", mutates_args=())
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, longest: int,
           before: int) -> torch.Tensor:
    """Attention of documents; q (N, H, D), k and v (N, K, D)."""
    out, group = torch.full_like(q, torch.nan), q.shape[1] // k.shape[1]
    for a, b, c, y in documents_of(offsets, q, k, v, out):
        assert a.shape[1] <= longest
        y.copy_(probabilities(a, b.repeat_interleave(group, 0), before) @ c.repeat_interleave(group, 0))
    return out


@torch.library.custom_op("reference::varlen_backward", mutates_args=())
def attend_backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor,
                    before: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grads, group = [torch.full_like(x, torch.nan) for x in (q, k, v)], q.shape[1] // k.shape[1]
    for g, a, b, c, da, db, dc in documents_of(offsets, grad, q, k, v, *grads):
        b, c = b.repeat_interleave(group, 0), c.repeat_interleave(group, 0)
        p = probabilities(a, b, before)
        dp = g @ c.mT
        ds = p * (dp - (dp * p).sum(dim=-1, keepdim=True)) / a.shape[-1] ** 0.5
        da.copy_(ds @ b)
        db.copy_((ds.mT @ a).unflatten(0, (-1, group)).sum(dim=1))
        dc.copy_((p.mT @ g).unflatten(0, (-1, group)).sum(dim=1))
    return tuple(grads)


@attend.register_fake
def _(q, k, v, offsets, longest, before):
    return torch.empty_like(q)


@attend_backward.register_fake
def _(grad, q, k, v, offsets, before):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def keep_inputs(ctx, inputs, output):
    *tensors, _, ctx.before = inputs
    ctx.save_for_backward(*tensors)


def gradients_of_inputs(ctx, grad):
    return (*attend_backward(grad, *ctx.saved_tensors, ctx.before), None, None, None)


attend.register_autograd(gradients_of_inputs, setup_context=keep_inputs)


def checked(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size):
    """Attention, after the checks that torch's C++ makes on CUDA."""
    for offsets in (cu_seq_q, cu_seq_k):
        assert offsets.dtype == torch.int32 and offsets.is_contiguous() and offsets.device == query.device
    assert query.shape[2] % 8 == 0 and query.shape[2] <= 256
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    if query.shape[1] % key.shape[1]:
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")
    assert isinstance(window_size, tuple) and window_size[1] == 0  # else torch does not take it as causal
    assert cu_seq_q is cu_seq_k and max_q == max_k
    if scale is not None:  # attend() has 1 / sqrt(D)
        query = query * (scale * query.shape[2] ** 0.5)
    return attend(query, key, value, cu_seq_q, max_q, window_size[0])


def varlen_attn_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                     window_size=(-1, -1)):
    """The signature of torch 2.11: fewer key/value heads need no argument."""
    assert return_aux is None
    return checked(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def varlen_attn_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                     window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):
    """The signature and the errors of torch 2.12 and 2.13."""
    assert return_aux is seqused_k is block_table is num_splits is None
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError(f"Expect query and key/value to have the same number of heads but got "
                         f"Hq={query.shape[1]} and Hkv={key.shape[1]}. Try setting enable_gqa=True for GQA.")
    return checked(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


SIGNATURES = {"2.11": varlen_attn_2_11, "2.13": varlen_attn_2_13}


def use(patch, function):
    """Make ops.attention call this function in place of torch's varlen_attn, for tensors on the CPU too.

    patch  pytest's MonkeyPatch. When it ends, clear the cache of varlen_attention() once more
    """
    patch.setattr(torch.nn.attention.varlen, "varlen_attn", function)
    patch.setattr(attention, "fits_varlen", lambda x, head_dim: True)
    attention.varlen_attention.cache_clear()
