"""Model directories in Hugging Face's format and PEFT adapters: find and read them tensor by tensor.

This file knows where the bytes of each tensor are in the safetensors files, which of them belong to this
rank's shard, and which other files such a directory needs. No file that is read here can run code.

An entry (TensorEntry) is what a safetensors file's header says about one tensor.
"""

import hashlib
import math
import os
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from disk import files, foreign, layout
from families.config import ModelConfig
from families.rows import TIED_BY_DEFAULT
from ops.memory import is_split
from ops.nf4 import NF4Weight, check_finite
from settings.errors import UserError
from settings.venv import PROJECT

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}
# Bits per element of all dtypes that a file may have, in safetensors' order of tensors in a file
BITS = dict(U64=64, I64=64, F64=64, C64=64, F32=32, U32=32, I32=32, BF16=16, F16=16, U16=16, I16=16,
            F8_E5M2FNUZ=8, F8_E4M3FNUZ=8, F8_E8M0=8, F8_E4M3=8, F8_E5M2=8, I8=8, U8=8, F6_E3M2=6, F6_E2M3=6,
            F4=4, BOOL=8)
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"  # PEFT's file, and its prefix of every tensor's name
ADAPTER_PREFIX = "base_model.model."
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                   "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
                   "tokenizer.model")
# Of images, video and audio; a multimodal model's checkpoint has them as they were.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "image_processor_config.json",
                   "video_preprocessor_config.json", "audio_processor_config.json",
                   "feature_extractor_config.json", "chat_template.json")
# What is downloaded of a hub id beside its weights: not the folders original/, onnx/, ... that many have
MODEL_FILES = ("config.json", "generation_config.json", INDEX_FILE, "adapter_config.json", *TOKENIZER_FILES,
               *PROCESSOR_FILES, "additional_chat_templates/*.jinja")
GIT_LFS = b"version https://git-lfs"
INV_FREQ = "rotary_emb.inv_freq"  # in each layer, or once for all
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")  # a row for each token
QUANTIZED = ("a quantised model can't be trained: use the original weights as --model, and --use_lora "
             "--quantize nf4 to store them in 4 bits here")
HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"
CHUNK = 2**20  # elements that are read and converted at a time: 2 MB of bf16 stay in a core's cache


def model_directory(name, flag="--model", patterns=None):
    """The local directory of a model.

    name      tiny, a path, or a hub id
    flag      where the name comes from, for errors
    patterns  which files of a hub id are downloaded; None: those of a model that are read here, and no others

    Raises UserError if there is no such directory, if the hub can't be reached, if it has no such model, or,
    without patterns, if the hub's model can't be read here: before its weights are downloaded.
    """
    if name == "tiny":
        return os.path.join(PROJECT, "models", "tiny")
    if os.path.isfile(name):
        name = files.follow(name)
    if os.path.isdir(name):
        return name
    if os.path.isfile(name):
        foreign.check_file(name, flag)
    if not re.fullmatch(HUB_ID, name):
        raise UserError(f"{flag} {name}: no such directory; use a directory, a hub id such as "
                        "Qwen/Qwen2.5-0.5B, or tiny")
    if patterns is not None:
        return download(name, flag, patterns)
    directory = download(name, flag, MODEL_FILES)
    config = os.path.join(directory, "config.json")
    if os.path.exists(config) and not is_adapter(directory):
        try:
            ModelConfig.from_dict(files.read_json(config))
        except UserError as error:
            raise UserError(f"{flag} {name}: {error}") from error
    # The same revision, even if the repository has changed meanwhile: a snapshot's directory is its commit.
    commit = os.path.basename(directory)
    same = {"revision": commit} if re.fullmatch("[0-9a-f]{40}", commit) else {}
    weights = weight_files(directory)
    directory = download(name, flag, [*MODEL_FILES, *weights], **same)
    if not any(os.path.exists(os.path.join(directory, file)) for file in weights):
        names = hub_files(name)
        advice = foreign.weight_file_advice(names or foreign.names_in(directory), name)
        if not names and not advice:
            advice = "the hub can't be reached, and its cache has only other files of this model"
        raise UserError(f"{flag} {name} has no {weights[0]}; {advice or foreign.HUGGING_FACE_FORM}")
    return directory


def download(name, flag, patterns, **revision):
    """Download the files of a hub id that match, unless the hub's cache has them; return their directory."""
    files.check_hub_endpoint()
    from huggingface_hub import snapshot_download  # slow import, and most runs read a directory
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    others = ", or --model tiny," if flag == "--model" else ","
    try:
        return snapshot_download(name, allow_patterns=list(patterns), **revision)
    except LocalEntryNotFoundError as error:
        raise UserError(f"{flag} {name}: no such directory, the hub can't be reached, and its cache lacks "
                        f"it; use {flag} PATH with a local directory{others} or set HF_ENDPOINT to a "
                        "mirror of the hub") from error
    except HfHubHTTPError as error:
        raise UserError(f"{flag} {name}: {str(error).strip().splitlines()[-1]}; use {flag} PATH with a "
                        f"local directory{others.rstrip(',')}") from error


def hub_files(name):
    """The names of the files of a hub id; [] if the hub can't be reached."""
    from huggingface_hub import HfApi  # slow import
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return HfApi().list_repo_files(name)
    except (OSError, *HfHubHTTPError.__bases__):  # the errors of the HTTP package: its name changes
        return []


def weight_files(directory):
    """The names of the weight files of a model or adapter directory, which need not exist."""
    if is_adapter(directory):
        return [ADAPTER_FILE]
    index = os.path.join(directory, INDEX_FILE)
    return sorted(set(read_index(index).values())) if os.path.exists(index) else ["model.safetensors"]


def is_adapter(directory):
    return os.path.exists(os.path.join(directory, ADAPTER_CONFIG))


@dataclass
class TensorEntry:
    """One tensor of a safetensors file: where its bytes are."""

    file: str
    dtype: str  # safetensors' code, a key of BITS
    shape: tuple
    start: int  # position of its first byte in the file

    @property
    def n_bytes(self):
        return math.prod(self.shape) * BITS[self.dtype] // 8


def read_header(path):
    """{name: TensorEntry} of a safetensors file, in the order of the file.

    The safetensors package checks the header against the file. Tensors are then read by position (read_into),
    not through the package's memory map: its pages count as memory of this process, and loading bf16 into
    fp32 would peak at 1.5 times the size of the model.

    Raises UserError if the file is truncated or not safetensors, and for a dtype that is not in BITS.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # to open a pipe would block until somebody writes
        raise UserError(f"{path} is not a file")
    with open(path, "rb") as f:
        position = 8 + int.from_bytes(f.read(8), "little")
    entries = {}
    try:
        with safe_open(path, framework="pt") as f:
            for name in f.offset_keys():
                tensor = f.get_slice(name)
                dtype, shape = tensor.get_dtype(), tuple(tensor.get_shape())
                if dtype not in BITS:
                    raise UserError(f"{path}: {name:.200} has dtype {dtype}, which is not known here")
                entries[name] = TensorEntry(path, dtype, shape, position)
                position += entries[name].n_bytes
    except SafetensorError as error:
        with open(path, "rb") as f:
            if f.read(len(GIT_LFS)) == GIT_LFS:
                raise UserError(f"{path} is a pointer of git-lfs, not the weights; run git lfs pull in its "
                                "directory, or download the model again") from error
        raise UserError(f"{path} is truncated or not safetensors: {error!s:.300}") from error
    return entries


def read_index(index):
    """{tensor: file} of a model.safetensors.index.json. Raises UserError if it is malformed."""
    content = files.read_json(index)
    weight_map = content.get("weight_map", {}) if isinstance(content, dict) else {}
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index}: weight_map must be an object that maps tensor names to file names, it is "
                        f"{weight_map!r:.60}")
    listed = sorted(set(weight_map.values()))
    # The pattern excludes separators and NUL, so an untrusted index can't name files elsewhere.
    if not listed or not all(re.fullmatch(r"[\w.+ -]{1,200}\.safetensors", file) for file in listed):
        raise UserError(f"{index}: weight_map must name files of the same directory, such as "
                        f"model-00001-of-00002.safetensors, it names {ascii(listed[:3]):.200}")
    return weight_map


def weight_entries(directory):
    """stored_entries, those of an adapter under the names of the model's parameters.

    Raises UserError as stored_entries does, and if two names of an adapter mean the same.
    """
    stored = stored_entries(directory)
    if not is_adapter(directory):
        return stored
    entries = {layout.name_of_adapter(name.removeprefix(ADAPTER_PREFIX)): e for name, e in stored.items()}
    if len(entries) < len(stored):
        raise UserError(f"{directory}: {ADAPTER_FILE} has some tensors under several names")
    return entries


def stored_entries(directory):
    """{name: TensorEntry} of a model directory (one file, or several with an index) or a PEFT adapter.

    Raises UserError as read_header does, and for an index that is malformed or does not match its files.
    """
    if is_adapter(directory):
        return read_header(os.path.join(directory, ADAPTER_FILE))
    index = os.path.join(directory, INDEX_FILE)
    if not os.path.exists(index):
        return read_header(os.path.join(directory, "model.safetensors"))
    weight_map = read_index(index)
    listed = sorted(set(weight_map.values()))
    foreign.check_complete(index, listed)
    entries = {}
    for file in listed:
        entries.update(read_header(os.path.join(directory, file)))
    actual = {name: os.path.basename(entry.file) for name, entry in entries.items()}
    if actual != weight_map:
        names = actual.keys() | weight_map.keys()
        differ = sorted(name for name in names if actual.get(name) != weight_map.get(name))
        raise UserError(f"{index} and the files that it names do not have the same tensors: "
                        f"{', '.join(differ[:5]):.300}")
    return entries


def fingerprint(directory, shares=False):
    """A short hash of a model directory's weights: the name, dtype, shape and all bytes of each tensor.

    The files' names and the order of the tensors do not matter. It reads every byte once, all cores together
    at about 6 GB/s each; a load that follows finds the files in the page cache.

    shares  every rank calls this, and those of a node share the reading; each gets the hash of its own node's
            files

    An older version hashed the first 256 bytes of each tensor; that hash comes first, see is_same.
    """
    entries, heads = weight_entries(directory), hashlib.blake2b(digest_size=16)
    for name, entry in sorted(entries.items()):
        with open(entry.file, "rb") as f:
            f.seek(entry.start)
            heads.update(f"{name} {entry.dtype} {entry.shape}".encode() + f.read(min(256, entry.n_bytes)))
    (rank, world_size), n_local = rank_and_world_size() if shares else (0, 1), 1
    if shares:
        n_local = int(os.environ.get("LOCAL_WORLD_SIZE") or world_size)
    mine = sorted(entries.items())[rank % n_local :: n_local]
    with ThreadPoolExecutor(max(1, min(16, (os.cpu_count() or 1) // n_local))) as pool:
        sums = list(pool.map(lambda item: tensor_hash(*item), mine))
    # a sum, so that it does not depend on how the tensors are divided
    by_node = torch.zeros(-(-world_size // n_local), 2, dtype=torch.int64)
    by_node[rank // n_local] = torch.tensor([(0, 0), *sums]).sum(0)
    if world_size > 1:
        dist.all_reduce(by_node)
    high, low = by_node[rank // n_local].tolist()
    return f"{heads.hexdigest()}-{high:016x}{low:016x}"


def tensor_hash(name, entry):
    """Hash of a tensor and its name: two integers below 2**40, so that 2**23 of them have a sum in int64."""
    n_bytes, crc = entry.n_bytes, 0
    buffer = memoryview(bytearray(min(2**20, max(n_bytes, 1))))
    with files.naming(entry.file), open(entry.file, "rb", buffering=0) as f:
        f.seek(entry.start)
        while n_bytes and (n := f.readinto(buffer[:n_bytes])):
            crc, n_bytes = zlib.crc32(buffer[:n], crc), n_bytes - n
    digest = hashlib.blake2b(f"{name} {entry.dtype} {entry.shape} {crc}".encode(), digest_size=10).digest()
    return int.from_bytes(digest[:5], "little"), int.from_bytes(digest[5:], "little")


def is_same(then, now):
    """Whether two fingerprints are of the same weights; `then` may be of an older version."""
    return then == now or ("-" not in then and then == now.partition("-")[0])


@dataclass
class Contents:
    """The tensors of a model or adapter directory's weight files.

    entries  {name of the model's parameter: TensorEntry}, those of the text model
    names    layout.TextNames, the spelling of these names in the files
    others   {name in the files: TensorEntry}, of a vision tower, ...: not trained, and copied to checkpoints
    strays   names in the files of tensors that should not be there
    """

    entries: dict
    names: layout.TextNames
    others: dict
    strays: list

    @classmethod
    def of(cls, directory):
        """The Contents of a directory. Raises UserError as weight_entries and TextNames.find do."""
        stored, config = weight_entries(directory), os.path.join(directory, "config.json")
        if is_adapter(directory):
            return cls(stored, layout.TextNames("model.", layout.HEAD), {}, [])
        multimodal = os.path.exists(config) and layout.is_multimodal(files.read_json(config))
        names = layout.TextNames.find(stored, multimodal, directory)
        if not multimodal:  # old checkpoints store inv_freq, which the model computes
            stored = {name: e for name, e in stored.items() if not name.endswith(INV_FREQ)}
        of_model = {name: names.of_model(name) for name in stored}
        others = {name: entry for name, entry in stored.items() if of_model[name] is None}
        entries = {of_model[name]: entry for name, entry in stored.items() if name not in others}
        strays = [name for name in others if not multimodal and not layout.MTP.match(name)]
        entries = {name: e for name, e in entries.items() if not name.endswith(INV_FREQ)}
        return cls(entries, names, others, strays)


def match_weights(model, directory):
    """Match the tensors of a model or adapter directory with the parameters of `model`.

    Returns ({name: TensorEntry}, {name: parameter}, {name: 4-bit module that stores it}). The parameters do
    not contain a tied head, the entries may.

    An embedding or head of the directory may have fewer rows than `model`: see read_weight.

    `model` may be on the meta device: weights that do not fit config.json are then refused before they cost
    memory. Raises UserError that names the missing, unexpected or wrongly shaped tensors, as the directory
    spells them.
    """
    contents, adapter = Contents.of(directory), is_adapter(directory)
    entries, spelling = contents.entries, contents.names.in_files
    check_dtypes({spelling(name): entry for name, entry in entries.items()})
    allowed = {n: p for n, p in model.named_parameters(remove_duplicate=False) if is_stored(n, p, adapter)}
    # Without duplicates: a tied head gets the embedding's values, so a file need not contain it.
    required = {n: p for n, p in model.named_parameters() if n in allowed}
    does_not_fit = f"{directory} does not fit " + ("this model" if adapter else "its config.json")
    missing = sorted(map(spelling, set(required) - set(entries)))
    unexpected = sorted([*map(spelling, set(entries) - set(allowed)), *contents.strays])
    if missing or unexpected:
        counts = f" ({len(missing)} and {len(unexpected)} in all)" if len(missing + unexpected) > 8 else ""
        raise UserError(f"{does_not_fit}: missing {missing[:8] or 'nothing'}, unexpected "
                        f"{unexpected[:8] or 'nothing'}{counts}")
    nf4_modules = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, NF4Weight)}
    shapes = {name: tuple(p.shape) for name, p in allowed.items()}
    shapes.update({name: (m.out_features, m.in_features) for name, m in nf4_modules.items()})
    if not adapter and model.config.vocab_size > (rows := embedding_rows(directory)):  # --resize_embeddings
        shapes.update({name: (rows, *shapes[name][1:]) for name in EMBEDDINGS if name in shapes})
    wrong = [f"{spelling(n)} is {e.shape}, not {shapes[n]}" for n, e in entries.items()
             if e.shape != shapes[n]]
    if wrong:
        raise UserError(f"{does_not_fit}: {'; '.join(wrong[:8])} ({len(wrong)} in all)")
    return entries, required, nf4_modules


def tied_in_files(directory):
    """Whether head and embedding of a model directory are one tensor; None: as config.json says.

    As transformers 5 loads them. They are two if the files have both and they differ: it writes
    tie_word_embeddings true for each Mistral 3 that it saves. They are one if there is no head, and the
    config.json of a multimodal model says nothing outside of text_config, where most classes have true.

    Equal ones are read once in full, others up to the first difference.
    """
    config_json = files.read_json(os.path.join(directory, "config.json"))
    entries = Contents.of(directory).entries
    embedding, head = (entries.get(name) for name in EMBEDDINGS)
    if not head and layout.is_multimodal(config_json):
        says = config_json.get("tie_word_embeddings") is not None
        return None if says or config_json.get("model_type") not in TIED_BY_DEFAULT else True
    if not (embedding and head) or {embedding.dtype, head.dtype} - {"F32", "BF16", "F16"}:
        return None
    if embedding.shape != head.shape or len(head.shape) != 2:
        return False
    rows, width = head.shape
    start = stop = 0
    while stop < rows:  # few rows first: of two tensors the first ones differ
        start, stop = stop, min(rows, max(4 * stop, 16), stop + max(1, 4 * CHUNK // max(1, width)))
        spans = [(start, stop), (0, width)]
        pieces = torch.empty(2, spans[0][1] - start, width)
        for entry, piece in zip((embedding, head), pieces):
            read_into(entry, piece, spans)
        if not torch.equal(*pieces):
            return False
    return None


def check_dtypes(entries):
    """Raise UserError if a weight of {name: TensorEntry} has a dtype that can't be trained."""
    for name, entry in entries.items():
        if entry.dtype not in ("F32", "BF16", "F16"):
            remedy = "convert them to BF16 or F32" if entry.dtype in ("F64", "C64") else QUANTIZED
            raise UserError(f"{entry.file}: {name} has dtype {entry.dtype}, but weights must be F32, BF16 or "
                            f"F16; {remedy}")


def embedding_rows(directory):
    """The vocab_size of a model directory's config.json: a model with --resize_embeddings has more rows."""
    return ModelConfig.from_dict(files.read_json(os.path.join(directory, "config.json"))).vocab_size


def is_stored(name, p, adapter):
    """Whether a directory stores a parameter. Adapters: trained parameters. Models: all except adapters'."""
    return p.requires_grad if adapter else ".lora_" not in name


def load_weights(model, directory, optimizer=None):
    """Load the weights of a model or adapter directory into `model`.

    model      materialised, any float dtype
    optimizer  if given, the tensors that it updates are loaded instead of the parameters

    Raises UserError as match_weights does, and if two copies of a tied weight differ.
    """
    entries, parameters, nf4_modules = match_weights(model, directory)
    masters = master_weights(model, optimizer)
    for name in nf4_modules.keys() & parameters.keys():
        read_quantized(name, entries[name], masters[name], nf4_modules[name])
    # On all cores: the system clears new memory at the first write, which takes as long as reading.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        names = [name for name in parameters if name not in nf4_modules]
        # list() re-raises an exception of a thread
        list(pool.map(lambda name: read_weight(entries[name], masters[name]), names))
    for name in set(entries) - set(parameters):  # the file has a tied weight twice
        copy = torch.empty_like(masters[name])
        read_weight(entries[name], copy)
        if not torch.equal(local_shard(copy)[0], local_shard(masters[name])[0]):
            raise UserError(f"{entries[name].file}: config.json ties {name} to the embedding, but they "
                            "differ; set tie_word_embeddings to false")


def master_weights(model, optimizer):
    """{name: tensor that the optimizer updates}, or the parameters without one. Lists tied ones twice."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: p if optimizer is None else optimizer.master(p) for name, p in named}


def local_shard(tensor):
    """(this rank's shard of a tensor, [(start, stop) of the shard in each dimension]).

    The shard of a plain tensor is the tensor. A DTensor is split along tp first, and each slice again along
    dp, in the order of tp.split and fsdp.shard; its mesh lists dp first. torch has a function for these
    offsets, but it is private.
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
    """Read a tensor, or a slice of it, from the disk into `tensor` (any device and dtype).

    spans  [(start, stop) in each dimension], the slice to read; by default this rank's shard of `tensor`

    Beside `tensor` it needs memory for CHUNK elements, or none if the dtypes are equal on the CPU.
    """
    local, local_spans = local_shard(tensor)
    dtype = DTYPES[entry.dtype]
    rest = local.view(-1)
    direct = dtype == local.dtype and local.device.type == "cpu"
    buffer = None if direct else torch.empty(min(CHUNK, rest.numel()), dtype=dtype)
    with open(entry.file, "rb", buffering=0) as f:
        for first, count in contiguous_runs(entry.shape, spans or local_spans):
            f.seek(entry.start + first * dtype.itemsize)
            run, rest = rest[:count], rest[count:]
            for chunk in run.split(CHUNK):
                target = chunk if direct else buffer[: chunk.numel()]
                unread = memoryview(target.view(torch.uint8).numpy())
                while unread:
                    n = f.readinto(unread)
                    if not n:
                        raise UserError(f"{entry.file} ended while it was read")
                    unread = unread[n:]
                if not direct:
                    chunk.copy_(target)


def read_weight(entry, tensor):
    """Read this rank's shard of a weight. Rows that the file lacks get the mean of the file's rows.

    The mean is the usual start for the rows of new tokens: zeros or noise would give them logits far from
    those of any known token. Each rank that has new rows reads the file's rows once, in pieces, for it.
    """
    if entry.shape == tuple(tensor.shape):
        return read_into(entry, tensor)
    local, ((start, stop), *columns) = local_shard(tensor)
    n_read = min(stop, entry.shape[0]) - start
    if n_read > 0:
        read_into(entry, local[:n_read], [(start, start + n_read), *columns])
    if n_read < len(local):
        local[max(n_read, 0) :] = mean_row(entry, columns)


def mean_row(entry, columns):
    """The mean of a matrix's rows, (width,), summed in fp64.

    columns  [(start, stop)], those to read
    """
    n_rows, (first, last) = entry.shape[0], columns[0]
    rows_at_once = max(1, CHUNK // entry.shape[1])
    total = torch.zeros(last - first, dtype=torch.float64)
    for start in range(0, n_rows, rows_at_once):
        rows = torch.empty(min(rows_at_once, n_rows - start), last - first, dtype=DTYPES[entry.dtype])
        read_into(entry, rows, [(start, start + len(rows)), (first, last)])
        total += rows.double().sum(0)
    return total / n_rows


def contiguous_runs(shape, spans):
    """[(first element, count)] of the runs of adjacent elements in a file that make up a slice of a tensor.

    shape, spans  of the tensor; [(start, stop) of the slice in each dimension]

    Full rows are one run. If columns are split too, there is one run per row.
    """
    width = math.prod(shape[1:])
    start, stop = spans[0] if spans else (0, 1)
    if not spans[1:] or spans[1] == (0, shape[1]):
        return [(start * width, (stop - start) * width)]
    first, last = spans[1]
    return [(row * width + first, last - first) for row in range(start, stop)]


def read_quantized(name, entry, tensor, module):
    """Read a weight and quantise it into `tensor`, which `module` stores in 4 bits, piece by piece.

    A piece has CHUNK elements on the CPU and 32 times as many on CUDA, where each costs about 30 launches.

    Raises UserError with the file, the tensor's name, row and column for a value that is not finite. This is
    checked once for all pieces, because on CUDA the host waits for the answer. Only then is it searched for.
    """
    local, spans = local_shard(tensor)
    first, last = spans[0]
    columns = module.in_features
    rows_at_once = max(1, (CHUNK if local.device.type == "cpu" else 32 * CHUNK) // columns)

    def pieces():
        for start in range(first, last, rows_at_once):
            weight = torch.empty(min(rows_at_once, last - start), columns, dtype=DTYPES[entry.dtype])
            read_into(entry, weight, [(start, start + len(weight)), (0, columns)])
            yield start, weight

    is_finite = [module.quantize_rows(local[start - first :][: len(weight)], weight.to(local.device))
                 for start, weight in pieces()]
    if is_finite and not torch.stack(is_finite).all():
        for start, weight in pieces():
            try:
                check_finite(weight, start)
            except UserError as error:
                raise UserError(f"{entry.file}: {name}: {error}") from error


def copy_slice(tensor, full):
    """Copy this rank's slice of the unsharded tensor `full` into `tensor`, which may be sharded."""
    local, spans = local_shard(tensor)
    local.copy_(full[tuple(slice(*span) for span in spans)])


def rank_and_world_size():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def export_files(directory, config_json, tokenizer_directory, tokenizer, adapter_config=None):
    """{file name: bytes or JSON value} of all files of a saved model or adapter directory except weights.

    directory, config_json  the base model's directory and its parsed config.json, which --resize_embeddings
                            may have changed
    tokenizer_directory     the directory whose tokenizer files are copied
    tokenizer               the ChatTokenizer of that directory
    adapter_config          the content of adapter_config.json, if an adapter is saved and not a model

    A run calls it once, at its start: the directories may be gone at the last save.
    """
    exported = files.read_bytes(tokenizer_directory, TOKENIZER_FILES)
    if adapter_config is None:
        exported.update(files.read_bytes(directory, ["config.json", *PROCESSOR_FILES]))
        if config_json != files.read_json(os.path.join(directory, "config.json")):
            exported["config.json"] = config_json
        exported["generation_config.json"] = generation_config(
            directory, config_json, tokenizer.stop_token_id)
    else:
        exported["adapter_config.json"] = adapter_config
    exported.update(tokenizer.files)  # templates that are not the model's own
    return exported


def generation_config(directory, config_json, stop_token_id):
    """The directory's generation_config.json, with stop_token_id, which ends a turn, added to eos_token_id.

    stop_token_id may be None: then the template has no token that ends a turn.

    A base Qwen2.5 lists only <|endoftext|>. After training with ChatML it would not stop after its answer.

    config_json  the parsed config.json, whose ids are used if there is no generation_config.json

    Raises UserError for a malformed file.
    """
    path = os.path.join(directory, "generation_config.json")
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    if os.path.exists(path):
        generation = files.read_json(path)
    else:
        values = {**layout.text_part(config_json), **config_json}
        generation = {key: values[key] for key in keys if values.get(key) is not None}
    if not isinstance(generation, dict):
        raise UserError(f"{path} must be a JSON object, it is {generation!r:.60}")
    eos_ids = generation.get("eos_token_id")
    if eos_ids is None:
        eos_ids = []
    elif not isinstance(eos_ids, list):
        eos_ids = [eos_ids]
    if any(type(i) is not int for i in eos_ids):
        raise UserError(f"{path}: eos_token_id must be a token id or a list of them, it is {eos_ids!r:.60}")
    if stop_token_id is not None and stop_token_id not in eos_ids:
        eos_ids.append(stop_token_id)
    if len(eos_ids) < 2:
        return {**generation, "eos_token_id": eos_ids[0] if eos_ids else None}
    return {**generation, "eos_token_id": eos_ids}
