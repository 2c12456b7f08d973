"""ops/attention.py: varlen_attn, by a reference with its signatures, against one document after another."""

from types import SimpleNamespace

import pytest
import torch
import varlen_helpers
from helpers import Operations, model_loss, small_model
from torch.utils.checkpoint import checkpoint

from families.config import ModelConfig
from model import CausalLM, generate
from ops import attention
from ops.attention import Documents, attend_each, fits_varlen, varlen_attention

LENGTHS = (1, 9, 30, 1, 2, 5, 1)


@pytest.fixture(autouse=True)
def fresh_cache():
    """varlen_attention() keeps the function that it found, which may be a test's."""
    attention.varlen_attention.cache_clear()
    yield
    attention.varlen_attention.cache_clear()


@pytest.fixture(params=varlen_helpers.SIGNATURES)
def reference(request, monkeypatch):
    """The model calls the reference, in each signature; the fixture is the function."""
    varlen_helpers.use(monkeypatch, varlen_helpers.SIGNATURES[request.param])
    return varlen_helpers.SIGNATURES[request.param]


def inputs(lengths=LENGTHS, heads=(6, 2), dtype=torch.float64):
    """(q, k, v) that require gradients: q with heads[0] heads, k and v with heads[1]."""
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(sum(lengths), n, 16, generator=rng, dtype=dtype).requires_grad_()
            for n in (heads[0], heads[1], heads[1])]


def outcome(function, tensors, documents, window):
    """The output, and the gradients of a fixed weighted sum of it."""
    out = function(*tensors, documents, window)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    return out, *torch.autograd.grad((out * weights).sum(), tensors)


@pytest.mark.parametrize("window", [None, 4])
def test_opaque_attention_is_that_of_one_document_after_another(window):
    """Output and gradients are equal to the last bit; checkpointed, too. On meta it gives the same shapes."""
    documents, tensors = Documents.of(LENGTHS), inputs()
    opaque = attention.opaque_attention()

    def checkpointed(*arguments):
        return checkpoint(opaque, *arguments, use_reentrant=False)

    expected, *results = (outcome(function, tensors, documents, window)
                          for function in (attend_each, opaque, checkpointed))
    for result in results:
        assert all(torch.equal(one, other) for one, other in zip(result, expected, strict=True))
    on_meta = [x.detach().to("meta").requires_grad_() for x in tensors]
    result = outcome(opaque, on_meta, documents, window)
    assert [x.shape for x in result] == [x.shape for x in expected]


# ---- what is passed to varlen_attn --------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, 2, 3, 64])
@pytest.mark.parametrize("heads", [(6, 6), (6, 2), (6, 1)])
def test_varlen_attention_equals_one_document_after_another(reference, window, heads):
    """Output and gradients in fp64, in the signatures of torch 2.11 and 2.13, which differ for unequal heads."""
    documents, tensors = Documents.of(LENGTHS), inputs(heads=heads)
    results = [outcome(function, tensors, documents, window) for function in (varlen_attention(), attend_each)]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("version", varlen_helpers.SIGNATURES)
@pytest.mark.parametrize("window, expected", [(None, (-1, 0)), (1, (0, 0)), (2, (1, 0)), (4096, (4095, 0))])
def test_each_signature_gets_offsets_the_longest_and_the_window(version, window, expected, monkeypatch):
    """torch takes (W, 0) as W tokens before the query, itself excluded. enable_gqa is passed where it exists."""
    calls = []
    if version == "2.11":
        def stub(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                 window_size=(-1, -1)):
            calls.append((cu_seq_q, cu_seq_k, max_q, max_k, return_aux, scale, window_size))
            return query
    else:
        def stub(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                 window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):
            assert enable_gqa is True and seqused_k is block_table is num_splits is None
            calls.append((cu_seq_q, cu_seq_k, max_q, max_k, return_aux, scale, window_size))
            return query
    varlen_helpers.use(monkeypatch, stub)
    documents = Documents.of((3, 200, 7))
    q, k, v = inputs((3, 200, 7))
    assert varlen_attention()(q, k, v, documents, window) is q
    offsets, same, *numbers, window_size = calls[0]
    assert offsets is same and offsets.dtype == torch.int32 and offsets.is_contiguous()
    assert offsets.tolist() == [0, 3, 203, 210]
    assert numbers == [256, 256, None, None]  # 200 rounded up to a multiple of 128; defaults
    assert window_size == expected and isinstance(window_size, tuple)  # torch compares it with a tuple


def test_torchs_own_function_accepts_the_call():
    """The installed varlen_attn, on meta, with fewer key/value heads."""
    q, k, v = (x.detach().to("meta", torch.bfloat16) for x in inputs())
    for window in (None, 3):
        out = varlen_attention()(q, k, v, Documents.of(LENGTHS, "meta"), window)
        assert out.shape == q.shape and out.dtype == q.dtype


def test_the_references_refuse_what_torch_refuses(reference):
    """Otherwise the tests above would show nothing about GQA, offsets and head sizes."""
    q, k, v = inputs()
    offsets = Documents.of(LENGTHS).offsets
    arguments = dict(cu_seq_q=offsets, cu_seq_k=offsets, max_q=30, max_k=30, window_size=(-1, 0))
    if reference is varlen_helpers.varlen_attn_2_11:
        with pytest.raises(TypeError, match="enable_gqa"):
            reference(q, k, v, **arguments, enable_gqa=True)
    else:
        with pytest.raises(ValueError, match="Try setting enable_gqa=True"):
            reference(q, k, v, **arguments)
    for wrong in (dict(cu_seq_q=offsets.long(), cu_seq_k=offsets.long()), dict(max_q=29, max_k=29),
                  dict(window_size=[-1, 0])):
        with pytest.raises(AssertionError):
            reference(q, q, q, **{**arguments, **wrong})


# ---- capped scores -----------------------------------------------------------------------------------------------


def plainly_capped(q, k, v, window, cap, scale):
    """Attention of one document with capped scores: the definition, with all scores at once."""
    past, group = len(k) - len(q), q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    scores = cap * torch.tanh(q.transpose(0, 1) @ k.mT * scale / cap)
    visible = torch.ones(len(q), k.shape[1], dtype=torch.bool).tril(past)
    visible = visible.triu(past + 1 - window) if window else visible
    return (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v).transpose(0, 1)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("block", [2**22, 200])
def test_capped_attention_equals_its_definition(window, block, monkeypatch):
    """Values and gradients in fp64 to 1e-12, of documents in one block of queries or in many, and with a cache."""
    from ops import soft_cap

    monkeypatch.setattr(soft_cap, "BLOCK", block)
    documents, tensors = Documents.of(LENGTHS), [x.detach().requires_grad_() for x in inputs()]
    q, k, v = tensors
    y = soft_cap.soft_capped(1.5)(q, k, v, documents, window, 0.7)
    parts = zip(*(x.split(LENGTHS) for x in tensors))
    expected = torch.cat([plainly_capped(*part, window, 1.5, 0.7) for part in parts])
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-10)
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    for result, exact in zip(*(torch.autograd.grad((x * weights).sum(), tensors) for x in (y, expected))):
        torch.testing.assert_close(result, exact, atol=1e-12, rtol=1e-10)
    cached = soft_cap.soft_capped(1.5)(q[-3:], k, v, Documents.of((3,)), window, 0.7)
    torch.testing.assert_close(cached, plainly_capped(q[-3:], k, v, window, 1.5, 0.7), atol=1e-12, rtol=1e-10)


def test_capped_attention_never_holds_all_scores(monkeypatch):
    """The largest tensor of a forward and backward is that of a block of queries; q, k, v, the output and a logsumexp
    are kept. On meta it runs without a value."""
    from ops import soft_cap

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.n = max(self.n, result.numel())
            return result

    monkeypatch.setattr(soft_cap, "BLOCK", 2**13)
    length, H, K, D, kept = 300, 4, 2, 8, []
    q, k, v = (torch.randn(length, n, D, requires_grad=True) for n in (H, K, K))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        y = soft_cap.soft_capped(2.0)(q, k, v, Documents.of((length,)), None)
    assert sorted(kept) == sorted([(length, H, D), (length, K, D), (length, K, D), (length, H, D), (length, H), (2,)])
    with Largest() as largest:
        soft_cap.forward(*(x.detach() for x in (q, k, v)), torch.tensor((0, length)), 0, 1.0, 2.0)
        y.sum().backward()
    assert largest.n <= max(2**13, length * H * D) < H * length**2 / 10
    q, k, v = (x.detach().to("meta").requires_grad_() for x in (q, k, v))
    soft_cap.soft_capped(2.0)(q, k, v, Documents.of((100, 200), "meta"), 50).sum().backward()
    assert q.grad.shape == q.shape and k.grad.shape == k.shape


def test_heads_wider_than_256_have_no_shared_keys():
    """Of torch's kernels on CUDA only the one that keeps all scores has both: keys are repeated, with the same result."""
    q, k, v = (torch.randn(9, n, 264, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).requires_grad_()
               for n in (4, 2, 2))
    y = attend_each(q, k, v, Documents.of((9,)), 4)
    expected = plainly_capped(q, k, v, 4, 1e9, 264**-0.5)
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-6)
    for result, exact in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (y, expected))):
        torch.testing.assert_close(result, exact, atol=1e-6, rtol=1e-6)


# ---- when it is used ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device, dtype, head_dim, capability, fits", [
    ("cuda", "bfloat16", 64, (9, 0), True), ("cuda", "bfloat16", 128, (8, 0), True),
    ("cuda", "bfloat16", 256, (9, 0), True), ("cuda", "bfloat16", 8, (8, 9), True),
    ("cuda", "bfloat16", 264, (9, 0), False), ("cuda", "bfloat16", 20, (9, 0), False),
    ("cuda", "float32", 64, (9, 0), False), ("cuda", "bfloat16", 64, (7, 5), False),
    ("meta", "bfloat16", 64, None, True), ("meta", "float32", 64, None, False), ("meta", "bfloat16", 20, None, False),
    ("cpu", "bfloat16", 64, None, False), ("cpu", "float32", 64, None, False), ("mps", "bfloat16", 64, None, False),
])
def test_when_varlen_attn_is_used(device, dtype, head_dim, capability, fits, monkeypatch):
    """bf16 on a GPU with FlashAttention, which needs compute capability 8.0, for head sizes that it has."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    x = SimpleNamespace(device=torch.device(device), dtype=getattr(torch, dtype))
    assert fits_varlen(x, head_dim) is fits
    function = attention.attend_function(x, head_dim, cached=False, compiled=False)
    assert (function is not attend_each) is fits
    assert attention.attend_function(x, head_dim, cached=True, compiled=False) is attend_each


def test_generation_does_not_use_varlen_attn(monkeypatch):
    """Keys from a cache are more than the queries. The reference would give NaN for the rest."""
    net = fresh()
    expected = list(generate(net, [3, 1, 4], 8, eos_ids=()))

    def refuse(*_, **__):
        raise AssertionError("called")

    varlen_helpers.use(monkeypatch, refuse)
    assert list(generate(net, [3, 1, 4], 8, eos_ids=())) == expected


# ---- the laws of packing through varlen_attn ----------------------------------------------------------------------


def fresh(use_lora=False, checkpointed_blocks=0, **changes):
    """A small model with random weights and head size 16; with adapters whose B is not zero."""
    torch.manual_seed(0)
    net = small_model(use_lora, checkpointed_blocks=checkpointed_blocks, **changes)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.1)
    return net


def loss_and_gradients(net, tokens, lengths, targets):
    loss = model_loss(net, tokens, lengths, targets)
    loss.backward()
    result = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    net.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), **result}


def assert_same(results, expected, zero=()):
    """Tensors by name are equal within 1e-5 of the largest element; those of the modules `zero` are rounding errors."""
    for name, value in expected.items():
        scale = value.abs().max().item()
        if any(f".{module}." in name for module in zero):
            assert max(scale, results[name].abs().max().item()) < 1e-5, name
            continue
        assert scale > 1e-2, name
        torch.testing.assert_close(results[name], value, atol=1e-5 * scale, rtol=1e-5, msg=name)


def window(size, **more):
    """Keys of config.json: a window in both layers, or, with max_window_layers=1, in the second one."""
    return dict(use_sliding_window=True, sliding_window=size, max_window_layers=0, **more)


@pytest.mark.parametrize("changes", [
    {}, window(1), window(2), window(3), {**window(3), "max_window_layers": 1}, dict(num_key_value_heads=6),
    dict(checkpointed_blocks=1), dict(checkpointed_blocks=2), dict(use_lora=True),
    dict(use_lora=True, checkpointed_blocks=1), {**window(2), "checkpointed_blocks": 2, "num_key_value_heads": 1}],
    ids=str)
def test_packed_documents_are_as_if_alone(reference, changes):
    """Logits, loss and gradients: those of each document alone through varlen_attn, and those of a model that attends
    to one document after another."""
    net = fresh(**changes)
    zero = ("q_proj", "k_proj") if changes == window(1) else ()  # a token that sees only itself has no choice
    tokens, targets = (torch.randint(512, (sum(LENGTHS),), generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    targets[::4] = -100
    packed = loss_and_gradients(net, tokens, LENGTHS, targets)
    with torch.no_grad():
        packed["logits"] = net(tokens, Documents.of(LENGTHS))
        logits = torch.cat([net(part, Documents.of((len(part),))) for part in tokens.split(LENGTHS)])
    alone = [loss_and_gradients(net, part, (len(part),), target)
             for part, target in zip(tokens.split(LENGTHS), targets.split(LENGTHS))]
    assert_same(packed, {"logits": logits, **{name: sum(one[name] for one in alone) for name in alone[0]}}, zero)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "fits_varlen", lambda x, head_dim: False)
        each = loss_and_gradients(net, tokens, LENGTHS, targets)
        with torch.no_grad():
            each["logits"] = net(tokens, Documents.of(LENGTHS))
    assert_same(packed, each, zero)


# ---- the number of operations -------------------------------------------------------------------------------------


def operations(lengths, layers, checkpointed_blocks=0):
    """Operations of a forward and backward of Qwen2.5-0.5B's shape in bf16, on meta; all tokens have a target."""
    config = dict(model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=layers,
                  vocab_size=151936, num_attention_heads=14, num_key_value_heads=2, rope_theta=1e6,
                  tie_word_embeddings=True, rms_norm_eps=1e-6)
    with torch.device("meta"):
        net = CausalLM(ModelConfig.from_dict(config), checkpointed_blocks).bfloat16()
        net.tie_weights()
        tokens = torch.zeros(sum(lengths), dtype=torch.long)
    documents = Documents.of(lengths, "meta")
    with Operations() as counted:
        net(tokens, documents, tokens, tokens).total.backward()
    return counted.counts


def test_a_micro_batch_of_many_documents_takes_few_operations():
    """64 documents in 24 layers: each layer calls varlen_attn once, and at most 5,000 operations are launched. With one
    attention a document and layer they are ten times as many."""
    counts = operations([256] * 64, 24)
    assert counts["_varlen_attn"] == counts["_varlen_attn_backward"] == 24
    assert counts.total() <= 5000
    assert not any("scaled_dot_product" in name for name in counts)


def test_the_number_of_operations_does_not_depend_on_the_documents():
    """A checkpointed block runs its attention once more."""
    for k in (0, 1):
        many, few = operations([32] * 64, 2, k), operations([256] * 8, 2, k)
        assert many == few and many["_varlen_attn"] == 2 + k and many["_varlen_attn_backward"] == 2
