"""What a run says when memory runs out: where, how much, which settings would help, and how to continue."""

import contextlib
import os
import re
import traceback

import torch

from disk import checkpoint
from ops import forecast, memory
from settings.errors import OutOfMemory
from settings.venv import PROJECT

COLUMNS = 100
# these settings do not change what is trained, and a resumed run may change them
NEUTRAL = ("--micro_batch_size", "--gradient_checkpointing", "--gradient_reduction", "--optimizer_offload",
           "--n_gpus", "--sp", "--no-")
OTHER_TEXTS = ("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory",  # pinned memory
               "CUBLAS_STATUS_ALLOC_FAILED")


@contextlib.contextmanager
def explained(cfg, ranks):
    """In place of an error that means "no memory", raise OutOfMemory, whose text says what would help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        frame = last_frame(error)
        traceback.clear_frames(error.__traceback__)  # frees the tensors of the step
        raise OutOfMemory("\n".join(lines(error, frame, cfg, ranks))) from None


def is_out_of_memory(error):
    """Whether an error means that the memory of the device or of the host ran out.

    Other allocators than that of CUDA's tensors raise a plain RuntimeError, so its text is compared.
    """
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        text in str(error) for text in OTHER_TEXTS)


def last_frame(error):
    """The innermost line of this project that was running: "sft.py:190 loss.backward()"."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if frame.filename.startswith(PROJECT + os.sep) and ".venv" not in frame.filename]
    if not frames:
        return "start"
    return f"{os.path.relpath(frames[-1].filename, PROJECT)}:{frames[-1].lineno} {frames[-1].line}"


def lines(error, frame, cfg, ranks):
    """The lines to print.

    frame  the text of last_frame()
    """
    on_host = ranks.device.type != "cuda" or not isinstance(error, torch.OutOfMemoryError)
    device = torch.device("cpu") if on_host else ranks.device
    place = "host" if on_host and ranks.device.type == "cuda" else "device"
    what = "host memory" if on_host else f"memory of {ranks.device}"
    yield f"out of memory: rank {ranks.rank} has used up the {what} in {ranks.phase}"
    batch, run = ranks.micro_batch, ranks.planned
    yield f"  at           {frame}"[:COLUMNS]
    if batch is not None:
        shared = f" over {batch.sp_size} ranks" if batch.sp_size > 1 else ""
        yield (f"  micro-batch  {len(batch.ids)} conversations, {sum(batch.lengths):,} tokens{shared}, the "
               f"longest {max(batch.lengths):,}")
    yield (f"  memory       {allocation(error)}peak {memory.peak_memory_gb(device):.2f} of "
           f"{forecast.device_memory(device) / forecast.GB:.2f} GiB"
           + (f"; the forecast was {forecast.memory(run)[place] / forecast.GB:.2f} GiB" if run else ""))
    steps = checkpoint.steps_in(os.path.join(cfg.output_dir, "checkpoints"))
    if run is None:
        yield "  The model was not loaded yet: free memory on this host, or train on less data at a time"
        return
    saved = forecast.savings(run, place)
    if saved:
        yield "  These settings would save, by the forecast:"
    for (flags, _), text in zip(saved, forecast.saving_lines(saved)):
        changes_run = steps and not flags.startswith(NEUTRAL)
        yield f"  {text}{'   in a new run, with another --output_dir' * bool(changes_run)}"
    neutral = [flags for flags, _ in saved if flags.startswith(NEUTRAL)]
    flags = [*neutral, *(flags for flags, _ in saved if not steps)][:1]
    if steps:
        flags = " ".join([*flags, "--resume_from auto"])
        yield f"  To continue after step {steps[-1]}: the same command with {flags}"
    elif flags:
        yield f"  Nothing was saved yet. To start again: the same command with {flags[0]}"


def allocation(error):
    """The size of the allocation that failed, from the text of the error: "tried to allocate 2.00 GiB; "."""
    match = re.search(r"allocate ([\d.]+) (bytes|[KMGTP]iB)", str(error))
    if not match:
        return ""
    if match[2] == "bytes":
        return f"tried to allocate {float(match[1]) / forecast.GB:.2f} GiB; "
    return f"tried to allocate {match[1]} {match[2]}; "
