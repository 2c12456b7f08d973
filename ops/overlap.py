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

    They are read when the next step's backward is queued. `.tolist()` would wait for that backward too. So the
    numbers are copied to pinned memory, and the host waits only for the event behind the copy.
    """

    def __init__(self, device):
        self.is_cuda, self.numbers = device.type == "cuda", None
        self.begin, self.end = self.now(), None

    def now(self):
        """A point in time of the device, an event on CUDA; elsewhere the device computes with the host."""
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def queue(self, numbers):
        """Copy () tensors to the host as soon as they are computed. The step ends here."""
        numbers = torch.stack([number.double() for number in numbers])
        if self.is_cuda:
            self.numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self.numbers.copy_(numbers, non_blocking=True)
        else:
            self.numbers = numbers
        self.end = self.now()

    def read(self):
        """(the numbers, as a list of floats, seconds from begin to end). Waits for the device."""
        if not self.is_cuda:
            return self.numbers.tolist(), self.end - self.begin
        self.end.synchronize()
        return self.numbers.tolist(), self.begin.elapsed_time(self.end) / 1000
