"""Saving: which rank writes which tensor of a checkpoint, and the slices of the training state.

All ranks write at the same time, each with a thread (disk/writer.py). The main thread hands it tensors in the
order of the file and makes all collectives, so that their order is the same on all ranks.

Weights are whole tensors in Hugging Face's files. Training state is written as each rank has it, in slices.
"""

import errno
import itertools
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from safetensors import safe_open

from disk import layout, pretrained
from disk.shards import CopiedTensor
from disk.writer import CODES, TensorFile
from ops.memory import is_split, local
from settings.errors import UserError

FP16_LIMIT = 65520  # from here on, values round to inf in fp16
SPAN = re.compile("([0-9]{1,18}):([0-9]{1,18}) of ([0-9]{1,18})")


# whole tensors: the model's files


def assign_to_files(sizes, stem, n_files):
    """Assign {name: bytes}, in order, to n_files files of about equal size; returns {file: names}."""
    total = max(sum(sizes.values()), 1)
    groups, position = {}, 0
    for name, size in sizes.items():
        groups.setdefault(min(position * n_files // total, n_files - 1), []).append(name)
        position += size
    return with_file_names(list(groups.values()), stem)


def fill_files(sizes, stem, most):
    """Assign {name: bytes}, in order, to files of at most `most` bytes; returns {file: names}.

    A larger tensor has a file of its own.
    """
    groups, room = [], -1
    for name, size in sizes.items():
        if size > room:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= size
    return with_file_names(groups, stem)


def with_file_names(groups, stem):
    """{file: names} from [names, ...], with Hugging Face's names of files."""
    stems = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}" for i in range(len(groups))]
    if len(groups) == 1:
        stems = [stem]
    return {f"{file}.safetensors": names for file, names in zip(stems, groups)}


def index_content(names_by_file, total_size):
    """The content of the index of a model whose weight files are {file: names}, of total_size bytes."""
    weight_map = dict(sorted((name, file) for file, names in names_by_file.items() for name in names))
    return {"metadata": {"total_size": total_size}, "weight_map": weight_map}


def write_whole(writer, names_by_file, tensors, codes):
    """Write the files {file: names} of whole tensors, which may be sharded.

    tensors, codes  {name in the files: tensor or CopiedTensor} and {name in the files: dtype code}

    Every rank calls it. The files are distributed over the ranks. Sharded tensors are gathered one by one, in
    turn for each rank that writes: so all ranks write at the same time, and none has more than three gathered
    tensors in memory: one that is gathered, one that waits, one that is written. The rank that writes a file
    copies its CopiedTensors.
    """
    rank, world_size = pretrained.rank_and_world_size()
    writers = {file: i % world_size for i, file in enumerate(names_by_file)}
    turns = {}  # rank -> [(file, tensor's name), ...] in the order of writing
    for file, names in names_by_file.items():
        shapes = {name: (codes[name], shape_of(tensors[name])) for name in names}
        if writers[file] == rank:
            opened = writer.open(file, shapes)
        else:
            opened = TensorFile(file, shapes, None, None)  # only for the order of its names
        turns.setdefault(writers[file], []).extend((opened, name) for name in opened.names)
    for item in itertools.chain.from_iterable(itertools.zip_longest(*turns.values())):
        if item is None:
            continue
        file, name = item
        tensor = tensors[name]
        if not isinstance(tensor, CopiedTensor):
            tensor = gather(tensor.detach(), pretrained.DTYPES[codes[name]])
        if file.writer is writer:
            writer.submit(file.add, tensor)
        del tensor


def shape_of(tensor):
    return tensor.entry.shape if isinstance(tensor, CopiedTensor) else tuple(tensor.shape)


def gather(tensor, dtype):
    """The full tensor. If it is sharded, every rank calls this, and `dtype` travels through the device."""
    if not is_split(tensor):
        return tensor
    tensor = tensor.to(tensor.device_mesh.device_type, dtype)
    if tensor.device_mesh.ndim > 1:  # dp first, then tp: full_tensor uses this order too, but with a warning
        from torch.distributed.tensor import Replicate  # takes half a second, but FSDP2 has imported it

        *others, last = tensor.placements
        tensor = tensor.redistribute(placements=[*(Replicate() for _ in others), last])
    return tensor.full_tensor()


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

    The weight files have the same names and tensors as those that were read. If there are more ranks than
    files, each rank writes one file of about equal size instead. An adapter is small and stays one file.
    """
    tensors, codes, names_by_file = stored_tensors(shard_map, masters)
    is_adapter = pretrained.ADAPTER_CONFIG in exported
    world_size = pretrained.rank_and_world_size()[1]
    sizes = {name: math.prod(shape_of(tensor)) * pretrained.BITS[codes[name]] // 8
             for name, tensor in tensors.items()}
    if len(names_by_file) < world_size and not is_adapter:
        names_by_file = assign_to_files(sizes, "model", world_size)
    write_whole(writer, names_by_file, tensors, codes)
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

    Every rank calls it. Of ranks with the same slice, the first one writes it. Nothing is gathered. The
    metadata of the file has, for each tensor that is not whole in it, "START:STOP of SIZE" of each dimension.
    """
    rank, world_size = pretrained.rank_and_world_size()
    stems = [f"tensors-{i + 1:05d}-of-{world_size:05d}" for i in range(world_size)]
    if world_size == 1:
        stems = ["tensors"]
    names = [os.path.join(folder, f"{stem}.safetensors") for stem in stems]
    metadata, mine = {}, {}
    for name, is_first in zip(tensors, first_holders(tensors.values())):
        shard, spans = pretrained.local_shard(tensors[name])
        if is_first and shard.numel():
            mine[name] = shard
            if shard.shape != tensors[name].shape:
                metadata[name] = ", ".join(f"{start}:{stop} of {size}"
                                           for (start, stop), size in zip(spans, tensors[name].shape))
    file = writer.open(names[rank], {name: (CODES[t.dtype], t.shape) for name, t in mine.items()}, metadata)
    for name in file.names:
        writer.submit(file.add, mine[name])
    return names


def first_holders(tensors):
    """For each tensor, whether this rank is the first with its slice. Every rank calls it."""
    rank, world_size = pretrained.rank_and_world_size()
    spans = [list(itertools.chain(*pretrained.local_shard(t)[1])) for t in tensors]
    if world_size == 1 or not spans:
        return [True] * len(spans)
    width = max(map(len, spans))
    spans = torch.tensor([row + [0] * (width - len(row)) for row in spans])
    everyone = [torch.empty_like(spans) for _ in range(world_size)]
    dist.all_gather(everyone, spans)
    is_first = torch.ones(len(spans), dtype=torch.bool)
    for other in everyone[:rank]:
        is_first &= (other != spans).any(1)
    return is_first.tolist()


def read_slices(directory):
    """{name: [Slice, ...]} of all tensors in a directory's safetensors files; together they are whole.

    Files of whole tensors, as older versions wrote them, have no spans. Raises UserError if a part of a
    tensor is missing or there twice, or if its files do not agree.
    """
    slices = {}
    for file in sorted(os.listdir(directory)):
        if not file.endswith(".safetensors"):
            continue
        path = os.path.join(directory, file)
        entries = pretrained.read_header(path)
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
            slices.setdefault(name, []).append(Slice(entry, spans, shape))
    for name, parts in slices.items():
        shape, count = parts[0].shape, sum(count_elements(part.spans) for part in parts)
        starts = {tuple(start for start, _ in part.spans) for part in parts}
        if (any(part.shape != shape or part.entry.dtype != parts[0].entry.dtype for part in parts)
                or len(starts) < len(parts) or count != count_elements([(0, size) for size in shape])):
            raise UserError(f"{directory}: the slices of {name:.200} in its files do not make up one tensor; "
                            "use another step directory")
    return slices


def count_elements(spans):
    n = 1
    for start, stop in spans:
        n *= stop - start
    return n


def read_sliced(slices, tensor, spans=None):
    """Read this rank's shard of `tensor` from the slices that overlap it, whoever wrote them.

    spans  [(start, stop) in each dimension] of the whole tensor that `tensor` is; by default the shard's

    Beside `tensor` it needs memory for the part of one slice, and only if columns are split.
    """
    shard, wanted = pretrained.local_shard(tensor)
    wanted = spans or wanted
    for part in slices:
        common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(part.spans, wanted)]
        if any(start >= stop for start, stop in common):
            continue
        target = shard[within(common, wanted)]
        rows = target if target.is_contiguous() else torch.empty(target.shape, dtype=target.dtype)
        spans = [(start - first, stop - first) for (start, stop), (first, _) in zip(common, part.spans)]
        pretrained.read_into(part.entry, rows, spans)
        if rows is not target:
            target.copy_(rows)


def within(spans, outer):
    """The index of the elements `spans` of a tensor in its slice `outer`."""
    return tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(spans, outer))


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


def is_rank_0():
    return pretrained.rank_and_world_size()[0] == 0


def barrier():
    """Wait for all ranks, on the CPU: NCCL would have to start, and its time-out would count the writing."""
    if pretrained.rank_and_world_size()[1] > 1:
        dist.all_reduce(torch.zeros(()))
