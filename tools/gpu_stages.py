"""The stages of tools/gpu_check.py: each function checks or times one thing, in a process of its own.

A stage fills a Report. Values that have been added are kept even if the stage fails later or is ended at its
limit, so the most important come first. A timed run is sft.py as a user starts it, in a process of its own:
metrics.jsonl is polled, and the run is killed after enough steps, so that it does not write a checkpoint.
"""

import collections
import contextlib
import filecmp
import glob
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings

import torch
from tokenizers import Tokenizer

import sft
from screen.log import Log
from settings import venv
from settings.errors import UserError
from tools import bench, gpu_probes
from tools.bench_sides import QWEN_05B, proc_gb

SFT, BENCH, PLAN, CHECK = (os.path.join(venv.PROJECT, name) for name in (
    "sft.py", "tools/bench.py", "tools/plan.py", "tools/gpu_check.py"))
SHAPES = {  # Qwen2.5's
    "0.5b": QWEN_05B,
    "1.5b": dict(QWEN_05B, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                 num_attention_heads=12),
    "7b": dict(QWEN_05B, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, vocab_size=152064,
               num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False),
    "tiny": dict(QWEN_05B, hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=2048,
                 num_attention_heads=4),
}
EXAMPLES = os.path.join(venv.PROJECT, "data/example_sft.json")
LORA = ("--use_lora", "--lora_rank", "16", "--lora_alpha", "32")


class Report:
    """What a stage has found so far.

    device   "cuda", or "cpu" for tiny shapes
    scratch  directory for models, rows and runs, shared by the stages
    out      directory for kernels.txt
    stream   add() prints all values to it, as one JSON line
    """

    def __init__(self, device, scratch, out, stream):
        self.device, self.scratch, self.out, self.stream = torch.device(device), scratch, out, stream
        self.values = {}

    @property
    def is_tiny(self):
        return self.device.type == "cpu"

    def pick(self, full, tiny):
        """One of two sizes: on a GPU, or on the CPU."""
        return tiny if self.is_tiny else full

    def add(self, **values):
        self.values.update(values)
        # four digits; more would be noise
        line = json.loads(json.dumps(self.values), parse_float=lambda text: float(f"{float(text):.4g}"))
        print(json.dumps(line), file=self.stream, flush=True)

    def check(self, name, passed):
        """Record a check. The stage fails if one of its checks does, after all of them have run."""
        self.values.setdefault("checks", {})[name] = bool(passed)


def run_stage(name, device, scratch, out):
    """Run a stage in this process. Its JSON lines are all that standard output gets; the rest goes to stderr.

    Exits with code 1 if a check failed. Raises UserError for a stage that does not exist, and without a GPU.
    """
    if name not in STAGES and name not in SHAPES:
        raise UserError(f"--stage {name}: there is no such stage; use one of {', '.join(STAGES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU; --device cpu runs the stages on tiny shapes")
    os.makedirs(scratch, exist_ok=True)
    os.makedirs(out, exist_ok=True)
    if device == "cpu":
        os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")  # threads do not help tiny shapes
        torch.set_num_threads(1)
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries and subprocesses print too
    report = Report(device, scratch, out, stream)
    if name in SHAPES:
        write_model(report, name)
        return
    STAGES[name](report)
    report.add()
    if not all(report.values.get("checks", {}).values()):
        sys.exit(1)


# ------------------------------------------------------------------------------------------------------------
# models, rows and runs


def write_model(report, shape):
    """Write the model of a shape, with the tokenizer of `tiny`, into its directory; see model()."""
    directory = os.path.join(report.scratch, shape)
    shutil.rmtree(directory, ignore_errors=True)
    os.makedirs(directory)
    bench.write_model(directory, SHAPES[shape])
    shutil.copy(rows(report, "long"), os.path.join(directory, "rows.json"))  # the other trainer's rows
    open(os.path.join(directory, "complete"), "w").close()


def model(report, shape):
    """The directory of a model of random bf16 weights. The first stage that needs it writes it.

    In a process of its own, whose memory is free again when the run starts.
    """
    shape = report.pick(shape, "tiny")
    directory = os.path.join(report.scratch, shape)
    if os.path.exists(os.path.join(directory, "complete")):
        return directory
    started = time.perf_counter()
    if report.is_tiny:
        write_model(report, shape)
    else:
        subprocess.run([sys.executable, CHECK, report.out, "--stage", shape, "--device", report.device.type,
                        "--scratch", report.scratch], check=True)
    report.add(write_s=time.perf_counter() - started)
    return directory


def rows(report, kind):
    """The file of conversations: "short" of log-normal length, "long" and "4096" that fill max_length."""
    path = os.path.join(report.scratch, f"rows_{kind}.json")
    if not os.path.exists(path):
        if kind == "short":
            bench.write_rows(path + ".tmp", report.pick(1500, 40))
        else:  # random words, at least one token each
            words = report.pick(4200 if kind == "4096" else 2100, 200)
            bench.write_rows(path + ".tmp", report.pick(64, 24), 2.3, math.log(words), 0.0)
            shorten(path + ".tmp", report.pick(4096 if kind == "4096" else 2048, 256))
        os.replace(path + ".tmp", path)
    return path


def shorten(path, length):
    """Cut the answers of a file of conversations so that each has nearly `length` tokens, and its end."""
    tokenizer = Tokenizer.from_file(os.path.join(bench.pretrained.model_directory("tiny"), "tokenizer.json"))
    with open(path, encoding="utf-8") as f:
        conversations = json.load(f)
    for row in conversations:
        question, answer = row["messages"]
        used = len(tokenizer.encode(question["content"])) + 24  # of the template
        offsets = tokenizer.encode(answer["content"]).offsets[: length - used]
        answer["content"] = answer["content"][: offsets[-1][1]]
    with open(path, "w", encoding="utf-8") as f:
        json.dump(conversations, f)


def start(*arguments, environment=None):
    """Start a Python program; what it prints goes to this stage's log."""
    environment = {**os.environ, **(environment or {})}
    return subprocess.Popen([sys.executable, *arguments], env=environment, stdin=subprocess.DEVNULL)


def steps_so_far(output):
    """The training lines of a run's metrics.jsonl; [] before it exists."""
    path = os.path.join(output, "metrics.jsonl")
    if not os.path.exists(path):
        return []
    with open(path, "rb") as f:
        content = f.read()
    lines = content[: content.rfind(b"\n") + 1].splitlines()  # without a line that is being written
    return [line for line in map(json.loads, lines) if "loss" in line]


def kill_after(process, output, n_steps):
    """Kill a run as soon as it has logged n_steps; return the seconds until its first, and its host memory.

    The memory is the peak in GiB, of what the process itself has allocated. Raises RuntimeError if the run
    ends before.
    """
    started, first = time.perf_counter(), None
    while True:
        has_ended, n_logged = process.poll() is not None, len(steps_so_far(output))
        if n_logged and first is None:
            first = time.perf_counter() - started
        if n_logged >= n_steps and not has_ended:
            host_peak = proc_gb("status", "VmHWM", process.pid)
            process.kill()
            process.wait()
            return first, host_peak
        if has_ended:
            raise RuntimeError(f"sft.py ended with code {process.returncode} after {n_logged} of {n_steps} "
                               "steps")
        time.sleep(0.01)


def flags_of(report, shape, kind, extra, length=None, step=8):
    """The flags of a run: the model, its rows, and steps of as many tokens as `step` documents of 2,048."""
    length = length or report.pick(2048, 256)
    capacity = report.pick(2048, 128) * step
    flags = ["--model", model(report, shape), "--train_data", rows(report, kind), "--max_length", str(length),
             "--batch_tokens", str(capacity), "--lr", "1e-5", "--cache_dir",
             os.path.join(report.scratch, "cache"), *extra]
    if "micro_batch_size=auto" not in extra:
        flags += ["--micro_batch_size", str(capacity // length)]
    return flags


def start_plan(report, flags):
    """Start tools/plan.py for a run; it needs no GPU. The memory is for settings that are auto."""
    device = ()
    if not report.is_tiny:
        mebibytes = float(gpu_probes.nvidia_smi("memory.total"))
        device = ("--n_gpus", "1", "--memory_gb", f"{mebibytes / 1024:.1f}")
    return subprocess.Popen([sys.executable, PLAN, *flags, *device], stdout=subprocess.PIPE, text=True,
                            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})


def planned(process):
    """The peaks in GiB that tools/plan.py has printed; {}, with the reason in the log, if it failed."""
    printed = process.communicate()[0]
    lines = {line.split()[0]: line.split()[1] for line in printed.splitlines() if line.strip()}
    if process.returncode or "peak" not in lines:
        print(f"tools/plan.py ended with code {process.returncode} and printed: {printed}", file=sys.stderr)
        return {}
    return {"planned_gb": float(lines["peak"]),
            **({"host_planned_gb": float(lines["host"])} if "host" in lines else {})}


def timed(report, key, flags, steps=(6, 20)):
    """Time a run; add its figures as {key: {...}}: medians of some steps, peaks, MFU, the plan's peaks.

    steps  the first and the last that count for the medians
    """
    first_counted, n_steps = report.pick(steps, (2, 3))
    output = os.path.join(report.scratch, f"run_{key}")
    shutil.rmtree(output, ignore_errors=True)
    plan = start_plan(report, flags)
    run = start(SFT, *flags, "--output_dir", output, "--max_steps", "200", "--save_steps", "1000")
    first_seconds, host_peak = kill_after(run, output, n_steps)
    lines = steps_so_far(output)[:n_steps]
    counted = lines[first_counted - 1 :]
    speed = statistics.median(line["tokens_per_second"] for line in counted)
    seconds = statistics.median(line["seconds"] for line in counted)
    figures = {"tokens_per_second": speed, "seconds": seconds, "start_s": first_seconds,
               "first_step_s": lines[0]["seconds"], "first_loss": lines[0]["loss"],
               "last_loss": lines[-1]["loss"], **planned(plan), "host_peak_memory_gb": host_peak}
    for name in ("peak_memory_gb", "reserved_memory_gb", "mfu"):
        figures[name] = lines[-1].get(name)
    report.add(**{key: figures})
    snapshot = os.path.join(output, "memory.json.gz")
    if os.path.exists(snapshot):
        shutil.move(snapshot, report.out)
    shutil.rmtree(output)


class Done(Exception):
    """A watched run has made its last step, and is not to be saved."""


class Watcher:
    """Watches single steps of a run in this process: host syncs, kernels, and the time of its checkpoint.

    Step 4 runs with torch's sync warnings, step 5 in torch.profiler. A step is what happens between two lines
    of metrics.jsonl; its numbers may be those of the step before.
    """

    def __init__(self, device, n_steps, saves):
        self.device, self.n_steps, self.saves = device, n_steps, saves
        self.stack, self.caught, self.profile, self.save_started, self.save_s = None, [], None, None, None

    def after(self, step):
        """Called after each line of metrics.jsonl."""
        on_cuda = self.device.type == "cuda"
        if step == 3:
            self.stack = contextlib.ExitStack()
            self.caught = self.stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            if on_cuda:
                torch.cuda.set_sync_debug_mode("warn")
        if step == 4:
            if on_cuda:
                torch.cuda.set_sync_debug_mode("default")
                torch.cuda.synchronize()
            self.stack.close()
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if on_cuda:
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self.profile = torch.profiler.profile(activities=kinds)
            self.profile.start()
        if step == 5:
            if on_cuda:
                torch.cuda.synchronize()
            self.profile.stop()
        if step == self.n_steps and not self.saves:
            raise Done

    def syncs(self):
        """{"file:line": how many times the host waited for the device there} of step 4."""
        places = [f"{os.path.basename(w.filename)}:{w.lineno}" for w in self.caught
                  if "called a synchronizing" in str(w.message)]
        return dict(collections.Counter(places).most_common())

    def milliseconds(self):
        """Milliseconds of step 5: of the GPU's kernels, of its copies each way, and of AdamW on the CPU."""
        sums = dict.fromkeys(("kernels", "device_to_host", "host_to_device", "host_adamw"), 0.0)
        for event in self.profile.key_averages():
            if "Memcpy DtoH" in event.key:
                sums["device_to_host"] += event.self_device_time_total / 1000
            elif "Memcpy HtoD" in event.key:
                sums["host_to_device"] += event.self_device_time_total / 1000
            elif event.device_type != torch.autograd.DeviceType.CPU:
                sums["kernels"] += event.self_device_time_total / 1000
            elif "fused_adamw" in event.key:
                sums["host_adamw"] += event.self_cpu_time_total / 1000
        return sums

    def kernels(self):
        """The 25 most expensive kernels of step 5, as a table."""
        order = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        return self.profile.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=90)


def watch(report, key, flags, saves=False):
    """Run sft.py's main in this process for a few steps; add {key: {...}} of what Watcher saw.

    saves  let the run end and write its checkpoint; otherwise it stops after its last step
    """
    watcher = Watcher(report.device, 6, saves)

    class WatchedLog(Log):
        """sft.py's log, which calls the watcher."""

        def step(self, step, *args, **values):
            super().step(step, *args, **values)
            watcher.after(step)

        def extremes(self, *args):  # sft.py calls it before it writes a checkpoint,
            super().extremes(*args)
            watcher.save_started = time.perf_counter()

        def report(self):  # and this after it
            watcher.save_s = time.perf_counter() - watcher.save_started
            super().report()

    output = os.path.join(report.scratch, f"run_{key}")
    shutil.rmtree(output, ignore_errors=True)
    sft.Log = WatchedLog
    limit = watcher.n_steps if saves else 200
    sys.argv = [SFT, *flags, "--output_dir", output, "--max_steps", str(limit), "--save_steps", "1000"]
    with contextlib.suppress(Done):
        sft.main()
    syncs = watcher.syncs()
    figures = {"syncs": sum(syncs.values()), "sync_lines": syncs, "ms": watcher.milliseconds(),
               "save_s": watcher.save_s, "step_s": [line["seconds"] for line in steps_so_far(output)]}
    if "compile=true" in flags:
        from torch._dynamo.utils import counters  # slow to import without --compile
        figures["graphs"] = counters["stats"]["unique_graphs"]
        figures["graph_breaks"] = sum(counters["graph_break"].values())
    report.add(**{key: figures})
    with open(os.path.join(report.out, "kernels.txt"), "a", encoding="utf-8") as f:
        f.write(f"=== {key}: {' '.join(flags)}\n{watcher.kernels()}\n")
    shutil.rmtree(output)


# ------------------------------------------------------------------------------------------------------------
# 2: laws


def same_weights(first, second):
    """Whether two checkpoint directories have the same tensor files, byte by byte."""
    names = [os.path.relpath(path, first) for path in glob.glob(f"{first}/**/*.safetensors", recursive=True)]
    return bool(names) and all(
        filecmp.cmp(os.path.join(first, name), os.path.join(second, name), shallow=False) for name in names)


# runs in bf16 on the GPU: name -> (flags, flags of the run in fp32 on the CPU whose losses it must have)
SETTINGS = {
    "first": ((), ()),
    "param_offload": (("--param_offload",), ()),
    "optimizer_offload": (("--optimizer_offload",), ()),
    "evaluates": (("--eval_steps", "5", "--val_data", EXAMPLES, "--sample_prompts", "PROMPTS"), ()),
    "lora": (LORA, LORA),
    "qlora": ((*LORA, "--quantize", "nf4"), (*LORA, "--quantize", "nf4")),
}


def laws(report):
    """Small runs at once: bf16 against fp32 with several settings, twice the same bits, killed and resumed.

    And --selfcheck of a larger model.
    """
    n_steps, kill_at, every = report.pick((24, 12, 5), (8, 4, 3))
    prompts = os.path.join(report.scratch, "prompts.txt")
    with open(prompts, "w", encoding="utf-8") as f:
        f.write("Name a colour.\n2 + 3 =\n")

    def train(name, *flags, **variables):
        output = os.path.join(report.scratch, name)
        flags = [prompts if flag == "PROMPTS" else flag for flag in flags]
        # the presets of `tiny` as they are; one micro-batch per step
        process = start(SFT, "--model", "tiny", "--max_steps", str(n_steps), "--save_steps", str(every),
                        "--micro_batch_size", "8", "--cache_dir", "none", "--output_dir", output, *flags,
                        environment=variables)
        return process, output

    exact = ("--dtype", "bf16", "--deterministic", "--compile", "false")
    killed, killed_output = train("killed", *exact)
    runs, references = {"second": train("second", *exact)}, {}
    for name in report.pick(tuple(SETTINGS), ("first", "evaluates", "lora")):  # fewer where it is only a test
        flags, reference = SETTINGS[name]
        of_run = exact if name == "first" else ("--dtype", "bf16", "--compile", report.pick("auto", "false"))
        runs[name] = train(name, *of_run, *flags)
        references[name] = f"fp32_{len(reference)}"
        if references[name] not in runs:
            runs[references[name]] = train(references[name], "--dtype", "fp32", *reference,
                                           CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="2")
    kill_after(killed, killed_output, kill_at)
    resumed_from = os.path.basename(os.path.realpath(os.path.join(killed_output, "checkpoints", "latest")))
    runs["resumed"] = train("killed", *exact, "--resume_from", "auto")
    flags = flags_of(report, "0.5b", "short", ("gradient_checkpointing=false",))
    selfcheck = start(SFT, *flags, "--selfcheck", "--output_dir", os.path.join(report.scratch, "selfcheck"))
    for name, (process, _) in runs.items():
        report.check(f"{name}_run_ends_well", process.wait() == 0)
    lines = {name: steps_so_far(output) for name, (_, output) in runs.items()}
    errors = {}
    for name, reference in references.items():
        pairs = list(zip(lines[reference], lines[name], strict=True))[:20]
        errors[name] = max((abs(a["loss"] / b["loss"] - 1) for a, b in pairs), default=math.inf)
        report.check(f"{name}_loss", errors[name] < 2e-2)
    with open(os.path.join(runs["evaluates"][1], "samples.jsonl"), encoding="utf-8") as f:
        report.check("answers_between_steps", sum("answer" in line for line in f) >= 2)
    report.add(bf16_loss_error=max(errors.values()), bf16_loss_errors=errors, compared_steps=len(pairs),
               resumed_from=resumed_from)
    for name in ("second", "resumed"):
        numbers = [[(line["step"], line["loss"], line["grad_norm"]) for line in lines[run]]
                   for run in ("first", name)]
        checkpoints = [os.path.join(runs[run][1], "checkpoints", "latest") for run in ("first", name)]
        report.check(f"{name}_losses_are_equal", numbers[0] == numbers[1] and numbers[0])
        report.check(f"{name}_weights_are_equal", same_weights(*checkpoints))
    report.add()
    report.check("selfcheck", selfcheck.wait() == 0)


def out_of_memory(report):
    """A step that no GPU holds: the error names what would help. Needs a GPU."""
    flags = flags_of(report, "1.5b", "long", ("gradient_checkpointing=false", "compile=false"), step=64)
    flags[flags.index("--micro_batch_size") + 1] = "64"
    output = os.path.join(report.scratch, "run_out_of_memory")
    done = subprocess.run([sys.executable, SFT, *flags, "--output_dir", output], stderr=subprocess.PIPE,
                          text=True)
    print(done.stderr, file=sys.stderr)
    report.add(said=done.stderr.splitlines()[-12:])
    report.check("exit_code", done.returncode == 1)
    report.check("advice", all(text in done.stderr for text in (
        "out of memory: rank 0", "--gradient_checkpointing", "--micro_batch_size")))


# ------------------------------------------------------------------------------------------------------------
# 3 to 10: speed and memory


def full(report, shape, compiled, checkpointing, watched):
    """Full fine-tuning of a shape on long documents; watched: also on short ones, and with a Watcher."""
    def flags(kind, compiled):
        extra = (f"compile={str(compiled).lower()}", f"gradient_checkpointing={checkpointing}")
        return flags_of(report, shape, kind, extra)

    # compilation is most of a run on tiny shapes, so there only the watched run compiles
    if not (report.is_tiny and compiled and watched):
        timed(report, "long", flags("long", compiled and not report.is_tiny))
        if watched:
            timed(report, "short", flags("short", compiled))
    if watched:
        watch(report, "watched", flags("long", compiled), saves=not compiled)


def eager_05b(report):
    full(report, "0.5b", compiled=False, checkpointing="false", watched=True)


def compiled_05b(report):
    full(report, "0.5b", compiled=True, checkpointing="false", watched=True)


def compiled_15b(report):
    checkpointing = report.pick("auto", "true")
    full(report, "1.5b", compiled=True, checkpointing=checkpointing, watched=False)


def lora_flags(report, *extra):
    """LoRA of rank 16 on all linear layers; the CPU run is eager, it has compiled in earlier stages."""
    return (*LORA, f"gradient_checkpointing={report.pick('auto', 'false')}",
            f"compile={report.pick('true', 'false')}", *extra)


def lora_7b(report):
    flags = flags_of(report, "7b", "long", lora_flags(report, *report.pick(("micro_batch_size=auto",), ())))
    timed(report, "long", flags)


def lora_7b_4096(report):
    """NeMo's published run: two documents of 4,096 tokens in a micro-batch."""
    length = report.pick(4096, 512)
    flags = flags_of(report, "7b", "4096", lora_flags(report), length)
    flags[flags.index("--micro_batch_size") + 1] = "2"
    timed(report, "long", flags)


def qlora_7b(report):
    timed(report, "long", flags_of(report, "7b", "long", lora_flags(report, "--quantize", "nf4")))
    # B is 0 in step 1, so its loss is that of the model: quantised here, in bf16 in the stage lora_7b
    path = os.path.join(report.out, "results.jsonl")
    before = []
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            before = [line["long"]["first_loss"] for line in map(json.loads, f)
                      if line["name"] == "lora_7b" and "long" in line]
    if before:
        report.add(first_loss_error=abs(report.values["long"]["first_loss"] - before[-1]))
        report.check("first_loss", report.values["first_loss_error"] < 0.15)


def offload_7b(report):
    """Full fine-tuning with moments and masters in host memory, 65,536 tokens per step.

    The third step is profiled: OUT gets its memory.json.gz.
    """
    extra = ("--optimizer_offload", "--profile", "1", *report.pick(("micro_batch_size=auto",), ()),
             f"gradient_checkpointing={report.pick('auto', 'true')}",
             f"compile={report.pick('true', 'false')}")
    timed(report, "long", flags_of(report, "7b", "long", extra, step=report.pick(32, 8)), steps=(4, 8))


def trl(report, shape):
    """TRL on the same rows: tools/bench.py's side, with FlashAttention-2 as torch has it; 7B with LoRA."""
    flags = report.pick(("--device", "cuda", "--shape", shape, *("--lora",) * (shape == "7b")), ())
    directory = model(report, shape)
    path = gpu_probes.write_shim(os.path.join(report.scratch, "shim"))
    command = [sys.executable, BENCH, "--side", "trl_packed", *flags, "--directory", directory]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": path})
    report.add(**json.loads(done.stdout.splitlines()[-1]))


def trl_05b(report):
    trl(report, "0.5b")


def trl_15b(report):
    trl(report, "1.5b")


def trl_7b(report):
    trl(report, "7b")


STAGES = {"hardware": gpu_probes.hardware, "kernels": gpu_probes.kernels, "laws": laws,
          "out_of_memory": out_of_memory,
          "eager_0.5b": eager_05b, "compiled_0.5b": compiled_05b, "trl_0.5b": trl_05b,
          "compiled_1.5b": compiled_15b, "trl_1.5b": trl_15b, "lora_7b": lora_7b,
          "lora_7b_4096": lora_7b_4096, "qlora_7b": qlora_7b, "trl_7b": trl_7b, "offload_7b": offload_7b}
