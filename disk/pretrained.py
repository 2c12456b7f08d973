"""A model directory in Hugging Face's layout, or a PEFT adapter's: found, read and written tensor by tensor.

Owns where a tensor's bytes lie in which safetensors file, which of them are this rank's, and which other
files such a directory needs. Nothing read here can run code.
"""

import hashlib
import math
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from disk import files
from ops.memory import is_split
from ops.nf4 import NF4Weight
from settings.errors import UserError
from settings.venv import PROJECT

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE, ADAPTER_PREFIX = "adapter_model.safetensors", "base_model.model."  # PEFT's
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                   "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
                   "tokenizer.model")
CHUNK = 2**20  # elements converted at a time from the disk's dtype to memory's: 2 MB stay in a core's cache


def model_directory(name, patterns=("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")):
    """The local directory of a model: `tiny`, a path, or a hub id, whose files of `patterns` are downloaded,
    or found in the hub's cache.

    Raises UserError when there is no such directory, or the hub cannot be reached or does not have it.
    """
    if name == "tiny":
        return os.path.join(PROJECT, "models", "tiny")
    if os.path.isdir(name):
        return name
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise UserError(f"--model {name}: no such directory; give a directory, a hub id such as "
                        "Qwen/Qwen2.5-0.5B, or tiny")
    from huggingface_hub import snapshot_download  # imported here: most runs read a directory
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return snapshot_download(name, allow_patterns=list(patterns))
    except LocalEntryNotFoundError as error:
        raise UserError(f"--model {name}: the hub can't be reached and the model is not in its cache; "
                        "use --model PATH with a local directory, or --model tiny") from error
    except HfHubHTTPError as error:
        raise UserError(f"--model {name}: {str(error).strip().splitlines()[-1]}; use --model PATH with a "
                        "local directory, or --model tiny") from error


def is_adapter(directory):
    return os.path.exists(os.path.join(directory, "adapter_config.json"))


@dataclass
class Entry:
    """One tensor of a safetensors file: where its bytes are."""

    file: str
    dtype: str
    shape: tuple
    start: int  # of its bytes, counted from the beginning of the file


def read_header(path):
    """name -> Entry of a safetensors file, in its order. Raises UserError when it is torn or not safetensors.

    The package checks the header against the file; the bytes are then read by position instead of through its
    memory map, whose pages would count as this process's: loading bf16 into fp32 would peak at 1.5 times the
    size of the model.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe waits for its writer
        raise UserError(f"{path} is not a file")
    with open(path, "rb") as f:
        position = 8 + int.from_bytes(f.read(8), "little")
    entries = {}
    try:
        with safe_open(path, framework="pt") as f:
            for name in f.offset_keys():
                tensor = f.get_slice(name)
                dtype, shape = tensor.get_dtype(), tuple(tensor.get_shape())
                if dtype not in DTYPES:
                    raise UserError(f"{path}: {name:.200} is of dtype {dtype}; these can be read: "
                                    f"{', '.join(DTYPES)}")
                entries[name] = Entry(path, dtype, shape, position)
                position += math.prod(shape) * DTYPES[dtype].itemsize
    except SafetensorError as error:
        raise UserError(f"{path} is torn or not safetensors: {error!s:.300}") from error
    return entries


def weight_entries(directory):
    """name -> Entry of a model directory, one file or sharded with an index, or of a PEFT adapter's."""
    if is_adapter(directory):
        entries = read_header(os.path.join(directory, ADAPTER_FILE))
        return {name.removeprefix(ADAPTER_PREFIX): entry for name, entry in entries.items()}
    index = os.path.join(directory, INDEX_FILE)
    if not os.path.exists(index):
        return read_header(os.path.join(directory, "model.safetensors"))
    weight_map = files.read_json(index)
    weight_map = weight_map.get("weight_map", {}) if isinstance(weight_map, dict) else {}
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index}: weight_map must be an object of file names by tensor, it is "
                        f"{weight_map!r:.60}")
    named = sorted(set(weight_map.values()))
    # no separator, no NUL
    if not named or not all(re.fullmatch(r"[\w.+ -]{1,200}\.safetensors", file) for file in named):
        raise UserError(f"{index}: weight_map must name files of the same directory, such as "
                        f"model-00001-of-00002.safetensors, it names {ascii(named[:3]):.200}")
    entries = {}
    for file in named:
        entries.update(read_header(os.path.join(directory, file)))
    found = {name: os.path.basename(entry.file) for name, entry in entries.items()}
    if found != weight_map:
        differ = sorted(name for name in {**found, **weight_map} if found.get(name) != weight_map.get(name))
        raise UserError(f"{index} and the files it names do not hold the same tensors: "
                        f"{', '.join(differ[:5]):.300}")
    return entries


def fingerprint(directory):
    """A short hash of the first bytes of a model directory's tensors: tells one base from another."""
    state = hashlib.blake2b(digest_size=16)
    for name, entry in sorted(weight_entries(directory).items()):
        with open(entry.file, "rb") as f:
            f.seek(entry.start)
            size = min(256, math.prod(entry.shape) * DTYPES[entry.dtype].itemsize)
            state.update(f"{name} {entry.dtype} {entry.shape}".encode() + f.read(size))
    return state.hexdigest()


def fitting_entries(model, directory):
    """({name: Entry} of a directory's weights, {name: parameter to fill}, {name: module that packs it}).

    `model` may be on the meta device, so that a config.json that does not fit its weights is refused before
    it costs memory. Raises UserError naming the missing, unexpected or wrongly shaped tensors.
    """
    entries, adapter = weight_entries(directory), is_adapter(directory)
    for name, entry in entries.items():
        if entry.dtype not in ("F32", "BF16", "F16"):
            raise UserError(f"weights must be F32, BF16 or F16, not {name} ({entry.dtype}, {entry.file}): "
                            "quantised models can't be trained")
    entries = {n: e for n, e in entries.items() if not n.endswith("rotary_emb.inv_freq")}  # it is computed
    parameters = {n: p for n, p in model.named_parameters(remove_duplicate=False) if is_stored(n, p, adapter)}
    # A tied head is filled with the embedding, and a file need not have it.
    owned = {n: p for n, p in model.named_parameters() if n in parameters}
    fits = f"{directory} does not fit " + ("this model" if adapter else "its config.json")
    missing = sorted(set(owned) - set(entries))
    unexpected = sorted(set(entries) - set(parameters))
    if missing or unexpected:
        counts = f" ({len(missing)} and {len(unexpected)} in all)" if len(missing + unexpected) > 8 else ""
        raise UserError(f"{fits}: missing {missing[:8] or 'nothing'}, unexpected "
                        f"{unexpected[:8] or 'nothing'}{counts}")
    packed = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, NF4Weight)}
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    shapes.update({name: (m.out_features, m.in_features) for name, m in packed.items()})
    wrong = [f"{n} is {e.shape}, not {shapes[n]}" for n, e in entries.items() if e.shape != shapes[n]]
    if wrong:
        raise UserError(f"{fits}: {'; '.join(wrong[:8])} ({len(wrong)} in all)")
    return entries, owned, packed


def is_stored(name, p, adapter):
    """Whether a directory holds a parameter: an adapter's what is trained, a model's all but adapters."""
    return p.requires_grad if adapter else ".lora_" not in name


def load_weights(model, directory, optimizer=None):
    """Fill the parameters of `model` (materialised, any float dtype), or the tensors that `optimizer` steps
    for them, from a model directory, or those that an adapter has from an adapter's directory.

    Raises UserError as fitting_entries does.
    """
    entries, owned, packed = fitting_entries(model, directory)
    masters = master_weights(model, optimizer)
    for name in packed.keys() & owned.keys():
        read_packed(name, entries[name], masters[name], packed[name])
    # The system clears new memory at its first write, which takes as long as reading does: on all cores.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        plain = [name for name in owned if name not in packed]
        # list() raises what a thread raised
        list(pool.map(lambda name: read_into(entries[name], masters[name]), plain))
    for name in set(entries) - set(owned):  # the file holds a tied weight twice: both copies must be equal
        copy = torch.empty_like(masters[name])
        read_into(entries[name], copy)
        if not torch.equal(local_part(copy)[0], local_part(masters[name])[0]):
            raise UserError(f"{entries[name].file}: config.json ties {name} to the embedding, but they "
                            "differ; set tie_word_embeddings to false")


def shard_map(model, directory):
    """What saving needs to write a model's weight files again: {file name: {tensor name: dtype code}}."""
    entries, owned, _ = fitting_entries(model, directory)
    found = {}
    for name, entry in entries.items():
        if name in owned:
            found.setdefault(os.path.basename(entry.file), {})[name] = entry.dtype
    return found


def master_weights(model, optimizer):
    """{name: tensor that the optimizer steps, or the parameter without an optimizer}; a tied one twice."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: p if optimizer is None else optimizer.master(p) for name, p in named}


def local_part(tensor):
    """(this rank's storage of a tensor, [(start, stop) of it in each dimension]). A plain tensor is all here.

    A DTensor is split along tp first and then, each part again, along dp, as fsdp.shard does it, though its
    mesh lists dp first. torch's own function for these offsets is private.
    """
    spans = [(0, n) for n in tensor.shape]
    if not is_split(tensor):
        return tensor.detach(), spans
    mesh = tensor.device_mesh
    for axis in reversed(range(mesh.ndim)):  # tp, then dp
        dim = getattr(tensor.placements[axis], "dim", None)
        if dim is not None:
            (start, stop), rank = spans[dim], mesh.get_local_rank(axis)
            size = -(-(stop - start) // mesh.size(axis))
            spans[dim] = (min(start + rank * size, stop), min(start + (rank + 1) * size, stop))
    return tensor.to_local().detach(), spans


def read_into(entry, tensor, spans=None):
    """Fill `tensor` (any device and dtype) from the disk: only this rank's part of it, or that of `spans`.

    spans  [(start, stop) in each dimension]

    At most one chunk of CHUNK elements is in memory beside it.
    """
    local, own = local_part(tensor)
    dtype, flat = DTYPES[entry.dtype], local.view(-1)
    direct = dtype == local.dtype and local.device.type == "cpu"
    buffer = None if direct else torch.empty(min(CHUNK, flat.numel()), dtype=dtype)
    with open(entry.file, "rb", buffering=0) as f:
        for first, count in runs(entry.shape, spans or own):
            f.seek(entry.start + first * dtype.itemsize)
            here, flat = flat[:count], flat[count:]
            for part in here.split(CHUNK):
                target = part if direct else buffer[: part.numel()]
                raw = memoryview(target.view(torch.uint8).numpy())
                while raw:
                    n = f.readinto(raw)
                    if not n:
                        raise UserError(f"{entry.file} ended while it was read")
                    raw = raw[n:]
                if not direct:
                    part.copy_(target)


def runs(shape, spans):
    """[(first element, count)] of a tensor's part that lie side by side in its file: one run for rows, or one
    a row where columns are split too."""
    width, (start, stop) = math.prod(shape[1:]), spans[0] if spans else (0, 1)
    if not spans[1:] or spans[1] == (0, shape[1]):
        return [(start * width, (stop - start) * width)]
    first, last = spans[1]
    return [(row * width + first, last - first) for row in range(start, stop)]


def read_packed(name, entry, tensor, module):
    """Fill a weight that `module` stores in 4 bits, reading about CHUNK elements of the matrix at a time."""
    local, spans = local_part(tensor)
    (first, last), columns = spans[0], module.in_features
    rows = max(1, CHUNK // columns)
    for start in range(first, last, rows):
        weight = torch.empty(min(rows, last - start), columns)
        read_into(entry, weight, [(start, start + len(weight)), (0, columns)])
        try:
            module.quantize_rows(local[start - first :][: len(weight)], weight.to(local.device))
        except UserError as error:
            raise UserError(f"{entry.file}: {name}, counted from row {start}: {error}") from error


def copy_slice(tensor, whole):
    """Copy this rank's part of a whole tensor into `tensor`, which may be split."""
    part, spans = local_part(tensor)
    part.copy_(whole[tuple(slice(*span) for span in spans)])


def adapter_shard_map(model):
    """The layout of an adapter: one fp32 file of all that is trained; a tied head and embedding both."""
    named = model.named_parameters(remove_duplicate=False)
    return {ADAPTER_FILE: {name: "F32" for name, p in named if p.requires_grad}}


def numbered(tensors, stem, count):
    """Spread {name: tensor} over `count` files of about equal size, in order: file name -> names."""
    groups, position, total = {}, 0, sum(t.numel() for t in tensors.values())
    for name, tensor in tensors.items():
        groups.setdefault(position * count // total, []).append(name)
        position += tensor.numel()
    names = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}" for i in range(len(groups))]
    if len(groups) == 1:
        names = [stem]
    return {f"{file}.safetensors": group for file, group in zip(names, groups.values())}


def write_index(directory, shards, total_size):
    """The index of a model in several files, {file: names}, of total_size bytes."""
    weight_map = dict(sorted((name, file) for file, group in shards.items() for name in group))
    files.write_file(os.path.join(directory, INDEX_FILE),
                     {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def write_shared(directory, shards, tensors, dtypes, prefix=""):
    """Write {file: names} of tensors that may be split over the ranks, with `prefix` before each name; every
    rank calls it. Return {file: the rank that wrote it}. A writer gathers its tensors one by one: no rank
    holds more of the model at a time than its files."""
    rank, size = rank_and_size()
    writers = {file: i % size for i, file in enumerate(shards)}
    for file, names in shards.items():
        mine = {}
        for name in names:
            tensor = gathered(tensors[name].detach())
            if writers[file] == rank:
                tensor = tensor.to("cpu", dtypes[name])
                is_tied = any(tensor.data_ptr() == other.data_ptr() for other in mine.values())
                mine[prefix + name] = tensor.clone() if is_tied else tensor  # save_file refuses shared memory
        if mine:
            write_safetensors(os.path.join(directory, file), mine)
    return writers


def gathered(tensor):
    """The whole of a tensor. Where it is split, every rank calls this, and parts go through the device."""
    if not is_split(tensor):
        return tensor
    tensor = tensor.to(tensor.device_mesh.device_type)
    if tensor.device_mesh.ndim > 1:  # dp, then tp: full_tensor does it in that order too, but warns about it
        from torch.distributed.tensor import Replicate  # takes half a second; such a mesh has loaded it

        tensor = tensor.redistribute(placements=[Replicate(), tensor.placements[1]])
    return tensor.full_tensor()


def write_safetensors(path, tensors):
    """Write {name: tensor} and flush it to the disk. Byte for byte what an untouched model was read from.

    save_file renames a file over `path` that only its owner can read. It gets the mode that open() gives a
    new file here: that needs no os.umask, which can only be read by setting it, for all threads.
    """
    with files.naming(path):
        with open(path, "wb") as f:
            mode = stat.S_IMODE(os.fstat(f.fileno()).st_mode)
        contiguous = {name: t.detach().contiguous() for name, t in tensors.items()}
        save_file(contiguous, path, metadata={"format": "pt"})
        os.chmod(path, mode)
    files.sync(path)


def rank_and_size():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def export_files(source, config_json, tokenizer_source, tokenizer, adapter_config=None):
    """file name -> bytes or a JSON value: all that a saved model or adapter directory needs but the weights.

    source, config_json  the base model's directory and its parsed config.json
    tokenizer_source     the directory whose tokenizer files are copied
    tokenizer            the ChatTokenizer of that directory
    adapter_config       the adapter's settings, by PEFT's names, where an adapter is saved and not a model

    Read once, at the start of a run: the directories may be gone at its last save.
    """
    exported = files.read_bytes(tokenizer_source, TOKENIZER_FILES)
    if adapter_config is None:
        exported.update(files.read_bytes(source, ["config.json"]))
        exported["generation_config.json"] = generation_config(source, config_json, tokenizer.stop_token_id)
    else:
        exported["adapter_config.json"] = adapter_config
    if tokenizer.is_fallback:
        exported["chat_template.jinja"] = tokenizer.source.encode()
    return exported


def generation_config(directory, config, stop_token_id):
    """generation_config.json with the trained turn-ending token among its eos ids.

    A base Qwen2.5 lists <|endoftext|> only: trained on ChatML, it would not stop at the end of its answer.
    """
    path = os.path.join(directory, "generation_config.json")
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    if os.path.exists(path):
        found = files.read_json(path)
    else:
        found = {key: config[key] for key in keys if config.get(key) is not None}
    eos = found.get("eos_token_id") if isinstance(found, dict) else "nothing: the file is no object"
    if eos is None:
        eos = []
    elif not isinstance(eos, list):
        eos = [eos]
    if any(type(i) is not int for i in eos):
        raise UserError(f"{path}: eos_token_id must be a token's id or a list of them, it is {eos!r:.60}")
    if stop_token_id not in eos:
        eos.append(stop_token_id)
    return {**found, "eos_token_id": eos if len(eos) > 1 else eos[0]}
