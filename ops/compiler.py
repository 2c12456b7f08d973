"""Whether torch.compile can generate kernels for a device."""

import functools
import importlib
import os
import shutil

import torch


@functools.cache
def has_compiler(device_type):
    """Whether a function that runs on this device should be compiled; device_type is "cuda", "cpu" or "meta".

    True on CUDA of compute capability 7.0 or newer, with Triton and a C compiler, which Triton calls; torch's
    own TORCH_COMPILE_DISABLE=1 turns it off. The CPU stays eager: compiled, its results would change.
    """
    if device_type != "cuda" or os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return False
    try:
        importlib.import_module("triton")  # slow, and only CUDA needs it
    except ImportError:
        return False
    names = (os.environ["CC"],) if os.environ.get("CC") else ("gcc", "clang")
    return any(map(shutil.which, names)) and torch.cuda.get_device_capability() >= (7, 0)
