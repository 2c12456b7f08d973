"""Step directories: a model directory and the training state beside it, whole or absent; resume, pruning.

A step directory is written under a temporary name, flushed to the disk and renamed; `latest` moves after that. Its
manifest has the size and the checksum of every file, and no run goes on from one that differs by a bit. Everything is
safetensors or JSON: nothing read here can run code.
"""

import os
import re
import zlib

import torch
import torch.distributed as dist

from disk import files, pretrained
from settings.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by the names of its state
MANIFEST, STATE = os.path.join("training_state", "manifest.json"), os.path.join("training_state", "state.json")
READ = (".json", ".safetensors", ".jinja", ".txt", ".model")  # the endings of all that is read from a checkpoint


def save(root, step, model, layout, exported, optimizer, state, links=("latest",)):
    """Write root/step_N whole, then move root/latest, or what `links` names; return its path. All ranks call it.

    layout  what pretrained.load_weights returned;  exported  name -> bytes or JSON value, written as they stand
    state   JSON value: what the run needs to go on (see load_state)

    Weights are written in the dtype of the model that was read. Where that is narrower than the master weights
    (bf16 on the disk, fp32 in memory), training_state/ holds the masters too: resume is exact.
    """
    final, temporary = os.path.join(root, f"step_{step}"), os.path.join(root, f"tmp_step_{step}")
    (rank, size), inner = pretrained.rank_and_size(), os.path.join(temporary, "training_state")
    prefix = pretrained.ADAPTER_PREFIX if pretrained.ADAPTER_FILE in layout else ""
    if rank == 0:
        os.makedirs(root, exist_ok=True)
        for name in os.listdir(root):  # what a kill, or a save that failed, left behind
            if re.fullmatch(r"tmp_(old_)?step_\d+", name):
                files.remove(os.path.join(root, name))
            elif re.fullmatch(r"tmp_(latest|best)", name):
                os.remove(os.path.join(root, name))
        os.makedirs(inner)
        for name, content in exported.items():
            files.write_file(os.path.join(temporary, name), content)
    barrier()

    masters = pretrained.master_weights(model, optimizer)
    dtypes = {n: pretrained.DTYPES[code] for names in layout.values() for n, code in names.items()}
    names = {file: list(codes) for file, codes in layout.items()}
    if len(names) < size and not prefix:  # each rank writes its share; an adapter, which is small, is one file
        names = pretrained.numbered({n: masters[n] for n in dtypes}, "model", size)
    pretrained.write_shared(temporary, names, masters, dtypes, prefix)
    if len(names) > 1 and rank == 0:
        size_of_all = sum(masters[n].numel() * dtype.itemsize for n, dtype in dtypes.items())
        pretrained.write_index(temporary, names, size_of_all)

    trained = trained_weights(model, optimizer)
    tensors = {f"{key}.{n}": optimizer.state[p][key] for key in MOMENTS for n, p in trained.items()}
    tensors.update({f"master.{n}": p for n, p in trained.items() if p.dtype != dtypes[n]})
    inner_names = pretrained.numbered(tensors, "tensors", size)
    pretrained.write_shared(inner, inner_names, tensors, {n: t.dtype for n, t in tensors.items()})
    if rank == 0:
        files.write_file(os.path.join(temporary, STATE), {"step": step, **state})
    barrier()

    by_rank_0 = [*exported, STATE, *(["model.safetensors.index.json"] if len(names) > 1 else [])]
    sums = checksums(temporary, list(names), [os.path.join("training_state", n) for n in inner_names],
                     *([name] for name in by_rank_0))
    if rank == 0:
        files.write_file(os.path.join(temporary, MANIFEST), manifest(step, sums))
        files.sync(inner)
        files.sync(temporary)
        old = take_name(final) if os.path.exists(final) else None  # a run that went back goes over its steps again
        try:
            os.replace(temporary, final)
        except OSError:
            if old:  # latest may name it
                os.replace(old, final)
            raise
        for link in links:
            set_link(root, step, link)
        if old:
            files.remove(old)
    barrier()
    return final


def trained_weights(model, optimizer):
    """The same of what is trained, a tied one once."""
    masters = pretrained.master_weights(model, optimizer)
    return {name: masters[name] for name, p in model.named_parameters() if p.requires_grad}


def set_link(root, step, name="latest"):
    """Point root/latest (or another name) at step_N, in one move: there is no moment without it."""
    link = os.path.join(root, f"tmp_{name}")
    if os.path.lexists(link):
        os.remove(link)
    os.symlink(f"step_{step}", link)
    os.replace(link, os.path.join(root, name))
    files.sync(root)


def steps_in(root):
    """The step numbers of the whole checkpoints below root, in order; half-written ones have another name."""
    names = os.listdir(root) if os.path.isdir(root) else []
    return sorted(int(m[1]) for m in (re.fullmatch(r"step_(\d+)", name) for name in names) if m)


def prune(root, keep, step, best=None):
    """Keep the newest `keep` checkpoints up to step (None: all), and step `best`. Later ones belong to a run that went
    back."""
    for old in [s for s in steps_in(root) if s <= step][:-keep] if keep else ():
        if old != best:
            files.remove(take_name(os.path.join(root, f"step_{old}")))


def take_name(directory):
    """Rename a step directory that is to be removed: it is never seen half. Returns the new name."""
    doomed = os.path.join(os.path.dirname(directory), f"tmp_old_{os.path.basename(directory)}")
    os.replace(directory, doomed)
    return doomed


def resume_directory(resume_from, root):
    """The step directory that --resume_from means, or None where `auto` finds no checkpoint.

    Raises FileNotFoundError or ValueError for a directory that is not a whole checkpoint: never a fresh start instead.
    """
    directory = resume_from
    if resume_from == "auto":
        steps, latest = steps_in(root), os.path.join(root, "latest")
        if not steps and not os.path.lexists(latest):
            return None
        # A kill between a first checkpoint's rename and its link leaves it without one.
        directory = latest if os.path.lexists(latest) else os.path.join(root, f"step_{steps[-1]}")
    if not os.path.isdir(directory):
        raise UserError(f"--resume_from {resume_from}: there is no directory {directory}; give a step "
                        "directory such as outputs/checkpoints/step_100, or auto")
    if not os.path.exists(os.path.join(directory, STATE)):
        raise UserError(f"--resume_from {resume_from}: {directory} has no {STATE}, so it is not a "
                        "checkpoint to go on from; give another step directory, or start anew with --model")
    return os.path.realpath(directory)


def verify(directory):
    """Raise ValueError, on every rank, unless the files of a step directory are, to the bit, what `save` wrote there.

    A directory that never had a manifest can't be told from one that has lost it: neither is whole.
    """
    path, rest = os.path.join(directory, MANIFEST), ("; give --resume_from another step directory, or start a new run "
                                                     "from these weights with --model and another --output_dir")
    if not os.path.exists(path):
        raise UserError(f"{directory} has no {MANIFEST}, so nobody knows whether it is whole{rest}")
    try:
        found = files.read_json(path)
    except ValueError as error:
        raise UserError(f"{error}{rest}") from error
    step, listed = (found.get("step"), found.get("files")) if isinstance(found, dict) else (None, None)
    with open(path, "rb") as f:
        if type(step) is not int or not is_list_of_files(listed) or f.read() != manifest(step, listed):
            raise UserError(f"{path} is not as it was saved{rest}")
    numbered_as = re.fullmatch(r"step_(\d+)", os.path.basename(directory))
    if numbered_as and int(numbered_as[1]) != step:
        raise UserError(f"{path} is of step {step}, not of {numbered_as[0]}{rest}")
    wrong = []
    for name, (size, crc) in checksums(directory, sorted(listed)).items():
        if [size, crc] != listed[name]:
            wrong.append(f"{name} is missing" if size < 0 else f"{name} has {size:,} bytes, not {listed[name][0]:,}"
                         if size != listed[name][0] else f"{name} has other bytes")
    there = os.listdir(directory) + [os.path.join("training_state", n)
                                     for n in os.listdir(os.path.join(directory, "training_state"))]
    wrong += [f"{name} was not there" for name in sorted({n for n in there if n.endswith(READ)} - {*listed, MANIFEST})]
    if wrong:
        raise UserError(f"{directory} is not as it was saved: {'; '.join(wrong[:8])} ({len(wrong)} in all){rest}")


def load_state(directory):
    """The JSON state that `save` was given, with its step."""
    path = os.path.join(directory, STATE)
    state = files.read_json(path)
    step = state.get("step") if isinstance(state, dict) else None
    if type(step) is not int or step < 1:  # True is an int
        raise UserError(f"{path}: step must be a whole number of at least 1, it is {step!r:.60}; give --resume_from "
                        "another step directory")
    return state


def load_training_tensors(directory, model, optimizer, step):
    """Restore moments and master weights, exactly. Raises ValueError if a tensor is missing or misshapen."""
    inner, entries = os.path.join(directory, "training_state"), {}
    for file in sorted(os.listdir(inner)):
        if file.endswith(".safetensors"):
            entries.update(pretrained.read_header(os.path.join(inner, file)))
    trained = trained_weights(model, optimizer)
    wanted = {f"{key}.{n}": p for key in MOMENTS for n, p in trained.items()}
    saved = {n: pretrained.DTYPES.get(e.dtype) for n, e in pretrained.weight_entries(directory).items()}
    wanted.update({f"master.{n}": p for n, p in trained.items() if p.dtype != saved.get(n)})
    if set(entries) != set(wanted) or any(entries[n].shape != p.shape for n, p in wanted.items()):
        differ = sorted(set(entries) ^ set(wanted)) or "a shape"
        raise UserError(f"{inner} does not belong to this model: {differ[:5]} differ")
    for name, p in trained.items():
        moments = {key: torch.empty_like(p) for key in MOMENTS}
        for key, tensor in moments.items():
            pretrained.read_into(entries[f"{key}.{name}"], tensor)
        optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device), **moments}
    for name in (n for n in wanted if n.startswith("master.")):
        pretrained.read_into(entries[name], wanted[name])


def manifest(step, listed):
    """The bytes of a step's manifest, {"step", "files": {name: [size, CRC-32]}, "crc32": of the rest}."""
    content = {"step": step, "files": dict(sorted(listed.items()))}
    return files.encoded({**content, "crc32": zlib.crc32(files.encoded(content))})


def is_list_of_files(listed):
    """Whether what a manifest lists are names inside its directory, each with two numbers."""
    return isinstance(listed, dict) and all(
        name.isprintable() and os.path.normpath(name) == name and not name.startswith(("/", ".."))
        and isinstance(entry, list) and [type(number) for number in entry] == [int, int]
        for name, entry in listed.items())


def checksum(path):
    """(size, CRC-32) of a file, (-1, 0) where there is none: a torn end, a flipped bit, another step's file differ."""
    if not os.path.isfile(path):
        return -1, 0
    buffer, size, crc = memoryview(bytearray(2**20)), 0, 0
    with files.naming(path), open(path, "rb", buffering=0) as f:
        while n := f.readinto(buffer):
            size, crc = size + n, zlib.crc32(buffer[:n], crc)
    return size, crc


def checksums(directory, *groups):
    """name -> [size, CRC-32] of the files that the groups name; every rank calls it. They share the work: a group's
    i-th file is read by rank i, and so around, as write_shared writes them: a writer has its
    files in memory still."""
    rank, size = pretrained.rank_and_size()
    names = [name for group in groups for name in group]
    owners = [i % size for group in groups for i in range(len(group))]
    sums = torch.zeros(len(names), 2, dtype=torch.int64)
    for name, owner, row in zip(names, owners, sums):
        if owner == rank:
            row.copy_(torch.tensor(checksum(os.path.join(directory, name))))
    if dist.is_initialized():
        dist.all_reduce(sums)
    return dict(zip(names, sums.tolist()))


def barrier():
    if dist.is_initialized():
        dist.barrier()
