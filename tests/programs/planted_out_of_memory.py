"""Memory runs out: planted_out_of_memory.py WHERE ERROR RANK [flags of sft.py], alone or under torchrun

Planted: on rank RANK, from the second time on that the code at WHERE runs, it raises ERROR. WHERE is forward, backward,
optimizer, evaluation, load or data. ERROR is device (torch's error for an accelerator), host (Python's MemoryError),
allocator (the error of torch's allocator for the CPU, by asking it for 2**46 floats) or other (a RuntimeError that
means something else). With load and data the first time counts, with evaluation the third: once is before training.
"""

import os
import sys

import torch

import data
import sft
from disk import pretrained
from model import CausalLM
from ops import loss, optim
from settings import errors


def plant(where, kind, rank="0", put=setattr):
    """Plant the error in this process; put is setattr, or that of a monkeypatch."""
    calls = []

    def fail():
        calls.append(where)
        if os.environ.get("RANK", "0") != rank or len(calls) < {"load": 1, "data": 1, "evaluation": 3}.get(where, 2):
            return
        if kind == "device":
            text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.25 GiB."
            raise torch.OutOfMemoryError(text)
        if kind == "host":
            raise MemoryError("Unable to allocate 3.50 GiB for an array with shape (1,) and data type float32")
        if kind == "allocator":
            torch.empty(2**46)
        raise RuntimeError("shapes do not match: there is not enough memory of them")

    def planting(function, is_here=lambda *args: True):
        def wrapper(*args, **kwargs):
            if is_here(*args):
                fail()
            return function(*args, **kwargs)

        return wrapper

    if where == "forward":
        put(CausalLM, "forward", planting(CausalLM.forward, lambda model, *_: model.training))
    if where == "evaluation":
        put(CausalLM, "forward", planting(CausalLM.forward, lambda model, *_: not model.training))
    if where == "backward":
        function = loss.ChunkedLoss
        put(function, "backward", staticmethod(planting(function.backward)))
    if where == "optimizer":
        put(optim.AdamW, "step", planting(optim.AdamW.step))
    if where == "load":
        put(pretrained, "load_weights", planting(pretrained.load_weights))
    if where == "data":
        put(data, "load", planting(data.load))


if __name__ == "__main__":
    plant(*sys.argv[1:4])
    sys.argv = ["sft.py", *sys.argv[4:]]
    errors.run(sft.main)
