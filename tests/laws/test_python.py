"""From Python: train(Config(...)) is the command's run, and leaves the process as it was. See screen/entry.py."""

import asyncio
import gc
import io
import logging
import os
import pathlib
import random
import signal
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import EXAMPLES, TINY, first, metrics, run_all, tensors_of

import sft
from ranks import processes
from screen import entry
from settings import parser
from settings.errors import UserError

SMALL = dict(train_data=EXAMPLES, max_steps=2, batch_size=4, max_length=64, too_long="truncate", lr=1e-3,
             gradient_checkpointing=False, use_lora=True, lora_dropout=0.1)  # dropout draws random numbers
FLAGS = ("--train_data", EXAMPLES, "--max_steps", 2, "--batch_size", 4, "--max_length", 64, "--too_long", "truncate",
         "--lr", 1e-3, "--no-gradient_checkpointing", "--use_lora", "--lora_dropout", 0.1, "--model", TINY)
TIMES = ("seconds", "tokens_per_second", "peak_memory_gb")


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """A function: changes -> Config of a small run in tmp_path."""
    monkeypatch.chdir(tmp_path)
    return lambda out="out", **changes: sft.Config(**{**SMALL, "model": TINY, "output_dir": out, **changes})


def state():
    """{what: its value} of the process, as far as a run changes or could change it."""
    loggers = {name: [*logger.handlers] for name, logger in logging.root.manager.loggerDict.items()
               if getattr(logger, "handlers", None)}
    return dict(
        environment=dict(os.environ), directory=os.getcwd(), path=[*sys.path], argv=[*sys.argv],
        streams=(sys.stdin, sys.stdout, sys.stderr), hook=sys.excepthook,
        handlers={number: signal.getsignal(number) for number in signal.valid_signals()},
        mask=signal.pthread_sigmask(signal.SIG_BLOCK, ()), timer=signal.getitimer(signal.ITIMER_REAL),
        threads={*threading.enumerate()}, files=sorted(os.listdir("/proc/self/fd")),
        loggers=loggers, disabled=logging.root.manager.disable,
        warnings=([*warnings.filters], warnings.showwarning),
        numbers=(torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
        torch=(torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(), torch.is_grad_enabled(),
               torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled(),
               torch.is_deterministic_algorithms_warn_only_enabled(),
               torch.utils.deterministic.fill_uninitialized_memory, torch.get_float32_matmul_precision(),
               torch.is_autocast_enabled("cpu"), torch.backends.mkldnn.enabled),
        group=dist.is_initialized())


def assert_unchanged(before, ignored=()):
    gc.collect()  # files that only an error's traceback holds
    after = state()
    assert {key: value for key, value in after.items() if value != before[key] and key not in ignored} == {}


@pytest.fixture
def unusual():
    """A program that has set torch and warnings in its own way."""
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        yield
    torch.use_deterministic_algorithms(False)
    torch.set_grad_enabled(True)
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def test_two_runs_in_a_process_give_the_numbers_of_two_processes(settings, unusual, tmp_path):
    """Bit by bit, after another run in the same process, with other settings of torch. Nothing is left behind."""
    sft.train(settings("warm_up", max_steps=1, use_lora=False, lora_dropout=0, seed=1))
    torch.rand(3, device="cpu")
    before = state()
    run = sft.train(settings("here", deterministic=True))
    assert_unchanged(before)
    run_all([(1, (*FLAGS, "--output_dir", "there"))], tmp_path)
    assert run.directory == "here/checkpoints/step_2"
    assert run.metrics == metrics(tmp_path / "here")
    there, here = ([{key: value for key, value in line.items() if key not in TIMES} for line in lines]
                   for lines in (metrics(tmp_path / "there"), run.metrics))
    assert here == there and [line["step"] for line in here] == [1, 2]
    mine, theirs = (tensors_of(tmp_path / name / "checkpoints" / "latest") for name in ("here", "there"))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.full
def test_several_ranks_from_python(tmp_path):
    """Twice in a process, under torchrun: each rank gets the result, and has its handlers and loggers back."""
    run_all([(2, ("from_python", "ranks"))], tmp_path)


def test_an_error_is_an_exception_and_leaves_nothing_behind(settings, unusual, monkeypatch):
    """A UserError before the model and one in a step; a bug; no memory. The lock is released, the files are closed."""
    before = state()
    sft.train(settings())
    assert_unchanged(before)
    with pytest.raises(UserError, match="out already contains a run; use --resume_from auto"):
        sft.train(settings())
    with pytest.raises(UserError, match="--train_data nowhere.json: no such data file"):
        sft.train(settings("other", train_data="nowhere.json"))
    assert_unchanged(before)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(sft, "backward", fail)
    for error in (KeyError("planted"), UserError("planted"), MemoryError("planted")):
        with pytest.raises(entry.out_of_memory.OutOfMemory if isinstance(error, MemoryError) else type(error)) as info:
            sft.train(settings("other"))
        if isinstance(error, KeyError):  # its frames stay for a debugger, but their files are closed
            links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
            assert [link for link in links if os.path.exists(link) and "other/" in os.readlink(link)] == []
            del info
            error.__traceback__ = None
        assert_unchanged(before)
        assert not os.path.exists("other/run.lock")
    monkeypatch.undo()


def signal_in(phase, number, monkeypatch, times=1):
    set_phase = processes.Ranks.set_phase

    def set_phase_and_signal(self, name):
        set_phase(self, name)
        for _ in range(times if name == phase else 0):
            signal.raise_signal(number)

    monkeypatch.setattr(processes.Ranks, "set_phase", set_phase_and_signal)


@pytest.mark.parametrize("phase, times, saved", first(1, [
    ("step 1", 1, "step_1"), ("tokenise", 1, None), ("step 2", 2, None)]))
def test_an_interrupt_is_a_keyboard_interrupt(phase, times, saved, settings, monkeypatch, capfd):
    """The step ends and is saved first; a second interrupt ends the run at once, and not the process."""
    cfg = settings()
    with monkeypatch.context() as patch:
        signal_in(phase, signal.SIGINT, patch, times)
        before = state()
        with pytest.raises(KeyboardInterrupt) as info:
            sft.train(cfg)
    assert_unchanged(before)
    assert info.value.args == ()
    assert os.listdir("out/checkpoints") == [] if saved is None else os.readlink("out/checkpoints/latest") == saved
    assert not os.path.exists("out/run.lock")
    run = sft.train(settings(resume_from="auto"))
    assert run.directory == "out/checkpoints/step_2" and [line["step"] for line in run.metrics] == [1, 2]


def test_a_handler_of_the_program_gets_its_signal_after_the_save(settings, monkeypatch):
    """If it returns, so does train()."""
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(os.readlink("out/checkpoints/latest")))
    try:
        with monkeypatch.context() as patch:
            signal_in("step 1", signal.SIGTERM, patch)
            torch.rand(3)
            here = state()
            run = sft.train(settings())
            assert_unchanged(here)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == ["step_1"] and run.directory == "out/checkpoints/step_1" and len(run.metrics) == 1


class NotebookStream(io.StringIO):
    """As ipykernel's: it is no file, and may say that it is a terminal."""

    def isatty(self):
        return True

    def fileno(self):
        raise io.UnsupportedOperation("fileno")


def test_a_notebook(settings, monkeypatch):
    """Inside a running event loop, with streams that are no files, in the main thread and in another one."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, NotebookStream())

    async def cell():
        before = state()
        sft.train(settings("main"))
        assert_unchanged(before)
        await asyncio.to_thread(lambda: results.append(sft.train(settings("thread"))))
        assert_unchanged(before, ("threads", "files"))  # asyncio's own

    results = []
    asyncio.run(cell())
    assert results[0].directory == "thread/checkpoints/step_2"
    assert sys.stdout.getvalue().count("saved    ") == 2


def test_one_run_at_a_time(settings, monkeypatch, tmp_path):
    """train() inside train(), and beside a process group of the program, which stays."""
    monkeypatch.setattr(sft, "micro_batches", lambda *_: sft.train(settings("inner")))
    with pytest.raises(UserError, match="train\\(\\) is running in this process already"):
        sft.train(settings())
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match="torch.distributed is initialised in this process"):
            sft.train(settings("beside"))
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_what_is_printed_of_a_result_is_short():
    assert repr(entry.Result("out/checkpoints/step_9", [{}] * 9)) == "Result('out/checkpoints/step_9', 9 lines of metrics)"


# ---- settings -----------------------------------------------------------------------------------------------------


ALIKE = {
    "nothing": ({}, []),
    "preset": (dict(model="tiny"), ["--model", "tiny"]),
    "preset and a default that was given": (dict(model="tiny", lr=2e-5), ["--model", "tiny", "--lr", "2e-5"]),
    "preset of LoRA": (dict(model="tiny", use_lora=True), ["--model", "tiny", "--use_lora"]),
    "numbers": (dict(lr=np.float64(1e-4), batch_size=np.int64(8), warmup_ratio=0),
                ["--lr", "1e-4", "--batch_size", "8", "--warmup_ratio", "0"]),
    "texts": (dict(lr="1e-4", packing="no", micro_batch_size="auto"),
              ["--lr", "1e-4", "--packing", "no", "--micro_batch_size", "auto"]),
    "booleans and none": (dict(packing=False, gradient_checkpointing="auto", cache_dir=None),
                          ["--no-packing", "--gradient_checkpointing", "auto", "--cache_dir", "none"]),
    "lists": (dict(train_data=["a.json", "b.json:2"], use_lora=True, lora_targets=("q_proj", "v_proj")),
              ["--train_data", "a.json,b.json:2", "--use_lora", "--lora_targets", "q_proj,v_proj"]),
    "object": (dict(template_kwargs={"enable_thinking": False}), ["--template_kwargs", '{"enable_thinking": false}']),
    "sets": (dict(val_data={"a": pathlib.Path("a.json"), "b": "b.json"}),
             ["--val_data", '{"a": "a.json", "b": "b.json"}']),
    "home": (dict(output_dir="~/out", train_data="~/a.json"), ["--output_dir=~/out", "--train_data=~/a.json"]),
}


@pytest.mark.parametrize("case", ALIKE)
def test_arguments_are_flags(case):
    given, flags = ALIKE[case]
    by_flags, origins = parser.parse(sft.Config, flags)
    cfg = sft.Config(**given)
    assert cfg == by_flags
    if given:
        assert {name: cfg.origins[name].removeprefix("argument ") for name in given} == {name: name for name in given}
        assert {name for name, origin in cfg.origins.items() if origin.startswith("preset")} == {
            name for name, origin in origins.items() if origin.startswith("preset")}


WRONG = {
    "unknown": (dict(learing_rate=1), "unknown setting 'learing_rate'; the nearest is 'lr'"),
    "of another trainer": (dict(learning_rate=1), "unknown setting 'learning_rate', which other trainers have: type --lr X"),
    "of verl": ({"data.train_files": "x"}, "from Python, only the names of --help"),
    "range": (dict(lr=-1), "--lr -1.0: it must be at least 0"),
    "type": (dict(lr="high"), "argument lr: lr can't be 'high'; it must be a number"),
    "kind": (dict(lr=[1]), r"argument lr: lr can't be \[1\]; it must be a number"),
    "number for a text": (dict(output_dir=5), "output_dir can't be 5; it must be a non-empty text"),
    "boolean for a number": (dict(batch_size=True), "batch_size can't be 'true'; it must be an integer"),
    "choice": (dict(scheduler="cosin"), "nearest: cosine"),
    "no effect": (dict(lora_rank=16), "--lora_rank 16 has no effect without --use_lora"),
    "default without effect": (dict(lora_rank=8), "--lora_rank 8 has no effect without --use_lora"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_user_errors(case):
    given, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        sft.Config(**given)


def test_what_is_set_later_is_checked_by_train(settings):
    for name, value, message in (("lr", -1, "--lr -1.0: it must be"), ("lr", "high", "lr can't be 'high'"), ("learing_rate", 1, "unknown setting 'learing_rate'")):
        cfg = settings()
        setattr(cfg, name, value)
        with pytest.raises(UserError, match=message):
            sft.train(cfg)
    with pytest.raises(UserError, match=r"train\(\) needs a Config, .* it got {'model': 'tiny'}"):
        sft.train({"model": "tiny"})


def test_a_resumed_run_brings_its_settings(settings, monkeypatch):
    """resume_from="auto" as the flag: what is not given is as in the run. The banner names its file."""
    sft.train(settings(max_steps=1))
    cfg = sft.Config(output_dir="out", resume_from="auto", max_steps=2)
    assert (cfg.model, cfg.lr, cfg.lora_dropout, cfg.max_steps) == (TINY, 1e-3, 0.1, 2)
    output = io.StringIO()
    monkeypatch.setattr(sys, "stdout", output)
    assert [line["step"] for line in sft.train(cfg).metrics] == [1, 2]
    assert "settings of out/config.yaml" in output.getvalue()
