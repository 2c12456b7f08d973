"""Measure the trainer: python bench.py prints one JSON line a part; --part NAME measures one, also of those that are
not among the six of DEFAULT. It takes some minutes, with --vs trl a quarter of an hour.

loss   the chunked cross-entropy beside a plain one: seconds and peak memory of forward and backward
load   a model directory of random weights, loaded into fp32 by one process or --ranks of them as sft.py does it: what
       each reads beside its share of the file, and its peak memory beside its share of the parameters
save   a checkpoint of the same model, moments and fp32 masters included, written by one process, beside a copy of its
       files; both are flushed to the disk. load has such a copy too, unflushed
ranks  tokens per second of sft.py on a small model as one process, as two (dp 2) and as two (tp 2), in turn
data   conversations a second of data.load (read, render, tokenise, mask, write the cache) beside encode_batch alone on
       the same text, with all cores; with --vs trl beside TRL's preparation of the same conversations to the same
       targets, in two processes
chat   tokens a second of chat.py's generation beside transformers' generate, greedy, on the same random weights of the
       size of Qwen2.5-0.5B in fp32, behind a prompt of 64 tokens (pip install transformers)
step   non-pad tokens a second and peak memory of sft.py on random weights of --shape small or mid in fp32, all trained,
       without checkpointing, on conversations of log-normal length up to 1,024 tokens, and seconds from the launch to
       the first optimizer step's end; with --vs trl the same conversations by TRL's SFTTrainer, padded and packed, with
       --vs transformers by a plain loop around its model: padded batches, AdamW. flops_use: of sft.py, the operations
       that its losses need (head on targets, attention per document) beside what a product of 2,048 x 2,048 reaches,
       product_gflops. The faster the products of a machine are, the more of a step is all else, which memory bounds
start  seconds from the launch of sft.py to the end of its first optimizer step on the embedded model, with nothing
       cached and with the tokens cached; with --vs trl beside TRL's SFTTrainer on the same, or transformers, as in step
memory peak memory and seconds per step of sft.py on random weights of the size of Qwen2.5-0.5B, 1 x 1,024 tokens in
       fp32, full and with LoRA; with --vs trl the same by TRL's SFTTrainer (pip install trl peft) in the same Python
plan   what sft.py --plan says that a run's memory will be beside its peak, both above what the process takes before it
       has a model, in fp32: two shapes, full and with LoRA, with and without checkpointing and offload, one or two
       micro-batches a step, whose conversations fill max_length

Each side runs in processes of its own, as peak memory is the process's; figures of one line come from one run of this
command and are meant as ratios: three numbers are the median, the least and the most. On the CPU, of Linux: memory
and bytes are what /proc tells. Nothing here is a test.
"""

import contextlib
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
import torch.nn.functional as F
from safetensors.torch import save_file

import chat
import checkpoint
import data
import disk
import formats
import fsdp
import pretrained
import processes
from config import knob, parse, run
from model import IGNORE, CausalLM, ModelConfig, chunked_cross_entropy, generate
from template import ChatTokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
QWEN_05B = dict(model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24, vocab_size=151936,
                num_attention_heads=14, num_key_value_heads=2, rope_theta=1e6, tie_word_embeddings=True,
                architectures=["Qwen2ForCausalLM"])
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
             ("", "--no-gradient_checkpointing", "--optimizer_offload", "--param_offload --no-gradient_checkpointing",
              "--use_lora --param_offload")),
}
LAYOUTS = {"one": (1, ()), "dp2": (2, ()), "tp2": (2, ("--strategy", "megatron", "--tp", "2"))}  # processes, flags
DEFAULT = ("loss", "data", "step", "load", "save", "start")
COMPARED = {"trl": ("memory", "data", "step", "start"), "transformers": ("step", "start")}  # the parts of each --vs
RANK, ALPHA = 8, 16  # of LoRA, on all linear layers
LENGTH, BATCH = 1024, 4  # memory: tokens of a step; step: of a conversation, and conversations a step
UNSTEADY = 5  # first steps of a run, which are left out: caches are filled, buffers allocated


@dataclass
class Config:
    """Measure a part of the trainer: python bench.py [--part NAME] [flags]"""

    part: str | None = knob(None, f"what to measure; none is {', '.join(DEFAULT)}, one after another",
                            ("loss", "load", "ranks", "memory", "data", "chat", "step", "save", "start", "plan"),
                            group="bench")
    repeats: int = knob(3, "timed runs, or steps of memory; but for ranks, after a warm-up")
    tokens: int = knob(4096, "loss: rows of the hidden state")
    hidden: int = knob(896, "loss: their width")
    vocab: int = knob(151936, "loss: words")
    targets: float = knob(0.5, "loss: share of the tokens that are targets; the others are prompt")
    ranks: int = knob(1, "load: processes that share the model")
    steps: int = knob(20, f"ranks: optimizer steps of a run; the first {UNSTEADY} are not counted")
    rows: int | None = knob(None, "data, step, start: conversations; none is 20,000, 48 and 48")
    shape: str = knob("mid", "step: of the model", ("small", "mid"))
    new_tokens: int = knob(64, "chat: length of the answer")
    model: str = knob("tiny", "data: whose tokenizer and template")
    peer_checkpointing: bool = knob(True, "memory: gradient checkpointing of the peer, which is its default")
    side: str | None = knob(None, "do this step only, in this process",
                            ("plain", "chunked", "product", "load", "trl_full", "trl_lora", "data", "encode",
                             "trl_data", "chat", "save", "transformers", "trl_padded", "trl_packed", "plain_loop"))
    directory: str | None = knob(None, "load, memory, chat: where the model is, for --side")
    vs: str | None = knob(None, "memory, data, step, start: another trainer, on the same", ("trl", "transformers"))

    def __post_init__(self):
        if self.ranks < 1 or (self.ranks > 1 and self.part != "load"):
            raise ValueError(f"--ranks {self.ranks}: it must be at least 1, and above 1 is for --part load only")
        if not self.peer_checkpointing and not self.vs:
            raise ValueError("--no-peer_checkpointing does nothing without --vs trl")
        if self.steps <= UNSTEADY:
            raise ValueError(f"--steps {self.steps}: it must be above {UNSTEADY}, as the first {UNSTEADY} don't count")
        if self.vs and self.part and self.part not in COMPARED[self.vs]:
            raise ValueError(f"--vs {self.vs} is not for --part {self.part}: it is for {', '.join(COMPARED[self.vs])}")


def spread(values):
    return [statistics.median(values), min(values), max(values)]


def proc_gb(file, name):
    """A figure of this process in GiB, from /proc/self: VmRSS (now) and VmHWM (at most so far) of status, rchar (read)
    of io. Unlike getrusage's peak, VmHWM does not begin with that of the process which started this one."""
    with open(f"/proc/self/{file}", encoding="utf-8") as f:
        number, *unit = dict(line.split(":", 1) for line in f)[name].split()
    return int(number) / (2**20 if unit == ["kB"] else 2**30)


def timed(action, repeats):
    """Seconds of action(), the memory that the process has before, and what the first call adds to it at its peak."""
    base = proc_gb("status", "VmRSS")
    action()
    added = proc_gb("status", "VmHWM") - base
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return {"seconds": spread(seconds), "base_gb": base, "added_peak_gb": added}


def side_loss(cfg):
    torch.manual_seed(0)
    hidden = torch.randn(cfg.tokens, cfg.hidden, requires_grad=True)
    weight = (torch.randn(cfg.vocab, cfg.hidden).mul_(0.02)).requires_grad_()
    targets = torch.randint(0, cfg.vocab, (cfg.tokens,))
    targets[torch.rand(cfg.tokens) >= cfg.targets] = IGNORE

    def plain():
        F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE, reduction="sum").backward()

    def chunked():
        chunked_cross_entropy(hidden, weight, targets).backward()

    def action():
        hidden.grad = weight.grad = None
        (plain if cfg.side == "plain" else chunked)()

    return timed(action, cfg.repeats)


def side_product(cfg):
    """What this machine's processor can do, in the units of useful_flops."""
    a, b = torch.randn(2, 2048, 2048)
    seconds = timed(lambda: a @ b, 10)["seconds"]
    return {"flops": 2 * 2048**3 / seconds[0]}


def side_load(cfg):
    """What sft.py does between the data and the first step, without an optimizer; every rank calls it."""
    read = []

    def load():
        with torch.device("meta"):
            model = CausalLM(ModelConfig.from_dict(QWEN_05B))
        fsdp.shard(model, ranks, False, False)
        model.to_empty(device=ranks.device)
        model.tie_weights()
        before = proc_gb("io", "rchar")
        pretrained.load_weights(model, cfg.directory)
        read.append(proc_gb("io", "rchar") - before)

    with processes.start(1, 600) as ranks:
        return {"rank": ranks.rank, **timed(load, cfg.repeats), "read_gb": read[0]}


def side_save(cfg):
    """Seconds of checkpoint.save, and of a copy of what it wrote, in turn."""
    with torch.device("meta"):
        model = CausalLM(ModelConfig.from_dict(QWEN_05B))
    model.to_empty(device="cpu")
    model.tie_weights()
    layout = pretrained.load_weights(model, cfg.directory)
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        optimizer.state[p] = {"exp_avg": torch.rand_like(p), "exp_avg_sq": torch.rand_like(p)}
    seconds = {"save": [], "copy": []}
    for i in range(cfg.repeats + 1):
        start = time.perf_counter()
        step = checkpoint.save(os.path.join(cfg.directory, "checkpoints"), i, model, layout, {}, optimizer, {})
        between = time.perf_counter()
        copy(step, os.path.join(cfg.directory, "copy"), flush=True)
        for name, figure in ("save", between - start), ("copy", time.perf_counter() - between):
            seconds[name].append(figure)
        shutil.rmtree(step)
    return {name: spread(values[1:]) for name, values in seconds.items()}


def copy(source, target, flush):
    """Copy a directory; to the disk if it is flushed. Returns the seconds it took."""
    start = time.perf_counter()
    shutil.copytree(source, target)
    if flush:
        for folder, _, names in os.walk(target):
            for name in names:
                disk.sync(os.path.join(folder, name))
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def side_trl(cfg):
    """The run of bench_memory by TRL: its defaults, but for what makes it the same work. It writes no checkpoint."""
    import datasets
    import peft
    import transformers
    import trl

    ends = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    config = trl.SFTConfig(os.path.join(cfg.directory, cfg.side), model_init_kwargs={"dtype": "float32"}, bf16=False,
                           use_cpu=True, max_length=LENGTH, per_device_train_batch_size=1, max_steps=cfg.repeats + 1,
                           save_strategy="no", report_to="none", disable_tqdm=True,
                           gradient_checkpointing=cfg.peer_checkpointing)
    with contextlib.redirect_stdout(sys.stderr):  # what it reports is not JSON
        rows = datasets.Dataset.from_list(disk.read_json(os.path.join(cfg.directory, "rows.json")))
        trl.SFTTrainer(cfg.directory, config, train_dataset=rows, callbacks=[Clock()],
                       peft_config=lora if cfg.side == "trl_lora" else None).train()
    return {"peak_gb": proc_gb("status", "VmHWM"), "seconds": spread([b - a for a, b in zip(ends, ends[1:])])}


def side_step(cfg):
    """The conversations of bench_step once, by TRL or a plain loop; [(seconds, non-pad tokens) of each step] and when
    the first had ended."""
    import transformers

    path, ends, tokens = os.path.join(cfg.directory, "rows.json"), [time.perf_counter()], []
    if cfg.side == "plain_loop":
        model = transformers.AutoModelForCausalLM.from_pretrained(cfg.directory, dtype=torch.float32)
        tokenizer = ChatTokenizer(cfg.directory)
        rows = data.load(path, tokenizer, LENGTH)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        ends[0] = time.perf_counter()
        for ids in torch.arange(len(rows)).split(BATCH):
            parts = [torch.from_numpy(rows.tokens[rows.starts[i] : rows.starts[i + 1]].astype(int)) for i in ids]
            masks = [torch.from_numpy(rows.is_target[rows.starts[i] : rows.starts[i + 1]]) for i in ids]
            batch = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
            labels = batch.where(torch.nn.utils.rnn.pad_sequence(masks, batch_first=True), torch.tensor(IGNORE))
            seen = torch.nn.utils.rnn.pad_sequence([torch.ones_like(p) for p in parts], batch_first=True)
            model(input_ids=batch, attention_mask=seen, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ends.append(time.perf_counter())
            tokens.append(int(seen.sum()))
    else:
        import datasets
        import trl

        class Clock(transformers.TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                ends.append(time.perf_counter())

        class Counted(trl.SFTTrainer):
            def training_step(self, model, inputs, *args, **kwargs):
                mask = inputs.get("attention_mask")
                tokens.append(int(mask.sum()) if mask is not None else inputs["input_ids"].numel())
                return super().training_step(model, inputs, *args, **kwargs)

        packed = cfg.side == "trl_packed"  # rows of LENGTH tokens, of whole conversations; one row a step is as many
        config = trl.SFTConfig(os.path.join(cfg.directory, cfg.side), model_init_kwargs={"dtype": "float32"},
                               bf16=False, use_cpu=True, max_length=LENGTH, packing=packed, save_strategy="no",
                               per_device_train_batch_size=BATCH, num_train_epochs=1, report_to="none",
                               disable_tqdm=True, gradient_checkpointing=False)
        with contextlib.redirect_stdout(sys.stderr):
            rows = datasets.Dataset.from_list([{"prompt": row["messages"][:1], "completion": row["messages"][1:]}
                                               for row in disk.read_json(path)])
            trainer = Counted(cfg.directory, config, train_dataset=rows, callbacks=[Clock()])
            ends[0] = time.perf_counter()
            trainer.train()
    first = time.time() - (time.perf_counter() - ends[1])
    seconds = [b - a for a, b in zip(ends, ends[1:])]
    return {"steps": list(zip(seconds, tokens, strict=True)), "first": first, "peak_gb": proc_gb("status", "VmHWM")}


def side_data(cfg):
    """Seconds that cfg.rows conversations take, by us, by the tokenizer alone, or by TRL."""
    model, path = pretrained.model_directory(cfg.model), os.path.join(cfg.directory, "rows.json")
    tokenizer = ChatTokenizer(model)
    if cfg.side == "encode":
        texts = [tokenizer.render(formats.to_messages(row, where)) for where, row in formats.read_files(path)]
        start = time.perf_counter()
        tokenizer.tokenizer.encode_batch(texts, add_special_tokens=False)
    elif cfg.side == "data":
        start = time.perf_counter()
        data.load(path, tokenizer, LENGTH, cache_dir=cfg.directory)
    else:
        import datasets
        import trl

        with contextlib.redirect_stdout(sys.stderr):
            # the same conversations in the form of which it masks the prompt, as we do: from "messages" it trains all
            rows = datasets.Dataset.from_list([{"prompt": row["messages"][:1], "completion": row["messages"][1:]}
                                               for row in disk.read_json(path)])
            config = trl.SFTConfig(os.path.join(cfg.directory, "trl"), bf16=False, use_cpu=True, max_length=LENGTH,
                                   report_to="none", dataset_num_proc=2)
            trl.SFTTrainer(model, config, train_dataset=rows.select(range(100)))  # what it costs without data
            before = time.perf_counter()
            trl.SFTTrainer(model, config, train_dataset=rows.select(range(100)))
            start = time.perf_counter()
            trl.SFTTrainer(model, config, train_dataset=rows)
            start += start - before
    return {"seconds": time.perf_counter() - start}


def side_chat(cfg):
    """Seconds of an answer of cfg.new_tokens tokens, after one that warms up; the ids, which are the same for both."""
    prompt = torch.randint(0, QWEN_05B["vocab_size"], (64,), generator=torch.Generator().manual_seed(0)).tolist()
    if cfg.side == "chat":
        model = chat.load(cfg.directory)[0]

        def answer():
            return list(generate(model, prompt, cfg.new_tokens, stop_ids=()))
    else:
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(cfg.directory, dtype=torch.float32)

        def answer():
            ids = torch.tensor([prompt])
            return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None,
                                  pad_token_id=0, max_new_tokens=cfg.new_tokens)[0, len(prompt) :].tolist()
    answer()
    start = time.perf_counter()
    ids = answer()
    return {"seconds": time.perf_counter() - start, "ids": ids}


def write_rows(path, n, question=3.3, answer=3.9, sigma=0.9):
    """n conversations of the words of the example set, whose numbers are log-normal."""
    words = [word for _, row in formats.read_files(os.path.join(HERE, "data", "example_sft.json"))
             for message in formats.to_messages(row, "") for word in message["content"].split()]
    generator = random.Random(0)

    def text(middle):
        return " ".join(generator.choices(words, k=max(2, int(generator.lognormvariate(middle, sigma)))))

    rows = [{"messages": [{"role": "user", "content": text(question)}, {"role": "assistant", "content": text(answer)}]}
            for _ in range(n)]
    with open(path, "w", encoding="utf-8") as f:
        json.dump(rows, f, ensure_ascii=False)


def write_model(directory, config):
    """A model directory of random weights in bf16, as the hub has it, with the tokenizer of `tiny`; the size of its
    file, and that of the parameters in fp32."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in CausalLM(ModelConfig.from_dict(config)).named_parameters()}
    tensors = {n: (torch.ones if "norm" in n else torch.randn)(s, dtype=torch.bfloat16).mul_(1 if "norm" in n else 0.02)
               for n, s in shapes.items()}
    path = os.path.join(directory, "model.safetensors")
    save_file(tensors, path, metadata={"format": "pt"})
    with open(os.path.join(directory, "config.json"), "w", encoding="utf-8") as f:
        json.dump(config, f)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(pretrained.model_directory("tiny"), name), directory)
    return {"file_gb": os.path.getsize(path) / 2**30, "parameters_gb": sum(t.numel() for t in tensors.values()) / 2**28}


def launch(n, *words):
    """What a program prints, run as n processes of their own."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)] if n > 1 else []
    return subprocess.run([sys.executable, *several, *words], stdout=subprocess.PIPE, check=True, text=True).stdout


def sides(n, *flags):
    """The results of n processes that run `bench.py --side ...` with this command's flags, in the order of ranks."""
    lines = launch(n, os.path.abspath(__file__), *sys.argv[1:], *flags).splitlines()
    return sorted(map(json.loads, lines), key=lambda result: result.get("rank", 0))


def train(directory, n, steps, *flags):
    """What a run of sft.py, as n processes, writes of its steps; the model is the one of write_model."""
    output = os.path.join(directory, "run")
    path, lines = os.path.join(output, "metrics.jsonl"), []
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(launch, n, os.path.join(HERE, "sft.py"), "--model", directory, "--output_dir", output,
                          "--cache_dir", "none", "--max_steps", str(steps), "--save_steps", str(steps), *flags)
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
    line = {name: sides(1, "--side", name)[0] for name in ("plain", "chunked")}
    return {**line, "memory_ratio": line["chunked"]["added_peak_gb"] / line["plain"]["added_peak_gb"],
            "time_ratio": line["chunked"]["seconds"][0] / line["plain"]["seconds"][0]}


def bench_load(cfg, directory):
    sizes = write_model(directory, QWEN_05B)
    ranks = sides(cfg.ranks, "--side", "load", "--directory", directory)
    for rank in ranks:
        rank["read_ratio"] = rank["read_gb"] / (sizes["file_gb"] / cfg.ranks)
        rank["memory_ratio"] = rank["added_peak_gb"] / (sizes["parameters_gb"] / cfg.ranks)
    worst = {key: max(rank[key] for rank in ranks) for key in ("read_ratio", "memory_ratio")}
    copies = spread([copy(directory, directory + "_copy", flush=False) for _ in range(cfg.repeats)])
    return {**sizes, **worst, "copy": copies, "copy_to_load": copies[0] / max(rank["seconds"][0] for rank in ranks),
            "ranks": ranks}


def bench_save(cfg, directory):
    sizes = write_model(directory, QWEN_05B)
    seconds = sides(1, "--side", "save", "--directory", directory)[0]
    return {**sizes, **seconds, "copy_to_save": seconds["copy"][0] / seconds["save"][0]}


def bench_ranks(cfg, directory):
    write_model(directory, SMALL)
    flags = ("--train_data", os.path.join(HERE, "data", "example_sft.json"), "--batch_size", "16",
             "--max_length", "512", "--no-gradient_checkpointing")
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
        return {name: importlib.metadata.version(name) for name in ("trl", "transformers", "peft") if cfg.vs}
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f"--vs trl: {error.name} is not installed: pip install trl peft") from error


def bench_data(cfg, directory):
    versions = peer_versions(cfg)
    write_rows(os.path.join(directory, "rows.json"), rows := cfg.rows or 20000)
    names, speeds = ["data", "encode"] + ["trl_data"] * bool(cfg.vs), {}
    for i in range(cfg.repeats):  # in turn, each with nothing cached
        for name in names:
            inner = os.path.join(directory, f"{name}_{i}")
            os.makedirs(inner)
            shutil.copy(os.path.join(directory, "rows.json"), inner)
            seconds = sides(1, "--side", name, "--directory", inner)[0]["seconds"]
            speeds.setdefault(name, []).append(rows / seconds)
            shutil.rmtree(inner)
    ratios = {f"data_to_{name}": spread([a / b for a, b in zip(speeds["data"], speeds[name])]) for name in names[1:]}
    return {"conversations_per_second": {name: spread(found) for name, found in speeds.items()}, **ratios, **versions}


def bench_chat(cfg, directory):
    write_model(directory, QWEN_05B)
    speeds = {"chat": [], "transformers": []}
    for _ in range(cfg.repeats):
        results = {name: sides(1, "--side", name, "--directory", directory)[0] for name in speeds}
        assert results["chat"]["ids"] == results["transformers"]["ids"]
        for name, result in results.items():
            speeds[name].append(cfg.new_tokens / result["seconds"])
    return {"tokens_per_second": {name: spread(found) for name, found in speeds.items()},
            "chat_to_transformers": spread([a / b for a, b in zip(*speeds.values())]),
            "transformers": importlib.metadata.version("transformers")}


PEERS = {"trl": ("trl_padded", "trl_packed"), "transformers": ("plain_loop",), None: ()}


def one_run(name, directory, rows, *flags):
    """([(seconds, tokens) of each step], peak memory, seconds from the launch to the first step's end) of one side."""
    started = time.time()
    if name in ("trl_padded", "trl_packed", "plain_loop"):
        result = sides(1, "--side", name, "--directory", directory)[0]
        return result["steps"], result["peak_gb"], result["first"] - started
    flags = ("--train_data", os.path.join(directory, "rows.json"), "--max_length", str(LENGTH), "--batch_size",
             str(BATCH), "--micro_batch_size", str(BATCH), "--no-gradient_checkpointing", "--epochs", "1", *flags)
    lines = train(directory, 1, -(-rows // BATCH), *flags)
    return [(line["seconds"], line["tokens"]) for line in lines], lines[-1]["peak_memory_gb"], lines[0]["at"] - started


def useful_flops(config, directory):
    """Floating-point operations that the loss of each step of one_run needs, forward and, twice as many, backward: of
    each input in the blocks' matrices, of each target in the head, of each causal pair in attention."""
    with torch.device("meta"):
        model = CausalLM(ModelConfig.from_dict(config))
    blocks = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    heads = config["num_hidden_layers"] * model.config.num_attention_heads * model.config.head_dim
    rows = data.load(os.path.join(directory, "rows.json"), ChatTokenizer(directory), LENGTH)
    sampler, flops = data.Sampler(rows.lengths, 1, 42, BATCH), []
    for step in range(1, len(sampler) + 1):
        ids = sampler.step(step)[1]
        lengths = rows.lengths[ids].astype(int)
        head = config["vocab_size"] * config["hidden_size"] * rows.n_targets[ids].sum()
        flops.append(6 * int(blocks * lengths.sum() + head + heads * (lengths * (lengths + 1)).sum()))
    return flops


def bench_step(cfg, directory):
    versions = peer_versions(cfg)
    config = dict(QWEN_05B, num_attention_heads=8, num_key_value_heads=2, **SHAPES[cfg.shape])
    write_model(directory, config)
    write_rows(os.path.join(directory, "rows.json"), rows := cfg.rows or 48, 2.3, 2.9, 1.1)  # median about 120 tokens
    found = {name: {"tokens_per_second": [], "peak_gb": [], "start_seconds": []} for name in ("sft", *PEERS[cfg.vs])}
    uses, rates, needed = [], [], sum(useful_flops(config, directory)[1:])
    for _ in range(cfg.repeats):  # in turn
        for name, figures in found.items():
            steps, peak, start = one_run(name, directory, rows)
            seconds, tokens = map(sum, zip(*steps[1:]))
            if name == "sft":
                rates.append(sides(1, "--side", "product")[0]["flops"])
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
    turns = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": "the " * length}]  # one token each
    path = os.path.join(directory, "rows.json")
    with open(path, "w", encoding="utf-8") as f:
        json.dump([{"messages": turns}] * n, f)
    return path


def bench_plan(cfg, directory):
    def base_gb(*modules):
        code = f"import {', '.join(modules)}; print(bench.proc_gb('status', 'VmRSS'))"
        return float(launch(1, "-c", f"import sys; sys.path.insert(0, {HERE!r}); {code}"))

    line = {}
    for shape, (config, length, runs) in PLANNED.items():
        write_model(directory, dict(QWEN_05B, **config))
        rows = write_full_rows(directory, length, 2 * (cfg.repeats + 1))
        for run in runs:
            flags = ("--max_length", str(length), *(() if "batch_size" in run else ("--batch_size", "1")), *run.split())
            words = launch(1, os.path.join(HERE, "sft.py"), "--model", directory, "--plan", *flags).splitlines()
            planned = float(next(text for text in words if text.startswith("peak")).split()[1])
            steps = train(directory, 1, cfg.repeats + 1, "--train_data", rows, *flags)
            assert all(step["tokens"] == length * (2 if "batch_size" in run else 1) for step in steps)
            base = base_gb("sft", "bench",  # bench: about what the tokenizer is
                           *["torch._dynamo"] * ("--no-gradient_checkpointing" not in run),  # checkpoint() imports it
                           *["torch.distributed.fsdp"] * ("--param_offload" in run))
            peak = steps[-1]["peak_memory_gb"] - base
            line[f"{shape} {run}".strip()] = {"base_gb": base, "planned_gb": planned, "peak_gb": peak,
                                              "ratio": planned / peak}
    off = max(abs(found["ratio"] - 1) for found in line.values())
    return {"runs": line, "largest_difference": off}


def bench_memory(cfg, directory):
    versions = peer_versions(cfg)
    write_model(directory, QWEN_05B)
    path = write_full_rows(directory, LENGTH, cfg.repeats + 1)
    flags = ("--train_data", path, "--max_length", str(LENGTH), "--batch_size", "1", "--micro_batch_size", "1")
    lora = ("--use_lora", "--lora_rank", str(RANK), "--lora_alpha", str(ALPHA), "--lora_targets", "all-linear")
    line = {}
    for name, extra in (("full", ()), ("lora", lora)):
        steps = train(directory, 1, cfg.repeats + 1, *flags, *extra)
        assert all(step["tokens"] == LENGTH for step in steps)
        line[name] = {"peak_gb": steps[-1]["peak_memory_gb"], "seconds": spread([s["seconds"] for s in steps[1:]])}
        if cfg.vs:
            line[f"trl_{name}"] = sides(1, "--side", f"trl_{name}", "--directory", directory)[0]
    ratios = {f"{a}_to_{b}": line[a]["peak_gb"] / line[b]["peak_gb"]
              for a, b in (("lora", "full"), ("lora", "trl_lora"), ("full", "trl_full")) if b in line}
    return {**line, **ratios, "time_lora_to_full": line["lora"]["seconds"][0] / line["full"]["seconds"][0], **versions}


def main():
    cfg, _ = parse(Config, sys.argv[1:])
    if cfg.side:
        functions = {side_loss: ("plain", "chunked"), side_load: ("load",), side_save: ("save",),
                     side_trl: ("trl_full", "trl_lora"), side_product: ("product",),
                     side_data: ("data", "encode", "trl_data"),
                     side_chat: ("chat", "transformers"), side_step: ("trl_padded", "trl_packed", "plain_loop")}
        result = next(function for function, names in functions.items() if cfg.side in names)(cfg)
        # one write: torchrun's processes are unbuffered, and print writes the end of the line on its own
        return print(json.dumps(result) + "\n", end="")
    for part in [cfg.part] if cfg.part else DEFAULT:
        measure(dataclasses.replace(cfg, part=part, vs=cfg.vs if cfg.vs and part in COMPARED[cfg.vs] else None))


def measure(cfg):
    """Print the line of one part."""
    threads = 1 if cfg.ranks > 1 or cfg.part == "ranks" else torch.get_num_threads()
    line = {"part": cfg.part, "command": " ".join(["python", *sys.argv]), "torch": torch.__version__,
            "python": platform.python_version(), "device": f"CPU, {os.cpu_count()} cores, {threads} threads a process"}
    with tempfile.TemporaryDirectory() as directory:
        # for the processes that are started; torchrun leaves a folder in TMPDIR
        os.environ.update(OMP_NUM_THREADS=str(threads), CUDA_VISIBLE_DEVICES="", TMPDIR=directory)
        parts = {"loss": bench_loss, "load": bench_load, "save": bench_save, "ranks": bench_ranks,
                 "memory": bench_memory, "data": bench_data, "chat": bench_chat, "step": bench_step,
                 "start": bench_start, "plan": bench_plan}
        line.update(parts[cfg.part](cfg, directory))
    # four digits: the others are noise
    print(json.dumps(json.loads(json.dumps(line), parse_float=lambda text: float(f"{float(text):.4g}"))), flush=True)


if __name__ == "__main__":
    run(main)
