"""Measure the trainer: python tools/bench.py prints one JSON line a part; --part NAME measures one, also of
those that are not among the six of DEFAULT. It takes some minutes, with --vs trl a quarter of an hour.

loss   the chunked cross-entropy beside a plain one: seconds and peak memory of forward and backward
load   a model directory of random weights, loaded into fp32 by one process or --ranks of them as sft.py does
       it: what each reads beside its share of the file, its peak memory beside its share of the parameters
save   a checkpoint of the same model, moments and fp32 masters included, written by one process, beside a
       copy of its files; both are flushed to the disk. load has such a copy too, unflushed
ranks  tokens per second of sft.py on a small model as one process, as two (dp 2) and as two (tp 2), in turn
data   conversations a second of data.load (read, render, tokenise, mask, write the cache) beside encode_batch
       alone on the same text, with all cores; with --vs trl beside TRL's preparation of the same
       conversations to the same targets, in two processes
chat   tokens a second of chat.py's generation beside transformers' generate, greedy, on the same random
       weights of the size of Qwen2.5-0.5B in fp32, behind a prompt of 64 tokens (pip install transformers)
step   non-pad tokens a second and peak memory of sft.py on random weights of --shape small or mid in fp32,
       all trained, without checkpointing, on conversations of log-normal length up to 1,024 tokens, and
       seconds from the launch to the first optimizer step's end; with --vs trl the same conversations by
       TRL's SFTTrainer, padded and packed, with --vs transformers by a plain loop around its model: padded
       batches, AdamW. flops_use: of sft.py, the operations that its losses need (head on targets, attention
       per document) beside what a product of 2,048 x 2,048 reaches, product_gflops. The faster the products
       of a machine are, the larger is the share of everything else in a step, which memory bounds
start  seconds from the launch of sft.py to the end of its first optimizer step on the embedded model, with
       nothing cached and with the tokens cached; with --vs beside TRL's SFTTrainer on the same, or beside
       transformers, as in step
memory peak memory and seconds per step of sft.py on random weights of the size of Qwen2.5-0.5B,
       1 x 1,024 tokens in fp32, full and with LoRA; with --vs trl the same by TRL's SFTTrainer
       (pip install trl peft) in the same Python
plan   the memory that tools/plan.py predicts beside the peak of a run, both above what the process takes
       before it has a model, in fp32: two shapes, full and with LoRA, with and without checkpointing and
       offload, one or two micro-batches a step, whose conversations fill max_length

Each side runs in processes of its own, as peak memory is the process's; figures of one line come from one run
of this command and are meant as ratios: three numbers are the median, the least and the most. On the CPU, of
Linux: memory and bytes come from /proc. Nothing here is a test.
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
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from safetensors.torch import save_file

import data
from disk import pretrained
from families.config import ModelConfig
from model import CausalLM
from settings.errors import UserError, run
from settings.parser import check, parse, setting
from settings.venv import PROJECT
from text import formats
from text.template import ChatTokenizer
from tools.bench_sides import ALPHA, BATCH, LENGTH, QWEN_05B, RANK, SIDES, copy, spread

SFT = os.path.join(PROJECT, "sft.py")
EXAMPLES = os.path.join(PROJECT, "data", "example_sft.json")
SMALL = dict(model_type="qwen2", hidden_size=256, intermediate_size=768, num_hidden_layers=4, vocab_size=2048,
             num_attention_heads=8, num_key_value_heads=4, rope_theta=1e4, tie_word_embeddings=True)
SHAPES = {  # of --part step
    "small": dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, vocab_size=151936),
    "mid": dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, vocab_size=32768),
}
PLANNED = {  # of --part plan: the model, tokens of a conversation, flags and their combinations
    "32k": (dict(hidden_size=640, intermediate_size=1728, num_hidden_layers=12, vocab_size=32000,
                 num_attention_heads=10), 1024,
            ("", "--no-gradient_checkpointing", "--batch_size 2", "--optimizer_offload", "--param_offload",
             "--use_lora", "--use_lora --no-gradient_checkpointing")),
    "152k": (dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8), 1536,
             ("", "--no-gradient_checkpointing", "--optimizer_offload",
              "--param_offload --no-gradient_checkpointing", "--use_lora --param_offload")),
}
# processes, flags
LAYOUTS = {"one": (1, ()), "dp2": (2, ()), "tp2": (2, ("--strategy", "megatron", "--tp", "2"))}
DEFAULT = ("loss", "data", "step", "load", "save", "start")
# of each --vs: the sides, packages, and parts that have it
PEERS = {"trl": ("trl_padded", "trl_packed"), "transformers": ("plain_loop",), None: ()}
PACKAGES = {"trl": ("trl", "transformers", "peft"), "transformers": ("transformers",), None: ()}
COMPARED = {"trl": ("memory", "data", "step", "start"), "transformers": ("step", "start")}
UNSTEADY = 5  # first steps of a run, which are left out: caches are filled, buffers allocated


@dataclass
class Config:
    """Measure a part of the trainer: python tools/bench.py [--part NAME] [flags]"""

    part: str | None = setting(None, f"what to measure; none is {', '.join(DEFAULT)}, one after another",
                            ("loss", "load", "ranks", "memory", "data", "chat", "step", "save", "start",
                             "plan"), group="bench")
    repeats: int = setting(3, "timed runs, or steps of memory; but for ranks, after a warm-up", low=1)
    tokens: int = setting(4096, "loss: rows of the hidden state", low=1)
    hidden: int = setting(896, "loss: their width", low=1)
    vocab: int = setting(151936, "loss: words", low=1)
    targets: float = setting(0.5, "loss: share of the tokens that are targets; the others are prompt",
                          low=0, high=1)
    ranks: int = setting(1, "load: processes that share the model", low=1)
    steps: int = setting(20, f"ranks: optimizer steps of a run; the first {UNSTEADY} are not counted",
                      low=UNSTEADY + 1)
    rows: int | None = setting(None, "data, step, start: conversations; none is 20,000, 48 and 48", low=1)
    shape: str = setting("mid", "step: of the model", ("small", "mid"))
    new_tokens: int = setting(64, "chat: length of the answer", low=1)
    model: str = setting("tiny", "data: whose tokenizer and template")
    peer_checkpointing: bool = setting(True, "memory: gradient checkpointing of the peer, which is its default",
                                    needs="vs")
    side: str | None = setting(None, "do this step only, in this process",
                            tuple(SIDES))
    directory: str | None = setting(None, "load, memory, chat: where the model is, for --side")
    vs: str | None = setting(None, "memory, data, step, start: another trainer, on the same",
                          ("trl", "transformers"))

    def __post_init__(self):
        check(self)
        if self.ranks > 1 and self.part != "load":
            raise UserError(f"--ranks {self.ranks} is for --part load only")
        if self.vs and self.part and self.part not in COMPARED[self.vs]:
            parts = ", ".join(COMPARED[self.vs])
            raise UserError(f"--vs {self.vs} is not for --part {self.part}: it is for {parts}")


def write_rows(path, n, question=3.3, answer=3.9, sigma=0.9):
    """n conversations of the words of the example set, whose numbers are log-normal."""
    words = [word for _, row in formats.read_files(EXAMPLES)
             for message in formats.to_messages(row, "") for word in message["content"].split()]
    generator = random.Random(0)

    def text(middle):
        return " ".join(generator.choices(words, k=max(2, int(generator.lognormvariate(middle, sigma)))))

    rows = [{"messages": [{"role": "user", "content": text(question)},
                          {"role": "assistant", "content": text(answer)}]} for _ in range(n)]
    with open(path, "w", encoding="utf-8") as f:
        json.dump(rows, f, ensure_ascii=False)


def write_model(directory, config):
    """A model directory of random weights in bf16, as the hub has it, with the tokenizer of `tiny`; the size
    of its file, and that of the parameters in fp32."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in CausalLM(ModelConfig.from_dict(config)).named_parameters()}
    tensors = {n: torch.ones(s, dtype=torch.bfloat16) if "norm" in n
               else torch.randn(s, dtype=torch.bfloat16).mul_(0.02) for n, s in shapes.items()}
    path = os.path.join(directory, "model.safetensors")
    save_file(tensors, path, metadata={"format": "pt"})
    with open(os.path.join(directory, "config.json"), "w", encoding="utf-8") as f:
        json.dump(config, f)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(pretrained.model_directory("tiny"), name), directory)
    n_parameters = sum(t.numel() for t in tensors.values())
    return {"file_gb": os.path.getsize(path) / 2**30, "parameters_gb": n_parameters / 2**28}


def launch(n, *words):
    """What a program prints, run as n processes of their own."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)] if n > 1 else []
    command = [sys.executable, *several, *words]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout


def start_sides(n, *flags):
    """The results of n processes that run `bench.py --side ...` with this command's flags, by rank."""
    lines = launch(n, os.path.abspath(__file__), *sys.argv[1:], *flags).splitlines()
    return sorted(map(json.loads, lines), key=lambda result: result.get("rank", 0))


def train(directory, n, steps, *flags):
    """What a run of sft.py, as n processes, writes of its steps; the model is the one of write_model."""
    output = os.path.join(directory, "run")
    path, lines = os.path.join(output, "metrics.jsonl"), []
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(launch, n, SFT, "--model", directory, "--output_dir", output, "--cache_dir", "none",
                          "--max_steps", str(steps), "--save_steps", str(steps), *flags)
        while not run.done() and not (os.path.exists(path) and os.path.getsize(path)):
            time.sleep(0.005)  # how exactly the first step's end is seen
        first = time.time()
        run.result()
    with open(path, encoding="utf-8") as f:
        lines = [json.loads(line) for line in f]
    lines[0]["at"] = first
    shutil.rmtree(output)
    return lines


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
    speeds = {name: [] for name in LAYOUTS}
    for _ in range(cfg.repeats):
        for name, (n, extra) in LAYOUTS.items():  # in turn: a machine that slows down slows all of them
            steps = train(directory, n, cfg.steps, *flags, *extra)
            speeds[name].append(statistics.median(step["tokens_per_second"] for step in steps[UNSTEADY:]))
    ratios = {f"{a}_to_{b}": spread([x / y for x, y in zip(speeds[a], speeds[b])])  # of the runs of one round
              for a, b in (("dp2", "one"), ("tp2", "dp2"))}
    return {"tokens_per_second": {name: spread(values) for name, values in speeds.items()}, **ratios}


def peer_versions(cfg):
    try:
        return {name: importlib.metadata.version(name) for name in PACKAGES[cfg.vs]}
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"--vs {cfg.vs}: type pip install {' '.join(PACKAGES[cfg.vs])}; {error.name} is not "
                        "installed") from error


def bench_data(cfg, directory):
    versions = peer_versions(cfg)
    write_rows(os.path.join(directory, "rows.json"), rows := cfg.rows or 20000)
    names, speeds = ["data", "encode"] + ["trl_data"] * bool(cfg.vs), {}
    for i in range(cfg.repeats):  # in turn, each with nothing cached
        for name in names:
            inner = os.path.join(directory, f"{name}_{i}")
            os.makedirs(inner)
            shutil.copy(os.path.join(directory, "rows.json"), inner)
            seconds = start_sides(1, "--side", name, "--directory", inner)[0]["seconds"]
            speeds.setdefault(name, []).append(rows / seconds)
            shutil.rmtree(inner)
    ratios = {f"data_to_{name}": spread([a / b for a, b in zip(speeds["data"], speeds[name])])
              for name in names[1:]}
    found = {name: spread(values) for name, values in speeds.items()}
    return {"conversations_per_second": found, **ratios, **versions}


def bench_chat(cfg, directory):
    write_model(directory, QWEN_05B)
    speeds = {"chat": [], "transformers": []}
    for _ in range(cfg.repeats):
        results = {name: start_sides(1, "--side", name, "--directory", directory)[0] for name in speeds}
        assert results["chat"]["ids"] == results["transformers"]["ids"]
        for name, result in results.items():
            speeds[name].append(cfg.new_tokens / result["seconds"])
    return {"tokens_per_second": {name: spread(found) for name, found in speeds.items()},
            "chat_to_transformers": spread([a / b for a, b in zip(*speeds.values())]),
            "transformers": importlib.metadata.version("transformers")}


def one_run(name, directory, rows, *flags):
    """A run of one side: [(seconds, tokens) of each step], peak memory, seconds to the first step's end."""
    started = time.time()
    if name in ("trl_padded", "trl_packed", "plain_loop"):
        result = start_sides(1, "--side", name, "--directory", directory)[0]
        return result["steps"], result["peak_gb"], result["first"] - started
    flags = ("--train_data", os.path.join(directory, "rows.json"), "--max_length", str(LENGTH),
             "--batch_size", str(BATCH), "--micro_batch_size", str(BATCH), "--no-gradient_checkpointing",
             "--epochs", "1", *flags)
    lines = train(directory, 1, -(-rows // BATCH), *flags)
    steps = [(line["seconds"], line["tokens"]) for line in lines]
    return steps, lines[-1]["peak_memory_gb"], lines[0]["at"] - started


def useful_flops(config, directory):
    """Floating-point operations that the loss of each step of one_run needs, forward and backward.

    Backward needs twice as many as forward. Counted are each input in the blocks' matrices, each
    target in the head, each causal pair in attention.
    """
    with torch.device("meta"):
        model = CausalLM(ModelConfig.from_dict(config))
    blocks = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    heads = config["num_hidden_layers"] * model.config.num_attention_heads * model.config.head_dim
    rows = data.load(os.path.join(directory, "rows.json"), ChatTokenizer(directory), LENGTH)
    sampler, flops = data.Sampler(rows.n_inputs, epochs=1, seed=42, batch_size=BATCH), []
    for step in range(1, len(sampler) + 1):
        ids = sampler.step(step).ids
        lengths = rows.n_inputs[ids].astype(int)
        head = config["vocab_size"] * config["hidden_size"] * rows.n_targets[ids].sum()
        flops.append(6 * int(blocks * lengths.sum() + head + heads * (lengths * (lengths + 1)).sum()))
    return flops


def bench_step(cfg, directory):
    versions = peer_versions(cfg)
    config = dict(QWEN_05B, num_attention_heads=8, num_key_value_heads=2, **SHAPES[cfg.shape])
    write_model(directory, config)
    rows = cfg.rows or 48
    write_rows(os.path.join(directory, "rows.json"), rows, 2.3, 2.9, 1.1)  # median about 120 tokens
    found = {name: {"tokens_per_second": [], "peak_gb": [], "start_seconds": []}
             for name in ("sft", *PEERS[cfg.vs])}
    uses, rates, needed = [], [], sum(useful_flops(config, directory)[1:])
    for _ in range(cfg.repeats):  # in turn
        for name, figures in found.items():
            steps, peak, start = one_run(name, directory, rows)
            seconds, tokens = map(sum, zip(*steps[1:]))
            if name == "sft":
                rates.append(start_sides(1, "--side", "product")[0]["flops"])
                uses.append(needed / seconds / rates[-1])
            for figure, value in zip(figures.values(), (tokens / seconds, peak, start)):
                figure.append(value)
    ratios = {f"{key}_sft_to_{name}": spread([a / b for a, b in zip(found["sft"][key], found[name][key])])
              for name in PEERS[cfg.vs] for key in found["sft"]}
    return {"shape": cfg.shape, **{name: {key: spread(values) for key, values in figures.items()}
                                   for name, figures in found.items()}, "flops_use": spread(uses),
            "product_gflops": spread([rate / 1e9 for rate in rates]), **ratios, **versions}


def bench_start(cfg, directory):
    versions = peer_versions(cfg)
    shutil.copytree(pretrained.model_directory("tiny"), directory, dirs_exist_ok=True)
    write_rows(os.path.join(directory, "rows.json"), rows := cfg.rows or 48)
    flags = {"sft": (), "sft_cached": ("--cache_dir", os.path.join(directory, "cache"))}
    names, seconds = [*flags, *PEERS[cfg.vs][:1]], {}
    one_run("sft_cached", directory, rows, *flags["sft_cached"])  # fills it
    for _ in range(cfg.repeats):  # in turn
        for name in names:
            seconds.setdefault(name, []).append(one_run(name, directory, rows, *flags.get(name, ()))[2])
    ratios = {f"{ours}_to_{name}": spread([a / b for a, b in zip(seconds[ours], seconds[name])])
              for name in PEERS[cfg.vs][:1] for ours in flags}
    return {"start_seconds": {name: spread(found) for name, found in seconds.items()}, **ratios, **versions}


def write_full_rows(directory, length, n):
    """The path of n conversations that fill `length` tokens, nearly all of them targets."""
    answer = "the " * length  # one token each
    turns = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": answer}]
    path = os.path.join(directory, "rows.json")
    with open(path, "w", encoding="utf-8") as f:
        json.dump([{"messages": turns}] * n, f)
    return path


def bench_plan(cfg, directory):
    def base_gb(*modules):
        code = (f"import sys; sys.path.insert(0, {PROJECT!r}); import tools.bench_sides, "
                f"{', '.join(modules)}; print(tools.bench_sides.proc_gb('status', 'VmRSS'))")
        return float(launch(1, "-c", code))

    line = {}
    for shape, (config, length, runs) in PLANNED.items():
        write_model(directory, dict(QWEN_05B, **config))
        rows = write_full_rows(directory, length, 2 * (cfg.repeats + 1))
        for kind in runs:
            batch = () if "batch_size" in kind else ("--batch_size", "1")
            flags = ("--max_length", str(length), *batch, *kind.split())
            words = launch(
                1, os.path.join(PROJECT, "tools", "plan.py"), "--model", directory, *flags).splitlines()
            planned = float(next(text for text in words if text.startswith("peak")).split()[1])
            steps = train(directory, 1, cfg.repeats + 1, "--train_data", rows, *flags)
            assert all(step["tokens"] == length * (2 if "batch_size" in kind else 1) for step in steps)
            base = base_gb("sft", "tools.bench",  # bench: about what the tokenizer is
                           # checkpoint() imports it
                           *["torch._dynamo"] * ("--no-gradient_checkpointing" not in kind),
                           *["torch.distributed.fsdp"] * ("--param_offload" in kind))
            peak = steps[-1]["peak_memory_gb"] - base
            line[f"{shape} {kind}".strip()] = {"base_gb": base, "planned_gb": planned, "peak_gb": peak,
                                               "ratio": planned / peak}
    off = max(abs(found["ratio"] - 1) for found in line.values())
    return {"runs": line, "largest_difference": off}


def bench_memory(cfg, directory):
    versions = peer_versions(cfg)
    write_model(directory, QWEN_05B)
    path = write_full_rows(directory, LENGTH, cfg.repeats + 1)
    flags = ("--train_data", path, "--max_length", str(LENGTH), "--batch_size", "1",
             "--micro_batch_size", "1")
    lora = ("--use_lora", "--lora_rank", str(RANK), "--lora_alpha", str(ALPHA),
            "--lora_targets", "all-linear")
    line = {}
    for name, extra in (("full", ()), ("lora", lora)):
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
    if cfg.side:
        result = SIDES[cfg.side](cfg)
        # one write: torchrun's processes are unbuffered, and print writes the end of the line on its own
        return print(json.dumps(result) + "\n", end="")
    for part in [cfg.part] if cfg.part else DEFAULT:
        vs = cfg.vs if cfg.vs and part in COMPARED[cfg.vs] else None
        measure(dataclasses.replace(cfg, part=part, vs=vs))


def measure(cfg):
    """Print the line of one part."""
    threads = 1 if cfg.ranks > 1 or cfg.part == "ranks" else torch.get_num_threads()
    line = {"part": cfg.part, "command": " ".join(["python", *sys.argv]), "torch": torch.__version__,
            "python": platform.python_version(),
            "device": f"CPU, {os.cpu_count()} cores, {threads} threads a process"}
    with tempfile.TemporaryDirectory() as directory:
        # for the processes that are started; torchrun leaves a folder in TMPDIR
        os.environ.update(OMP_NUM_THREADS=str(threads), CUDA_VISIBLE_DEVICES="", TMPDIR=directory)
        parts = {"loss": bench_loss, "load": bench_load, "save": bench_save, "ranks": bench_ranks,
                 "memory": bench_memory, "data": bench_data, "chat": bench_chat, "step": bench_step,
                 "start": bench_start, "plan": bench_plan}
        line.update(parts[cfg.part](cfg, directory))
    # four digits: the others are noise
    line = json.loads(json.dumps(line), parse_float=lambda text: float(f"{float(text):.4g}"))
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    run(main)
