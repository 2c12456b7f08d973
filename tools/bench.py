"""Measure the trainer: `python tools/bench.py` prints one JSON line for each part in DEFAULT.

--part NAME measures one part, including those that are not in DEFAULT. All of DEFAULT takes some minutes,
with --vs trl a quarter of an hour. The parts:

loss    chunked cross-entropy and a plain one: seconds and peak memory of forward and backward
load    loading a model directory of random weights into fp32, as sft.py does, in --ranks processes: what
        each reads relative to 1 / ranks of the file, and its peak memory relative to 1 / ranks of the
        parameters; seconds relative to an unflushed copy of the directory
save    writing a checkpoint of the same model, with moments and fp32 masters, in one process, and a copy of
        its files; both are flushed to disk
ranks   tokens per second of sft.py on a small model: one process, two (dp 2), two (tp 2), in turn
data    conversations per second of data.load (read, render, tokenise, mask, write the cache), and of
        encode_batch alone on the same text, with all cores; with --vs trl also of TRL's preparation of the
        same conversations to the same targets, in two processes
chat    tokens per second of chat.py and of transformers' generate: greedy, the same random weights of the
        size of Qwen2.5-0.5B in fp32, a prompt of 64 tokens (pip install transformers)
delta   seconds of a forward and a backward of Qwen3.5-0.8B with a sixth of its layers and vocabulary, in fp32
        on the CPU, of 1,024 tokens: one document, and 16 of 4 to 124 tokens, packed; and of transformers on
        the same weights: each document alone, and padded. Of both also the time of all threads, which other
        processes change less. kept_bytes: what backward needs per token of a layer without its MLP
step    non-pad tokens per second and peak memory of sft.py, and seconds from its launch to the end of the
        first optimizer step: random weights of --shape, full training (--lora: LoRA on all linear layers)
        without checkpointing, conversations of log-normal length. With --vs trl the same conversations with
        TRL's SFTTrainer. On the CPU: fp32, up to 1,024 tokens per conversation, TRL padded and packed; with
        --vs transformers a plain loop around its model (padded batches, AdamW). flops_use is the rate of the
        operations that the loss of sft.py needs (head on targets, attention per document), divided by
        product_gflops, the rate of a product of 2,048 × 2,048. The faster a machine multiplies matrices, the
        larger the fraction of a step that is limited by memory bandwidth. With --device cuda see below
start   seconds from the launch of sft.py to the end of its first optimizer step on the embedded model, with
        nothing cached and with cached tokens; with --vs also of the other trainer, as in step
memory  peak memory and seconds per step of sft.py: random weights of the size of Qwen2.5-0.5B, 1 × 1,024
        tokens in fp32, full and LoRA; with --vs trl the same with TRL's SFTTrainer (pip install trl peft)
        in the same Python
plan    the memory that tools/plan.py predicts and the peak of a run (the median of --repeats runs), both
        without what the process takes before it has a model, in fp32: two shapes, full and LoRA, with and
        without checkpointing and offload, one or two micro-batches per step, conversations of max_length
        tokens; and on 2 and 4 ranks with dp, replicas, sp, tp and both reductions of the gradient (of the
        rank with most memory)
scale   what one of 1,024 ranks does by itself: milliseconds to sample, pack and collate a step, and to start
        an epoch; requests to the store per tick of the watchdog, and the load of all ranks on the store's
        node; the gate of rank 0; seconds to plan which rank writes which bytes of a checkpoint

--part step --device cuda [--shape 0.5b, 1.5b or 7b] [--lora] [--vs trl] [--repeats 1] measures on one GPU:
bf16 with fp32 master weights, at most 2,048 tokens per conversation and 16,384 per step (7b: 8,192; full
training of 7b does not fit into 80 GB, so it needs --lora). TRL is packed (bfd), with FlashAttention-2 and
Liger's kernels where they are installed: the line has their versions, and attention is sdpa where flash_attn
is missing. Speed is the median of steps 6 to 20, memory torch.cuda.max_memory_allocated, mfu that of
metrics.jsonl. sft.py runs with --no-gradient_checkpointing, otherwise with its defaults, and is killed after
step 20.

Each side of a comparison runs in its own process, because peak memory is a figure of a process. One side
alone, which writes the model and the conversations into an empty directory first:

    python tools/bench.py --side trl_packed --device cuda --shape 0.5b --directory DIR

--compare FILE prints the figures of a results.json of tools/gpu_check.py, such as docs/gpu.json, beside new
ones: those in --directory OUT, or of a run of the same stages here, which takes minutes on a GPU. Only those
that both have are shown, with new / old, and the ratios to TRL. tools/compare.py does it.

The figures of one line come from one run of this command; compare them with each other only. Three numbers
are the median, minimum and maximum. Linux only: memory and bytes come from /proc. This is not a test.
"""

if __name__ == "__main__":
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from settings import venv

    venv.enter()  # where torch is missing, continue in the .venv that train.sh made

import dataclasses
import importlib.metadata
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import torch
from safetensors.torch import save_file

import data
from disk import pretrained
from families.config import ModelConfig
from model import CausalLM
from ops.flops import Matrices, step_flops
from settings.errors import UserError, run
from settings.parser import check, parse, setting
from settings.venv import PROJECT
from text import formats, sources
from text.template import ChatTokenizer
from tools.bench_scale import bench_scale
from tools.bench_sides import (ALPHA, BATCH, CUDA_LENGTH, CUDA_STEPS, LENGTH, QWEN_05B, RANK, SIDES, UNSTEADY,
                               copy, cuda_rows, speed, spread)

SFT = os.path.join(PROJECT, "sft.py")
COMPARE = os.path.join(PROJECT, "tools", "compare.py")
EXAMPLES = os.path.join(PROJECT, "data", "example_sft.json")
SMALL = dict(model_type="qwen2", hidden_size=256, intermediate_size=768, num_hidden_layers=4, vocab_size=2048,
             num_attention_heads=8, num_key_value_heads=4, rope_theta=1e4, tie_word_embeddings=True)
SHAPES = {  # of --part step: what differs from QWEN_05B; the large ones are Qwen2.5's
    "small": dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8),
    "mid": dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
                vocab_size=32768),
    "0.5b": {},
    "1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12),
    "7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
               num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
}
LORA = ("--use_lora", "--lora_rank", str(RANK), "--lora_alpha", str(ALPHA), "--lora_targets", "all-linear")
PLANNED = {  # of --part plan: the model, tokens of a conversation, flags and their combinations
    "32k": (dict(hidden_size=640, intermediate_size=1728, num_hidden_layers=12, vocab_size=32000,
                 num_attention_heads=10), 1024,
            ("", "--no-gradient_checkpointing", "--batch_size 2", "--optimizer_offload", "--param_offload",
             "--use_lora", "--use_lora --no-gradient_checkpointing")),
    "152k": (dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8), 1536,
             ("", "--no-gradient_checkpointing", "--optimizer_offload",
              "--param_offload --no-gradient_checkpointing", "--use_lora --param_offload")),
}
PLANNED_RANKS = {  # more of --part plan, of the first shape: flags -> processes
    "--batch_size 2": 2, "--batch_size 4": 2, "--batch_size 4 --gradient_reduction micro_batch": 2,
    "--batch_size 2 --replicas 2": 2, "--sp 2": 2, "--strategy megatron --tp 2": 2,
    "--batch_size 4 --replicas 2 --no-gradient_checkpointing": 4,
    "--batch_size 2 --sp 2 --no-gradient_checkpointing": 4,
}
# of --part ranks: (processes, flags)
MESHES = {"one": (1, ()), "dp2": (2, ()), "tp2": (2, ("--strategy", "megatron", "--tp", "2"))}
DEFAULT = ("loss", "data", "step", "load", "save", "start")
# for each --vs: its sides, its packages, and the parts that support it
PEERS = {"trl": ("trl_padded", "trl_packed"), "transformers": ("plain_loop",), None: ()}
PACKAGES = {"trl": ("trl", "transformers", "peft"), "transformers": ("transformers",), None: ()}
COMPARED = {"trl": ("memory", "data", "step", "start"), "transformers": ("step", "start")}
STEP_SIDES = ("trl_padded", "trl_packed", "plain_loop")


@dataclass
class Config:
    """Measure the trainer: python tools/bench.py [--part NAME] [flags]"""

    part: str | None = setting(
        None, f"the part to measure; none: {', '.join(DEFAULT)}, one after another",
        ("loss", "load", "ranks", "memory", "data", "chat", "delta", "step", "save", "start", "plan",
               "scale"),
        group="bench")
    repeats: int = setting(3, "timed runs after a warm-up (ranks, plan: without); memory: timed steps", low=1)
    tokens: int = setting(4096, "loss: tokens of the micro-batch", low=1)
    hidden: int = setting(896, "loss: hidden size", low=1)
    vocab: int = setting(151936, "loss: vocabulary size", low=1)
    targets: float = setting(0.5, "loss: fraction of the tokens that are targets", low=0, high=1)
    ranks: int = setting(1, "load: number of processes", low=1)
    steps: int = setting(20, f"ranks: optimizer steps per run; the first {UNSTEADY} are not counted",
                         low=UNSTEADY + 1)
    rows: int | None = setting(
        None, "data, step, start: number of conversations; none: 20,000 for data, 48 for the others", low=1)
    shape: str = setting("mid", "step: size of the model", tuple(SHAPES))
    device: str = setting("cpu", "step, --compare: what it runs on; --compare without it: what FILE is of",
                          ("cpu", "cuda"))
    lora: bool = setting(False, "step: train LoRA adapters")
    new_tokens: int = setting(64, "chat: tokens to generate", low=1)
    model: str = setting("tiny", "data: model whose tokenizer and template are used")
    peer_checkpointing: bool = setting(
        True, "memory: gradient checkpointing in the other trainer (its default)", needs="vs")
    side: str | None = setting(None, "measure this side only, in this process (files: write a model)",
                             (*SIDES, "files"))
    directory: str | None = setting(
        None, "directory with the model or the data of --side; --compare: OUT of gpu_check with the new "
        "results")
    vs: str | None = setting(
        None, "memory, data, step, start: also measure this trainer", ("trl", "transformers"))
    compare: str | None = setting(
        None, "a results.json of tools/gpu_check.py, such as docs/gpu.json: print its figures beside new "
        "ones", unless="part or side or vs")

    def __post_init__(self):
        check(self)
        if self.ranks > 1 and self.part != "load":
            raise UserError(f"--ranks {self.ranks} has no effect without --part load")
        if self.vs and self.part and self.part not in COMPARED[self.vs]:
            parts = ", ".join(COMPARED[self.vs])
            raise UserError(f"--vs {self.vs} does not work with --part {self.part}; use one of {parts}")
        if self.side in STEP_SIDES and not self.directory:
            raise UserError(f"--side {self.side} needs --directory DIR: a model with conversations, or empty")
        if self.device == "cuda" and not self.compare:
            if self.part != "step" and self.side is None or "transformers" in (self.vs, self.side):
                raise UserError("--device cuda works with --part step only, and there with --vs trl")
            if not torch.cuda.is_available():
                raise UserError("--device cuda: torch finds no CUDA device; use --device cpu")


def write_rows(path, n, question=3.3, answer=3.9, sigma=0.9):
    """Write n conversations of random words from the example set; the numbers of words are log-normal.

    question, answer  mean of the logarithm of the number of words
    """
    vocabulary = []
    for _, row in sources.read_files(EXAMPLES):
        for message in formats.to_messages(row, ""):
            vocabulary += message["content"].split()
    generator = random.Random(0)

    def text(mu):
        n_words = max(2, int(generator.lognormvariate(mu, sigma)))
        return " ".join(generator.choices(vocabulary, k=n_words))

    rows = [{"messages": [{"role": "user", "content": text(question)},
                          {"role": "assistant", "content": text(answer)}]} for _ in range(n)]
    with open(path, "w", encoding="utf-8") as f:
        json.dump(rows, f, ensure_ascii=False)


def write_model(directory, config):
    """Write a model directory of random bf16 weights with the tokenizer of `tiny`.

    Returns the sizes in GiB of its file, and of the parameters in fp32.
    """
    noise = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in CausalLM(ModelConfig.from_dict(config)).named_parameters()}
    tensors = {}
    for name, shape in shapes.items():
        if "norm" in name:
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            n = shape.numel()  # repeated: 7B numbers would take a minute
            tensors[name] = noise.repeat(-(-n // len(noise)))[:n].view(shape).clone()
    path = os.path.join(directory, "model.safetensors")
    save_file(tensors, path, metadata={"format": "pt"})
    with open(os.path.join(directory, "config.json"), "w", encoding="utf-8") as f:
        json.dump(config, f)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(pretrained.model_directory("tiny"), name), directory)
    n_parameters = sum(t.numel() for t in tensors.values())
    return {"file_gb": os.path.getsize(path) / 2**30, "parameters_gb": n_parameters / 2**28}


def command(n, *arguments):
    """The command that runs a Python program in n processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)] if n > 1 else []
    return [sys.executable, *torchrun, *arguments]


def launch(n, *arguments):
    """Run a Python program in n processes; return what it prints."""
    done = subprocess.run(command(n, *arguments), stdout=subprocess.PIPE, check=False, text=True)
    if done.returncode:
        sys.exit(done.returncode)  # it has printed why
    return done.stdout


def start_sides(n, *flags):
    """Run this command with more flags (--side ...) in n processes; return their results in rank order."""
    lines = launch(n, os.path.abspath(__file__), *sys.argv[1:], *flags).splitlines()
    return sorted(map(json.loads, lines), key=lambda result: result.get("rank", 0))


def train(directory, n, steps, *flags, saves=True):
    """Run sft.py in n processes on the model of write_model; return the first lines of its metrics.jsonl.

    saves  False: kill it after these steps, so that it writes no checkpoint (100 GB for a 7B model)

    The first line gets the key "at": the Unix time at which it was written.
    """
    output = os.path.join(directory, "run")
    path = os.path.join(output, "metrics.jsonl")
    limit = str(steps if saves else 10 * steps)
    words = command(n, SFT, "--model", directory, "--output_dir", output, "--cache_dir", "none",
                    "--max_steps", limit, "--save_steps", limit, *flags)
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:

        def wait_for(n_lines):
            while process.poll() is None and lines_in(path) < n_lines:
                time.sleep(0.005)  # the resolution of "at"

        wait_for(1)
        at = time.time()
        if not saves:
            wait_for(steps)
            process.kill()
    if process.returncode != (0 if saves else -signal.SIGKILL):
        raise subprocess.CalledProcessError(process.returncode, words)
    with open(path, encoding="utf-8") as f:
        lines = [json.loads(line) for line in f.readlines()[:steps]]
    lines[0]["at"] = at
    shutil.rmtree(output)
    return lines


def lines_in(path):
    """Complete lines of a file, 0 if it does not exist."""
    if not os.path.exists(path):
        return 0
    with open(path, "rb") as f:
        return f.read().count(b"\n")


def bench_loss(cfg, directory):
    line = {name: start_sides(1, "--side", name)[0] for name in ("plain", "chunked")}
    return {**line, "memory_ratio": line["chunked"]["added_peak_gb"] / line["plain"]["added_peak_gb"],
            "time_ratio": line["chunked"]["seconds"][0] / line["plain"]["seconds"][0]}


def bench_load(cfg, directory):
    sizes = write_model(directory, QWEN_05B)
    ranks = start_sides(cfg.ranks, "--side", "load", "--directory", directory)
    for rank in ranks:
        rank["read_ratio"] = rank["read_gb"] / (sizes["file_gb"] / cfg.ranks)
        rank["memory_ratio"] = rank["added_peak_gb"] / (sizes["parameters_gb"] / cfg.ranks)
    worst = {key: max(rank[key] for rank in ranks) for key in ("read_ratio", "memory_ratio")}
    copies = spread([copy(directory, directory + "_copy", flush=False) for _ in range(cfg.repeats)])
    slowest = max(rank["seconds"][0] for rank in ranks)
    return {**sizes, **worst, "copy": copies, "copy_to_load": copies[0] / slowest, "ranks": ranks}


def bench_save(cfg, directory):
    sizes = write_model(directory, QWEN_05B)
    seconds = start_sides(1, "--side", "save", "--directory", directory)[0]
    return {**sizes, **seconds, "copy_to_save": seconds["copy"][0] / seconds["save"][0]}


def bench_ranks(cfg, directory):
    write_model(directory, SMALL)
    flags = ("--train_data", EXAMPLES, "--batch_size", "16", "--max_length", "512",
             "--no-gradient_checkpointing")
    speeds = {name: [] for name in MESHES}
    for _ in range(cfg.repeats):
        for name, (n, extra) in MESHES.items():  # in turn: if the machine slows down, it slows all of them
            steps = train(directory, n, cfg.steps, *flags, *extra)
            speeds[name].append(statistics.median(step["tokens_per_second"] for step in steps[UNSTEADY:]))
    ratios = {f"{a}_to_{b}": spread([x / y for x, y in zip(speeds[a], speeds[b])])  # within a round
              for a, b in (("dp2", "one"), ("tp2", "dp2"))}
    return {"tokens_per_second": {name: spread(values) for name, values in speeds.items()}, **ratios}


def peer_versions(cfg):
    try:
        return {name: importlib.metadata.version(name) for name in PACKAGES[cfg.vs]}
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"--vs {cfg.vs}: {error.name} is not installed; "
                        f"run pip install {' '.join(PACKAGES[cfg.vs])}") from error


def bench_data(cfg, directory):
    versions = peer_versions(cfg)
    n_rows = cfg.rows or 20000
    write_rows(os.path.join(directory, "rows.json"), n_rows)
    names = ["data", "encode"]
    if cfg.vs:
        names.append("trl_data")
    speeds = {}
    for i in range(cfg.repeats):  # in turn, each with an empty cache
        for name in names:
            subdirectory = os.path.join(directory, f"{name}_{i}")
            os.makedirs(subdirectory)
            shutil.copy(os.path.join(directory, "rows.json"), subdirectory)
            seconds = start_sides(1, "--side", name, "--directory", subdirectory)[0]["seconds"]
            speeds.setdefault(name, []).append(n_rows / seconds)
            shutil.rmtree(subdirectory)
    ratios = {f"data_to_{name}": spread([a / b for a, b in zip(speeds["data"], speeds[name])])
              for name in names[1:]}
    speeds = {name: spread(values) for name, values in speeds.items()}
    return {"conversations_per_second": speeds, **ratios, **versions}


def bench_chat(cfg, directory):
    write_model(directory, QWEN_05B)
    speeds = {"chat": [], "transformers": []}
    for _ in range(cfg.repeats):
        results = {name: start_sides(1, "--side", name, "--directory", directory)[0] for name in speeds}
        assert results["chat"]["ids"] == results["transformers"]["ids"]
        for name, result in results.items():
            speeds[name].append(cfg.new_tokens / result["seconds"])
    return {"tokens_per_second": {name: spread(values) for name, values in speeds.items()},
            "chat_to_transformers": spread([a / b for a, b in zip(*speeds.values())]),
            "transformers": importlib.metadata.version("transformers")}


def bench_delta(cfg, directory):
    return start_sides(1, "--side", "delta")[0]  # in one process: weights and losses are compared


def write_step(cfg, directory):
    """Write the model and the conversations of bench_step; return the model's config.json."""
    if cfg.rows and cfg.rows <= BATCH:
        raise UserError(f"--rows {cfg.rows}: a step has {BATCH} conversations, and the first one is not "
                        f"counted; pass at least {BATCH + 1}")
    config = dict(QWEN_05B, **SHAPES[cfg.shape])
    write_model(directory, config)
    n_rows = 3000 if cfg.device == "cuda" else 48  # on CUDA more than CUDA_STEPS
    write_rows(os.path.join(directory, "rows.json"), cfg.rows or n_rows, 2.3, 2.9, 1.1)  # median 120 tokens
    return config


def one_run(cfg, name, directory, *flags):
    """Run one side on the conversations in the directory.

    Returns tokens_per_second, peak_gb, start_seconds until the first step ended; of another trainer versions,
    of sft.py the lines of its metrics.
    """
    started = time.time()
    if name in STEP_SIDES:
        result = start_sides(1, "--side", name, "--directory", directory)[0]
        return {**result, "start_seconds": result["first"] - started}
    rows = os.path.join(directory, "rows.json")
    flags = ("--train_data", rows, "--no-gradient_checkpointing", *flags)
    if cfg.device == "cuda":
        n_rows = cuda_rows(cfg.shape)
        flags += ("--max_length", str(CUDA_LENGTH), "--micro_batch_size", str(n_rows),
                  "--batch_tokens", str(n_rows * CUDA_LENGTH))
        lines = train(directory, 1, CUDA_STEPS, *flags, saves=False)
    else:
        with open(rows, encoding="utf-8") as f:
            steps = -(-len(json.load(f)) // BATCH)
        flags += ("--max_length", str(LENGTH), "--batch_size", str(BATCH), "--micro_batch_size", str(BATCH),
                  "--epochs", "1")
        lines = train(directory, 1, steps, *flags)
    rate = speed([(line["seconds"], line["tokens"]) for line in lines], cfg.device)
    return {"tokens_per_second": rate, "peak_gb": lines[-1]["peak_memory_gb"],
            "start_seconds": lines[0]["at"] - started, "lines": lines}


def useful_flops(cfg, config, directory):
    """Floating-point operations that the loss of each step of one_run needs, on the CPU (ops/flops.py)."""
    dataset = data.load(os.path.join(directory, "rows.json"), ChatTokenizer(directory), LENGTH)
    sampler = data.Sampler(dataset.n_inputs, epochs=1, seed=42, batch_size=BATCH)
    batches = [sampler.step(step).ids for step in range(1, len(sampler) + 1)]
    config = ModelConfig.from_dict(config)
    with torch.device("meta"):
        matrices = Matrices.of(CausalLM(config).requires_grad_(not cfg.lora))
    matrices = dataclasses.replace(matrices, first=0)  # LoRA trains in each block
    return [step_flops(config, matrices, dataset.n_inputs[ids], dataset.n_targets[ids].sum())
            for ids in batches]


def bench_step(cfg, directory):
    versions = peer_versions(cfg)
    config = write_step(cfg, directory)
    on_cuda = cfg.device == "cuda"
    peers = PEERS[cfg.vs][-1:] if on_cuda else PEERS[cfg.vs]  # on CUDA packed only
    runs = {name: [] for name in ("sft", *peers)}
    uses, rates = [], []
    for _ in range(cfg.repeats):  # in turn
        for name, results in runs.items():
            results.append(one_run(cfg, name, directory, *(LORA if cfg.lora else ())))
            lines = results[-1].get("lines", ())
            if lines and not on_cuda:
                needed = sum(useful_flops(cfg, config, directory)[1:])
                rates.append(start_sides(1, "--side", "product")[0]["flops"])
                uses.append(needed / sum(line["seconds"] for line in lines[1:]) / rates[-1])
            elif lines:
                uses.append(statistics.median(line["mfu"] for line in lines[UNSTEADY:]))
    keys = ("tokens_per_second", "peak_gb", "start_seconds")
    figures, spreads = {}, {}
    for name, results in runs.items():
        figures[name] = {key: [result[key] for result in results] for key in keys}
        spreads[name] = {key: spread(values) for key, values in figures[name].items()}
    ratios = {f"{key}_sft_to_{name}": spread([a / b for a, b in zip(figures["sft"][key], figures[name][key])])
              for name in peers for key in keys}
    use = {"mfu": spread(uses)} if on_cuda else {
        "flops_use": spread(uses), "product_gflops": spread([rate / 1e9 for rate in rates])}
    for name in peers:
        versions.update(runs[name][0]["versions"])
    return {"shape": cfg.shape, "lora": cfg.lora, **spreads, **use, **ratios, **versions}


def bench_start(cfg, directory):
    versions = peer_versions(cfg)
    shutil.copytree(pretrained.model_directory("tiny"), directory, dirs_exist_ok=True)
    write_rows(os.path.join(directory, "rows.json"), cfg.rows or 48)
    flags = {"sft": (), "sft_cached": ("--cache_dir", os.path.join(directory, "cache"))}
    names = [*flags, *PEERS[cfg.vs][:1]]
    seconds = {}
    one_run(cfg, "sft_cached", directory, *flags["sft_cached"])  # writes the cache
    for _ in range(cfg.repeats):  # in turn
        for name in names:
            result = one_run(cfg, name, directory, *flags.get(name, ()))
            seconds.setdefault(name, []).append(result["start_seconds"])
    ratios = {f"{sft}_to_{name}": spread([a / b for a, b in zip(seconds[sft], seconds[name])])
              for name in PEERS[cfg.vs][:1] for sft in flags}
    return {"start_seconds": {name: spread(values) for name, values in seconds.items()}, **ratios, **versions}


def write_full_rows(directory, length, n):
    """Write n rows of `length` tokens, nearly all targets; return the path."""
    path = os.path.join(directory, "rows.json")
    with open(path, "w", encoding="utf-8") as f:
        json.dump([{"input_ids": [7] * length}] * n, f)
    return path


# of --part plan: what a process takes before it has a model. tools.bench takes about as much as the tokenizer
BASE = """import sys
sys.path.insert(0, {root!r})
import tools.bench_sides, sft, tools.bench, {modules}
from ranks import processes
with processes.start({tp}, 60) as ranks:
    ranks.all_reduce(torch.zeros(1))
    if ranks.rank == 0:  # the others have as much
        print(tools.bench_sides.proc_gb('status', 'VmRSS'))
"""


def base_gb(n, kind, directory):
    """Memory of one of n processes that has imported what a run with these flags does, and met the others."""
    modules = ["torch"]
    if "--no-gradient_checkpointing" not in kind:
        modules.append("torch._dynamo")  # torch's checkpoint() imports it
    if n > 1 or "--param_offload" in kind:
        modules.append("torch.distributed.fsdp")
    if "--tp" in kind:
        modules.append("torch.distributed.tensor.parallel")
    path = os.path.join(directory, "base.py")
    with open(path, "w", encoding="utf-8") as f:
        f.write(BASE.format(root=PROJECT, modules=", ".join(modules), tp=2 if "--tp" in kind else 1))
    return float(launch(n, path))


def bench_plan(cfg, directory):
    line, runs = {}, [(shape, kind, 1) for shape in PLANNED for kind in PLANNED[shape][2]]
    runs += [(next(iter(PLANNED)), kind, n) for kind, n in PLANNED_RANKS.items()]
    for shape, kind, n in runs:
        config, length, _ = PLANNED[shape]
        write_model(directory, dict(QWEN_05B, **config))
        words = kind.split()
        batch_size = int(words[words.index("--batch_size") + 1]) if "--batch_size" in words else 1
        rows = write_full_rows(directory, length, batch_size * 2)
        flags = ("--max_length", str(length), "--batch_size", str(batch_size), *words)
        printed = launch(n, os.path.join(PROJECT, "tools", "plan.py"), "--model", directory, *flags)
        peak_line = next(text for text in printed.splitlines() if text.startswith("peak"))
        planned = float(peak_line.split()[1])
        base, peaks = base_gb(n, kind, directory), []
        for _ in range(cfg.repeats):  # of runs: the same one has another peak each time
            steps = train(directory, n, 2, "--train_data", rows, *flags)
            assert all(step["tokens"] == length * batch_size for step in steps)
            peaks.append(steps[-1]["peak_memory_gb"] - base)
        name = " ".join([shape, *[f"{n} ranks"] * (n > 1), *words])
        line[name] = {"base_gb": base, "planned_gb": planned, "peak_gb": spread(peaks),
                      "ratio": planned / statistics.median(peaks)}
    largest = max(abs(run["ratio"] - 1) for run in line.values())
    return {"runs": line, "largest_difference": largest}


def bench_memory(cfg, directory):
    versions = peer_versions(cfg)
    write_model(directory, QWEN_05B)
    path = write_full_rows(directory, LENGTH, cfg.repeats + 1)
    flags = ("--train_data", path, "--max_length", str(LENGTH), "--batch_size", "1",
             "--micro_batch_size", "1")
    line = {}
    for name, extra in (("full", ()), ("lora", LORA)):
        steps = train(directory, 1, cfg.repeats + 1, *flags, *extra)
        assert all(step["tokens"] == LENGTH for step in steps)
        line[name] = {"peak_gb": steps[-1]["peak_memory_gb"],
                      "seconds": spread([step["seconds"] for step in steps[1:]])}
        if cfg.vs:
            line[f"trl_{name}"] = start_sides(1, "--side", f"trl_{name}", "--directory", directory)[0]
    ratios = {f"{a}_to_{b}": line[a]["peak_gb"] / line[b]["peak_gb"]
              for a, b in (("lora", "full"), ("lora", "trl_lora"), ("full", "trl_full")) if b in line}
    time_ratio = line["lora"]["seconds"][0] / line["full"]["seconds"][0]
    return {**line, **ratios, "time_lora_to_full": time_ratio, **versions}


def main():
    cfg, _ = parse(Config, sys.argv[1:])
    if cfg.compare:  # a program of its own: it imports gpu_check, whose stages import this file
        os.execv(sys.executable, [sys.executable, COMPARE, *sys.argv[1:]])
    if cfg.side in STEP_SIDES and not os.path.exists(os.path.join(cfg.directory, "config.json")):
        # in a process of its own, whose memory is not counted
        launch(1, os.path.abspath(__file__), *sys.argv[1:], "--side", "files")
    if cfg.side == "files":
        os.makedirs(cfg.directory, exist_ok=True)
        write_step(cfg, cfg.directory)
        return
    if cfg.side:
        result = SIDES[cfg.side](cfg)
        # a single write: torchrun's processes are unbuffered, and print would write the newline separately
        print(json.dumps(result) + "\n", end="")
        return
    for part in [cfg.part] if cfg.part else DEFAULT:
        vs = cfg.vs if cfg.vs and part in COMPARED[cfg.vs] else None
        measure(dataclasses.replace(cfg, part=part, vs=vs))


def measure(cfg):
    """Measure one part and print its line."""
    threads = 1 if cfg.ranks > 1 or cfg.part == "ranks" else torch.get_num_threads()
    device = f"CPU, {os.cpu_count()} cores, {threads} threads per process"
    if cfg.device == "cuda":  # asked in a process of its own: a context here would take memory of the GPU
        device = launch(1, "-c", "import torch; print(torch.cuda.get_device_name())").strip()
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # for both sides
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    line = {"part": cfg.part, "command": " ".join(["python", *sys.argv]), "torch": torch.__version__,
            "python": platform.python_version(), "device": device}
    with tempfile.TemporaryDirectory() as directory:
        # for the processes of the sides; TMPDIR because torchrun leaves a folder in it
        os.environ.update(OMP_NUM_THREADS=str(threads), TMPDIR=directory)
        parts = {"loss": bench_loss, "load": bench_load, "save": bench_save, "ranks": bench_ranks,
                 "memory": bench_memory, "data": bench_data, "chat": bench_chat, "delta": bench_delta,
                 "step": bench_step, "start": bench_start, "plan": bench_plan, "scale": bench_scale}
        line.update(parts[cfg.part](cfg, directory))
    # four digits; more would be noise
    line = json.loads(json.dumps(line), parse_float=lambda text: float(f"{float(text):.4g}"))
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    run(main)
