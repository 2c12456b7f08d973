"""What surrounds train(): its processes, its lock, and from Python the state of the process, left as it was.

    from sft import Config, train
    run = train(Config(model="tiny"))
    run.directory, run.metrics[-1]["loss"]

In a notebook, a script, a test, or a script under torchrun: then every rank calls train().
"""

import contextlib
import gc
import json
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from disk import checkpoint, files, inputs, lock
from ops import memory
from ranks import gate, processes
from screen import out_of_memory, publish
from screen.log import Warnings
from settings import parser, venv
from settings.errors import NonFiniteError, OutOfMemory, UserError

RUNNING = threading.Lock()  # held by train() of this process: it has one process group


class Result(NamedTuple):
    """What train() returns, on every rank.

    directory  of the last step, a Hugging Face model or a PEFT adapter: "outputs/checkpoints/step_18"
    metrics    the lines of metrics.jsonl, a dict for each step and each validation
    """

    directory: str
    metrics: list

    def __repr__(self):  # a notebook prints it
        return f"Result({self.directory!r}, {len(self.metrics)} lines of metrics)"


def result(cfg):
    """The Result of the run in cfg.output_dir; None with --selfcheck, which writes nothing."""
    if cfg.selfcheck:
        return None
    checkpoints = os.path.join(cfg.output_dir, "checkpoints")
    lines = files.read_file(os.path.join(cfg.output_dir, "metrics.jsonl")).splitlines()
    directory = os.path.join(checkpoints, "latest")
    if os.path.lexists(directory):
        directory = os.path.join(checkpoints, os.readlink(directory))
    else:  # of another run, which had all its steps
        directory = checkpoint.resume_directory(cfg.resume_from, checkpoints)
    return Result(directory, [json.loads(line) for line in lines])


def run(train, cfg, origins, in_python=False):
    """Start the processes of a run, or join those of torchrun; train; end them together.

    train    sft.train
    origins  of the settings, from settings.parser.parse

    Raises processes.Stopped if a signal ended the run. Exits if --push_to_hub has failed; from Python, where
    a line says so, the run is as good as without it.
    """
    with processes.start(cfg.tp, cfg.timeout, cfg.deterministic, gate.program(cfg),
                         sp=cfg.sp, replicas=cfg.replicas) as ranks:
        ranks.in_python, ranks.warnings = in_python, Warnings.install(ranks)
        with (out_of_memory.explained(cfg, ranks), lock.alone(cfg, ranks),
              ranks.ends if in_python else contextlib.nullcontext()):
            train(cfg, ranks, origins)
    if ranks.stop_signal:
        processes.end_by_signal(ranks.stop_signal, has_trained=True)
    if (code := publish.at_end(cfg, ranks)) and not in_python:
        sys.exit(code)


def from_python(train, cfg):
    """train(cfg) from Python: like the command, but the process lives on. Returns the Result.

    Errors are exceptions. A signal lets the step finish and be saved; then the handler that was there before
    gets it: Ctrl-C, or a notebook's stop button, ends in a KeyboardInterrupt, and a second one does so at
    once. Only the main thread can handle signals. Under torchrun, an error of a rank ends all processes.

    Raises UserError for wrong settings, and if torch.distributed is in use in this process.
    """
    if not isinstance(cfg, parser.Settings):
        raise UserError(f"train() needs a Config, as in train(Config(model=\"tiny\")); it got {cfg!r:.100}")
    if not RUNNING.acquire(blocking=False):
        raise UserError("train() is running in this process already, and there can be one at a time; wait "
                        "for it, or start another process")
    stop = None
    try:
        if dist.is_initialized():
            raise UserError("torch.distributed is initialised in this process, and train() needs a process "
                            "group of its own; call torch.distributed.destroy_process_group() first")
        is_old, text = venv.check_torch()
        if is_old:
            raise UserError(f"{sys.executable} has {text}")
        if text:
            parser.show(f"warning: {text}", file=sys.stderr)
        with unchanged(cfg):
            cfg.check_again()  # cfg.lr = -1
            inputs.check(cfg)
            try:
                run(train, cfg, cfg.origins, in_python=True)
            except (UserError, NonFiniteError, OutOfMemory, KeyboardInterrupt) as error:
                # a notebook keeps the last error, whose frames hold the model; those of a bug help to find it
                traceback.clear_frames(error.__traceback__)
                raise
    except processes.Stopped as stopped:
        stop = stopped.with_traceback(None)  # which would keep the model
    finally:
        RUNNING.release()
    if stop:
        signal.raise_signal(stop.number)
        if not stop.has_trained:  # the handler has returned
            raise KeyboardInterrupt(f"{signal.Signals(stop.number).name} before training began")
    return result(cfg)


@contextlib.contextmanager
def unchanged(cfg):
    """Leave this process as it was, and train with torch's defaults, whatever the program has set.

    Puts back: environment, random numbers, torch's default dtype and device, gradient mode, deterministic
    mode, CUDA device, warnings and their handlers, malloc. Frees the memory that torch keeps for reuse.

    Can't be undone: PYTORCH_ALLOC_CONF, which CUDA has read when it started; glibc's malloc, which by itself
    adapts its limits, has them fixed (memory.reset_malloc). With --compile and on CUDA, functions that the
    program itself has compiled are compiled again at their next call.
    """
    environment, hook = dict(os.environ), sys.excepthook  # init_process_group sets one that names the rank
    has_cuda = torch.cuda.is_initialized()
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    deterministic, fill = deterministic_mode(), torch.utils.deterministic.fill_uninitialized_memory
    numbers = torch.get_rng_state()
    if has_cuda:
        current, cuda_numbers = torch.cuda.current_device(), torch.cuda.get_rng_state_all()
        torch.cuda.reset_peak_memory_stats()
    # inference_mode(False) switches gradients on, too
    with warnings.catch_warnings(), unchanged_handlers(), torch.inference_mode(False):
        try:
            torch.set_default_dtype(torch.float32)
            set_default_device(None)
            yield
        finally:
            sys.excepthook = hook
            torch.set_default_dtype(dtype)
            set_default_device(device)
            if deterministic_mode() != deterministic:  # the call imports Inductor, which takes a second
                torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
            torch.utils.deterministic.fill_uninitialized_memory = fill
            torch.set_rng_state(numbers)
            if has_cuda:
                torch.cuda.set_device(current)
                torch.cuda.set_rng_state_all(cuda_numbers)
            free_memory(cfg)
            os.environ.update(environment)  # at last: modules that are imported here set some, too
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]


def deterministic_mode():
    """(whether it is on, whether it only warns)"""
    return (torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled())


def set_default_device(device):
    """torch.set_default_device() where that changes it: once set, it costs time in each call of torch."""
    if torch.get_default_device() != (device or torch.device("cpu")):
        torch.set_default_device(device)


@contextlib.contextmanager
def unchanged_handlers():
    """Put back the logging handlers that Warnings.install replaces on several ranks."""
    loggers = [logger for logger in logging.root.manager.loggerDict.values() if hasattr(logger, "handlers")]
    before = [(logger, logger.handlers) for logger in {*loggers, logging.getLogger("py.warnings")}]
    is_captured = warnings.showwarning.__module__ == "logging"
    try:
        yield
    finally:
        logging.captureWarnings(is_captured)
        for logger, handlers in before:
            logger.handlers = handlers


def free_memory(cfg):
    """Return the memory of a run that has ended, and drop what torch.compile keeps of it."""
    gc.collect()  # the model has cycles
    if tqdm.monitor is not None:  # a thread, which the next bar starts again
        tqdm.monitor.exit()
        tqdm.monitor = None
    if cfg.compile is True or torch.cuda.is_initialized():
        if "torch._dynamo" in sys.modules:  # otherwise the next model would be compiled for any size
            torch._dynamo.reset()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    else:
        memory.reset_malloc()
