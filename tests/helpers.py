"""Helpers of several test files: paths, small models, conversations, templates, runs on many ranks, programs."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from itertools import groupby

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

import lora
import model
import sft
from disk import files, peft, pretrained
from families.config import ModelConfig
from families.registry import causal_lm
from ops import nf4
from ops.attention import Documents
from settings.errors import UserError

TESTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TESTS)
TINY = os.path.join(ROOT, "models", "tiny")  # the path; the name `tiny` would apply configs/tiny.yaml
EXAMPLES, VALIDATION = (os.path.join(ROOT, "data", name) for name in ("example_sft.json", "example.jsonl"))
FAST = ("--lr", "1e-3", "--batch_size", "8", "--max_length", "512")
RAW = Tokenizer.from_file(os.path.join(TINY, "tokenizer.json"))
LAYOUTS = {  # name: (ranks, flags)
    "one": (1, ()), "dp2": (2, ()), "dp4": (4, ("--strategy", "fsdp2")),
    "tp2": (2, ("--strategy", "megatron", "--tp", "2")),
    "dp2tp2": (4, ("--strategy", "megatron", "--tp", "2")), "tp4": (4, ("--strategy", "megatron", "--tp", "4")),
    "sp2": (2, ("--sp", "2")), "sp4": (4, ("--sp", "4")),
    "sp2tp2": (4, ("--strategy", "megatron", "--tp", "2", "--sp", "2")),
}

# ---- processes ----------------------------------------------------------------------------------------------------


def torchrun(ranks, *arguments, **options):
    """Run a program on this many ranks, on a free port; return the CompletedProcess."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "0",
               "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def first(n, cases):
    """Cases of a test: the first n, and the others with --full only."""
    import pytest  # slow, and programs do not need it

    return [case if i < n else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.full)
            for i, case in enumerate(cases)]


def program_path(name):
    return os.path.join(TESTS, "programs", f"{name}.py")


def environment(project=ROOT):
    """The environment of a program under tests/programs/: it imports helpers.py and the code of `project`."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(project), TESTS))}


def program(name, *arguments, project=ROOT, ranks=None, **options):
    """Run tests/programs/NAME.py, with torchrun if `ranks` is given; return the CompletedProcess.

    project  the directory whose sft.py, model.py, ... the program imports
    """
    if ranks:
        return torchrun(ranks, program_path(name), *arguments, env=environment(project), **options)
    command = [sys.executable, program_path(name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(project), **options)


def started(name, *arguments, **options):
    """Start tests/programs/NAME.py; return the Popen, whose standard output is a text pipe."""
    command = [sys.executable, program_path(name), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(), **options)


@functools.cache
def ranks_of():
    """A process of tests/programs/ranks_of.py, for all tests. It ends with this one, which closes its input."""
    return subprocess.Popen([sys.executable, program_path("ranks_of")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            text=True, env=environment())


def launch_all(runs, directory):
    """Run several programs on many ranks, one after another; tests/programs/ranks_of.py forks all their ranks.

    runs       [(number of ranks, arguments), ...]: flags of sft.py; or, if the first argument is not a flag, the name
               of a program under tests/programs/, or the path of one of the project, and its arguments. With 0 ranks
               it is one process that is no rank: program(), without the seconds that imports take
    directory  the current directory of the runs

    Returns a CompletedProcess with what all of them printed.
    """
    commands = []
    for ranks, arguments in runs:
        path, first = os.path.join(ROOT, "sft.py"), str(arguments[0])
        if not first.startswith("--"):
            path = os.path.join(ROOT, first) if first.endswith(".py") else program_path(first)
            arguments = arguments[1:]
        commands.append([ranks, [path, *map(str, arguments)]])
    request = {"directory": str(directory), "environment": environment(), "runs": commands}
    print(json.dumps(request), file=ranks_of().stdin, flush=True)
    code = int(ranks_of().stdout.readline())
    texts = [(directory / name).read_text() for name in ("stdout", "stderr")]
    result = subprocess.CompletedProcess(commands, code, *texts)
    print(*re.findall(r"^RUN .*", result.stdout, re.M), sep="\n")  # the duration of each run
    return result


def run_all(runs, directory):
    """launch_all() of runs that must succeed; return what they printed."""
    result = launch_all(runs, directory)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    return result.stdout


def count_collectives(ranks, cases, directory):
    """What tests/programs/count_collectives.py measures on this many ranks: a dict for each case."""
    printed = run_all([(ranks, ("count_collectives", *map(json.dumps, cases)))], directory)
    return json.loads(re.search(r"RESULT (.*)", printed)[1])


def calls(counts, kind):
    """The number of calls of a kind of collective: "all_gather", "reduce_scatter" or "all_reduce"."""
    return sum(n for op, n in counts.items() if kind.replace("_", "") in op.replace("_", ""))


# ---- the output of a run ------------------------------------------------------------------------------------------


def metrics(directory):
    """The lines of metrics.jsonl."""
    with open(os.path.join(directory, "metrics.jsonl"), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def sft_main(*flags):
    """Call sft.main() with these flags, in this process."""
    sys.argv = ["sft.py", *map(str, flags)]
    sft.main()


def tensors_of(directory):
    """The tensors in all safetensors files of a directory, by name; slices of one tensor are joined."""
    tensors = {}
    for file in sorted(os.listdir(directory)):
        if file.endswith(".safetensors"):
            with safe_open(os.path.join(directory, file), "pt") as f:
                metadata = f.metadata() or {}
            for name, tensor in load_file(os.path.join(directory, file)).items():
                spans = re.findall("([0-9]+):([0-9]+) of ([0-9]+)", metadata.get(name, ""))
                spans = [list(map(int, span)) for span in spans]
                if not spans:
                    assert name not in tensors, f"{name} is in two files of {directory}"
                    tensors[name] = tensor
                    continue
                shape = [size for *_, size in spans]
                whole = tensors.setdefault(name, torch.full(shape, torch.nan, dtype=tensor.dtype))
                place = whole[tuple(slice(start, stop) for start, stop, _ in spans)]
                assert place.isnan().all(), f"a part of {name} is twice in {directory}"
                place.copy_(tensor)
    return tensors


# ---- models -------------------------------------------------------------------------------------------------------


def model_directory(path, config_changes=None, change_tensors=None):
    """Copy models/tiny to `path`; change keys of its config.json, and call a function on its {name: tensor}."""
    shutil.copytree(TINY, path)
    if config_changes:
        config = {**files.read_json(path / "config.json"), **config_changes}
        (path / "config.json").write_text(json.dumps(config))
    if change_tensors:
        tensors = load_file(path / "model.safetensors")
        change_tensors(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def two_layers(directory, std=0.02, **changes):
    """Write a two-layer variant of models/tiny with random weights and the same tokenizer; return its directory.

    std      standard deviation of the matrices
    changes  keys of config.json
    """
    directory.mkdir(exist_ok=True)
    for file in os.listdir(TINY):
        if file.startswith("tokenizer"):
            shutil.copy(os.path.join(TINY, file), directory)
    config = {**files.read_json(os.path.join(TINY, "config.json")), "num_hidden_layers": 2, **changes}
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    config_of_model = ModelConfig.from_dict(config)
    built = causal_lm(config_of_model)(config_of_model)
    for p in built.parameters():
        torch.nn.init.normal_(p, std=std) if p.ndim > 1 else torch.nn.init.normal_(p, mean=1.0, std=0.1)
    dtype = torch.bfloat16 if config["tie_word_embeddings"] else torch.float32
    save_file({n: p.detach().to(dtype) for n, p in built.named_parameters()}, directory / "model.safetensors",
              {"format": "pt"})
    return directory


def loaded(directory, config=None):
    """The model of a directory, created and loaded as sft.py does it; config: the content of another config.json."""
    config = ModelConfig.from_dict(config or files.read_json(os.path.join(directory, "config.json")))
    with torch.device("meta"):
        net = causal_lm(config)(config)
    net.to_empty(device="cpu")
    net.tie_weights()
    pretrained.load_weights(net, directory)
    return net


def published(directory, config, dtype=torch.float32, normal=None, attention=None, tokenizer=False, **saving):
    """Let transformers write a model directory, all weights random, norms and biases too; return its model.

    normal     function from name and parameter to mean and standard deviation; None: 1 for norms, otherwise 0; and 0.3
    attention  transformers' attn_implementation
    tokenizer  copy that of models/tiny, too
    """
    from transformers import AutoConfig, AutoModelForCausalLM  # slow, and no program under tests/programs/ needs it

    torch.manual_seed(0)
    oracle = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation=attention).eval()
    scalars = [(name, buffer) for name, buffer in oracle.named_buffers() if "layer_scalar" in name]  # of Gemma 4
    with torch.no_grad():
        for name, p in [*oracle.named_parameters(), *scalars]:
            p.normal_(*(normal(name, p) if normal else (1.0 if "norm" in name else 0.0, 0.3)))
    oracle.to(dtype).save_pretrained(directory, **saving)
    for file in os.listdir(TINY) if tokenizer else ():
        if file.startswith("tokenizer"):
            shutil.copy(os.path.join(TINY, file), directory)
    return oracle


def small_model(use_lora=False, quantize=False, tp_size=1, adapter=None, checkpointed_blocks=0, compiled=False,
                **changes):
    """A CausalLM of two small layers.

    adapter  settings of sft.Config for its adapters, with use_lora
    changes  keys of config.json
    """
    config = dict(model_type="qwen2", vocab_size=512, hidden_size=96, intermediate_size=192, num_hidden_layers=2,
                  num_attention_heads=6, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)
    built = model.CausalLM(ModelConfig.from_dict({**config, **changes}), checkpointed_blocks, compiled)
    if quantize:
        nf4.quantize_linears(built)
    if use_lora:
        lora.inject(built, *peft.new(built, sft.Config(use_lora=True, model="base", **adapter or {})), tp_size)
    return built


def header(shape, end, length=None):
    """The bytes of a safetensors file with one tensor; its header may claim bytes that the file does not have."""
    text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(16)


# ---- conversations and templates ----------------------------------------------------------------------------------


def write(path, rows):
    """Write rows to a JSON file; return its path as a string."""
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return str(path)


def chat(*contents, system=None):
    """Messages of user, assistant, user, ... with these contents."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def mask_spans(dataset, i=0, tokenizer=RAW):
    """Conversation i as spans of equal loss mask: [(is a target, decoded text, token ids), ...]."""
    conversation = slice(dataset.starts[i], dataset.starts[i + 1])
    pairs = zip(dataset.loss_mask[conversation].tolist(), dataset.tokens[conversation].tolist(), strict=True)
    spans = [(target, [token for _, token in group]) for target, group in groupby(pairs, key=lambda pair: pair[0])]
    return [(target, tokenizer.decode(ids, skip_special_tokens=False), ids) for target, ids in spans]


def target_texts(dataset, i=0, tokenizer=RAW):
    """The decoded targets of conversation i, one text per span of targets."""
    return [text for target, text, _ in mask_spans(dataset, i, tokenizer) if target]


def chatml(content, role="m.role", more=""):
    """A ChatML template. `content` and `role` are Jinja expressions of a message m; `more` follows the messages."""
    return ("{%- for m in messages %}{{- '<|im_start|>' + " + role + " + '\\n' + " + content + " + '<|im_end|>\\n' }}"
            "{%- endfor %}" + more + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}")


def make_directory(path, template, special=(), raw=None, **config):
    """Write the tokenizer files of a model directory: models/tiny's tokenizer, more special tokens, a template."""
    path.mkdir(exist_ok=True)
    raw = raw or Tokenizer.from_file(os.path.join(TINY, "tokenizer.json"))
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) if isinstance(token, str) else token
                            for token in special])
    raw.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              "eos_token": "<|endoftext|>", **config}
    write(path / "tokenizer_config.json", config if template is None else {**config, "chat_template": template})
    return str(path)


# ---- invalid input ------------------------------------------------------------------------------------------------


class Hang(Exception):
    """A call took longer than attempt() allows."""


def attempt(function, *arguments, naming="", seconds=20, **keywords):
    """Call a function; return (its result, None), or (None, the error's text) for an error of the user's input.

    Such an error is one that settings.errors.run prints as one line. All other exceptions are raised.

    naming   a text that the error must contain
    seconds  limit in CPU time; the limit in wall-clock time is 15 times that, for a call that only waits
    """
    def hang(*_):
        raise Hang(f"still running after {seconds} s")

    clocks = (signal.SIGPROF, signal.ITIMER_PROF, seconds), (signal.SIGALRM, signal.ITIMER_REAL, 15 * seconds)
    for number, clock, limit in clocks:
        signal.signal(number, hang)
        signal.setitimer(clock, limit)
    try:
        return function(*arguments, **keywords), None
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None or naming not in str(error):
            raise
        lines = str(error).splitlines() or [""]  # one, or one for each of the first 20 bad rows
        assert not naming or len(lines) <= 22 and max(map(len, lines)) < 2000, "an error message of a page"
        return None, str(error)
    finally:
        for _, clock, _ in clocks:
            signal.setitimer(clock, 0)


def model_loss(model, tokens, lengths, targets):
    """The summed loss, (), of targets (N,) int64, which are -100 where a token has none."""
    positions = (targets != -100).nonzero()[:, 0]
    return model(tokens, Documents.of(lengths, tokens.device), positions, targets[positions]).total


# operations that only describe a tensor anew, or allocate one: nothing is launched on the device
VIEWS = ("alias", "as_strided", "detach", "empty", "expand", "permute", "select", "slice", "split", "squeeze", "t",
         "transpose", "unbind", "unsqueeze", "view")


class Operations(TorchDispatchMode):
    """Counts operations that are not views, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.strip("_").removeprefix("unsafe_").removeprefix("new_").split("_")[0] not in VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))
