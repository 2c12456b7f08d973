"""Bytes of step directories: step_directory.py MODEL OUT SAVED>READ ...

A layout is a list of flags of sft.py without dashes, such as `tp=2,replicas=2`; `one` stands for none. For each pair,
saves a checkpoint of known values on the first layout, lets every rank of the second one read it, and asserts that
each has bitwise these values, or those that the weight files round to. Rank 0 prints a JSON object:
{"saved", "read": the layouts, and for each rank
"weights", "state": bytes written to the files of the model and of training_state/; "read_weights", "read_state":
bytes of tensors read; "opened": files of training_state/ whose headers were read}. Asserts that all ranks are writing at
the same time, but for an adapter, which is one file.
"""

import builtins
import dataclasses
import json
import os
import sys
import time
import zlib

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import sft
from disk import checkpoint, files, pretrained, saving, shards, writer
from disk.run import ModelPaths
from ranks import processes
from settings.parser import parse

source, out, *pairs = sys.argv[1:]
written, n_read, opened = [], [0], []


def known(name, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


class CountingFile:
    """An open file whose readinto counts: so tensors are read, and headers are not."""

    def __init__(self, *arguments, **keywords):
        self.file = builtins.open(*arguments, **keywords)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def readinto(self, target):
        n = self.file.readinto(target)
        n_read[0] += n
        return n


def counted_write(file, data, write=writer.TensorFile.write):
    """Count; the first write of a rank to each kind of file waits until all ranks are there."""
    directory = os.path.dirname(file.path)
    is_state = os.path.basename(directory) == checkpoint.STATE_DIRECTORY
    if is_state not in [kind for kind, _ in written] and not file.path.endswith(pretrained.ADAPTER_FILE):
        rank, world_size = dist.get_rank(), dist.get_world_size()
        meeting = os.path.join(out, os.path.relpath(directory, out).replace(os.sep, "_"))
        open(f"{meeting}.{rank}", "w").close()
        until = time.monotonic() + 60
        while not all(os.path.exists(f"{meeting}.{other}") for other in range(world_size)):
            assert time.monotonic() < until, f"rank {rank} writes to {directory}, but not all others"
            time.sleep(0.01)
    written.append((is_state, len(data)))
    write(file, data)


def counted_slices_of(path, slices_of=saving.slices_of):
    opened.append(path)
    return slices_of(path)


def shaped(ranks, layout):
    """(cfg, Ranks) of a layout."""
    flags = [] if layout == "one" else [f"--{flag}" for flag in layout.split(",")]
    sizes = dict(flag[2:].split("=") for flag in flags if flag.startswith(("--tp=", "--replicas=", "--sp=")))
    sizes = {name: int(size) for name, size in sizes.items()}
    tp, sp, replicas = (sizes.get(name, 1) for name in ("tp", "sp", "replicas"))
    flags = [flag for flag in flags if not flag.startswith(("--replicas", "--sp"))]
    cfg = parse(sft.Config, [*flags, "--model", source, *(["--strategy", "megatron"] if tp > 1 else [])])[0]
    mesh = init_device_mesh("cpu", (replicas, ranks.world_size // (replicas * tp), tp),
                            mesh_dim_names=("replicas", "shards", "tp"))
    return cfg, dataclasses.replace(ranks, mesh=mesh)


def tensors(model, optimizer):
    trained = checkpoint.trained_weights(model, optimizer)
    return {**trained, **{f"{key}.{name}": tensor for name, p in trained.items()
                          for key, tensor in optimizer.state_of(p).items()}}


def save(ranks, layout, directory):
    cfg, ranks = shaped(ranks, layout)
    model, optimizer = sft.build(cfg, ModelPaths.find(cfg.model), ranks)
    with torch.no_grad():
        for name, tensor in tensors(model, optimizer).items():
            pretrained.copy_slice(tensor, known(name, tensor.shape))
    shard_map = shards.adapter_shard_map(model) if cfg.use_lora else shards.shard_map(model, cfg.model)
    exported = {"adapter_config.json": model.peft_config} if cfg.use_lora else files.read_bytes(
        cfg.model, ["config.json"])
    written.clear()
    checkpoint.save(directory, 1, model=model, optimizer=optimizer, shard_map=shard_map, exported=exported, state={})
    return {"weights": sum(n for is_state, n in written if not is_state),
            "state": sum(n for is_state, n in written if is_state)}


def check(found, directory, dtype):
    """Assert that this rank's shards of {name: tensor} are the known values, rounded to the dtype of the file."""
    for name, tensor in found.items():
        shard, spans = pretrained.local_shard(tensor)
        expected = known(name, tensor.shape)[tuple(slice(*span) for span in spans)].to(dtype).float()
        assert torch.equal(shard, expected), f"{name} of {directory} on rank {dist.get_rank()}, {dtype}"


def read(ranks, layout, directory):
    cfg, ranks = shaped(ranks, layout)
    paths = ModelPaths.find(cfg.model)
    if not cfg.use_lora:
        paths = dataclasses.replace(paths, model=directory)
    model, optimizer = sft.build(cfg, paths, ranks)
    n_read[0] = 0
    pretrained.load_weights(model, directory, optimizer)
    counts = {"read_weights": n_read[0]}
    check(checkpoint.trained_weights(model, optimizer), directory, torch.float32 if cfg.use_lora else torch.bfloat16)
    n_read[0] = 0
    opened.clear()
    checkpoint.load_training_tensors(directory, model, optimizer)
    counts.update(read_state=n_read[0], opened=len(opened))
    check(tensors(model, optimizer), directory, torch.float32)
    return counts


pretrained.open, saving.slices_of, writer.TensorFile.write = CountingFile, counted_slices_of, counted_write
with processes.start(1, 60) as ranks:
    for i, pair in enumerate(pairs):
        first, second = pair.split(">")
        directory = os.path.join(out, str(i))
        counts = save(ranks, first, directory)
        counts.update(read(ranks, second, os.path.join(directory, "step_1")))
        everyone = [None] * ranks.world_size
        dist.all_gather_object(everyone, counts)
        if ranks.rank == 0:
            print(json.dumps({"saved": first, "read": second, **{key: [c[key] for c in everyone] for key in counts}}))
