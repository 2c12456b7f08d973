"""Stages 0 and 1 of tools/gpu_check.py: what the machine can do, and each kernel against a reference.

Every function here runs in a process that tools/gpu_stages.py has started, and fills its Report.
"""

import collections
import functools
import importlib.metadata
import importlib.util
import inspect
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from ops import attention, nf4, optim
from ops.loss import Head, loss
from settings import venv


def seconds_of(action, device, repeats=10):
    """Median seconds of action() after a warm-up, by device events on CUDA."""
    action()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            action()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        else:
            started = time.perf_counter()
            action()
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def relative_error(value, reference):
    """||value - reference|| / ||reference|| in fp64; infinite where either has a NaN."""
    value, reference = value.detach().double(), reference.detach().double().to(value.device)
    error = ((value - reference).norm() / reference.norm().clamp_min(1e-30)).item()
    return error if math.isfinite(error) else math.inf


def poison(device):
    """Leave NaN in the memory that the next tensors get: an element that is never written then shows."""
    if device.type == "cuda":
        torch.full((2**28,), math.nan, device=device)  # freed at once, and kept by torch's allocator
        for n in (2**10, 2**14, 2**18):
            torch.full((n,), math.nan, device=device)


def nvidia_smi(fields):
    """What nvidia-smi says of the GPU, without starting CUDA in this process; "" where it is missing."""
    if not shutil.which("nvidia-smi"):
        return ""
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    return subprocess.run(query, stdout=subprocess.PIPE, text=True).stdout.strip()


def gpu_name():
    return nvidia_smi("name")


# ------------------------------------------------------------------------------------------------------------
# 0: the machine


def write_shim(directory):
    """Write a package flash_attn, of flash_attn_names.py, into a directory; return a PYTHONPATH with it."""
    package = os.path.join(directory, "flash_attn")
    # importlib.metadata finds the package by this directory
    described = os.path.join(directory, "flash_attn-2.8.3.dist-info")
    for path in (package, described):
        os.makedirs(path, exist_ok=True)
    names = os.path.join(venv.PROJECT, "tools", "flash_attn_names.py")
    shutil.copy(names, os.path.join(package, "__init__.py"))
    with open(os.path.join(package, "bert_padding.py"), "w", encoding="utf-8") as f:
        f.write("from transformers.modeling_flash_attention_utils import _pad_input as pad_input\n"
                "from transformers.modeling_flash_attention_utils import _unpad_input as unpad_input\n")
    texts = {"METADATA": "Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n",
             "top_level.txt": "flash_attn\n", "RECORD": "flash_attn/__init__.py,,\n"}
    for name, text in texts.items():
        with open(os.path.join(described, name), "w", encoding="utf-8") as f:
            f.write(text)
    return os.pathsep.join(filter(None, (directory, os.environ.get("PYTHONPATH"))))


def versions():
    """{package: version} of what takes part; None where it is not installed."""
    found = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("torch", "triton", "transformers", "trl", "peft", "accelerate", "datasets", "liger-kernel"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def copy_rate(n, device):
    """Bytes read and written per second by a copy of n fp32 numbers."""
    x = torch.randn(n, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / seconds_of(lambda: y.copy_(x), device)


def product_rate(n, device):
    """Floating-point operations per second of a product of two (n, n) matrices in bf16."""
    a, b = torch.randn(2, n, n, dtype=torch.bfloat16, device=device)
    return 2 * n**3 / seconds_of(lambda: a @ b, device)


def hardware(report):
    """Versions, and the ceilings that all other figures are divided by."""
    device, on_cuda = report.device, not report.is_tiny
    trl = None
    if importlib.util.find_spec("trl"):  # 10 s, so beside the rest
        code = "import transformers.utils as u, trl; print(trl.__version__, u.is_flash_attn_2_available())"
        trl = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": write_shim(os.path.join(report.scratch, "shim"))})
    report.add(gpu=gpu_name(), cores=os.cpu_count(), versions=versions())
    if on_cuda:
        report.add(nvidia_smi=nvidia_smi("driver_version,memory.total,memory.used,clocks.sm,power.limit"))
    report.add(copy_tb_per_second=copy_rate(report.pick(2**30, 2**16), device) / 1e12,
               product_tflops=product_rate(report.pick(8192, 256), device) / 1e12)
    for name, is_pinned in (("pinned", on_cuda), ("pageable", False)):
        host = torch.randn(report.pick(2**27, 2**16), pin_memory=is_pinned)
        there = host.to(device)
        report.add(**{
            f"to_device_{name}_gb": host.nbytes / 1e9 / seconds_of(lambda: there.copy_(host), device, 5),
            f"to_host_{name}_gb": host.nbytes / 1e9 / seconds_of(lambda: host.copy_(there), device, 5)})
    if trl:
        printed = trl.communicate()[0].strip()
        report.add(trl_and_flash_attn=printed)
        # transformers finds FlashAttention-2 only where CUDA is
        report.check("trl_imports", trl.returncode == 0 and (report.is_tiny or printed.endswith("True")))
    p = torch.nn.Parameter(torch.randn(report.pick(2**27, 2**16)))
    p.grad = torch.randn_like(p)
    optimizer = optim.AdamW([dict(params=[p], weight_decay=0.01)], lr=1e-4, betas=(0.9, 0.95), eps=1e-8)
    seconds = seconds_of(optimizer.step, torch.device("cpu"), 5)
    report.add(host_adamw_gb=28 * p.numel() / 1e9 / seconds)  # reads 16 bytes per parameter, writes 12
    from torch.nn.attention.varlen import varlen_attn  # imports much of torch
    report.add(varlen_attn=str(inspect.signature(varlen_attn))[:400])


# ------------------------------------------------------------------------------------------------------------
# 1: kernels against references


def reference_attention(q, k, v, lengths, window):
    """Causal attention within each document, from its definition: scores, mask, softmax."""
    outputs = []
    for q, k, v in zip(q.split(lengths), k.split(lengths), v.split(lengths)):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
        position = torch.arange(q.shape[0], device=q.device)
        distance = position[:, None] - position
        invisible = (distance < 0) | (distance >= (window or q.shape[0]))
        weights = scores.masked_fill(invisible, -math.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)


def outputs_and_gradients(function, tensors, grad, *arguments):
    """[function's output, gradient of each tensor] for the gradient `grad` of the output."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    poison(grad.device)
    output = function(*tensors, *arguments)
    output.backward(grad.to(output.dtype))
    return [output.detach(), *(x.grad for x in tensors)]


def attention_functions(device):
    """({name: attention function}, function that makes Documents of lengths). One varlen call needs CUDA."""
    functions = {"each": attention.attend_each}
    if device.type == "cuda":
        functions["varlen"] = attention.varlen_attention()
    return functions, functools.partial(attention.Documents.of, device=device)


def check_attention(report):
    """Attention by document and in one call: against fp64, twice with --deterministic's settings, timed."""
    device = report.device
    functions, documents_of = attention_functions(device)
    report.check("varlen_is_used", "varlen" in functions or report.is_tiny)
    lengths = report.pick((1, 7, 128, 2048), (1, 7, 33))
    documents = documents_of(lengths)
    heads = report.pick(((14, 2, 64), (28, 4, 128), (16, 8, 128)), ((4, 2, 16),))
    forward, backward = collections.defaultdict(float), collections.defaultdict(float)
    for (H, K, D) in heads:
        for window in (None, 1, 64):
            q, grad = torch.randn(2, sum(lengths), H, D, device=device, dtype=torch.bfloat16)
            k, v = torch.randn(2, sum(lengths), K, D, device=device, dtype=torch.bfloat16)
            reference = outputs_and_gradients(
                reference_attention, [x.double() for x in (q, k, v)], grad.double(), lengths, window)
            for name, function in functions.items():
                found = outputs_and_gradients(function, (q, k, v), grad, documents, window)
                errors = [relative_error(a, b) for a, b in zip(found, reference)]
                if window == 1:  # each token sees itself only: q and k have no gradient to compare with
                    errors = [errors[0], errors[3]]
                forward[name] = max(forward[name], errors[0])
                backward[name] = max(backward[name], *errors[1:])
    report.add(attention_forward_error=max(forward.values()), attention_backward_error=max(backward.values()),
               attention_errors={"forward": dict(forward), "backward": dict(backward)})
    report.check("attention_forward", max(forward.values()) < 1e-2)
    report.check("attention_backward", max(backward.values()) < 2e-2)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    for name, function in functions.items():
        first, second = (outputs_and_gradients(function, (q, k, v), grad, documents, None) for _ in range(2))
        report.check(f"{name}_is_deterministic", all(map(torch.equal, first, second)))
    torch.use_deterministic_algorithms(False)
    microseconds = {}
    for (H, K, D) in heads:
        for n, length in report.pick(((8, 2048), (64, 256)), ((2, 16),)):
            q = torch.randn(n * length, H, D, device=device, dtype=torch.bfloat16, requires_grad=True)
            k, v = torch.randn(2, n * length, K, D, device=device, dtype=torch.bfloat16).unbind()
            k.requires_grad_(), v.requires_grad_()
            documents = documents_of((length,) * n)
            for name, function in functions.items():
                action = forward_backward(function, q, k, v, documents)
                microseconds[f"{name} {H}/{K}x{D} {n}x{length}"] = 1e6 * seconds_of(action, device, 5)
    report.add(attention_us=microseconds)


def forward_backward(function, q, k, v, documents):
    return lambda: function(q, k, v, documents, None).sum().backward()


def check_loss(report):
    """The chunked loss and its gradients in bf16 against fp32, and its speed with a vocabulary of 151,936."""
    device, dtype = report.device, torch.bfloat16
    N, C, V = report.pick((4196, 896, 151936), (600, 32, 512))
    head = Head(C, V, bias=False, device=device, dtype=dtype)
    torch.nn.init.normal_(head.weight, std=0.02)
    hidden = torch.randn(N, C, device=device, dtype=dtype, requires_grad=True)
    positions, targets = torch.arange(1, N, 2, device=device), torch.randint(V, (N // 2,), device=device)
    poison(device)
    total = loss(hidden, head, positions, targets).total
    total.backward()
    exact = [x.detach().float().requires_grad_() for x in (hidden, head.weight)]
    reference = F.cross_entropy(exact[0][positions] @ exact[1].T, targets, reduction="sum")
    reference.backward()
    errors = {"total": relative_error(total, reference), "hidden": relative_error(hidden.grad, exact[0].grad),
              "weight": relative_error(head.weight.grad, exact[1].grad)}
    report.add(loss_errors=errors)
    for name, limit in (("total", 1e-3), ("hidden", 1e-2), ("weight", 1e-2)):
        report.check(f"loss_{name}", errors[name] < limit)
    del exact, reference
    N = report.pick(16384, 600)
    hidden = torch.randn(N, C, device=device, dtype=dtype, requires_grad=True)
    positions, targets = torch.arange(N, device=device), torch.randint(V, (N,), device=device)
    seconds = seconds_of(lambda: loss(hidden, head, positions, targets).total.backward(), device, 5)
    report.add(loss_us_per_target=1e6 * seconds / N)
    if device.type == "cuda":  # a product with fp32 results from bf16 factors, which only CUDA has
        a, b = (torch.randn(shape, device=device, dtype=dtype) for shape in ((V, 1024), (1024, C)))
        total = torch.randn(V, C, device=device)
        expected = total + a.float() @ b.float()
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
        report.add(addmm_fp32_error=relative_error(total, expected))
        report.check("addmm_fp32", report.values["addmm_fp32_error"] < 1e-5)


def check_nf4(report):
    """NF4 on the device against the CPU: the stored bytes and the dequantised values, bit by bit."""
    rows, columns = report.pick((4872, 3584), (72, 200))
    weight = torch.randn(rows, columns).mul_(0.02).to(torch.bfloat16)
    stored, values = [], []
    for device in (torch.device("cpu"), report.device):
        packed = nf4.empty(rows, columns, device).zero_()
        nf4.quantize_(nf4.views(packed, columns), weight.to(device))
        stored.append(packed.cpu())
        storage = nf4.views(packed, columns)
        values.append(nf4.dequantize(storage, torch.bfloat16, 0, rows, columns).cpu())
    report.check("nf4_bytes", torch.equal(*stored))
    report.check("nf4_values", torch.equal(*values))
    x = torch.randn(64, columns, device=report.device, dtype=torch.bfloat16)
    y = nf4.matmul(x, storage, columns, transpose=True)
    report.add(nf4_product_error=relative_error(y, x.float() @ values[1].to(report.device).float().T))
    report.check("nf4_product", report.values["nf4_product_error"] < 1e-2)


def check_optimizer(report):
    """AdamW with its state in host memory against AdamW on the CPU, bit by bit; on the device, to 1e-6."""
    start, *grads = torch.randn(4, report.pick(2**22, 2**12))
    results = {}
    for name, device, offload in (("cpu", "cpu", False), ("device", report.device, False),
                                  ("host", report.device, True)):
        p = torch.nn.Parameter(start.to(device, copy=True))
        groups = [dict(params=[p], weight_decay=0.01)]
        optimizer = optim.build(optim.AdamW, groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, offload=offload)
        for grad in grads:
            p.grad = grad.to(device, copy=True)
            optimizer.step()
        results[name] = p.detach().cpu()
        if name == "device":
            optimizer.step(skip=torch.ones((), device=device))
            report.check("a_skipped_step_changes_nothing", torch.equal(p.detach().cpu(), results[name]))
    report.add(adamw_error=relative_error(results["device"], results["cpu"]))
    report.check("host_adamw_equals_adamw", torch.equal(results["host"], results["cpu"]))
    report.check("adamw_on_device", report.values["adamw_error"] < 1e-6)


def kernels(report):
    for part in (check_loss, check_nf4, check_optimizer, check_attention):
        part(report)
