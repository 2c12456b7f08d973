"""Supervised fine-tuning of language models, in one loop.

    ./train.sh --model tiny                                          # sets up, trains the embedded model, anywhere
    python sft.py --model Qwen/Qwen2.5-0.5B --train_data my.json     # one GPU, or the CPU
    python chat.py outputs/checkpoints/latest                        # talk to the result

This file is where the others meet: config.py (settings), data.py (text to micro-batches), model.py (the transformer
and its loss), pretrained.py (model directories), fsdp.py (shards, AdamW), checkpoint.py (saving, resume), log.py. Read
main() from top to bottom: it runs in that order.

It does no preference tuning, no pre-training from raw text and no images.
"""

import collections
import dataclasses
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.distributed.elastic.multiprocessing.errors import record

import data
import fsdp
from disk import checkpoint, files, peft, pretrained
from families.config import ModelConfig
from model import CausalLM
from ops import memory, optim
from ranks import processes
from screen import report, samples
from screen.log import Log, Warnings, check_loggers
from settings.errors import UserError, run
from settings.parser import check, knob, parse, write_yaml
from text.template import ChatTokenizer


NEW_ADAPTER = dict(needs="use_lora", unless="resume_adapter")  # an adapter that is there has its own settings


@dataclass
class Config:
    """Supervised fine-tuning: ./train.sh [--n_gpus N] [flags], or python sft.py [flags] [name=value ...]

    train.sh reads the variables in CAPITALS as well, and N_GPUS, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT.
    """

    model: str = knob("Qwen/Qwen2.5-0.5B", "hub id, local directory, or tiny: the embedded one",
                      group="model and data", env="MODEL_PATH", presets=("tiny",))
    tokenizer: str | None = knob(None, "directory with another tokenizer and chat template", env="TOKENIZER_PATH")
    train_data: str = knob("./data/example_sft.json", "file, directory, hub dataset id; several with commas, :WEIGHT",
                           env="TRAIN_DATA")
    val_data: str | None = knob(None, "the same, for validation", env="VAL_DATA")
    max_length: int = knob(2048, "tokens of a conversation that are kept", env="MAX_LENGTH", low=2)
    too_long: str = knob("truncate", "a longer conversation", ("truncate", "drop", "error"))
    train_on: str = knob("all", "the assistant's turns, or the last of each conversation only", ("all", "last"))
    train_on_prompt: bool = knob(False, "train all tokens, not the assistant's only")
    prompt_key: str = knob("prompt", "a row's question, where it has one and response_key; a.b is b inside a")
    response_key: str = knob("response", "its answer")
    messages_key: str = knob("messages", "a row's list of messages; conversations is read as well")
    cache_dir: str | None = knob("~/.cache/sft", "where tokenised data is kept; none keeps it nowhere")

    batch_size: int = knob(4, "conversations a step, over all micro-batches", group="steps", env="BATCH_SIZE", low=1)
    batch_tokens: int | None = knob(None, "instead of batch_size: fill each step up to this many tokens", low=1)
    micro_batch_size: int = knob(1, "times max_length: the most tokens of a micro-batch", env="MICRO_BATCH_SIZE", low=1)
    packing: bool = knob(True, "fill micro-batches with conversations; off: at most micro_batch_size of them in each",
                         env="PACKING")
    epochs: int = knob(3, "passes over the data", env="NUM_EPOCHS", low=1)
    max_steps: int | None = knob(None, "optimizer steps, whatever epochs says", env="MAX_STEPS", low=1)
    seed: int = knob(42, "order of the data", env="SEED", low=0)

    lr: float = knob(2e-5, "peak learning rate", group="optimizer (AdamW)", env="LEARNING_RATE", low=0)
    scheduler: str = knob("cosine", "learning rate after the warm-up", ("cosine", "linear", "constant"),
                          env="SCHEDULER")
    warmup_ratio: float = knob(0.1, "share of the steps in which the rate rises from zero", env="WARMUP_RATIO",
                               low=0, high=1)
    min_lr_ratio: float = knob(0.0, "what cosine and linear end at, as a share of lr", low=0, high=1)
    weight_decay: float = knob(0.01, "of matrices; norms and biases have none", env="WEIGHT_DECAY", low=0)
    grad_clip: float = knob(1.0, "largest norm of the whole gradient; 0 is no limit", env="GRAD_CLIP", low=0)
    max_grad_norm_factor: float | None = knob(None, "a gradient's largest norm, times the last 64's median; "
                                                    "a step above is left out", low=1)
    beta1: float = knob(0.9, "decay of the first moment", low=0, high=0.9999999)
    beta2: float = knob(0.95, "decay of the second moment", low=0, high=0.9999999)

    use_lora: bool = knob(False, "train small adapters beside the frozen model", group="LoRA", env="USE_LORA")
    lora_rank: int = knob(8, "inner width of an adapter", env="LORA_RANK", low=1, **NEW_ADAPTER)
    lora_alpha: int = knob(16, "adapters are scaled by alpha / rank", env="LORA_ALPHA", low=1, **NEW_ADAPTER)
    lora_dropout: float = knob(0.0, "share of an adapter's inputs that a training step leaves out",
                               low=0, high=0.9999999, **NEW_ADAPTER)
    lora_targets: str = knob("all-linear", "layers: all-linear, names with commas, or a regular expression",
                             **NEW_ADAPTER)
    lora_rs: bool = knob(False, "scale by alpha / sqrt(rank): rsLoRA", **NEW_ADAPTER)
    lora_dora: bool = knob(False, "learn the norm of each output's weights apart: DoRA", **NEW_ADAPTER)
    lora_plus_ratio: float = knob(1.0, "learning rate of the B matrices, times lr: LoRA+", low=0, needs="use_lora")
    lora_modules_to_save: str | None = knob(None, "train these whole as well: embed_tokens, lm_head, or both",
                                            **NEW_ADAPTER)
    quantize: str | None = knob(None, "keep the frozen matrices in 4 bits: QLoRA", ("nf4",), needs="use_lora")
    resume_adapter: str | None = knob(None, "begin with this adapter, made here or by PEFT, and its settings",
                                      needs="use_lora")

    strategy: str = knob("fsdp", "fsdp or fsdp2: FSDP2; megatron: matrices are split over tp ranks as well",
                         ("fsdp", "fsdp2", "megatron"), group="several GPUs, memory", env="STRATEGY")
    tp: int = knob(1, "ranks that share each matrix, with --strategy megatron", env="TP", low=1)
    timeout: int = knob(600, "seconds after which a rank that the others wait for is given up", low=1)
    param_offload: bool = knob(False, "parameters, gradients and optimizer in host memory", env="PARAM_OFFLOAD")
    optimizer_offload: bool = knob(False, "moments and master weights in host memory", env="OPTIMIZER_OFFLOAD")
    gradient_checkpointing: bool = knob(True, "keep block inputs only: a third more work", env="GRADIENT_CHECKPOINTING")
    dtype: str | None = knob(None, "of the computation; none is bf16 on CUDA, fp32 on CPU", ("bf16", "fp32"),
                             env="DTYPE")
    compile: bool = knob(False, "fuse the blocks' small operations; takes a minute and a C++ compiler", env="COMPILE")

    deterministic: bool = knob(False, "the same bits each time on CUDA too, slower; the CPU has no other way")

    selfcheck: bool = knob(False, "prove on your model, data and ranks that no layout changes the gradient; end")

    plan: bool = knob(False, "print what a rank will need for full micro-batches, from config.json alone; end",
                      group="planning")
    memory_gb: float | None = knob(None, "with plan: of a rank, in GiB; says which micro_batch_size fits",
                                   low=1e-3, needs="plan")
    ranks: int | None = knob(None, "with plan: GPUs of a cluster that is not there; none is as it would be here",
                             low=1, needs="plan")
    tflops: float | None = knob(None, "with ranks: what a GPU achieves; none is 400, about an H100's in bf16",
                                low=1e-3, needs="ranks")
    gb_per_second: float | None = knob(None, "with ranks: what a rank sends, sharding; none is 50, between nodes",
                                       low=1e-3, needs="ranks")
    tp_gb_per_second: float | None = knob(None, "with ranks and tp: what a rank sends for tp; none is 300, in a node",
                                          low=1e-3, needs="ranks and tp")

    output_dir: str = knob("./outputs", "where everything goes", group="output", env="OUTPUT_DIR")
    resume_from: str | None = knob(None, "step directory, or auto: the latest of output_dir, if any", env="RESUME_FROM")
    save_steps: int | None = knob(None, "steps between checkpoints; none is once an epoch", env="SAVE_STEPS", low=1)
    keep_checkpoints: int | None = knob(None, "how many of the newest to keep; none is all", env="KEEP_CHECKPOINTS",
                                        low=1)
    eval_steps: int | None = knob(None, "steps between validations; none is once an epoch", env="EVAL_STEPS",
                                  low=1, needs="val_data or sample_prompts")
    keep_best: bool = knob(False, "keep the checkpoint of the lowest val_loss as well, as checkpoints/best",
                           needs="val_data")
    early_stopping: int | None = knob(None, "end after this many validations without a lower val_loss",
                                      low=1, needs="val_data")

    logger: str = knob("console", "with commas: console, wandb, tensorboard, trackio", group="what is seen",
                       env="LOGGER")
    project: str | None = knob(None, "project of the run in wandb and trackio", env="WANDB_PROJECT")
    run_name: str | None = knob(None, "name of the run in wandb, trackio and the report")
    sample_prompts: str | None = knob(None, "file of prompts, one a line, or of rows; answered at validations")

    def __post_init__(self):
        check(self)
        if self.train_on_prompt and self.train_on != "all":
            raise UserError(f"--train_on {self.train_on} does nothing with --train_on_prompt, which trains all tokens")
        check_loggers(self.logger)
        if (self.tp > 1) != (self.strategy == "megatron") and not (self.plan and self.tp > 1):
            raise UserError(f"--strategy {self.strategy} with --tp {self.tp}: megatron is for tp above 1, fsdp for 1; "
                            "type --strategy megatron --tp 2, or leave both out")
        if self.compile and self.tp > 1:
            raise UserError("--compile does not work with --tp: compiled, DTensor's steps go elsewhere; leave one out")
        if self.quantize and (self.tp > 1 or self.lora_dora):
            other = "--strategy megatron" if self.tp > 1 else "--lora_dora"
            raise UserError(f"--quantize {self.quantize} does not work with {other}; leave one of them out")
        if self.plan and self.selfcheck:
            raise UserError("--plan and --selfcheck each end the run: leave one out")
        if self.min_lr_ratio and self.scheduler == "constant":
            raise UserError(f"--min_lr_ratio {self.min_lr_ratio} does nothing with --scheduler constant; "
                            "use cosine or linear")


ADAPTER_KNOBS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_rs", "lora_dora",
                 "lora_modules_to_save")  # in the order of lora.settings


def lr_at(step, total_steps, cfg):
    """Learning rate of step 1 ... total_steps. A pure function: resume needs the step and nothing else."""
    warmup = math.ceil(cfg.warmup_ratio * total_steps)
    if step <= warmup:
        return cfg.lr * step / warmup
    progress = (step - 1 - warmup) / (total_steps - warmup)
    low = cfg.lr * cfg.min_lr_ratio
    if cfg.scheduler == "cosine":
        return low + (cfg.lr - low) * (1 + math.cos(math.pi * progress)) / 2
    return cfg.lr + (low - cfg.lr) * progress if cfg.scheduler == "linear" else cfg.lr


def backward(model, batches, n_targets, ranks, losses=None):
    """Add up the gradients of a step; return this rank's part of its loss, (), in nats per target token.

    n_targets  of the step, over all ranks: each micro-batch's sum is divided by it, so how a step is cut up does not
               change its gradient
    losses     (conversations of the data,): gets the sum of each that was computed here
    """
    loss = torch.zeros((), device=ranks.device)
    for i, batch in enumerate(batches, 1):
        fsdp.reduce_gradients(model, now=i == len(batches))
        each = torch.zeros(len(batch.tokens), device=ranks.device)
        nll = model(batch.tokens.to(ranks.device), batch.lengths, batch.targets.to(ranks.device), each) / n_targets
        nll.backward()
        loss += nll.detach()
        if losses is not None:
            losses.index_add_(0, batch.owners().to(ranks.device), each)
    return loss


@torch.no_grad()
def evaluate(model, dataset, capacity, max_rows, ranks):
    """(nats per target token over the whole set, its target tokens), the same on every rank; without meaning once
    ranks.stop is set, for a signal ends it early."""
    nll = torch.zeros((), dtype=torch.float64, device=ranks.device)
    model.eval()  # no dropout
    for batch in data.micro_batches(dataset, range(len(dataset)), capacity, max_rows, ranks.dp_rank, ranks.dp_size):
        if ranks.stopped():
            break
        nll += model(batch.tokens.to(ranks.device), batch.lengths, batch.targets.to(ranks.device))
    fsdp.reshard(model)
    model.train()
    n_targets = int(dataset.n_targets.sum())
    return ranks.sum(nll).item() / n_targets, n_targets


def add_adapters(model, cfg, directory):
    """Freeze the model and put adapters on it, new ones or those of a PEFT directory; return PEFT's settings."""
    import lora  # only where it is asked for, as nf4

    if cfg.quantize:
        from ops import nf4

        nf4.quantize_linears(model)
    if directory:
        settings = peft.checked(files.read_json(os.path.join(directory, "adapter_config.json")), directory)
        if directory == cfg.resume_adapter:  # a checkpoint's base is compared tensor by tensor
            peft.check_base(settings, cfg.model)
        ranks = peft.ranks_of(pretrained.weight_entries(directory))
    else:
        is_local = cfg.model == "tiny" or os.path.isdir(cfg.model)
        base = os.path.abspath(pretrained.model_directory(cfg.model)) if is_local else cfg.model  # as PEFT looks it up
        settings, ranks = peft.settings(model, base, *(getattr(cfg, name) for name in ADAPTER_KNOBS))
    lora.inject(model, settings, ranks)
    return settings


@torch.no_grad()
def start_adapters(model, masters, seed):
    """First values of new adapters: what the layers compute does not change."""
    import lora

    for name, whole in lora.first_values(model, seed):
        pretrained.fill(masters[name], whole)
    for name, module in model.named_modules():
        if (masters.get(f"{name}.lora_magnitude_vector")) is not None:
            squares = torch.linalg.vector_norm(memory.local(module.weight), dim=1, dtype=torch.float32).square()
            memory.local(masters[f"{name}.lora_magnitude_vector"]).copy_(module.combine(squares).sqrt())


def check_adapters(model, ranks):
    """Stop a run whose adapters do not learn: in the first step each B matrix has a gradient, so each will change."""
    found = {name: p.grad for name, p in model.named_parameters() if ".lora_B." in name}
    alive = torch.tensor([g is not None and bool(memory.local(g).any()) for g in found.values()])
    dead = [name for name, lives in zip(found, fsdp.largest(alive, ranks)) if not lives]
    if dead:
        raise UserError(f"{len(dead)} of {len(found)} adapters have no gradient and would never learn: "
                        f"{', '.join(dead[:5])}")


def main():
    cfg, _ = parse(Config, sys.argv[1:])
    if cfg.plan:
        from tools import plan

        return plan.plan(cfg)
    if cfg.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # for debugging; costs a pass over all new memory
    with processes.start(cfg.tp, cfg.timeout) as ranks:
        train(cfg, ranks)
    if ranks.stop:
        sys.exit(processes.STOPS[ranks.stop])


def train(cfg, ranks):
    """A run from beginning to end; every rank calls it."""
    device, dtype = ranks.device, cfg.dtype or ("bf16" if ranks.device.type == "cuda" else "fp32")
    say = print if ranks.rank == 0 else (lambda *words, **options: None)
    warnings = Warnings(ranks.store, ranks.rank) if ranks.size > 1 else None
    torch.manual_seed(cfg.seed)

    # Where the weights come from: a checkpoint is a model directory too.
    root, metrics_file = os.path.join(cfg.output_dir, "checkpoints"), os.path.join(cfg.output_dir, "metrics.jsonl")
    os.makedirs(root, exist_ok=True)
    resume = checkpoint.resume_directory(cfg.resume_from, root) if cfg.resume_from else None
    if resume:
        checkpoint.verify(resume)
    state = checkpoint.load_state(resume) if resume else {"step": 0}
    if not cfg.resume_from and os.path.exists(metrics_file) and not cfg.selfcheck:
        raise UserError(f"{cfg.output_dir} holds a run already: --resume_from auto goes on with it, --output_dir DIR "
                        "starts another elsewhere")
    adapter = (resume or cfg.resume_adapter) if cfg.use_lora else None
    if (directory := adapter or resume) and pretrained.is_adapter(directory) != cfg.use_lora:
        raise UserError(f"{directory} is {'a whole model' if cfg.use_lora else 'an adapter'}: go on with it "
                        f"{'without' if cfg.use_lora else 'with'} --use_lora")
    source = resume if resume and not adapter else pretrained.model_directory(cfg.model)
    tokenizer_source = pretrained.model_directory(cfg.tokenizer) if cfg.tokenizer else next(
        d for d in (adapter, source) if d == source or d and os.path.exists(os.path.join(d, "tokenizer.json")))
    config_json = files.read_json(os.path.join(source, "config.json"))
    model_config = ModelConfig.from_dict(config_json)

    # Data: everything is known before the first step, the number of steps included.
    tokenizer = ChatTokenizer(tokenizer_source)
    if tokenizer.size > model_config.vocab_size:
        raise UserError(f"{tokenizer_source}: the tokenizer has ids up to {tokenizer.size - 1}, the model's embedding "
                        f"has {model_config.vocab_size} rows; --tokenizer must be the one it was trained with")
    ranks.at("tokenise")
    options = cfg.max_length, cfg.too_long, cfg.train_on_prompt, cfg.train_on, cfg.cache_dir, cfg.timeout
    keys = cfg.prompt_key, cfg.response_key, cfg.messages_key
    rows, val = (data.load(spec, tokenizer, *options, keys=keys) if spec else None
                 for spec in (cfg.train_data, cfg.val_data))
    if val and val.mix():
        raise UserError(f"--val_data {cfg.val_data}: all of it is evaluated, so its parts take no weights")
    sampler = data.Sampler(rows.lengths, cfg.epochs, cfg.seed, cfg.batch_size, cfg.batch_tokens, cfg.max_steps,
                           rows.mix())
    total_steps, capacity = len(sampler), cfg.micro_batch_size * cfg.max_length
    max_rows = None if cfg.packing else cfg.micro_batch_size

    # Model and optimizer: created without memory, split over the ranks, then filled tensor by tensor from the disk.
    ranks.at("load")
    with torch.device("meta"):
        model = CausalLM(model_config)
    pretrained.fitting_entries(model, source)  # before memory is taken
    n_parameters = sum(p.numel() for p in model.parameters())
    if dtype == "bf16" and (cfg.optimizer_offload or cfg.use_lora):
        model.to(torch.bfloat16)  # the fp32 masters are the optimizer's, on the host; or it is frozen
    if cfg.use_lora:
        settings = add_adapters(model, cfg, adapter)
    if cfg.use_lora or device.type == "cpu" and not (cfg.param_offload or cfg.optimizer_offload):
        memory.settle_heap(keeps=not cfg.use_lora)
    model.model.gradient_checkpointing = cfg.gradient_checkpointing
    if cfg.compile:
        model.compile_blocks()
    if cfg.tp > 1:
        from ranks import tp  # only where it is asked for, as lora: DTensor takes half a second

        tp.split(model, ranks.mesh["tp"])
    fsdp.shard(model, ranks, dtype == "bf16", cfg.param_offload)
    model.to_empty(device="cpu" if cfg.param_offload else device)
    model.tie_weights()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters, matrices = list(trained.values()), [name for name, p in trained.items() if p.ndim >= 2]
    groups = [dict(params=[p for n, p in trained.items() if n not in matrices], weight_decay=0.0, lr_ratio=1.0)]
    for is_b, ratio in (False, 1.0), (True, cfg.lora_plus_ratio):
        groups.append(dict(params=[trained[n] for n in matrices if (".lora_B." in n) == is_b], lr_ratio=ratio,
                           weight_decay=cfg.weight_decay))
    adamw = optim.HostAdamW if cfg.optimizer_offload else optim.AdamW
    optimizer = adamw(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=1e-8)
    layout = pretrained.load_weights(model, source, optimizer)
    if cfg.use_lora:
        layout = pretrained.adapter_layout(model)
    if adapter:
        pretrained.load_weights(model, adapter, optimizer)
    elif cfg.use_lora:
        start_adapters(model, pretrained.master_weights(model, optimizer), cfg.seed)

    # What decides which conversations a step holds: a run goes on with the same, or not at all.
    identity = dict(data=rows.digest, seed=cfg.seed, batch_size=cfg.batch_size, batch_tokens=cfg.batch_tokens)
    if cfg.use_lora:
        identity.update({name: getattr(cfg, name) for name in (*ADAPTER_KNOBS, "quantize")},
                        base=pretrained.fingerprint(source))
    if resume:
        differ = [f"{key} {state.get(key)} then, {now} now" for key, now in identity.items() if state.get(key) != now]
        if differ:
            raise UserError(f"--resume_from {cfg.resume_from}: {resume} is of another run ({'; '.join(differ)}); give "
                            "what it was started with, or start a new run with another --output_dir")
        checkpoint.load_training_tensors(resume, model, optimizer, state["step"])
        if os.path.dirname(resume) == os.path.realpath(root) and ranks.rank == 0:
            checkpoint.set_link(root, state["step"])  # later steps there belong to the run that we leave
            if cfg.keep_best and os.path.isdir(os.path.join(root, f"step_{state['best']['step']}")):
                checkpoint.set_link(root, state["best"]["step"], "best")  # a kill between the two links left it behind
    if cfg.optimizer_offload:
        optimizer.publish()
    exported = files.read_bytes(tokenizer_source, pretrained.TOKENIZER_FILES)
    if cfg.use_lora:
        exported["adapter_config.json"] = settings
    generation = pretrained.generation_config(source, config_json, tokenizer.stop_id)
    if not cfg.use_lora:
        exported["generation_config.json"] = generation
        exported.update(files.read_bytes(source, ["config.json"]))
    if tokenizer.is_fallback:
        exported["chat_template.jinja"] = tokenizer.source.encode()
    if cfg.selfcheck:
        from tools import selfcheck  # only where it is asked for, or needed

        return selfcheck.compare(backward, model, parameters, rows, sampler.step(1)[1], cfg, ranks,
                                 2e-2 if dtype == "bf16" else 1e-5)
    prompts = samples.read_prompts(cfg.sample_prompts, tokenizer, keys) if cfg.sample_prompts else []
    stops = np.atleast_1d(generation["eos_token_id"]).tolist()

    n_trained, per_epoch = sum(p.numel() for p in parameters), sampler.per_epoch[0]
    facts = {"model": f"model    {cfg.model} ({model_config.model_type}): {n_parameters:,} parameters, "
                      f"{f'{n_trained:,} trained with LoRA' if cfg.use_lora else 'all trained'}, {dtype} on "
                      f"{ranks.size} × {device.type}{f', {cfg.strategy}, tp {cfg.tp}' if ranks.size > 1 else ''}",
             "train": rows.ledger.lines(),
             "validation": [f"{line} (validation)" for line in val.ledger.lines()] if val else [], "ranks": ranks.size}
    if ranks.rank == 0:
        with files.naming(yaml := os.path.join(cfg.output_dir, "config.yaml")):
            write_yaml(cfg, yaml)
        files.write_file(os.path.join(cfg.output_dir, "ledger.json"), facts)
    say(facts["model"])
    if tokenizer.is_fallback:
        say("         it has no chat template: ChatML is used, and saved with it")
    say(*facts["train"], *facts["validation"], sep="\n")
    if rows.mix():
        say("mix      " + " + ".join(f"{n:,}" for n in sampler.quotas) + f" of {len(rows):,} conversations an epoch")
    drawn = sum(sampler.quotas) / len(rows) / per_epoch  # share of the data that a step has
    say(f"steps    {total_steps:,} = {total_steps / per_epoch:.4g} epochs of {per_epoch:,}, of about "
        f"{len(rows) * drawn:.3g} conversations, {int(rows.sizes.sum()) * drawn:,.0f} tokens, "
        f"{rows.ledger.target * drawn:,.0f} targets")
    if cfg.resume_from:
        say("resume   " + (f"{resume}, after step {state['step']}" if resume else f"nothing in {root}: a new run"))

    stop = ranks.stopped()  # from here on a signal waits for the step to end; no rank still looks for a run before this
    log = Log(dataclasses.asdict(cfg), state["step"], total_steps, ranks.rank == 0, warnings)
    losses = torch.full((len(rows),), -1.0, device=device)  # of each conversation, as last trained; for the report
    best = state.get("best") or {"val_loss": None, "step": 0, "behind": 0}  # behind: validations since
    is_over = bool(cfg.early_stopping) and best["behind"] >= cfg.early_stopping
    norms = collections.deque(state.get("norms", ()), maxlen=64)  # of the gradient, before clipping
    first = step = state["step"]
    is_cut = bool(state.get("is_cut"))  # a signal ended that step's evaluation early: it comes again, before all else
    while (is_cut or step < total_steps and not is_over) and not stop:
        if not is_cut:
            step += 1
            started = time.perf_counter()
            ranks.at(f"step {step}")
            torch.manual_seed(hash((cfg.seed, step, ranks.dp_rank)))  # of dropout: resume has no generator to restore
            epoch, ids = sampler.step(step)
            batches = list(data.micro_batches(rows, ids, capacity, max_rows, ranks.dp_rank, ranks.dp_size))
            n_targets = int(rows.n_targets[ids].sum())
            losses[torch.from_numpy(ids)] = 0.0
            loss = backward(model, batches, n_targets, ranks, losses)
            if cfg.use_lora and step == first + 1:
                check_adapters(model, ranks)
            norm = fsdp.grad_norm(parameters).to(device)
            loss, grad_norm = torch.stack((ranks.sum(loss), norm)).tolist()  # the one device sync of a step
            if not math.isfinite(loss) or not math.isfinite(grad_norm):
                from tools import selfcheck

                where = selfcheck.find_non_finite(backward, model, parameters, rows, ids, capacity, max_rows, n_targets,
                                                  ranks)
                raise FloatingPointError(f"step {step}: loss {loss}, gradient norm {grad_norm}; stopped before the "
                                         f"weights were touched. {where}")
            lr = lr_at(step, total_steps, cfg)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_ratio"]
            limit = math.inf
            if cfg.max_grad_norm_factor and len(norms) >= 16:
                limit = cfg.max_grad_norm_factor * statistics.median(norms)
            norms.append(grad_norm)
            before = fsdp.some_weights(optimizer) if step % 10 == 1 else None
            if grad_norm <= limit:
                optimizer.step(grad_scale=max(1.0, (grad_norm + 1e-6) / cfg.grad_clip) if cfg.grad_clip else 1.0)
            else:
                log.say(f"step {step}: left out, as its gradient norm {grad_norm:.3g} is above {limit:.3g}; "
                        f"conversations: {rows.sources(ids)}")
            optimizer.zero_grad()
            # a second device sync, so once in ten steps
            changed = None if before is None else (fsdp.some_weights(optimizer) != before).float().mean().item()

            seconds, n_tokens = time.perf_counter() - started, int(rows.sizes[ids].sum())
            log.step(step, epoch=epoch, loss=loss, lr=lr, grad_norm=grad_norm, tokens=n_tokens,
                     target_tokens=n_targets, seconds=seconds, tokens_per_second=n_tokens / seconds,
                     peak_memory_gb=memory.peak_memory_gb(device), changed=changed, skipped=grad_norm > limit or None)
        is_cut = is_best = False
        if step % cfg.eval_steps == 0 if cfg.eval_steps else sampler.ends_epoch(step):
            ranks.at(f"evaluation after step {step}")
            val_loss = evaluate(model, val, capacity, max_rows, ranks) if val else None
            answers = list(samples.answers(model, tokenizer, prompts, stops, ranks))
            is_cut = bool((val or prompts) and ranks.stopped())
            if val and not is_cut:
                log.validation(step, *val_loss)
                is_best = best["val_loss"] is None or val_loss[0] < best["val_loss"]
                best["behind"] += 1
                if is_best:
                    best = dict(val_loss=val_loss[0], step=step, behind=0)
                is_over = bool(cfg.early_stopping) and best["behind"] >= cfg.early_stopping
            for prompt, answer in () if is_cut else answers:
                log.sample(step, kind="sample", prompt=prompt, answer=answer)
        stop = ranks.stopped()
        is_due = step % cfg.save_steps == 0 if cfg.save_steps else sampler.ends_epoch(step)
        if is_due or step == total_steps or is_over or stop or is_best and cfg.keep_best:
            ranks.at(f"save of step {step}")
            for text in samples.extremes(rows, ranks.sum(losses.clone()).cpu(), tokenizer):
                log.sample(step, **text)
            log.sync()  # a checkpoint never outlives the lines that lead to it
            links = ("latest", "best") if is_best and cfg.keep_best else ("latest",)
            now = {**identity, "best": best, "is_cut": is_cut, "norms": list(norms)}
            checkpoint.save(root, step, model, layout, exported, optimizer, now, links)
            if ranks.rank == 0:
                checkpoint.prune(root, cfg.keep_checkpoints, step, cfg.keep_best and best["step"])
                report.write(cfg.output_dir)
            stop = ranks.stopped()

    log.close()
    if stop and (is_cut or step < total_steps):
        say(f"stopped  after step {step} of {total_steps}: --resume_from auto goes on")
    if is_over:
        say(f"stopped  after step {step}: {best['behind']} validations without a lower val_loss than "
            f"{best['val_loss']:.4f} of step {best['step']}")
    latest = os.path.join(root, "latest")
    python = os.path.relpath(sys.executable) if ".venv" in sys.executable else "python"
    kind = "PEFT adapter" if cfg.use_lora else "Hugging Face model"
    say(f"saved    {latest} -> step_{step}, a {kind} directory")
    say(f"talk     {python} chat.py {latest}")


if __name__ == "__main__":
    run(record(main))  # torchrun repeats the first rank's error at the end of its own report
