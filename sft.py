"""Supervised fine-tuning of language models, in one loop.

    ./train.sh --model tiny                                          # sets up, trains the embedded model
    python sft.py --model Qwen/Qwen2.5-0.5B --train_data my.json     # one GPU, or the CPU
    python chat.py outputs/checkpoints/latest                        # talk to the result

Read train() from top to bottom: it runs in that order. Next to this file are data.py (conversations to
micro-batches), model.py (the transformer), lora.py (adapters) and fsdp.py (sharding); the folders hold the
code that these five use. Not supported: preference tuning, images.
"""

if __name__ == "__main__":
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -P does not add it
    from settings import venv

    venv.enter()  # where torch is missing, continue in the .venv that train.sh made

import functools
import math
import os
import sys
from dataclasses import dataclass

import torch

import data
import fsdp
import lora
from disk import inputs, peft, pretrained, resume
from disk.run import RunState
from families.registry import causal_lm
from ops import compiler, forecast, freezing, memory, nf4, optim, overlap, packing
from ranks import processes, sp, tp
from screen import entry, profiler, samples
from screen.log import Log, check_loggers
from screen.validation import Validation
from settings import errors
from settings.parser import Settings, parse, setting

# unless: a resumed adapter brings these settings with it
lora_setting = functools.partial(setting, needs="use_lora", unless="resume_adapter")


@dataclass
class Config(Settings):
    """Supervised fine-tuning: ./train.sh [--n_gpus N] [flags], or python sft.py [flags] [name=value ...]

    train.sh also reads the variables in CAPITALS, and N_GPUS, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT.
    """

    model: str = setting("Qwen/Qwen2.5-0.5B", "hub id or directory; tiny: the embedded test model",
                         env="MODEL_PATH", presets=("tiny",), group="model and data")
    tokenizer: str | None = setting(None, "directory of another tokenizer and template", env="TOKENIZER_PATH")
    chat_template: str | None = setting(None, "Jinja file, or the name of one of the model's templates",
                                        env="CHAT_TEMPLATE")
    template_kwargs: str | None = setting(None, "variables of the template: '{\"enable_thinking\": false}'")
    resize_embeddings: bool = setting(False, "add rows for a tokenizer with more ids than the embedding")
    train_data: str = setting("./data/example_sft.json", env="TRAIN_DATA",
                              help="file, directory or hub dataset; several with commas, :WEIGHT to mix them")
    val_data: str | None = setting(None, "validation data; NAME=FILE,NAME=FILE: several sets", env="VAL_DATA")
    val_split: float | None = setting(None, "share of the rows that only validate, by a hash of each one",
                                      low=1e-6, high=0.999999, unless="val_data")
    max_length: int = setting(2048, "maximum tokens per conversation", env="MAX_LENGTH", low=2)
    too_long: str | None = setting(None, "for longer ones; none: truncate", ("truncate", "drop", "error"))
    train_on: str = setting("all", "assistant turns that contribute to the loss", ("all", "last"),
                            unless="train_on_prompt")
    train_on_prompt: bool = setting(False, "all tokens contribute to the loss, not only the assistant's")
    train_reasoning: bool = setting(True, "off: the loss begins behind <think> ... </think>, at the answer",
                                    unless="train_on_prompt")
    split_turns: bool = setting(False, "one sample per assistant turn, rendered as inference will",
                                unless="train_on_prompt")
    bad_rows: str = setting("error", "rows that can't be read: error lists them, drop counts them",
                            ("error", "drop"))
    prompt_key: str = setting("prompt", "column with the question; a.b for nested columns")
    response_key: str = setting("response", "column with the answer")
    messages_key: str = setting("messages", "column with the list of messages; conversations also works")
    cache_dir: str | None = setting("~/.cache/sft", "directory that caches tokenised data; none: no cache")

    batch_size: int = setting(4, "conversations per optimizer step, over all ranks (the global batch)",
                              env="BATCH_SIZE", low=1, group="steps")
    batch_tokens: int | None = setting(None, "at most N tokens per step; replaces batch_size", low=1)
    micro_batch_size: int | str = setting(1, env="MICRO_BATCH_SIZE", low=1, word="auto",
                                          help="a micro-batch holds at most micro_batch_size × max_length "
                                               "tokens; auto: up to 32,768 if they fit")
    packing: bool = setting(True, "limit micro-batches by tokens; off: to micro_batch_size conversations",
                            env="PACKING")
    epochs: float = setting(3, "passes over the training data; 0.5: half of it", env="NUM_EPOCHS", low=1e-6)
    max_steps: int | None = setting(None, "stop after N steps; overrides epochs", env="MAX_STEPS", low=1)
    seed: int = setting(42, "seed of data order, dropout and new adapters", env="SEED", low=0)

    lr: float = setting(2e-5, "peak learning rate; about 10 times more for LoRA", env="LEARNING_RATE", low=0,
                        group="optimizer (AdamW)")
    scheduler: str = setting("cosine", "shape of the learning rate after warm-up",
                             ("cosine", "linear", "constant", "wsd"), env="SCHEDULER")
    warmup_ratio: float = setting(0.1, "fraction of steps with rising lr", env="WARMUP_RATIO", low=0, high=1)
    min_lr_ratio: float = setting(0.0, "final lr / peak lr", low=0, high=1, unless="scheduler=constant")
    weight_decay: float = setting(0.01, "applied to matrices only", env="WEIGHT_DECAY", low=0)
    grad_clip: float = setting(1.0, "maximum norm of the gradient; 0: no clipping", env="GRAD_CLIP", low=0)
    max_grad_norm_factor: float | None = setting(
        None, "skip a step whose gradient norm exceeds this × the median of the last 64 steps", low=1)
    beta1: float = setting(0.9, "decay rate of the first moment", low=0, high=0.9999999)
    beta2: float = setting(0.95, "decay rate of the second moment", low=0, high=0.9999999)
    freeze: str | None = setting(None, "names and regexes of parts that are not trained", unless="use_lora")

    use_lora: bool = setting(False, "freeze the model, train LoRA adapters", env="USE_LORA", group="LoRA")
    lora_rank: int = lora_setting(8, "adapter rank: higher learns more, costs more", env="LORA_RANK", low=1)
    lora_alpha: int = lora_setting(16, "scale adapter outputs by alpha / rank", env="LORA_ALPHA", low=1)
    lora_dropout: float = lora_setting(0.0, "dropout probability on adapter inputs", low=0, high=0.9999999)
    lora_targets: str = lora_setting("all-linear", "all-linear, names with commas, or a regular expression")
    lora_rs: bool = lora_setting(False, "rsLoRA: scale by alpha / sqrt(rank), for high ranks")
    lora_dora: bool = lora_setting(False, "DoRA: also learn the norm of each weight row")
    lora_modules_to_save: str | None = lora_setting(None, "also train fully: embed_tokens, lm_head or both")
    lora_plus_ratio: float = setting(1.0, "LoRA+: lr of the B matrices / lr", low=0, needs="use_lora")
    quantize: str | None = setting(None, "QLoRA: store the frozen matrices in 4 bits", ("nf4",),
                                   needs="use_lora", unless="tp or lora_dora")
    resume_adapter: str | None = setting(None, "start from this adapter, also one of PEFT", needs="use_lora")

    strategy: str = setting("fsdp", "fsdp and fsdp2: FSDP2; megatron: tensor parallel × FSDP2",
                            ("fsdp", "fsdp2", "megatron"), env="STRATEGY", group="several GPUs, memory")
    tp: int = setting(1, "split each matrix over N ranks (tensor parallel)", env="TP", low=1)
    sp: int = setting(1, "each micro-batch's tokens over N ranks, attention's heads too (sequence parallel)",
                     env="SP", low=1)
    replicas: int = setting(1, "N copies of the model, each sharded over 1/N of the ranks (HSDP)", low=1)
    gradient_reduction: str = setting(
        "auto", "sum gradients over ranks once a step or, for less memory, with each micro_batch; auto: once "
                "a step if a whole gradient fits into a tenth of memory", ("auto", "step", "micro_batch"))
    timeout: int = setting(600, "abort if a rank does not respond for this many seconds", low=1, high=1e6)
    param_offload: bool = setting(False, "keep parameters, gradients and optimizer state in host memory",
                                  env="PARAM_OFFLOAD")
    optimizer_offload: bool = setting(False, "keep moments and fp32 master weights in host memory",
                                      env="OPTIMIZER_OFFLOAD")
    gradient_checkpointing: bool | str = setting(True, env="GRADIENT_CHECKPOINTING", word="auto",
                                                 help="recompute activations: less memory, 1/3 more compute; "
                                                      "auto: in as many blocks as memory requires")
    dtype: str | None = setting(None, "compute precision; none: bf16 on CUDA, fp32 on CPU", ("bf16", "fp32"),
                                env="DTYPE")
    compile: bool | str = setting("auto", "torch.compile the blocks; auto: on CUDA where Triton works",
                                  env="COMPILE", unless="tp", word="auto")
    deterministic: bool = setting(False, "bit-identical runs on CUDA too (slower; the CPU always is)")
    selfcheck: bool = setting(False, "compare one step's gradient over several layouts, then exit")

    output_dir: str = setting("./outputs", "directory for checkpoints, metrics and the report",
                              env="OUTPUT_DIR", group="output")
    push_to_hub: str | None = setting(None, "ORG/NAME: push the best (--keep_best) or last step to a hub")
    resume_from: str | None = setting(None, "step directory to continue; auto: the latest", env="RESUME_FROM")
    save_steps: int | None = setting(None, "save every N steps; none: each epoch", env="SAVE_STEPS", low=1)
    async_save: bool = setting(False, "train on while a checkpoint is written, from a copy in host memory")
    keep_checkpoints: int | str | None = setting(3, "newest N to keep, and that of lowest val_loss; or all",
                                                 env="KEEP_CHECKPOINTS", low=1, word="all")
    eval_steps: int | None = setting(None, "validate every N steps; none: once per epoch", low=1,
                                     env="EVAL_STEPS", needs="val_data or val_split or sample_prompts")
    keep_best: bool | str = setting(False, "also save each step of a new lowest val_loss; NAME: of this set",
                                    word="NAME", needs="val_data or val_split")
    early_stopping: int | None = setting(None, "stop after N validations in a row without a lower val_loss",
                                         low=1, needs="val_data or val_split")

    logger: str = setting("console", "wandb, tensorboard, trackio, with commas; quiet: no progress shown",
                          env="LOGGER", group="logging")
    project: str | None = setting(None, "project name in wandb and trackio", env="WANDB_PROJECT")
    run_name: str | None = setting(None, "name of the run in wandb, trackio and the report")
    sample_prompts: str | None = setting(None, "prompts to answer at each validation: .txt or a data file")
    profile: int | None = setting(None, "trace N steps with torch.profiler, after two others", low=1)

    def __post_init__(self):
        self.complete(resume.settings)
        check_loggers(self.logger)
        processes.check_strategy(self.strategy, self.tp, self.sp, self.replicas)

    def dtype_on(self, device):
        """Compute precision on a device, "bf16" or "fp32"."""
        return self.dtype or ("bf16" if device.type == "cuda" else "fp32")


def lr_at(step, total_steps, cfg):
    """Learning rate of a step, 1 ... total_steps. A pure function: resume needs no scheduler state."""
    warmup = math.ceil(cfg.warmup_ratio * total_steps)
    if step <= warmup:
        return cfg.lr * step / warmup
    progress = (step - 1 - warmup) / (total_steps - warmup)
    low = cfg.lr * cfg.min_lr_ratio
    if cfg.scheduler == "cosine":
        return low + (cfg.lr - low) * (1 + math.cos(math.pi * progress)) / 2
    if cfg.scheduler == "wsd":  # warm-up, stable, decay (arXiv 2404.06395): only the last fifth decays
        progress = max(0, progress - 0.8) / 0.2
    if cfg.scheduler in ("linear", "wsd"):
        return cfg.lr + (low - cfg.lr) * progress
    return cfg.lr


def micro_batches(dataset, ids, cfg, ranks):
    """This rank's micro-batches of the conversations `ids`."""
    return data.micro_batches(dataset, ids, *packing.limits(cfg), dp_rank=ranks.dp_rank,
                              dp_size=ranks.dp_size, sp_rank=ranks.sp_rank, sp_size=ranks.sp_size,
                              pin_memory=ranks.device.type == "cuda")


def backward(model, batches, weight, ranks, losses=None):
    """Accumulate the gradient of a step over its micro-batches.

    weight   sum of the weights of the step's targets, over all ranks. Each micro-batch's weighted loss is
             divided by it, so the gradient does not depend on how the step is split into micro-batches
    losses   samples.ConversationLosses, which gets the losses of each micro-batch
    returns  () the quotients of this rank's micro-batches, summed; the sum over dp ranks is the step's loss
    """
    total = torch.zeros((), device=ranks.device)
    for i, batch in enumerate(ranks.each(batches), 1):
        fsdp.set_gradient_sync(model, is_last=i == len(batches))
        out = model(batch.tokens, batch.documents, batch.target_positions, batch.targets, batch.weights)
        loss = out.total / weight
        loss.backward()
        total += loss.detach()
        if losses is not None:
            losses.add(batch, out)
    return total


@torch.no_grad()
def evaluate(model, dataset, ids, cfg, ranks):
    """(loss, accuracy) of the targets of the conversations `ids`; not valid if a signal ended it early.

    loss      nats, the mean by the weights of the targets
    accuracy  the share of targets that are the likeliest token
    """
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    with fsdp.evaluation(model):
        for batch in ranks.each(overlap.ahead(micro_batches(dataset, ids, cfg, ranks), ranks.device)):
            if ranks.poll_signals(late=True):
                break
            out = model(batch.tokens, batch.documents, batch.target_positions, batch.targets, batch.weights)
            sums += torch.stack((out.total, out.correct.sum()))
    counts, (loss, n_correct) = dataset.count(ids), ranks.all_reduce(sums).tolist()
    return loss / counts["target_weight"], n_correct / counts["target_tokens"]


def build(cfg, paths, ranks, trains=True):
    """Create the model on meta, split it over the ranks, allocate it, and load it from the disk.

    paths    ModelPaths (disk/run.py): where the model, its adapter and its tokenizer are
    trains   False: for inference, without an optimizer (chat.py)
    returns  (model, optimizer or None). If the device is "meta", the model is neither split, nor allocated,
             nor loaded (tools/plan.py)

    The order of the steps below matters: each one needs the one before.
    """
    bf16 = cfg.dtype_on(ranks.device) == "bf16"
    is_meta = ranks.device.type == "meta"
    compiled = trains and compiler.choose(cfg.compile, ranks.device, cfg.tp)
    with torch.device("meta"):
        model = causal_lm(paths.config)(
            paths.config, forecast.checkpointed_blocks(cfg, paths.config), compiled)
    if not is_meta:
        pretrained.match_weights(model, paths.model)  # raises before memory is allocated
    if bf16 and (cfg.optimizer_offload or cfg.use_lora):
        model.to(torch.bfloat16)  # the optimizer has fp32 masters in host memory, or the model is frozen
    if cfg.quantize:
        nf4.quantize_linears(model)
    if cfg.freeze:
        freezing.freeze(model, cfg.freeze, bf16)
    if cfg.use_lora:
        peft_config, lora_ranks = (peft.read(paths.adapter) if paths.adapter
                                   else peft.new(model, cfg, paths.is_multimodal))
        lora.inject(model, peft_config, lora_ranks, cfg.tp)
    if bf16 and not fsdp.is_used(ranks, cfg.param_offload):
        model.to(torch.bfloat16)  # the optimizer has fp32 masters; FSDP2 would cast its fp32 parameters
    if is_meta:
        return model, None

    if trains and ranks.device.type == "cpu":
        memory.tune_malloc(is_lora=cfg.use_lora, offloads=cfg.param_offload or cfg.optimizer_offload)
    if cfg.tp > 1:
        tp.split(model, ranks.mesh["tp"])
    if cfg.sp > 1:
        sp.split(model, ranks)
    fsdp.shard(model, ranks, bf16=bf16, param_offload=cfg.param_offload,
               gradient_reduction=cfg.gradient_reduction)
    model.to_empty(device="cpu" if cfg.param_offload else ranks.device)
    model.tie_weights()
    optimizer = optim.create(model, cfg) if trains else None
    pretrained.load_weights(model, paths.model, optimizer)
    if paths.adapter:
        pretrained.load_weights(model, paths.adapter, optimizer)
    elif cfg.use_lora:
        lora.initialize(model, pretrained.master_weights(model, optimizer), cfg.seed)
    return model, optimizer


def train(cfg, ranks=None, origins=None):
    """One run from start to end, on every rank: train(Config(...)). origins: where settings come from."""
    if ranks is None:  # from Python: train(Config(...))
        return entry.from_python(train, cfg)
    from tools import selfcheck  # for --selfcheck, and to find the micro-batch of a non-finite loss
    run = RunState(cfg, ranks, origins)  # a new run, or one that resumes from a verified checkpoint
    tokenizer = run.tokenizer()
    ranks.set_phase("tokenise")
    train_set, val_set = data.load_sets(cfg, tokenizer, ranks.show_progress)
    run.identify(train_set, val_set, ranks)
    sampler = data.Sampler(train_set.n_inputs, epochs=cfg.epochs, seed=cfg.seed, batch_size=cfg.batch_size,
                           batch_tokens=cfg.batch_tokens, max_steps=cfg.max_steps, mix=train_set.mix())
    run.schedule(len(sampler), lr_at)
    cfg = run.choose_memory(build, ranks)  # numbers in place of `auto`
    model, optimizer = build(cfg, run.paths, ranks)
    run.restore(model, optimizer, tokenizer)
    if cfg.selfcheck:
        return selfcheck.compare(backward, model, train_set, sampler.step(1).ids, cfg, ranks)
    validation = Validation(cfg, val_set, samples.Prompts(cfg, tokenizer, run.eos_ids), run, ranks)
    losses = samples.ConversationLosses(train_set, ranks)
    meter = optim.ChangeMeter(optimizer)
    log = Log(cfg, run.step, len(sampler), ranks, ranks.warnings)
    log.banner(cfg, run, model, tokenizer, train_set, validation, sampler, ranks)
    first_step = run.step + 1

    def read():
        """Log the step that was queued last; stop the run if its loss or gradient was not finite."""
        if bad := log.read(run.norms):
            run.publish()
            selfcheck.stop_non_finite(backward, model, train_set, bad, cfg, ranks)

    def after_step(step):
        """Evaluate if due, save if due. The first step's numbers are shown at once: a user waits for them."""
        run.publish(waits=False)
        is_stopping = ranks.poll_signals(late=True)
        evaluates, saves = sampler.is_due(step, cfg.eval_steps), sampler.is_due(step, cfg.save_steps)
        if not (evaluates or saves or is_stopping or step in (first_step, len(sampler))):
            return
        read()
        is_best = evaluates and validation.after_step(step, evaluate, model, cfg, log)
        is_last = ranks.poll_signals() or step == len(sampler) or run.stops_early
        if is_last or saves or (is_best and cfg.keep_best):
            ranks.set_phase(f"save of step {step}")
            log.extremes(step, losses.extremes(tokenizer))
            run.save(model, optimizer, is_last)
            log.report()
            ranks.poll_signals()

    def steps():
        """What each step computes. A thread makes it while the step before is computed."""
        for step in range(first_step, len(sampler) + 1):
            epoch, ids = sampler.step(step)
            yield step, epoch, ids, list(micro_batches(train_set, ids, cfg, ranks))

    validation.before_training(evaluate, model, cfg, log)
    ranks.poll_signals()  # from now on, a signal lets the current step finish and be saved
    if run.owes_evaluation and not ranks.stop_signal:
        after_step(run.step)
    figures = overlap.Figures(ranks.device)
    for step, epoch, ids, batches in profiler.profiled(overlap.ahead(steps(), ranks.device), cfg, ranks):
        if ranks.stop_signal or run.stops_early:
            break
        ranks.set_phase(f"step {step}")
        torch.manual_seed(hash((cfg.seed, step, ranks.tokens_rank)))  # for dropout; resume needs no RNG state
        counts = train_set.count(ids)
        loss = backward(model, batches, counts["target_weight"], ranks, losses.restart(ids))
        if cfg.use_lora and step == first_step:
            selfcheck.check_adapters(model, ranks)
        read()  # the step before: only now, so that the device had work meanwhile
        sums, norm = losses.all_reduce(loss), fsdp.grad_norm(model).to(ranks.device)
        lr = lr_at(step, len(sampler), cfg)
        meter.start(step)
        optim.update(optimizer, sums["loss"], norm, lr=lr, grad_clip=cfg.grad_clip, norm_limit=run.norm_limit)
        figures.queue(**sums, grad_norm=norm, changed=meter.changed())
        log.step(step, ids, figures, run.norm_limit, epoch=epoch, lr=lr, **counts)
        run.step, run.lr = step, lr
        after_step(step)
        figures = overlap.Figures(ranks.device)  # the next step begins: it may have to wait for its data
    run.publish()
    log.finish(run, ranks.stop_signal)


def main():
    cfg, origins = parse(Config, sys.argv[1:], resumed=resume.settings)
    inputs.checked(cfg, origins)  # wrong paths, before a model is downloaded
    entry.run(train, cfg, origins)


if __name__ == "__main__":
    errors.run(main)
