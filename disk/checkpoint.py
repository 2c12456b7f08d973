"""Step directories: a model directory with the training state beside it, complete or absent; resume, pruning.

A step directory is written under a temporary name, flushed to the disk and renamed; `latest` moves after
that. Its manifest has the size and the checksum of every file, and a run resumes only from files that are
unchanged to the bit. Everything is safetensors or JSON: nothing read here can run code.
"""

import os
import re
import zlib

import torch
import torch.distributed as dist

from disk import files, pretrained
from settings.errors import UserError

INNER = "training_state"  # of a step directory: what resume needs beside the weights
MANIFEST, STATE = os.path.join(INNER, "manifest.json"), os.path.join(INNER, "state.json")
READ = (".json", ".safetensors", ".jinja", ".txt", ".model")  # the endings of all files that are ever read


def save(root, step, *, model, optimizer, shard_map, exported, state, links=("latest",)):
    """Write root/step_N, then move root/latest, or what `links` names; return its path. Every rank calls it.

    optimizer  as ops.optim.build makes it: the tensors of its state_of are saved, by their names
    shard_map     what pretrained.load_weights returned
    exported   file name -> bytes or JSON value: the model directory's other files (pretrained.export_files)
    state      JSON object: what the run needs to resume; load_state returns it

    Weights are written in the dtype of the model that was read. Where that is narrower than the master
    weights (bf16 on the disk, fp32 in memory), training_state/ holds the masters too: resume is exact.
    """
    temporary = start_directory(root, step)
    writers = write_model(temporary, model, optimizer, shard_map, exported)
    writers.update(write_training_state(temporary, step, model, optimizer, shard_map, state))
    write_manifest(temporary, step, writers)
    return move_into_place(temporary, root, step, links)


def start_directory(root, step):
    """Remove what a killed or failed save left behind; make a new temporary directory and return its path."""
    temporary = os.path.join(root, f"tmp_step_{step}")
    if is_rank_0():
        os.makedirs(root, exist_ok=True)
        for name in os.listdir(root):
            if re.fullmatch(r"tmp_(old_)?step_\d+", name):
                files.remove(os.path.join(root, name))
            elif re.fullmatch(r"tmp_(latest|best)", name):
                os.remove(os.path.join(root, name))
        os.makedirs(os.path.join(temporary, INNER))
    barrier()
    return temporary


def write_model(directory, model, optimizer, shard_map, exported):
    """Write the model's or the adapter's own files; return {file: the rank that wrote it}.

    The weight files are those that were read or, where ranks outnumber them, one of equal size for each rank.
    An adapter, which is small, stays one file.
    """
    masters, dtypes = pretrained.master_weights(model, optimizer), dtypes_of(shard_map)
    shards, size = {file: list(codes) for file, codes in shard_map.items()}, pretrained.rank_and_size()[1]
    is_adapter = pretrained.ADAPTER_FILE in shard_map
    if len(shards) < size and not is_adapter:
        shards = pretrained.numbered({name: masters[name] for name in dtypes}, "model", size)
    prefix = pretrained.ADAPTER_PREFIX if is_adapter else ""
    writers = pretrained.write_shared(directory, shards, masters, dtypes, prefix)
    by_rank_0 = list(exported)
    if is_rank_0():
        for name, content in exported.items():
            files.write_file(os.path.join(directory, name), content)
    if len(shards) > 1:
        by_rank_0.append(pretrained.INDEX_FILE)
        if is_rank_0():
            n_bytes = sum(masters[name].numel() * dtype.itemsize for name, dtype in dtypes.items())
            pretrained.write_index(directory, shards, n_bytes)
    return {**writers, **dict.fromkeys(by_rank_0, 0)}


def write_training_state(directory, step, model, optimizer, shard_map, state):
    """Write training_state/ but for the manifest; return {file: the rank that wrote it}."""
    trained = trained_weights(model, optimizer)
    states = {name: optimizer.state_of(p) for name, p in trained.items()}
    tensors = training_tensors(trained, states, dtypes_of(shard_map))
    shards = pretrained.numbered(tensors, "tensors", pretrained.rank_and_size()[1])
    writers = pretrained.write_shared(os.path.join(directory, INNER), shards, tensors,
                                      {name: tensor.dtype for name, tensor in tensors.items()})
    if is_rank_0():
        content = {"step": step, "updates": optimizer.updates, **state}
        files.write_file(os.path.join(directory, STATE), content)
    return {**{os.path.join(INNER, file): rank for file, rank in writers.items()}, STATE: 0}


def write_manifest(directory, step, writers):
    """Write the checksums of all files; after this the directory is complete, and flushed to the disk."""
    sums = checksums(directory, writers)  # each rank reads what it wrote, still in its machine's memory
    if is_rank_0():
        files.write_file(os.path.join(directory, MANIFEST), manifest(step, sums))
        files.sync(os.path.join(directory, INNER))
        files.sync(directory)


def move_into_place(temporary, root, step, links):
    """Rename the complete directory to root/step_N, then move the links to it; return its path."""
    final = os.path.join(root, f"step_{step}")
    if is_rank_0():
        # A run that was resumed from an earlier step saves the same steps again.
        old = take_name(final) if os.path.exists(final) else None
        try:
            os.replace(temporary, final)
        except OSError:
            if old:  # latest may point to it
                os.replace(old, final)
            raise
        for link in links:
            set_link(root, step, link)
        if old:
            files.remove(old)
    barrier()
    return final


def dtypes_of(shard_map):
    """name -> dtype of each tensor in the model's files."""
    return {name: pretrained.DTYPES[code] for codes in shard_map.values() for name, code in codes.items()}


def trained_weights(model, optimizer):
    """{name: tensor that the optimizer steps} of each trained parameter; a tied one by its first name."""
    masters = pretrained.master_weights(model, optimizer)
    return {name: masters[name] for name, p in model.named_parameters() if p.requires_grad}


def training_tensors(trained, states, dtypes):
    """name -> tensor of all that the files in training_state/ hold, for saving and loading alike.

    trained  name -> the tensor that is stepped; as master.NAME, unless the model's files have its dtype
    states   name -> {key: tensor of the same shape}, the optimizer's; as KEY.NAME
    dtypes   name -> dtype in the model's files
    """
    tensors = {}
    for key in dict.fromkeys(key for state in states.values() for key in state):
        assert key != "master", "an optimizer's state must not be named master: that is the weights' name"
        for name, state in states.items():
            if key in state:
                assert state[key].shape == trained[name].shape, f"{key} of {name} is not shaped like it"
                tensors[f"{key}.{name}"] = state[key]
    tensors.update({f"master.{name}": p for name, p in trained.items() if p.dtype != dtypes.get(name)})
    return tensors


def set_link(root, step, name="latest"):
    """Point root/latest (or another name) at step_N, in one move: there is no moment without it."""
    link = os.path.join(root, f"tmp_{name}")
    if os.path.lexists(link):
        os.remove(link)
    os.symlink(f"step_{step}", link)
    os.replace(link, os.path.join(root, name))
    files.sync(root)


def steps_in(root):
    """The step numbers of the complete checkpoints below root, in order; others have temporary names."""
    names = os.listdir(root) if os.path.isdir(root) else []
    return sorted(int(m[1]) for m in (re.fullmatch(r"step_(\d+)", name) for name in names) if m)


def prune(root, keep, step, keep_best_step=None):
    """Remove checkpoints up to `step`, but for the newest `keep` (None: all) and step keep_best_step.

    Later ones stay: they are of the run that was left when this one was resumed from an earlier step.
    """
    for old in [s for s in steps_in(root) if s <= step][:-keep] if keep else ():
        if old != keep_best_step:
            files.remove(take_name(os.path.join(root, f"step_{old}")))


def take_name(directory):
    """Rename a step directory before it is removed, so that none is seen incomplete; return its new name."""
    doomed = os.path.join(os.path.dirname(directory), f"tmp_old_{os.path.basename(directory)}")
    os.replace(directory, doomed)
    return doomed


def resume_directory(resume_from, root):
    """The step directory that --resume_from means, or None where `auto` finds no checkpoint.

    Raises UserError for a directory that is not a checkpoint: it is never a fresh start instead.
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
    """Raise UserError, on every rank, unless the files of a step directory are bit for bit what `save` wrote.

    A directory without a manifest is refused too: it may have lost it.
    """
    path, rest = os.path.join(directory, MANIFEST), (
        "; give --resume_from another step directory, or start a new run from these weights with --model and "
        "another --output_dir")
    if not os.path.exists(path):
        raise UserError(f"{directory} has no {MANIFEST}, so nobody knows whether it is whole{rest}")
    try:
        found = files.read_json(path)
    except UserError as error:
        raise UserError(f"{error}{rest}") from error
    step, listed = (found.get("step"), found.get("files")) if isinstance(found, dict) else (None, None)
    with open(path, "rb") as f:
        if type(step) is not int or not is_list_of_files(listed) or f.read() != manifest(step, listed):
            raise UserError(f"{path} is not as it was saved{rest}")
    numbered_as = re.fullmatch(r"step_(\d+)", os.path.basename(directory))
    if numbered_as and int(numbered_as[1]) != step:
        raise UserError(f"{path} is of step {step}, not of {numbered_as[0]}{rest}")
    size, wrong = pretrained.rank_and_size()[1], []
    readers = {name: i % size for i, name in enumerate(sorted(listed))}
    for name, (length, crc) in checksums(directory, readers).items():
        if length < 0:
            wrong.append(f"{name} is missing")
        elif length != listed[name][0]:
            wrong.append(f"{name} has {length:,} bytes, not {listed[name][0]:,}")
        elif crc != listed[name][1]:
            wrong.append(f"{name} has other bytes")
    there = os.listdir(directory)
    there += [os.path.join(INNER, name) for name in os.listdir(os.path.join(directory, INNER))]
    strange = {name for name in there if name.endswith(READ)} - {*listed, MANIFEST}
    wrong += [f"{name} was not there" for name in sorted(strange)]
    if wrong:
        raise UserError(f"{directory} is not as it was saved: {'; '.join(wrong[:8])} ({len(wrong)} in all)"
                        + rest)


def load_state(directory):
    """The JSON state that `save` was given, with its step and the optimizer's number of updates.

    An older version did not save the updates: then they are as many as the steps. Raises UserError where one
    of the two is not a valid number.
    """
    path = os.path.join(directory, STATE)
    state = files.read_json(path)
    step = state.get("step") if isinstance(state, dict) else None
    if type(step) is not int or step < 1:  # True is an int
        raise UserError(f"{path}: step must be a whole number of at least 1, it is {step!r:.60}; give "
                        "--resume_from another step directory")
    updates = state.setdefault("updates", step)
    if type(updates) is not int or updates < 0:
        raise UserError(f"{path}: updates must be a whole number of at least 0, it is {updates!r:.60}; give "
                        "--resume_from another step directory")
    return state


def load_training_tensors(directory, model, optimizer):
    """Restore the optimizer's state, its count of updates and the master weights, exactly.

    Every rank calls it. Raises UserError, with nothing restored, where the tensors are not those that this
    model and optimizer save.
    """
    inner, entries, updates = os.path.join(directory, INNER), {}, load_state(directory)["updates"]
    for file in sorted(os.listdir(inner)):
        if file.endswith(".safetensors"):
            entries.update(pretrained.read_header(os.path.join(inner, file)))
    trained = trained_weights(model, optimizer)
    states = {name: optimizer.new_state(p) for name, p in trained.items()}
    saved = {name: pretrained.DTYPES.get(e.dtype) for name, e in pretrained.weight_entries(directory).items()}
    wanted = training_tensors(trained, states, saved)
    if set(entries) != set(wanted) or any(entries[name].shape != t.shape for name, t in wanted.items()):
        differ = sorted(set(entries) ^ set(wanted)) or "a shape"
        raise UserError(f"{inner} does not belong to this model and optimizer: {differ[:5]} differ")
    for name, tensor in wanted.items():
        pretrained.read_into(entries[name], tensor)
    optimizer.state.update({trained[name]: state for name, state in states.items()})
    optimizer.updates = updates


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
    """(size, CRC-32) of a file, (-1, 0) where there is none. A truncated file, a flipped bit and another
    step's file all differ."""
    if not os.path.isfile(path):
        return -1, 0
    buffer, size, crc = memoryview(bytearray(2**20)), 0, 0
    with files.naming(path), open(path, "rb", buffering=0) as f:
        while n := f.readinto(buffer):
            size, crc = size + n, zlib.crc32(buffer[:n], crc)
    return size, crc


def checksums(directory, readers):
    """name -> [size, CRC-32] of files, given name -> the rank that reads it. Every rank calls it, and all
    have read when it returns."""
    rank, sums = pretrained.rank_and_size()[0], torch.zeros(len(readers), 2, dtype=torch.int64)
    for (name, reader), row in zip(readers.items(), sums):
        if reader == rank:
            row.copy_(torch.tensor(checksum(os.path.join(directory, name))))
    if dist.is_initialized():
        dist.all_reduce(sums)
    return dict(zip(readers, sums.tolist()))


def is_rank_0():
    return pretrained.rank_and_size()[0] == 0


def barrier():
    if dist.is_initialized():
        dist.barrier()
