"""The loss of a head that two ranks share, with and without weights: value, gradients and what is correct are those
of one rank. Some tokens of the second half have the logits of one of the first.

loss_tp.py [ATTRIBUTE NUMBER]: with this attribute of the head, which a diff of docs/fork.md reads.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ops.loss import Head, loss
from ranks.tp import VocabParallelHead

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
rank, n, V, C = dist.get_rank(), 600, 60, 24  # three chunks
torch.manual_seed(0)
positions, targets, weights = torch.randperm(n)[:550], torch.randint(0, V, (550,)), torch.randint(0, 4, (550,)) / 2


def compute(head, hidden, given):
    hidden = hidden.clone().requires_grad_()
    out = loss(hidden, head, positions, targets, given)
    (out.total / 3).backward()
    return out.total.detach(), out.each, hidden.grad, out.correct


for dtype, tolerance, soft_cap in ((torch.float32, 1e-5, None), (torch.bfloat16, 2e-2, None),
                                   (torch.float64, 1e-12, 2.0)):
    whole = Head(C, V, bias=False).to(dtype)
    whole.soft_cap = soft_cap
    whole.weight.data[V // 2 + 5:] = whole.weight.data[5:V // 2]  # equal logits on both ranks
    dist.broadcast(whole.weight.data, 0)
    hidden = torch.randn(n, C).to(dtype) * 3
    likeliest = whole(hidden[positions]).argmax(dim=1)
    targets[:100], targets[100:200] = likeliest[:100], (likeliest[100:200] + V // 2) % V  # right, its twin
    for given in (None, weights):
        whole.weight.grad = None
        head = VocabParallelHead(whole, mesh)
        for each in (whole, head) if sys.argv[1:] else ():
            setattr(each, sys.argv[1], float(sys.argv[2]))
        (*expected, correct), (*found, found_correct) = compute(whole, hidden, given), compute(head, hidden, given)
        assert torch.equal(found_correct, correct) and torch.equal(correct, likeliest == targets)
        assert 100 <= correct.sum() < 200 and not correct[100:200].all()
        part = slice(rank * V // 2, (rank + 1) * V // 2)
        for a, b in zip((*found, head.weight.grad.to_local()), (*expected, whole.weight.grad[part]), strict=True):
            assert a.dtype == b.dtype and (a - b).norm() <= tolerance * b.norm(), (dtype, given is None)
        torch.testing.assert_close(head(hidden), whole(hidden))
        assert given is None or torch.equal(found[0], (found[1] * given).sum())
dist.barrier()
os._exit(0)  # without gloo's threads, which may abort a normal exit
