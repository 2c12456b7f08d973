"""Checks of a step outside the training loop: does its gradient depend on the layout, do adapters learn, and
where did a step that is not finite go wrong.

    python tools/selfcheck.py --model tiny   # sft.py --selfcheck: compares layouts of a step, then exits

They need what the loop never has: the gradient of each micro-batch, or of another layout, by itself.
`backward` is sft.py's.
"""

if __name__ == "__main__":
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from settings import venv

    venv.enter()  # where torch is missing, continue in the .venv that train.sh made

import math

import torch

import data
import fsdp
from ops.memory import local
from settings.errors import UserError

# relative differences that rounding explains, by the dtype of the computation
LIMITS = {"fp32": 1e-5, "bf16": 2e-2}


def compare(backward, model, dataset, ids, cfg, ranks):
    """Compare loss and every gradient of one step over ways to lay it out; raise UserError where they differ.

    The step's conversations are cut into micro-batches in several ways, with and without checkpointing, and,
    with several data-parallel ranks, all put on one of them. Prints the largest relative difference of each.

    ids  the step's conversations
    """
    limit, max_length, checkpointing = (
        LIMITS[cfg.dtype_on(ranks.device)], cfg.max_length, cfg.gradient_checkpointing)
    ways = {
        "as configured": dict(capacity=cfg.micro_batch_size * max_length,
                              max_conversations=None if cfg.packing else cfg.micro_batch_size),
        "one conversation at a time": dict(capacity=max_length, max_conversations=1),
        "all in one micro-batch": dict(capacity=len(ids) * max_length),
        "checkpointing the other way": dict(capacity=max_length, checkpointing=not checkpointing),
    }
    if ranks.dp_size > 1:
        ways["all on one data-parallel rank"] = dict(capacity=max_length, on_one_rank=True)
    model.eval()  # no dropout, whose masks depend on the layout
    base, worst = None, 0.0
    for name, way in ways.items():
        model.model.gradient_checkpointing = way.pop("checkpointing", checkpointing)
        loss, gradients = gradient(backward, model, dataset, ids, ranks, **way)
        base = base or (loss, gradients)
        off = torch.stack([
            (a - b).norm() / b.norm().clamp(min=1e-30) for a, b in zip(gradients, base[1]) if b.numel()])
        off = max(*fsdp.all_reduce_max(off.max()[None], ranks), abs(loss / base[0] - 1).item())
        worst = max(worst, off)
        if ranks.rank == 0:
            print(f"{name:32} loss {loss.item():.8f}   largest relative difference {off:.1e}")
    if not worst <= limit:
        raise UserError(f"selfcheck: the gradient depends on the layout, {worst:.1e} is above {limit}")
    if ranks.rank == 0:
        print(f"selfcheck: ok, {len(ids)} conversations, nothing above {limit}")


def gradient(backward, model, dataset, ids, ranks, *, capacity, max_conversations=None, on_one_rank=False):
    """(loss, this rank's parts of every gradient) of a step in one layout."""
    n_targets = int(dataset.n_targets[ids].sum())
    if on_one_rank:
        batches = list(data.micro_batches(dataset, ids, capacity, max_conversations))
        if ranks.dp_rank:  # idle, but in step: a collective waits for all
            batches = list(data.micro_batches(dataset, ids[:0], capacity)) * len(batches)
    else:
        batches = list(data.micro_batches(dataset, ids, capacity, max_conversations, ranks.dp_rank, ranks.dp_size))
    loss = backward(model, batches, n_targets, ranks)
    parameters = trained(model)
    gradients = [local(p.grad).clone() for p in parameters]
    for p in parameters:
        p.grad = None
    return ranks.all_reduce(loss), gradients


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def check_adapters(model, ranks):
    """Raise UserError if adapters do not learn: in the first step each B matrix must have a gradient."""
    found = {name: p.grad for name, p in model.named_parameters() if ".lora_B." in name}
    alive = torch.tensor([g is not None and bool(local(g).any()) for g in found.values()])
    dead = [name for name, lives in zip(found, fsdp.all_reduce_max(alive, ranks)) if not lives]
    if dead:
        raise UserError(f"{len(dead)} of {len(found)} adapters have no gradient and would never learn: "
                        f"{', '.join(dead[:5])}")


def find_non_finite(backward, model, dataset, ids, cfg, ranks):
    """Say where a step that is not finite went wrong.

    Each of its micro-batches is computed alone, one after another over the ranks. This takes as long as
    dp_size steps, once, at the end of a run.
    """
    capacity, max_conversations = cfg.micro_batch_size * cfg.max_length, None if cfg.packing else cfg.micro_batch_size
    n_targets, parameters = int(dataset.n_targets[ids].sum()), trained(model)
    (idle,) = data.micro_batches(dataset, ids[:0], capacity)
    for dp_rank in range(ranks.dp_size):
        batches = data.micro_batches(dataset, ids, capacity, max_conversations, dp_rank, ranks.dp_size)
        for number, batch in enumerate(batches, 1):
            losses, is_mine = torch.zeros(len(dataset), device=ranks.device), dp_rank == ranks.dp_rank
            for p in parameters:
                p.grad = None
            loss = backward(
                model, [batch if is_mine else idle], n_targets, ranks, losses if is_mine else None)
            if math.isfinite(ranks.all_reduce(loss).item()) and fsdp.grad_norm(model).isfinite():
                continue
            bad = batch.ids[~ranks.all_reduce(losses).isfinite().cpu().numpy()[batch.ids]]
            named = bad if len(bad) else batch.ids  # a gradient is of the whole micro-batch
            rank = dp_rank * ranks.world_size // ranks.dp_size
            return f"rank {rank}, its micro-batch {number}; conversations: {dataset.sources(named)}"
    return f"no micro-batch alone shows it; conversations: {dataset.sources(ids)}"


if __name__ == "__main__":  # a program of its own: this file can't import sft.py, which imports it
    os.execv(
        sys.executable,
        [sys.executable, os.path.join(venv.PROJECT, "sft.py"), "--selfcheck", *sys.argv[1:]])
