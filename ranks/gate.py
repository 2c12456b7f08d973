"""Before the first step, all ranks compare what has to be the same on each of them.

Without it, nodes with another setting, file, model or version would train a model that is made from both, or
wait for each other until --timeout.
"""

import dataclasses
import hashlib
import json
import os
import socket

import torch

from settings.errors import UserError

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Settings that may differ between nodes: only rank 0 uses them, or what they name is compared by its content
MAY_DIFFER = {"model", "tokenizer", "chat_template", "train_data", "val_data", "sample_prompts",
              "resume_adapter", "resume_from", "output_dir", "cache_dir", "logger", "project", "run_name"}
MOST = 5  # differences that the error names


def compare(store, rank, world_size, stage, values):
    """Raise UserError, on every rank, if the values of a rank differ from those of rank 0.

    store   a dist.Store of all ranks
    stage   a word that differs from call to call
    values  {what: text}. A text that starts with ":" is a digest, and the error does not show it. What rank 0
            or this rank does not pass is not compared
    """
    if world_size == 1:
        return
    verdict = f"gate {stage}"
    store.set(f"{verdict} of {rank}", json.dumps({"values": values, "host": socket.gethostname()}))
    if rank == 0:
        answers = [json.loads(store.get(f"{verdict} of {other}")) for other in range(world_size)]
        store.set(verdict, describe(answers))
    if difference := store.get(verdict).decode():
        raise UserError(difference)


def describe(answers):
    """The error for the ranks that differ from rank 0; "" if none does."""
    first, differing = answers[0], {}
    for rank, answer in enumerate(answers):
        names = [what for what, value in answer["values"].items()
                 if value != first["values"].get(what, value)]
        if names:
            differing[rank] = names
    if not differing:
        return ""
    rank, names = next(iter(differing.items()))
    same = [str(other) for other, others in differing.items() if others == names]
    parts = []
    for what in names[:MOST]:
        there, here = answers[rank]["values"][what], first["values"][what]
        parts.append(f"another {what}" if here.startswith(":") else f"{what} {there}, not {here}")
    if len(names) > MOST:
        parts.append(f"{len(names) - MOST} more")
    who = "rank" if len(same) == 1 else "ranks"
    return (f"{who} {', '.join(same)} (on {answers[rank]['host']}) and rank 0 (on {answers[0]['host']}) "
            f"differ: {'; '.join(parts)}. All nodes need the same")


def digest(content):
    """A text for compare() that stands for bytes."""
    return ":" + hashlib.blake2b(content, digest_size=16).hexdigest()


def program(cfg):
    """{what: text} of the settings, the code and the version of torch, for compare()."""
    values = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)
              if field.name not in MAY_DIFFER}
    settings = {f"--{name}": str(value).lower() if value is None or isinstance(value, bool) else str(value)
                for name, value in values.items()}  # as they are typed: none, true
    if cfg.sample_prompts and os.path.isfile(cfg.sample_prompts):
        with open(cfg.sample_prompts, "rb") as f:
            settings["--sample_prompts"] = digest(f.read())
    # their content is compared later, by those ranks that have one
    for name in ("val_data", "sample_prompts", "resume_from", "resume_adapter"):
        settings.setdefault(f"--{name}", "given" if getattr(cfg, name) else "none")
    return {**settings, "torch": torch.__version__, **code()}


def code():
    """{file: digest} of the trainer's own Python files: those beside sft.py, and the packages there."""
    found = {}
    for folder in [PROJECT, *sorted(entry.path for entry in os.scandir(PROJECT) if entry.is_dir())]:
        names = sorted(os.listdir(folder))
        if folder != PROJECT and "__init__.py" not in names:
            continue
        for name in names:
            path = os.path.join(folder, name)
            if name.endswith(".py") and os.path.isfile(path):
                with open(path, "rb") as f:
                    found[os.path.relpath(path, PROJECT)] = digest(f.read())
    return found
