"""A checkpoint of known values: save_on_ranks.py DIRECTORY TO_READ,... [flags of sft.py]

Builds the model as sft.py does, on any layout. Reads the checkpoints TO_READ and asserts that every rank has bitwise
the known values. Then saves them as DIRECTORY/step_1, once directly and once as DIRECTORY.background/step_1, from host
memory, while the tensors change. Asserts that all ranks are writing their weights at the same time, and that of the
pieces that a rank has received no more than two are in memory when the next ones come.
"""

import os
import sys
import time
import weakref
import zlib

import torch

import sft
from disk import checkpoint, exchange, files, pretrained, saving, shards, writer
from disk.run import ModelPaths
from ranks import processes
from settings.parser import parse

out, to_read, *flags = sys.argv[1:]
cfg = parse(sft.Config, flags)[0]


def known(name, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def tensors(model, optimizer):
    """{name: tensor} of all that a checkpoint has."""
    trained = checkpoint.trained_weights(model, optimizer)
    return {**trained, **{f"{key}.{name}": tensor for name, p in trained.items()
                          for key, tensor in optimizer.state_of(p).items()}}


def watch(ranks, directory):
    """Let each rank's first write wait for all ranks'; count the received pieces that are in memory."""
    write, take, received, waiting = writer.TensorFile.write, exchange.Exchange.take, [], [True]

    def meeting_write(file, data):
        if waiting and not os.path.dirname(file.path).endswith("training_state"):
            waiting.clear()
            open(f"{directory}.{ranks.rank}", "w").close()
            until = time.monotonic() + 30
            while not all(os.path.exists(f"{directory}.{rank}") for rank in range(ranks.world_size)):
                assert time.monotonic() < until, f"rank {ranks.rank} writes, but not all others"
                time.sleep(0.01)
        write(file, data)

    def counted_take(self, turn):
        assert sum(ref() is not None for ref in received) <= 2, "more than two received pieces in memory"
        pieces = take(self, turn)
        assert sum(piece.numel() for piece in pieces.values()) <= saving.TURN
        received.extend(map(weakref.ref, pieces.values()))
        return pieces

    writer.TensorFile.write, exchange.Exchange.take = meeting_write, counted_take
    return received


saving.TURN = 2**14  # of 0.6 MB
with processes.start(cfg.tp, 60, sp=cfg.sp, replicas=cfg.replicas) as ranks:
    for directory in filter(None, to_read.split(",")):
        model, optimizer = sft.build(cfg, ModelPaths.find(cfg.model), ranks)
        checkpoint.verify(directory)
        checkpoint.load_training_tensors(directory, model, optimizer)
        assert optimizer.updates == 7
        for name, tensor in tensors(model, optimizer).items():
            shard, spans = pretrained.local_shard(tensor)
            expected = known(name, tensor.shape)[tuple(slice(*span) for span in spans)]
            assert torch.equal(shard, expected), f"{name} of {directory} on rank {ranks.rank}"
    model, optimizer = sft.build(cfg, ModelPaths.find(cfg.model), ranks)
    optimizer.updates = 7
    received = watch(ranks, out)
    for directory, in_background in ((out, False), (f"{out}.background", True)):
        with torch.no_grad():
            for name, tensor in tensors(model, optimizer).items():
                pretrained.copy_slice(tensor, known(name, tensor.shape))
        shard_map = shards.shard_map(model, cfg.model)
        exported = files.read_bytes(cfg.model, ["config.json"])
        save = checkpoint.start_save(directory, 1, model=model, optimizer=optimizer, shard_map=shard_map,
                                     exported=exported, state={}, in_background=in_background)
        if in_background:
            assert not os.path.exists(os.path.join(directory, "latest"))
            with torch.no_grad():
                for tensor in tensors(model, optimizer).values():
                    pretrained.local_shard(tensor)[0].fill_(torch.nan)
            while not save.is_written():
                time.sleep(0.01)
        save.finish()
    assert bool(received) == (ranks.world_size > 1)
