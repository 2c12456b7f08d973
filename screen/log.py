"""Where a run's numbers go: JSON Lines files, the screen, and the loggers that --logger names.

Only rank 0 writes. A logger of another package (wandb, tensorboard, trackio) works in a thread of its own: if
it fails or hangs, its numbers are lost, not the run. metrics.jsonl has them all.
"""

import dataclasses
import importlib.util
import json
import logging
import os
import queue
import shlex
import sys
import threading
import time
import uuid

from tqdm import tqdm

from disk import files
from screen import report
from settings import venv
from settings.errors import UserError
from settings.parser import write_yaml

LOGGERS = ("console", "wandb", "tensorboard", "trackio")


def check_loggers(names):
    """Raise UserError for a logger that is unknown or not installed, before anything is loaded."""
    for name in filter(None, map(str.strip, names.split(","))):
        if name not in LOGGERS:
            raise UserError(f"--logger {names}: {name!r} is none of {', '.join(LOGGERS)}")
        if name != "console" and importlib.util.find_spec(name) is None:
            raise UserError(f"--logger {names}: {name} is not installed; "
                            f"type: {sys.executable} -m pip install {name}")


class Warnings(logging.Handler):
    """The warnings of Python and torch on all ranks, each shown once.

    Rank 0 prints its own at once. The other ranks send theirs through the store, and rank 0 prints those that
    it has not printed yet.
    """

    def __init__(self, store, rank):
        super().__init__(logging.WARNING)
        self.store, self.rank, self.said = store, rank, set()

    @classmethod
    def install(cls, ranks):
        """Take over the warnings of Python and torch where there are several ranks; otherwise return None."""
        if ranks.world_size == 1:
            return None
        self = cls(ranks.store, ranks.rank)
        logging.captureWarnings(True)
        logging.getLogger("py.warnings").handlers = [self]
        # torch has handlers at several of its loggers
        for name, logger in logging.root.manager.loggerDict.items():
            if name.startswith("torch") and getattr(logger, "handlers", None):
                logger.handlers = [self]
        return self

    def emit(self, record):
        text = record.getMessage().strip().partition("\n  ")[0]  # without the line of code
        if text not in self.said and self.rank == 0:
            print(f"warning: {text}", file=sys.stderr)
        elif text not in self.said:
            self.store.append("warnings", json.dumps([self.rank, text]) + "\n")
        self.said.add(text)

    def collect(self):
        """On rank 0: print what the others have sent."""
        if not self.store.check(["warnings"]):
            return
        ranks = {}
        for rank, text in map(json.loads, self.store.get("warnings").decode().splitlines()):
            ranks.setdefault(text, []).append(rank)
        for text in ranks.keys() - self.said:
            print(f"warning, rank {', '.join(map(str, sorted(ranks[text])))}: {text}", file=sys.stderr)
            self.said.add(text)


class Lines:
    """A file of JSON lines with a step each. write hands a line to the system, sync flushes it to disk."""

    def __init__(self, path, last_step):
        kept = []
        if os.path.exists(path):  # what an interrupted run wrote beyond its checkpoint is taken out
            with open(path, "rb") as f:
                for number, line in enumerate(f, 1):
                    if line.endswith(b"\n") and step_of(line, f"{path}, line {number}") <= last_step:
                        kept.append(line)
        with files.naming(path), open(path + ".tmp", "wb") as f:
            f.writelines(kept)
        os.replace(path + ".tmp", path)
        # a buffer would be written once more at the end
        self.path, self.file = path, open(path, "ab", buffering=0)

    def write(self, **values):
        line = (json.dumps(values) + "\n").encode()
        with files.naming(self.path):
            while line:  # a disk that is full takes a part, and the next time raises
                line = line[self.file.write(line):]

    def sync(self):
        # raises where the file has lost its name: it was deleted, or its file system is gone
        os.stat(self.path)
        with files.naming(self.path):
            os.fsync(self.file.fileno())


def step_of(line, where):
    """The step of a line of JSON. Raises UserError, which says `where` the line is, if it has none."""
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}; take the line out") from error
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        raise UserError(f"{where} has no step: {line!r:.60}; take the line out")
    return values["step"]


def open_wandb(settings, directory, last_step):
    import wandb

    path = os.path.join(directory, "wandb_id")  # a resumed run goes on under its name there
    if not os.path.exists(path) or not last_step:
        with open(path, "w", encoding="utf-8") as f:
            f.write(uuid.uuid4().hex)
    with open(path, encoding="utf-8") as f:
        run_id = f.read()
    try:
        run = wandb.init(project=settings["project"], name=settings["run_name"], dir=directory,
                         config=settings, id=run_id, resume="allow")
    except wandb.errors.Error as error:
        raise UserError(f"--logger wandb: {error} Or set WANDB_MODE=offline, or leave wandb out.") from error
    return run.log, run.finish


def open_trackio(settings, directory, last_step):
    import trackio

    name = settings["run_name"] or os.path.basename(os.path.abspath(directory))
    run = trackio.init(project=settings["project"] or "sft", name=name, config=settings,
                       resume="allow" if last_step else "never")
    return run.log, run.finish


def open_tensorboard(settings, directory, last_step):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(os.path.join(directory, "tensorboard"), purge_step=last_step + 1, flush_secs=10)

    def log(values, step):
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


OPEN = {"wandb": open_wandb, "trackio": open_trackio, "tensorboard": open_tensorboard}


class Logger(threading.Thread):
    """Hands numbers to a package, in order, in a thread whose end is not the run's."""

    def __init__(self, name, settings, directory, last_step):
        super().__init__(name=name, daemon=True)
        # fails here, before the first step
        self.log, self.finish = OPEN[name](settings, directory, last_step)
        self.waiting, self.was_lost = queue.SimpleQueue(), False
        self.start()

    def run(self):
        while (item := self.waiting.get()) is not None:
            self.log(*item)  # what it raises is printed by the threading module and ends this thread
        self.finish()

    def put(self, item):
        self.waiting.put(item)
        if not self.is_alive() and not self.was_lost:
            self.was_lost = True
            print(f"warning: --logger {self.name} has failed; the run goes on without it", file=sys.stderr)

    def close(self, seconds=60):
        self.put(None)
        self.join(seconds)
        if self.is_alive():
            print(f"warning: --logger {self.name} has not finished in {seconds} s; left alone",
                  file=sys.stderr)


class Log:
    """The screen, metrics.jsonl, samples.jsonl and the loggers of one run. Only rank 0 writes.

    last_step  of the checkpoint that is resumed: later lines are removed from the files
    warnings   of all ranks, if there are several
    """

    def __init__(self, cfg, last_step, total_steps, ranks, warnings=None):
        self.directory, self.last_step, self.total = cfg.output_dir, last_step, total_steps
        self.writes, self.warnings = ranks.rank == 0, warnings
        names = [name.strip() for name in cfg.logger.split(",")]
        self.on_console = self.writes and "console" in names
        self.peak_lr, self.was_warned = cfg.lr, False
        self.val_loss, self.printed, self.started = None, -1e9, time.perf_counter()
        self.loggers, self.bar = [], tqdm(disable=True)
        if self.writes:
            # a missing file of the page stops the run here, not at its first checkpoint
            report.assets()
            # loggers first: one that can't start leaves no files behind that look like a run's
            settings = dataclasses.asdict(cfg)
            self.loggers = [
                Logger(name, settings, self.directory, last_step) for name in names if name in OPEN]
            self.metrics, self.samples = (
                Lines(os.path.join(self.directory, f"{name}.jsonl"), last_step)
                for name in ("metrics", "samples"))

    def banner(self, cfg, run, model, tokenizer, train_set, val_set, sampler, ranks):
        """Print what is trained, on what, how long; write ledger.json and config.yaml; start the bar."""
        if not self.writes:
            return
        n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        trained = f"{n_trained:,} trained with LoRA" if cfg.use_lora else "all trained"
        strategy = f", {cfg.strategy}, tp {cfg.tp}" if ranks.world_size > 1 else ""
        facts = {
            "model": f"model    {cfg.model} ({model.config.model_type}): {model.n_parameters:,} parameters, "
                     f"{trained}, {cfg.dtype_on(ranks.device)} on {ranks.world_size} × {ranks.device.type}"
                     f"{strategy}",
            "train": train_set.ledger.lines(),
            "validation": [f"{line} (validation)" for line in val_set.ledger.lines()] if val_set else [],
            "ranks": ranks.world_size,
        }
        path = os.path.join(self.directory, "config.yaml")
        with files.naming(path):
            write_yaml(cfg, path)
        files.write_file(os.path.join(self.directory, "ledger.json"), facts)

        print(facts["model"])
        if tokenizer.is_fallback:
            print("         it has no chat template: ChatML is used, and saved with it")
        print(*facts["train"], *facts["validation"], sep="\n")
        if train_set.mix():
            quotas = " + ".join(f"{n:,}" for n in sampler.quotas)
            print(f"mix      {quotas} of {len(train_set):,} conversations an epoch")
        per_epoch = sampler.per_epoch[0]
        share = sum(sampler.quotas) / len(train_set) / per_epoch  # of the data, in a step
        print(f"steps    {self.total:,} = {self.total / per_epoch:.4g} epochs of {per_epoch:,}, of about "
              f"{len(train_set) * share:.3g} conversations, "
              f"{int(train_set.n_tokens.sum()) * share:,.0f} tokens, "
              f"{train_set.ledger.target * share:,.0f} targets")
        if run.resumed:
            print(f"resume   {run.resumed}, after step {run.step}")
        elif cfg.resume_from:
            print(f"resume   nothing in {run.root}: a new run")
        if self.on_console and sys.stderr.isatty() and all(os.get_terminal_size(sys.stderr.fileno())):
            # a terminal that does not know its size would get an empty bar
            self.bar = tqdm(total=self.total, initial=self.last_step, dynamic_ncols=True, mininterval=0.5)
        self.started = time.perf_counter()

    def step(self, step, **values):
        """A training step's numbers; those that are None have no place in the line."""
        if not self.writes:
            return
        if self.warnings:
            self.warnings.collect()
        values = {name: value for name, value in values.items() if value is not None}
        self.warn_if_still(step, values)
        self.metrics.write(step=step, **values)
        self.send("train", step, values)
        val = f"val_loss {self.val_loss:.4f}, " if self.val_loss is not None else ""
        shown = (f"loss {values['loss']:.4f}, {val}lr {values['lr']:.2e}, norm {values['grad_norm']:.3g}, "
                 f"{values['tokens_per_second']:,.0f} tokens/s, {values['peak_memory_gb']:.2f} GiB")
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update()
        now = time.perf_counter()
        # without a bar, as in a log file
        if self.on_console and self.bar.disable and (now - self.printed > 10 or step == self.total):
            self.printed = now
            left = (now - self.started) / (step - self.last_step) * (self.total - step)
            print(f"step {step:,} of {self.total:,}: {shown}, {tqdm.format_interval(left)} left", flush=True)

    def warn_if_still(self, step, values):
        """Warn once of a step that changed almost no weight.

        Steps at a small learning rate, while it rises or falls, do not count, nor do skipped steps.
        """
        changed = values.get("changed", 1)
        if self.was_warned or changed >= 0.01 or values["lr"] < self.peak_lr / 2 or "skipped" in values:
            return
        self.was_warned = True
        self.say(f"warning: step {step} changed {changed:.2%} of the weights, at a learning rate of "
                 f"{values['lr']:.2g}: too little for their precision, or there is no gradient")

    def skipped(self, step, grad_norm, limit, sources):
        """A step whose gradient norm is a spike (--max_grad_norm_factor)."""
        self.say(f"step {step}: left out, as its gradient norm {grad_norm:.3g} is above {limit:.3g}; "
                 f"conversations: {sources}")

    def validation(self, step, val_loss, val_set, answers):
        """A validation's loss, if there is a validation set, and the answers to --sample_prompts."""
        if not self.writes:
            return
        if val_set:
            n_targets = int(val_set.n_targets.sum())
            self.val_loss = val_loss
            self.metrics.write(step=step, val_loss=val_loss, val_tokens=n_targets)
            self.send("val", step, {"loss": val_loss, "tokens": n_targets})
            self.say(f"step {step}: val_loss {val_loss:.4f}")
        for prompt, answer in answers:
            self.samples.write(step=step, kind="sample", prompt=prompt, answer=answer)
            self.say(f"step {step}: {prompt!r:.60} -> {answer!r:.100}")

    def extremes(self, step, texts):
        """The conversations of highest and lowest loss, see samples.ConversationLosses."""
        if self.writes:
            for text in texts:
                self.samples.write(step=step, **text)

    def say(self, text):
        if self.on_console:
            self.bar.write(text)

    def send(self, kind, step, values):
        for logger in self.loggers:
            logger.put(({f"{kind}/{name}": value for name, value in values.items()}, step))

    def sync(self):
        if self.writes:
            self.metrics.sync()
            self.samples.sync()

    def report(self):
        if self.writes:
            report.write(self.directory)

    def finish(self, run, stop):
        """Close everything, and say what came out; `stop` is the signal that ended the run, or 0."""
        self.bar.close()
        if not self.writes:
            return
        if self.warnings:
            self.warnings.collect()
        for logger in self.loggers:
            logger.close()
        self.metrics.file.close()
        self.samples.file.close()
        if stop and (run.owes_evaluation or run.step < self.total):
            print(f"stopped  after step {run.step} of {self.total}: --resume_from auto goes on")
        if run.stops_early:
            print(f"stopped  after step {run.step}: {run.best['behind']} validations without a lower "
                  f"val_loss than {run.best['val_loss']:.4f} of step {run.best['step']}")
        latest = os.path.join(run.root, "latest")
        kind = "PEFT adapter" if run.cfg.use_lora else "Hugging Face model"
        print(f"saved    {latest} -> step_{run.step}, a {kind} directory")
        print(f"talk     {venv.command('chat.py')} {shlex.quote(latest)}")
