"""Estimate the memory of a rank, and the bytes and time of its collectives, from config.json alone.

    python tools/plan.py --model Qwen/Qwen2.5-0.5B --micro_batch_size 4 --memory_gb 24
    python tools/plan.py --model Qwen/Qwen2.5-7B --n_gpus 64 --tp 8

Takes the settings of sft.py and five of its own. sft.build() creates the model on meta; the rest is
arithmetic on names and shapes. It counts full micro-batches: --micro_batch_size conversations of --max_length
tokens, all of them targets. On a GPU the peak is that of torch.cuda.max_memory_allocated: without the CUDA
context, workspaces, NCCL's buffers and the allocator's fragmentation. On the CPU it is the memory of the
process without the imported libraries.
"""

if __name__ == "__main__":
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from settings import venv

    venv.enter()  # where torch is missing, continue in the .venv that train.sh made

import dataclasses
import math
import os
import sys
from dataclasses import dataclass, replace

import torch

import sft
from disk import files, pretrained
from disk.run import ModelPaths
from ranks import processes
from settings import errors
from settings.errors import UserError
from settings.parser import parse, setting

GB = 2**30
CHUNK = 256  # target positions whose logits the loss holds at a time
PIECE = 2**22  # values of a 4-bit matrix that are dequantised at a time
# tp splits these layers (weight, lora_A) by input columns, the others (weight, bias, lora_B) by output rows
BY_COLUMNS = "o_proj", "down_proj"
# Heap fragmentation on the CPU, fitted to `bench.py --part plan` with glibc 2.36, which does not reuse all
# memory of freed tensors. It is a fraction of the kept activations, plus a fraction of what all blocks
# allocate one after another. Tensors above HEAP_LIMIT bytes cause none: the system gets them back at once.
# LoRA runs lower that limit (memory.tune_malloc). Pairs: without and with LoRA.
KEPT_FRAGMENTATION, BLOCK_FRAGMENTATION, HEAP_LIMIT = (0.1, 0.0), 0.7, (2**25, 2**24)


@dataclass
class Config(sft.Config):
    """Estimate what a run with these settings needs: python tools/plan.py [flags of sft.py] [flags]"""

    memory_gb: float | None = setting(None, "GiB per rank; prints the largest micro_batch_size that fits",
                                      low=1e-3, group="planning")
    n_gpus: int | None = setting(None, "plan for this many GPUs; none: the device of this machine", low=1)
    tflops: float = setting(400.0, "speed of a GPU in TFLOP/s; 400 is about an H100 in bf16", low=1e-3,
                            needs="n_gpus")
    gb_per_second: float = setting(50.0, "GB/s that a rank sends for dp; 50 is about right between nodes",
                                   low=1e-3, needs="n_gpus")
    tp_gb_per_second: float = setting(300.0, "GB/s that a rank sends for tp; 300 is about right in a node",
                                      low=1e-3, needs="n_gpus and tp")

    def __post_init__(self):
        if self.tp > 1:
            self.strategy = "megatron"
        super().__post_init__()


@dataclass(frozen=True)
class PlannedRun:
    """What the arithmetic needs to know about a run.

    config            families.config.ModelConfig
    parameters        ((name, shape, bytes per element, is trained), ...), unsharded; a tied one once
    length            tokens per conversation
    micro_batch_size  conversations per micro-batch
    batch_size        conversations per step, over all ranks
    """

    config: object
    parameters: tuple
    length: int
    micro_batch_size: int = 1
    batch_size: int = 1
    world_size: int = 1
    tp: int = 1
    bf16: bool = False
    cuda: bool = False
    checkpointing: bool = True
    param_offload: bool = False
    optimizer_offload: bool = False
    dropout: float = 0.0
    quantize: bool = False

    @property
    def dp(self):
        return self.world_size // self.tp

    @property
    def micro_batches(self):
        """Micro-batches per step per rank."""
        return math.ceil(self.batch_size / (self.dp * self.micro_batch_size))

    @property
    def tokens(self):
        """Tokens per micro-batch."""
        return self.micro_batch_size * self.length

    @property
    def itemsize(self):
        """Bytes per element of an activation."""
        return 2 if self.bf16 else 4

    @property
    def hidden_bytes(self):
        """Bytes of the hidden states of a micro-batch."""
        return self.tokens * self.config.hidden_size * self.itemsize

    @property
    def is_sharded(self):
        """Whether FSDP2 is used; the rule of fsdp.shard."""
        return self.world_size > 1 or self.bf16 or self.param_offload

    @property
    def is_lora(self):
        return any(".lora_A." in name for name, *_ in self.parameters)

    @property
    def trains_embedding(self):
        return any(trained for name, *_, trained in self.parameters if "embed_tokens" in name)


def check(run):
    """Raise UserError if tp does not divide what it splits: the rules of processes.start and tp.split."""
    c, tp, world_size = run.config, run.tp, run.world_size
    sizes = c.num_attention_heads, c.num_key_value_heads, c.intermediate_size, c.vocab_size
    valid = [n for n in range(1, world_size + 1) if not any(size % n for size in (world_size, *sizes))]
    if world_size % tp or (tp > 1 and tp not in valid):
        raise UserError(f"--tp {tp} must divide the {world_size} ranks (--n_gpus) and the attention heads, "
                        f"key/value heads, intermediate_size and vocab_size, here {sizes}; "
                        f"use {' or '.join(map(str, valid))}")


# ------------------------------------------------------------------------------------------------------------
# parameters


def is_split_by_tp(name, by_columns):
    """Whether tp splits a parameter; otherwise each tp rank has all of it."""
    if by_columns:
        return name.endswith(("_proj.weight", ".lora_A.weight"))
    return "norm" not in name and ".lora_A." not in name


def shard_sizes(run, name, shape):
    """(elements of a parameter on a tp rank, elements after FSDP2 on rank 0, which has the largest shard)."""
    by_columns = any(f".{layer}." in name for layer in BY_COLUMNS)
    n_slices = run.tp if is_split_by_tp(name, by_columns) else 1
    rows, columns = shape[0], math.prod(shape[1:])
    if by_columns:
        columns //= n_slices
    else:
        rows //= n_slices
    return rows * columns, math.ceil(rows / run.dp) * columns


def states(run):
    """Exact bytes of a rank's weights, reduced gradients, moments and fp32 masters, on device or host."""
    sizes = dict(weights=0, gradients=0, moments=0, masters=0)
    for name, shape, itemsize, trained in run.parameters:
        n = shard_sizes(run, name, shape)[1]
        sizes["weights"] += n * itemsize
        if trained:
            sizes["gradients"] += n * itemsize
            sizes["moments"] += 2 * n * (4 if run.optimizer_offload else itemsize)
            sizes["masters"] += 4 * n * run.optimizer_offload
    return sizes


def unsharded_bytes(run, block, itemsize=None, only_trained=False):
    """Bytes of the parameters of an FSDP2 group on a tp rank, before FSDP2 shards them.

    block     the number of a block; None: the root group, which has the parameters outside the blocks
    itemsize  bytes per element; None: as stored
    """
    total = 0
    for name, shape, stored, trained in run.parameters:
        if block is None:
            in_group = ".layers." not in name
        else:
            in_group = name.startswith(f"model.layers.{block}.")
        if in_group and (trained or not only_trained):
            total += shard_sizes(run, name, shape)[0] * (itemsize or stored)
    return total


# ------------------------------------------------------------------------------------------------------------
# memory of a step


def block_activations(run, is_first=False):
    """Bytes that autograd keeps for a block without checkpointing; test_forecast.py checks every byte.

    is_first  the first block, whose input needs no gradient if the embedding is frozen
    """
    c, w = run.config, run.itemsize
    lora_ranks, is_trained = {}, {}
    for name, shape, _, trained in run.parameters:
        if name.startswith("model.layers.0."):
            # model.layers.0.input_layernorm.weight, or model.layers.0.mlp.up_proj.weight
            names = name.split(".")
            layer = names[4] if "_proj" in name or "_norm" in name else names[3]
            is_trained[layer] = is_trained.get(layer) or trained  # its weight or its adapter
            if names[-2] == "lora_A":
                lora_ranks[layer] = shape[0]
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
    kept += (2 * H + 2 * K) * D * w + 4 * H  # attention: q, k, v, its output, and a logsumexp per head
    # with several conversations their outputs are copied into one tensor
    kept += kept_inputs("o_proj") * w * (run.micro_batch_size > 1)
    kept += copies * C * w + 4 + kept_inputs("gate_proj", "up_proj") * w
    kept += 3 * I * w + kept_inputs("down_proj") * w  # gate, silu(gate) and up; their product
    is_dora = any("lora_magnitude_vector" in name for name, *_ in run.parameters)
    for layer, rank in lora_ranks.items():
        kept += rank * w + is_dora * sizes[layer][1] * w  # lora_A's output; DoRA's output before rescaling
        if run.dropout:  # the masked input, and the mask unless the input needs no gradient
            has_mask = not has_frozen_input or layer not in ("q_proj", "k_proj", "v_proj")
            kept += sizes[layer][0] * (w + (1 if run.cuda else w) * has_mask)
    return run.tokens * kept + is_dora * sum(2 * sizes[layer][1] * w for layer in lora_ranks)


def activations(run):
    """(bytes kept for backward of all blocks, bytes of one block); one block is counted in full."""
    n_blocks, one = run.config.num_hidden_layers, block_activations(run)
    if run.checkpointing:  # the other blocks keep their inputs only
        return (n_blocks - 1) * run.hidden_bytes + one, one
    return (n_blocks - 1) * one + block_activations(run, is_first=True), one


def memory(run):
    """Peak bytes of a rank: `device` and `host`, what they consist of, and the `stage` of the device's peak.

    A step has five stages; the largest counts. On the CPU everything is `device`, and `host` is 0.
    """
    c, w, n_blocks = run.config, run.itemsize, run.config.num_hidden_layers
    vocab, intermediate = c.vocab_size // run.tp, c.intermediate_size // run.tp
    matrix = vocab * c.hidden_size  # elements of embedding or head
    hidden = run.hidden_bytes
    reduce_itemsize = 4 if run.bf16 else None  # FSDP2 reduces gradients in fp32
    state = states(run)
    kept, one = activations(run)
    offloads_to_host = run.cuda and run.param_offload
    tied, trains_embedding = c.tie_word_embeddings, run.trains_embedding
    trains_head = any(trained for name, *_, trained in run.parameters if name == "lm_head.weight")
    trains_head = trains_head or (tied and trains_embedding)

    loss = min(CHUNK, run.tokens) * vocab * (6 if run.bf16 else 4)  # the logits of a chunk
    # the head's gradient; the hidden states, those at target positions, and their gradient
    loss += matrix * (6 if run.bf16 else 4) * trains_head + 3 * hidden
    # FSDP2 gathers a group's parameters while it computes: the root's always, and the next block's in advance
    gather_itemsize = 2 if run.bf16 else None
    root = unsharded_bytes(run, None, gather_itemsize) * run.is_sharded
    block = unsharded_bytes(run, 0, gather_itemsize) * run.is_sharded
    # the buffer of an all-gather, before it is copied into the parameters; two of them in backward
    buffer = block * (run.dp > 1)
    gathered = 2 * block + 2 * buffer
    block_gradient = unsharded_bytes(run, 0, reduce_itemsize, only_trained=True)
    block_gradient *= run.is_sharded and run.cuda
    full_gradient = sum(
        unsharded_bytes(run, i, reduce_itemsize, only_trained=True) for i in (*range(n_blocks), None))
    held = full_gradient * (run.micro_batches > 1)  # nothing is reduced before a step's last micro-batch
    reduced = state["gradients"] if run.is_sharded else full_gradient
    reduced *= not offloads_to_host
    of_blocks = sum(
        shard_sizes(run, n, s)[1] * itemsize * t for n, s, itemsize, t in run.parameters if ".layers." in n)
    of_blocks *= not offloads_to_host
    # the gradients that exist when the first block's backward starts
    finished = held if held else of_blocks * (n_blocks - 1) // n_blocks
    # the root's gradient: what is reduced (only with several dp ranks), and the result
    root_gradient = unsharded_bytes(run, None, reduce_itemsize, only_trained=True)
    root_gradient = root_gradient * (run.dp > 1) + root_gradient // run.dp
    # the head's gradient waits for the embedding's if they are tied
    head_gradient = matrix * w * trains_head * (tied or run.is_sharded or not held)
    work = 2 * run.tokens * intermediate * w + hidden  # backward of the MLP's product
    if run.quantize:  # a piece of a matrix being dequantised: its codes and values
        work += min(PIECE, c.hidden_size * c.intermediate_size) * (8 if run.bf16 else 6)
    tied_gradient = matrix * w * trains_embedding * tied
    embedding = (held if held else reduced) + tied_gradient
    if run.is_sharded:
        embedding = (held if held else of_blocks) + root + 2 * buffer
        embedding += unsharded_bytes(run, None, w, only_trained=True) + max(tied_gradient, root_gradient)
    recomputed = one - hidden if run.checkpointing else 0  # in backward, so not during the loss
    block_backward = head_gradient + work + root + gathered + block_gradient
    stages = {
        "the loss": held + kept - recomputed + 2 * hidden + loss + root + buffer,
        "the last block's backward": held + kept + block_backward,
        "the first block's backward": finished + one + block_backward,
        "the embedding's backward": embedding,
        "the optimizer step": reduced,
    }
    stage = max(stages, key=stages.get)
    resting, host = resting_bytes(run, state)
    slack = 0 if run.cuda else fragmentation(run, kept, one, block)
    return dict(state, activations=kept, loss=loss, gathered=root + gathered, held=held, slack=slack,
                stage=stage, stages=stages, host=host, device=resting + stages[stage] + slack)


def resting_bytes(run, state):
    """(device, host): bytes of weights and optimizer between steps; the host's include gradients."""
    if run.cuda and run.param_offload:
        return 0, sum(state.values())
    if run.cuda and run.optimizer_offload:  # the masters have gradients during a step
        return state["weights"], state["moments"] + 2 * state["masters"]
    return state["weights"] + state["moments"] + state["masters"], 0


def fragmentation(run, kept, one, block):
    """Bytes of the CPU's heap that are free but not reusable, see KEPT_FRAGMENTATION.

    kept   activations of all blocks
    one    activations of one block
    block  the gathered parameters of a block
    """
    # the largest tensors are the MLP's; a block keeps four of them
    wide = run.tokens * (run.config.intermediate_size // run.tp) * run.itemsize
    in_heap = 1 - 4 * wide / one * (wide > HEAP_LIMIT[run.is_lora])
    of_blocks = BLOCK_FRAGMENTATION * (one + block) * run.config.num_hidden_layers
    return int(in_heap * (KEPT_FRAGMENTATION[run.is_lora] * kept + of_blocks))


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
# communication and computation of a step


def collectives(run):
    """{name: (calls, bytes of the full tensors, bytes that a rank sends)} per step, for dp and tp.

    A rank sends (n - 1) / n of a tensor in a ring all-gather or reduce-scatter, twice that in an all-reduce.
    Single numbers (loss and gradient norm) are not counted.
    """
    n, dp, tp = run.micro_batches, run.dp, run.tp
    n_blocks = run.config.num_hidden_layers
    reduce_itemsize = 4 if run.bf16 else None
    groups = [*range(n_blocks), None]
    gathered = {i: unsharded_bytes(run, i, 2 if run.bf16 else None) for i in groups}
    reduced = [unsharded_bytes(run, i, reduce_itemsize, only_trained=True) for i in groups]
    reduced = [size for size in reduced if size]
    counts = {}
    if dp > 1:
        counts["dp all-gather, forward"] = n * len(groups), n * sum(gathered.values())
        counts["dp all-gather, backward"] = n * n_blocks, n * sum(gathered[i] for i in range(n_blocks))
        counts["dp reduce-scatter"] = len(reduced), sum(reduced)
    if tp > 1:
        hidden = run.hidden_bytes
        recomputed = n_blocks * run.checkpointing  # checkpointing repeats the attention's all-reduce
        # if the embedding is frozen, the first block's input needs no gradient
        backward = 2 * n_blocks + recomputed - (not run.trains_embedding)
        n_chunks = math.ceil(run.tokens / CHUNK)
        counts["tp all-reduce, forward"] = n * (2 * n_blocks + 1), n * (2 * n_blocks + 1) * hidden
        counts["tp all-reduce, backward"] = n * backward, n * backward * hidden
        counts["tp all-reduce, loss"] = n * (2 * n_chunks + 1), n * (3 * 4 * run.tokens + hidden)
        # once per step, before dp's: gradients of what tp does not split (lora_A or lora_B, q_norm, k_norm)
        unsplit = []
        for name, shape, itemsize, trained in run.parameters:
            n_elements = shard_sizes(run, name, shape)[0]
            is_partial = ".lora_" in name or "q_norm" in name or "k_norm" in name
            if trained and is_partial and n_elements == math.prod(shape):
                unsplit.append(n_elements * itemsize)
        if unsplit:
            counts["tp all-reduce, gradients"] = len(unsplit), sum(unsplit)
    result = {}
    for name, (calls, size) in counts.items():
        ranks = dp if "dp" in name else tp
        result[name] = calls, size, size * (2 if "all-reduce" in name else 1) * (1 - 1 / ranks)
    return result


def flops(run):
    """Floating-point operations per step per rank: matrix products, and causal attention per conversation."""
    c, tokens = run.config, run.tokens * run.micro_batches
    attention_matrices = c.hidden_size * c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
    matrices = c.num_hidden_layers * (attention_matrices + 3 * c.hidden_size * c.intermediate_size)
    # forward, gradient of the input, gradient of the weight unless frozen, recomputed forward
    passes = (2 if run.is_lora else 3) + run.checkpointing
    # per token, in forward
    attention = 2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * run.length
    head = 2 * c.vocab_size * c.hidden_size * (2 if run.is_lora else 3)
    return tokens * (passes * 2 * matrices + (3 + run.checkpointing) * attention + head) / run.tp


# ------------------------------------------------------------------------------------------------------------
# what is printed


def lines(run, *, memory_gb=None, tflops=None, gb_per_second=None, tp_gb_per_second=None):
    """Yield the lines to print: memory always; collectives and time for several ranks."""
    yield from memory_lines(run)
    if memory_gb:
        for checkpointing in (True, False):
            yield fit_line(replace(run, checkpointing=checkpointing), memory_gb)
    if run.world_size > 1:
        yield from time_lines(run, tflops, gb_per_second, tp_gb_per_second)


def memory_lines(run):
    sizes = memory(run)
    size = {key: f"{value / GB:.3f} GiB" for key, value in sizes.items() if key not in ("stage", "stages")}
    device = "GPU" if run.cuda else "CPU"
    on_device, on_host = f"on the {device}", "in host memory"
    place = on_host if run.cuda and run.param_offload else on_device
    optimizer_place = on_host if run.cuda and (run.param_offload or run.optimizer_offload) else on_device
    with_checkpointing = activations(replace(run, checkpointing=True))[0] / GB
    without = activations(replace(run, checkpointing=False))[0] / GB
    dtype = "bf16" if run.bf16 else "fp32"
    yield (f"plan     {run.world_size} × {device} = dp {run.dp} × tp {run.tp}, {dtype}; micro-batch "
           f"{run.micro_batch_size} × {run.length:,} tokens, {run.micro_batches} per step per rank")
    yield f"weights       {size['weights']:>14}  {place}"
    yield f"gradients     {size['gradients']:>14}  {place}, after they are reduced"
    yield f"optimizer     {size['moments']:>14}  {optimizer_place}: moments"
    if sizes["masters"]:
        yield f"masters       {size['masters']:>14}  {optimizer_place}: fp32 weights"
    yield (f"activations   {size['activations']:>14}  {with_checkpointing:.3f} with checkpointing, "
           f"{without:.3f} without")
    yield f"loss          {size['loss']:>14}  logits of a chunk, gradients of head and hidden states"
    if run.is_sharded:
        yield f"gathered      {size['gathered']:>14}  unsharded parameters: embedding, head, two blocks"
    if sizes["held"]:
        yield f"held          {size['held']:>14}  the full gradient, between micro-batches"
    if sizes["slack"]:
        yield f"allocator     {size['slack']:>14}  heap fragmentation"
    yield f"peak          {size['device']:>14}  per rank, {on_device}, during {sizes['stage']}"
    if not run.cuda:
        yield f"{'':30}not counting the imported libraries"
    if sizes["host"]:
        yield f"host          {size['host']:>14}  per rank, in host memory"
    if run.cuda and run.param_offload:  # as in collectives(), backward does not fetch the root's again
        fetched = run.micro_batches * (2 * sizes["weights"] - unsharded_bytes(run, None) // run.dp)
        yield (f"PCIe     {(fetched + sizes['gradients']) / GB:>15.3f} GiB  per rank and step: weights twice "
               "per micro-batch, gradients once; prefer --optimizer_offload if it fits: both once")


def fit_line(run, memory_gb):
    """The line about the micro_batch_size that fits into memory_gb."""
    how = "with checkpointing" if run.checkpointing else "without checkpointing"
    several = largest_micro_batch(run, memory_gb * GB)
    single = largest_micro_batch(run, memory_gb * GB, several=False)
    if not single:
        return f"         {how}: does not fit in {memory_gb:g} GiB, even with --micro_batch_size 1"
    if not several:
        condition = ", but only if a step is one micro-batch"
    else:
        condition = f", or {single} if a step is one micro-batch" if single > several else ""
    return f"fits     in {memory_gb:g} GiB {how}: --micro_batch_size {several or single}{condition}"


def time_lines(run, tflops, gb_per_second, tp_gb_per_second):
    seconds, speeds = dict(dp=0, tp=0), dict(dp=gb_per_second, tp=tp_gb_per_second)
    yield f"{'collectives per step':26}{'calls':>8}{'GiB in total':>16}{'GiB sent per rank':>20}"
    for name, (calls, total, sent) in collectives(run).items():
        axis = name[:2]
        seconds[axis] += sent / speeds[axis] / 1e9
        yield f"{name:26}{calls:8,}{total / GB:16.3f}{sent / GB:20.3f}"
    work, communication = flops(run) / 1e12, sum(seconds.values())
    compute = work / tflops
    yield f"step     {compute:.2f} s of computation: {work:,.0f} TFLOP per rank at {tflops:g} TFLOP/s"
    yield (f"         {seconds['dp']:.2f} s of dp at {gb_per_second:g} GB/s, "
           f"{seconds['tp']:.2f} s of tp at {tp_gb_per_second:g} GB/s")
    tokens = run.tokens * run.micro_batches * run.dp
    best, worst = max(compute, communication), compute + communication
    yield (f"         {best:.2f} s if they overlap, {worst:.2f} s if not: "
           f"{tokens / best:,.0f} to {tokens / worst:,.0f} tokens per second")


def plan(cfg):
    """Print what a run would need. Loads, tokenises and writes nothing, and waits for no other process."""
    directory = pretrained.model_directory(cfg.model, patterns=["config.json"])
    config_json = files.read_json(os.path.join(directory, "config.json"))
    paths = ModelPaths(
        model=directory, adapter=cfg.resume_adapter, tokenizer=directory, config_json=config_json)
    cuda = bool(cfg.n_gpus) or torch.cuda.is_available()
    dtype = cfg.dtype or ("bf16" if cuda else "fp32")
    ranks = processes.single_process(torch.device("meta"))
    model, _ = sft.build(dataclasses.replace(cfg, dtype=dtype), paths, ranks)
    batch_size = math.ceil(cfg.batch_tokens / cfg.max_length) if cfg.batch_tokens else cfg.batch_size
    parameters = tuple(
        (n, tuple(p.shape), p.element_size(), p.requires_grad) for n, p in model.named_parameters())
    run = PlannedRun(
        config=model.config,
        parameters=parameters,
        length=cfg.max_length,
        micro_batch_size=cfg.micro_batch_size,
        batch_size=batch_size,
        world_size=cfg.n_gpus or int(os.environ.get("WORLD_SIZE", "1")),
        tp=cfg.tp,
        bf16=dtype == "bf16",
        cuda=cuda,
        checkpointing=cfg.gradient_checkpointing,
        param_offload=cfg.param_offload,
        optimizer_offload=cfg.optimizer_offload,
        dropout=cfg.lora_dropout,
        quantize=bool(cfg.quantize),
    )
    check(run)
    if os.environ.get("RANK", "0") == "0":
        print(*lines(run, memory_gb=cfg.memory_gb, tflops=cfg.tflops, gb_per_second=cfg.gb_per_second,
                     tp_gb_per_second=cfg.tp_gb_per_second), sep="\n")


def main():
    cfg, _ = parse(Config, sys.argv[1:])
    plan(cfg)


if __name__ == "__main__":
    errors.run(main)
