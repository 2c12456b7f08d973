"""Shared by the tests of the data path: conversations, an independent reading of ChatML, templates of each kind."""

import os
import re

import numpy as np
from helpers import RAW, ROOT, TINY, chat, chatml, write
from hypothesis import settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from text.template import ChatTokenizer

EXAMPLES = [os.path.join(ROOT, "data", name) for name in (
    "example_sft.json", "example_alpaca.json", "example_conversations.json", "example_sharegpt.json",
    "example.jsonl")]
tiny = ChatTokenizer(TINY)
repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=150)


def sources(dataset):
    return [dataset.source(i) for i in range(len(dataset))]


def assert_is(dataset, expected):
    """Assert that the dataset has these conversations (ids, loss mask), in this order."""
    assert len(dataset) == len(expected)
    for i, (ids, mask) in enumerate(expected):
        here = slice(dataset.starts[i], dataset.starts[i + 1])
        assert dataset.tokens[here].tolist() == ids
        assert dataset.loss_mask[here].tolist() == mask
        assert dataset.n_inputs[i] == max(place for place, target in enumerate(mask) if target)


def mixed(tmp_path, *sizes):
    """Paths of files with these numbers of rows."""
    return [write(tmp_path / f"{i}.json", [{"prompt": f"q{i}", "response": f"r{i} {j}"} for j in range(n)])
            for i, n in enumerate(sizes)]


def lognormal(count, seed=0):
    """Lengths like those of real conversations: median 120, a long tail, at most 2,048."""
    normal = np.random.default_rng(seed).standard_normal(count)
    return np.clip(120 * np.exp(normal), 8, 2048).astype(np.int64)


# ---- an independent reading of ChatML: an oracle that shares no code with data.py -----------------------


def by_hand(messages, raw=RAW):
    """(ids, loss mask) of ChatML. Each text between special tokens is encoded by itself.

    In a byte-level vocabulary a token has one character per byte. So lengths of tokens give the place of each,
    without the library's offsets.
    """
    start, end = raw.token_to_id("<|im_start|>"), raw.token_to_id("<|im_end|>")
    newline = raw.encode("\n").ids
    ids, mask = [], []
    for message in messages:
        header = message["role"] + "\n"
        piece = raw.encode(header + message["content"]).ids
        trained = message["role"] == "assistant" and message.get("train", True)
        begins = np.cumsum([0] + [len(raw.id_to_token(token)) for token in piece[:-1]])
        ids += [start, *piece, end, *newline]
        mask += [False, *(trained and byte >= len(header) for byte in begins), trained,
                 *[False] * len(newline)]
    return ids, mask


def ends_a_turn(messages, max_length, on_prompt=False):
    """Whether a trained turn of the conversation has its end among the first max_length tokens."""
    if on_prompt:
        messages = [{key: value for key, value in m.items() if key != "train"} for m in messages]
    ids, mask = by_hand(messages)
    return any(target and token == RAW.token_to_id("<|im_end|>")
               for token, target in zip(ids[:max_length], mask))


WORDS = ["assistant", "user", "system", "assistant\n", "user\n", "im_start", "<|im_", "end|>",
         "{{ messages }}", "\n", "\n\n", " ", "  ", "\t", "\r\n", "你好", "，世界。", "🙂", "👩‍👩‍👧", "é", "e\u0301",
         "\u3000", "\u00a0", "Hello", " there", "def f(x):\n    return x\n", "a=1", "0", "42", "</s>",
         "[INST]", "\\n", '"', "'s"]
SPECIAL = re.compile(r"<\|im_start\|>|<\|im_end\|>|<\|endoftext\|>")
contents = st.lists(st.one_of(st.sampled_from(WORDS), st.text("ab 1\n界", max_size=3)),
                    max_size=6).map("".join).filter(
    lambda text: not SPECIAL.search(text))
answers = contents.filter(str.strip)


@st.composite
def conversations(draw):
    """Messages in the usual order, or in any other that the tiny template accepts. Some answers are not trained."""
    roles = draw(st.one_of(st.integers(1, 3).map(lambda n: ["user", "assistant"] * n),
                           st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=5).filter(
                               lambda roles: "assistant" in roles)))
    messages = [{"role": role, "content": draw(answers if role == "assistant" else contents)}
                for role in roles]
    for message in messages:
        if message["role"] == "assistant" and draw(st.integers(0, 4)) == 0:
            message["train"] = False
    return ([{"role": "system", "content": draw(contents)}] if draw(st.booleans()) else []) + messages


# ---- templates ------------------------------------------------------------------------------------------


LLAMA3 = """\
{{- bos_token }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'+ m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
"""
HOLDS_BOS = """\
<s>{% for m in messages %}
    {% if m.role == 'user' %}
<|user|>{{ m.content }}{{ eos_token }}
    {%- elif m.role == 'assistant' %}
<|assistant|>{{ m.content }}{{ eos_token }}
    {%- endif %}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
QWEN3 = """\
{%- set ns = namespace(last=messages|length - 1, multi_step=true) %}
{%- for m in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and m.role == "user" %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role != "assistant" %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}
    {%- else %}
        {%- set content = m.content %}
        {%- set reasoning = '' %}
        {%- if m.reasoning_content is string %}
            {%- set reasoning = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n') %}
            {%- set reasoning = reasoning.split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<|im_start|>' + m.role + '\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + m.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
DROPS_THINKING = chatml("(m.content.split('</think>')[-1].lstrip('\\n') "
                        "if m.role == 'assistant' and not loop.last else m.content)")
STRIPS = chatml("m.content.strip()")
GENERATION = """\
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}
        {%- generation %}{{ m.content + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- m.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
MISTRAL = """\
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '[INST] ' + m.content + ' [/INST]' }}
    {%- elif m.role == 'assistant' %}
        {{- ' ' + m.content + eos_token }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}"""
PLAIN_WORDS = """\
{%- for m in messages %}
    {{- {'user': 'Question: ', 'assistant': 'Answer: ', 'system': ''}[m.role] + m.content }}
    {{- eos_token if m.role == 'assistant' else '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Answer:' }}{%- endif %}"""
GEMMA = """\
{{- bos_token }}
{%- for m in messages %}
    {%- set role = 'model' if m.role == 'assistant' else m.role %}
    {{- '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""
PHI3 = """\
{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}"""
THOUGHT = "<think>\nso far\n</think>\n\n"
PLAIN = (chat("Hello?", "Hi there."), chat("Hello?", "Hi there.", "你是谁？", "你好，world 🙂"))
# name: (template, special tokens, config, conversations, target texts of each)
FAMILIES = {
    "always appends the header, like Llama 3": (
        LLAMA3, ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"),
        [*PLAIN, chat("q ", " Hi. \n", "r", "\tBye.", system=" s ")],
        [["Hi there.<|eot_id|>"], ["Hi there.<|eot_id|>", "你好，world 🙂<|eot_id|>"],
         ["Hi.<|eot_id|>", "Bye.<|eot_id|>"]]),
    "holds the BOS in its text, like Zephyr": (
        HOLDS_BOS, ["<s>", "</s>", "<|user|>", "<|assistant|>"], dict(bos_token="<s>", eos_token="</s>"),
        [*PLAIN], [["Hi there.</s>"], ["Hi there.</s>", "你好，world 🙂</s>"]]),
    "puts an empty think block into the last turn, like Qwen3": (
        QWEN3, [], dict(pad_token="<|endoftext|>", eos_token="<|im_end|>"),
        [*PLAIN, chat("q", THOUGHT + "One.", "r", THOUGHT + "Two."),
         [*chat("q", "One."), {"role": "user", "content": "r"},
          {"role": "assistant", "content": "Two.", "reasoning_content": "hm"}]],
        [["<think>\n\n</think>\n\nHi there.<|im_end|>"],
         ["Hi there.<|im_end|>", "<think>\n\n</think>\n\n你好，world 🙂<|im_end|>"],
         ["One.<|im_end|>", THOUGHT + "Two.<|im_end|>"],
         ["One.<|im_end|>", "<think>\nhm\n</think>\n\nTwo.<|im_end|>"]]),
    "drops the thinking of earlier turns": (
        DROPS_THINKING, [], {},
        [*PLAIN, chat("q", THOUGHT + "One."), chat("q", THOUGHT + "One.", "r", THOUGHT + "Two.")],
        [["Hi there.<|im_end|>"], ["Hi there.<|im_end|>", "你好，world 🙂<|im_end|>"],
         [THOUGHT + "One.<|im_end|>"], ["One.<|im_end|>", THOUGHT + "Two.<|im_end|>"]]),
    "strips contents": (
        STRIPS, [], {}, [*PLAIN, chat(" q \n", "\n\n Hi. \n", " ", "Bye.\t", system="\ns")],
        [["Hi there.<|im_end|>"], ["Hi there.<|im_end|>", "你好，world 🙂<|im_end|>"],
         ["Hi.<|im_end|>", "Bye.<|im_end|>"]]),
    "marks {% generation %}": (
        GENERATION, [], {}, [*PLAIN, chat("q", " Hi. \n", "r", "Bye.", system="s")],
        [["Hi there.<|im_end|>"], ["Hi there.<|im_end|>", "你好，world 🙂<|im_end|>"],
         [" Hi. \n<|im_end|>", "Bye.<|im_end|>"]]),
    "has [INST] in plain text, like Mistral": (
        MISTRAL, ["<s>", "</s>"], dict(bos_token="<s>", eos_token="</s>"),
        [*PLAIN, chat("[INST] q [/INST]", "[/INST]")],
        [[" Hi there.</s>"], [" Hi there.</s>", " 你好，world 🙂</s>"], [" [/INST]</s>"]]),
    "has a prompt that ends before the header's space": (
        PLAIN_WORDS, ["</s>"], dict(eos_token="</s>"),
        [*PLAIN, chat("Answer: q", "Answer: a", "r", "b", system="s\n")],
        [[" Hi there.</s>"], [" Hi there.</s>", " 你好，world 🙂</s>"], [" Answer: a</s>", " b</s>"]]),
    "names its roles otherwise, like Gemma": (
        GEMMA, ["<bos>", "<start_of_turn>", "<end_of_turn>"], dict(bos_token="<bos>"), [*PLAIN],
        [["Hi there.<end_of_turn>"], ["Hi there.<end_of_turn>", "你好，world 🙂<end_of_turn>"]]),
    "ends turns with a token that takes the newline in, like Phi-3": (
        PHI3, ["<|system|>", "<|user|>", *(AddedToken(t, rstrip=True, normalized=False, special=True)
                                           for t in ("<|end|>", "<|assistant|>"))], {}, [*PLAIN],
        [["Hi there.<|end|>"], ["Hi there.<|end|>", "你好，world 🙂<|end|>"]]),
    "pads with the token that ends turns": (
        chatml("m.content"), [], dict(pad_token="<|im_end|>", eos_token="<|im_end|>"), [*PLAIN],
        [["Hi there.<|im_end|>"], ["Hi there.<|im_end|>", "你好，world 🙂<|im_end|>"]]),
}
