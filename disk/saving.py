"""Saving: the exchange of weights, and the slices of the training state.

All ranks write at the same time, each with a thread (disk/writer.py), what disk/ownership.py says. The main
thread hands it tensors in the order of the file and makes all collectives, so that their order is the same on
all ranks.

Weights are whole tensors in Hugging Face's files. Training state is written as each rank has it, in slices.
"""

import dataclasses
import errno
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open

from disk import files, layout, ownership, pretrained
from disk.exchange import Exchange, layout_of, split_of, within
from disk.shards import CopiedTensor
from disk.writer import CODES, in_order
from ops.memory import is_split, local
from settings.errors import UserError

SLICES = "slices.json"  # beside the slices: the layout of the ranks, and {name: [shape, split]}
TURN = 2**27  # bytes of weights that a rank receives at a time, to write them
FP16_LIMIT = 65520  # from here on, values round to inf in fp16
SPAN = re.compile("([0-9]{1,18}):([0-9]{1,18}) of ([0-9]{1,18})")


# whole tensors: the model's files


def fill_files(sizes, stem, most):
    """Assign {name: bytes}, in order, to files of at most `most` bytes; returns {file: names}.

    A larger tensor has a file of its own.
    """
    return ownership.with_file_names(ownership.filled(sizes, most), stem)


def index_content(names_by_file, total_size):
    """The content of the index of a model whose weight files are {file: names}, of total_size bytes."""
    weight_map = dict(sorted((name, file) for file, names in names_by_file.items() for name in names))
    return {"metadata": {"total_size": total_size}, "weight_map": weight_map}


def write_whole(writer, names_by_file, owners, tensors, codes):
    """Write the files {file: names} of whole tensors, which may be sharded, each by the rank of `owners`.

    tensors, codes  {name in the files: tensor or CopiedTensor} and {name in the files: dtype code}

    Every rank calls it. In each turn every rank that writes receives the next TURN bytes of its files from
    the ranks that hold them, in one collective. So all write at the same time. The rank that writes a file
    copies its CopiedTensors.

    Host memory of a rank, whatever the model: about five turns. What it sends, what arrives, the same in the
    order of the file, a piece that waits for the thread, and one that is written.
    """
    rank, world_size = pretrained.rank_and_world_size()
    stored = {name: (codes[name], shape_of(tensor)) for name, tensor in tensors.items()}
    names_by_file = {file: in_order({name: stored[name] for name in names})
                     for file, names in names_by_file.items()}
    opened = {file: writer.open(file, {name: stored[name] for name in names})
              for file, names in names_by_file.items() if owners[file] == rank}
    exchange = Exchange({name: tensor.detach() for name, tensor in tensors.items()
                         if world_size > 1 and not isinstance(tensor, CopiedTensor)}, codes)
    for turn in ownership.turns(names_by_file, owners, exchange.sizes, exchange.shapes, TURN):
        received = exchange.take(turn)
        for piece in turn.get(rank, []):
            tensor, dtype = tensors[piece.name], pretrained.DTYPES.get(codes[piece.name])
            if piece in received:
                tensor, dtype = received.pop(piece), torch.uint8
            elif not isinstance(tensor, CopiedTensor):
                tensor = local(tensor)  # of one rank, which may be sharded for offload
            writer.submit(opened[piece.file].add, tensor, dtype)
            del tensor


def shape_of(tensor):
    return tensor.entry.shape if isinstance(tensor, CopiedTensor) else tuple(tensor.shape)


def overflowing(tensors, dtypes):
    """The names of the tensors with finite values that would be inf in their file, in fp16.

    Every rank calls it. It costs a pass over the weights, and nothing if no file is in fp16.
    """
    names = [name for name, dtype in dtypes.items() if dtype == torch.float16]
    if not names:
        return []
    shards = [local(tensors[name]).detach() for name in names]
    largest = torch.stack([t.abs().max().float().cpu() if t.numel() else torch.zeros(()) for t in shards])
    if pretrained.rank_and_world_size()[1] > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return [name for name, value in zip(names, largest.tolist()) if FP16_LIMIT <= value < float("inf")]


def write_model(writer, masters, shard_map, exported):
    """Write the files of a model or adapter directory; return the names of all of them.

    The weight files have the same names and tensors as those that were read, unless ownership.assign finds
    others that the ranks can share. An adapter is small and stays one file.
    """
    tensors, codes, names_by_file = stored_tensors(shard_map, masters)
    is_adapter = pretrained.ADAPTER_CONFIG in exported
    sizes = {name: math.prod(shape_of(tensor)) * pretrained.BITS[codes[name]] // 8
             for name, tensor in tensors.items()}
    if shard_map.assigned is None:  # once in a run: the rank that wrote a CopiedTensor has its source
        world_size = 1 if is_adapter else pretrained.rank_and_world_size()[1]
        shard_map.assigned = ownership.assign(sizes, names_by_file, world_size)
    names_by_file, owners = shard_map.assigned
    write_whole(writer, names_by_file, owners, tensors, codes)
    others = dict(exported)
    if list(names_by_file) != ["model.safetensors"] and not is_adapter:  # the only name without an index
        others[pretrained.INDEX_FILE] = index_content(names_by_file, sum(sizes.values()))
    if is_rank_0():
        for name, content in others.items():
            writer.write_file(name, content)
    return [*names_by_file, *others]


def stored_tensors(shard_map, masters):
    """({name: tensor or CopiedTensor}, {name: dtype code}, {file: names}) with the names in the files."""
    tensors, codes, names_by_file = {}, {}, {}
    for file in sorted({*shard_map.codes, *shard_map.copied}):
        names = names_by_file[file] = []
        for name, code in shard_map.codes.get(file, {}).items():
            stored = shard_map.names[name]
            tensors[stored], codes[stored] = masters[name], code
            names.append(stored)
        for name, tensor in shard_map.copied.get(file, {}).items():
            tensors[name], codes[name] = tensor, tensor.entry.dtype
            names.append(name)
    return tensors, codes, names_by_file


def widen(shard_map, exported, masters):
    """Let the files have fp32 for tensors with values beyond fp16, as inf would make the model useless.

    shard_map and exported are changed, for later saves too. config.json then says float32: programs that load
    a model in the dtype of its config.json would make inf of such values.
    """
    names = overflowing(masters, dtypes_of(shard_map))
    if not names:
        return
    for codes in shard_map.codes.values():
        codes.update((name, "F32") for name in codes if name in names)
    config = exported["config.json"]
    config = json.loads(config) if isinstance(config, bytes) else config
    exported["config.json"] = layout.with_dtype(config, torch.float32)
    if is_rank_0():
        print(f"warning: {len(names)} tensors have values beyond fp16 (65,504), such as {names[0]}: "
              "checkpoints have these tensors, and the dtype in config.json, in fp32", file=sys.stderr)


def device_of(model):
    """The device through which the model's tensors travel; this process's GPU also if they are offloaded."""
    p = next(model.parameters())
    if is_split(p) and p.device_mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return p.device


def dtypes_of(shard_map):
    """{parameter's name: dtype} of the tensors in the model's files that are not copied."""
    return {n: pretrained.DTYPES[code] for codes in shard_map.codes.values() for n, code in codes.items()}


# slices: the training state


@dataclass
class Slice:
    """What one file has of a tensor."""

    entry: pretrained.TensorEntry
    spans: list  # [(start, stop) in each dimension of the whole tensor]
    shape: tuple  # of the whole tensor


def write_slices(writer, folder, tensors):
    """Write this rank's slices of {name: tensor} into its file in `folder`; return all ranks' files.

    Every rank calls it. Ranks with copies of a shard divide its rows. Nothing is sent. The metadata of the
    file has, for each tensor that is not whole in it, "START:STOP of SIZE" of each dimension. With several
    ranks, rank 0 writes SLICES: which file has what, so that a reader opens only those that it needs.
    """
    rank, world_size = pretrained.rank_and_world_size()
    names = [os.path.join(folder, file) for file in slice_files(world_size)]
    mesh, metadata, mine = layout_of(tensors.values()), {}, {}
    for name, tensor in tensors.items():
        shard, held = pretrained.local_shard(tensor)
        spans = ownership.as_integers(ownership.written_spans(tensor.shape, split_of(tensor), mesh, rank))
        shard = shard[within(spans, held)]
        if shard.numel():
            mine[name] = shard
            if shard.shape != tensor.shape:
                metadata[name] = ", ".join(f"{start}:{stop} of {size}"
                                           for (start, stop), size in zip(spans, tensor.shape))
    file = writer.open(names[rank], {name: (CODES[t.dtype], t.shape) for name, t in mine.items()}, metadata)
    for name in file.names:
        writer.submit(file.add, mine[name], mine[name].dtype)
    if world_size > 1:
        names.append(os.path.join(folder, SLICES))
        if rank == 0:
            listed = {name: [list(tensor.shape), split_of(tensor)] for name, tensor in tensors.items()}
            writer.write_file(names[-1], {**dataclasses.asdict(mesh), "tensors": listed})
    return names


def slice_files(world_size):
    """The names of the files of the training state, by rank."""
    if world_size == 1:
        return ["tensors.safetensors"]
    return [f"tensors-{rank + 1:05d}-of-{world_size:05d}.safetensors" for rank in range(world_size)]


def read_slices(directory, wanted=None):
    """{name: [Slice, ...]} of all tensors in a directory's safetensors files; together they are whole.

    wanted  {name: tensor, which may be sharded}: read only the headers of the files that this rank needs for
            its shards, if there is a SLICES file. The slices that a shard needs are then complete, and there
            may be none if the shard is empty

    Files of whole tensors, as older versions wrote them, have no spans. Raises UserError if a part of a
    tensor is missing or there twice, or if its files do not agree.
    """
    names = sorted(file for file in os.listdir(directory) if file.endswith(".safetensors"))
    planned, plan = None, os.path.join(directory, SLICES)
    if wanted is not None and os.path.exists(plan):
        planned = planned_slices(plan, names, wanted)
        names = sorted({file for parts in planned.values() for file in parts})
    slices = {name: [] for name in planned or ()}
    for file in names:
        for name, part in slices_of(os.path.join(directory, file)).items():
            slices.setdefault(name, []).append(part)
    for name, parts in slices.items():
        starts = {tuple(start for start, _ in part.spans) for part in parts}
        if planned is None:
            n_elements = sum(ownership.count_elements(part.spans) for part in parts)
            is_whole = n_elements == math.prod(parts[0].shape)
        else:
            found = {os.path.basename(part.entry.file): (part.spans, part.shape) for part in parts}
            is_whole = planned.get(name, {}).items() <= found.items()
        kinds = {(part.shape, part.entry.dtype) for part in parts}
        if len(kinds) > 1 or len(starts) < len(parts) or not is_whole:
            raise UserError(f"{directory}: the slices of {name:.200} in its files do not make up one tensor; "
                            "use another step directory")
    return slices


def slices_of(path):
    """{name: Slice} of a file. Raises UserError if its metadata does not fit its tensors."""
    entries, slices = pretrained.read_header(path), {}
    unknown = [name for name, entry in entries.items() if entry.dtype not in pretrained.DTYPES]
    if unknown:
        raise UserError(f"{path}: {unknown[0]:.200} has dtype {entries[unknown[0]].dtype}; supported are "
                        f"{', '.join(pretrained.DTYPES)}")
    with safe_open(path, framework="pt") as f:
        metadata = f.metadata() or {}
    for name, entry in entries.items():
        spans, shape = [(0, size) for size in entry.shape], entry.shape
        if name in metadata:
            numbers = [tuple(map(int, numbers)) for numbers in SPAN.findall(metadata[name])]
            spans, shape = [(start, stop) for start, stop, _ in numbers], tuple(n for *_, n in numbers)
            is_inside = all(start <= stop <= size for start, stop, size in numbers)
            if not is_inside or tuple(stop - start for start, stop in spans) != entry.shape:
                raise UserError(f"{path}: {name:.200} has shape {entry.shape}, but its metadata says "
                                f"{metadata[name]:.200}")
        slices[name] = Slice(entry, spans, shape)
    return slices


def planned_slices(path, names, wanted):
    """{name: {file: (spans, shape)}} of the slices that this rank's shards of {name: tensor} need.

    path   of a SLICES file
    names  of the files of slices beside it

    Raises UserError if it is malformed, or of other tensors.
    """
    content = files.read_json(path)
    if not is_plan(content, len(names)):
        raise UserError(f"{path} does not fit the {len(names)} files beside it; use another step directory")
    listed = content.pop("tensors")
    differences = sorted(name for name in listed.keys() | wanted.keys() if name not in listed
                         or name not in wanted or tuple(listed[name][0]) != tuple(wanted[name].shape))
    if differences:
        raise UserError(f"{os.path.dirname(path)} does not belong to this model and optimizer: "
                        f"{differences[:5]} differ")
    mesh = ownership.Layout(**content)
    names, ranks, planned = slice_files(mesh.world_size), np.arange(mesh.world_size), {}
    for name, (shape, split) in listed.items():
        spans = ownership.written_spans(shape, split, mesh, ranks)
        common = ownership.overlap(spans, pretrained.local_shard(wanted[name])[1])
        needed = np.ones(len(ranks), dtype=bool)
        for start, stop in common:
            needed &= start < stop
        planned[name] = {}
        for rank in ranks[needed].tolist():
            spans = ownership.written_spans(shape, split, mesh, rank)
            planned[name][names[rank]] = ownership.as_integers(spans), tuple(shape)
    return planned


def is_plan(content, n_files):
    """Whether a value is the content of a SLICES file beside n_files files of slices."""
    if not isinstance(content, dict) or content.keys() != {*ownership.AXES, "tensors"}:
        return False
    *sizes, tensors = (content[key] for key in (*ownership.AXES, "tensors"))
    if any(type(n) is not int or n < 1 for n in sizes) or math.prod(sizes) != n_files:
        return False
    return isinstance(tensors, dict) and all(
        isinstance(item, list) and len(item) == 2 and isinstance(item[0], list) and isinstance(item[1], dict)
        and all(type(n) is int and 0 <= n < 10**18 for n in item[0])
        and all(axis in ownership.AXES and type(dim) is int and 0 <= dim < len(item[0])
                for axis, dim in item[1].items()) for item in tensors.values())


def read_sliced(slices, tensor, spans=None):
    """Read this rank's shard of `tensor` from the slices that overlap it, whoever wrote them.

    spans  [(start, stop) in each dimension] of the whole tensor that `tensor` is; by default the shard's

    Beside `tensor` it needs memory for the part of one slice, and only if columns are split.
    """
    shard, wanted = pretrained.local_shard(tensor)
    wanted = spans or wanted
    for part in slices:
        common = ownership.as_integers(ownership.overlap(part.spans, wanted))
        if any(start >= stop for start, stop in common):
            continue
        target = shard[within(common, wanted)]
        rows = target if target.is_contiguous() else torch.empty(target.shape, dtype=target.dtype)
        spans = [(start - first, stop - first) for (start, stop), (first, _) in zip(common, part.spans)]
        pretrained.read_into(part.entry, rows, spans)
        if rows is not target:
            target.copy_(rows)


# what ranks exchange


def progress(writer):
    """(ranks that still write, bytes that all ranks have written). Every rank calls it.

    Raises the error of this rank's writing.
    """
    counts = torch.tensor([not writer.is_idle(), writer.n_bytes], dtype=torch.int64)
    if pretrained.rank_and_world_size()[1] > 1:
        dist.all_reduce(counts)
    return counts.tolist()


def wait_for_all(writer, timeout):
    """Wait until all ranks have written their files. Every rank calls it.

    The ranks ask each other all the time. So each notices at once if another one fails, and no collective
    waits for a slow disk, which may take longer than a collective may.

    Raises the error of this rank's writing, and OSError if no rank writes anything for `timeout` seconds.
    """
    seen, since = None, time.monotonic()
    while (now := progress(writer))[0]:
        if now != seen:
            seen, since = now, time.monotonic()
        if time.monotonic() - since > timeout:
            raise OSError(errno.ETIMEDOUT, f"no rank has written anything for {timeout} s", writer.directory)
        time.sleep(0.01)
    writer.wait()


def shared_sums(names, mine):
    """{name: [size, CRC-32]} of all files, from each rank's {name: (size, CRC-32)}. Every rank calls it.

    All ranks have called it when it returns.
    """
    sums = torch.tensor([mine.get(name, (0, 0)) for name in names])
    if pretrained.rank_and_world_size()[1] > 1:
        dist.all_reduce(sums)
    return dict(zip(names, sums.tolist()))


def total(number):
    """The sum of an integer over all ranks. Every rank calls it."""
    number = torch.tensor(number)
    if pretrained.rank_and_world_size()[1] > 1:
        dist.all_reduce(number)
    return int(number)


def is_rank_0():
    return pretrained.rank_and_world_size()[0] == 0


def barrier():
    """Wait for all ranks, on the CPU: NCCL would have to start, and its time-out would count the writing."""
    if pretrained.rank_and_world_size()[1] > 1:
        dist.all_reduce(torch.zeros(()))
