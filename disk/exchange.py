"""Ranks send each other the rows of tensors that others write: an all-to-all in turns, on the CPU."""

import numpy as np
import torch
import torch.distributed as dist

from disk import ownership, pretrained
from ops.memory import is_split


def layout_of(tensors):
    """The ownership.Layout of the ranks of this run, from the meshes of some of its tensors."""
    sizes, (rank, world_size) = {}, pretrained.rank_and_world_size()
    for tensor in tensors:
        if is_split(tensor):
            sizes.update(zip(tensor.device_mesh.mesh_dim_names, tensor.device_mesh.shape))
    # FSDP2 shards all of them; a run may train only some that tp does not split
    replicas, shards = sizes.get("replicas", 1), sizes.get("shards", world_size)
    layout = ownership.Layout(replicas, shards, world_size // (replicas * shards))
    for tensor in tensors:
        spans = ownership.shard_spans(tensor.shape, split_of(tensor), layout, rank)
        assert ownership.as_integers(spans) == pretrained.local_shard(tensor)[1], f"not the shard of {layout}"
    return layout


def split_of(tensor):
    """{axis of the mesh: dimension of the tensor} over which a tensor is sharded; see ownership."""
    if not is_split(tensor):
        return {}
    dims = [getattr(placement, "dim", None) for placement in tensor.placements]
    return {axis: dim for axis, dim in zip(tensor.device_mesh.mesh_dim_names, dims) if dim is not None}


def within(spans, outer):
    """The index of the elements `spans` of a tensor in its slice `outer`."""
    return tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(spans, outer))


class Exchange:
    """What ranks send each other. All make the same calls, in the same order.

    tensors  {name: tensor}, sharded or not
    codes    {name: dtype code} in which they travel
    """

    def __init__(self, tensors, codes):
        self.tensors, self.layout = tensors, layout_of(tensors.values())
        self.rank = pretrained.rank_and_world_size()[0]
        self.dtypes = {name: pretrained.DTYPES[codes[name]] for name in tensors}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.splits = {name: split_of(tensor) for name, tensor in tensors.items()}
        self.sizes = {name: tensor.numel() * self.dtypes[name].itemsize for name, tensor in tensors.items()}

    def take(self, turn):
        """{Piece: a tensor of its bytes, on the CPU} of the pieces that this rank receives.

        turn  {rank: [ownership.Piece, ...]}
        """
        turn = {rank: [piece for piece in pieces if piece.name in self.tensors]
                for rank, pieces in turn.items()}
        if not any(turn.values()):
            return {}  # on all ranks
        held = [(rank, self.held_for(rank, piece)) for rank, pieces in turn.items() for piece in pieces]
        send_sizes = [0] * self.layout.world_size
        for rank, part in held:
            send_sizes[rank] += part.numel()
        outgoing = torch.cat([part for _, part in held]).cpu()
        del held
        mine = turn.get(self.rank, [])
        sources = [(source, piece, spans) for piece in mine for source, spans in self.sources(piece)]
        sources.sort(key=lambda item: item[0])  # as the bytes arrive: of a rank in the order of the pieces
        counts = [ownership.count_elements(spans) * self.dtypes[piece.name].itemsize
                  for _, piece, spans in sources]
        receive_sizes = [0] * self.layout.world_size
        for (source, *_), count in zip(sources, counts):
            receive_sizes[source] += count
        incoming = torch.empty(sum(counts), dtype=torch.uint8)
        dist.all_to_all_single(incoming, outgoing, receive_sizes, send_sizes)
        parts = list(zip(sources, incoming.split(counts)))
        return {piece: self.joined(piece, [(spans, part) for (_, other, spans), part in parts
                                           if other is piece]) for piece in mine}

    def held_for(self, rank, piece):
        """The bytes of a Piece that this rank sends to another one, on their device; there may be none."""
        shape, split = self.shapes[piece.name], self.splits[piece.name]
        shard, held = pretrained.local_shard(self.tensors[piece.name])
        common = ownership.as_integers(ownership.overlap(piece.spans(shape), held))
        here, there = (ownership.copy_of(split, self.layout, n) for n in (self.rank, rank))
        if here != there or any(start >= stop for start, stop in common):
            return torch.empty(0, dtype=torch.uint8, device=shard.device)
        return bytes_of(shard[within(common, held)].to(self.dtypes[piece.name])).reshape(-1)

    def sources(self, piece):
        """[(rank, spans of the tensor), ...]: which rank sends this one what of a Piece."""
        shape, split = self.shapes[piece.name], self.splits[piece.name]
        ranks = np.arange(self.layout.world_size)
        copies, _ = ownership.copy_of(split, self.layout, ranks)
        ranks = ranks[copies == copies[self.rank]]
        spans = ownership.overlap(piece.spans(shape), ownership.shard_spans(shape, split, self.layout, ranks))
        ends = np.stack([np.broadcast_to(end, ranks.shape) for span in spans for end in span], axis=1)
        found = [(rank, list(zip(row[::2], row[1::2]))) for rank, row in zip(ranks.tolist(), ends.tolist())]
        return [(rank, common) for rank, common in found if all(start < stop for start, stop in common)]

    def joined(self, piece, parts):
        """The bytes of a Piece from [(spans of the tensor, their bytes), ...]."""
        whole = piece.spans(self.shapes[piece.name])
        target = torch.empty([stop - start for start, stop in whole], dtype=self.dtypes[piece.name])
        for spans, part in parts:
            # as bytes: a part may begin at any address
            place = bytes_of(target, copies=False)[in_bytes(within(spans, whole), target.element_size())]
            place.copy_(part.view(place.shape))
        return bytes_of(target).view(-1)


def bytes_of(tensor, copies=True):
    """A contiguous tensor as uint8: its last dimension is in bytes."""
    return (tensor.contiguous() if copies else tensor).view(torch.uint8)


def in_bytes(index, itemsize):
    """An index of elements as one of bytes_of."""
    *outer, last = index
    return *outer, slice(last.start * itemsize, last.stop * itemsize)
