"""Write models/tiny, or a copy elsewhere: python tests/make_tiny.py [DIRECTORY]

The model is a qwen2 with a million random weights in bf16, a byte-level BPE tokenizer trained on data/example_sft.json,
and a ChatML template. Everything is seeded: each run writes the same bytes, which are committed.
"""

import json
import os
import sys

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from families.config import ModelConfig  # noqa: E402
from model import CausalLM  # noqa: E402
from text.formats import to_messages  # noqa: E402
from text.sources import read_files  # noqa: E402

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CONFIG = dict(
    architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=2048, hidden_size=128, intermediate_size=384,
    num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, hidden_act="silu", max_position_embeddings=2048,
    rms_norm_eps=1e-6, rope_theta=10000.0, tie_word_embeddings=True, initializer_range=0.02, attention_dropout=0.0,
    use_sliding_window=False, bos_token_id=0, eos_token_id=0, torch_dtype="bfloat16")
TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('the roles are system, user and assistant, not ' + message.role) }}
    {%- elif message.role == 'system' and not loop.first %}
        {{- raise_exception('a system message can only be the first') }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as f:
        f.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def train_tokenizer(texts):
    """Train a tokenizer of Qwen2's kind: its regular expression for splitting, byte-level BPE, no normalisation."""
    split = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
             r"|\s+(?!\S)|\s+")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(split), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=[AddedToken(t, special=True) for t in SPECIAL],
        initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def main(directory):
    os.makedirs(directory, exist_ok=True)
    messages = [to_messages(row, where) for where, row in read_files(os.path.join(ROOT, "data", "example_sft.json"))]
    tokenizer = train_tokenizer([m["content"] for conversation in messages for m in conversation])
    tokenizer.save(os.path.join(directory, "tokenizer.json"))
    write_json(os.path.join(directory, "tokenizer_config.json"), {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": SPECIAL[0],
        "pad_token": SPECIAL[0], "model_max_length": 2048, "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE})
    write_json(os.path.join(directory, "config.json"), CONFIG)
    write_json(os.path.join(directory, "generation_config.json"), {"bos_token_id": 0, "eos_token_id": 0,
                                                                   "pad_token_id": 0})
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.from_dict(CONFIG))
    for name, p in model.named_parameters():
        if p.ndim >= 2:
            torch.nn.init.normal_(p, std=CONFIG["initializer_range"])
        else:
            torch.nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
    save_file({n: p.detach().bfloat16() for n, p in model.named_parameters()},
              os.path.join(directory, "model.safetensors"), metadata={"format": "pt"})


if __name__ == "__main__":
    main(*(sys.argv[1:] or [os.path.join(ROOT, "models", "tiny")]))
