"""Checkpoints: step directories are saved atomically, verified before resume, and pruned.

A step directory is a model directory plus training_state/. It is written under a temporary name, flushed to
the disk and renamed; then `latest` moves. Its manifest lists the size and the checksum of every file, and a
run resumes only if all of them still match. Everything is safetensors or JSON: no file can run code.
"""

import datetime
import errno
import functools
import math
import os
import re
import zlib
from dataclasses import dataclass

from disk import files, pretrained, saving
from disk.writer import Writer
from settings.errors import UserError

STATE_DIRECTORY = "training_state"  # in a step directory: what resume needs beside the weights
MANIFEST = os.path.join(STATE_DIRECTORY, "manifest.json")
STATE = os.path.join(STATE_DIRECTORY, "state.json")
CHECKED = (".json", ".safetensors", ".jinja", ".txt", ".model")  # the endings of all files that we ever read

# What symlink raises on file systems without links: FAT, some of SMB and FUSE.
NO_LINKS = errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL
REMEDY = ("; use --resume_from with another step directory, or start a new run from these weights with "
          "--model and another --output_dir")


def is_count(value, low=0):
    return type(value) is int and low <= value < 2**53  # True is an int


def is_number(value):
    return type(value) in (int, float)


def is_best(value):
    """Whether a value is a RunState's `best`."""
    return (isinstance(value, dict) and value.keys() == {"val_loss", "step", "behind"}
            and (value["val_loss"] is None or is_number(value["val_loss"]))
            and is_count(value["step"]) and is_count(value["behind"]))


def is_best_saved(value):
    """Whether a value is a RunState's `best_saved`."""
    return isinstance(value, dict) and is_best({**value, "behind": 0}) and "behind" not in value


def is_date(value):
    try:
        return isinstance(value, str) and bool(datetime.date.fromisoformat(value))
    except ValueError:
        return False


def is_text_or_null(value):
    return value is None or isinstance(value, str)


def is_baseline(value):
    """Whether a value is a RunState's `baseline`."""
    return isinstance(value, dict) and all(map(is_number, value.values()))


def is_lowest(value):
    """Whether a value is a RunState's `lowest`: {digest of a validation set: {"val_loss", "step"}}."""
    return isinstance(value, dict) and all(
        is_best_saved(known) and is_number(known["val_loss"]) for known in value.values())


# What a run reads of state.json: {key: (whether a value is valid, the rule)}
STATE_RULES = {
    "step": (functools.partial(is_count, low=1), "an integer of at least 1"),
    "updates": (is_count, "an integer of at least 0"),
    "best": (is_best, "an object with val_loss (a number or null), step and behind (integers)"),
    "best_saved": (is_best_saved, "an object with val_loss (a number or null) and step (an integer)"),
    "lowest": (is_lowest, "an object of objects with val_loss (a number) and step (an integer)"),
    "ranks": (functools.partial(is_count, low=1), "an integer of at least 1"),
    "norms": (lambda norms: isinstance(norms, list) and all(map(is_number, norms)), "a list of numbers"),
    "is_cut": (lambda value: type(value) is bool, "true or false"),
    "date": (is_date, "a date such as 2026-01-31"),
    "lr": (lambda lr: lr is None or is_number(lr), "a number or null"),
    "total_steps": (is_count, "an integer of at least 0"),
    "baseline": (is_baseline, "an object of numbers"),
    **dict.fromkeys(("template_kwargs", "base", "model", "val_data", "judged"),
                    (is_text_or_null, "a text or null")),
}


def save(root, step, **contents):
    """Write root/step_N, then point the links at it; return its path. Every rank calls it. See start_save."""
    return start_save(root, step, **contents).finish()


def start_save(root, step, *, model, optimizer, shard_map, exported, state, links=("latest",),
               in_background=False, timeout=600):
    """Begin to write root/step_N; return the Save, whose `finish` completes it. Every rank calls both.

    optimizer      from ops.optim.build; the tensors that its state_of returns are saved by name
    shard_map      from shards.shard_map or adapter_shard_map. A tensor in fp16 with values beyond fp16
                   gets F32, from now on
    exported       {file: bytes or JSON value}, the model directory's other files (pretrained.export_files)
    state          JSON object that resume needs; load_state returns it
    in_background  copy all to host memory first: when this returns, the training may continue. Otherwise no
                   tensor may change before `finish` returns
    timeout        seconds without a byte written by any rank after which `finish` raises OSError

    Weights are written in the dtype of the model that was read. If that is narrower than the master weights
    (bf16 on the disk, fp32 in memory), training_state/ contains the masters too, so that resume is exact.
    """
    temporary = start_directory(root, step)
    masters = pretrained.master_weights(model, optimizer)
    saving.widen(shard_map, exported, masters)
    writer = Writer(temporary, saving.device_of(model), in_background)
    trained = trained_weights(model, optimizer)
    states = {name: optimizer.state_of(p) for name, p in trained.items()}
    dtypes = saving.dtypes_of(shard_map)
    tensors = training_tensors(trained, states, dtypes)
    names = saving.write_model(writer, masters, shard_map, exported)
    names += saving.write_slices(writer, STATE_DIRECTORY, tensors)
    names.append(STATE)
    if saving.is_rank_0():
        writer.write_file(STATE, {"step": step, "updates": optimizer.updates, **state})
    writer.finish()
    stored, codes, _ = saving.stored_tensors(shard_map, masters)
    weights = {name: (codes[name], saving.shape_of(tensor)) for name, tensor in stored.items()}
    return Save(root, step, links, timeout, writer, names, weights,
                {name: tuple(tensor.shape) for name, tensor in tensors.items()},
                [tensor for copied in shard_map.copied.values() for tensor in copied.values()])


@dataclass
class Save:
    """A checkpoint on its way to the disk.

    timeout   seconds
    writer    this rank's thread
    names     the files of all ranks
    weights   {name: (dtype code, shape)} of the model's files
    tensors   {name: shape} of the training state's files
    copied    the CopiedTensors, of all ranks

    The main thread of every rank calls the methods, in the same order: they are collectives.
    """

    root: str
    step: int
    links: tuple
    timeout: float
    writer: Writer
    names: list
    weights: dict
    tensors: dict
    copied: list

    def is_written(self):
        """Whether all ranks have written their files. Raises the error of this rank's writing."""
        return saving.progress(self.writer)[0] == 0

    def finish(self):
        """Wait until all ranks have written; then complete the directory, rename it and move the links.

        Returns its path. Raises the error of this rank's writing, and OSError if all ranks hang.
        """
        saving.wait_for_all(self.writer, self.timeout)
        directory = self.writer.directory
        self.check_own_files()
        sums = saving.shared_sums(self.names, self.writer.sums)
        if saving.is_rank_0():
            files.write_file(os.path.join(directory, MANIFEST), manifest(self.step, sums))
            files.sync(os.path.join(directory, STATE_DIRECTORY))
            files.sync(directory)
            self.check_readable()
        final = move_into_place(directory, self.root, self.step, self.links)
        for tensor in self.copied:
            tensor.follow(final)
        return final

    def check_own_files(self):
        """AssertionError unless the functions that resume uses find in this rank's files what was saved, and
        the slices of all ranks have as many elements as the tensors. Every rank calls it."""
        n_elements = 0
        for name, tensors in self.writer.opened.items():
            path, is_state = os.path.join(self.writer.directory, name), name.startswith(STATE_DIRECTORY)
            if not is_state:
                entries = pretrained.read_header(path)
            else:
                entries = {name: part.entry for name, part in saving.slices_of(path).items()}
                n_elements += sum(math.prod(entry.shape) for entry in entries.values())
            found = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
            expected = {name: (code, tuple(shape)) for name, (code, shape) in tensors.items()}
            assert found == expected, f"{path} has other tensors than were saved"
        expected = sum(math.prod(shape) for shape in self.tensors.values())
        assert saving.total(n_elements) == expected, "the training state has other tensors than were saved"

    def check_readable(self):
        """AssertionError unless the functions that load a model find in the directory what was saved."""
        directory = self.writer.directory
        entries = pretrained.stored_entries(directory).items()
        weights = {name: (entry.dtype, entry.shape) for name, entry in entries}
        assert weights == self.weights, f"{directory}: its weight files have other tensors than were saved"


def start_directory(root, step):
    """Remove what a killed or failed save left behind; create a temporary directory and return its path."""
    temporary = os.path.join(root, f"tmp_step_{step}")
    if saving.is_rank_0():
        os.makedirs(root, exist_ok=True)
        for name in os.listdir(root):
            if re.fullmatch(r"tmp_(old_)?step_\d+", name):
                files.remove(os.path.join(root, name))
            elif re.fullmatch(r"tmp_(latest|best)", name):
                os.remove(os.path.join(root, name))
        os.makedirs(os.path.join(temporary, STATE_DIRECTORY))
    saving.barrier()
    return temporary


def move_into_place(temporary, root, step, links):
    """Rename the complete directory to root/step_N, then move the links to it; return its path."""
    final = os.path.join(root, f"step_{step}")
    if saving.is_rank_0():
        # After a resume from an earlier step, a run saves the same steps again.
        old = rename_for_removal(final) if os.path.isdir(final) else None
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
    saving.barrier()
    return final


def trained_weights(model, optimizer):
    """{name: tensor that the optimizer updates} of the trained parameters; tied ones under the first name."""
    masters = pretrained.master_weights(model, optimizer)
    return {name: masters[name] for name, p in model.named_parameters() if p.requires_grad}


def training_tensors(trained, states, dtypes):
    """{name: tensor} of everything in the files of training_state/, both for saving and for loading.

    trained  {name: tensor that the optimizer updates}. Called master.NAME; not stored if the model's files
             have the same dtype
    states   {name: {key: tensor of the same shape}}, the optimizer's state. Called KEY.NAME
    dtypes   {name: dtype in the model's files}
    """
    tensors = {}
    for key in dict.fromkeys(key for state in states.values() for key in state):
        assert key != "master", "an optimizer's state must not be named master: the weights have that name"
        for name, state in states.items():
            if key in state:
                assert state[key].shape == trained[name].shape, f"{key} of {name} does not have its shape"
                tensors[f"{key}.{name}"] = state[key]
    tensors.update({f"master.{name}": p for name, p in trained.items() if p.dtype != dtypes.get(name)})
    return tensors


def set_link(root, step, name="latest"):
    """Point the link root/`name` at step_N. Atomic: the link exists at every moment.

    Where the file system has no links, it is a file with the text step_N, which files.follow reads.
    """
    link, path = os.path.join(root, f"tmp_{name}"), os.path.join(root, name)
    if os.path.lexists(link):
        os.remove(link)
    if os.path.isdir(path) and not os.path.islink(path):
        adopt_copy(root, path)
    try:
        os.symlink(f"step_{step}", link)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        files.write_file(link, f"step_{step}\n".encode())
    os.replace(link, path)
    files.sync(root)


def adopt_copy(root, path):
    """Make room for a link where a copy with links followed has put a directory, the copy of a step.

    The directory becomes that step, or is removed if the step is there as well. Raises UserError if it is
    neither.
    """
    step = os.path.join(root, f"step_{step_of(path)}")
    copy, original = (files.read_bytes(directory, [MANIFEST]) for directory in (path, step))
    if copy and not os.path.exists(step):
        os.replace(path, step)
    elif copy and copy == original:
        files.remove(path)
    else:
        raise UserError(f"{path} must be a link to a checkpoint, but it is a directory of its own, and no "
                        "copy of a checkpoint beside it; move it elsewhere")


def linked_step(root, name="latest"):
    """The step that root/latest means, whether that exists or not; None if there is no `latest`.

    It is a link, a file (see set_link), or, in a copy with links followed, a directory.
    """
    path = os.path.join(root, name)
    if os.path.isdir(path) and not os.path.islink(path):
        return step_of(path)
    match = re.fullmatch(r"step_(\d+)", os.path.basename(files.follow(path)))
    return int(match[1]) if match and os.path.lexists(path) else None


def step_of(directory):
    """The step in the manifest of a directory; None if it has none that can be read."""
    path = os.path.join(directory, MANIFEST)
    try:
        content = files.read_json(path)
    except (OSError, UserError):
        return None
    step = content.get("step") if isinstance(content, dict) else None
    return step if type(step) is int else None


def steps_in(root):
    """The step numbers of the checkpoints in root, ascending. Incomplete ones have temporary names.

    step_010, which a person has made, and a file with the name of a step are none.
    """
    names = os.listdir(root) if os.path.isdir(root) else []
    matches = [re.fullmatch(r"step_([1-9]\d*)", name) for name in names]
    return sorted(int(match[1]) for match in matches if match and os.path.isdir(os.path.join(root, match[0])))


def prune(root, keep, step, keep_best_step=None):
    """Remove old checkpoints; keep the newest `keep` (None or "all": all) and the one of keep_best_step.

    Checkpoints later than `step` stay. They belong to a run that was abandoned when this one resumed from an
    earlier step.
    """
    if keep in (None, "all"):
        return
    steps = [s for s in steps_in(root) if s <= step]
    for old in steps[:-keep]:
        if old != keep_best_step:
            files.remove(rename_for_removal(os.path.join(root, f"step_{old}")))


def rename_for_removal(directory):
    """Rename a step directory, so that no reader sees it half removed; return its temporary path."""
    temporary = os.path.join(os.path.dirname(directory), f"tmp_old_{os.path.basename(directory)}")
    os.replace(directory, temporary)
    return temporary


def candidates(resume_from, root):
    """The directories that --resume_from may mean, the best first; [] if `auto` finds no checkpoint.

    resume_from  a step directory; a run, or its checkpoints/; auto: the run whose checkpoints are in root

    Of a run, the step of `latest` comes first, then the steps before it. The steps after it come last: if
    `latest` is complete, they are of a run that was abandoned when this one resumed from an earlier step.

    Raises UserError for a directory that is not a checkpoint, instead of starting from the beginning.
    """
    if resume_from != "auto":
        directory = files.follow(resume_from)
        if not os.path.isdir(directory):
            there = [f"step_{step}" for step in steps_in(os.path.dirname(directory))[-5:]]
            known = f"; beside it are {', '.join(there)}" if there else ""
            raise UserError(f"--resume_from {resume_from}: {directory} is not a directory{known}; use a step "
                            "directory such as outputs/checkpoints/step_100, a run, or auto")
        if os.path.exists(os.path.join(directory, STATE)):
            return [directory]
        roots = [path for path in (os.path.join(directory, "checkpoints"), directory) if steps_in(path)]
        if not roots:
            raise UserError(f"--resume_from {resume_from}: {directory} has no {STATE}, so no run can resume "
                            "from it; use another step directory, or start a new run from these weights with "
                            "--model")
        root = roots[0]
    root, latest = os.path.realpath(root), os.path.join(root, "latest")
    linked, steps = linked_step(root), steps_in(root)
    # a kill between the rename of a run's first checkpoint and its link leaves no link
    steps.sort(key=lambda step: (linked is not None and step > linked, -step))
    directories = [os.path.join(root, f"step_{step}") for step in steps]
    if linked is not None and linked not in steps and os.path.isdir(latest):
        directories.insert(0, os.path.realpath(latest))  # a copy with links followed has the step only here
    if not directories and os.path.lexists(latest):
        raise UserError(f"--resume_from {resume_from}: {latest} means a checkpoint, but {root} has none; use "
                        "a step directory, or remove `latest` to start a new run")
    return directories


def resume_directory(resume_from, root):
    """The first of candidates(), not verified; None if `auto` finds no checkpoint."""
    return next(iter(candidates(resume_from, root)), None)


def open_newest(resume_from, root):
    """(the first of candidates() that is as it was saved, or None; lines about newer ones that were skipped).

    Every rank calls it: they verify together. Raises UserError if there are candidates and none is valid.
    """
    directories, faults, first_error = candidates(resume_from, root), {}, None
    for directory in directories:
        try:
            verify(directory)
            load_state(directory)
        except UserError as error:
            faults[directory] = str(error).removesuffix(REMEDY)
            first_error = first_error or error
            continue
        is_given = resume_from != "auto" and directory == files.follow(resume_from)
        return directory, [] if is_given else skipped(directory, faults)
    if len(faults) > 1:
        raise UserError(f"{first_error} ({len(faults) - 1} other checkpoints are not valid either)")
    if first_error:
        raise first_error
    return None, []


def skipped(directory, faults):
    """Lines about the checkpoints that are newer than `directory`, of which `faults` says what is wrong."""
    root, step = os.path.dirname(directory), step_of(directory)
    linked, steps = linked_step(root), steps_in(root)
    lines = [f"skipped  {fault}" for fault in faults.values()]
    if linked is not None and linked > step and linked not in steps:
        lines.append(f"skipped  step_{linked}: `latest` means it, but it is not there")
    newer = [f"step_{n}" for n in steps if n > step and os.path.join(root, f"step_{n}") not in faults]
    if newer:
        lines.append(f"skipped  {', '.join(newer)}: `latest` means step_{linked}, so a run that resumed from "
                     "an earlier step has abandoned them")
    return lines


def verify(directory):
    """Raise UserError, on every rank, unless a step directory is exactly as `save` wrote it.

    A missing, changed or additional file is refused, and so is a directory without a manifest, the only list
    of the files that should be in it.
    """
    path, remedy = os.path.join(directory, MANIFEST), REMEDY
    if not os.path.exists(path):
        raise UserError(f"{directory} has no {MANIFEST}, so it cannot be verified{remedy}")
    try:
        content = files.read_json(path)
    except UserError as error:
        raise UserError(f"{error}{remedy}") from error
    if not isinstance(content, dict):
        content = {}
    step, listed = content.get("step"), content.get("files")
    with open(path, "rb") as f:
        if type(step) is not int or not is_list_of_files(listed) or f.read() != manifest(step, listed):
            raise UserError(f"{path} is not as it was saved{remedy}")
    name_of_step = re.fullmatch(r"step_(\d+)", os.path.basename(directory))
    if name_of_step and int(name_of_step[1]) != step:
        raise UserError(f"{path} is of step {step}, not of {name_of_step[0]}{remedy}")
    rank, world_size = pretrained.rank_and_world_size()
    names, faults = sorted(listed), []
    mine = {name: checksum(os.path.join(directory, name)) for name in names[rank::world_size]}
    for name, (length, crc) in saving.shared_sums(names, mine).items():
        if length < 0:
            faults.append(f"{name} is missing")
        elif length != listed[name][0]:
            faults.append(f"{name} has {length:,} bytes, not {listed[name][0]:,}")
        elif crc != listed[name][1]:
            faults.append(f"{name} has changed")
    present = os.listdir(directory)
    present += [os.path.join(STATE_DIRECTORY, name)
                for name in os.listdir(os.path.join(directory, STATE_DIRECTORY))]
    unexpected = {name for name in present if name.endswith(CHECKED)} - {*listed, MANIFEST}
    faults += [f"{name} was added" for name in sorted(unexpected)]
    if faults:
        count = f" ({len(faults)} in all)" if len(faults) > 8 else ""
        raise UserError(f"{directory} is not as it was saved: {'; '.join(faults[:8])}{count}{remedy}")


def load_state(directory):
    """The JSON state that was passed to `save`, plus "step" and "updates" (of the optimizer).

    An older version did not save "updates"; it then equals "step". Raises UserError if one of the values that
    a run reads has another type than RunState saves.
    """
    path = os.path.join(directory, STATE)
    state = files.read_json(path)
    state = state if isinstance(state, dict) else {}
    for key, (is_valid, rule) in STATE_RULES.items():
        if key not in state and key != "step":
            continue  # of an older version
        if not is_valid(state.get(key)):
            raise UserError(f"{path}: {key} must be {rule}, it is {state.get(key)!r:.60}; use --resume_from "
                            "with another step directory")
    state.setdefault("updates", state["step"])
    return state


def state_of(directory):
    """The state.json of a step directory; {} of any other directory."""
    return load_state(directory) if os.path.exists(os.path.join(directory, STATE)) else {}


def load_training_tensors(directory, model, optimizer):
    """Restore the optimizer's state, its count of updates and the master weights, exactly.

    Every rank calls it. Raises UserError, before anything is restored, if the tensors are not those that this
    model and optimizer save.
    """
    state_directory = os.path.join(directory, STATE_DIRECTORY)
    updates = load_state(directory)["updates"]
    trained = trained_weights(model, optimizer)
    states = {name: optimizer.new_state(p) for name, p in trained.items()}
    entries = pretrained.Contents.of(directory).entries
    dtypes = {name: pretrained.DTYPES.get(entry.dtype) for name, entry in entries.items()}
    tensors = training_tensors(trained, states, dtypes)
    slices = saving.read_slices(state_directory, tensors)
    differences = sorted(set(slices) ^ set(tensors))
    if not differences:
        differences = [name for name, tensor in tensors.items()
                       if any(part.shape != tensor.shape for part in slices[name])]
    if differences:
        raise UserError(f"{state_directory} does not belong to this model and optimizer: "
                        f"{differences[:5]} differ")
    for name, tensor in tensors.items():
        saving.read_sliced(slices[name], tensor)
    optimizer.state.update({trained[name]: state for name, state in states.items()})
    optimizer.updates = updates


def load_masters(directory, model):
    """Load the fp32 master weights of a step directory into a model without an optimizer.

    Returns whether it has some. They are what the run computed with; its own files have them rounded. Every
    rank calls it. Raises UserError if they are of another model.
    """
    state_directory = os.path.join(directory, STATE_DIRECTORY)
    slices = saving.read_slices(state_directory) if os.path.isdir(state_directory) else {}
    parameters = dict(model.named_parameters())
    masters = {name.removeprefix("master."): found for name, found in slices.items()
               if name.startswith("master.")}
    for name, found in masters.items():
        if name not in parameters or found[0].shape != parameters[name].shape:
            raise UserError(f"{state_directory} does not belong to this model: {name} differs")
        saving.read_sliced(found, parameters[name])
    return bool(masters)


def manifest(step, listed):
    """The bytes of manifest.json: {"step", "files": {name: [size, CRC-32]}, "crc32": of the two before}."""
    content = {"step": step, "files": dict(sorted(listed.items()))}
    return files.encoded({**content, "crc32": zlib.crc32(files.encoded(content))})


def is_list_of_files(listed):
    """Whether the "files" of a manifest is {name inside its directory: [integer, integer]}."""
    return isinstance(listed, dict) and all(
        name.isprintable() and os.path.normpath(name) == name and not name.startswith(("/", ".."))
        and isinstance(entry, list) and [type(number) for number in entry] == [int, int]
        for name, entry in listed.items())


def checksum(path):
    """(size, CRC-32) of a file; (-1, 0) if it does not exist.

    They differ for a truncated file, a flipped bit, and the same file of another step.
    """
    if not os.path.isfile(path):
        return -1, 0
    buffer = memoryview(bytearray(2**20))
    size = crc = 0
    with files.naming(path), open(path, "rb", buffering=0) as f:
        while n := f.readinto(buffer):
            size += n
            crc = zlib.crc32(buffer[:n], crc)
    return size, crc
