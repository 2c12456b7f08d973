"""Where a run's numbers go: JSON Lines files, the screen, and the loggers that --logger names.

Rank 0 alone writes. A logger of others (wandb, tensorboard, trackio) works in a thread of its own: one that fails or
hangs loses its numbers, not the run. metrics.jsonl has them all.
"""

import importlib.util
import json
import logging
import os
import queue
import sys
import threading
import time
import uuid

from tqdm import tqdm

from disk.files import naming
from settings.errors import UserError

LOGGERS = ("console", "wandb", "tensorboard", "trackio")


def check_loggers(names):
    """Raises ValueError for a logger that is unknown or not installed: before anything is loaded."""
    for name in filter(None, map(str.strip, names.split(","))):
        if name not in LOGGERS:
            raise UserError(f"--logger {names}: {name!r} is none of {', '.join(LOGGERS)}")
        if name != "console" and importlib.util.find_spec(name) is None:
            raise UserError(f"--logger {names}: {name} is not installed; type: {sys.executable} -m pip install {name}")


class Warnings(logging.Handler):
    """What Python and torch warn of on any rank, shown once: rank 0 prints its own at once, and of the others', which
    reach it through the store, what it has not said itself."""

    def __init__(self, store, rank):
        super().__init__(logging.WARNING)
        self.store, self.rank, self.said = store, rank, set()
        logging.captureWarnings(True)
        logging.getLogger("py.warnings").handlers = [self]
        for name, logger in logging.root.manager.loggerDict.items():  # torch has handlers at several of its loggers
            if name.startswith("torch") and getattr(logger, "handlers", None):
                logger.handlers = [self]

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
    """A file of JSON lines with a step each: one is with the system when write returns, on the disk when sync does."""

    def __init__(self, path, last_step):
        kept = []
        if os.path.exists(path):  # what an interrupted run wrote beyond its checkpoint is taken out
            with open(path, "rb") as f:
                for number, line in enumerate(f, 1):
                    if line.endswith(b"\n") and step_of(line, f"{path}, line {number}") <= last_step:
                        kept.append(line)
        with naming(path), open(path + ".tmp", "wb") as f:
            f.writelines(kept)
        os.replace(path + ".tmp", path)
        self.path, self.file = path, open(path, "ab", buffering=0)  # a buffer would be written once more at the end

    def write(self, **values):
        line = (json.dumps(values) + "\n").encode()
        with naming(self.path):
            while line:  # a disk that is full takes a part, and the next time raises
                line = line[self.file.write(line):]

    def sync(self):
        os.stat(self.path)  # raises where the file has lost its name: deleted, or with the file system it is on
        with naming(self.path):
            os.fsync(self.file.fileno())


def step_of(line, where):
    """The step of a line of JSON; ValueError, with where it is, if it has none."""
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
        run = wandb.init(project=settings["project"], name=settings["run_name"], dir=directory, config=settings,
                         id=run_id, resume="allow")
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
        self.log, self.finish = OPEN[name](settings, directory, last_step)  # fails here, before the first step
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
            print(f"warning: --logger {self.name} has not finished in {seconds} s; left alone", file=sys.stderr)


class Log:
    """metrics.jsonl, samples.jsonl, the screen and the loggers of one run. Without `writes` it does nothing.

    settings    the run's, as a dict: what loggers show, and which there are
    last_step   of the checkpoint that the run goes on from; later lines are taken out of the files
    warnings    of all ranks, if there are several
    """

    def __init__(self, settings, last_step, total_steps, writes, warnings=None):
        directory, self.last_step, self.total = settings["output_dir"], last_step, total_steps
        names = [name.strip() for name in settings["logger"].split(",")]
        self.writes, self.on_console = writes, writes and "console" in names
        self.peak_lr, self.was_warned = settings["lr"], False
        self.val_loss, self.printed, self.warnings = None, -1e9, warnings
        # first: one that can't start leaves no files behind that look like a run's
        self.loggers = [Logger(name, settings, directory, last_step) for name in names if writes and name in OPEN]
        # a terminal that does not tell its size would be given an empty bar
        has_bar = self.on_console and sys.stderr.isatty() and all(os.get_terminal_size(sys.stderr.fileno()))
        self.bar = tqdm(total=total_steps, initial=last_step, dynamic_ncols=True, mininterval=0.5, disable=not has_bar)
        self.started = time.perf_counter()
        if writes:
            self.metrics, self.samples = (Lines(os.path.join(directory, f"{name}.jsonl"), last_step)
                                          for name in ("metrics", "samples"))

    def step(self, step, **values):
        """A training step's numbers; those that are None have no place in the line."""
        if not self.writes:
            return
        if self.warnings:
            self.warnings.collect()
        values = {name: value for name, value in values.items() if value is not None}
        # a rate that rises or falls is small for a while, and what is left out changes nothing
        is_still = values.get("changed", 1) < 0.01 and values["lr"] >= self.peak_lr / 2 and "skipped" not in values
        if is_still and not self.was_warned:
            self.was_warned = True
            self.say(f"warning: step {step} changed {values['changed']:.2%} of the weights, at a learning rate of "
                     f"{values['lr']:.2g}: too little for their precision, or there is no gradient")
        self.metrics.write(step=step, **values)
        self.send("train", step, values)
        val = f"val_loss {self.val_loss:.4f}, " if self.val_loss is not None else ""
        shown = (f"loss {values['loss']:.4f}, {val}lr {values['lr']:.2e}, norm {values['grad_norm']:.3g}, "
                 f"{values['tokens_per_second']:,.0f} tokens/s, {values['peak_memory_gb']:.2f} GiB")
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update()
        now = time.perf_counter()
        if self.on_console and self.bar.disable and (now - self.printed > 10 or step == self.total):  # a log file
            self.printed = now
            left = (now - self.started) / (step - self.last_step) * (self.total - step)
            print(f"step {step:,} of {self.total:,}: {shown}, {tqdm.format_interval(left)} left", flush=True)

    def validation(self, step, val_loss, val_tokens):
        if not self.writes:
            return
        self.val_loss = val_loss
        self.metrics.write(step=step, val_loss=val_loss, val_tokens=val_tokens)
        self.send("val", step, {"loss": val_loss, "tokens": val_tokens})
        self.say(f"step {step}: val_loss {val_loss:.4f}")

    def sample(self, step, **values):
        """A text that the run shows: kind "sample", "worst" or "best"."""
        if self.writes:
            self.samples.write(step=step, **values)
            if values["kind"] == "sample":
                self.say(f"step {step}: {values['prompt']!r:.60} -> {values['answer']!r:.100}")

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

    def close(self):
        self.bar.close()
        if self.writes and self.warnings:
            self.warnings.collect()
        for logger in self.loggers:
            logger.close()
        if self.writes:
            self.metrics.file.close()
            self.samples.file.close()
