"""Checks of a single step: is its gradient the same in every layout, do adapters learn, where does NaN begin.

    python tools/selfcheck.py --model tiny   # same as sft.py --selfcheck: compare layouts, then exit

A layout is one way to split a step over micro-batches and ranks. The checks compute gradients that the
training loop never computes: of one micro-batch, or of another layout. The argument `backward` is
sft.backward, which this file cannot import: sft.py imports this file.
"""

if __name__ == "__main__":
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from settings import venv

    venv.enter()  # where torch is missing, continue in the .venv that train.sh made

import math

import torch
import torch.distributed as dist

import data
import fsdp
from ops import packing
from ops.memory import local
from screen import samples
from settings.errors import NonFiniteError, UserError

# relative differences up to these are rounding, by the dtype of the computation
LIMITS = {"fp32": 1e-5, "bf16": 2e-2}
# A difference is relative to the tensor's gradient, or to this part of the whole gradient if that is more: a
# gradient of 1e-6 beside one of 1, as of the few numbers of A_log, is mostly rounding.
FLOOR = 1e-3


def compare(backward, model, dataset, ids, cfg, ranks):
    """Compare loss and gradients of one step in several layouts; print their largest relative difference.

    The layouts cut the step's conversations into micro-batches in different ways, with and without
    checkpointing. With several data-parallel ranks, one layout computes everything on one of them; with --sp,
    one computes each conversation on a single rank, which needs the memory for it.

    ids  the step's conversations

    Raises UserError if a difference is larger than rounding explains.
    """
    limit = LIMITS[cfg.dtype_on(ranks.device)]
    max_length, n_blocks = cfg.max_length, len(model.model.layers)
    checkpointed = model.model.checkpointed_blocks
    layouts = {
        "as configured": dict(zip(("capacity", "max_conversations"), packing.limits(cfg))),
        "one conversation per micro-batch": dict(capacity=max_length, max_conversations=1),
        "one micro-batch": dict(capacity=len(ids) * max_length),
        f"checkpointing {'off' if checkpointed else 'on'}": dict(
            capacity=max_length, checkpointed=0 if checkpointed else n_blocks),
    }
    if ranks.dp_size > 1:
        layouts["one data-parallel rank"] = dict(capacity=max_length, on_one_rank=True)
    if ranks.sp_size > 1:
        layouts["no sequence parallelism"] = dict(capacity=max_length, uses_sp=False)
    model.eval()  # no dropout: its masks depend on the layout
    base, worst = None, 0.0
    for name, layout in layouts.items():
        model.model.checkpointed_blocks = layout.pop("checkpointed", checkpointed)
        loss, gradients = gradient(backward, model, dataset, ids, ranks, **layout)
        base = base or (loss, gradients)
        norms = torch.stack([b.norm() for b in base[1]])
        differences = torch.stack([(a - b).norm() for a, b in zip(gradients, base[1])])
        differences = differences / norms.clamp(min=max(FLOOR * norms.norm().item(), 1e-30))
        largest = all_reduce_max(differences.max()[None], ranks)
        difference = max(*largest, abs(loss / base[0] - 1).item())
        worst = max(worst, difference)
        if ranks.rank == 0:
            print(f"{name:32} loss {loss.item():.8f}   relative difference {difference:.1e}")
    if not worst <= limit:
        raise UserError(f"selfcheck: the gradient depends on the layout: relative difference {worst:.1e}, "
                        f"above {limit}")
    if ranks.rank == 0:
        print(f"selfcheck: ok, {len(ids)} conversations, all differences below {limit}")


def gradient(backward, model, dataset, ids, ranks, *, capacity, max_conversations=None, on_one_rank=False,
             uses_sp=True):
    """(loss, this rank's shard of every gradient) of a step in one layout."""
    weight, limits = dataset.count(ids)["target_weight"], (capacity, max_conversations)
    part = dict(sp_rank=ranks.sp_rank, sp_size=ranks.sp_size)
    if on_one_rank:
        batches = list(data.micro_batches(dataset, ids, *limits, **part))
        if ranks.dp_rank:  # as many empty micro-batches: every rank takes part in the collectives
            batches = list(data.micro_batches(dataset, ids[:0], *limits, **part)) * len(batches)
    elif uses_sp:
        batches = list(data.micro_batches(
            dataset, ids, *limits, dp_rank=ranks.dp_rank, dp_size=ranks.dp_size, **part))
    else:
        batches = list(data.micro_batches(
            dataset, ids, *limits, dp_rank=ranks.tokens_rank, dp_size=ranks.dp_size * ranks.sp_size))
    loss = backward(model, batches, weight, ranks)
    parameters = trained_parameters(model)
    gradients = [local(p.grad).clone() for p in parameters]
    for p in parameters:
        p.grad = None
    return ranks.all_reduce(loss), gradients


def all_reduce_max(values, ranks):
    """Element-wise maximum over all ranks, as a list of floats."""
    values = values.to(ranks.device, torch.float32)
    if ranks.world_size > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


def trained_parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def check_adapters(model, ranks):
    """Raise UserError if an adapter cannot learn: in the first step each lora_B must have a gradient."""
    gradients = {name: p.grad for name, p in model.named_parameters() if ".lora_B." in name}
    none = torch.zeros((), dtype=torch.bool, device=ranks.device)
    is_nonzero = torch.stack([none if g is None else local(g).any().to(none) for g in gradients.values()])
    is_nonzero = all_reduce_max(is_nonzero, ranks)
    dead = [name for name, nonzero in zip(gradients, is_nonzero) if not nonzero]
    if dead:
        raise UserError(f"{len(dead)} of {len(gradients)} adapters have no gradient and would never learn: "
                        f"{', '.join(dead[:5])}")


def stop_non_finite(backward, model, dataset, bad, cfg, ranks):
    """Raise NonFiniteError for a step, and name its micro-batch.

    bad  (step, its conversations, a text with loss and norm), see screen.log.Log.read
    """
    step, ids, numbers = bad
    ranks.set_phase(f"step {step}")
    where = find_non_finite(backward, model, dataset, ids, cfg, ranks)
    raise NonFiniteError(f"step {step}: {numbers}; stopped before the weights were updated. {where}")


def find_non_finite(backward, model, dataset, ids, cfg, ranks):
    """Return a text that names the first micro-batch of a step whose loss or gradient is not finite.

    Computes each micro-batch alone, one rank after another. This takes as long as dp_size steps, but happens
    only once, when a run has to stop. The gradient of the next step, which may be there, is dropped.
    """
    limits, part = packing.limits(cfg), dict(sp_rank=ranks.sp_rank, sp_size=ranks.sp_size)
    weight, parameters = dataset.count(ids)["target_weight"], trained_parameters(model)
    (empty,) = data.micro_batches(dataset, ids[:0], *limits, **part)
    for dp_rank in range(ranks.dp_size):
        batches = data.micro_batches(dataset, ids, *limits, dp_rank=dp_rank, dp_size=ranks.dp_size, **part)
        for number, batch in enumerate(batches, 1):
            losses = samples.ConversationLosses(dataset, ranks).restart(batch.ids)
            is_mine = dp_rank == ranks.dp_rank
            for p in parameters:
                p.grad = None
            loss = backward(
                model, [batch if is_mine else empty], weight, ranks, losses if is_mine else None)
            if math.isfinite(ranks.all_reduce(loss).item()) and fsdp.grad_norm(model).isfinite():
                continue
            bad = batch.ids[~ranks.all_reduce(losses.sums).isfinite().cpu().numpy()[batch.ids]]
            suspects = bad if len(bad) else batch.ids  # only the gradient is bad: it may be any of them
            rank = dp_rank * ranks.world_size // ranks.dp_size
            return f"rank {rank}, micro-batch {number}; conversations: {dataset.sources(suspects)}"
    return f"each micro-batch by itself is finite; conversations: {dataset.sources(ids)}"


if __name__ == "__main__":  # starts sft.py as a new program: importing it here would be circular
    os.execv(
        sys.executable,
        [sys.executable, os.path.join(venv.PROJECT, "sft.py"), "--selfcheck", *sys.argv[1:]])
