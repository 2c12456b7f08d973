"""Host and device at work at the same time: batches made ahead, copies that nobody waits for, late reading.

CUDA queues what the host asks for and computes behind it. The queue must not run empty: the host must neither
wait for the device nor make it wait. On the CPU nothing here changes a result.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import torch


def ahead(items, device):
    """Yield the items of an iterator. A thread makes the next one meanwhile; errors are raised here.

    device  the thread's CUDA device, so that pinned memory belongs to its context
    """
    def start():
        if device.type == "cuda":
            torch.cuda.set_device(device)

    with ThreadPoolExecutor(1, initializer=start) as pool:
        item = pool.submit(next, items, None)
        while (made := item.result()) is not None:
            item = pool.submit(next, items, None)
            yield made


def to_device(array, device):
    """A NumPy array as a tensor on a device, through pinned memory on CUDA: the host does not wait."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Figures:
    """The few numbers of a step that the host reads, and the step's seconds. Made when the step begins.

    They are read when the next step's backward is queued. `.tolist()` would wait for that backward too. So
    they are copied to pinned memory, and the host waits only for the event behind the copy.
    """

    def __init__(self, device):
        self.device, self.is_cuda = device, device.type == "cuda"
        self.begin = self.now()

    def now(self):
        """A point in time of the device, an event on CUDA; elsewhere the device computes with the host."""
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def queue(self, **tensors):
        """Copy () or (k,) tensors to the host as soon as they are computed. The step ends here.

        None is omitted, and so is a tensor without elements.
        """
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None and tensor.numel()}
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        # with offload, some are computed on the host
        self.numbers = torch.cat([t.to(self.device, torch.float64).reshape(-1) for t in tensors.values()])
        if self.is_cuda:
            pinned = torch.empty(self.numbers.shape, dtype=self.numbers.dtype, pin_memory=True)
            self.numbers = pinned.copy_(self.numbers, non_blocking=True)
        self.end = self.now()

    def read(self):
        """({name: float or list}, seconds from the step's beginning to its end). Waits for the device."""
        if self.is_cuda:
            self.end.synchronize()
            seconds = self.begin.elapsed_time(self.end) / 1000
        else:
            seconds = self.end - self.begin
        parts = self.numbers.split([shape.numel() for shape in self.shapes.values()])
        named = zip(self.shapes.items(), parts)
        return {name: part.view(shape).tolist() for (name, shape), part in named}, seconds
