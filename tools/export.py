"""Write a step directory without its training state: python tools/export.py STEP [STEP2 ...] OUT"""

if __name__ == "__main__":
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from settings import venv

    venv.enter()  # where torch is missing, continue in the .venv that train.sh made

import itertools
import math
import os
import shlex
import sys
from dataclasses import dataclass

import torch

import sft
from disk import checkpoint, exporting, files, layout, peft, pretrained, saving, shards, writer
from families.config import ModelConfig
from screen import card, publish
from settings import venv
from settings.errors import UserError, printable, run
from settings.parser import check, parse, setting
from text import template

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Keys of config.json that may differ between models whose weights are averaged
NOT_COMPARED = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")
USAGE = "python tools/export.py STEP [STEP2 ...] OUT"


@dataclass
class Config:
    """Write a step without its training state: python tools/export.py STEP OUT [flags]

    With several steps, OUT is the average of their weights: python tools/export.py STEP STEP2 ... OUT
    """

    dtype: str | None = setting(None, "precision of the weights; none: as they are stored", tuple(DTYPES),
                                group="export")
    shard_gb: float = setting(5, "most GB (10^9 bytes) in a weight file, unless one tensor is larger",
                              low=1e-4)

    def __post_init__(self):
        check(self)


class Step:
    """A model directory, or a step directory with the fp32 master weights that the run has.

    directory  its path
    contents   pretrained.Contents
    masters    {name: slices} of the fp32 weights that training_state/ has of parameters stored in 16 bits
    """

    def __init__(self, directory):
        self.directory = directory
        self.contents = pretrained.Contents.of(directory)
        pretrained.check_dtypes(self.contents.entries)
        state = os.path.join(directory, checkpoint.STATE_DIRECTORY)
        slices = saving.read_slices(state) if os.path.isdir(state) else {}
        self.masters = {name.removeprefix("master."): parts for name, parts in slices.items()
                        if name.startswith("master.")}

    def read(self, name, tensor, spans, exact):
        """Read a slice of a weight into `tensor`.

        exact  from the master weights, if there are some: they were rounded when the model was saved
        """
        if exact and name in self.masters:
            saving.read_sliced(self.masters[name], tensor, spans)
        else:
            pretrained.read_into(self.contents.entries[name], tensor, spans)


def export(steps, out, dtype=None, file_bytes=exporting.FILE_BYTES):
    """Write the directory `out`: the weights of one step, or the average of several; and its other files.

    dtype       a key of DTYPES; None: that of the first step's files
    file_bytes  the most that a weight file has, unless one tensor is larger

    Raises UserError if `out` exists, if the steps are not of one architecture with one tokenizer, for several
    adapters, and for a weight that is not finite or, in fp16, would not be.
    """
    exporting.check_new(out)
    directories = [files.follow(step) for step in steps]  # a run may move `latest` meanwhile
    for directory in directories:
        publish.check_directory(directory)
    opened = [Step(directory) for directory in directories]
    first = opened[0]
    is_adapter = pretrained.is_adapter(first.directory)
    contents = small_files(first.directory)
    if len(opened) > 1:
        check_same(opened)
    if dtype and not is_adapter:
        config = files.read_json(os.path.join(first.directory, "config.json"))
        contents["config.json"] = layout.with_dtype(config, DTYPES[dtype])
    stored, tensor_of = weights(opened, dtype)
    notes = [f"average of {len(opened)} checkpoints"] * (len(opened) > 1) + [f"in {dtype}"] * bool(dtype)
    contents.update(card.files_of(directories, card.defaults_of(sft.Config), notes,
                                  title=os.path.basename(os.path.abspath(out))))
    with exporting.new_directory(out) as directory:
        exporting.write_files(directory, contents)
        if is_adapter:
            writer.write_tensors(os.path.join(directory, pretrained.ADAPTER_FILE), stored, tensor_of)
        else:
            exporting.write_weights(directory, stored, tensor_of, file_bytes)


def small_files(directory):
    """{name: bytes or JSON value} of the files beside the weights: as they are in the directory.

    generation_config.json of a model has, beside its own stop ids, the one that its template ends turns with.
    A step directory has that already.
    """
    if pretrained.is_adapter(directory):
        peft.read_config(directory)  # raises for a kind that is not supported
        contents = files.read_bytes(directory, [pretrained.ADAPTER_CONFIG, *pretrained.TOKENIZER_FILES])
        has_tokenizer = "tokenizer.json" in contents
        return {**contents, **(template.ChatTokenizer(directory).files if has_tokenizer else {})}
    config = files.read_json(os.path.join(directory, "config.json"))
    ModelConfig.from_dict(config)  # raises for a model that is not supported
    tokenizer = template.ChatTokenizer(directory)
    contents = files.read_bytes(directory, (
        "config.json", *pretrained.TOKENIZER_FILES, *pretrained.PROCESSOR_FILES))
    generation = pretrained.generation_config(directory, config, tokenizer.stop_token_id)
    return {**contents, "generation_config.json": generation, **tokenizer.files}


def check_same(steps):
    """Raise UserError unless the weights of all steps can be averaged, and one tokenizer belongs to all."""
    first = steps[0]
    for step in steps[1:]:
        what = f"{first.directory} and {step.directory} can't be averaged"
        if pretrained.is_adapter(first.directory) or pretrained.is_adapter(step.directory):
            raise UserError(f"{what}: the average of A and of B of several adapters is not the adapter of "
                            "the averaged product B A; merge each one first "
                            f"({venv.command('tools/merge.py')} ADAPTER OUT), then average the merged models")
        (config, tensors), (other, others) = map(architecture, (first, step))
        for kind, before, now in ("config.json", config, other), ("the weights", tensors, others):
            differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
            if differing:
                key = differing[0]
                raise UserError(f"{what}: {kind} differ in {key}: {before.get(key)!s:.80} and "
                                f"{now.get(key)!s:.80} ({len(differing)} such names); use steps of one model")
        before, now = (small_files(s.directory) for s in (first, step))
        for name in sorted((before.keys() | now.keys()) - {"config.json"}):
            if before.get(name) != now.get(name):
                raise UserError(f"{what}: {name} differs, so they were trained with another tokenizer, "
                                "template or stop token; use steps that were trained alike")
        before, now = (copied(s) for s in (first, step))
        differing = [name for name in before if before[name].checksum != now[name].checksum]
        if differing:
            raise UserError(f"{what}: {differing[0]}, which is not trained, differs; use steps of one model")


def architecture(step):
    """({key: value} of config.json, {name in the files: shape}), as far as averaged models must agree."""
    config = files.read_json(os.path.join(step.directory, "config.json"))
    parts = {"": config, "text_config.": layout.text_part(config)}
    values = {prefix + key: value for prefix, part in parts.items() for key, value in part.items()
              if key not in (*NOT_COMPARED, "text_config")}
    in_files = step.contents.names.in_files
    tensors = {in_files(name): entry.shape for name, entry in step.contents.entries.items()}
    return values, {**tensors, **{name: entry.shape for name, entry in step.contents.others.items()}}


def copied(step):
    """{name in the files: CopiedTensor} of the tensors that are not the text model's."""
    by_file = shards.copied_tensors(step.contents.others)
    return {name: tensor for tensors in by_file.values() for name, tensor in tensors.items()}


def weights(steps, dtype):
    """({name in the files: (dtype code, shape)}, a function: such a name -> tensor) of what is exported.

    Tensors of a vision tower, ... are copied byte for byte, whichever `dtype`.
    """
    contents, others = steps[0].contents, copied(steps[0])
    is_adapter = pretrained.is_adapter(steps[0].directory)
    stored_names = {}
    if is_adapter:  # PEFT's names, as the file has them
        for name in pretrained.stored_entries(steps[0].directory):
            stored_names[name] = layout.name_of_adapter(name.removeprefix(pretrained.ADAPTER_PREFIX))
    else:
        stored_names = {contents.names.in_files(name): name for name in contents.entries}
    stored = {}
    for name, ours in stored_names.items():
        entry = contents.entries[ours]
        stored[name] = writer.CODES[DTYPES[dtype]] if dtype else entry.dtype, entry.shape
    stored.update((name, writer.stored_as(tensor)) for name, tensor in others.items())
    exact = len(steps) > 1 or dtype is not None

    def tensor_of(name):
        if name in others:
            return others[name]
        return average(steps, stored_names[name], pretrained.DTYPES[stored[name][0]], exact)

    return stored, tensor_of


def average(steps, name, dtype, exact):
    """The mean of a weight over the steps in `dtype`, summed in fp64 some rows at a time.

    Raises UserError if it is not finite.
    """
    shape = steps[0].contents.entries[name].shape
    result = torch.empty(shape, dtype=dtype)
    rows = max(1, pretrained.CHUNK // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0] if shape else 1, rows):
        spans = [(0, size) for size in shape]
        if shape:
            spans[0] = start, min(start + rows, shape[0])
        part = torch.empty([stop - first for first, stop in spans])
        total = torch.zeros(part.shape, dtype=torch.float64)
        for step in steps:
            step.read(name, part, spans, exact)
            total += part
        target = result[start : start + rows] if shape else result
        target.copy_(total / len(steps))
        if not target.isfinite().all():
            where = ", ".join(step.directory for step in steps)
            if total.isfinite().all():
                raise UserError(f"{where}: {name} has values beyond fp16 (65,504); use --dtype bf16 or fp32")
            raise UserError(f"{where}: {name} is not finite; did the run diverge? Use an earlier step")
    return result


def split(arguments):
    """(paths, flags) of the command line; each flag has a value."""
    paths, flags, words = [], [], iter(arguments)
    for word in words:
        if not word.startswith("-"):
            paths.append(word)
            continue
        flags.append(word)
        if "=" not in word:
            flags += itertools.islice(words, 1)
    return paths, flags


def main():
    paths, flags = split(sys.argv[1:])
    cfg, _ = parse(Config, flags)
    if len(paths) < 2:
        raise UserError(f"a step directory and the directory to write are needed: {USAGE}")
    *steps, out = paths
    export(steps, out, cfg.dtype, int(cfg.shard_gb * 1e9))
    kind = "PEFT adapter" if pretrained.is_adapter(out) else "Hugging Face model"
    source = steps[0] if len(steps) == 1 else f"the average of {', '.join(steps)}"
    print(printable(f"exported {source}\n"
                    f"saved    {out} ({kind} directory)\n"
                    f"try it   {venv.command('chat.py')} {shlex.quote(out)}"))


if __name__ == "__main__":
    run(main)
