"""The thread that writes this rank's files of a save, and safetensors files written tensor by tensor.

A file is written once, from its first byte to its last. Its checksum is computed on the way, so nothing is
read back. Memory: two buffers; with in_memory, a copy of all that is written.
"""

import itertools
import json
import math
import os
import queue
import threading
import zlib
from collections import deque

import torch

from disk import files
from disk.pretrained import BITS, DTYPES
from disk.shards import CopiedTensor
from ops.optim import CopyStream
from settings.errors import UserError

BUFFER = 2**25  # bytes of each of the two buffers, and of a write
CODES = {dtype: code for code, dtype in DTYPES.items()}
DTYPE_ORDER = list(BITS)  # safetensors' order in a file: by dtype, then by the bytes of the name


class Writer(threading.Thread):
    """The thread that writes this rank's files of one save.

    directory  of the step; names of files are relative to it
    device     where the tensors are
    in_memory  copy the tensors to host memory first; `finish` then writes while the training continues

    At most one tensor waits for the thread, and one is being written: the main thread waits in `submit`.
    After an error the thread does nothing more, and the main thread gets the error from `submit` or `wait`.
    A daemon: the process can end while it writes, and what it has written then has no name yet.
    """

    def __init__(self, directory, device, in_memory=False):
        super().__init__(daemon=True, name="save")
        self.directory, self.device, self.in_memory = directory, device, in_memory
        self.jobs, self.error, self.buffers = queue.Queue(1), None, None
        self.last_jobs = []  # what `finish` does
        self.n_bytes = 0  # written so far
        self.opened = {}  # name of a file of tensors -> {name: (dtype code, shape)}
        self.sums = {}  # name of a file that this rank has written -> (size, CRC-32)
        self.start()
        self.submit(self.prepare)

    def prepare(self):
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a new thread has device 0
        self.buffers = Buffers(self.device)

    def run(self):
        while job := self.jobs.get():
            function, *arguments = job
            try:
                if self.error is None:
                    function(*arguments)
            except BaseException as error:  # `wait` raises it in the main thread
                self.error = error
            del job, arguments  # frees the tensor before the next one comes
            self.jobs.task_done()
        self.jobs.task_done()

    def submit(self, function, *arguments):
        """Queue a call; it is done after those before it. Raises the error of an earlier one."""
        if self.error is not None:
            raise self.error
        self.jobs.put((function, *arguments))

    def wait(self):
        """Wait until all calls are done. Raises their error."""
        self.jobs.join()
        if self.error is not None:
            raise self.error

    def is_idle(self):
        """Whether all calls are done. Raises their error."""
        if self.error is not None:
            raise self.error
        return self.jobs.unfinished_tasks == 0

    def open(self, name, tensors, metadata=None):
        """A new TensorFile of this rank."""
        file = TensorFile(os.path.join(self.directory, name), tensors, metadata, self)
        self.opened[name] = tensors
        self.last_jobs.append((self.flush, name, file))
        return file

    def flush(self, name, file):
        self.sums[name] = file.flush()

    def write_file(self, name, content):
        """Write a small file, bytes or a JSON value as it is now."""
        content = content if isinstance(content, bytes) else files.encoded(content)
        self.sums[name] = len(content), zlib.crc32(content)
        path = os.path.join(self.directory, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self.last_jobs.append((files.write_file, path, content))

    def finish(self):
        """Let the thread write what is left, flush all files to the disk, and end. Does not wait for it.

        Before that, wait until it needs the model's tensors no longer: then the training may change them.
        """
        if self.in_memory:
            self.wait()
        self.submit(self.do_last_jobs)
        self.jobs.put(None)

    def do_last_jobs(self):
        while self.last_jobs:
            function, *arguments = self.last_jobs.pop(0)
            function(*arguments)


class TensorFile:
    """A safetensors file that is written tensor by tensor, byte for byte as safetensors' save_file does.

    tensors   {name: (dtype code, shape)}; `names` has their order in the file
    metadata  {key: text} beside the format
    """

    def __init__(self, path, tensors, metadata, writer):
        self.path, self.writer = path, writer
        self.names = in_order(tensors)
        header, end = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
        for name in self.names:
            code, shape = tensors[name]
            start, end = end, end + math.prod(shape) * BITS[code] // 8
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
        header = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        # Bytes, and tensors to copy, that are not yet written
        self.held = deque([len(header).to_bytes(8, "little") + header])
        self.file, self.size, self.crc = None, 0, 0
        self.full_size = 8 + len(header) + end
        self.copied = []  # (CopiedTensor, its position in this file)

    def add(self, tensor, dtype):
        """Write the next tensor of `names`, or keep a copy of it in host memory. Called by the thread.

        dtype  in the file. A tensor may also come in pieces, in order: its bytes, with dtype uint8

        A CopiedTensor needs no copy there: its bytes stay on the disk until they are written.
        """
        if isinstance(tensor, CopiedTensor):
            self.held.append(tensor)
            if not self.writer.in_memory:
                self.write_held()
            return
        for view in self.writer.buffers.views(tensor, dtype):
            if self.writer.in_memory:
                self.held.append(bytes(view))
            else:
                self.write_held()
                self.write(view)

    def write(self, data):
        with files.naming(self.path):
            if self.file is None:
                self.file = open(self.path, "wb")
            self.file.write(data)
        self.size += len(data)
        self.writer.n_bytes += len(data)
        self.crc = zlib.crc32(data, self.crc)

    def write_held(self):
        while self.held:
            data = self.held.popleft()
            if isinstance(data, CopiedTensor):
                self.copy(data)
            else:
                self.write(data)

    def copy(self, tensor):
        """Write a CopiedTensor. Raises UserError if it is not what it was when the run began."""
        checksum = 0
        self.copied.append((tensor, self.size))
        for data in tensor.chunks():
            self.write(data)
            checksum = zlib.crc32(data, checksum)
        if checksum != tensor.checksum:
            raise UserError(f"{tensor.entry.file} has changed since the run began: it was overwritten, and a "
                            "checkpoint needs its other tensors; restore the file and resume from the last "
                            "checkpoint")

    def flush(self):
        """Write what is held, flush the file to the disk and close it; return (size, CRC-32)."""
        self.write_held()
        assert self.size == self.full_size, f"{self.path} has other tensors than were saved"
        with files.naming(self.path), self.file:
            self.file.flush()
        files.sync(self.path)
        source = open(self.path, "rb", buffering=0) if self.copied else None
        for tensor, start in self.copied:
            tensor.written = source, start
        return self.size, self.crc


def in_order(tensors):
    """The names of {name: (dtype code, shape)} in the order that a file has them."""
    return sorted(tensors, key=lambda name: (DTYPE_ORDER.index(tensors[name][0]), name))


class Buffers:
    """Two buffers through which tensors come to the host: while one is written, the other one is filled."""

    def __init__(self, device):
        self.device, self.buffers = device, None
        self.stream = CopyStream(device)

    def views(self, tensor, dtype):
        """The bytes of a tensor in `dtype`, as memory views. A view is valid until the next one is taken."""
        flat = tensor.detach().contiguous().view(-1)
        chunks = flat.split(BUFFER // dtype.itemsize)
        if flat.device.type == "cpu" and flat.dtype == dtype:
            yield from map(memory, chunks)  # no copy
            return
        if self.buffers is None:
            self.buffers = [self.stream.empty(BUFFER // 4).view(torch.uint8) for _ in range(2)]
        copies = (self.copy(chunk, buffer, dtype)
                  for chunk, buffer in zip(chunks, itertools.cycle(self.buffers)) if chunk.numel())
        following = next(copies, None)
        while following is not None:
            (copied, event), following = following, next(copies, None)
            self.stream.wait(event)
            yield memory(copied)

    def copy(self, chunk, buffer, dtype):
        """Queue the copy of a chunk into a buffer; return (the copy, the event behind it)."""
        target = buffer[: chunk.numel() * dtype.itemsize].view(dtype)
        return target, self.stream.copy(target, chunk)


def memory(tensor):
    """The bytes of a contiguous tensor on the CPU."""
    return memoryview(tensor.view(torch.uint8).numpy())


def write_safetensors(path, tensors):
    """Write {name: tensor or CopiedTensor} and flush it. The bytes are those of safetensors' save_file."""
    stored = {name: stored_as(tensor) for name, tensor in tensors.items()}
    write_tensors(path, stored, tensors.__getitem__)


def write_tensors(path, stored, tensor_of):
    """Write a safetensors file tensor by tensor, and flush it. At most three tensors are in memory.

    stored     {name: (dtype code, shape)}
    tensor_of  a function: name -> the tensor, in any dtype, or CopiedTensor. If it raises, the file remains
               incomplete
    """
    directory, name = os.path.split(path)
    writer = Writer(directory, torch.device("cpu"))
    try:
        file = writer.open(name, stored)
        for name in file.names:
            writer.submit(file.add, tensor_of(name), DTYPES.get(stored[name][0]))
        writer.submit(writer.do_last_jobs)
    finally:
        writer.jobs.put(None)
        writer.join()  # a caller may remove the directory
    writer.wait()


def stored_as(tensor):
    """(dtype code, shape) with which a file has a tensor or CopiedTensor."""
    if isinstance(tensor, CopiedTensor):
        return tensor.entry.dtype, tensor.entry.shape
    return CODES[tensor.dtype], tuple(tensor.shape)
