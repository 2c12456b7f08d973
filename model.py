"""A decoder-only transformer with Hugging Face's own parameter names, and the loss that never holds its logits.

Owns the architecture of Qwen2/2.5, Qwen3, Llama 2/3.x (SmolLM2 is one) and Mistral, read from config.json. It does
not know where weights come from, how many processes there are, or what a chat is.

A micro-batch is one flat row of documents, one after another and without padding; each attends to itself alone, with
positions from 0. Shapes: N tokens of the row, C hidden size, H query heads, K key/value heads, D head_dim, V words.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # a target that is not trained

# The largest sizes a config.json may have, beyond any model there is: a layer each takes time to make even where none
# takes memory, and numbers of elements must fit 64 bits.
LARGEST = {"vocab_size": 2**24, "hidden_size": 2**17, "intermediate_size": 2**20, "num_hidden_layers": 2**10,
           "num_attention_heads": 2**12, "num_key_value_heads": 2**12, "head_dim": 2**13}

# What config.json leaves unsaid about a family: where its linear layers have biases, whether queries and keys are
# normalised, and the defaults of Hugging Face's configuration classes for keys that a file may leave out.
FAMILIES = {
    "qwen2": dict(qkv_bias=True, o_bias=False, qk_norm=False, head_dim=None, kv_heads=32, window=4096),
    "qwen3": dict(qkv_bias=None, o_bias=None, qk_norm=True, head_dim=128, kv_heads=32, window=4096),
    "llama": dict(qkv_bias=None, o_bias=None, qk_norm=False, head_dim=None, kv_heads=None, window=None),
    "mistral": dict(qkv_bias=False, o_bias=False, qk_norm=False, head_dim=None, kv_heads=8, window=4096),
}  # None: config.json decides (attention_bias; hidden_size / num_attention_heads; num_attention_heads)


@dataclass
class ModelConfig:
    """config.json, checked. Names are Hugging Face's; what would change the function and is not built is refused."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict  # {} or {"rope_type": "linear" | "llama3", ...}
    tie_word_embeddings: bool
    sliding_windows: tuple  # one entry a layer: how many tokens back it sees, itself included; None is all
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool

    @classmethod
    def from_dict(cls, config):
        """Read a parsed config.json.

        Raises ValueError for a model_type, an activation, a rope scaling or another setting that is not built here:
        a model that loads and computes something slightly else would be worse.
        """
        if not isinstance(config, dict):
            raise ValueError(f"config.json must be a JSON object, it is {config!r:.60}")
        kind = config.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise ValueError(f"config.json: model_type {kind!r:.60} is not supported; these are: {', '.join(FAMILIES)}")
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for key in LARGEST:
            value = config.get(key)
            if (key in sizes or value) and (type(value) is not int or not 1 <= value <= LARGEST[key]):
                raise ValueError(f"config.json: {key} is {value!r:.60}; it must be a whole number from 1 to "
                                 f"{LARGEST[key]:,}")
        only = {"hidden_act": "silu", "attention_dropout": 0, "partial_rotary_factor": 1, "quantization_config": None}
        for key, value in only.items():
            if config.get(key, value) not in (value, None):
                raise ValueError(f"config.json: {key} is {config[key]!r:.60}; only {value!r} is supported")
        for key, low in (("rms_norm_eps", 0), ("rope_theta", 1), ("sliding_window", 1)):
            check_number(config, key, low)
        for key in ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"):
            if config.get(key) not in (None, True, False):
                raise ValueError(f"config.json: {key} is {config[key]!r:.60}; it must be true or false")

        family = FAMILIES[kind]
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or family["head_dim"] or config["hidden_size"] // heads
        kv_heads = config.get("num_key_value_heads", family["kv_heads"]) or heads
        if heads % kv_heads or head_dim % 2:
            raise ValueError(f"config.json: {heads} attention heads, {kv_heads} key/value heads, head_dim {head_dim}: "
                             "the first must be a multiple of the second, and head_dim even")
        bias = bool(config.get("attention_bias", False))
        return cls(
            **{key: config[key] for key in sizes}, model_type=kind, num_key_value_heads=kv_heads, head_dim=head_dim,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6), tie_word_embeddings=config.get("tie_word_embeddings", False),
            sliding_windows=sliding_windows(config), qk_norm=family["qk_norm"],
            qkv_bias=bias if family["qkv_bias"] is None else family["qkv_bias"],
            o_bias=bias if family["o_bias"] is None else family["o_bias"],
            mlp_bias=bool(config.get("mlp_bias", False)) and kind == "llama", **rope_settings(config))


def check_number(config, key, low):
    """Raise ValueError unless a key of config.json, if it is there, is a finite number of at least `low`."""
    value = config.get(key)
    if value is not None and (type(value) not in (int, float) or not low <= value < 1e30):
        raise ValueError(f"config.json: {key} is {value!r:.60}; it must be a number of at least {low}")


def rope_settings(config):
    """rope_theta and rope_scaling of a config.json, in today's spelling (rope_parameters) or the earlier one."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: rope scaling must be an object, it is {rope!r:.60}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    needs = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                                                              "original_max_position_embeddings")}
    if not isinstance(kind, str) or kind not in needs or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"config.json: rope scaling {rope!r:.200} is not supported; rope_type may be "
                         f"{', '.join(needs)}")
    missing = [key for key in needs[kind] if key not in rope]
    if missing:
        raise ValueError(f"config.json: rope scaling {rope!r:.200} lacks {', '.join(missing)}")
    for key in ("rope_theta", *needs[kind]):
        check_number(rope, key, 0)
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    return dict(rope_theta=float(theta), rope_scaling={} if kind == "default" else {**rope, "rope_type": kind})


def sliding_windows(config):
    """How many tokens back each layer sees, as Hugging Face's configuration classes read it."""
    layers = config["num_hidden_layers"]
    window = config.get("sliding_window", FAMILIES[config["model_type"]]["window"])
    if config["model_type"] == "llama" or window is None:
        return (None,) * layers
    if config["model_type"] == "mistral":
        return (window,) * layers
    if not config.get("use_sliding_window", False):
        return (None,) * layers
    check_number(config, "max_window_layers", 0)
    first = config.get("max_window_layers", 28)
    kinds = config.get("layer_types") or ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or any(
            kind not in ("full_attention", "sliding_attention") for kind in kinds):
        raise ValueError(f"config.json: layer_types {kinds!r:.200} must be full_attention or sliding_attention, one a "
                         "layer")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def rope_cos_sin(positions, config):
    """Cosine and sine of the rotary angles, (N, 1, D/2) each, fp32. Source: RoFormer; Llama 3.1's reference scaling.

    Computed anew for each micro-batch (a few thousand numbers), so that there is no buffer to place, save or cast.
    """
    D, scaling = config.head_dim, config.rope_scaling
    frequency = config.rope_theta ** -(torch.arange(0, D, 2, device=positions.device, dtype=torch.float32) / D)
    if scaling.get("rope_type") == "linear":
        frequency = frequency / scaling["factor"]
    elif scaling.get("rope_type") == "llama3":  # long waves are slowed by `factor`, short ones kept, smooth between
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * kept + frequency / scaling["factor"] * (1 - kept)
    angle = positions[:, None, None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn each pair (i, i + D/2) of x (N, H, D) by its angle; in fp32, back in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)


def attend(q, k, v, lengths, window):
    """Causal attention, each document on its own.

    q (N, H, D), k and v (M, K, D): documents one after another, `lengths` tokens of each; of a single document there
    may be more keys than queries, the earlier ones from a cache. One call a document: no mask is built and nothing
    is computed across documents (on CPU 179 ms against 304 ms for one masked call, 1,024 tokens in six documents).
    """
    outputs, q_lengths = [], lengths.of_each
    k_lengths = q_lengths if len(q_lengths) > 1 else k.shape[0]
    for q, k, v in zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths)):
        T, past = q.shape[0], k.shape[0] - q.shape[0]
        causal, mask = T > 1 and past == 0, None
        if (past and T > 1) or (window and window < k.shape[0]):
            mask = torch.ones(T, past + T, dtype=torch.bool, device=q.device).tril(past)
            causal, mask = False, mask.triu(past + 1 - window) if window else mask
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, T, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
        outputs.append(y[0].transpose(0, 1))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


class Lengths:
    """The tokens of each document, as an object that torch.compile only hands on. It looks into a tuple, and would
    compile anew for each number of documents."""

    def __init__(self, of_each):
        self.of_each = of_each


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C, D, H, K = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.window, self.attend = D, config.sliding_windows[layer], attend
        self.q_proj = nn.Linear(C, H * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(D, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(D, eps=config.rms_norm_eps)

    def forward(self, x, cos, sin, lengths, past=None):
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, H, D); the head count is read off the tensor
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, K, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past is not None:  # this layer's earlier keys and values, of the one document that is being generated
            k = past["k"] = torch.cat((past["k"], k)) if "k" in past else k
            v = past["v"] = torch.cat((past["v"], v)) if "v" in past else v
        return self.o_proj(self.attend(q, k, v, lengths, self.window).flatten(1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x, cos, sin, lengths, past=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, lengths, past)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        # not Embedding's own first values, which on meta import torch's compiler: a second
        first = torch.empty(config.vocab_size, config.hidden_size).uniform_(-1, 1)
        self.embed_tokens = nn.Embedding.from_pretrained(first, freeze=False)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False

    def forward(self, tokens, lengths, past=None):
        start = past[0]["k"].shape[0] if past and past[0] else 0
        positions = torch.cat([torch.arange(start, start + n) for n in lengths]).to(tokens.device, non_blocking=True)
        cos, sin = rope_cos_sin(positions, self.config)
        lengths = Lengths(lengths)
        x = self.embed_tokens(tokens)  # (N, C)
        for i, block in enumerate(self.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # Keeps the block's input only and runs it again in backward: +1/3 of the work. Never re-entrant:
                # that one gives no gradient at all where a block's input needs none (frozen embeddings, LoRA).
                x = checkpoint(block, x, cos, sin, lengths, use_reentrant=False)
            else:
                x = block(x, cos, sin, lengths, past[i] if past else None)
        return self.norm(x)


class CausalLM(nn.Module):
    """The whole model; parameters carry the checkpoint's names (model.layers.0.self_attn.q_proj.weight, ...)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss = chunked_cross_entropy
        self.tie_weights()

    def compile_blocks(self):
        """Let torch.compile fuse what surrounds attention, once for all blocks and all row lengths. Attention stays as
        it is: its loop over documents would be compiled anew for each packing."""
        for block in self.model.layers:
            block.self_attn.attend = torch.compiler.disable(attend)
            block.compile(dynamic=True)

    def tie_weights(self):
        """Make head and embedding one storage where config.json says so; again after anything that moves parameters."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens, lengths, targets=None, each=None, past=None):
        """Logits, or the summed loss where targets are given.

        tokens   (N,)  int64; documents one after another
        lengths        tuple of ints with sum N: the tokens of each document
        targets  (N,)  int64; what each position has to predict (already shifted), or IGNORE
        each     (N,)  fp32, zeros; if given, the loss of each target is written into it
        past           a dict a layer, which keeps keys and values of earlier calls: logits of the last token only
        returns  (N, V) logits, or () fp32: nats summed over the targets; the caller divides
        """
        hidden = self.model(tokens, lengths, past)
        if targets is None:
            return self.lm_head(hidden if past is None else hidden[-1:])
        return self.loss(hidden, self.lm_head.weight, targets, each=each)


def chunked_cross_entropy(hidden, weight, targets, chunk=256, first=0, combine=None, each=None):
    """Next-token loss, summed, without the (N, V) logits: only target rows reach the head, `chunk` at a time.

    hidden   (N, C)  after the final norm
    weight   (V, C)  lm_head, possibly the tied embedding
    targets  (N,)    int64; rows with IGNORE contribute nothing and cost nothing
    each     (N,)    fp32, if given: takes the loss of each target
    returns  ()      fp32, nats summed over the targets

    weight may be a part of the vocabulary, from word `first` on; combine(tensor, "max" or "sum") then combines a
    tensor over all parts in place.
    """
    rows = (targets != IGNORE).nonzero().squeeze(1)  # a device sync on CUDA: the number of targets decides the shapes
    losses = torch.empty(len(rows), dtype=torch.float32, device=hidden.device)
    total = _ChunkedCrossEntropy.apply(hidden[rows], weight, targets[rows], losses, chunk, first, combine,
                                       torch.is_grad_enabled())
    if each is not None:
        each[rows] = losses
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Forms the gradient of each chunk in forward, while its logits are at hand: nothing is computed twice, and one
    (chunk, V) buffer is alive instead of the three (N, V) ones of plain cross-entropy. The price is that the
    gradients of hidden and weight, which backward would make anyway, live from forward on."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, losses, chunk, first, combine, grad_enabled):
        combine = combine or (lambda tensor, how: None)
        hidden_grad = torch.empty_like(hidden) if grad_enabled and ctx.needs_input_grad[0] else None
        weight_grad = None
        if grad_enabled and ctx.needs_input_grad[1]:
            weight_grad = torch.empty_like(weight, dtype=torch.float32)  # whatever the dtype, as it sums over chunks
            if not len(targets) or hidden.dtype != torch.float32:
                weight_grad.zero_()  # otherwise the first chunk's product overwrites it
        buffer = hidden.new_empty(min(chunk, len(targets)), weight.shape[0])  # for all chunks: new memory costs time
        for start in range(0, len(targets), chunk):
            h, t = hidden[start : start + chunk], targets[start : start + chunk, None] - first
            logits = torch.mm(h, weight.T, out=buffer[: len(h)]).float()  # (chunk, V); from here on changed in place
            largest = logits.amax(dim=1, keepdim=True)
            combine(largest, "max")
            logits -= largest
            inside = ((t >= 0) & (t < weight.shape[0])).float()  # 1 where the target is among these words
            t = t.clamp(0, weight.shape[0] - 1)
            picked = logits.gather(1, t) * inside
            sums = torch.cat((logits.exp_().sum(dim=1, keepdim=True), picked), dim=1)
            combine(sums, "sum")
            torch.sub(sums[:, 0].log(), sums[:, 1], out=losses[start : start + chunk])
            if hidden_grad is None and weight_grad is None:
                continue
            logits /= sums[:, :1]  # the probabilities; less the one-hot target it is the gradient of the logits
            logits.scatter_add_(1, t, -inside)
            if hidden_grad is not None:
                torch.mm(logits.to(h.dtype), weight, out=hidden_grad[start : start + chunk])
            if weight_grad is not None and h.dtype == torch.float32:
                weight_grad.addmm_(logits.T, h, beta=min(start, 1))  # without a second (V, C) buffer
            elif weight_grad is not None:
                weight_grad += logits.to(h.dtype).T @ h
        if hidden_grad is not None:
            combine(hidden_grad, "sum")
        ctx.grads = hidden_grad, weight_grad if weight_grad is None else weight_grad.to(weight.dtype)
        return losses.sum()

    @staticmethod
    def backward(ctx, grad):
        if ctx.grads is None:
            raise RuntimeError("the loss has been differentiated once already, and its gradients were scaled in place; "
                               "compute the loss anew")
        hidden_grad, weight_grad = ctx.grads
        ctx.grads = None
        for g in (hidden_grad, weight_grad):
            if g is not None:
                g.mul_(grad)
        return hidden_grad, weight_grad, None, None, None, None, None, None


@torch.no_grad()
def generate(model, tokens, max_new_tokens, stop_ids, sample=lambda logits: int(logits.argmax())):
    """Yield new token ids one by one, with a key/value cache; stops after one of `stop_ids`, which is yielded too.

    tokens  list of ids, the rendered prompt;  sample  maps (V,) logits to an id, greedy by default
    """
    past = [{} for _ in model.model.layers]
    device = model.lm_head.weight.device
    for _ in range(max_new_tokens):
        token = sample(model(torch.tensor(tokens, device=device), (len(tokens),), past=past)[0])
        yield token
        if token in stop_ids:
            return
        tokens = [token]
