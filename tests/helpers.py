"""What several test files share: paths, small models, conversations and templates, runs on many ranks, programs."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from itertools import groupby

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer

import lora
import model
import sft
from disk import files, peft
from families.config import ModelConfig
from ops import nf4
from settings.errors import UserError

TESTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TESTS)
TINY = os.path.join(ROOT, "models", "tiny")  # by its path: the name `tiny` brings settings of its own with it
EXAMPLES, VALIDATION = (os.path.join(ROOT, "data", name) for name in ("example_sft.json", "example.jsonl"))
FAST = ("--lr", "1e-3", "--batch_size", "8", "--max_length", "512")
RAW = Tokenizer.from_file(os.path.join(TINY, "tokenizer.json"))
LAYOUTS = {  # name: (ranks, flags)
    "one": (1, ()), "dp2": (2, ()), "dp4": (4, ("--strategy", "fsdp2")),
    "tp2": (2, ("--strategy", "megatron", "--tp", "2")),
    "dp2tp2": (4, ("--strategy", "megatron", "--tp", "2")), "tp4": (4, ("--strategy", "megatron", "--tp", "4")),
}

# ---- processes ----------------------------------------------------------------------------------------------------


def torchrun(ranks, *words, **options):
    """Run a program on this many ranks, on a free port; returns the CompletedProcess."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "0",
               "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def path_of(name):
    return os.path.join(TESTS, "programs", f"{name}.py")


def environment(project=ROOT):
    """What a program under tests/programs/ needs to import helpers.py, and the code of `project`."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(project), TESTS))}


def program(name, *words, project=ROOT, ranks=None, **options):
    """Run tests/programs/NAME.py, by torchrun if `ranks` is given; returns the CompletedProcess.

    project  the directory whose sft.py, model.py, ... it imports
    """
    if ranks:
        return torchrun(ranks, path_of(name), *words, env=environment(project), **options)
    command = [sys.executable, path_of(name), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(project), **options)


def started(name, *words, **options):
    """Start tests/programs/NAME.py; returns the Popen, whose standard output is a pipe of text."""
    command = [sys.executable, path_of(name), *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(), **options)


def share(runs, directory):
    """Run (ranks, words) of `runs` one after another from one process, in `directory`: sft.py with these flags, or, where
    the first of them is no flag, tests/programs/NAME.py. Returns the CompletedProcess."""
    plan = []
    for ranks, words in runs:
        name = os.path.join(ROOT, "sft.py")
        if not str(words[0]).startswith("--"):
            name, words = path_of(words[0]), words[1:]
        plan.append([ranks, [name, *map(str, words)]])
    (directory / "runs.json").write_text(json.dumps(plan))
    result = program("ranks_of", "runs.json", cwd=directory)
    print(*re.findall(r"^RUN .*", result.stdout, re.M), sep="\n")  # how long each took
    return result


def shared(runs, directory):
    """As share(), of runs that must end well; returns what they printed."""
    result = share(runs, directory)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    return result.stdout


# ---- what a run leaves --------------------------------------------------------------------------------------------


def metrics(directory):
    """The lines of metrics.jsonl."""
    with open(os.path.join(directory, "metrics.jsonl"), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def sft_main(*flags):
    """Call sft.main() with these flags, in this process."""
    import sft  # here: it imports all there is

    sys.argv = ["sft.py", *map(str, flags)]
    sft.main()


def tensors_of(directory):
    """All tensors of a model directory or training_state, whatever files they are in."""
    found = {}
    for file in sorted(os.listdir(directory)):
        if file.endswith(".safetensors"):
            found.update(load_file(os.path.join(directory, file)))
    return found


# ---- models -------------------------------------------------------------------------------------------------------


def model_directory(path, change=None, tensors=None):
    """A copy of models/tiny with keys of config.json changed, and a function applied to its tensors by name."""
    shutil.copytree(TINY, path)
    if change:
        found = {**files.read_json(path / "config.json"), **change}
        (path / "config.json").write_text(json.dumps(found))
    if tensors:
        found = load_file(path / "model.safetensors")
        tensors(found)
        save_file(found, path / "model.safetensors", metadata={"format": "pt"})
    return path


def two_layers(directory, std=0.02, **changes):
    """A model of two layers in the manner of models/tiny, with its tokenizer; matrices are random with `std`."""
    directory.mkdir(exist_ok=True)
    for file in os.listdir(TINY):
        if file.startswith("tokenizer"):
            shutil.copy(os.path.join(TINY, file), directory)
    config = {**files.read_json(os.path.join(TINY, "config.json")), "num_hidden_layers": 2, **changes}
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    built = model.CausalLM(ModelConfig.from_dict(config))
    for p in built.parameters():
        torch.nn.init.normal_(p, std=std) if p.ndim > 1 else torch.nn.init.normal_(p, mean=1.0, std=0.1)
    dtype = torch.bfloat16 if config["tie_word_embeddings"] else torch.float32
    save_file({n: p.detach().to(dtype) for n, p in built.named_parameters()}, directory / "model.safetensors",
              {"format": "pt"})
    return directory


def published(directory, config, dtype=torch.float32, **saving):
    """Write a model directory as transformers does and return its model; norms and biases are random too."""
    from transformers import AutoConfig, AutoModelForCausalLM  # here: no program under tests/programs/ needs them

    torch.manual_seed(0)
    oracle = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    with torch.no_grad():
        for name, p in oracle.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.3)
    oracle.to(dtype).save_pretrained(directory, **saving)
    return oracle


def small_model(use_lora=False, quantize=False, tp_size=1, adapter=None, **changes):
    """Our model of two small layers, with or without adapters (of settings `adapter`), from `changes` of its
    config.json."""
    config = dict(model_type="qwen2", vocab_size=512, hidden_size=96, intermediate_size=192, num_hidden_layers=2,
                  num_attention_heads=6, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)
    built = model.CausalLM(ModelConfig.from_dict({**config, **changes}))
    if quantize:
        nf4.quantize_linears(built)
    if use_lora:
        lora.inject(built, *peft.new(built, sft.Config(use_lora=True, model="base", **adapter or {})), tp_size)
    return built


def header(shape, end, length=None):
    """The bytes of a safetensors file of one tensor, whose header may claim what is not there."""
    text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(16)


# ---- conversations and templates ----------------------------------------------------------------------------------


def write(path, rows):
    """A JSON file of rows; its path as text."""
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return str(path)


def chat(*contents, system=None):
    """Messages: user, assistant, user, ..."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def runs(dataset, i=0, tokenizer=RAW):
    """Conversation i as (is a target, decoded text, token ids), one for each run of equal mask."""
    here = slice(dataset.starts[i], dataset.starts[i + 1])
    pairs = zip(dataset.loss_mask[here].tolist(), dataset.tokens[here].tolist(), strict=True)
    grouped = [(target, [token for _, token in group]) for target, group in groupby(pairs, key=lambda pair: pair[0])]
    return [(target, tokenizer.decode(ids, skip_special_tokens=False), ids) for target, ids in grouped]


def target_texts(dataset, i=0, tokenizer=RAW):
    """The decoded targets of conversation i, one for each run of them."""
    return [text for target, text, _ in runs(dataset, i, tokenizer) if target]


def chatml(content, role="m.role", more=""):
    """A ChatML template whose messages have this content."""
    return ("{%- for m in messages %}{{- '<|im_start|>' + " + role + " + '\\n' + " + content + " + '<|im_end|>\\n' }}"
            "{%- endfor %}" + more + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}")


def make_directory(path, template, special=(), raw=None, **config):
    """A model directory's tokenizer half: models/tiny's tokenizer, more special tokens, this template."""
    path.mkdir(exist_ok=True)
    raw = raw or Tokenizer.from_file(os.path.join(TINY, "tokenizer.json"))
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) if isinstance(token, str) else token
                            for token in special])
    raw.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              "eos_token": "<|endoftext|>", **config}
    write(path / "tokenizer_config.json", config if template is None else {**config, "chat_template": template})
    return str(path)


# ---- input that is at fault ---------------------------------------------------------------------------------------


class Hang(Exception):
    """A call took longer than attempt() allows."""


def attempt(function, *words, naming="", seconds=20, **named):
    """(what it returns, None), or (None, the error's text) where settings.errors.run would print that as one line.

    naming   a text that the error must have, to be of some use. Any other exception goes through.
    seconds  of the processor's time that it may take; fifteen times that of the clock's, for what only waits
    """
    def hang(*_):
        raise Hang(f"no end after {seconds} s")

    clocks = (signal.SIGPROF, signal.ITIMER_PROF, seconds), (signal.SIGALRM, signal.ITIMER_REAL, 15 * seconds)
    for number, clock, limit in clocks:
        signal.signal(number, hang)
        signal.setitimer(clock, limit)
    try:
        return function(*words, **named), None
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None or naming not in str(error):
            raise
        assert not naming or len(str(error)) < 2000, "an error of more than a few lines"
        return None, str(error)
    finally:
        for _, clock, _ in clocks:
            signal.setitimer(clock, 0)


def model_loss(model, tokens, doc_lengths, targets):
    """The loss (), of targets (N,) int64 with -100 where there is none; what else there is of a LossOut is left out."""
    positions = (targets != -100).nonzero()[:, 0]
    return model(tokens, doc_lengths, positions, targets[positions]).total
