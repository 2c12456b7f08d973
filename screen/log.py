"""What a run prints and records: the screen, JSON Lines files, and the loggers that --logger names.

Only rank 0 writes. A logger of another package (wandb, tensorboard, trackio) runs in its own thread: if it
fails or hangs, the run continues without it. metrics.jsonl has every number in any case.
"""

import dataclasses
import importlib.util
import json
import logging
import math
import os
import queue
import shlex
import sys
import threading
import time
import uuid

from disk import files
from ops import flops, memory
from screen import bar, closing, report
from screen.by_source import Sources
from screen.trend import Trend
from screen.validation import together
from settings.errors import UserError
from settings.parser import write_yaml

LOGGERS = ("console", "quiet", "wandb", "tensorboard", "trackio")  # console is on unless quiet is named


def check_loggers(names):
    """Raise UserError if --logger names an unknown or missing package; called before anything is loaded."""
    for name in filter(None, map(str.strip, names.split(","))):
        if name not in LOGGERS:
            raise UserError(f"--logger {names}: unknown logger {name!r}; use {', '.join(LOGGERS)}")
        if name not in ("console", "quiet") and importlib.util.find_spec(name) is None:
            raise UserError(f"--logger {names}: {name} is not installed; "
                            f"run {sys.executable} -m pip install {name}")


class Warnings(logging.Handler):
    """Prints each warning of Python and torch once, whichever ranks raise it.

    Rank 0 prints its own warnings at once. The other ranks send theirs through the store; collect() prints
    those that rank 0 has not printed yet.
    """

    def __init__(self, store, rank):
        super().__init__(logging.WARNING)
        self.store, self.rank, self.seen = store, rank, set()

    @classmethod
    def install(cls, ranks):
        """Take over the warnings of Python and torch; do nothing and return None on a single rank."""
        if ranks.world_size == 1:
            return None
        self = cls(ranks.store, ranks.rank)
        logging.captureWarnings(True)
        logging.getLogger("py.warnings").handlers = [self]
        # several of torch's loggers have a handler of their own
        for name, logger in logging.root.manager.loggerDict.items():
            if name.startswith("torch") and getattr(logger, "handlers", None):
                logger.handlers = [self]
        return self

    def emit(self, record):
        text = record.getMessage().strip().partition("\n  ")[0]  # the rest is the source line
        if text not in self.seen and self.rank == 0:
            print(f"warning: {text}", file=sys.stderr)
        elif text not in self.seen:
            self.store.append("warnings", json.dumps([self.rank, text]) + "\n")
        self.seen.add(text)

    def collect(self):
        """Print the warnings that other ranks have sent; rank 0 calls it."""
        if not self.store.check(["warnings"]):
            return
        ranks_by_text = {}
        for rank, text in map(json.loads, self.store.get("warnings").decode().splitlines()):
            ranks_by_text.setdefault(text, []).append(rank)
        for text in ranks_by_text.keys() - self.seen:
            ranks = ", ".join(map(str, sorted(ranks_by_text[text])))
            print(f"warning, rank {ranks}: {text}", file=sys.stderr)
            self.seen.add(text)


class JsonLines:
    """A JSON Lines file whose objects have a step. write() hands a line to the system; sync() flushes it.

    Opening removes lines after last_step: an interrupted run may have written steps that its checkpoint does
    not hold. Raises UserError for a complete line without a step.
    """

    def __init__(self, path, last_step):
        kept = []
        if os.path.exists(path):
            with open(path, "rb") as f:
                for number, line in enumerate(f, 1):
                    if line.endswith(b"\n") and step_of(line, f"{path}, line {number}") <= last_step:
                        kept.append(line)
        with files.replaced(path, "wb") as f:
            f.writelines(kept)
        # unbuffered: after a failed write, a buffer would be written again when the file is closed
        self.path, self.file = path, open(path, "ab", buffering=0)

    def write(self, **values):
        line = (json.dumps(values) + "\n").encode()
        with files.naming(self.path):
            while line:  # a full disk accepts the beginning of a line and raises at the next write
                line = line[self.file.write(line):]

    def sync(self):
        # raises if the file was deleted or its file system is gone, which fsync would not notice
        os.stat(self.path)
        with files.naming(self.path):
            os.fsync(self.file.fileno())


def step_of(line, where):
    """Return the step of a line of JSON. Raises UserError, naming `where` the line is, if it has no step."""
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}; remove the line") from error
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        raise UserError(f"{where} has no step: {line!r:.60}; remove the line")
    return values["step"]


def open_wandb(settings, directory, last_step):
    import wandb

    path = os.path.join(directory, "wandb_id")  # a resumed run keeps its id
    if not os.path.exists(path) or not last_step:
        with open(path, "w", encoding="utf-8") as f:
            f.write(uuid.uuid4().hex)
    with open(path, encoding="utf-8") as f:
        run_id = f.read()
    try:
        run = wandb.init(project=settings["project"], name=settings["run_name"], dir=directory,
                         config=settings, id=run_id, resume="allow")
    except wandb.errors.Error as error:
        raise UserError(f"--logger wandb: {error} Or set WANDB_MODE=offline, "
                        "or remove wandb from --logger.") from error
    return run.log, run.finish


def open_trackio(settings, directory, last_step):
    import trackio

    name = settings["run_name"] or os.path.basename(os.path.abspath(directory))
    run = trackio.init(project=settings["project"] or "sft", name=name, config=settings,
                       resume="allow" if last_step else "never")
    return run.log, run.finish


def open_tensorboard(settings, directory, last_step):
    from torch.utils.tensorboard import SummaryWriter

    purge_step = last_step + 1 if last_step else 0  # a new run begins with step 0
    writer = SummaryWriter(os.path.join(directory, "tensorboard"), purge_step=purge_step, flush_secs=10)

    def log(values, step):
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


OPEN = {"wandb": open_wandb, "trackio": open_trackio, "tensorboard": open_tensorboard}


class Logger(threading.Thread):
    """Passes numbers to a package, in order, in a thread of its own: an error there does not end the run."""

    def __init__(self, name, settings, directory, last_step):
        super().__init__(name=name, daemon=True)
        # in the main thread: an error here stops the run before its first step
        self.log, self.finish = OPEN[name](settings, directory, last_step)
        self.queue, self.has_failed = queue.SimpleQueue(), False
        self.start()

    def run(self):
        while (item := self.queue.get()) is not None:
            self.log(*item)  # an exception ends this thread; the threading module prints it
        self.finish()

    def put(self, item):
        self.queue.put(item)
        if not self.is_alive() and not self.has_failed:
            self.has_failed = True
            print(f"warning: --logger {self.name} has failed; the run continues without it", file=sys.stderr)

    def close(self, seconds=60):
        self.put(None)
        self.join(seconds)
        if self.is_alive():
            print(f"warning: --logger {self.name} did not finish within {seconds} s; not waiting any longer",
                  file=sys.stderr)


class Log:
    """The screen, metrics.jsonl, samples.jsonl and the loggers of one run. Only rank 0 writes.

    last_step    the step of the resumed checkpoint, or 0; later lines are removed from the files
    total_steps  the last step of the run
    warnings     Warnings, or None on a single rank
    """

    def __init__(self, cfg, last_step, total_steps, ranks, warnings=None):
        self.directory, self.last_step, self.total_steps = cfg.output_dir, last_step, total_steps
        self.is_writer, self.warnings = ranks.rank == 0, warnings
        names = [name.strip() for name in cfg.logger.split(",")]
        self.on_console = self.is_writer and "quiet" not in names
        self.peak_lr, self.val_loss = cfg.lr, None
        self.has_warned = False  # by warn_if_unchanged
        self.is_already_done = False  # a resumed run has no step left
        self.device, self.ranks = ranks.device, ranks
        self.unread = None  # the arguments of step(), until read()
        self.last_printed, self.started = -1e9, time.perf_counter()
        self.loggers, self.bar = [], bar.Bar(disable=True)
        if self.is_writer:
            # if a file of the report is missing, stop here and not at the first checkpoint
            report.assets()
            # loggers first: if one cannot start, there is no metrics.jsonl that looks like a run
            settings = dataclasses.asdict(cfg)
            self.loggers = [
                Logger(name, settings, self.directory, last_step) for name in names if name in OPEN]
            last = last_step or -1  # a new run keeps no line, not even one of step 0
            self.metrics = JsonLines(os.path.join(self.directory, "metrics.jsonl"), last)
            self.samples = JsonLines(os.path.join(self.directory, "samples.jsonl"), last)
            self.trend, self.diagnosis = Trend(self.metrics.path), None
            ranks.ends.callback(self.close)

    def banner(self, cfg, run, model, tokenizer, train_set, validation, sampler, ranks):
        """Print model, data and steps; write ledger.json and config.yaml; start the progress bar."""
        self.train_set, self.sources, self.model_config = train_set, Sources(train_set), model.config
        self.matrices = flops.Matrices.of(model)
        if not self.is_writer:
            return
        n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        trained = f"{n_trained:,} trained with LoRA" if cfg.use_lora else "all trained"
        if cfg.freeze:
            trained = f"{n_trained:,} trained"
        model_line = (f"model    {cfg.model} ({model.config.model_type}): {model.n_parameters:,} parameters, "
                      f"{trained}, {cfg.dtype_on(ranks.device)} on {ranks.world_size} × {ranks.device.type}"
                      f"{layout_text(cfg, ranks)}")
        n_others, n_bytes = run.shard_map.others()
        if n_others:
            model_line += f"; its {n_others:,} other tensors ({n_bytes / 1e9:,.2f} GB) are kept"
        train_lines, val_lines = train_set.ledger.lines(train_set.files), []
        if val_set := validation.dataset:
            val_lines = [f"{line} (validation)" for line in val_set.ledger.lines(val_set.files)]
            val_lines += validation.lines(train_set)
        self.is_already_done = run.step >= self.total_steps and not run.owes_evaluation
        path = os.path.join(self.directory, "config.yaml")
        if not self.is_already_done:  # the next resume takes its settings from this file
            with files.naming(path):
                write_yaml(run.cfg, path)  # auto stays auto: another machine chooses
        # where the run was resumed; without the places after this one, as their steps are trained again
        resumes = report.resumes_in(report.read_ledger(self.directory))
        resumes = [step for step in resumes if step < run.step] + [run.step] * bool(run.step)
        with files.replaced(os.path.join(self.directory, "ledger.json"), "wb") as f:
            f.write(files.encoded({"model": model_line, "train": train_lines, "validation": val_lines,
                                   "ranks": ranks.world_size, "resumes": resumes}))

        print(model_line)
        if tokenizer.is_fallback:
            print("         no chat template in the model; ChatML is used and saved with it")
        print(*train_lines, *val_lines, sep="\n")
        if train_set.mix():
            quotas = " + ".join(f"{n:,}" for n in sampler.quotas)
            print(f"mix      {quotas} of {len(train_set):,} conversations per epoch")
        self.print_steps(train_set, sampler)
        if run.memory_line:
            print(run.memory_line)
        if disk_lines := run.disk_lines(sampler.steps_of(0)):
            print(disk_lines[0])
            if disk_lines[1]:
                print(disk_lines[1], file=sys.stderr, flush=True)
        print(*run.lines, sep="\n")
        if self.on_console and has_terminal(sys.stderr):
            self.bar = bar.Bar(
                total=self.total_steps, initial=self.last_step, dynamic_ncols=True, mininterval=0.5)
        self.started = time.perf_counter()

    def print_steps(self, train_set, sampler):
        """Print the number of steps, and what a step of the first epoch holds on average."""
        steps_per_epoch = sampler.steps_of(0)
        fraction = sum(sampler.quotas) / len(train_set) / steps_per_epoch  # of the data, per step
        print(f"steps    {in_epochs(self.total_steps, steps_per_epoch)}; per step about "
              f"{len(train_set) * fraction:.3g} conversations, "
              f"{int(train_set.n_tokens.sum()) * fraction:,.0f} tokens "
              f"({train_set.ledger.target * fraction:,.0f} trained)")

    def step(self, step, ids, figures, norm_limit, *, epoch, lr, tokens, target_tokens, target_weight):
        """Remember a training step until read() is called.

        ids         the conversations of the step
        figures     overlap.Figures: the sums of ConversationLosses.all_reduce, grad_norm, and other numbers
                    that the device computes
        norm_limit  a gradient norm above it made the optimizer skip the step
        the others  keys of its line in metrics.jsonl
        """
        values = dict(  # in the order of the line; read() sets the three
            epoch=epoch, loss=None, accuracy=None, lr=lr, grad_norm=None, tokens=tokens,
            target_tokens=target_tokens, target_weight=target_weight)
        self.unread = step, ids, figures, norm_limit, values

    def read(self, norms):
        """Record the step that was last passed to step(), once; append its gradient norm to `norms`.

        A step whose loss or norm is not finite is not recorded but returned, as (step, its conversations, a
        text with the two numbers); otherwise returns None. All ranks call it.
        """
        if self.unread is None:
            return None
        (step, ids, figures, norm_limit, values), self.unread = self.unread, None
        numbers, seconds = figures.read()
        seconds = max(seconds, 1e-9)  # the clock of a virtual machine may stand still
        loss, grad_norm = numbers["loss"], numbers["grad_norm"]
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            return step, ids, f"loss {loss}, gradient norm {grad_norm}"
        norms.append(grad_norm)
        if self.is_writer:
            is_skipped = grad_norm > norm_limit
            if is_skipped:  # --max_grad_norm_factor
                self.say(f"step {step}: skipped, gradient norm {grad_norm:.3g} exceeds the limit "
                         f"{norm_limit:.3g}; conversations: {self.train_set.sources(ids)}")
            values["accuracy"] = numbers.pop("correct") / values["target_tokens"]
            values["sources"] = self.sources.values(ids, numbers.pop("sources", ())) or None
            values.update(numbers, seconds=seconds, tokens_per_second=values["tokens"] / seconds,
                          peak_memory_gb=memory.peak_memory_gb(self.device))
            values["reserved_memory_gb"] = memory.reserved_memory_gb(self.device)
            lengths = self.train_set.n_inputs[ids]
            values["mfu"] = flops.mfu(self.model_config, self.matrices, lengths, values["target_tokens"],
                                      seconds, self.ranks)
            values["skipped"] = is_skipped or None
            self.record(step, without_none(values))
        return None

    def record(self, step, values):
        """Write the line of a training step and show it."""
        if self.warnings:
            self.warnings.collect()
        self.warn_if_unchanged(step, values)
        self.metrics.write(step=step, **values)
        self.trend.add(step, **values)
        by_source = {f"loss/{name}": part["loss"] for name, part in values.get("sources", {}).items()}
        numbers = {name: value for name, value in values.items() if name != "sources"}
        self.send("train", step, {**numbers, **by_source})
        self.bar.shown = bar.parts(values, self.val_loss)
        self.bar.update()
        now = time.perf_counter()
        is_due = now - self.last_printed > 10 or step == self.total_steps
        if self.on_console and self.bar.disable and is_due:  # no bar: output goes to a file
            self.last_printed = now
            remaining = (now - self.started) / (step - self.last_step) * (self.total_steps - step)
            shown = bar.parts(values).values()  # val_loss has lines of its own
            print(f"step {step:,} of {self.total_steps:,}: {', '.join(shown)}, "
                  f"{bar.duration(remaining)} left", flush=True)

    def warn_if_unchanged(self, step, values):
        """Warn, once per run, about a step that changed less than 1 % of the weights.

        Ignores skipped steps, and steps whose learning rate is below half of its peak.
        """
        changed = values.get("changed", 1)
        if self.has_warned or changed >= 0.01 or values["lr"] < self.peak_lr / 2 or "skipped" in values:
            return
        self.has_warned = True
        self.say(
            f"warning: step {step} changed {changed:.2%} of the weights at lr {values['lr']:.2g}: "
            "the learning rate is too small for this precision, or the gradients are zero; check --lr")

    def validation(self, step, results, answers):
        """Record what was measured on the validation sets, and the answers to --sample_prompts.

        results  {name of a set, None if it has none: validation.Result}; empty without validation data
        """
        if not self.is_writer:
            return
        if results:
            whole = together(results)
            self.val_loss = whole.loss
            sets = {name: values_of(result) for name, result in results.items()} if len(results) > 1 else {}
            values = dict(val_loss=whole.loss, val_tokens=whole.tokens, val_weight=whole.weight,
                          val_accuracy=whole.accuracy, forgetting=whole.forgetting, val_sets=sets or None)
            self.metrics.write(step=step, **without_none(values))
            self.send("val", step, {**values_of(whole), "weight": whole.weight})
            for name, numbers in sets.items():
                self.send(f"val/{name}", step, numbers)
            self.trend.add(step, val_loss=whole.loss, val_tokens=whole.tokens)
            self.say(f"step {step}: val_loss {described(step, whole)}")
            for name in sets:
                self.say(f"step {step}:   {name}: {described(step, results[name])}")
            is_early = step < max(1, self.total_steps / 4)  # the lr may still rise
            if not is_early and not self.diagnosis:
                self.diagnose()
        for prompt, answer in answers:
            self.samples.write(step=step, kind="sample", prompt=prompt, answer=answer)
            self.say(f"step {step}: {prompt!r:.60} -> {answer!r:.100}")

    def diagnose(self):
        """Print a line if the loss does not fall as it should, unless it was the last such line."""
        diagnosis = self.trend.diagnosis()
        if diagnosis and diagnosis != self.diagnosis:
            self.diagnosis = diagnosis
            self.say(f"warning: {diagnosis}")

    def extremes(self, step, texts):
        """Record the conversations of highest and lowest loss (samples.ConversationLosses.extremes).

        It comes before a save. So all that was recorded is flushed to the disk before the checkpoint is.
        """
        if self.is_writer:
            for text in texts:
                self.samples.write(step=step, **text)
            self.metrics.sync()
            self.samples.sync()

    def say(self, text):
        if self.on_console:
            self.bar.write(text)

    def send(self, kind, step, values):
        for logger in self.loggers:
            logger.put(({f"{kind}/{name}": value for name, value in values.items()}, step))

    def report(self):
        if self.is_writer:
            try:
                report.write(self.directory)
            except (OSError, UserError) as error:  # what only shows must not end a run
                self.say(f"warning: no report: {error}")

    def close(self):
        """Close the files and loggers, also after an error if the process lives on."""
        self.bar.close()
        while self.loggers:
            self.loggers.pop().close()
        self.metrics.file.close()
        self.samples.file.close()

    def finish(self, run, stop_signal):
        """Close the files and loggers; print how the run ended, where the checkpoint is, and how to try it.

        stop_signal  the signal that ended the run, or 0
        """
        self.bar.close()
        if not self.is_writer:
            return
        if self.warnings:
            self.warnings.collect()
        if not self.is_already_done:
            self.diagnose()
        self.close()
        is_complete = not run.owes_evaluation and run.step >= self.total_steps
        if stop_signal and not is_complete:
            print(f"stopped  after step {run.step} of {self.total_steps}; continue with --output_dir "
                  f"{shlex.quote(self.directory)} --resume_from auto")
        if run.stops_early:
            print(f"stopped  after step {run.step}: {run.best['behind']} validations without a lower "
                  f"val_loss than {run.best['val_loss']:.4f} of step {run.best['step']}")
        latest = os.path.join(run.root, "latest")
        kind = "PEFT adapter" if run.cfg.use_lora else "Hugging Face model"
        if self.is_already_done:
            limit = "--max_steps" if run.cfg.max_steps else "--epochs"
            print(f"done     already complete: raise {limit} to train longer (the checkpoint has step "
                  f"{run.step} of {self.total_steps})")
        elif run.has_saved:
            print(*closing.result_lines(self.directory), sep="\n")
            print(f"saved    {latest} -> step_{run.step} ({kind} directory)")
        if os.path.lexists(latest):
            times = 2 * math.ceil(max(1, run.step / self.total_steps))  # a resume may have lowered --epochs
            print(*closing.command_lines(
                run.cfg, latest, is_complete=is_complete, stops_early=run.stops_early, times=times,
                world_size=self.ranks.world_size), sep="\n")


def layout_text(cfg, ranks):
    """How a run uses its ranks: ", fsdp, tp 1, replicas 2, gradients reduced once a step"."""
    parts = [f"tp {cfg.tp}", *(f"{name} {n}" for name in ("sp", "replicas") if (n := getattr(cfg, name)) > 1)]
    text = f", {cfg.strategy}, {', '.join(parts)}" if ranks.world_size > 1 else ""
    if ranks.world_size == 1 and not cfg.param_offload:
        return text
    when = {"step": "once a step", "micro_batch": "with each micro-batch"}[cfg.gradient_reduction]
    return f"{text}, gradients reduced {when}"


def values_of(result):
    """{name: number} of a validation.Result, without what is not known."""
    values = {"loss": result.loss, "accuracy": result.accuracy, "tokens": result.tokens,
              "forgetting": result.forgetting}
    return without_none(values)


def without_none(values):
    return {name: value for name, value in values.items() if value is not None}


def described(step, result):
    """A validation.Result in a line: "1.2345, accuracy 61.2 %, forgetting +0.0123, 1,234 tokens"."""
    forgetting = f"forgetting {result.forgetting:+.4f}, " if step and result.forgetting is not None else ""
    return f"{result.loss:.4f}, accuracy {100 * result.accuracy:.1f} %, {forgetting}{result.tokens:,} tokens"


def has_terminal(stream):
    """Whether a stream is a terminal in which a progress bar can be drawn."""
    try:  # a terminal that reports a size of 0 × 0 would show an empty bar
        return stream.isatty() and all(os.get_terminal_size(stream.fileno()))
    except OSError:  # a notebook's stream may have no file, and some say they are terminals
        return False


def in_epochs(steps, per_epoch):
    """A number of steps as text: "18 = 2 epochs × 9 steps"; "3, 0.3333 epochs of 9 steps"."""
    sign = "," if steps % per_epoch else " ="
    by = "of" if steps % per_epoch else "×"
    epochs = with_noun(f"{steps / per_epoch:.4g}", "epoch")
    return f"{steps:,}{sign} {epochs} {by} {with_noun(f'{per_epoch:,}', 'step')}"


def with_noun(number, noun):
    """A number, as text, and its noun: "1 epoch", "1.5 epochs"."""
    return f"{number} {noun}" if number == "1" else f"{number} {noun}s"
