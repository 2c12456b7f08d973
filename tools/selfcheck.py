"""A step computed in other ways than the loop does: --selfcheck, and where a step that is not finite went wrong.

Both need what the loop never has: the gradient of each micro-batch, or of another layout, by itself. `backward` is
sft.py's.
"""

import math

import torch

import data
import fsdp
from ops import memory
from settings.errors import UserError


def compare(backward, model, parameters, dataset, ids, cfg, ranks, limit):
    """Compare loss and every gradient of one step over ways to lay it out; raise ValueError above `limit`.

    The step's conversations are cut into micro-batches in several ways, with and without checkpointing, and, with
    several data-parallel ranks, all put on one of them. Prints the largest relative difference of each.

    ids  the step's conversations
    """
    max_length, n_targets = cfg.max_length, int(dataset.n_targets[ids].sum())
    model.eval()  # no dropout, whose masks depend on the layout

    def gradient(capacity, max_rows, checkpointing, spread):
        model.model.gradient_checkpointing = checkpointing
        place = (ranks.dp_rank, ranks.dp_size) if spread else (0, 1)
        batches = list(data.micro_batches(dataset, ids, capacity, max_rows, *place))
        if not spread and ranks.dp_rank:  # idle, but in step: a collective waits for all
            batches = list(data.micro_batches(dataset, ids[:0], capacity)) * len(batches)
        loss = backward(model, batches, n_targets, ranks)
        gradients = [memory.local(p.grad).clone() for p in parameters]
        for p in parameters:
            p.grad = None
        return ranks.sum(loss), gradients

    ways = {"as configured": (cfg.micro_batch_size * max_length, None if cfg.packing else cfg.micro_batch_size,
                              cfg.gradient_checkpointing, True),
            "one conversation at a time": (max_length, 1, cfg.gradient_checkpointing, True),
            "all in one micro-batch": (len(ids) * max_length, None, cfg.gradient_checkpointing, True),
            "checkpointing the other way": (max_length, None, not cfg.gradient_checkpointing, True)}
    if ranks.dp_size > 1:
        ways["all on one data-parallel rank"] = (max_length, None, cfg.gradient_checkpointing, False)
    base, worst = None, 0.0
    for name, way in ways.items():
        loss, gradients = gradient(*way)
        base = base or (loss, gradients)
        off = torch.stack([(a - b).norm() / b.norm().clamp(min=1e-30) for a, b in zip(gradients, base[1]) if b.numel()])
        off = max(*fsdp.largest(off.max()[None], ranks), abs(loss / base[0] - 1).item())
        worst = max(worst, off)
        if ranks.rank == 0:
            print(f"{name:32} loss {loss.item():.8f}   largest relative difference {off:.1e}")
    if not worst <= limit:
        raise UserError(f"selfcheck: the gradient depends on the layout, {worst:.1e} is above {limit}")
    if ranks.rank == 0:
        print(f"selfcheck: ok, {len(ids)} conversations, nothing above {limit}")


def find_non_finite(backward, model, parameters, rows, ids, capacity, max_rows, n_targets, ranks):
    """Say where a step that is not finite went wrong. Each of its micro-batches is computed alone, one after another
    over the ranks: as long as dp_size steps, once, at the end of a run."""
    (idle,) = data.micro_batches(rows, ids[:0], capacity)
    places = [(dp_rank, i, batch) for dp_rank in range(ranks.dp_size) for i, batch in enumerate(
        data.micro_batches(rows, ids, capacity, max_rows, dp_rank, ranks.dp_size), 1)]
    for dp_rank, i, batch in places:
        losses, is_mine = torch.zeros(len(rows), device=ranks.device), dp_rank == ranks.dp_rank
        for p in parameters:
            p.grad = None
        loss = ranks.sum(backward(model, [batch if is_mine else idle], n_targets, ranks, losses if is_mine else None))
        if not math.isfinite(loss.item()) or not fsdp.grad_norm(parameters).isfinite():
            bad = batch.ids[~ranks.sum(losses).isfinite().cpu().numpy()[batch.ids]]
            return (f"rank {dp_rank * ranks.size // ranks.dp_size}, its micro-batch {i}; conversations: "
                    f"{rows.sources(bad if len(bad) else batch.ids)}")  # a gradient is of the whole micro-batch
    return f"no micro-batch alone shows it; conversations: {rows.sources(ids)}"
