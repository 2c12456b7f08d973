"""The memory of a rank, computed from a model's names and shapes and the settings of a run, before it starts.

sft.py chooses with it what `auto` means, and says after an out-of-memory error which settings would help;
tools/plan.py prints it. It counts full micro-batches: micro_batch_size conversations of max_length tokens,
all of them targets. On a GPU the peak is that of torch.cuda.max_memory_allocated: without the CUDA context,
workspaces, NCCL's buffers and the allocator's fragmentation. On the CPU it is the memory of the process
without the imported libraries.
"""

import bisect
import functools
import math
import os
import resource
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from ops import compiler, loss, nf4, optim
from ops.activations import measure
from ranks import processes
from settings.errors import UserError

GB = 2**30
AUTO = "auto"  # the value of --micro_batch_size and --gradient_checkpointing that choose() replaces
HEAD, ALL = "head", "all"  # groups of parameters, see unsharded_bytes
HELD = 0.1  # of the device's memory: `auto` reduces a larger gradient with each micro-batch
FILL = 0.85  # of the device's memory: the rest is for what the forecast does not count
TOKENS = 2**15  # `auto` makes no larger micro-batches, unless max_length is longer: they keep a GPU busy
FIXED_TOKENS = 2048  # the fixed time of a micro-batch, as tokens that take as long: an estimate
# tp splits these layers (weight, lora_A) by input columns, the others (weight, bias, lora_B) by output rows
BY_COLUMNS = "o_proj", "down_proj"
# Heap fragmentation on the CPU, fitted to `bench.py --part plan` with glibc 2.36, which does not reuse all
# memory of freed tensors. It is a fraction of the kept activations, plus a fraction of what all blocks
# allocate one after another, plus a fraction of what the loss does. Tensors above HEAP_LIMIT bytes cause
# none: the system gets them back at once. LoRA runs lower that limit (memory.tune_malloc). Pairs: without and
# with LoRA.
KEPT_FRAGMENTATION, LOSS_FRAGMENTATION, HEAP_LIMIT = (0.1, 0.0), (0.3, 0.0), (2**25, 2**24)
BLOCK_FRAGMENTATION = 0.55, 0.62
# With several ranks, gloo's threads copy what they gather and reduce. Freed, these copies stay in the heap,
# as many as GLOO_COPIES of the largest group: 3 to 5 in a loop of both, without a model.
GLOO_COPIES = 3


@dataclass(frozen=True)
class PlannedRun:
    """What the arithmetic needs to know about a run.

    config               families.config.ModelConfig
    parameters           ((name, shape, bytes per element, is trained), ...), unsharded; a tied one once
    length               tokens per conversation
    micro_batch_size     conversations per micro-batch, which an sp group has together
    batch_size           conversations per step, over all ranks
    gradient_reduction   "step": between the micro-batches of a step each rank holds the unsharded gradient;
                         "micro_batch": its shard
    checkpointed_blocks  that many blocks, the first ones, keep only their input for backward
    compiled             torch.compile fuses the operations of a block
    state_itemsizes      {name: bytes of optimizer state per element}, from the optimizer; 8 for other names
    """

    config: object
    parameters: tuple
    length: int
    micro_batch_size: int = 1
    batch_size: int = 1
    world_size: int = 1
    tp: int = 1
    sp: int = 1
    replicas: int = 1
    gradient_reduction: str = "step"
    bf16: bool = False
    cuda: bool = False
    checkpointed_blocks: int = 0
    compiled: bool = False
    param_offload: bool = False
    optimizer_offload: bool = False
    dropout: float = 0.0
    quantize: bool = False
    async_save: bool = False
    state_itemsizes: dict = field(default_factory=dict, hash=False)
    measured: tuple = ()  # bytes per token that each block keeps, of a family with other blocks than model.py

    @classmethod
    def of(cls, model, cfg, *, world_size, cuda):
        """The PlannedRun of a model, on meta or loaded and sharded, and the settings of a run.

        cfg  sft.Config. `auto` counts as micro_batch_size 1, as checkpointing all blocks and as reducing the
             gradient once per step; see choose()
        """
        bf16 = (cfg.dtype or ("bf16" if cuda else "fp32")) == "bf16"
        is_alone = world_size == 1 and not cfg.param_offload
        adapter = model.peft_config or {}

        def itemsize(p):
            # bf16 runs: the model is bf16, except what FSDP2 casts for each use from fp32
            if not bf16 or not p.requires_grad or is_alone:
                return 2 if bf16 else p.element_size()
            return 2 if cfg.optimizer_offload and not adapter else 4

        parameters = tuple(
            (n, tuple(p.shape), itemsize(p), p.requires_grad) for n, p in model.named_parameters())
        batch_size = math.ceil(cfg.batch_tokens / cfg.max_length) if cfg.batch_tokens else cfg.batch_size
        return cls(
            config=model.config,
            parameters=parameters,
            length=cfg.max_length,
            micro_batch_size=1 if cfg.micro_batch_size == AUTO else cfg.micro_batch_size,
            batch_size=batch_size,
            world_size=world_size,
            tp=cfg.tp,
            sp=cfg.sp,
            replicas=cfg.replicas,
            gradient_reduction="step" if cfg.gradient_reduction == AUTO else cfg.gradient_reduction,
            bf16=bf16,
            cuda=cuda,
            checkpointed_blocks=checkpointed_blocks(cfg, model.config),
            compiled=is_compiled(cfg, cuda),
            param_offload=cfg.param_offload,
            optimizer_offload=cfg.optimizer_offload,
            dropout=adapter.get("lora_dropout", 0.0),
            quantize=bool(cfg.quantize),
            async_save=cfg.async_save,
            state_itemsizes=optim.state_itemsizes(model, cfg),
            measured=() if is_plain(model) else measure(
                model, bf16=bf16, fused_norms=cuda, tp=cfg.tp, sp=cfg.sp),
        )

    def state_itemsize(self, name):
        """Bytes of optimizer state per element of a parameter, without the fp32 master."""
        return self.state_itemsizes.get(name, 8)

    @property
    def dp(self):
        """Groups of ranks that read other conversations."""
        return self.world_size // (self.tp * self.sp)

    @property
    def shards(self):
        """Ranks over which FSDP2 shards each parameter."""
        return self.world_size // (self.tp * self.replicas)

    @property
    def micro_batches(self):
        """Micro-batches per step per rank."""
        return math.ceil(self.batch_size / (self.dp * self.micro_batch_size))

    @property
    def tokens(self):
        """Tokens per micro-batch, over the ranks of an sp group."""
        return self.micro_batch_size * self.length

    @property
    def rank_tokens(self):
        """Tokens of a micro-batch that a rank has; data.collate pads it to a multiple of sp."""
        return math.ceil(self.tokens / self.sp)

    @property
    def key_heads(self):
        """Key/value heads on a tp rank, with those that sp repeats: ranks/sp.py."""
        heads = self.config.num_key_value_heads // self.tp
        return heads * self.sp // math.gcd(heads, self.sp)

    @property
    def itemsize(self):
        """Bytes per element of an activation."""
        return 2 if self.bf16 else 4

    @property
    def device_type(self):
        return "cuda" if self.cuda else "cpu"

    @property
    def hidden_bytes(self):
        """Bytes of the hidden states of a micro-batch on a rank."""
        return self.rank_tokens * self.config.hidden_size * self.itemsize

    @property
    def is_sharded(self):
        """Whether FSDP2 is used; the rule of fsdp.shard."""
        return self.world_size > 1 or self.param_offload

    @property
    def has_head_group(self):
        """Whether last norm and head are an FSDP2 group of their own; the rule of fsdp.shard."""
        return self.is_sharded and not self.config.tie_word_embeddings

    @property
    def has_own_masters(self):
        """Whether trained parameters are bf16, and the optimizer has fp32 masters; the rule of sft.build."""
        return self.bf16 and not self.is_sharded

    @property
    def has_varlen_attention(self):
        """Whether one call computes the attention of all documents; the rule of ops.attention."""
        return self.cuda and self.bf16 and self.config.head_dim % 8 == 0 and self.config.head_dim <= 256

    @property
    def is_lora(self):
        return any(".lora_A." in name for name, *_ in self.parameters)

    @property
    def trains_embedding(self):
        return any(trained for name, *_, trained in self.parameters if "embed_tokens" in name)


def is_plain(model):
    """Whether the model has the blocks of model.py, for which block_activations has a formula."""
    return type(model).__module__ == "model"


def is_compiled(cfg, cuda):
    """Whether the blocks of a run are compiled. `auto`: on CUDA; if a GPU is here, as it allows."""
    if cfg.compile != AUTO:
        return cfg.compile
    return cuda and cfg.tp == 1 and (not torch.cuda.is_available() or compiler.has_compiler("cuda"))


def checkpointed_blocks(cfg, config):
    """The number of blocks that --gradient_checkpointing means: all if it is true or not yet chosen.

    cfg     sft.Config; after RunState.choose_memory its gradient_checkpointing may be that number
    config  families.config.ModelConfig
    """
    value = cfg.gradient_checkpointing
    if value is True or value == AUTO:
        return config.num_hidden_layers
    return int(value)


def check(run):
    """Raise UserError if tp, sp or replicas do not divide what they split.

    The rules are those of processes.start, tp.split and sp.split.
    """
    c, tp, world_size = run.config, run.tp, run.world_size
    c.check_tp(tp)
    sizes = c.num_attention_heads, c.num_key_value_heads, c.intermediate_size, c.vocab_size
    valid = [n for n in range(1, world_size + 1) if not any(size % n for size in (world_size, *sizes))]
    if world_size % tp or (tp > 1 and tp not in valid):
        raise UserError(f"--tp {tp} must divide the {world_size} ranks (--n_gpus) and the attention heads, "
                        f"key/value heads, intermediate_size and vocab_size, here {sizes}; "
                        f"use {' or '.join(map(str, valid))}")
    processes.check_layout(tp, run.sp, run.replicas, world_size)
    c.check_sp(run.sp, run.shards, tp)


def loss_chunk(run):
    """Targets whose logits the loss holds at a time."""
    return loss.chunk_size(run.config.vocab_size // run.tp, run.device_type)


def dequantised_values(run):
    """Values of the largest 4-bit matrix that a product dequantises at a time."""
    return min(nf4.piece_size(run.device_type), run.config.hidden_size * run.config.intermediate_size)


# ------------------------------------------------------------------------------------------------------------
# parameters


def is_split_by_tp(name, by_columns):
    """Whether tp splits a parameter; otherwise each tp rank has all of it."""
    if by_columns:
        return name.endswith(("_proj.weight", ".lora_A.weight"))
    return "norm" not in name and ".lora_A." not in name


def shard_sizes(run, name, shape):
    """(elements of a parameter on a tp rank, elements after FSDP2 on rank 0, which has the largest shard)."""
    rows, columns = tp_shape(name, shape, run.tp)
    return rows * columns, math.ceil(rows / run.shards) * columns


@functools.lru_cache(maxsize=2**15)  # plan.py --best asks for the same ones thousands of times
def tp_shape(name, shape, tp):
    """(rows, columns) of a parameter on a tp rank."""
    by_columns = any(f".{layer}." in name for layer in BY_COLUMNS)
    n_slices = tp if is_split_by_tp(name, by_columns) else 1
    rows, columns = shape[0], math.prod(shape[1:])
    return (rows, columns // n_slices) if by_columns else (rows // n_slices, columns)


def gradient_itemsize(run, itemsize):
    """Bytes per element of the gradient of a trained parameter, after it is reduced.

    Where FSDP2 would sum several micro-batches in bf16, fsdp.set_gradient_sync makes them fp32.
    """
    sums = run.gradient_reduction == "micro_batch" and run.micro_batches > 1 and run.replicas == 1
    return 4 if run.has_own_masters or (run.is_sharded and sums) else itemsize


def states(run):
    """Exact bytes of a rank's weights, reduced gradients, moments and fp32 masters, on device or host."""
    sizes = dict(weights=0, gradients=0, moments=0, masters=0)
    for name, shape, itemsize, trained in run.parameters:
        n = shard_sizes(run, name, shape)[1]
        sizes["weights"] += n * itemsize
        if trained:
            sizes["gradients"] += n * gradient_itemsize(run, itemsize)
            sizes["moments"] += run.state_itemsize(name) * n
            sizes["masters"] += 4 * n * (run.optimizer_offload or run.has_own_masters)
    return sizes


def unsharded_bytes(run, blocks, itemsize=None, only_trained=False):
    """Bytes of parameters on a tp rank, before FSDP2 shards them.

    blocks    "0": of that block; "": of all blocks; HEAD: of last norm and head where they are a group of
              their own; None: of the group of the embedding, which is the rest; ALL
    itemsize  bytes per element; None: as stored
    """
    total = 0
    for name, shape, stored, trained in run.parameters:
        if ".layers." in name:
            prefix = f"model.layers.{blocks}." if blocks else "model.layers."
            in_group = blocks not in (None, HEAD) and name.startswith(prefix)
        else:
            of_head = run.has_head_group and "embed_tokens" not in name
            in_group = blocks == (HEAD if of_head else None)
        if (in_group or blocks == ALL) and (trained or not only_trained):
            total += shard_sizes(run, name, shape)[0] * (itemsize or stored)
    return total


# ------------------------------------------------------------------------------------------------------------
# memory of a step


@functools.lru_cache(maxsize=16)
def layers_of_blocks(parameters):
    """({layer: rank of its adapter}, {layer: whether it trains}); what trains in any block counts in all."""
    lora_ranks, is_trained = {}, {}
    for name, shape, _, trained in parameters:
        if name.startswith("model.layers."):
            # model.layers.0.input_layernorm.weight, or model.layers.0.mlp.up_proj.weight
            names = name.split(".")
            layer = names[4] if "_proj" in name or "_norm" in name else names[3]
            is_trained[layer] = is_trained.get(layer) or trained  # its weight or its adapter
            if names[-2] == "lora_A":
                lora_ranks[layer] = shape[0]
    return lora_ranks, is_trained


def block_activations(run, is_first=False):
    """Bytes that autograd keeps for a block without checkpointing; test_forecast.py checks every byte.

    is_first  the first block, whose input needs no gradient if the embedding is frozen

    Of a family with other blocks: the measured bytes of the block that keeps most.
    """
    if run.measured:
        return int(run.rank_tokens * max(run.measured))
    c, w = run.config, run.itemsize
    lora_ranks, is_trained = layers_of_blocks(run.parameters)
    C, D, I = c.hidden_size, c.head_dim, c.intermediate_size // run.tp
    H, K = c.num_attention_heads // run.tp, c.num_key_value_heads // run.tp
    sizes = {"q_proj": (C, H * D), "k_proj": (C, K * D), "v_proj": (C, K * D), "o_proj": (H * D, C),
             "gate_proj": (C, I), "up_proj": (C, I), "down_proj": (I, C)}  # (inputs, outputs) of each layer
    has_frozen_input = is_first and not run.trains_embedding

    # The gradient of a weight or of lora_A needs the input. With dropout, lora_A keeps the masked input.
    def kept_inputs(*layers):
        return sizes[layers[0]][0] * any(is_trained[n] for n in layers) * (not (lora_ranks and run.dropout))

    # per token; on the CPU a norm also keeps x / rms(x)
    copies = 2 if is_trained["input_layernorm"] and not run.cuda else 1
    kept = 0 if has_frozen_input else copies * C * w + 4  # norm: x, and 1 / rms in fp32
    kept += kept_inputs("q_proj", "k_proj", "v_proj") * w
    kept += (H + K) * (copies * D * w + 4) * c.qk_norm
    # attention: q, k, v, its output, and a logsumexp per head. With sp they are of all tokens and 1 / sp of
    # the heads; keys and values are repeated where sp exceeds their heads
    kept += (2 * H + 2 * run.key_heads) * D * w + 4 * H
    # with one call per conversation their outputs are copied into one tensor, with sp into a rank's tokens
    is_copied = run.sp > 1 or (run.micro_batch_size > 1 and not run.has_varlen_attention)
    kept += kept_inputs("o_proj") * w * is_copied
    rng_state = 16 * run.has_varlen_attention
    kept += copies * C * w + 4 + kept_inputs("gate_proj", "up_proj") * w
    # gate, up, silu(gate) and the product, which down_proj keeps. Compiled, the last two are computed again,
    # but dropout keeps the product that it masked.
    kept += 2 * I * w if run.compiled else 3 * I * w + kept_inputs("down_proj") * w
    is_dora = any("lora_magnitude_vector" in name for name, *_ in run.parameters)
    for layer, rank in lora_ranks.items():
        kept += rank * w + is_dora * sizes[layer][1] * w  # lora_A's output; DoRA's output before rescaling
        if run.dropout:  # the masked input, and the mask unless the input needs no gradient
            has_mask = not has_frozen_input or layer not in ("q_proj", "k_proj", "v_proj")
            kept += sizes[layer][0] * (w + (1 if run.cuda else w) * has_mask)
    return run.rank_tokens * kept + rng_state + is_dora * sum(2 * sizes[layer][1] * w for layer in lora_ranks)


def mask_bytes(run, blocks):
    """Bytes of the masks that attention keeps for these blocks: of each window, for each conversation.

    The CPU, and CUDA in fp32, build them where a window is shorter than a conversation (ops/attention.py).
    With sp each rank has them in full: its heads see all tokens.
    """
    if run.has_varlen_attention:
        return 0
    windows = run.config.sliding_windows[blocks]
    n_masks = sum(bool(window) and window < run.length for window in windows)
    return n_masks * run.tokens * run.length * run.itemsize


def kept_bytes(run, n_blocks=None):
    """Bytes that autograd keeps for backward of the first n_blocks blocks (None: all), as forward ends."""
    n_blocks = run.config.num_hidden_layers if n_blocks is None else n_blocks
    n_checkpointed = min(run.checkpointed_blocks, n_blocks)
    kept = n_checkpointed * run.hidden_bytes + mask_bytes(run, slice(n_checkpointed, n_blocks))
    if n_blocks == n_checkpointed:
        return kept
    if run.measured:
        return kept + int(run.rank_tokens * sum(run.measured[n_checkpointed:n_blocks]))
    is_first = n_checkpointed == 0
    return kept + block_activations(run, is_first) + (n_blocks - n_checkpointed - 1) * block_activations(run)


def activations(run, block=None):
    """Bytes of activations when backward of a block (None: the last) begins: its own, recomputed, in full."""
    block = run.config.num_hidden_layers - 1 if block is None else block
    if block < run.checkpointed_blocks:
        return block * run.hidden_bytes + block_activations(run) + mask_bytes(run, slice(block, block + 1))
    return kept_bytes(run, block + 1)


def memory(run):
    """Peak bytes of a rank: `device` and `host`, what they consist of, and the `stage` of the device's peak.

    The largest of the stages of a step counts. On the CPU everything is `device`, and `host` is 0.
    """
    state, held, of_loss = states(run), held_bytes(run), loss_bytes(run)
    root, head, block = (gathered_bytes(run, group) for group in (None, HEAD, "0"))
    last, k = run.config.num_hidden_layers - 1, run.checkpointed_blocks
    finished = held or gradients_of(run, HEAD)
    # The last block stays gathered, and so does the buffer of the last gather
    buffer = (head or block) * (run.shards > 1)
    at_loss = kept_bytes(run) + 2 * run.hidden_bytes + root + block
    stages = {"the loss": held + at_loss + of_loss + head + buffer,
              "the optimizer step": state["gradients"] * (not (run.cuda and run.param_offload))}
    if head:
        stages["the head's backward"] = held + at_loss + reduction_bytes(run, HEAD)
    # the matrices of a step change linearly between these blocks
    for i in sorted({0, min(1, last), max(0, k - 1), min(k, last), max(0, last - 1), last}):
        gradients = finished if held else finished + gradients_of(run, "") * (last - i) // (last + 1)
        others = gradients + waiting_gradients(run, held, i) + root + block
        # a buffer with the parameters of the next block; gloo copies it
        next_block = block * (run.shards > 1)
        gathers = kept_bytes(run, i + 1) + next_block * (1 + (i > 0 and not run.cuda))
        computes = activations(run, i) + backward_bytes(run) + next_block * (i > 0)
        stages[stage_name(i, last)] = others + max(gathers, computes)
    stages["the embedding's backward"] = embedding_bytes(run, held, state)
    stage = max(stages, key=stages.get)
    resting, host = resting_bytes(run, state)
    slack = 0 if run.cuda else fragmentation(run, block)
    gathered = max(root + head, root + block) + block * (run.shards > 1)
    return dict(state, activations=activations(run), loss=of_loss, gathered=gathered, held=held,
                slack=slack, stage=stage, stages=stages, host=host, device=resting + stages[stage] + slack)


def gathered_bytes(run, group):
    """Bytes of a group's parameters while FSDP2 has gathered them; 0 without FSDP2.

    An embedding of its own is gathered for its forward only, which is never the peak: 0 too.
    """
    if not run.is_sharded or (group is None and run.has_head_group):
        return 0
    return unsharded_bytes(run, group, 2 if run.bf16 else None)


def full_gradient(run, group=ALL):
    """Bytes of the gradient of a group, or of all, before it is reduced: in fp32, in which it is summed."""
    return unsharded_bytes(run, group, 4 if run.bf16 else None, only_trained=True)


def held_bytes(run):
    """Bytes of gradients on the device between the micro-batches of a step; 0 if it has only one.

    With --gradient_reduction step the gradient of a whole tp rank. With micro_batch that of its shards, and
    FSDP2 has that of several replicas in a buffer on the device, until it sums them.
    """
    if run.micro_batches == 1:
        return 0
    if run.gradient_reduction == "step" or not run.is_sharded:
        return full_gradient(run)
    if run.cuda and run.param_offload and run.replicas == 1:
        return 0
    return sum(4 * shard_sizes(run, name, shape)[1] for name, shape, _, trained in run.parameters if trained)


def reduction_bytes(run, group):
    """Most bytes while the gradient of a group is reduced, the gradient and the result included.

    FSDP2 copies it into one tensor, frees it, and reduces that into the shard. gloo copies it once more.
    """
    before = unsharded_bytes(run, group, run.itemsize, only_trained=True)
    flat = full_gradient(run, group)
    copies = 1 + (run.shards > 1 and not run.cuda)
    return max(before + flat, copies * flat + flat // run.shards)


def embedding_bytes(run, held, state):
    """Bytes of gradients and parameters while the embedding's backward, the last, adds and reduces them."""
    tied_gradient = matrix_bytes(run, gradient_itemsize(run, run.itemsize)) * (
        run.trains_embedding and run.config.tie_word_embeddings)  # the head's, which is added to it
    if not run.is_sharded:
        reduced = state["gradients"]
        dense = matrix_bytes(run, run.itemsize) * run.trains_embedding  # its gradient in bf16
        return (held or reduced) + tied_gradient + dense * run.has_own_masters
    gradients = held or gradients_of(run, "") + gradients_of(run, HEAD)
    dense = unsharded_bytes(run, None, run.itemsize, only_trained=True)
    before = 0 if held else full_gradient(run, "0")  # the flat tensor of the first block's
    if run.tp > 1:  # torch computes the gradient of the whole vocabulary before it takes this rank's rows
        dense += run.config.vocab_size * run.config.hidden_size * run.itemsize * run.trains_embedding
    embedding = max(dense + tied_gradient, reduction_bytes(run, None))
    return gradients + gathered_bytes(run, None) + before + embedding


def stage_name(block, last):
    """The name of the backward of a block, numbered from 0."""
    return {last: "the last block's backward", 0: "the first block's backward"}.get(
        block, f"the backward of block {block + 1} of {last + 1}")


def matrix_bytes(run, itemsize):
    """Bytes of the embedding or the head on a tp rank."""
    return run.config.vocab_size // run.tp * run.config.hidden_size * itemsize


def trains_head(run):
    tied = run.config.tie_word_embeddings and run.trains_embedding
    return tied or any(trained for name, *_, trained in run.parameters if name == "lm_head.weight")


def loss_bytes(run):
    """Bytes of a chunk's logits, the head's gradient, the hidden states, a chunk of them, their gradient."""
    c, rows = run.config, min(loss_chunk(run), run.rank_tokens)
    logits = rows * (c.vocab_size // run.tp)
    size = logits * run.itemsize + rows * c.hidden_size * run.itemsize
    head_itemsize = 4
    if run.bf16:
        # a piece in fp32, where no compiler fuses it
        size += 4 * min(loss.GPU_PIECE if run.cuda else loss.PIECE, logits)
        # FSDP2 gets the gradient in bf16, from the fp32 sum; on the CPU each chunk's product is in bf16
        head_itemsize += 2 * (run.is_sharded or not run.cuda)
    if c.values.get("final_logit_softcapping") and not run.cuda:
        size += 12 * logits  # capped ones, and two of the cap's derivative, in fp32
    return size + matrix_bytes(run, head_itemsize) * trains_head(run) + 2 * run.hidden_bytes


def gradients_of(run, group):
    """Bytes on the device of the reduced gradients of a group: "" or HEAD.

    With replicas, FSDP2 keeps the fp32 buffer in which it has summed them if the gradient is another tensor.
    """
    is_elsewhere, total = run.cuda and run.param_offload, 0
    for name, shape, itemsize, trained in run.parameters:
        in_group = ".layers." in name if group == "" else (
            run.has_head_group and ".layers." not in name and "embed_tokens" not in name)
        if trained and in_group:
            size = gradient_itemsize(run, itemsize)
            has_buffer = run.replicas > 1 and (is_elsewhere or size != 4)
            total += shard_sizes(run, name, shape)[1] * (size * (not is_elsewhere) + 4 * has_buffer)
    return total


def backward_bytes(run):
    """Bytes that a block's backward allocates, without the gradients of parameters."""
    c, w = run.config, run.itemsize
    # The gradients of gate and up. Compiled, the product that is computed again too, and with LoRA the part
    # of its gradient that comes through the adapter.
    n_wide = 2 + run.compiled + (run.compiled and run.is_lora)
    of_mlp = n_wide * run.rank_tokens * (c.intermediate_size // run.tp) * w
    freed = 2 * of_mlp  # what the MLP kept, before the layer that mixes tokens has its turn
    work = max(of_mlp, mixing_bytes(run) + exchange_bytes(run) - freed) + run.hidden_bytes
    if run.quantize:  # a piece of a matrix being dequantised: its codes and values
        work += dequantised_values(run) * (8 if run.bf16 else 6)
    return work


def waiting_gradients(run, held, i):
    """Bytes of gradients of parameters that are not yet reduced, in the backward of block i.

    held  gradients of earlier micro-batches, see held_bytes
    """
    size = 0
    if run.is_sharded:
        # The flat gradient of the group before, until this one's is reduced: then the block's activations are
        # freed already. Where the step's gradient is held, it was a part of it
        before = HEAD if i == run.config.num_hidden_layers - 1 else "0"
        size += full_gradient(run, before) * (run.gradient_reduction == "micro_batch" or not held)
        size += full_gradient(run, "0") * run.cuda
    elif run.has_own_masters:  # the largest gradient in bf16, before it is cast
        size += max((2 * math.prod(shape) for name, shape, _, trained in run.parameters
                     if trained and ".layers.0." in name), default=0)
    # the head's gradient waits for the embedding's if they are tied
    waits = run.config.tie_word_embeddings or not (run.is_sharded or held)
    return size + matrix_bytes(run, gradient_itemsize(run, run.itemsize)) * (trains_head(run) and waits)


def exchange_bytes(run):
    """Bytes that attention's backward allocates with sp: gradients of q, k and v, one being exchanged."""
    if run.sp == 1:
        return 0
    heads = run.config.num_attention_heads // run.tp
    return (3 * heads + 2 * run.key_heads) * run.config.head_dim * run.rank_tokens * run.itemsize


def mixing_bytes(run):
    """Bytes that a layer's backward allocates to mix tokens, where it keeps only inputs.

    Of capped scores (ops/soft_cap.py) four tensors in fp32. Of the gated delta rule (ops/delta.py) about 11
    numbers for each value of a key and a value: measured, with the sizes of Qwen3.5.
    """
    values = run.config.values
    if values.get("attn_logit_softcapping"):
        from ops import soft_cap  # registers operations; few models have them

        scores = run.length**2 * run.config.num_attention_heads // (run.tp * run.sp)
        return 16 * min(soft_cap.GPU_BLOCK if run.cuda else soft_cap.BLOCK, scores)
    if "linear_attention" in run.config.layer_types:
        from ops import delta  # as above

        places = run.rank_tokens * values.get("linear_num_value_heads", 32)
        width = values.get("linear_key_head_dim", 128) + values.get("linear_value_head_dim", 128)
        return 44 * width * min(delta.GPU_PIECE if run.cuda else delta.PIECE, places)
    return 0


def resting_bytes(run, state):
    """(device, host): bytes of weights and optimizer between steps; the host's include its buffers, and what
    --async_save copies.
    """
    copied = copied_bytes(run)
    if run.cuda and run.param_offload:
        return 0, sum(state.values()) + copied
    optimizer = state["moments"] + state["masters"]
    if run.optimizer_offload:
        optimizer += buffer_bytes(run)
    if run.cuda and run.optimizer_offload:
        return state["weights"], optimizer + copied
    if run.cuda:
        return state["weights"] + optimizer, copied
    return state["weights"] + optimizer + copied, 0


def buffer_bytes(run):
    """Bytes of the two fp32 buffers of --optimizer_offload, as large as the largest shard, which take turns.

    On CUDA they are pinned. On the CPU a part that is never written takes no memory.
    """
    trained = [(name, shape) for name, shape, _, is_trained in run.parameters if is_trained]
    trained.sort(key=lambda pair: (len(pair[1]) > 1, ".lora_B." in pair[0]))  # as in optim.parameter_groups
    sizes = [4 * shard_sizes(run, name, shape)[1] for name, shape in trained]
    return 2 * max(sizes) if run.cuda else max(sizes[::2]) + max(sizes[1::2], default=0)


def copied_bytes(run):
    """Bytes of a rank's copy of a checkpoint in host memory, with --async_save (disk/writer.py); otherwise 0.

    Of each trained parameter the optimizer's state, the fp32 master and the weight in 16 bits. The dtype of
    the model's files is not known here: if it is fp32, the weight is the master, and the copy is smaller.
    """
    if not run.async_save:
        return 0
    copied = sum((6 + run.state_itemsize(name)) * math.prod(shape)
                 for name, shape, _, is_trained in run.parameters if is_trained)
    return copied // run.world_size


def fragmentation(run, block):
    """Bytes of the CPU's heap that are free but not reusable, see KEPT_FRAGMENTATION.

    block  the gathered parameters of a block
    """
    one = block_activations(run)
    # the largest tensors are the MLP's; a block keeps four of them
    wide = run.rank_tokens * (run.config.intermediate_size // run.tp) * run.itemsize
    in_heap = 1 - 4 * wide / one * (wide > HEAP_LIMIT[run.is_lora])
    of_blocks = BLOCK_FRAGMENTATION[run.is_lora] * (one + block) * run.config.num_hidden_layers
    of_ranks = 0
    if run.shards * run.replicas > 1:
        of_ranks = GLOO_COPIES * max(gathered_bytes(run, group) for group in (None, HEAD, "0"))
        # FSDP2's flat shards do not fit where other gradients were freed
        if run.shards > 1 and run.micro_batches > 1:
            of_ranks += states(run)["gradients"]
    of_activations = in_heap * (KEPT_FRAGMENTATION[run.is_lora] * activations(run) + of_blocks)
    return int(of_activations + LOSS_FRAGMENTATION[run.is_lora] * loss_bytes(run)) + of_ranks


def largest_micro_batch(run, limit, several=True):
    """The largest micro-batch that fits into `limit` bytes, in conversations; 0 if not even one does.

    several  each rank's step has two micro-batches, so the full gradient is held between them; False: one
    """
    def fits(n):
        planned = replace(run, micro_batch_size=n, batch_size=n * run.dp * (1 + several))
        return memory(planned)["device"] <= limit

    low, high = 0, 1
    while fits(high) and high < 2**20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# ------------------------------------------------------------------------------------------------------------
# what `auto` chooses, and what would save memory


def gradient_reduction(run, capacity):
    """What `auto` means for --gradient_reduction: "step" or "micro_batch".

    Once a step costs the least traffic. But a rank then holds the gradient of all parameters that it trains,
    unsharded, between micro-batches. If that exceeds HELD of `capacity` bytes, each micro-batch reduces it.
    Where a step is one micro-batch, or a reduction leaves the gradient as large as it is, once a step.
    """
    shrinks = run.shards > 1 or run.param_offload
    is_large = full_gradient(run) > HELD * capacity
    return "micro_batch" if run.micro_batches > 1 and shrinks and is_large else "step"


def choose(run, capacity, *, micro_batch_size=AUTO, gradient_checkpointing=AUTO, reduction=None):
    """The PlannedRun that fits into FILL of `capacity` bytes and whose step takes the least time.

    capacity  bytes of the device, see device_memory
    micro_batch_size, gradient_checkpointing, and the gradient's reduction
              what is not AUTO stays as it is in `run`

    The order of the choices:

    1. The size of a micro-batch: at most TOKENS tokens a rank (max_length, if that is longer) and what the
       step of a rank needs; and a half, a quarter, ... of it.
    2. For each size, how the gradient is reduced: gradient_reduction() of a run with it. Where the step is
       a single micro-batch it is reduced once in any case.
    3. For each size, the fewest checkpointed blocks that fit, k of L.
    4. Of the sizes that fit, that of the least time. A step's time is in proportion to
       (1 + k / (3 L)) (1 + FIXED_TOKENS / tokens of a rank): a block that is checkpointed is computed once
       more, a third of its forward and backward. What more reductions cost is not in it.

    Raises UserError if nothing fits.
    """
    n_blocks = run.config.num_hidden_layers
    sizes, blocks = [run.micro_batch_size], [run.checkpointed_blocks]
    if micro_batch_size == AUTO:
        needed = math.ceil(run.batch_size / run.dp)
        sizes = [max(1, min(TOKENS * run.sp // run.length, needed))]
        while sizes[-1] > 1:
            sizes.append(sizes[-1] // 2)
    if gradient_checkpointing == AUTO:
        blocks = range(n_blocks + 1)

    def seconds(planned):
        return (1 + planned.checkpointed_blocks / (3 * n_blocks)) * (1 + FIXED_TOKENS / planned.rank_tokens)

    fitting = []
    for size in sizes:
        sized = replace(run, micro_batch_size=size)
        if reduction == AUTO:
            sized = replace(sized, gradient_reduction=gradient_reduction(sized, capacity))

        def fits(k, sized=sized):
            return memory(replace(sized, checkpointed_blocks=k))["device"] <= FILL * capacity

        i = bisect.bisect_left(blocks, True, key=fits)  # memory falls with k
        if i < len(blocks):
            fitting.append(replace(sized, checkpointed_blocks=blocks[i]))
    if not fitting:
        raise UserError(does_not_fit(replace(sized, checkpointed_blocks=blocks[-1]), capacity))
    return min(fitting, key=seconds)


def does_not_fit(run, capacity):
    """The text of the error where choose() finds nothing, not even `run`, the smallest that it may choose."""
    planned = memory(run)
    lines = [f"this run does not fit. --micro_batch_size {run.micro_batch_size} ({run.tokens:,} tokens) with "
             f"{run.checkpointed_blocks} of {run.config.num_hidden_layers} blocks checkpointed",
             f"needs {planned['device'] / GB:.1f} GiB during {planned['stage']}, and `auto` uses "
             f"{FILL:.0%} of {capacity / GB:.1f} GiB. These would save:"]
    return "\n".join([*lines, *saving_lines(savings(run))])


def saving_lines(saved):
    """The lines about savings() on the screen."""
    return [f"  {flags:32}{size / GB:8.2f} GiB" for flags, size in saved]


def savings(run, place="device"):
    """[(flags, bytes that they would save by the forecast), ...], the largest first.

    place  where memory is short: "device" or "host"
    """
    is_dora = any("lora_magnitude_vector" in name for name, *_ in run.parameters)
    options = {
        f"--micro_batch_size {run.micro_batch_size // 2}":
            run.micro_batch_size > 1 and replace(run, micro_batch_size=run.micro_batch_size // 2),
        "--gradient_checkpointing true": replace(run, checkpointed_blocks=run.config.num_hidden_layers),
        f"--max_length {run.length // 2}": run.length > 3 and replace(run, length=run.length // 2),
        "--use_lora": not run.is_lora and with_lora(run),
        "--use_lora --quantize nf4": not run.is_lora and run.tp == 1 and with_lora(run, quantize=True),
        "--quantize nf4": run.is_lora and not run.quantize and not is_dora and run.tp == 1
            and with_lora(run, quantize=True),
        "--optimizer_offload": run.cuda and not run.param_offload
            and as_stored(replace(run, optimizer_offload=True)),
        "--gradient_reduction micro_batch": run.is_sharded and replace(run, gradient_reduction="micro_batch"),
        f"--sp {larger_sp(run)}": larger_sp(run) and replace(run, sp=larger_sp(run)),
        f"--n_gpus {2 * run.world_size}": run.cuda and on_ranks(run, 2 * run.world_size),
    }
    if place == "host":
        options = {"--no-optimizer_offload": as_stored(replace(run, optimizer_offload=False)),
                   "--no-param_offload": as_stored(replace(run, param_offload=False)), **options}
    now = memory(run)[place]
    saved = [(flags, now - memory(other)[place]) for flags, other in options.items() if other]
    return sorted((item for item in saved if item[1] > 0), key=lambda item: -item[1])


def larger_sp(run):
    """The next larger --sp that the ranks, the heads and the model's family allow; None if there is none."""
    for sp in range(run.sp + 1, run.shards + 1):
        if run.shards % sp == 0:
            try:
                run.config.check_sp(sp, run.shards, run.tp)
            except UserError:
                continue
            return sp
    return None


def on_ranks(run, world_size):
    """The run on more ranks."""
    more = replace(run, world_size=world_size)
    if not run.is_sharded:  # `auto` of more ranks, for a gradient that is large beside the memory
        more = replace(more, gradient_reduction="micro_batch")
    return as_stored(more)


def as_stored(run):
    """The run after a change of its settings: trained parameters in the dtype that sft.build gives them."""
    if not run.bf16:
        return run
    is_narrow = run.has_own_masters or (run.optimizer_offload and not run.is_lora)
    return replace(run, parameters=with_itemsize(run.parameters, 2 if is_narrow else 4))


@functools.lru_cache(maxsize=16)
def with_itemsize(parameters, itemsize):
    """PlannedRun.parameters with this many bytes per element of what is trained."""
    return tuple((name, shape, itemsize if trained else stored, trained)
                 for name, shape, stored, trained in parameters)


def with_lora(run, quantize=False, rank=8):
    """The run with LoRA adapters of this rank on all linear layers of the blocks, if it has none."""
    parameters = []
    for name, shape, itemsize, trained in run.parameters:
        is_linear = ".layers." in name and len(shape) == 2 and ".lora_" not in name
        if not run.is_lora:
            itemsize, trained = (2 if run.bf16 else itemsize), False
        if is_linear and quantize:  # the layout of ops/nf4.py, bytes viewed as bf16
            stored = nf4.empty(*shape, device="meta").shape[1] // 2
            parameters.append((name, (shape[0], stored), 2, False))
        else:
            parameters.append((name, shape, itemsize, trained))
        if is_linear and not run.is_lora:
            stem, size = name.removesuffix("weight"), 2 if run.has_own_masters else 4
            parameters += [(f"{stem}lora_A.weight", (rank, shape[1]), size, True),
                           (f"{stem}lora_B.weight", (shape[0], rank), size, True)]
    return replace(run, parameters=tuple(parameters), quantize=quantize or run.quantize)


# ------------------------------------------------------------------------------------------------------------
# the memory that there is


def device_memory(device):
    """Bytes of the card, or of the CPU's memory that this process may use: its share of the host's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return host_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def host_memory(root="/"):
    """Bytes of the host's memory, or of the lowest limit of this process: of its cgroups, or ulimit -v."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        limits.append(limit)
    groups = os.path.join(root, "proc/self/cgroup")
    if os.path.exists(groups):  # Linux
        with open(groups, encoding="utf-8") as f:
            for line in f:
                _, controllers, path = line.rstrip("\n").split(":", 2)
                limits += cgroup_limits(root, controllers.split(","), path.strip("/").split("/"))
    return min(limits)


def cgroup_limits(root, controllers, parts):
    """Yield the limits of a cgroup and those above it. A container sees its own as the topmost."""
    folder, file = "sys/fs/cgroup", "memory.max"  # version 2
    if controllers != [""]:
        folder, file = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        if "memory" not in controllers:
            return
    for depth in range(len(parts) + 1):
        path = os.path.join(root, folder, *parts[:depth], file)
        if os.path.exists(path):
            with open(path, encoding="utf-8") as f:
                text = f.read().strip()
            if text.isdigit():  # otherwise "max"
                yield int(text)


def smallest(number, ranks):
    """The smallest of an integer over all ranks."""
    if ranks.world_size == 1:
        return number
    number = torch.tensor(number)  # on the CPU, by gloo
    dist.all_reduce(number, dist.ReduceOp.MIN)
    return int(number)
