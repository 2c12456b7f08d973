"""Which tensors the weight files of every checkpoint have: those that are trained, and those that are copied.

A tensor that is not trained (frozen, or not of the text model) is copied byte for byte, piece by piece, from
the file where the run found it.
"""

import dataclasses
import functools
import os
import zlib
from dataclasses import dataclass

import torch
import torch.distributed as dist

from disk import files, layout
from disk.pretrained import (
    ADAPTER_FILE, ADAPTER_PREFIX, Contents, TensorEntry, match_weights, rank_and_world_size)
from settings.errors import UserError


@dataclass
class CopiedTensor:
    """A tensor that each save copies, byte for byte, from the file where the run found it.

    The file stays open: it may be removed, or replaced by another one, before the first save. From then on
    the checkpoint before is the source, so that a run does not depend on the directory it started from.

    source    an open file; None on a rank that does not write the tensor
    checksum  CRC-32 of the tensor's bytes when the run began
    written   (open file, position) in the checkpoint that is written now, on the rank that writes the tensor
    """

    entry: TensorEntry
    source: object
    checksum: int = 0
    written: tuple | None = None

    def follow(self, directory):
        """Copy from the checkpoint that is complete now; close the source before, which may be pruned."""
        self.source, start = self.written or (None, 0)
        if self.written:
            path = os.path.join(directory, os.path.basename(self.source.name))
            self.entry = dataclasses.replace(self.entry, file=path, start=start)
        self.written = None

    def chunks(self):
        """Yield the bytes as memory views, each valid until the next one.

        Raises UserError if the file is shorter than its header said.
        """
        buffer = memoryview(bytearray(min(2**22, max(self.entry.n_bytes, 1))))
        start, stop = self.entry.start, self.entry.start + self.entry.n_bytes
        while start < stop:
            with files.naming(self.entry.file):
                n = os.preadv(self.source.fileno(), [buffer[: stop - start]], start)
            if not n:
                raise UserError(f"{self.entry.file} ended while it was read")
            yield buffer[:n]
            start += n


@dataclass
class ShardMap:
    """Which tensors the weight files of a directory have. Every save repeats them.

    codes     {file: {parameter's name: dtype code}} of the tensors that are written from memory
    names     {parameter's name: its name in the files}
    copied    {file: {name in the files: CopiedTensor}} of those that are not trained
    assigned  from the first save on: what ownership.assign has returned
    """

    codes: dict
    names: dict
    copied: dict
    assigned: tuple | None = None

    def others(self):
        """(number, bytes) of the tensors that are not the model's: of a vision tower, ..."""
        own = set(self.names.values())
        sizes = [tensor.entry.n_bytes for tensors in self.copied.values()
                 for name, tensor in tensors.items() if name not in own]
        return len(sizes), sum(sizes)


def shard_map(model, directory):
    """The ShardMap of a model directory, for the checkpoints of a run that trains `model`.

    Every rank calls it. Frozen parameters are copied too: they then are what they were, in whichever dtype
    the model computes.

    Raises UserError if a frozen parameter has more rows than the directory (--resize_embeddings).
    """
    contents, (entries, parameters, _) = Contents.of(directory), match_weights(model, directory)
    names = {name: contents.names.in_files(name) for name in parameters}
    codes, copied = {}, dict(contents.others)
    for name, entry in entries.items():
        if name not in parameters:
            continue  # a second copy of a tied weight
        if parameters[name].requires_grad:
            codes.setdefault(os.path.basename(entry.file), {})[name] = entry.dtype
        elif entry.shape != tuple(parameters[name].shape):
            raise UserError(f"--resize_embeddings with --freeze: the new rows of {name} would not be "
                            "trained; do not freeze it")
        else:
            copied[names[name]] = entry
    return ShardMap(codes, names, copied_tensors(copied))


def copied_tensors(entries):
    """{file: {name: CopiedTensor}} from {name: TensorEntry}. Every rank calls it; they share the reading."""
    (rank, world_size), sources, result = rank_and_world_size(), {}, {}
    for name, entry in entries.items():
        if entry.file not in sources:
            sources[entry.file] = open(entry.file, "rb", buffering=0)
        tensors = result.setdefault(os.path.basename(entry.file), {})
        tensors[name] = CopiedTensor(entry, sources[entry.file])
    copied = [tensor for tensors in result.values() for tensor in tensors.values()]
    checksums = torch.zeros(len(copied), dtype=torch.int64)
    for i in range(rank, len(copied), world_size):
        checksums[i] = functools.reduce(lambda crc, data: zlib.crc32(data, crc), copied[i].chunks(), 0)
    if world_size > 1 and copied:
        dist.all_reduce(checksums)
    for tensor, checksum in zip(copied, checksums.tolist()):
        tensor.checksum = checksum
    return result


def adapter_shard_map(model, multimodal=False):
    """The ShardMap of an adapter: one file with all trained parameters in fp32, tied ones twice.

    multimodal  whether the model is the text model of a multimodal one
    """
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    return ShardMap({ADAPTER_FILE: dict.fromkeys(names, "F32")},
                    {n: ADAPTER_PREFIX + layout.name_in_adapter(n, multimodal) for n in names}, {})
