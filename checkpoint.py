"""Model directories in Hugging Face's layout, and the training state beside them.

Owns: finding a model (hub id, directory, `tiny`), reading and writing safetensors tensor by tensor, step directories
that are whole or absent, resume, pruning. Everything is safetensors or JSON: nothing read here can run code.

A step directory is written under a temporary name, flushed to the disk and renamed; `latest` moves after that.
"""

import json
import math
import os
import re
import shutil
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by the names of its state
CHUNK = 2**24  # elements converted at a time between the disk's dtype and memory's: 64 MB of fp32
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model")


def model_directory(name):
    """The local directory of a model: `tiny`, a path, or a hub id, which is downloaded (or found in the hub's cache).

    Raises FileNotFoundError when there is no such directory, or the hub cannot be reached or does not have it.
    """
    if name == "tiny":
        return os.path.join(os.path.dirname(os.path.abspath(__file__)), "models", "tiny")
    if os.path.isdir(name):
        return name
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise FileNotFoundError(f"--model {name}: no such directory; give a directory, a hub id such as "
                                "Qwen/Qwen2.5-0.5B, or tiny")
    from huggingface_hub import snapshot_download  # imported here: most runs read a directory
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"])
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(f"--model {name}: the hub can't be reached and the model is not in its cache; "
                                "use --model PATH with a local directory, or --model tiny") from error
    except HfHubHTTPError as error:
        raise FileNotFoundError(f"--model {name}: {str(error).strip().splitlines()[-1]}; use --model PATH with a "
                                "local directory, or --model tiny") from error


def read_json(path):
    """Parse a JSON file; ValueError with its name, line and column if it is not JSON."""
    with open(path, encoding="utf-8") as f:
        try:
            return json.load(f)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error


@dataclass
class Entry:
    """One tensor of a safetensors file: where its bytes are."""

    file: str
    dtype: str
    shape: tuple
    start: int  # of its bytes, counted from the beginning of the file


def read_header(path):
    """name -> Entry of a safetensors file, in the file's order. Raises ValueError when it is torn or not safetensors.

    The package checks the header against the file; the bytes are then read by position instead of through its memory
    map, whose pages would count as ours: loading bf16 into fp32 would peak at 1.5 times the model.
    """
    with open(path, "rb") as f:
        position = 8 + int.from_bytes(f.read(8), "little")
    entries = {}
    try:
        with safe_open(path, framework="pt") as f:
            for name in f.offset_keys():
                tensor = f.get_slice(name)
                dtype, shape = tensor.get_dtype(), tuple(tensor.get_shape())
                if dtype not in DTYPES:
                    raise ValueError(f"{path}: {name} is of dtype {dtype}; these can be read: {', '.join(DTYPES)}")
                entries[name] = Entry(path, dtype, shape, position)
                position += math.prod(shape) * DTYPES[dtype].itemsize
    except SafetensorError as error:
        raise ValueError(f"{path} is torn or not safetensors: {error}") from error
    return entries


def weight_entries(directory):
    """name -> Entry of a model directory, one file or sharded with an index."""
    index = os.path.join(directory, "model.safetensors.index.json")
    if not os.path.exists(index):
        return read_header(os.path.join(directory, "model.safetensors"))
    weight_map = read_json(index).get("weight_map", {})
    files = sorted(set(weight_map.values()))
    if not files or any(os.path.basename(f) != f for f in files):
        raise ValueError(f"{index}: weight_map must name files of the same directory, it names {files[:3]}")
    entries = {}
    for file in files:
        entries.update(read_header(os.path.join(directory, file)))
    if set(entries) != set(weight_map):
        differ = sorted(set(entries) ^ set(weight_map))
        raise ValueError(f"{index} and the files it names do not hold the same tensors: {', '.join(differ[:5])}")
    return entries


def read_into(entry, tensor):
    """Fill `tensor` (contiguous, any device and dtype) from the disk, with at most one chunk beside it in memory."""
    flat, dtype = tensor.detach().view(-1), DTYPES[entry.dtype]
    direct = dtype == tensor.dtype and tensor.device.type == "cpu"
    buffer = None if direct else torch.empty(min(CHUNK, flat.numel()), dtype=dtype)
    with open(entry.file, "rb", buffering=0) as f:
        f.seek(entry.start)
        for part in flat.split(CHUNK):
            target = part if direct else buffer[: part.numel()]
            raw = memoryview(target.view(torch.uint8).numpy())
            while raw:
                count = f.readinto(raw)
                if not count:
                    raise ValueError(f"{entry.file} ended while it was read")
                raw = raw[count:]
            if not direct:
                part.copy_(target)


def load_weights(model, directory):
    """Fill the parameters of `model` (materialised, any float dtype) from a model directory; return its layout.

    The layout is what saving needs to write the same files again: file name -> {tensor name: dtype code}.

    Raises ValueError naming the missing, unexpected or wrongly shaped tensors.
    """
    entries = weight_entries(directory)
    entries = {n: e for n, e in entries.items() if not n.endswith("rotary_emb.inv_freq")}  # computed, not read
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owned = dict(model.named_parameters())  # a tied head is not in here, its embedding is
    missing = sorted(set(owned) - set(entries))
    unexpected = sorted(set(entries) - set(parameters))
    if missing or unexpected:
        raise ValueError(f"{directory} does not fit its config.json: missing {missing[:8] or 'nothing'}, "
                         f"unexpected {unexpected[:8] or 'nothing'}"
                         + (f" ({len(missing)} and {len(unexpected)} in all)" if len(missing + unexpected) > 8 else ""))
    for name, entry in entries.items():
        shape = tuple(parameters[name].shape)
        if entry.shape != shape:
            raise ValueError(f"{entry.file}: {name} has shape {entry.shape}; config.json says {shape}")
        if name in owned:
            read_into(entry, parameters[name])
    for name in set(entries) - set(owned):  # the file holds a tied weight twice: both must say the same
        copy = torch.empty_like(parameters[name])
        read_into(entries[name], copy)
        if not torch.equal(copy, parameters[name]):
            raise ValueError(f"{entries[name].file}: config.json ties {name} to the embedding, but they differ; set "
                             "tie_word_embeddings to false")
    layout = {}
    for name, entry in entries.items():
        if name in owned:
            layout.setdefault(os.path.basename(entry.file), {})[name] = entry.dtype
    return layout


def write_safetensors(path, tensors):
    """Write {name: tensor} and flush it to the disk. Byte for byte what an untouched model was read from."""
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})
    sync(path)


def write_file(path, content):
    """Write bytes, or a JSON value, and flush it to the disk."""
    if not isinstance(content, bytes):
        content = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    with open(path, "wb") as f:
        f.write(content)
    sync(path)


def sync(path):
    """Flush a file, or a directory: a rename is on the disk only when the directory that holds the name is."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def read_bytes(directory, names):
    """name -> bytes of those files that the directory has; read once, as the directory may be gone at the last save."""
    found = {}
    for name in names:
        if os.path.exists(path := os.path.join(directory, name)):
            with open(path, "rb") as f:
                found[name] = f.read()
    return found


def generation_config(directory, config, stop_id):
    """generation_config.json with the trained turn-ending token among its eos ids.

    A base Qwen2.5 lists <|endoftext|> only: trained on ChatML it would answer, end its turn, and go on.
    """
    path = os.path.join(directory, "generation_config.json")
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    found = read_json(path) if os.path.exists(path) else {k: config[k] for k in keys if config.get(k) is not None}
    eos = found.get("eos_token_id")
    eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    if stop_id not in eos:
        eos.append(stop_id)
    return {**found, "eos_token_id": eos if len(eos) > 1 else eos[0]}


def save(root, step, model, layout, files, optimizer, state):
    """Write root/step_N whole, then move root/latest; return its path.

    layout  what load_weights returned;  files  name -> bytes or JSON value, written as they stand
    state   JSON value: what the run needs to go on (see load_state)

    Weights are written in the dtype of the model that was read. Where that is narrower than the master weights
    (bf16 on the disk, fp32 in memory), training_state/ holds the masters too: resume is exact.
    """
    final, temporary = os.path.join(root, f"step_{step}"), os.path.join(root, f"tmp_step_{step}")
    for path in (temporary, final):  # what a kill left; a whole step_N only where a run goes over the same steps again
        if os.path.exists(path):
            shutil.rmtree(path)
    os.makedirs(os.path.join(temporary, "training_state"))
    for name, content in files.items():
        write_file(os.path.join(temporary, name), content)
    parameters = dict(model.named_parameters())
    for file, codes in layout.items():
        write_safetensors(os.path.join(temporary, file), {n: parameters[n].to(DTYPES[c]) for n, c in codes.items()})
    codes = {n: code for names in layout.values() for n, code in names.items()}
    if len(layout) > 1:
        size = sum(parameters[n].numel() * DTYPES[code].itemsize for n, code in codes.items())
        weight_map = {n: file for file, names in layout.items() for n in names}
        write_file(os.path.join(temporary, "model.safetensors.index.json"),
                   {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})

    trained = {n: p for n, p in parameters.items() if p.requires_grad}
    tensors = {f"{key}.{n}": optimizer.state[p][key] for key in MOMENTS for n, p in trained.items()}
    tensors.update({f"master.{n}": p for n, p in parameters.items() if p.dtype != DTYPES[codes[n]]})
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    write_safetensors(os.path.join(temporary, "training_state", "tensors.safetensors"), tensors)
    write_file(os.path.join(temporary, "training_state", "state.json"), {"step": step, **state})

    sync(os.path.join(temporary, "training_state"))
    sync(temporary)
    os.replace(temporary, final)
    set_latest(root, step)
    return final


def set_latest(root, step):
    """Point root/latest at step_N, in one move: there is no moment without it."""
    link = os.path.join(root, "tmp_latest")
    if os.path.lexists(link):
        os.remove(link)
    os.symlink(f"step_{step}", link)
    os.replace(link, os.path.join(root, "latest"))
    sync(root)


def steps_in(root):
    """The step numbers of the whole checkpoints below root, in order; half-written ones have another name."""
    names = os.listdir(root) if os.path.isdir(root) else []
    return sorted(int(m[1]) for m in (re.fullmatch(r"step_(\d+)", name) for name in names) if m)


def prune(root, keep, step):
    """Keep the newest `keep` checkpoints up to step. Each loses its name first, so that none is ever seen half."""
    for old in [s for s in steps_in(root) if s <= step][:-keep]:
        doomed = os.path.join(root, f"tmp_prune_{old}")
        os.replace(os.path.join(root, f"step_{old}"), doomed)
        shutil.rmtree(doomed)


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
        raise FileNotFoundError(f"--resume_from {resume_from}: there is no directory {directory}; give a step "
                                "directory such as outputs/checkpoints/step_100, or auto")
    if not os.path.exists(os.path.join(directory, "training_state", "state.json")):
        raise ValueError(f"--resume_from {resume_from}: {directory} has no training_state/state.json, so it is not a "
                         "checkpoint to go on from; give another step directory, or start anew with --model")
    return os.path.realpath(directory)


def load_state(directory):
    """The JSON state that `save` was given, with its step."""
    return read_json(os.path.join(directory, "training_state", "state.json"))


def load_training_tensors(directory, model, optimizer, step):
    """Restore moments, master weights and RNG, exactly. Raises ValueError if a tensor is missing or misshapen."""
    entries = read_header(os.path.join(directory, "training_state", "tensors.safetensors"))
    parameters = dict(model.named_parameters())
    wanted = {f"{key}.{name}": p for key in MOMENTS for name, p in parameters.items()
              if p.requires_grad}
    masters = {n: e for n, e in entries.items() if n.startswith("master.")}
    wanted.update({n: parameters.get(n.removeprefix("master.")) for n in masters})
    stored = {n for n in entries if not n.startswith("rng.")}
    if stored != set(wanted) or any(p is None or entries[n].shape != p.shape for n, p in wanted.items()):
        differ = sorted(stored ^ set(wanted)) or "a shape"
        raise ValueError(f"{directory}/training_state does not belong to this model: {differ[:5]} differ")
    for name, p in parameters.items():
        if p.requires_grad:
            moments = {key: torch.empty_like(p) for key in MOMENTS}
            for key, tensor in moments.items():
                read_into(entries[f"{key}.{name}"], tensor)
            optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device), **moments}
    for name, entry in masters.items():
        read_into(entry, parameters[name.removeprefix("master.")])
    for name in (n for n in entries if n.startswith("rng.")):
        rng = torch.empty(entries[name].shape, dtype=torch.uint8)
        read_into(entries[name], rng)
        if name == "rng.cpu":
            torch.set_rng_state(rng)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(rng)
