"""Untrusted files: a table of what they may contain and what happens. docs/untrusted.md is this table.

    python tests/hostile/test_untrusted.py > docs/untrusted.md

Each case either ends with an error of one line that has the text of the table, or is used as the table says.
None may take 20 seconds or half a gigabyte, run code, or show the content of a file outside the directory.
"""

import gzip
import json
import math
import os
import re
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

sys.path[:0] = [str(parent) for parent in Path(__file__).resolve().parents[1:3]]  # as a program; pytest has them
from helpers import ROOT, TINY, attempt, header

import data
import lora
import sft
from disk import checkpoint, files, pretrained
from disk import peft as peft_config
from families.config import ModelConfig
from model import CausalLM
from settings import parser
from text import containers
from text.template import ChatTokenizer

SECRET = "root:x:0:0"  # content of a file beside the directory
CHAT = [{"role": "user", "content": "hi", "weight": 1.0}, {"role": "assistant", "content": "hello", "weight": 1.0}]
USED = "is used: "  # a case that is not an error


# For each kind of file a function that reads it: (scratch directory, content of the case) -> what was read.


def yaml(scratch, text):
    """Read a file of settings."""
    path = scratch / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return parser.parse(sft.Config, ["--config", str(path)])


def model(scratch, change):
    """Read models/tiny with a change: all that train() does before it allocates memory for weights."""
    directory = scratch / "model"
    shutil.copytree(TINY, directory)
    change(directory)
    return read_model(str(directory))


def read_model(directory):
    settings = files.read_json(os.path.join(directory, "config.json"))
    built = ModelConfig.from_dict(settings)
    tokenizer = ChatTokenizer(directory)
    with torch.device("meta"):
        net = CausalLM(built)
    pretrained.match_weights(net, directory)
    pretrained.generation_config(directory, settings, tokenizer.stop_token_id)
    list(tokenizer.encode_ahead([[SimpleNamespace(text="a" * 3000 + "x" * 3000 + "bz")]]))
    return files.read_bytes(directory, pretrained.TOKENIZER_FILES)


def adapter(scratch, change):
    """Read a LoRA adapter of models/tiny with a change."""
    directory = scratch / "adapter"
    directory.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.zeros(2, 64)}, directory / pretrained.ADAPTER_FILE)
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4}))
    change(directory)
    config = peft_config.read_config(str(directory))
    with torch.device("meta"):
        net = CausalLM(ModelConfig.from_dict(files.read_json(os.path.join(TINY, "config.json"))))
    lora.inject(net, config, peft_config.lora_ranks(pretrained.weight_entries(str(directory))))


def peft(**changes):
    return put("adapter_config.json", json.dumps({"peft_type": "LORA", "lora_alpha": 4, **changes}))


def template(scratch, source):
    """Render one short conversation with a chat template."""
    directory = scratch / "model"
    shutil.copytree(TINY, directory)
    (directory / "chat_template.jinja").write_text(CHATML + source, encoding="utf-8")
    return ChatTokenizer(str(directory)).render_spans(CHAT, "row 0")[0]


CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def rows(scratch, content):
    """Load a data file with these bytes."""
    path = scratch / "rows.json"
    path.write_bytes(content)
    return data.load(str(path), ChatTokenizer(TINY), 64)


def resume(scratch, change):
    """Resume from a step directory with a change. Its manifest fits, so the check of checksums passes."""
    step = scratch / "checkpoints" / "step_7"
    (step / "training_state").mkdir(parents=True)
    (step / "training_state" / "state.json").write_text('{"step": 7}')
    change(step)
    names = [f"{step.name}/{p.relative_to(step)}" for p in sorted(step.rglob("*")) if p.is_file()]
    names = [name.partition("/")[2] for name in names]
    manifest = step / checkpoint.MANIFEST
    if not manifest.exists():
        manifest.write_bytes(checkpoint.manifest(7, {n: list(checkpoint.checksum(step / n)) for n in names}))
    found = checkpoint.resume_directory("auto", str(step.parent))
    checkpoint.verify(found)
    return checkpoint.load_state(found)


# Functions that change a directory.


def put(name, content):
    content = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    return lambda directory: (directory / name).write_bytes(content)


def settings(**changes):
    """config.json with some keys changed."""
    return lambda directory: (directory / "config.json").write_text(json.dumps(
        {**json.loads((directory / "config.json").read_text()), **changes}))


def link(name, to):
    def change(directory):
        (directory.parent / "secret").write_text(SECRET)
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(to)

    return change


def pipe(name):
    def change(directory):
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return change


def folder(name):
    def change(directory):
        (directory / name).unlink(missing_ok=True)
        (directory / name).mkdir()

    return change


def index(file, more=()):
    return put("model.safetensors.index.json", json.dumps({"weight_map": {"a": file, **dict(more)}}))


def ranked(shape):
    """An adapter's matrix of this shape."""
    name, size = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", 4 * math.prod(shape)
    text = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    return put(pretrained.ADAPTER_FILE, len(text).to_bytes(8, "little") + text + bytes(size))


def header_of(value):
    text = json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text + bytes(16)


def cached(directory):
    """The directory as in the hub's cache: links into blobs."""
    home = directory.parent / "models--one--tiny"
    shutil.move(directory, home / "blobs")
    directory.mkdir()
    for name in os.listdir(home / "blobs"):
        (directory / name).symlink_to(home / "blobs" / name)


def linked_weights(directory):
    (directory / "model.safetensors").rename(directory.parent / "weights")
    (directory / "model.safetensors").symlink_to("../weights")


def prefixed(directory):
    """With this prefix the Rust code of the package panics, which is a BaseException in Python."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["continuing_subword_prefix"] = "x" * 100
    put("tokenizer.json", json.dumps(tokenizer))(directory)


def backtracking(directory):
    """The Rust code of the package panics when it applies this expression."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": r"(a*)*b\1"}, "behavior": "Isolated",
                                  "invert": False}
    put("tokenizer.json", json.dumps(tokenizer))(directory)


def pickled(directory):
    (directory / "pytorch_model.bin").write_bytes(b"cos\nmkdir\n(S'mark'\ntR.")
    (directory / "tokenizer.py").write_text("import os; os.mkdir('mark')")
    settings(auto_map={"AutoModel": "tokenizer.Evil"})(directory)


def big(shape, end=16):
    return put("model.safetensors", header(shape, end))


def row(**message):
    return json.dumps([{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
                                     {"role": "user", "content": "q", **message},
                                     {"role": "assistant", "content": "a"}]}]).encode()


PAIR = '{"prompt": "q", "response": "a"%s}'
DOUBLE = "{% set ns = namespace(x=%s) %}{% for i in range(99) %}{% set ns.x = %s %}{% endfor %}"


def grows(first, step):
    """A template that sets x to `first`, replaces it 99 times by `step`, and prints its length."""
    return DOUBLE.replace("%s", first, 1).replace("%s", step, 1) + "{{ ns.x|length }}"


LOOP = "{% for i in many %}"
LARGE, REFUSES = "million characters from one conversation", "chat template can't be used"

CASES = {
    # a model directory
    "index names ../": (model, index("../secret.safetensors"), "weight_map must name files of the same directory"),
    "index names /etc/passwd": (model, index("/etc/passwd"), "weight_map must name files of the same directory"),
    "index names a/../b": (model, index("a/../model.safetensors"), "weight_map must name files of the same directory"),
    "index names a NUL": (model, index("a\0.safetensors"), "weight_map must name files of the same directory"),
    "index names a 1 MB name": (model, index("a/" * 500_000), "weight_map must name files of the same directory"),
    "index is a list": (model, put("model.safetensors.index.json", "[]"), "weight_map must name files"),
    "index of numbers": (model, index(7), "weight_map must be an object that maps tensor names to file names"),
    "index names a missing file": (model, index("b.safetensors"), "of which 1 are missing"),
    "index nested 100,000 deep": (model, put("model.safetensors.index.json", "[" * 100_000), "is not JSON"),
    "index is a link out": (model, link("model.safetensors.index.json", "../secret"), "is a link to"),
    "header of 10^12 elements": (model, big([10**12]), "is truncated or not safetensors"),
    "header of 10^12 elements, offsets to fit": (model, big([10**12], 4 * 10**12), "is truncated or not safetensors"),
    "header whose product overflows": (model, big([2**62, 2**62]), "is truncated or not safetensors"),
    "header of negative size": (model, big([-4]), "is truncated or not safetensors"),
    "header with a text of 10,000 characters": (model, put("model.safetensors", header_of({"a": "x" * 10_000})),
                                                "is truncated or not safetensors"),
    "header of 2^60 bytes": (model, put("model.safetensors", header([4], 16, 2**60)), "is truncated or not safetensors"),
    "header nested 100,000 deep": (model, put("model.safetensors", (100_000).to_bytes(8, "little") + b"[" * 100_000),
                                   "is truncated or not safetensors"),
    "weights are empty": (model, put("model.safetensors", b""), "is truncated or not safetensors"),
    "weights are a pipe": (model, pipe("model.safetensors"), "is not a file"),
    "weights are a directory": (model, folder("model.safetensors"), "is not a file"),
    "weights are a link to /dev/zero": (model, link("model.safetensors", "/dev/zero"), "is not a file"),
    "weights are a link to a secret": (model, link("model.safetensors", "../secret"), "is truncated or not safetensors"),
    "weights are a link to weights elsewhere": (model, linked_weights, USED + "weights may be on another disk; "
                                                "only tensors of the right names and shapes are read from there"),
    "weights of another shape": (model, big([4]), "does not fit its config.json"),
    "a pickle and a module beside the weights": (model, pickled, USED + "neither is opened"),
    "config.json: hidden_size 10^9": (model, settings(hidden_size=10**9), "it must be an integer from 1 to"),
    "config.json: num_hidden_layers 10^9": (model, settings(num_hidden_layers=10**9), "it must be an integer"),
    "config.json: vocab_size 10^30": (model, settings(vocab_size=10**30), "it must be an integer from 1 to"),
    "config.json: head_dim 10^9": (model, settings(head_dim=10**9), "it must be an integer from 1 to"),
    "config.json: 256 layers of the largest size": (model, settings(
        hidden_size=2**17, intermediate_size=2**20, num_hidden_layers=2**8), "does not fit its config.json"),
    "config.json: num_key_value_heads is a text": (model, settings(num_key_value_heads="2"), "integer from 1 to"),
    "config.json: a size is true": (model, settings(hidden_size=True), "it must be an integer from 1 to"),
    "config.json: rms_norm_eps is a text of 1 MB": (model, settings(rms_norm_eps="1" * 10**6), "it must be a number"),
    "config.json: rope_theta is NaN": (model, settings(rope_theta=float("nan")), "it must be a number of at least"),
    "config.json: rope_scaling is a list": (model, settings(rope_scaling=[1]), "rope scaling must be an object"),
    "config.json: rope_type is an object": (model, settings(rope_scaling={"rope_type": {}}), "is not supported"),
    "config.json: layer_types of objects": (model, settings(model_type="qwen2", use_sliding_window=True,
                                                            layer_types=[{}] * 99), "layer_types"),
    "config.json: tie_word_embeddings is a text": (model, settings(tie_word_embeddings="false"), "true or false"),
    "config.json: model_type is a list": (model, settings(model_type=["llama"]), "is not supported"),
    "config.json is a list": (model, put("config.json", "[]"), "config.json must be a JSON object"),
    "config.json nested 100,000 deep": (model, put("config.json", '{"a":' * 100_000), "is not JSON"),
    "config.json: a number of 100,000 digits": (model, put("config.json", '{"a":' + "9" * 10**5 + "}"), "is not JSON"),
    "config.json is a pipe": (model, pipe("config.json"), "is not a file"),
    "config.json is a link to /dev/zero": (model, link("config.json", "/dev/zero"), "is a link to"),
    "generation_config.json is a list": (model, put("generation_config.json", "[]"),
                                         "generation_config.json must be a JSON object"),
    "generation_config.json: eos is a text": (model, put("generation_config.json", '{"eos_token_id": "x"}'),
                                              "eos_token_id must be"),
    "tokenizer.json is a link to a secret": (model, link("tokenizer.json", "../secret"), "is a link to"),
    "vocab.json is a link to /etc/passwd": (model, link("vocab.json", "/etc/passwd"), "is a link to"),
    "chat_template.jinja is a link to a secret": (model, link("chat_template.jinja", "../secret"), "is a link to"),
    "merges.txt is a link to a loop": (model, link("merges.txt", "merges.txt"), USED + "as if the file did not exist"),
    "all files are links of the hub's cache": (model, cached, USED + "models--NAME/blobs belongs to the model"),
    "a link inside the directory": (model, link("added_tokens.json", "config.json"),
                                    USED + "it leads to the same directory"),
    "tokenizer.json of NUL bytes": (model, put("tokenizer.json", bytes(1000)), "is not JSON"),
    "tokenizer.json is not UTF-8": (model, put("tokenizer.json", b"\xff"), "is not UTF-8 text"),
    "tokenizer.json of half a character": (model, put("tokenizer.json", "\ud800"), "is not UTF-8 text"),
    "tokenizer.json nested 100,000 deep": (model, put("tokenizer.json", "[" * 100_000), "is not JSON"),
    "tokenizer.json of another kind": (model, put("tokenizer.json", "{}"), "is not a tokenizer"),
    "tokenizer.json: a subword prefix longer than a word": (model, prefixed, "is not a tokenizer"),
    "tokenizer_config.json: template is a number": (model, put("tokenizer_config.json", '{"chat_template": 7}'),
                                                    "its chat template must be a text"),
    "tokenizer.json: a regular expression that takes too long": (model, backtracking, "can't encode the data"),
    # an adapter
    "adapter_config.json is a list": (adapter, put("adapter_config.json", "[]"), "must hold a JSON object"),
    "adapter_config.json is a link out": (adapter, link("adapter_config.json", "../secret"), "is a link to"),
    "another kind of adapter": (adapter, peft(peft_type="x" * 10**6), "only plain LoRA, rsLoRA and DoRA"),
    "lora_alpha is a text": (adapter, peft(lora_alpha="4"), "must be numbers"),
    "alpha_pattern that would never end": (adapter, peft(alpha_pattern={r"([\w.]+)+x": 1}), "repeats too much"),
    "alpha_pattern that is not a pattern": (adapter, peft(alpha_pattern={"(": 1}), "is not a regular expression"),
    "modules_to_save is a number": (adapter, peft(modules_to_save=7), "modules_to_save must be a list"),
    "a rank of 10^12, without columns": (adapter, ranked([10**12, 0]), "it may be from 1 to"),
    "a rank of 0": (adapter, ranked([0, 64]), "it may be from 1 to"),
    "a matrix without dimensions": (adapter, ranked([]), "it may be from 1 to"),
    "use_rslora is the text false": (adapter, peft(use_rslora="false"), "it must be true or false"),
    "use_dora is a list": (adapter, peft(use_dora=["x"]), "it must be true or false"),
    "lora_alpha is NaN": (adapter, peft(lora_alpha=float("nan")), "must be numbers"),
    "100,000 alpha_patterns": (adapter, peft(alpha_pattern={f"a{i}": 1 for i in range(100_000)}), "entries; at most"),
    "4,000 alpha_patterns": (adapter, peft(alpha_pattern={f"a{i}": 1 for i in range(4_000)}), USED + "each is read once"),
    # a chat template
    "reads a class": (template, "{{ ''.__class__.__mro__ }}", "is unsafe"),
    "reads the globals": (template, "{{ messages.append.__globals__ }}", "is unsafe"),
    "through a filter": (template, "{{ ''|attr('__class__')|attr('__mro__') }}", USED + "prints nothing"),
    "through a format": (template, "{{ '{0.__class__.__mro__}'.format(messages) }}", "is unsafe"),
    "imports os": (template, "{% import 'os' as os %}", REFUSES),
    "includes /etc/passwd": (template, "{% include '/etc/passwd' %}", REFUSES),
    "calls open": (template, "{{ open('/etc/passwd').read() }}", "'open' is undefined"),
    "changes the messages": (template, "{{ messages.append(1) }}", "is unsafe"),
    "range(10^9)": (template, "{% for i in range(10**9) %}{% endfor %}", REFUSES),
    "loops in loops": (template, "{% set many = range(99999) %}" + LOOP * 4 + "{% endfor %}" * 4,
                       "takes more than 10 s"),
    "a macro that calls itself": (template, "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    "a macro that calls itself twice": (template, "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}"
                                        "{% endmacro %}{{ m(60) }}", "takes more than 10 s"),
    "'a' * 10^10": (template, "{{ 'a' * 10000000000 }}", LARGE),
    "[1] * 10^10": (template, "{{ [1] * 10000000000 }}", LARGE),
    "ten to the power of 10^10": (template, "{{ 10 ** 10000000000 }}", "a number of thousands of digits"),
    "squares of squares": (template, grows("7", "ns.x * ns.x"), "a number of thousands of digits"),
    "text doubles with +": (template, grows("'a'", "ns.x + ns.x"), LARGE),
    "text doubles with ~": (template, grows("'a'", "ns.x ~ ns.x"), LARGE),
    "text grows by replace": (template, grows("'aa'", "ns.x.replace('a', 'aaa')"), LARGE),
    "text grows by join": (template, grows("'aa'", "ns.x.join([ns.x, ns.x])"), LARGE),
    "text grows by |join": (template, grows("'aa'", "[ns.x, ns.x]|map('upper')|join(ns.x)"), LARGE),
    "text grows by |replace": (template, grows("'aa'", "ns.x|replace('a', 'aaa')"), LARGE),
    "text grows by format": (template, grows("'aa'", "'{0}{0}'.format(ns.x)"), LARGE),
    "text grows by %": (template, grows("'aa'", "'%s%s' % (ns.x, ns.x)"), LARGE),
    "text grows by translate": (template, grows("'aa'", "ns.x.translate({97: 'aaa'})"), LARGE),
    "a block of itself": (template, DOUBLE.replace("%s", "'aa'", 1).replace(
        "{% set ns.x = %s %}", "{% set b %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = b %}"), LARGE),
    "a list of itself twice, printed": (template, grows("[1]", "[ns.x, ns.x]") + "{{ ns.x }}", LARGE),
    "a list of itself twice, as JSON": (template, grows("[1]", "[ns.x, ns.x]") + "{{ ns.x|tojson }}", LARGE),
    "two lists of themselves twice, compared": (template, grows("[1], y=[1]", "[ns.x, ns.x]").replace(
        "{% endfor %}", "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}"), LARGE),
    "a long text 400,000 times, printed": (template, "{{ ['a' * 1000000] * 400000 }}", LARGE),
    "a long text 400,000 times, as JSON": (template, "{{ (['a' * 1000000] * 400000)|tojson }}", LARGE),
    "a list that doubles": (template, grows("[1]", "ns.x + ns.x"), LARGE),
    "pads to 10^9": (template, "{{ 'a'.ljust(1000000000) }}", LARGE),
    "pads to 10^9 by a filter": (template, "{{ 'a'|center(1000000000) }}", LARGE),
    "pads to 10^9 by a format": (template, "{{ '{:1000000000}'.format(1) }}", "pads to thousands"),
    "pads to 10^9 by %": (template, "{{ '%1000000000d' % 1 }}", "pads to thousands"),
    "pads to 10^9 by the width of *": (template, "{{ '%*d' % (1000000000, 1) }}", "pads to thousands"),
    "JSON indented by 10^9": (template, "{{ [1]|tojson(indent=1000000000) }}", LARGE),
    "bytes of a number": (template, "{{ (1).to_bytes(1000000000, 'big') }}", LARGE),
    "a batch of 10^9": (template, "{{ [1]|batch(1000000000, 'x')|list }}", LARGE),
    "JSON indented by a long text": (template, "{{ ([1] * 20000)|tojson(indent='x' * 10000) }}", LARGE),
    "JSON with long separators": (template, "{{ ([1] * 20000)|tojson(separators=['x' * 10000, ':']) }}", LARGE),
    "lines indented by a long text": (template, "{{ ('a\n' * 10000)|indent('x' * 10000)|length }}", LARGE),
    "text grows by |replace in a list": (template, "{{ ([1] * 10000)|replace('1', 'x' * 10000)|length }}", LARGE),
    "many fields padded to 999": (template, "{{ ('%(a)999s' * 100000) % {'a': 'x'} }}", LARGE),
    "pads to 10^9 by a width in a field": (template, "{{ '{:{w}}'.format('x', w='1000000000') }}", "pads to thousands"),
    "pads bytes to 10^9": (template, "{{ 'a'.encode().center(1000000000) }}", "it makes bytes"),
    "a date of a million years": (template, "{{ strftime_now('%900Y' * 100000) }}", LARGE),
    "rounds to 10^8 digits": (template, "{{ 1.5|round(100000000, 'ceil') }}", "a number of thousands of digits"),
    "a text as a list": (template, "{{ ('a' * 1000000)|list|length }}", LARGE),
    "a text in pieces": (template, "{{ ('aa ' * 500000).split()|length }}", LARGE),
    "lines of a text": (template, "{{ ('aa\n' * 500000).splitlines()|length }}", LARGE),
    "slices of a text": (template, "{% set x = 'a' * 1000000 %}{% set ns = namespace(x=[]) %}" + LOOP.replace(
        "many", "range(99)") + "{% set ns.x = ns.x + [x[i:]] %}{% endfor %}", LARGE),
    "copies of a text, stripped": (template, "{% set x = 'a' * 900000 + ' ' %}{% set ns = namespace(x=[]) %}" +
                                   LOOP.replace("many", "range(999)") + "{% set ns.x = ns.x + [x.strip()] %}"
                                   "{% endfor %}", LARGE),
    "copies of a text with a letter more": (template, "{% set x = 'a' * 900000 %}{% set ns = namespace(x=[]) %}" +
                                            LOOP.replace("many", "range(999)") + "{% set ns.x = ns.x + [x + 'b'] %}"
                                            "{% endfor %}", LARGE),
    "ten long prefixes": (template, "{{ 'b'.startswith(('a' * 900000,) * 10) }}", LARGE),
    "copies of a list": (template, "{% set x = [1] * 100000 %}{% macro m(n) %}{% set c = x.copy() %}{% if n %}"
                         "{{ m(n-1) }}{% endif %}{{ c|length }}{% endmacro %}{{ m(60) }}", LARGE),
    "a list grows by one": (template, "{% set ns = namespace(x=[]) %}" + LOOP.replace("many", "range(99999)")
                            + "{% set ns.x = ns.x + [i] %}{% endfor %}", LARGE),
    "a sum of lists": (template, "{{ ([[1]] * 100000)|sum(start=[])|length }}", LARGE),
    "100,000 tags, stripped one by one": (template, "{{ ('<>' * 100000)|striptags }}", LARGE),
    "the same by a method": (template, "{{ ('<>' * 100000)|safe.striptags() }}".replace(
        "('<>' * 100000)|safe", "(('<>' * 100000)|safe)"), LARGE),
    "nested 200 deep, printed prettily": (template, "{{ [1]|pprint }}", "No filter named 'pprint'"),
    "map by an attribute of 100,000 parts": (template, "{{ range(99999)|map(attribute='a.' * 100000 + 'a', default={})"
                                             "|list }}", LARGE),
    "a chain of 60 maps": (template, "{% set many = range(99999) %}{{ many" + "|map('string')|map('int')" * 30 +
                           "|list }}", "takes more than 10 s"),
    "a chain of 60 selections of nothing": (template, "{{ range(99999)" + "|select('number')" * 60 +
                                            "|select('string')|list }}", "takes more than 10 s"),
    "searches a list for each item of a list": (template, "{{ range(99999)|select('in', [0] * 100000)|list }}", LARGE),
    "searches a list for a loop's filter": (template, "{% set x = [0] * 100000 %}{% set many = range(99999) %}" +
                                            LOOP.replace(" %}", " if i + 1 in x %}") + "{% endfor %}", LARGE),
    "a loop whose filter passes nothing": (template, "{% set many = range(99999) %}" + LOOP.replace("i in", "j in") +
                                           LOOP.replace(" %}", " if false %}") + "{% endfor %}" * 2,
                                           "takes more than 10 s"),
    "compares long texts 9,000 times": (template, "{% set x = 'a' * 900000 %}{% set y = 'a' * 900000 %}"
                                        "{% set many = range(9000) %}" + LOOP.replace(" %}", " if x != y %}") + "{% endfor %}", LARGE),
    "lorem ipsum": (template, "{{ lipsum(1000000) }}", "'lipsum' is undefined"),
    "prints 4 MB": (template, "{% for i in range(400) %}{{ 'a' * 10000 }}{% endfor %}",
                    "characters from a conversation"),
    "is 2 MB long": (template, "x" * 2**21, "its chat template has"),
    "nested 10,000 deep": (template, "{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}", "recursion"),
    # a file of settings
    "YAML: !!python/object/apply": (yaml, "lr: !!python/object/apply:os.mkdir [mark]", "it must be a number"),
    "YAML: !!python/name": (yaml, "model: !!python/name:os.system", "model can't be ''"),
    "YAML nested 1,000 deep": (yaml, "[" * 1000, "nested hundreds deep"),
    "YAML nested 1,000 deep by {": (yaml, "{a: " * 1000, "nested hundreds deep"),
    "YAML nested by indentation": (yaml, "\n".join(" " * i + "a:" for i in range(500)), "nested hundreds deep"),
    "YAML: billion laughs": (yaml, "a: &a {x: 1}\n" + "\n".join(
        f"{b}: &{b} {{x: *{a}, y: *{a}}}" for a, b in zip("abcdefgh", "bcdefghi")),
                             "anchors and aliases are not supported"),
    "YAML: an alias of itself": (yaml, "a: &a\n  b: *a", "anchors and aliases are not supported"),
    "YAML of 1 MB": (yaml, "lr: 1\n" * 200_000, "has more than 262,144 bytes"),
    "YAML: 4,000 keys": (yaml, "".join(f"k{i}: 1\n" for i in range(4_000)), "unknown setting 'k0'"),
    "YAML: a name of 200,000 characters": (yaml, "? " + "x" * 200_000 + "\n: 1", "unknown setting"),
    "YAML: a value of 200,000 characters": (yaml, "lr: " + "x" * 200_000, "it must be a number"),
    "YAML: NUL": (yaml, b"lr: \0", "is not YAML"),
    "YAML: not UTF-8": (yaml, b"lr: \xff", "is not YAML"),
    "YAML: NaN as Python writes it": (yaml, "lr: NaN", "it must be at least 0"),
    "YAML: NaN": (yaml, "lr: .nan", "it must be a number"),
    "YAML: a number of 5,000 digits": (yaml, "seed: " + "9" * 5000, "it must be an integer"),
    # a data file
    "a line without an end": (rows, b'{"prompt": "' + b"a" * 20_000, "a row may have at most"),
    "an array's element without an end": (rows, b'[{"prompt": "' + b"a" * 20_000, "a row may have at most"),
    "an element of the array that is too long": (rows, b'[{"prompt": "' + b"a" * 20_000 + b'"}]',
                                                 "a row may have at most"),
    "gzip of a line without an end": (rows, gzip.compress(b"a" * 10**7, 9), "a row may have at most"),
    "a row nested 100,000 deep": (rows, b"[" * 100_000, "is not JSON"),
    "a line nested 1,500 deep": (rows, b'{"a":' * 1500 + b"1" + b"}" * 1500, "recursion"),
    "half a character in a content": (rows, row(content="\ud800"), "half a character"),
    "half a character in a role": (rows, row(role="\ud800"), "unknown \"role\""),
    "NUL in a content": (rows, row(content="\0"), USED + "as any other character"),
    "NUL bytes instead of text": (rows, bytes(100), "is not JSON"),
    "NaN for a content": (rows, row(content=float("nan")), "must be a string"),
    "NaN for a weight": (rows, row(weight=float("nan")), "must be a number of at least 0"),
    "NaN in an unused key": (rows, (PAIR % ', "id": NaN').encode(), USED + "the key is not read"),
    "a number of 5,000 digits": (rows, (PAIR % (', "id": ' + "9" * 5000)).encode(), "is not JSON"),
    "a weight of 10^400": (rows, row(weight=10**400), "must be a number of at least 0"),
    "a content of 10^400": (rows, row(content=10**400), "must be a string"),
    "a row's weight of 10^400": (rows, (PAIR % (', "weight": 1' + "0" * 400)).encode(),
                                 "must be a number of at least 0"),
    "a token's weight of 10^400": (rows, b'{"input_ids": [5, 6], "loss_mask": [1, 1' + b"0" * 400 + b"]}",
                                   "must have a number for each"),
    "a token id of 10^400": (rows, b'{"input_ids": [5, 1' + b"0" * 400 + b"]}", "the tokenizer has the ids"),
    "a weight of 1e-30": (rows, row(weight=1e-30, role="assistant"), "must be 0, or from 1e-20"),
    "not UTF-8": (rows, b'{"prompt": "\xff"}', "is not UTF-8"),
    "gzip that is truncated": (rows, gzip.compress(b"[]" * 1000)[:30], "can't be decompressed"),
    "parquet that is truncated": (rows, b"PAR1" + bytes(100), "parquet"),
    "a pickle": (rows, b"\x80\x04cos\nmkdir\n(S'mark'\ntR.", "is not UTF-8"),
    # a directory to resume from
    "state.json is a link to a secret": (resume, link("training_state/state.json", "../../secret"),
                                         "is a link to"),
    "state.json nested 100,000 deep": (resume, put("training_state/state.json", "[" * 100_000), "is not JSON"),
    "state.json: step is true": (resume, put("training_state/state.json", '{"step": true}'), "step must be"),
    "state.json: step is a text of 1 MB": (resume, put("training_state/state.json", json.dumps({"step": "x" * 10**6})),
                                           "step must be"),
    "state.json is a pipe": (resume, pipe("training_state/state.json"), "is not as it was saved"),
    "manifest names ../": (resume, put(checkpoint.MANIFEST, checkpoint.manifest(7, {"../secret": [0, 0]})),
                           "manifest.json is not as it was saved"),
    "manifest of texts": (resume, put(checkpoint.MANIFEST, checkpoint.manifest(7, {"a": "b"})),
                          "manifest.json is not as it was saved"),
    "manifest nested 100,000 deep": (resume, put(checkpoint.MANIFEST, "[" * 100_000), "is not JSON"),
}


@pytest.mark.parametrize("name", CASES)
def test_an_untrusted_file(name, tmp_path, monkeypatch):
    function, holds, expected = CASES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(containers, "MAX_ROW", 10_000)  # lower limits take less time
    monkeypatch.setattr("text.sandbox.COST", 2**24 if name == "prints 4 MB" else 2**22)
    if "10 s" in expected:
        monkeypatch.setattr("text.sandbox.SECONDS", 0.5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result, refusal = attempt(function, tmp_path, holds)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB
    assert not (tmp_path / "mark").exists()
    assert SECRET not in str(result) + str(refusal)
    if expected.startswith(USED):
        assert refusal is None, refusal
    else:
        assert refusal and expected.replace("10 s", "0.5 s") in refusal and len(refusal) < 1500, refusal


KINDS = {model: "A model directory", adapter: "An adapter", template: "A chat template: text added to one that works",
         yaml: "A YAML file of settings", rows: "A data file", resume: "A step directory whose manifest matches"}


def table():
    """docs/untrusted.md."""
    lines = ["# Untrusted files: what is limited", "",
             "What a model directory, an adapter, a chat template, settings, data or a checkpoint from somebody",
             "else may contain, and what happens. An error is one line that contains the quoted text, and exit",
             "code 2. `python tests/hostile/test_untrusted.py` prints this page, and as a test it runs every case",
             "(`./train.sh --setup requirements-dev.txt` installs what it needs).", "",
             RULES.rstrip()]
    for kind, title in KINDS.items():
        lines += ["", f"## {title}", "", "| Case | What happens |", "|---|---|"]
        for name, (function, _, expected) in CASES.items():
            if function is kind:
                what = expected if expected.startswith(USED) else f'refused: "{expected}"'
                name, what = (re.sub(r"([*|_<])", r"\\\1", text) for text in (name, what))
                lines.append(f"| {name} | {what} |")
    return "\n".join(lines) + "\n"


RULES = """## Rules

- Nothing that is read is executed, but chat templates, in a sandbox. Weights are safetensors; everything else
  is JSON, text or YAML scalars. Pickles and Python modules in a model directory are never opened.
- Weight files may be links to anywhere, as weights are often on another disk. Only safetensors with the
  expected names and shapes are accepted. All other files of a model are copied into checkpoints and quoted
  in errors. So a link has to stay in its directory, or lead to `models--NAME/blobs` of the hub's cache.
  Pipes, devices and files above 256 MiB are refused.
- Sizes in config.json are bounded. Its shapes are compared with the headers of the weights before memory is
  allocated.
- Chat templates run in a sandbox. For one conversation, a template may create 268 million characters (plus
  64 times the length of the conversation; an item of a list counts as 32), run for 10 s, and print 16 times
  the length of the conversation plus 262,144 characters. The filters `wordwrap`, `urlize` and `pprint` and the
  function `lipsum` are removed; bytes are refused.
- A row of a data file has at most 67,108,864 characters. A file of settings has at most 262,144 bytes.
- A step directory is compared with its manifest. That detects damage, not forgery: whoever can write the
  directory can write the manifest too.

## Not limited

- Templates run in the process of the run, not in one of their own. The limits above count what each
  operation is known to make; one that nobody thought of may make more. The clock is checked between operations;
  one on a text of a hundred million characters takes seconds. Memory may reach about 2 GB. If a template is
  from somebody whom you do not trust, look at it first, or run in a container with limits.
- Decompression of a row group of a parquet file by pyarrow, and the tokenizers package on a long text.
- The number of rows, and the disk space of their cache. Links among data files are followed; data files are
  not copied.
- What a model says once it is trained. On a terminal, chat.py escapes its control characters.
"""


@pytest.mark.repo
def test_the_table_in_docs_is_of_these_cases():
    assert Path(ROOT, "docs", "untrusted.md").read_text(encoding="utf-8") == table()


if __name__ == "__main__":
    sys.stdout.write(table())
