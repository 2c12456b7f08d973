"""Print the memory a rank will need, and the bytes and time of its collectives, from config.json alone.

    python tools/plan.py --model Qwen/Qwen2.5-0.5B --micro_batch_size 4 --memory_gb 24
    python tools/plan.py --model Qwen/Qwen2.5-7B --n_gpus 64 --tp 8

Takes the settings of sft.py and five of its own. sft.build() makes the model on meta; the rest is arithmetic
on names and shapes. What is counted is a full micro-batch, all of whose tokens are targets:
--micro_batch_size conversations that fill --max_length. On a GPU it is what torch.cuda.max_memory_allocated
would say, without the context, workspaces, NCCL's buffers and the allocator's fragmentation. On the CPU it is
what the process holds beyond what its imports take.
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
CHUNK = 256  # rows of logits that the loss has at a time
PIECE = 2**22  # values of a 4-bit matrix that are dequantised at a time
# tp splits weight and A of these layers by input columns; weight, bias and B of the others by output rows
BY_COLUMNS = "o_proj", "down_proj"
# Of the CPU, fitted to bench.py --part plan with glibc 2.36, whose heap does not fill the holes of freed
# tensors with others. The holes are a share of what is kept, and a share of what all blocks allocate in turn.
# Tensors above the limit leave none, as the system gets them back at once; LoRA runs lower the limit
# (memory.tune_malloc).
KEPT_HOLES, BLOCK_HOLES, HEAP_LIMIT = (0.1, 0.0), 0.7, (2**25, 2**24)  # without and with LoRA


@dataclass
class Config(sft.Config):
    """Print what a run of these settings will need: python tools/plan.py [flags of sft.py] [flags]"""

    memory_gb: float | None = setting(None, "of a rank, in GiB: says which micro_batch_size fits", low=1e-3,
                                   group="planning")
    n_gpus: int | None = setting(None, "GPUs of a cluster that is not there; none: what is here", low=1)
    tflops: float = setting(400.0, "what a GPU achieves, in TFLOP/s; 400 is about an H100 in bf16", low=1e-3,
                         needs="n_gpus")
    gb_per_second: float = setting(50.0, "what a rank sends, sharding, in GB/s; 50: between nodes", low=1e-3,
                                needs="n_gpus")
    tp_gb_per_second: float = setting(300.0, "what a rank sends for tp, in GB/s; 300: inside a node", low=1e-3,
                                   needs="n_gpus and tp")

    def __post_init__(self):
        if self.tp > 1:
            self.strategy = "megatron"
        super().__post_init__()


@dataclass(frozen=True)
class Layout:
    """How a run is laid out.

    config      the names of model.ModelConfig
    parameters  ((name, shape, bytes an element, is it trained), ...) of the whole model, a tied one once
    length      tokens of a conversation;  micro  conversations of a micro-batch
    batch       conversations of a step, over all ranks
    """

    config: object
    parameters: tuple
    length: int
    micro: int = 1
    batch: int = 1
    ranks: int = 1
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
        return self.ranks // self.tp

    @property
    def micro_batches(self):
        """Of a rank's step."""
        return math.ceil(self.batch / (self.dp * self.micro))

    @property
    def tokens(self):
        return self.micro * self.length

    @property
    def width(self):
        """Bytes of an activation."""
        return 2 if self.bf16 else 4

    @property
    def is_sharded(self):
        """Whether FSDP2 is at work, as fsdp.shard decides it."""
        return self.ranks > 1 or self.bf16 or self.param_offload


def check(layout):
    """Raise UserError when tp does not divide what it splits: the rules of processes.start and tp.split."""
    c, tp, ranks = layout.config, layout.tp, layout.ranks
    parts = c.num_attention_heads, c.num_key_value_heads, c.intermediate_size, c.vocab_size
    fit = [n for n in range(1, ranks + 1) if not any(part % n for part in (ranks, *parts))]
    if ranks % tp or tp > 1 and tp not in fit:
        raise UserError(f"--tp {tp} must divide the {ranks} ranks (--n_gpus), the attention heads, key/value "
                        f"heads, intermediate_size and vocab_size, here {parts}; these do: {fit}")


def is_split(name, by_columns):
    """Whether tp splits a parameter, or each of its ranks has it whole."""
    if by_columns:
        return name.endswith(("_proj.weight", ".lora_A.weight"))
    return "norm" not in name and ".lora_A." not in name


def part(layout, name, shape):
    """(elements of a parameter on a tp rank, how many of them rank 0, which has most, holds after FSDP2)."""
    by_columns = any(f".{layer}." in name for layer in BY_COLUMNS)
    split = layout.tp if is_split(name, by_columns) else 1
    rows, others = (
        shape[0] // (1 if by_columns else split), math.prod(shape[1:]) // (split if by_columns else 1))
    return rows * others, math.ceil(rows / layout.dp) * others


def states(layout):
    """Exact bytes of a rank's weights, reduced gradients, moments and masters, on whatever device."""
    found = dict(weights=0, gradients=0, moments=0, masters=0)
    for name, shape, itemsize, trained in layout.parameters:
        n = part(layout, name, shape)[1]
        found["weights"] += n * itemsize
        if trained:
            found["gradients"] += n * itemsize
            found["moments"] += 2 * n * (4 if layout.optimizer_offload else itemsize)
            found["masters"] += 4 * n * layout.optimizer_offload
    return found


def whole(layout, where, only_trained, width):
    """Bytes of the parameters of an FSDP2 group when it is not sharded.

    where         the number of a block; None: the parameters outside the blocks
    only_trained  leave out what is frozen
    width         bytes an element; None: as they are kept
    """
    start = f"model.layers.{where}."
    return sum(part(layout, name, shape)[0] * (width or itemsize) for name, shape, itemsize, trained in
               layout.parameters if (trained or not only_trained)
               and (".layers." not in name if where is None else name.startswith(start)))


def block_activations(layout, first=False):
    """Bytes that autograd keeps of a block without checkpointing; tests/unit/test_plan.py checks every byte.

    first  the first block's, whose input needs no gradient where the embedding is frozen
    """
    c, w, ranks, is_trained = layout.config, layout.width, {}, {}
    for name, shape, _, trained in layout.parameters:
        if name.startswith("model.layers.0."):
            layer, kind = name.split(".")[4 if "_proj" in name or "_norm" in name else 3], name.split(".")[-2]
            is_trained[layer] = is_trained.get(layer) or trained  # its weight, or its adapter
            if kind == "lora_A":
                ranks[layer] = shape[0]
    C, D, I = c.hidden_size, c.head_dim, c.intermediate_size // layout.tp
    H, K = c.num_attention_heads // layout.tp, c.num_key_value_heads // layout.tp
    sizes = {"q_proj": (C, H * D), "k_proj": (C, K * D), "v_proj": (C, K * D), "o_proj": (H * D, C),
             "gate_proj": (C, I), "up_proj": (C, I), "down_proj": (I, C)}  # inputs and outputs of each
    starts = first and not any(t for name, *_, t in layout.parameters if "embed_tokens" in name)

    # An input is kept for the gradient of a weight or of A; with dropout, A keeps what dropout leaves of it.
    def reads(*layers):
        return sizes[layers[0]][0] * any(is_trained[n] for n in layers) * (not (ranks and layout.dropout))

    # the CPU's norm keeps x / rms(x) as well
    scaled = 2 if is_trained["input_layernorm"] and not layout.cuda else 1
    kept = 0 if starts else scaled * C * w + 4  # norm: x and 1 / rms, in fp32
    kept += reads("q_proj", "k_proj", "v_proj") * w
    kept += (H + K) * (scaled * D * w + 4) * c.qk_norm
    kept += (2 * H + 2 * K) * D * w + 4 * H  # attention: q, k, v, its output, and the logsumexp of each row
    kept += reads("o_proj") * w * (layout.micro > 1)  # all conversations' outputs as one tensor
    kept += scaled * C * w + 4 + reads("gate_proj", "up_proj") * w
    kept += 3 * I * w + reads("down_proj") * w  # gate, silu(gate), up; their product
    dora = any("lora_magnitude_vector" in name for name, *_ in layout.parameters)
    for layer, rank in ranks.items():
        kept += rank * w + dora * sizes[layer][1] * w  # x A'; DoRA's output before it is rescaled
        if layout.dropout:  # what is left of the input, and the mask: none where the input needs no gradient
            masked = not starts or layer not in ("q_proj", "k_proj", "v_proj")
            kept += sizes[layer][0] * (w + (1 if layout.cuda else w) * masked)
    return layout.tokens * kept + dora * sum(2 * sizes[layer][1] * w for layer in ranks)


def activations(layout):
    """(bytes kept of all blocks for backward, with the block at work whole; those of that block)."""
    blocks, one = layout.config.num_hidden_layers, block_activations(layout)
    if layout.checkpointing:  # of the others their inputs
        return (blocks - 1) * layout.tokens * layout.config.hidden_size * layout.width + one, one
    return (blocks - 1) * one + block_activations(layout, first=True), one


def memory(layout):
    """The most bytes a rank needs: `device` and `host`, their parts, and the `stage` that needs `device`.

    On the CPU the two are one, and host is 0. A step has five stages, of which the worst counts.
    """
    c, w, blocks = layout.config, layout.width, layout.config.num_hidden_layers
    words, row = c.vocab_size // layout.tp * c.hidden_size, layout.tokens * c.hidden_size * w
    summed = 4 if layout.bf16 else None  # FSDP2 adds gradients up in fp32
    state, (kept, one), on_device = states(layout), activations(layout), layout.cuda and layout.param_offload
    tied, has_embedding = (
        c.tie_word_embeddings, any(t for n, *_, t in layout.parameters if "embed_tokens" in n))
    has_head = tied and has_embedding or any(t for n, *_, t in layout.parameters if n == "lm_head.weight")
    # a chunk's logits
    loss = min(CHUNK, layout.tokens) * (c.vocab_size // layout.tp) * (6 if layout.bf16 else 4)
    loss += words * (6 if layout.bf16 else 4) * has_head + 3 * row  # hidden, its target rows, their gradient
    # FSDP2 gathers a group's parameters while it computes: the root's always, the next block's in advance.
    root, block = (whole(layout, i, False, 2 if layout.bf16 else None) * layout.is_sharded for i in (None, 0))
    # what an all-gather fills before it is copied into place; two of them in backward
    flat = block * (layout.dp > 1)
    work_block = 2 * block + 2 * flat + whole(layout, 0, True, summed) * (layout.is_sharded and layout.cuda)
    everything = sum(whole(layout, i, True, summed) for i in (*range(blocks), None))
    held = everything * (layout.micro_batches > 1)  # nothing is reduced before the step's last micro-batch
    reduced = state["gradients"] if layout.is_sharded else everything
    if on_device:
        reduced = 0
    of_blocks = sum(part(layout, n, s)[1] * i * t for n, s, i, t in layout.parameters if ".layers." in n)
    done = held or of_blocks * (blocks - 1) // blocks * (not on_device)
    # of the root: what is reduced, if anything is, and the result
    reducing = whole(layout, None, True, summed)
    reducing = reducing * (layout.dp > 1) + reducing // layout.dp
    head = words * w * has_head  # the head's gradient waits for the embedding's where they are one
    waits = head * (tied or layout.is_sharded or not held)
    work = 2 * layout.tokens * (c.intermediate_size // layout.tp) * w + row  # backward of the MLP's product
    if layout.quantize:  # codes, then values, of a piece of a matrix that is dequantised
        work += min(PIECE, c.hidden_size * c.intermediate_size) * (8 if layout.bf16 else 6)
    tied_gradient = words * w * has_embedding * tied
    embedding = (held or reduced) + tied_gradient
    if layout.is_sharded:
        embedding = (held or of_blocks * (not on_device)) + root + 2 * flat + whole(layout, None, True, w)
        embedding += max(tied_gradient, reducing)
    stages = {
        "the loss": held + kept + 2 * row + loss + root + flat - (one - row if layout.checkpointing else 0),
        "the last block's backward": held + kept + waits + work + root + work_block,
        "the first block's backward": done + one + waits + work + root + work_block,
        "the embedding's gradient": embedding,
        "the optimizer": reduced,
    }
    stage = max(stages, key=stages.get)
    resting, host, slack = state["weights"] + state["moments"] + state["masters"], 0, 0
    if on_device:
        resting, host = 0, resting + state["gradients"]
    elif layout.cuda and layout.optimizer_offload:  # the masters' gradients are there in a step
        resting, host = state["weights"], state["moments"] + 2 * state["masters"]
    if not layout.cuda:
        lora = any(".lora_A." in n for n, *_ in layout.parameters)
        # the MLP's, of which a block keeps four
        wide = layout.tokens * (c.intermediate_size // layout.tp) * w
        in_heap = 1 - 4 * wide / one * (wide > HEAP_LIMIT[lora])
        slack = int(in_heap * (KEPT_HOLES[lora] * kept + BLOCK_HOLES * (one + block) * blocks))
    return dict(state, activations=kept, loss=loss, gathered=root + 2 * block + 2 * flat, held=held,
                slack=slack, stage=stage, stages=stages, host=host, device=resting + stages[stage] + slack)


def largest_micro(layout, most, several=True):
    """The largest micro-batch, in conversations, that `most` bytes hold; 0 if none.

    several  a rank's step has two micro-batches, so that the gradient is held between them; otherwise one
    """
    def fits(n):
        return memory(replace(layout, micro=n, batch=n * layout.dp * (1 + several)))["device"] <= most

    low, high = 0, 1
    while fits(high) and high < 2**20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def collectives(layout):
    """{what: (how many a step, bytes of one tensor a step in sum, bytes that a rank sends)} for dp and tp.

    What a rank sends is counted for a ring: (n - 1) / n of a tensor in an all-gather or a reduce-scatter,
    twice that in an all-reduce. Single numbers (the loss of a step, the norm of the gradient) are left out.
    """
    c, n, dp, tp, w = layout.config, layout.micro_batches, layout.dp, layout.tp, layout.width
    blocks, summed = c.num_hidden_layers, 4 if layout.bf16 else None
    groups = [*range(blocks), None]
    wholes = {i: whole(layout, i, False, 2 if layout.bf16 else None) for i in groups}
    reduced = [size for i in groups if (size := whole(layout, i, True, summed))]
    found = {}
    if dp > 1:
        found["dp all-gather, forward"] = n * len(groups), n * sum(wholes.values())
        found["dp all-gather, backward"] = n * blocks, n * sum(wholes[i] for i in range(blocks))
        found["dp reduce-scatter"] = len(reduced), sum(reduced)
    if tp > 1:
        row = layout.tokens * c.hidden_size * w
        embedding = any(t for name, *_, t in layout.parameters if "embed_tokens" in name)
        again = blocks * layout.checkpointing  # the attention's, in the forward pass that is run again
        backward = 2 * blocks + again - (not embedding)  # the first block's input needs no gradient
        chunks = math.ceil(layout.tokens / CHUNK)
        found["tp all-reduce, forward"] = n * (2 * blocks + 1), n * (2 * blocks + 1) * row
        found["tp all-reduce, backward"] = n * backward, n * backward * row
        found["tp all-reduce, loss"] = n * (2 * chunks + 1), n * (3 * 4 * layout.tokens + row)
        # once a step, before dp's: the gradients of what each tp rank has whole, A or B, norms of heads
        shares = [part(layout, name, s)[0] * i for name, s, i, t in layout.parameters
                  if t and (".lora_" in name or "q_norm" in name or "k_norm" in name)
                  and part(layout, name, s)[0] == math.prod(s)]
        if shares:
            found["tp all-reduce, gradients"] = len(shares), sum(shares)
    return {
        what: (count, size,
               size * (2 if "all-reduce" in what else 1) * (1 - 1 / (dp if "dp" in what else tp)))
        for what, (count, size) in found.items()}


def flops(layout):
    """Floating-point operations of a rank a step: matrix products, and causal attention per conversation."""
    c, tokens = layout.config, layout.tokens * layout.micro_batches
    matrices = c.num_hidden_layers * (c.hidden_size * c.head_dim * (2 * c.num_attention_heads + 2
                                      * c.num_key_value_heads) + 3 * c.hidden_size * c.intermediate_size)
    is_lora = any(".lora_A." in name for name, *_ in layout.parameters)
    # forward, input gradient, weight gradient, forward again
    passes = (2 if is_lora else 3) + layout.checkpointing
    # of a token, forward
    attention = 2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * layout.length
    head = 2 * c.vocab_size * c.hidden_size * (2 if is_lora else 3)
    return tokens * (passes * 2 * matrices + (3 + layout.checkpointing) * attention + head) / layout.tp


def lines(layout, *, memory_gb=None, tflops=None, gb_per_second=None, tp_gb_per_second=None):
    """What is printed: memory always; collectives and time where tflops is given."""
    found, check_other = memory(layout), replace(layout, checkpointing=not layout.checkpointing)
    size = {key: f"{value / GB:.3f} GiB" for key, value in found.items() if key not in ("stage", "stages")}
    device, offload = "GPU" if layout.cuda else "CPU", layout.param_offload or layout.optimizer_offload
    place = "on the host" if layout.cuda and layout.param_offload else f"on the {device}"
    elsewhere = "on the host" if layout.cuda and offload else f"on the {device}"
    with_, without = (activations(replace(layout, checkpointing=x))[0] / GB for x in (True, False))
    dtype = "bf16" if layout.bf16 else "fp32"
    yield (f"plan     {layout.ranks} × {device} = dp {layout.dp} × tp {layout.tp}, {dtype}; "
           f"micro-batch {layout.micro} × {layout.length:,} tokens, {layout.micro_batches} a step and rank")
    yield f"weights       {size['weights']:>14}  {place}"
    yield f"gradients     {size['gradients']:>14}  {place}, once they are reduced"
    yield f"optimizer     {size['moments']:>14}  {elsewhere}: moments"
    if found["masters"]:
        yield f"masters       {size['masters']:>14}  {elsewhere}: fp32 weights"
    yield f"activations   {size['activations']:>14}  {with_:.3f} with checkpointing, {without:.3f} without"
    yield f"loss          {size['loss']:>14}  a chunk's logits, the gradients of head and hidden states"
    if layout.is_sharded:
        yield f"gathered      {size['gathered']:>14}  whole parameters of embedding, head and two blocks"
    if found["held"]:
        yield f"held          {size['held']:>14}  the whole gradient, between micro-batches"
    if found["slack"]:
        yield f"allocator     {size['slack']:>14}  holes in the heap"
    yield f"peak          {size['device']:>14}  a rank, on the {device}, in {found['stage']}" + (
        "" if layout.cuda else "; above what the imports take")
    if found["host"]:
        yield f"host          {size['host']:>14}  a rank, in host memory"
    if memory_gb:
        for case in sorted((layout, check_other), key=lambda x: not x.checkpointing):
            n, alone = (largest_micro(case, memory_gb * GB, several) for several in (True, False))
            yield (f"fits     in {memory_gb:g} GiB, {'with' if case.checkpointing else 'without'} "
                   f"checkpointing: --micro_batch_size {n}, or {alone} where a step is a single micro-batch")
    if layout.ranks > 1:
        times, speeds = dict(dp=0, tp=0), dict(dp=gb_per_second, tp=tp_gb_per_second)
        for what, (count, total, sent) in collectives(layout).items():
            times[what[:2]] += sent / speeds[what[:2]] / 1e9
            yield (f"{what:26} {count:7,} a step, {total / GB:10.3f} GiB in all, "
                   f"{sent / GB:10.3f} GiB sent by a rank")
        work, moved = flops(layout) / 1e12, sum(times.values())
        compute = work / tflops
        yield (f"step     {compute:.2f} s of computation ({work:,.0f} TFLOP a rank, {tflops:g} a second), "
               f"{times['dp']:.2f} s of dp ({gb_per_second:g} GB/s), "
               f"{times['tp']:.2f} s of tp ({tp_gb_per_second:g})")
        tokens = layout.tokens * layout.micro_batches * layout.dp
        yield (f"         {max(compute, moved):.2f} s if all of it overlaps, "
               f"{compute + moved:.2f} s if nothing does: {tokens / max(compute, moved):,.0f} to "
               f"{tokens / (compute + moved):,.0f} tokens a second")


def plan(cfg):
    """Print what a run would need. Loads, tokenises and writes nothing, and waits for no other process."""
    directory = pretrained.model_directory(cfg.model, ["config.json"])
    config_json = files.read_json(os.path.join(directory, "config.json"))
    paths = ModelPaths(model=directory, adapter=cfg.resume_adapter, tokenizer=directory, config_json=config_json)
    cuda = bool(cfg.n_gpus) or torch.cuda.is_available()  # a cluster that is not there has GPUs
    dtype = cfg.dtype or ("bf16" if cuda else "fp32")
    model, _ = sft.build(dataclasses.replace(cfg, dtype=dtype), paths, processes.single_process(torch.device("meta")))
    batch = math.ceil(cfg.batch_tokens / cfg.max_length) if cfg.batch_tokens else cfg.batch_size
    shapes = tuple(
        (n, tuple(p.shape), p.element_size(), p.requires_grad) for n, p in model.named_parameters())
    layout = Layout(
        config=model.config,
        parameters=shapes,
        length=cfg.max_length,
        micro=cfg.micro_batch_size,
        batch=batch,
        ranks=cfg.n_gpus or int(os.environ.get("WORLD_SIZE", "1")),
        tp=cfg.tp,
        bf16=dtype == "bf16",
        cuda=cuda,
        checkpointing=cfg.gradient_checkpointing,
        param_offload=cfg.param_offload,
        optimizer_offload=cfg.optimizer_offload,
        dropout=cfg.lora_dropout,
        quantize=bool(cfg.quantize),
    )
    check(layout)
    if os.environ.get("RANK", "0") == "0":
        print(*lines(layout, memory_gb=cfg.memory_gb, tflops=cfg.tflops, gb_per_second=cfg.gb_per_second,
                     tp_gb_per_second=cfg.tp_gb_per_second), sep="\n")


def main():
    cfg, _ = parse(Config, sys.argv[1:])
    plan(cfg)


if __name__ == "__main__":
    errors.run(main)
