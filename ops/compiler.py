"""Whether torch.compile is used: what --compile means, and a try on the device.

On CUDA it needs Triton, a C compiler and Python's headers; on the CPU a C++ compiler. torch reports that one
is missing only when it compiles. So `auto` compiles one tiny function first.
"""

import functools
import os
import subprocess
import textwrap

import torch


def choose(setting, device, tp=1):
    """Whether the blocks are compiled.

    setting  --compile: True, False or "auto": on CUDA, if the try succeeds. On the CPU, compilation takes
             longer than it saves in a short run, and results change in their last bits
    device   torch.device of the computation
    tp       ranks that share a matrix; with more than one, blocks are not compiled

    Where the try fails, prints why, once per machine.
    """
    if setting != "auto":
        return setting
    if device.type != "cuda" or tp > 1:
        return False
    reason = failure(device.type)
    if reason and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"compile  off: {reason}; --compile true shows the error", flush=True)
    return reason is None


def has_compiler(device_type):
    """Whether a function that runs on this device should be compiled; device_type is "cuda", "cpu" or "meta".

    The CPU stays eager: compiled, its results would change.
    """
    return device_type == "cuda" and failure(device_type) is None


@functools.cache
def failure(device_type):
    """Compile and run a tiny function on the device. Returns None, or one line that says why it failed.

    Takes a few seconds. Other errors than those of a compiler that fails or is missing are raised.
    """
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return "TORCH_COMPILE_DISABLE is 1"
    from torch._dynamo.exc import BackendCompilerFailed  # takes a second
    from torch._inductor.exc import GPUTooOldForTriton, InvalidCxxCompiler, TritonMissing

    # Inductor wraps its compilers' errors in a BackendCompilerFailed, but not these (torch 2.11 to 2.13).
    # Triton may call the C compiler as late as at a kernel's first run.
    unwrapped = GPUTooOldForTriton, InvalidCxxCompiler, TritonMissing, subprocess.CalledProcessError
    try:
        torch.compile(add_and_double)(torch.ones(8, device=device_type))
    except BackendCompilerFailed as error:
        return one_line(error.inner_exception)
    except unwrapped as error:
        return one_line(error)
    return None


def add_and_double(x):
    return (x + 1) * 2


def one_line(error):
    """The type of an error and the first line of its text that contains "error:", or the first line."""
    lines = str(error).splitlines() or [""]
    line = next((line for line in lines if "error:" in line.lower()), lines[0])
    return textwrap.shorten(f"{type(error).__name__}: {line}", 160, placeholder=" ...")
