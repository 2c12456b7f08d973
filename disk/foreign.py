"""Model directories that can't be read here: what is in them, and how to make one that can.

Only names of files decide, so that a wrong --model is found before the data is tokenised, and without opening
a file that can run code.
"""

import os
import re
import shlex

from disk import files
from settings.errors import UserError

CONVERT = ('python -c "from transformers import AutoModelForCausalLM as M; M.from_pretrained({source!r}, '
           "dtype='auto').save_pretrained({target!r}, safe_serialization=True)\"")
CONVERT_TOKENIZER = ('python -c "from transformers import AutoTokenizer as T; '
                     'T.from_pretrained({source!r}).save_pretrained({source!r})"')
HUGGING_FACE_FORM = "use the model in Hugging Face's form, a directory with config.json and model.safetensors"

# Weight files of other forms: a pattern of the path inside the directory, and what to do. The first that
# matches a file counts, and forms from which a program can make this one come before others.
FORMS = (
    (r"model-\d+-of-\d+\.safetensors", "is one of several weight files, but model.safetensors.index.json, "
     "which lists their tensors, is missing: copy or download it as well"),
    (r"pytorch_model.*\.bin", "is in a format that can run code when it is read, so it is not; if you trust "
     "the file, convert it: {convert}, copy the tokenizer's files there, and use --model {target}"),
    (r"(.*/)?zero_to_fp32\.py|.*(_optim_states|_model_states)\.pt", "is of a DeepSpeed ZeRO checkpoint; "
     "convert it: python {quoted}/zero_to_fp32.py {quoted} {target} --safe_serialization, copy config.json "
     "and the tokenizer's files there, and use --model {target}"),
    (r"(.*/)?model_world_size_\d+_rank_\d+\.pt", "is of one of verl's FSDP checkpoints; convert it: python "
     "-m verl.model_merger merge --backend fsdp --local_dir {quoted} --target_dir {target}, and use --model "
     "{target}"),
    (r"(.*/)?(.*\.distcp|\.metadata)", "is of a sharded checkpoint of torch.distributed; let the trainer "
     "that wrote it export a model, for FSDP in accelerate: accelerate merge-weights {quoted} {target}"),
    (r"(.*/)?mp_rank_\d+.*", "is of a Megatron checkpoint; export it with Megatron's converter to Hugging "
     "Face's form"),
    (r"(.*/)?(consolidated.*\.(safetensors|pth)|params\.json)", "is Mistral's or Meta's own form of the "
     "weights; " + HUGGING_FACE_FORM + ": hub repositories with `-hf` or `-HF` in their names, or the same "
     "repository's model-*.safetensors"),
    (r"(?!adapter_model).*\.safetensors", "has another name than model.safetensors; rename it if it holds "
     "the complete model under Hugging Face's names of tensors"),
    (r".*\.gguf", "is a GGUF file, which is quantised for inference and can't be trained; use the original "
     "model that it was made from, with --use_lora --quantize nf4 to save memory"),
    (r".*\.(onnx|npz|ot|h5|msgpack|mlmodel|mlpackage|tflite|engine)", "is an export for another program; "
     + HUGGING_FACE_FORM),
    (r".*\.(pt|pth|ckpt|bin|pkl)", "is in a format that can run code when it is read, so it is not; save the "
     "model with transformers' save_pretrained, or its tensors with safetensors.torch.save_file"),
)


def weight_file_advice(names, directory):
    """What to do about a directory without weights that can be read: "FILE is ...; use ...", or "".

    names  of the files in it, with the paths of those in folders
    """
    target = os.path.basename(os.path.normpath(directory)) + "-safetensors"
    convert = CONVERT.format(source=directory, target=target)
    for pattern, text in FORMS:
        for name in sorted(names):
            if re.fullmatch(pattern, name):
                return f"{name} " + text.format(convert=convert, quoted=shlex.quote(directory), target=target)
    return ""


def check_file(path, flag):
    """Raise UserError for a model's path that is a file: it must be the directory."""
    directory = os.path.dirname(path) or "."
    if os.path.basename(path) == "model.safetensors" or path.endswith(".json"):
        raise UserError(f"{flag} {path} is a file; use its directory, {flag} {directory}")
    advice = weight_file_advice([os.path.basename(path)], directory)
    raise UserError(f"{flag} {path} is a file, not a model directory; {advice or HUGGING_FACE_FORM}")


def names_in(directory):
    """The paths of the files in a directory and the folders in it, two levels deep."""
    found = []
    for folder, folders, names in os.walk(directory):
        inner = os.path.relpath(folder, directory)
        if inner.count(os.sep) >= 1:
            folders.clear()
        found += [os.path.normpath(os.path.join(inner, name)) for name in names]
    return found


def model_inside(directory):
    """The path of a model directory inside a directory that is none, or None: a run, a hub cache's entry."""
    for name in ("checkpoints/latest", "latest"):
        if os.path.exists(os.path.join(directory, name, "config.json")):
            return os.path.join(directory, name)
    inner = [name for name in names_in(directory) if os.path.basename(name) == "config.json"]
    # checkpoint-900 before checkpoint-1000
    numbers = {name: [int(number) for number in re.findall(r"\d+", name)] for name in inner}
    newest = max(inner, key=lambda name: (numbers[name], name), default=None)
    return os.path.join(directory, os.path.dirname(newest)) if newest else None


def check_model(directory, flag="--model"):
    """Raise UserError, with the way to go, if a directory is no model directory or lacks weight files.

    flag  the setting that named the directory
    """
    names = os.listdir(directory)
    if "adapter_config.json" in names:
        config = files.read_json(os.path.join(directory, "adapter_config.json"))
        base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
        base = base if base and isinstance(base, str) else "its base model"
        raise UserError(f"{flag} {directory} is a LoRA adapter, not a model; use --model {base} --use_lora "
                        f"--resume_adapter {directory}; if it also holds the complete, merged weights, "
                        "remove adapter_config.json")
    if "config.json" not in names:
        if inside := model_inside(directory):
            remedy = f"use {inside}"
        else:
            remedy = (weight_file_advice(names_in(directory), directory)
                      or "use a model directory, such as outputs/checkpoints/latest of a run")
        raise UserError(f"{directory} has no config.json, so it is not a model directory; {remedy}")
    if "model.safetensors.index.json" not in names and "model.safetensors" not in names:
        advice = weight_file_advice(names_in(directory), directory) or HUGGING_FACE_FORM
        raise UserError(f"{directory} has no model.safetensors; {advice}")


def check_complete(index, listed):
    """Raise UserError if files that an index lists are missing: a download or a copy that was interrupted.

    index, listed  path of model.safetensors.index.json; the names of the weight files in it
    """
    directory = os.path.dirname(index)
    missing = [name for name in listed if not os.path.exists(os.path.join(directory, name))]
    if missing:
        raise UserError(f"{index} lists {len(listed)} weight files, of which {len(missing)} are missing: "
                        f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; copy them, or "
                        "download the model again")


def check_tokenizer(directory, flag="--tokenizer"):
    """Raise UserError, with the way to go, if a directory has no tokenizer.json.

    flag  the setting that names another tokenizer's directory
    """
    names = set(os.listdir(directory))
    if "tokenizer.json" in names:
        return
    if "tekken.json" in names:
        path = os.path.join(directory, "tekken.json")
        remedy = ('tekken.json is Mistral\'s own form; convert it: python -c "from '
                  f"transformers.integrations.mistral import convert_tekken_tokenizer as c; c({path!r})"
                  f'.save_pretrained({directory!r})"')
    elif own := sorted(names & {"tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json",
                                "vocab.txt", "merges.txt"}):
        remedy = (f"it has {own[0]}, from which transformers makes one: "
                  f"{CONVERT_TOKENIZER.format(source=directory)} (pip install transformers sentencepiece "
                  "protobuf)")
    elif code := sorted(name for name in names if re.fullmatch(r"tokenization_.*\.py|.*\.tiktoken", name)):
        remedy = (f"its tokenizer is code ({code[0]}), which is not run here; use a version of the model "
                  f"that has tokenizer.json, or {flag} DIR with that file")
    else:
        remedy = (f"use {flag} DIR with the tokenizer of the model, for a fine-tuned model that of the "
                  "model it was made from")
    raise UserError(f"{directory} has no tokenizer.json; {remedy}")
