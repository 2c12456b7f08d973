"""The disk that a run takes: the bytes of a checkpoint before one is written, and how many are kept.

Sizes are in units of 1000, as disks are sold and as most tools show them: 1 GB is 10**9 bytes.
"""

import math
import os
import shutil

from disk import checkpoint, files, pretrained, saving
from disk.writer import CODES, TensorFile


def checkpoint_bytes(model, optimizer, shard_map, exported):
    """Bytes of the step directory that checkpoint.save would write with these arguments.

    Adds up the tensors, the headers of their files and the other files. Not counted: state.json and the
    manifest (a few kB), and fp16 tensors that will need fp32 (saving.widen). Allocates next to nothing: of
    parameters that the optimizer treats alike, it makes the state of the smallest one.
    """
    masters = pretrained.master_weights(model, optimizer)
    stored, codes, _ = saving.stored_tensors(shard_map, masters)
    tensors = {name: (codes[name], saving.shape_of(tensor)) for name, tensor in stored.items()}
    trained, dtypes = checkpoint.trained_weights(model, optimizer), saving.dtypes_of(shard_map)
    kinds = {}
    for group in optimizer.param_groups:
        hyperparameters = repr({key: value for key, value in group.items() if key != "params"})
        kinds.update((p, (hyperparameters, p.ndim)) for p in group["params"])
    smallest = {}
    for p in sorted(trained.values(), key=lambda p: p.numel(), reverse=True):
        smallest[kinds[p]] = p
    states = {kind: optimizer.new_state(p) for kind, p in smallest.items()}
    for name, p in trained.items():
        state = {key: tensor.dtype for key, tensor in states[kinds[p]].items()}
        if p.dtype != dtypes.get(name):
            state["master"] = p.dtype
        tensors.update((f"{key}.{name}", (CODES[dtype], tuple(p.shape))) for key, dtype in state.items())
    header = TensorFile("", tensors, None, None).held[0]
    others = [content if isinstance(content, bytes) else files.encoded(content)
              for content in exported.values()]
    return (sum(math.prod(shape) * pretrained.BITS[code] // 8 for code, shape in tensors.values())
            + sum(map(len, (header, *others))))


def saves_left(step, total_steps, every, steps_per_epoch):
    """The number of checkpoints that a run still writes after `step`; every: None is once per epoch."""
    every = every or steps_per_epoch
    return math.ceil(total_steps / every) - step // every if step < total_steps else 0


def lines(size, *, keep, has_best, n_there, n_left, directory):
    """(the banner's line about checkpoints, a warning or None if the disk has room for them).

    size      bytes of a checkpoint
    keep      --keep_checkpoints; None is "all"
    has_best  the one with the lowest val_loss is kept beside the last ones
    n_there   checkpoints in `directory` that the run has written before
    n_left    those that it still writes, at most
    """
    keeps_all, n = keep in (None, "all"), n_there + n_left
    kept = n if keeps_all else min(n, keep + has_best)
    most = kept + (n > kept)  # an old one is removed when the new one is complete
    free = shutil.disk_usage(directory).free
    words, verb = (f"all {n}", "are") if n > 1 else ("it", "is")
    if not keeps_all:
        verb = "are" if keep > 1 or has_best else "is"
        words = "the last" + f" {keep}" * (keep > 1) + " and the best" * has_best
    hint = " (--keep_checkpoints all keeps all)" if n > kept else ""
    line = (f"disk     {text(size)} a checkpoint, {words} {verb} kept{hint}: at most {text(most * size)}; "
            f"{text(free)} free")
    if (most - n_there) * size <= free:
        return line, None
    fitting = free // size + n_there - 1 - has_best
    remedy = f"use --keep_checkpoints {fitting}, or" if fitting >= 1 else "use"
    return line, (f"warning: the disk of {directory} has {text(free)} free, and the checkpoints take up to "
                  f"{text((most - n_there) * size)} more; {remedy} an --output_dir with more room")


def used(directory):
    """Bytes of all files below a directory, without following links."""
    return sum(os.lstat(os.path.join(folder, name)).st_size
               for folder, _, names in os.walk(directory) for name in names)


def text(n_bytes):
    """A number of bytes with three digits: "981 kB", "7.62 GB"."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while n_bytes >= 999.5 and len(units) > 1:
        n_bytes /= 1000
        units.pop(0)
    digits = 0 if isinstance(n_bytes, int) else max(0, 3 - len(f"{n_bytes:.0f}"))
    return f"{n_bytes:,.{digits}f} {units[0]}"
