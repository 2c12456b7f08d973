"""The gated delta rule, a linear attention, within each document of a micro-batch.

A linear attention head has a matrix, the state S (D, E), in place of the keys and values of all earlier
tokens. Token t first forgets a part of it, then corrects what the state answers to its key, then reads:

    S <- exp(g_t) S        S <- S + k_t^T beta_t (v_t - k_t S)        y_t = q_t S / sqrt(D)

q and k are normalised to length 1. Sources: Gated Delta Networks (arXiv 2412.06464); computed in chunks as in
Parallelizing Linear Transformers with the Delta Rule over Sequence Length (arXiv 2406.06484).

No chunk has tokens of two documents, so each document starts with S = 0. What fills up a document's last
chunk has k = 0, beta = 0 and g = 0, which changes nothing.

Shapes: N tokens, K key heads, H value heads (each key head serves H / K of them, one after another), D the
size of a key and query, E of a value, M chunks of CHUNK tokens.
"""

import importlib.util

import torch

from ops.opaque import operation

CHUNK = 64  # tokens of a chunk: larger ones take more products within a chunk, smaller ones more steps
EPS = 1e-6  # of the normalisation of q and k
HAS_FLA = importlib.util.find_spec("fla") is not None  # flash-linear-attention: Triton kernels for CUDA
# tokens times heads that are computed at a time: backward needs about 11 KB for each: 45 MB and 0.7 GB
PIECE, GPU_PIECE = 2**12, 2**16


class Chunks:
    """How a micro-batch is cut into chunks; made once per micro-batch, for all layers.

    place   (N,) int64, on the model's device: the row of each token among the M * CHUNK rows of the chunks.
            First come the first chunks of all documents, longest document first, then all second ones, ...
    active  (steps + 1,) int64, on the CPU: how many documents have a first, a second, ... chunk; at last 0

    The documents that have not ended are always the first ones, so a step over all of them takes a slice.
    A tensor, because torch.compile would specialise on numbers; on the CPU, because the host reads it.
    """

    def __init__(self, lengths, device):
        lengths = torch.tensor(lengths, device="cpu")
        counts, order = (-(-lengths // CHUNK)).sort(descending=True, stable=True)
        self.active = (counts > torch.arange(int(counts[0]) + 1, device="cpu")[:, None]).sum(dim=1)
        first = self.active.cumsum(0) - self.active  # chunks before each step
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device="cpu"))
        position = torch.arange(int(lengths.sum()), device="cpu")
        position -= (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        chunk = first[position // CHUNK] + rank.repeat_interleave(lengths)
        self.place = (chunk * CHUNK + position % CHUNK).to(device, non_blocking=True)


def cut(documents):
    """Give the Documents their Chunks. Call it before compiled code, which can't compute them."""
    documents.chunks = Chunks(documents.lengths, documents.positions.device)
    return documents.chunks


def delta_rule(q, k, v, g, beta, documents, past=None):
    """The gated delta rule within each document. Returns y, (N, H, E), of v's dtype.

    q, k       (N, K, D), not yet normalised
    v          (N, H, E)
    g          (N, H), log of what the state keeps, at most 0
    beta       (N, H), how much of its answer is corrected, 0 to 1
    documents  Documents whose lengths sum to N
    past       dict of one document's earlier tokens, updated in place: "state", (H, D, E). No gradient

    Computed in fp32, or fp64 for fp64. Backward computes it again from the arguments, which are all that is
    kept. In 16 bits on CUDA, fla computes it if it is installed.
    """
    if past is not None:
        step = one_token if len(q) == 1 else several_tokens
        y, past["state"] = step(q, k, v, g, beta, past.get("state"))
        return y
    if uses_fla(q):
        rule = opaque_fla_rule if torch.compiler.is_compiling() else fla_rule
        return rule(q, k, v, wide(g), beta, documents.offsets)
    chunks = documents.chunks or cut(documents)
    return chunked(q, k, v, g, beta, chunks.place, chunks.active)


def uses_fla(q):
    return HAS_FLA and q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16)


def fla_rule(q, k, v, g, beta, offsets):
    """delta_rule by flash-linear-attention. It takes a batch of 1, the offsets of the documents, and fp32 g.

    All layers pass the same tensor of offsets, for which fla computes and keeps its own chunks once. The
    heads are repeated here, because older versions take as many key heads as value heads.
    """
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # installed by few, and slow to import

    q, k = (x.repeat_interleave(v.shape[1] // x.shape[1], dim=1) for x in (q, k))
    q, k, v, g, beta = (x[None] for x in (q, k, v, g, beta))
    y, _ = chunk_gated_delta_rule(
        q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True, cu_seqlens=offsets)
    return y[0]


opaque_fla_rule = operation("fla_delta_rule", "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, "
                            "Tensor offsets", 5, fla_rule, like=2)


def one_token(q, k, v, g, beta, state):
    """The recurrence itself: (y, state) after one token, for a state (H, D, E) or None."""
    H, D = v.shape[1], q.shape[2]
    q, k = (normalise(wide(x))[0][0].repeat_interleave(H // x.shape[1], dim=0)[..., None] for x in (q, k))
    state = q.new_zeros(H, D, v.shape[2]) if state is None else state
    state = state * wide(g)[0].exp()[:, None, None]
    correction = wide(beta)[0, :, None] * (wide(v)[0] - (k * state).sum(dim=1))
    state = state + k * correction[:, None]
    return ((q * state).sum(dim=1) * D**-0.5)[None].to(v.dtype), state


def several_tokens(q, k, v, g, beta, state):
    """(y, state) after several tokens of one document, for a state (H, D, E) or None."""
    chunks = Chunks((len(q),), q.device)
    x = Inside(q, k, v, g, beta, chunks.place, chunks.active)
    state = x.first_states(chunks.active) if state is None else state.clone()
    y = read(x, chunks.active, state)
    return to_tokens(y, chunks.place, x.H).to(v.dtype), state


# ---- in chunks ------------------------------------------------------------------------------------------


def wide(x):
    """x in fp32, or in fp64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def normalise(x):
    """x / |x| over the last dimension, and 1 / |x|."""
    scale = torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + EPS)
    return x * scale, scale


def to_chunks(x, place, M):
    """(N, H, n) -> (M * H, CHUNK, n), with zeros where a document's last chunk is filled up."""
    rows = x.new_zeros(M * CHUNK, *x.shape[1:]).index_copy_(0, place, x)
    return rows.unflatten(0, (M, CHUNK)).transpose(1, 2).flatten(0, 1)


def to_tokens(x, place, H):
    """(M * H, CHUNK, n) -> (N, H, n)"""
    return x.unflatten(0, (-1, H)).transpose(1, 2).flatten(0, 1).index_select(0, place)


def steps(active, H):
    """(slice of the M * H chunks, heads in it) of all documents' first chunks, of their second chunks, ..."""
    start = 0
    for n in active.tolist()[:-1]:
        yield slice(start, start + n * H), n * H
        start += n * H


class Inside:
    """What is computed within chunks, without the states: for all chunks at once.

    q, k, v    (M * H, CHUNK, D or E); q and k normalised
    beta       (M * H, CHUNK, 1)
    decay      (M * H, CHUNK, 1): what each token sees of the state before its chunk
    rest       (M * H, CHUNK, 1): what the state after the chunk has of each token
    between    (M * H, CHUNK, CHUNK): what token i sees of token j; 0 for j > i
    attention  (M * H, CHUNK, CHUNK): between_ij q_i k_j
    solved     (M * H, CHUNK, CHUNK): the inverse of I + beta_i between_ij k_i k_j over j < i. It turns what
               tokens would write that know only the state before the chunk into what the recurrence writes
    """

    def __init__(self, q, k, v, g, beta, place, active):
        self.H, M = v.shape[1], int(active.sum())
        repeats = self.H // k.shape[1]
        (q, q_scale), (k, k_scale) = normalise(wide(q)), normalise(wide(k))
        self.q, self.k, self.q_scale, self.k_scale = (
            to_chunks(x.repeat_interleave(repeats, dim=1), place, M) for x in (q, k, q_scale, k_scale))
        self.v, self.beta = to_chunks(wide(v), place, M), to_chunks(wide(beta)[..., None], place, M)
        # fp64: sums over a chunk may reach hundreds, and their small differences matter
        total = to_chunks(g[..., None].double(), place, M).cumsum(dim=1)
        self.decay, self.rest = (x.exp().to(q.dtype) for x in (total, total[:, -1:] - total))
        later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
        self.between = (total - total.mT).to(q.dtype).masked_fill_(later, -torch.inf).exp_()
        self.attention = (self.q @ self.k.mT).mul_(self.between)
        identity = torch.eye(CHUNK, dtype=q.dtype, device=q.device).expand_as(self.between)
        self.solved = torch.linalg.solve_triangular(  # reads the part below the diagonal
            self.keys().mul_(self.beta), identity, upper=False, unitriangular=True)

    def keys(self):
        """(M * H, CHUNK, CHUNK): between_ij k_i k_j."""
        return (self.k @ self.k.mT).mul_(self.between)

    def first_states(self, active):
        """Zeros, (documents * H, D, E)."""
        return self.q.new_zeros(int(active[0]) * self.H, self.q.shape[2], self.v.shape[2])

    def errors(self, span, state):
        """v minus what the state before the chunk answers, for a slice of the chunks and their states."""
        return self.v[span] - (self.k[span] @ state).mul_(self.decay[span])

    def corrections(self, span, errors):
        """What the tokens of a slice of the chunks write."""
        return self.solved[span] @ (errors * self.beta[span])

    def advance(self, span, state, corrections):
        """Turn the states before a slice of the chunks into those after it, in place."""
        state.mul_(self.decay[span][:, -1:]).baddbmm_((self.k[span] * self.rest[span]).mT, corrections)


def read(x, active, state):
    """y in chunks, (M * H, CHUNK, E). state (documents * H, D, E) becomes that after each document."""
    y = torch.empty_like(x.v)
    for span, n in steps(active, x.H):
        corrections = x.corrections(span, x.errors(span, state[:n]))
        torch.bmm(x.q[span], state[:n], out=y[span])
        y[span].mul_(x.decay[span]).baddbmm_(x.attention[span], corrections)
        x.advance(span, state[:n], corrections)
    return y.mul_(x.q.shape[2] ** -0.5)


def gradients(x, dy, active):
    """The gradients of q, k, v, g and beta, in chunks, for dy (M * H, CHUNK, E). d means the gradient of."""
    dy = dy * x.q.shape[2] ** -0.5
    state = x.first_states(active)
    states = state.new_empty(len(dy), *state.shape[1:])  # before each chunk
    errors, corrections = torch.empty_like(dy), torch.empty_like(dy)
    for span, n in steps(active, x.H):
        states[span] = state[:n]
        errors[span] = x.errors(span, state[:n])
        corrections[span] = x.corrections(span, errors[span])
        x.advance(span, state[:n], corrections[span])
    dread = dy * x.decay  # of q S
    dcorrections = x.attention.mT @ dy
    dscaled = torch.empty_like(dy)  # of beta * errors
    dstate, dstates = torch.zeros_like(state), torch.empty_like(states)  # after each chunk
    for span, n in reversed(list(steps(active, x.H))):
        dS = dstates[span] = dstate[:n]
        dcorrections[span].baddbmm_(x.k[span] * x.rest[span], dS)
        torch.bmm(x.solved[span].mT, dcorrections[span], out=dscaled[span])
        danswer = dscaled[span] * (x.beta[span] * -x.decay[span])  # of k S
        dS.mul_(x.decay[span][:, -1:]).baddbmm_(x.k[span].mT, danswer).baddbmm_(x.q[span].mT, dread[span])
    dv = dscaled * x.beta
    dbeta = (dscaled * errors).sum(2, keepdim=True)
    # through the states: what is read, what is answered, what is written
    dq = dread @ states.mT
    dk = (dv * -x.decay) @ states.mT
    dtotal = (x.q * dq).add_(x.k * dk).sum(2, keepdim=True)  # of the sums of g within chunks
    dwritten = (corrections @ dstates.mT).mul_(x.rest)
    dk += dwritten
    drest = dwritten.mul_(x.k).sum(2, keepdim=True)
    dtotal -= drest
    dtotal[:, -1] += drest.sum(1) + x.decay[:, -1] * (states.mul_(dstates)).sum((1, 2))[:, None]
    # through `attention` and `solved`
    dattention = (dy @ corrections.mT).mul_(x.between)  # of q_i k_j
    dkeys = (dscaled @ corrections.mT).neg_().tril_(-1)  # of beta_i between_ij k_i k_j
    dbetween = dkeys * x.keys()  # times `between`
    dbeta += dbetween.sum(2, keepdim=True)
    dbetween.mul_(x.beta).addcmul_(dattention, x.q @ x.k.mT)
    dtotal += dbetween.sum(2, keepdim=True) - dbetween.sum(1)[..., None]
    dkeys.mul_(x.between).mul_(x.beta)
    dq.baddbmm_(dattention, x.k)
    dk.baddbmm_(dattention.mT, x.q).baddbmm_(dkeys + dkeys.mT, x.k)
    # through the sums and the normalisation
    dg = dtotal.flip(1).cumsum(1).flip(1)
    dq, dk = ((d - unit * (unit * d).sum(2, keepdim=True)).mul_(scale)
              for d, unit, scale in ((dq, x.q, x.q_scale), (dk, x.k, x.k_scale)))
    return dq, dk, dv, dg, dbeta


def head_groups(v, K):
    """Slices of the key heads and of the value heads that are computed at a time, which bounds the memory."""
    N, H = v.shape[:2]
    repeats = H // K
    n = max(1, (PIECE if v.device.type == "cpu" else GPU_PIECE) // (N * repeats))
    for start in range(0, K, n):
        yield slice(start, start + n), slice(start * repeats, (start + n) * repeats)


@torch.library.custom_op("sft::delta_rule", mutates_args=())
def chunked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor,
            place: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """delta_rule for Chunks' place and active. One operation: torch.compile would unroll the steps."""
    y = v.new_empty(v.shape)
    for of_k, of_v in head_groups(v, q.shape[1]):
        x = Inside(q[:, of_k], k[:, of_k], v[:, of_v], g[:, of_v], beta[:, of_v], place, active)
        y[:, of_v] = to_tokens(read(x, active, x.first_states(active)), place, x.H)
    return y


@torch.library.custom_op("sft::delta_rule_backward", mutates_args=())
def chunked_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor,
    beta: torch.Tensor, place: torch.Tensor, active: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of chunked's first five arguments."""
    grads = tuple(x.new_empty(x.shape) for x in (q, k, v, g, beta))
    for of_k, of_v in head_groups(v, q.shape[1]):
        heads = of_k, of_k, of_v, of_v, of_v
        x = Inside(*(t[:, of] for t, of in zip((q, k, v, g, beta), heads)), place, active)
        dy = to_chunks(wide(grad[:, of_v]), place, int(active.sum()))
        for total, of, part in zip(grads, heads, gradients(x, dy, active)):
            part = to_tokens(part, place, x.H)
            n = total[:, of].shape[1]  # key heads have the sum over the value heads that they serve
            total[:, of] = part.unflatten(1, (n, -1)).sum(2).view_as(total[:, of])
    return grads


@chunked.register_fake
def _(q, k, v, g, beta, place, active):
    return v.new_empty(v.shape)


@chunked_backward.register_fake
def _(grad, q, k, v, g, beta, place, active):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, g, beta))


def keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, grad):
    return *chunked_backward(grad, *ctx.saved_tensors), None, None


chunked.register_autograd(backward, setup_context=keep)
