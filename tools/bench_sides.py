"""The sides of tools/bench.py's comparisons: each function measures this trainer or another one by itself.

bench.py runs `python tools/bench.py --side NAME`, with its own flags, in a new process and reads the JSON
line that it prints.
"""

import contextlib
import importlib.metadata
import math
import os
import shutil
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import chat
import data
import fsdp
from disk import checkpoint, files, pretrained, shards
from families.config import ModelConfig
from families.registry import causal_lm
from model import CausalLM, generate
from ops import activations, flops, optim
from ops.attention import Documents
from ops.loss import Head, loss
from ranks import processes
from text import formats, sources
from text.template import ChatTokenizer

QWEN_05B = dict(model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                vocab_size=151936, num_attention_heads=14, num_key_value_heads=2, rope_theta=1e6,
                tie_word_embeddings=True, architectures=["Qwen2ForCausalLM"])
# of --part delta: Qwen3.5-0.8B with a sixth of its layers and vocabulary; lengths of documents
QWEN_35 = dict(model_type="qwen3_5_text", hidden_size=1024, intermediate_size=3584, num_hidden_layers=4,
               vocab_size=248320 // 6, num_attention_heads=8, num_key_value_heads=2, head_dim=256,
               linear_num_key_heads=16, linear_num_value_heads=16, tie_word_embeddings=True)
PACKINGS = {"one": (1024,), "short": tuple(range(4, 128, 8))}
RANK, ALPHA = 16, 32  # LoRA on all linear layers
LENGTH, BATCH = 1024, 4  # max_length; conversations per step of bench_step on the CPU
CUDA_LENGTH, CUDA_STEPS = 2048, 20  # max_length and steps of bench_step on CUDA
UNSTEADY = 5  # the first steps of a run are not counted: caches are empty, and buffers are allocated


def cuda_rows(shape):
    """Rows of CUDA_LENGTH tokens per step on CUDA; 7B has no memory for more without checkpointing."""
    return 4 if shape == "7b" else 8


def spread(values):
    """[median, minimum, maximum]"""
    return [statistics.median(values), min(values), max(values)]


def proc_gb(file, name, process="self"):
    """Return a figure of a process in GiB, from /proc/PROCESS/FILE.

    status has VmRSS (memory now) and VmHWM (its peak), io has rchar (bytes read). Unlike getrusage's peak,
    VmHWM does not start at the peak of the parent process.
    """
    with open(f"/proc/{process}/{file}", encoding="utf-8") as f:
        number, *unit = dict(line.split(":", 1) for line in f)[name].split()
    return int(number) / (2**20 if unit == ["kB"] else 2**30)


def timed(action, repeats):
    """Measure seconds of action(), memory in GiB before it, and how far the first call raises the peak."""
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
    weight = torch.randn(cfg.vocab, cfg.hidden).mul_(0.02)
    targets = torch.randint(0, cfg.vocab, (cfg.tokens,))
    loss_mask = torch.rand(cfg.tokens) < cfg.targets
    positions, labels = loss_mask.nonzero()[:, 0], targets.masked_fill(~loss_mask, -100)
    with torch.device("meta"):
        head = Head(cfg.hidden, cfg.vocab, bias=False)
    head.weight = torch.nn.Parameter(weight)

    def plain():
        F.cross_entropy(hidden @ head.weight.T, labels, reduction="sum").backward()

    def chunked():
        loss(hidden, head, positions, targets[positions]).total.backward()

    compute = plain if cfg.side == "plain" else chunked

    def action():
        hidden.grad = head.weight.grad = None
        compute()

    return timed(action, cfg.repeats)


def side_product(cfg):
    """Floating-point operations per second of a matrix product on this machine."""
    return {"flops": flops.product_flops(torch.device("cpu"), torch.float32, 2048)}


def side_load(cfg):
    """Create, shard and load the model as sft.py does, without an optimizer; every rank calls it."""
    read_gb = []

    def load():
        with torch.device("meta"):
            model = CausalLM(ModelConfig.from_dict(QWEN_05B))
        fsdp.shard(model, ranks, bf16=False, param_offload=False)
        model.to_empty(device=ranks.device)
        model.tie_weights()
        before = proc_gb("io", "rchar")
        pretrained.load_weights(model, cfg.directory)
        read_gb.append(proc_gb("io", "rchar") - before)

    with processes.start(1, 600) as ranks:
        return {"rank": ranks.rank, **timed(load, cfg.repeats), "read_gb": read_gb[0]}


def side_save(cfg):
    """Seconds of checkpoint.save, and of copying what it wrote."""
    with torch.device("meta"):
        model = CausalLM(ModelConfig.from_dict(QWEN_05B))
    model.to_empty(device="cpu")
    model.tie_weights()
    pretrained.load_weights(model, cfg.directory)
    shard_map = shards.shard_map(model, cfg.directory)
    optimizer = optim.AdamW(optim.parameter_groups(model, 0.0), lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    for p in model.parameters():
        optimizer.state[p] = {name: torch.rand_like(p) for name in optimizer.new_state(p)}
    seconds = {"save": [], "copy": []}
    for i in range(cfg.repeats + 1):
        start = time.perf_counter()
        step_directory = checkpoint.save(
            os.path.join(cfg.directory, "checkpoints"), i, model=model, optimizer=optimizer,
            shard_map=shard_map, exported={}, state={})
        saved = time.perf_counter()
        copy(step_directory, os.path.join(cfg.directory, "copy"), flush=True)
        seconds["save"].append(saved - start)
        seconds["copy"].append(time.perf_counter() - saved)
        shutil.rmtree(step_directory)
    return {name: spread(values[1:]) for name, values in seconds.items()}


def copy(source, target, flush):
    """Copy a directory (flush: and flush it to the disk), delete the copy; return the seconds of copying."""
    start = time.perf_counter()
    shutil.copytree(source, target)
    if flush:
        for folder, _, names in os.walk(target):
            for name in names:
                files.sync(os.path.join(folder, name))
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def side_trl(cfg):
    """The run of bench_memory with TRL: its defaults, except where the work would differ; no checkpoint."""
    import datasets
    import transformers
    import trl

    ends = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    config = trl.SFTConfig(os.path.join(cfg.directory, cfg.side), model_init_kwargs={"dtype": "float32"},
                           bf16=False, use_cpu=True, max_length=LENGTH, per_device_train_batch_size=1,
                           max_steps=cfg.repeats + 1, save_strategy="no", report_to="none", disable_tqdm=True,
                           gradient_checkpointing=cfg.peer_checkpointing)
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the JSON line
        rows = datasets.Dataset.from_list(files.read_json(os.path.join(cfg.directory, "rows.json")))
        trl.SFTTrainer(cfg.directory, config, train_dataset=rows, callbacks=[Clock()],
                       peft_config=peft_lora() if cfg.side == "trl_lora" else None).train()
    return {"peak_gb": proc_gb("status", "VmHWM"), "seconds": spread([b - a for a, b in zip(ends, ends[1:])])}


def side_step(cfg):
    """The conversations of bench_step with TRL or a plain loop: on the CPU one epoch, on CUDA CUDA_STEPS.

    Returns tokens_per_second, peak_gb, versions, and the Unix time at which the first step ended.
    """
    train = plain_loop if cfg.side == "plain_loop" else trl_loop
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the JSON line
        ends, tokens, versions = train(cfg)
    first = time.time() - (time.perf_counter() - ends[1])
    seconds = [b - a for a, b in zip(ends, ends[1:])]
    on_cuda = cfg.device == "cuda"
    peak_gb = torch.cuda.max_memory_allocated() / 2**30 if on_cuda else proc_gb("status", "VmHWM")
    return {"tokens_per_second": speed(list(zip(seconds, tokens, strict=True)), cfg.device), "first": first,
            "peak_gb": peak_gb, "versions": versions}


def speed(steps, device):
    """Tokens per second of [(seconds, tokens) per step].

    CPU: all steps but the first together, as they are few and differ. CUDA: the median of steps 6 to 20; the
    ones before compile, allocate and choose kernels.
    """
    if device == "cuda":
        return statistics.median(tokens / seconds for seconds, tokens in steps[UNSTEADY:CUDA_STEPS])
    seconds, tokens = map(sum, zip(*(steps[1:] or steps)))  # few rows may pack into one step
    return tokens / seconds


def plain_loop(cfg):
    """A loop around transformers' model on the CPU: padded batches, AdamW.

    Returns the time at which the training started and each step ended, the tokens of each step, and versions.
    """
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(cfg.directory, dtype=torch.float32)
    dataset = data.load(os.path.join(cfg.directory, "rows.json"), ChatTokenizer(cfg.directory), LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ends, tokens = [time.perf_counter()], []
    for ids in torch.arange(len(dataset)).split(BATCH):
        spans = [slice(dataset.starts[i], dataset.starts[i + 1]) for i in ids]
        sequences = [torch.from_numpy(dataset.tokens[span].astype(int)) for span in spans]
        loss_masks = [torch.from_numpy(dataset.loss_mask[span]) for span in spans]
        batch = pad_sequence(sequences, batch_first=True)
        labels = batch.where(pad_sequence(loss_masks, batch_first=True), torch.tensor(-100))
        attention_mask = pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True)
        model(input_ids=batch, attention_mask=attention_mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.perf_counter())
        tokens.append(int(attention_mask.sum()))
    return ends, tokens, installed("torch", "transformers")


def trl_loop(cfg):
    """TRL's SFTTrainer, padded or packed (bfd: complete conversations, in rows of max_length tokens).

    On CUDA with all that makes it fast: FlashAttention-2 and Liger's kernels where they are installed, bf16
    with fp32 weights (frozen ones in bf16, which is faster), no checkpointing. Returns what plain_loop does.
    """
    import datasets
    import trl

    options = dict(use_cpu=True, bf16=False, max_length=LENGTH, per_device_train_batch_size=BATCH)
    model_options, versions = {"dtype": "float32"}, installed("torch", "trl", "transformers", "peft")
    if cfg.device == "cuda":
        extras = installed("flash_attn", "liger_kernel")
        attention = "flash_attention_2" if extras["flash_attn"] else "sdpa"
        model_options = {"dtype": "bfloat16" if cfg.lora else "float32", "attn_implementation": attention}
        options = dict(bf16=True, max_length=CUDA_LENGTH, per_device_train_batch_size=cuda_rows(cfg.shape),
                       max_steps=CUDA_STEPS, use_liger_kernel=bool(extras["liger_kernel"]))
        versions = {**versions, **extras, "attention": attention}
    ends, tokens = [], []
    trainer_class, clock = observed(ends, tokens)
    config = trl.SFTConfig(os.path.join(cfg.directory, cfg.side), model_init_kwargs=model_options,
                           packing=cfg.side == "trl_packed", num_train_epochs=1, report_to="none",
                           save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, **options)
    rows = datasets.Dataset.from_list(prompts_and_completions(os.path.join(cfg.directory, "rows.json")))
    trainer = trainer_class(cfg.directory, config, train_dataset=rows, callbacks=[clock],
                            peft_config=peft_lora() if cfg.lora else None)
    ends.append(time.perf_counter())
    trainer.train()
    return ends, tokens, versions


def observed(ends, tokens):
    """An SFTTrainer that appends the tokens of each step, without padding, and a callback for its end."""
    import transformers
    import trl

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    class Counted(trl.SFTTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            mask = inputs.get("attention_mask")  # packed rows have none, so there is no sync on CUDA
            tokens.append(int(mask.sum()) if mask is not None else inputs["input_ids"].numel())
            return super().training_step(model, inputs, *args, **kwargs)

    return Counted, Clock()


def peft_lora():
    import peft

    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")


def installed(*names):
    """{name: version} of these packages; None for one that is not installed."""
    versions = dict.fromkeys(names)
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def prompts_and_completions(path):
    """The conversations as prompt and completion: TRL masks the prompt of these, not that of messages."""
    return [{"prompt": row["messages"][:1], "completion": row["messages"][1:]}
            for row in files.read_json(path)]


def side_data(cfg):
    """Seconds to prepare cfg.rows conversations: with data.load, with the tokenizer alone, or with TRL."""
    model = pretrained.model_directory(cfg.model)
    path = os.path.join(cfg.directory, "rows.json")
    tokenizer = ChatTokenizer(model)
    if cfg.side == "encode":
        texts = [tokenizer.render(formats.to_messages(row, where)) for where, row in sources.read_files(path)]
        start = time.perf_counter()
        tokenizer.tokenizer.encode_batch(texts, add_special_tokens=False)
    elif cfg.side == "data":
        start = time.perf_counter()
        data.load(path, tokenizer, LENGTH, cache_dir=cfg.directory)
    else:
        import datasets
        import trl

        with contextlib.redirect_stdout(sys.stderr):
            rows = datasets.Dataset.from_list(prompts_and_completions(path))
            config = trl.SFTConfig(os.path.join(cfg.directory, "trl"), bf16=False, use_cpu=True,
                                   max_length=LENGTH, report_to="none", dataset_num_proc=2)
            trl.SFTTrainer(model, config, train_dataset=rows.select(range(100)))  # warm-up
            before = time.perf_counter()
            trl.SFTTrainer(model, config, train_dataset=rows.select(range(100)))
            start = time.perf_counter()
            trl.SFTTrainer(model, config, train_dataset=rows)
            start += start - before  # subtracts what a trainer costs with hardly any data
    return {"seconds": time.perf_counter() - start}


def side_chat(cfg):
    """Seconds to generate cfg.new_tokens tokens, after a warm-up, and their ids: equal on both sides."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, QWEN_05B["vocab_size"], (64,), generator=generator).tolist()
    if cfg.side == "chat":
        model = chat.load(cfg.directory)[0]

        def answer():
            return list(generate(model, prompt, cfg.new_tokens, eos_ids=()))
    else:
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(cfg.directory, dtype=torch.float32)

        def answer():
            ids = torch.tensor([prompt])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None,
                                 pad_token_id=0, max_new_tokens=cfg.new_tokens)
            return out[0, len(prompt) :].tolist()
    answer()
    start = time.perf_counter()
    ids = answer()
    return {"seconds": time.perf_counter() - start, "ids": ids}


def side_delta(cfg):
    """Forward and backward of QWEN_35, here and in transformers, in turn: same weights, tokens and loss."""
    import transformers

    torch.manual_seed(0)
    config = ModelConfig.from_dict(QWEN_35)
    theirs = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**QWEN_35))
    ours = causal_lm(config)(config)
    ours.load_state_dict(theirs.state_dict())
    with torch.device("meta"):
        linear, *_, attention = activations.measure(causal_lm(config)(config), bf16=False, fused_norms=False)
    of_mlp = 4 * (config.hidden_size + 4 * config.intermediate_size)  # its input and four products, in fp32
    kept = {"linear": linear - of_mlp, "attention": attention - of_mlp}
    result = {"layers": len(config.layer_types), "vocabulary": config.vocab_size, "kept_bytes": kept,
              "kept_linear_to_attention": kept["linear"] / kept["attention"], **installed("transformers")}
    for name, lengths in PACKINGS.items():
        documents = torch.randint(config.vocab_size, (sum(lengths),)).split(lengths)
        seconds = {side: [] for side in ("sft", "alone", "padded")}
        if len(documents) == 1:
            del seconds["padded"]  # it has no padding
        for _ in range(cfg.repeats + 1):
            totals = dict.fromkeys(seconds, 0.0)
            for side, times in seconds.items():
                start = time.perf_counter(), time.process_time()
                for part in delta_losses(ours, theirs, side, documents):
                    part.backward()
                    totals[side] += part.item()
                times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
                ours.zero_grad()
                theirs.zero_grad()
            assert all(math.isclose(total, totals["sft"], rel_tol=1e-4) for total in totals.values())
        for i, unit in enumerate(("seconds", "thread_seconds")):
            measured = {side: spread([pair[i] for pair in times[1:]]) for side, times in seconds.items()}
            ratios = {f"sft_to_{side}": measured["sft"][0] / measured[side][0] for side in list(seconds)[1:]}
            result[f"{name}_{unit}"] = {**measured, **ratios}
    return result


def delta_losses(ours, theirs, side, documents):
    """Losses whose sum is the mean over all targets, which are all tokens but each document's first."""
    if side == "sft":
        tokens, packed = torch.cat(documents), Documents.of([len(d) for d in documents])
        targets = packed.positions.nonzero()[:, 0]
        yield ours(tokens, packed, targets - 1, tokens[targets]).total / len(targets)
        return
    for batch in [documents] if side == "padded" else [[document] for document in documents]:
        ids, labels = (pad_sequence(batch, batch_first=True, padding_value=value) for value in (0, -100))
        yield theirs(input_ids=ids, attention_mask=(labels != -100).long(), labels=labels, use_cache=False,
                     num_items_in_batch=sum(len(document) - 1 for document in documents)).loss


SIDES = {"plain": side_loss, "chunked": side_loss, "product": side_product, "load": side_load,
         "save": side_save, "trl_full": side_trl, "trl_lora": side_trl, "data": side_data,
         "encode": side_data, "trl_data": side_data, "chat": side_chat, "transformers": side_chat,
         "trl_padded": side_step, "trl_packed": side_step, "plain_loop": side_step,
         "delta": side_delta}
