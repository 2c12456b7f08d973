"""Targets under the stock templates of model families, as literal texts: turns, reasoning, calls and their results.

The package trl has copies of many models' templates. pip downloads it into a temporary directory; if it can't, the
tests of those templates are skipped. The others are written here with the traits of the family's own template.
"""

import functools
import json
import os
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from data_helpers import tiny
from helpers import chat, chatml, make_directory, target_texts, write
from transformers import AutoTokenizer

import data
from settings.errors import UserError
from text import formats, inference
from text.template import ChatTokenizer

TRL = "trl-1.16.0-py3-none-any.whl"

# ---- templates with the traits of a family --------------------------------------------------------------------------

MISTRAL_V3 = """\
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- set users = loop_messages | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for m in loop_messages %}
    {%- if m.role == 'user' %}
        {%- if tools is not none and m == users[-1] %}
            {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {%- if loop.last and system is defined %}{{- '[INST] ' + system + '\\n\\n' + m.content + '[/INST]' }}
        {%- else %}{{- '[INST] ' + m.content + '[/INST]' }}{%- endif %}
    {%- elif m.tool_calls %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in m.tool_calls %}
            {%- if call.id is not defined or call.id | length != 9 %}
                {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
            {%- endif %}
            {%- set out = call.function | tojson %}
            {{- out[:-1] + ', "id": "' + call.id + '"}' + ('' if loop.last else ', ') }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif m.role == 'assistant' %}{{- ' ' + m.content | trim + eos_token }}
    {%- elif m.role == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}{{- raise_exception('Only user and assistant roles are supported') }}{%- endif %}
{%- endfor %}"""
MISTRAL_V7 = """\
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'system' %}{{- '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}
        {%- if tools %}{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
    {%- elif m.role == 'user' %}
        {%- if loop.first and tools %}{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
        {{- '[INST]' + m.content + '[/INST]' }}
    {%- elif m.role == 'tool' %}
        {{- '[TOOL_RESULTS]' + m.tool_call_id + '[TOOL_CONTENT]' + m.content + '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- m.content }}
        {%- for call in m.tool_calls or [] %}
            {{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments | tojson }}
        {%- endfor %}
        {{- eos_token }}
    {%- endif %}
{%- endfor %}"""
PHI_4 = """\
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_sep|>' }}{%- endif %}"""
PHI_4_MINI = """\
{%- for m in messages %}
    {%- if m.role == 'system' and m.tools %}{{- '<|system|>' + m.content + '<|tool|>' + m.tools + '<|/tool|><|end|>' }}
    {%- else %}{{- '<|' + m.role + '|>' + m.content + '<|end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- else %}{{- eos_token }}{%- endif %}"""
SMOLLM3 = """\
{%- set mode = '/no_think' if enable_thinking is defined and not enable_thinking else '/think' %}
{%- set custom = 'You are a helpful AI assistant.' %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}
    {%- if '/no_think' in system %}{%- set mode = '/no_think' %}
    {%- elif '/think' in system %}{%- set mode = '/think' %}{%- endif %}
    {%- set custom = system.replace('/no_think', '').replace('/think', '').rstrip() %}
{%- endif %}
{{- '<|im_start|>system\\nToday Date: ' + strftime_now('%d %B %Y') + '\\nReasoning Mode: ' + mode + '\\n' + custom }}
{%- if tools %}{{- '\\n<tools>' + tools | tojson + '</tools>' }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}{{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- if mode == '/think' %}{{- '<|im_start|>assistant\\n' + m.content.lstrip('\\n') + '<|im_end|>\\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' + m.content.lstrip('\\n') + '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' + ('' if mode == '/think' else '<think>\\n\\n</think>\\n') }}
{%- endif %}"""
GRANITE = """\
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}{%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system = "Today's Date: " + strftime_now('%B %d, %Y') + '.' %}{%- set loop_messages = messages %}
    {%- if thinking %}{%- set system = system + ' Respond with your thought process.' %}{%- endif %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\\n' }}
{%- if tools %}
    {{- '<|start_of_role|>available_tools<|end_of_role|>' + tools | tojson(indent=4) + '<|end_of_text|>\\n' }}
{%- endif %}
{%- for m in loop_messages %}
    {%- if m.tool_calls %}
        {{- '<|start_of_role|>assistant<|end_of_role|><|tool_call|>' }}
        {{- m.tool_calls | map(attribute='function') | list | tojson(indent=4) + '<|end_of_text|>\\n' }}
    {%- else %}
        {%- set role = 'tool_response' if m.role == 'tool' else m.role %}
        {{- '<|start_of_role|>' + role + '<|end_of_role|>' + m.content + '<|end_of_text|>\\n' }}
    {%- endif %}
    {%- if loop.last and add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}
{%- endfor %}"""
OLMO_3 = """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are Olmo.<functions>' + (tools | tojson if tools else '') + '</functions>' }}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + m.content }}
        {%- if m.tool_calls %}{{- '<function_calls>' }}
            {%- for call in m.tool_calls %}
                {{- call.function.name + '(' }}
                {%- for key, value in call.function.arguments.items() %}{{- key + '=' + value | tojson }}{%- endfor %}
                {{- ')' }}
            {%- endfor %}{{- '</function_calls>' }}
        {%- endif %}
        {{- eos_token if loop.last else '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + ('environment' if m.role == 'tool' else m.role) + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' + ('<think>' if thinks else '') }}{%- endif %}"""
COMMAND_R7B = """\
{{- bos_token + '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|># System Preamble' }}
{%- if tools %}{{- '\\n' + tools | tojson }}{%- endif %}{{- '<|END_OF_TURN_TOKEN|>' }}
{%- for m in messages %}
    {%- if m.role == 'system' %}{{- '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + m.content }}
    {%- elif m.role == 'user' %}{{- '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + m.content }}
    {%- elif m.role == 'tool' %}
        {{- '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><|START_TOOL_RESULT|>' + m.content | tojson }}
        {{- '<|END_TOOL_RESULT|>' }}
    {%- else %}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}
        {%- if m.tool_calls %}
            {{- '<|START_THINKING|>' + m.reasoning_content | default('') + '<|END_THINKING|><|START_ACTION|>' }}
            {{- m.tool_calls | map(attribute='function') | list | tojson + '<|END_ACTION|>' }}
        {%- else %}{{- '<|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' }}{%- endif %}
    {%- endif %}
    {{- '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{%- endif %}"""
# Reasoning stands in the last turns only, as with Qwen3; `opens`: the generation prompt ends in <think>\n
THINKER = """\
{%- set last = namespace(question=0) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set last.question = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' and loop.index0 > last.question %}
        {{- '<think>\\n' + m.reasoning_content | default('') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' + ('<think>\\n' if opens else '') }}{%- endif %}"""
WRITTEN = {"thinker": THINKER, "mistral_v3": MISTRAL_V3, "mistral_v7": MISTRAL_V7, "phi4": PHI_4, "phi4_mini": PHI_4_MINI,
           "smollm3": SMOLLM3, "granite": GRANITE, "olmo3": OLMO_3, "command_r7b": COMMAND_R7B}
SPECIAL = re.compile(r"<\|[^|<>{}'\s]+\|?>|<[a-z_]+\|>|\[/?[A-Z_]{3,}\]|<｜[^｜]+｜>|<(?:start|end)_of_turn>")
EOS = {"cohere": "<|END_OF_TURN_TOKEN|>", "cohere2": "<|END_OF_TURN_TOKEN|>", "command_r7b": "<|END_OF_TURN_TOKEN|>",
       "deepseekv3": "<｜end▁of▁sentence｜>", "mistral_v3": "</s>", "mistral_v7": "</s>"}


@pytest.fixture(scope="session")
def templates(tmp_path_factory):
    """A function: name of a template -> its text. The package of the others is downloaded once."""
    directory, archives = tmp_path_factory.mktemp("trl"), []

    def download():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "0", "--timeout",
                   "20", "--dest", str(directory), "trl==1.16.0"]
        try:
            subprocess.run(command, timeout=90, check=True, capture_output=True, text=True)
        except subprocess.TimeoutExpired:
            return "pip did not fetch trl in 90 seconds"
        except subprocess.CalledProcessError as error:
            return "pip can't fetch trl, whose templates are tested: " + error.stderr.strip().rpartition("\n")[2]
        return zipfile.ZipFile(directory / TRL)

    def template(name):
        if name in WRITTEN:
            return WRITTEN[name]
        if not archives:
            archives.append(download())
        if isinstance(archives[0], str):
            pytest.skip(archives[0])
        return archives[0].read(f"trl/chat_templates/{name}.jinja").decode()

    return template


@pytest.fixture(scope="session")
def made(templates, tmp_path_factory):
    """A function: name of a template, arguments of ChatTokenizer -> the ChatTokenizer, one for all tests."""
    made_before = {}

    def make(name, **arguments):
        key = name, json.dumps(arguments)
        if key not in made_before:
            made_before[key] = build(name, **arguments)
        return made_before[key]

    def build(name, **arguments):
        source = templates(name)
        special = sorted({*SPECIAL.findall(source), EOS.get(name, "<|endoftext|>")})
        config = {"eos_token": EOS.get(name, "<|endoftext|>"), "bos_token": "<s>"}
        directory = make_directory(tmp_path_factory.mktemp("made"), source, ["<s>", *special], **config)
        return ChatTokenizer(directory, **arguments)

    return make


def call(name, **arguments):
    return {"id": "abcdef123", "type": "function", "function": {"name": name, "arguments": arguments}}


def says(content="", *calls, reasoning=None):
    message = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    return {**message, "tool_calls": list(calls)} if calls else message


def returns(content):
    return {"role": "tool", "content": content, "tool_call_id": "abcdef123", "name": "sky"}


ASK = {"role": "user", "content": "Sky over Graz?"}
TOOLS = [{"type": "function", "function": {"name": "sky", "description": "Looks up.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "description": "where"}}}}}]
TWO = chat("Hello?", "Hi there.", "你是谁？", "你好 🙂")
THINKS = [*chat("Hello?"), says("Hi there.", reasoning="First thought."), *chat("And?"),
          says("Bye.", reasoning="Second thought.")]
USES = [ASK, says("", call("sky", city="Graz")), returns('{"t": "20"}'), says("Sunny.")]
USES_TWICE = [ASK, says("", call("sky", city="Graz")), returns("wet"), says("", call("sky", city="Linz")),
              returns("dry"), says("Linz is dry."), *chat("Thanks.", "Welcome.")]
XML = "<tool_call>\n<function=sky>\n<parameter=city>\n{}\n</parameter>\n</function>\n</tool_call>".format
JSON_CALL = '{"name": "sky", "arguments": {"city": "Graz"}}'
GLM_CALL = "\n<think></think>\n<tool_call>sky\n<arg_key>city</arg_key>\n<arg_value>{}</arg_value>\n</tool_call>".format
GEMMA_CALL = '<|tool_call>call:sky{{city:<|"|>{}<|"|>}}<tool_call|><|tool_response>'.format
OSS_CALL = ' to=functions.sky<|channel|>commentary json<|message|>{{"city": "{}"}}<|call|>'.format
FINAL = "<|channel|>final<|message|>{}".format
END, NONE = "<|im_end|>", "\n</think>\n\n"
# (template, template_kwargs, messages, target texts)
CASES = [
    # The generation prompt ends in <think>\n: the last turn begins with it, earlier ones have no block.
    *[(name, None, messages, expected) for name in ("qwen3_5_think", "qwen3_6") for messages, expected in (
        (TWO, ["Hi there." + END, NONE + "你好 🙂" + END]),
        (THINKS, ["Hi there." + END, "Second thought.\n</think>\n\nBye." + END]),
        (chat("q", "<think>\nhm\n</think>\n\n4", "r", "5"), ["4" + END, NONE + "5" + END]),
        (chat("q", "<think>\nhm\n</think>\n\n4"), ["hm\n</think>\n\n4" + END]),
        (USES, [NONE + XML("Graz") + END, NONE + "Sunny." + END]),
        (USES_TWICE, [XML("Graz") + END, XML("Linz") + END, "Linz is dry." + END, NONE + "Welcome." + END]),
        ([ASK, says("Let me look.", call("sky", city="Graz"), reasoning="hm"), returns(""), says("Unknown.")],
         ["hm\n</think>\n\nLet me look.\n\n" + XML("Graz") + END, NONE + "Unknown." + END]))],
    # It ends in an empty think block. A turn with reasoning begins where its own block begins.
    *[(name, kwargs, messages, expected) for name, kwargs in (
        ("qwen3_5_nothink", None), ("qwen3_5_think", {"enable_thinking": False}),
        ("qwen3_6", {"enable_thinking": False}))
      for messages, expected in (
        (TWO, ["Hi there." + END, "你好 🙂" + END]),
        (THINKS[:2], ["<think>\nFirst thought.\n</think>\n\nHi there." + END]),
        (THINKS, ["Hi there." + END, "<think>\nSecond thought.\n</think>\n\nBye." + END]),
        (USES, [XML("Graz") + END, "Sunny." + END]))],
    ("qwen3_6", {"preserve_thinking": True}, THINKS, ["First thought.\n</think>\n\nHi there." + END,
                                                      "Second thought.\n</think>\n\nBye." + END]),
    ("qwen3_5_nothink", {"enable_thinking": True}, THINKS[:2], ["First thought.\n</think>\n\nHi there." + END]),
    ("qwen3", None, USES, [f"<tool_call>\n{JSON_CALL}\n</tool_call>" + END, "<think>\n" + NONE + "Sunny." + END]),
    ("qwen3", {"enable_thinking": False}, TWO, ["Hi there." + END, "你好 🙂" + END]),
    ("qwen2_5", None, USES, [f"<tool_call>\n{JSON_CALL}\n</tool_call>" + END, "Sunny." + END]),
    # A result of a tool continues the model's turn; the answer to it has no header.
    *[(name, None, messages, expected) for name in ("gemma4", "gemma4_v3", "gemma4_v4", "gemma4_v5")
      for messages, expected in (
        (TWO, ["Hi there.<turn|>", "你好 🙂<turn|>"]), (USES, [GEMMA_CALL("Graz"), "Sunny.<turn|>"]),
        (USES_TWICE, [GEMMA_CALL("Graz"), GEMMA_CALL("Linz"), "Linz is dry.<turn|>", "Welcome.<turn|>"]))],
    ("gemma4_v5", None, THINKS, ["Hi there.<turn|>", "<|channel>thought\nSecond thought.\n<channel|>Bye.<turn|>"]),
    ("gemma3", None, chat("Hello?", "Hi there.", system="Be kind."), ["Hi there.<end_of_turn>"]),
    # Reasoning has a header of its own; three tokens end turns.
    ("gptoss", None, TWO, [FINAL("Hi there.<|end|>"), FINAL("你好 🙂<|return|>")]),
    ("gptoss", None, THINKS, [FINAL("Hi there.<|end|>"), "<|channel|>analysis<|message|>Second thought.<|end|>"
                              "<|start|>assistant" + FINAL("Bye.<|return|>")]),
    ("gptoss", None, USES, [OSS_CALL("Graz"), FINAL("Sunny.<|return|>")]),
    ("gptoss", None, USES_TWICE, [OSS_CALL("Graz"), OSS_CALL("Linz"), FINAL("Linz is dry.<|end|>"),
                                  FINAL("Welcome.<|return|>")]),
    ("gptoss", None, [ASK, says("", call("sky", city="Graz"), reasoning="Look.")],
     ["<|channel|>analysis<|message|>Look.<|end|><|start|>assistant" + OSS_CALL("Graz")]),
    # The first token of the next turn ends a turn; it is appended to the last one.
    ("glm4moe", None, TWO, ["\n<think></think>\nHi there.<|user|>", "\n<think></think>\n你好 🙂<|user|>"]),
    ("glm4moe", None, THINKS, ["\n<think></think>\nHi there.<|user|>",
                               "\n<think>Second thought.</think>\nBye.<|user|>"]),
    ("glm4moe", {"enable_thinking": False}, TWO, ["\nHi there.<|user|>", "\n你好 🙂<|user|>"]),
    ("glm4moe", None, USES, [GLM_CALL("Graz") + "<|observation|>", "\n<think></think>\nSunny.<|user|>"]),
    ("glm4moe", None, USES[:2], [GLM_CALL("Graz") + "<|observation|>"]),
    # The header is [/INST]; an answer to a tool comes after [/TOOL_RESULTS].
    ("mistral_v3", None, TWO, [" Hi there.</s>", " 你好 🙂</s>"]),
    ("mistral_v3", None, [*chat("Hello?", "Hi there."), *USES],
     [" Hi there.</s>", f'[TOOL_CALLS] [{JSON_CALL[:-1]}, "id": "abcdef123"}}]</s>', " Sunny.</s>"]),
    ("mistral_v7", None, TWO, ["Hi there.</s>", "你好 🙂</s>"]),
    ("mistral_v7", None, [{"role": "system", "content": "Be kind."}, ASK, says("I look.", call("sky", city="Graz")),
                          returns("1"), returns("2"), says("Sunny.")],
     ['I look.[TOOL_CALLS]sky[ARGS]{"city": "Graz"}</s>', "Sunny.</s>"]),
    ("phi4", None, TWO, ["Hi there." + END, "你好 🙂" + END]),
    ("phi4_mini", None, TWO, ["Hi there.<|end|>", "你好 🙂<|end|>"]),
    ("phi3", None, TWO, ["Hi there.<|end|>", "你好 🙂<|end|>"]),
    ("smollm3", None, chat("Hello?", "<think>\nhm\n</think>\nHi.", system="Be kind."),
     ["<think>\nhm\n</think>\nHi." + END]),
    ("smollm3", None, chat("Hello?", "Hi.", "And?", "Bye.", system="Be kind. /no_think"), ["Hi." + END, "Bye." + END]),
    ("smollm3", {"enable_thinking": False}, TWO, ["Hi there." + END, "你好 🙂" + END]),
    ("granite", None, TWO, ["Hi there.<|end_of_text|>", "你好 🙂<|end_of_text|>"]),
    ("granite", {"thinking": True}, chat("q", "Here is my thought process: hm"),
     ["Here is my thought process: hm<|end_of_text|>"]),
    ("granite", None, USES, ['<|tool_call|>[\n    {\n        "name": "sky",\n        "arguments": {\n'
                             '            "city": "Graz"\n        }\n    }\n]<|end_of_text|>',
                             "Sunny.<|end_of_text|>"]),
    ("olmo3", None, TWO, ["Hi there." + END, "你好 🙂<|endoftext|>"]),
    ("olmo3", {"thinks": True}, chat("q", "<think>hm</think>4", "r", "<think>ah</think>5"),
     ["hm</think>4" + END, "ah</think>5<|endoftext|>"]),
    ("olmo3", None, USES, ['<function_calls>sky(city="Graz")</function_calls>' + END, "Sunny.<|endoftext|>"]),
    ("cohere", None, chat("Hello?", "Hi there.", "And?", "Bye.", system="Be kind."),
     ["Hi there.<|END_OF_TURN_TOKEN|>", "Bye.<|END_OF_TURN_TOKEN|>"]),
    ("cohere2", None, chat("Hello?", "Hi there.", "And?", "Bye.", system="Be kind."),
     ["Hi there.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "Bye.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"]),
    ("command_r7b", None,
     [ASK, says("", call("sky", city="Graz"), reasoning="Look."), returns('"20"\n'), says("Sunny.")],
     [f"<|START_THINKING|>Look.<|END_THINKING|><|START_ACTION|>[{JSON_CALL}]<|END_ACTION|><|END_OF_TURN_TOKEN|>",
      "<|START_RESPONSE|>Sunny.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"]),
    ("deepseekv3", None, TWO, ["Hi there.<｜end▁of▁sentence｜>", "你好 🙂<｜end▁of▁sentence｜>"]),
    # Templates that mark the parts of a turn one by one
    ("phi3_training", None, TWO, ["Hi there.<|end|>\n", "你好 🙂<|end|>\n<|endoftext|>"]),
    ("diffusion_gemma_training", None, THINKS, [
        "Hi there.<turn|>\n", "<|channel>thought\nSecond thought.\n<channel|>Bye.<turn|>\n"]),
]


@pytest.mark.parametrize("name, kwargs, messages, expected", CASES,
                         ids=[f"{name}-{i}" for i, (name, *_) in enumerate(CASES)])
def test_targets_of(name, kwargs, messages, expected, made, tmp_path):
    """The decoded targets are literally these, each answer ends its turn, and the text is that of transformers."""
    tokenizer = made(name, template_kwargs=kwargs, date="2026-01-31")
    tools = TOOLS if any(m.get("tool_calls") for m in messages) else None
    row = {"messages": messages, **({"tools": tools} if tools else {})}
    read = formats.to_messages(row, "here")
    text, spans, _ = tokenizer.render_spans(read, "here", tools)
    assert [text[span.start : span.stop] for span in spans] == expected
    assert all(span.has_stop_token for span in spans)
    path = write(tmp_path / "rows.json", [row])
    assert target_texts(data.load(path, tokenizer, 4096), 0, tokenizer.tokenizer) == expected
    if "strftime_now" not in tokenizer.source:
        theirs = AutoTokenizer.from_pretrained(tokenizer.directory)
        rendered = theirs.apply_chat_template(messages, tools=tools, tokenize=False, **(kwargs or {}))
        appended = re.search(r"<\|\w+\|>$", expected[-1])[0] if name == "glm4moe" else ""
        assert text == rendered + appended


@pytest.mark.parametrize("name, messages, say", [
    ("gemma4_v5", [ASK, says("Let me look.", call("sky", city="Graz")), returns("wet"), says("Rain.")],
     "the answer 'Let me look.' can't be found"),  # it is after the result
    ("gptoss", [ASK, says("", call("sky", city="Graz"), call("sky", city="Linz"))], "the call of 'sky' can't be found"),
    ("gptoss", [ASK, says("", call("sky", city="Graz"), call("see", city="Linz"))], "the call of 'see' can't be found"),
    ("gptoss", [*chat("q", "a"), {"role": "developer", "content": "Be short."}, *chat("r", "b")],
     "the system message 'Be short.' can't be found"),
    ("mistral_v3", chat("q", "a", "r", "b", system="Be kind."), "the system message 'Be kind.' can't be found"),
    ("mistral_v3", [ASK, says("I look.", call("sky", city="Graz")), returns("1"), says("1")],
     "the answer 'I look.' can't be found"),
    ("deepseekv3", USES, "the tool 'sky' can't be found .* ignores tools"),
    ("gemma3", [*chat("q"), says("4", call("sky", city="Graz"))], "the call of 'sky' can't be found"),
    ("qwen3", [*chat("q", "a"), {"role": "context", "content": "Graz is grey."}, *chat("r", "b")],
     "the context message 'Graz is grey.' can't be found"),
    ("qwen3", [{"role": "context", "content": "user"}, *chat("r", "b")], "the context message 'user' can't be found"),
    ("qwen3", [*chat("it is ok", "a"), {"role": "context", "content": "ok"}, *chat("is it ok", "b")],
     "the (context message 'ok'|user message 'is it ok') can't be found"),
], ids=str)
def test_a_message_that_is_lost_is_an_error(name, messages, say, made):
    """The error names the row, and the message, call or tool that the template does not write."""
    read = formats.to_messages({"messages": messages}, "row 7")
    with pytest.raises(UserError, match="^row 7: .*" + say):
        made(name).render_spans(read, "row 7", TOOLS if any(m.get("tool_calls") for m in messages) else None)


@pytest.mark.parametrize("name", ["mistral_v3", "mistral_v7", "gemma4_v5", "gptoss", "glm4moe", "qwen3_5_think"])
def test_short_results_of_tools_are_no_targets(name, made):
    """Results that also stand in ids, names and the template's own text: targets are the call and the answer only."""
    kwargs = {"enable_thinking": False} if name in ("gemma4_v5", "glm4moe", "qwen3_5_think") else None
    for results in (["1", "2"], ["", "a"], ["content", "}"], ["sky", "sky"]):
        calls = [call("sky", city="Graz")] if name == "gptoss" else [call("sky", city="Graz"), call("sky", city="Linz")]
        messages = [ASK, says("", *calls), *map(returns, results), says("Sunny."), *chat("1", "2")]
        text, spans, _ = made(name, template_kwargs=kwargs).render_spans(
            formats.to_messages({"messages": messages}, "here"), "here", TOOLS)
        first, second, third = (text[span.start : span.stop] for span in spans)
        assert "Sunny" not in first and re.fullmatch(r"\s*(<\|channel\|>final<\|message\|>)?Sunny\.\S+", second)
        assert re.search(r"^\s*(<\|channel\|>final<\|message\|>)?2\S+$", third)


def test_reasoning_is_counted(made):
    """Rendered and dropped, in a key of its own or before the answer."""
    for name, expected in (("qwen3_5_think", (1, 1)), ("gptoss", (1, 1)), ("qwen3_instruct_2507", (0, 2)),
                           ("gemma4", (0, 2))):
        notes = made(name).render_spans(formats.to_messages({"messages": THINKS}, "here"), "here").notes
        assert (notes.reasoning_rendered, len(notes.reasoning_dropped)) == expected, name
    inline = chat("q", "<think>\nhm\n</think>\n\n4", "r", "<think>\n\n</think>\n\n5")
    for name, expected in (("qwen3", (0, 1)), ("deepseek_r1_distill", (0, 1)), ("cohere", (1, 0))):
        notes = made(name).render_spans(formats.to_messages({"messages": inline}, "here"), "here").notes
        assert (notes.reasoning_rendered, len(notes.reasoning_dropped)) == expected, name


# ---- --train_reasoning, --split_turns, the prompts of inference -----------------------------------------------------

THINK = "<think>\n{}\n</think>\n\n".format
EMPTY_CALL = [ASK, says("", call("sky", city="Graz"), reasoning="Look.")]


@pytest.mark.parametrize("name, kwargs, messages, expected", [
    ("thinker", None, THINKS, ["Hi there." + END, "Bye." + END]),
    ("thinker", {"opens": True}, THINKS[:2], ["Hi there." + END]),
    ("thinker", None, chat("q", "4"), ["4" + END]),  # an empty block is no answer
    ("thinker", None, chat("q", "Yes."), ["Yes." + END]),
    ("phi4", None, chat("q", "<think>Yes.</think>  Yes.", "r", "<think>a\n\nb</think>\n\n5"),
     ["  Yes." + END, "5" + END]),  # a template that writes answers as they are
    ("olmo3", {"thinks": True}, chat("q", "<think>hm</think>4", "r", "<think>ah</think>5"),
     ["4" + END, "5<|endoftext|>"]),
    ("command_r7b", None, EMPTY_CALL, [f"<|START_ACTION|>[{JSON_CALL}]<|END_ACTION|><|END_OF_TURN_TOKEN|>"]),
    ("qwen3", None, THINKS, ["Hi there." + END, "Bye." + END]),
    ("qwen3", None, EMPTY_CALL, [f"<tool_call>\n{JSON_CALL}\n</tool_call>" + END]),
    ("qwen3_5_think", None, THINKS, ["Hi there." + END, "Bye." + END]),
    ("qwen3_5_nothink", None, THINKS, ["Hi there." + END, "Bye." + END]),
    ("qwen3_6", {"preserve_thinking": True}, THINKS, ["Hi there." + END, "Bye." + END]),
    ("gptoss", None, THINKS, [FINAL("Hi there.<|end|>"), FINAL("Bye.<|return|>")]),
    ("gptoss", None, EMPTY_CALL, [OSS_CALL("Graz")]),
    ("glm4moe", None, THINKS, ["Hi there.<|user|>", "Bye.<|user|>"]),
    ("gemma4_v5", None, THINKS, ["Hi there.<turn|>", "Bye.<turn|>"]),
    ("gptoss", None, chat("q", "<think>\nhm\n</think>\n\n4"), ["4<|return|>"]),
    ("qwen3_8", None, chat("q", "<think>\nhm\n</think>\n\n4"), ["4" + END]),
    ("gptoss_training", None, THINKS, ["<|start|>assistant" + FINAL("Hi there.<|end|>"), FINAL("Bye.<|return|>")]),
    ("diffusion_gemma_training", None, THINKS, ["Hi there.<turn|>\n", "Bye.<turn|>\n"]),
    ("deepseek_r1_distill", None, chat("q", "<think>\nhm\n</think>\n\n4"),
     ["\n\n4<｜end▁of▁sentence｜>"]),  # the template drops the reasoning, and not what follows it
], ids=str)
def test_without_train_reasoning_answers_alone_are_targets(name, kwargs, messages, expected, made, tmp_path):
    """The reasoning and what is around it are context; the rest of each turn is a target, and only that."""
    tokenizer = made(name, template_kwargs=kwargs)
    row = {"messages": messages, **({"tools": TOOLS} if any(m.get("tool_calls") for m in messages) else {})}
    path = write(tmp_path / "rows.json", [row])
    without = data.load(path, tokenizer, 4096, train_reasoning=False)
    assert target_texts(without, 0, tokenizer.tokenizer) == expected
    trained = data.load(path, tokenizer, 4096)
    assert np.array_equal(trained.tokens, without.tokens) and not (without.loss_mask & ~trained.loss_mask).any()
    assert trained.ledger.reasoning_tokens == without.ledger.reasoning_tokens
    assert trained.ledger.target == without.ledger.target + without.ledger.reasoning_tokens
    assert bool(without.ledger.reasoning_tokens) == bool(trained.ledger.target - without.ledger.target)


def test_reasoning_inside_a_generation_block_is_masked(tmp_path):
    """A template that marks answers, with their reasoning or without."""
    template = THINKER.replace("{%- if m.role == 'assistant' and", "{%- generation %}{%- if m.role == 'assistant' and")
    template = template.replace("    {{- m.content + '<|im_end|>\\n' }}", "    {{- m.content }}{%- endgeneration %}")
    template = template.replace("{%- generation %}", "{%- if m.role != 'assistant' %}{{- m.content + '<|im_end|>\\n' }}"
                                "{%- else %}{%- generation %}")
    template = template.replace("{%- endgeneration %}", "{{- '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}{%- endif %}")
    tokenizer = ChatTokenizer(make_directory(tmp_path / "model", template))
    path = write(tmp_path / "rows.json", [{"messages": THINKS}])
    assert tokenizer.marks_answers
    for on, expected in ((True, THINK("Second thought.") + "Bye."), (False, "Bye.")):
        dataset = data.load(path, tokenizer, 4096, train_reasoning=on)
        assert target_texts(dataset, 0, tokenizer.tokenizer) == ["Hi there." + END, expected + END]


@pytest.mark.parametrize("name, content, says", [
    ("phi4", "<think>R1</think><think>R2</think>A", None), ("phi4", "<think>R1</think>mid<think>R2</think>A", None),
    ("phi4", "<think>R1 never ends", None), ("phi4", "<thinking>R1</thinking>A", None), ("phi4", "[THINK]R1[/THINK]A", None),
    ("phi4", "<Think>R1</Think>A", None), ("phi4", "Use the </think> tag.", None), ("thinker", "<think>R1</think>A", "A"),
    ("thinker", "<reasoning>R1</reasoning>A", None),
    ("phi4", "Use the <think> tag.", "Use the <think> tag."), ("phi4", "<b>A</b>", "<b>A</b>"),
    ("phi4", "<think>R1</think>Use the <think> tag.", "Use the <think> tag."),
    ("phi4", "<think></think>A", "A"), ("phi4", "<think>\n\n</think>\n\nA", "A")], ids=str)
def test_reasoning_is_masked_whole_or_refused(name, content, says, made, tmp_path):
    """Without --train_reasoning: no reasoning is a target. What can't be told apart from it is an error."""
    rows = [{"messages": chat("q", content)}, {"messages": chat("q", "<think>R</think>fine")}]
    path = write(tmp_path / "rows.json", rows)
    trained = data.load(path, made(name), 4096)
    assert content[-4:] in target_texts(trained)[0]
    if says is None:
        with pytest.raises(UserError, match=r"rows.json\[0\]: the chat template writes reasoning, but where it ends"):
            data.load(path, made(name), 4096, train_reasoning=False)
    else:
        assert target_texts(data.load(path, made(name), 4096, train_reasoning=False))[0] == says + END


@pytest.mark.parametrize("content, lost", [
    ("Sure. <think>R1</think> A", "Sure."), ("<think>R1</think>mid<think>R2</think>A", "mid"),
    ("<think>the </think> tag</think>A", "tag</think>A")], ids=str)
def test_text_around_reasoning_is_not_lost(content, lost, made, tmp_path):
    """Qwen3's template drops what is before the last </think> but the first block."""
    path = write(tmp_path / "rows.json", [{"messages": chat("q", content)}])
    with pytest.raises(UserError, match=f"the text '{lost}' of an answer can't be found .* once, at the start"):
        data.load(path, made("qwen3"), 4096)


def test_reasoning_that_a_template_changes_is_in_the_text(tmp_path):
    """It counts as rendered, and masking it is refused: where it ends is unknown."""
    template = THINKER.replace("m.reasoning_content | default('')", "m.reasoning_content | default('') | upper")
    tokenizer = ChatTokenizer(make_directory(tmp_path / "model", template))
    path = write(tmp_path / "rows.json", [{"messages": THINKS[2:]}])
    ledger = data.load(path, tokenizer, 4096).ledger
    assert (ledger.reasoning_rendered, ledger.reasoning_dropped) == (1, 0)
    with pytest.raises(UserError, match="where it ends can't be found"):
        data.load(path, tokenizer, 4096, train_reasoning=False)


def test_a_cut_reasoning_is_a_warning(made):
    read = formats.to_messages({"messages": chat("q", "<think>\nhm, so")}, "row 7")
    assert made("phi4").render_spans(read, "row 7").notes.warning.startswith("row 7: an answer begins with <think> and")


def test_what_split_turns_leaves_is_listed(made, tmp_path):
    """Messages after the last trained turn are in no sample."""
    path = write(tmp_path / "rows.json", [{"messages": [*THINKS, *chat("Bye.")]}, {"messages": THINKS}])
    unused = data.load(path, made("thinker"), 4096, split_turns=True).ledger.unused
    assert unused == {"messages after the last trained turn": 1}


@pytest.mark.parametrize("value, unused", [("Bob", {"messages.name": 1}), ("user", {})])
def test_a_name_that_the_template_omits_is_listed(value, unused, made, tmp_path):
    row = {"messages": [{"role": "user", "content": "q", "name": value}, says("a")]}
    assert data.load(write(tmp_path / "rows.json", [row]), made("phi4"), 4096).ledger.unused == unused


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_a_template_that_writes_tools_by_a_variable(order, tmp_path):
    """Each value of a row's variable is looked at: with one the tools are written, with the other not."""
    template = "{%- if tools and writes %}{{- tools | tojson }}{%- endif %}" + chatml("m.content")
    tokenizer = ChatTokenizer(make_directory(tmp_path / "model", template))
    for on in order:
        row = {"messages": chat("sky?", "a"), "tools": TOOLS, "chat_template_kwargs": {"writes": on}}
        path = write(tmp_path / f"{on}.json", [row])
        if on:
            assert data.load(path, tokenizer, 4096).ledger.trained == 1
        else:
            with pytest.raises(UserError, match="the tool 'sky' can't be found"):
                data.load(path, tokenizer, 4096)


def test_the_turns_of_a_template_by_a_list(tmp_path):
    """A header that a variable writes is no target, whatever the type of the variable."""
    template = chatml("m.content", role="(m.role + (style[0] if style else '') if m.role == 'assistant' else m.role)")
    template = template.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant' + (style[0] if style else '') + '\\n'")
    tokenizer = ChatTokenizer(make_directory(tmp_path / "model", template))
    for style in (["\nin style"], ["\nplain"], []):
        row = {"messages": chat("q", "a"), "chat_template_kwargs": {"style": style}}
        dataset = data.load(write(tmp_path / "rows.json", [row]), tokenizer, 4096)
        assert target_texts(dataset, 0, tokenizer.tokenizer) == ["a" + END]


def test_reasoning_whose_end_is_unknown_is_an_error(made, tmp_path):
    """Without --train_reasoning; nothing says where the answer begins. With it, the reasoning is trained."""
    template = WRITTEN["thinker"].replace("<think>\\n", "I think: ").replace("\\n</think>\\n\\n", " ")
    directory = make_directory(tmp_path / "model", template, ["<|endoftext|>"], eos_token="<|endoftext|>")
    path = write(tmp_path / "rows.json", [{"messages": THINKS[2:]}])
    dataset = data.load(path, ChatTokenizer(directory), 4096)
    assert target_texts(dataset) == ["I think: Second thought. Bye." + END]
    assert dataset.ledger.reasoning_rendered == 1
    with pytest.raises(UserError, match=r"rows.json\[0\]: .* where it ends can't be found, so --train_reasoning false"):
        data.load(path, ChatTokenizer(directory), 4096, train_reasoning=False)


def test_parts_of_two_turns_are_not_joined(tmp_path):
    """Marks of different turns may touch; then there is one for each, or the number is an error."""
    template = ("{%- for m in messages %}{%- if m.role == 'assistant' %}{%- generation %}{{- m.content + '<|im_end|>' }}"
                "{%- endgeneration %}{%- else %}{{- m.content + '\\n' }}{%- endif %}{%- endfor %}")
    messages = [*chat("q", "a"), says("b")]
    tokenizer = ChatTokenizer(make_directory(tmp_path / "one", template))
    text, spans, _ = tokenizer.render_spans(formats.to_messages({"messages": messages}, "here"), "here")
    assert [text[s.start : s.stop] for s in spans] == ["a" + END, "b" + END]
    parts = template.replace("+ '<|im_end|>' }}", "}}{%- endgeneration %}{%- generation %}{{- '<|im_end|>' }}")
    tokenizer = ChatTokenizer(make_directory(tmp_path / "two", parts))
    with pytest.raises(UserError, match="marks 1 answers as generated, but the conversation has 2"):
        tokenizer.render_spans(formats.to_messages({"messages": messages}, "here"), "here")


def test_an_answer_that_repeats_dropped_reasoning_is_trained(made, tmp_path):
    """The reasoning is dropped; the same text in the answer is no reasoning."""
    row = {"messages": [*chat("q"), says("Yes. Yes, indeed.", reasoning="Yes."), *chat("r"), says("No.", reasoning="No.")]}
    dataset = data.load(write(tmp_path / "rows.json", [row]), made("thinker"), 4096, train_reasoning=False)
    assert target_texts(dataset) == ["Yes. Yes, indeed." + END, "No." + END]
    assert (dataset.ledger.reasoning_rendered, dataset.ledger.reasoning_dropped) == (1, 1)


@pytest.mark.parametrize("name, kwargs, messages, expected", [
    ("thinker", None, THINKS, [THINK("First thought.") + "Hi there." + END, THINK("Second thought.") + "Bye." + END]),
    ("qwen3", None, THINKS, [THINK("First thought.") + "Hi there." + END, THINK("Second thought.") + "Bye." + END]),
    ("qwen3_5_think", None, THINKS, ["First thought.\n</think>\n\nHi there." + END,
                                     "Second thought.\n</think>\n\nBye." + END]),
    ("gptoss", None, THINKS, ["<|channel|>analysis<|message|>First thought.<|end|><|start|>assistant"
                              + FINAL("Hi there.<|return|>"), "<|channel|>analysis<|message|>Second thought.<|end|>"
                              "<|start|>assistant" + FINAL("Bye.<|return|>")]),
    ("qwen3_5_think", None, USES_TWICE, [NONE + XML("Graz") + END, NONE + XML("Linz") + END, NONE + "Linz is dry." + END,
                                         NONE + "Welcome." + END]),
    ("thinker", None, [*THINKS[:1], {**THINKS[1], "weight": 0}, *THINKS[2:]], [THINK("Second thought.") + "Bye." + END]),
], ids=str)
def test_split_turns_renders_each_turn_as_inference_does(name, kwargs, messages, expected, made, tmp_path):
    """One sample a trained turn: transformers' text of the messages up to it; its own turn is the only target."""
    tokenizer = made(name, template_kwargs=kwargs)
    tools = TOOLS if any(m.get("tool_calls") for m in messages) else None
    row = {"messages": messages, **({"tools": tools} if tools else {})}
    path = write(tmp_path / "rows.json", [row, {"prompt": "q", "response": "a"}])
    dataset = data.load(path, tokenizer, 4096, split_turns=True)
    assert len(dataset) == len(expected) + 1 and list(dataset.row) == [0] * len(expected) + [1]
    theirs = AutoTokenizer.from_pretrained(tokenizer.directory)
    ends = [i for i, m in enumerate(messages, 1) if m["role"] == "assistant" and m.get("weight") != 0]
    for i, (end, target) in enumerate(zip(ends, expected, strict=True)):
        assert target_texts(dataset, i, tokenizer.tokenizer) == [target]
        plain = [{k: v for k, v in m.items() if k != "weight"} for m in messages[:end]]
        text = tokenizer.tokenizer.decode(dataset.tokens[dataset.starts[i] : dataset.starts[i + 1]].tolist(),
                                          skip_special_tokens=False)
        assert text == theirs.apply_chat_template(plain, tools=tools, tokenize=False, **(kwargs or {}))
    ledger = dataset.ledger
    assert (ledger.of_rows, ledger.rows, ledger.reasoning_dropped) == (2, len(expected) + 1, 0)
    assert ledger.compared == len(expected) + 1 and not ledger.differing
    if len(expected) > 1:
        assert ledger.lines()[0] == (f"samples  {len(expected) + 1} in = {len(expected) + 1} trained + 0 dropped; one "
                                     "for each trained turn of 2 rows")


def test_the_ledger_counts_the_tokens_of_reasoning(made, tmp_path):
    """Those in the text with the tags around them, and those that the template drops, of trained answers only."""
    tokenizer = made("thinker")
    encode = functools.partial(tokenizer.tokenizer.encode, add_special_tokens=False)
    path = write(tmp_path / "rows.json", [{"messages": THINKS}, {"messages": [
        *chat("q"), {**says("a", reasoning="Not trained."), "weight": 0}, *chat("r", "b")]}])
    kept = len(encode(THINK("Second thought."))) + len(encode(THINK("")))
    first, second = len(encode("First thought.")), len(encode(THINK("First thought.")))
    assert data.load(path, tokenizer, 4096).ledger.lines()[2] == (
        f"thoughts 1 of 2 answers have their reasoning in the text ({kept} tokens, with tags and empty blocks); the "
        f"chat template drops that of 1 ({first} tokens); --split_turns may keep it")
    assert data.load(path, tokenizer, 4096, split_turns=True).ledger.lines()[2] == (
        f"thoughts 2 of 2 answers have their reasoning in the text ({kept + second} tokens, with tags and empty blocks)")


def test_a_conversation_without_a_trained_turn_is_not_split(made, tmp_path):
    """It stays one row, which is dropped with its reason."""
    rows = [{"messages": [{**m, "weight": 0} if m["role"] == "assistant" else m for m in THINKS]}, {"messages": THINKS}]
    ledger = data.load(write(tmp_path / "rows.json", rows), made("thinker"), 4096, split_turns=True).ledger
    assert ledger.dropped == {"without targets": 1} and (ledger.rows, ledger.of_rows, ledger.trained) == (3, 2, 2)


@pytest.mark.parametrize("name, kwargs, messages, expected", [
    ("thinker", None, THINKS, (2, {})),
    ("thinker", {"opens": True}, THINKS[:2], (1, {})),
    ("thinker", {"opens": True}, THINKS, (2, {inference.BEGIN: (
        1, "answer 1: inference has '<think>\\n', training 'Hi there.<|im_end|>\\n<|im_start|>user\\nAnd' after "
           "'\\nHello?<|im_end|>\\n<|im_start|>assistant\\n'")})),
    # After the result of a tool, the prompt of inference has the reasoning of the call before; training has not,
    # as another question follows.
    ("thinker", None, [ASK, says("Look.", reasoning="First."), returns("wet"), says("Wet."), *chat("Thanks.", "Welcome.")],
     (3, {inference.REASONING: (1, "answer 2: inference has '<think>\\nFirst.")})),
    ("thinker", None, [ASK, says("Look."), returns("wet"), says("Wet."), *chat("Thanks.", "Welcome.")],
     (3, {inference.TEXT: (1, "answer 2: inference has '<think>\\n\\n</think>")})),
    ("qwen3_5_think", None, TWO, (2, {inference.BEGIN: (1, "answer 1: inference has '<think>\\n', training 'Hi there.")})),
    ("qwen3_5_think", None, USES, (2, {})),
    ("qwen3", {"enable_thinking": False}, TWO[:2], (1, {})),
    ("mistral_v7", None, TWO, (2, {})),
    ("gptoss", None, USES_TWICE, (4, {})),
    ("deepseekv3", None, TWO[:2], (1, {inference.BEGIN: (1, "answer 1: inference has '<think>\\n', training 'Hi")})),
], ids=str)
def test_prompts_of_inference_are_compared(name, kwargs, messages, expected, made, tmp_path):
    """How many trained turns follow the prompt that inference renders, and which do not, with why."""
    tokenizer = made(name, template_kwargs=kwargs)
    row = {"messages": messages, **({"tools": TOOLS} if any(m.get("tool_calls") for m in messages) else {})}
    path = write(tmp_path / "rows.json", [row])
    ledger = data.load(path, tokenizer, 4096).ledger
    compared, differing = expected
    assert ledger.compared == compared and ledger.differing.keys() == differing.keys()
    for kind, (count, example) in differing.items():
        assert ledger.differing[kind][0] == count
        assert ledger.differing[kind][1].startswith(f"{path}[0], {example}")
    # By transformers: is the prompt the beginning of the text?
    theirs = AutoTokenizer.from_pretrained(tokenizer.directory)
    apply = functools.partial(theirs.apply_chat_template, tools=row.get("tools"), tokenize=False, **(kwargs or {}))
    same = [apply(messages).startswith(apply(messages[:i], add_generation_prompt=True))
            for i, m in enumerate(messages) if m["role"] == "assistant"]
    assert same.count(False) == sum(count for count, _ in differing.values())
    share = f"({100 * same.count(True) // len(same)}"
    assert f"prompts  {same.count(True)} of {len(same)} trained turns {share}" in "\n".join(ledger.lines())


def test_a_token_that_crosses_the_end_of_the_prompt_is_a_difference(tmp_path):
    """The text begins with the prompt, but its tokens do not: inference sends another token than was trained."""
    template = ("{%- for m in messages %}{{- m.role + ': ' + m.content + ('<|im_end|>' if m.role == 'assistant' else "
                "'\\n') }}{%- endfor %}{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}")
    directory = make_directory(tmp_path / "model", template)
    rows = [{"prompt": "q", "response": answer} for answer in ("Hello there.", "42 is it.")]
    tokenizer = ChatTokenizer(directory)
    ledger = data.load(write(tmp_path / "rows.json", rows), tokenizer, 100).ledger
    crossing = []
    for row in rows:
        prompt = tokenizer.render([{"role": "user", "content": row["prompt"]}], True)
        encode = functools.partial(tokenizer.tokenizer.encode, add_special_tokens=False)
        ids, whole = encode(prompt).ids, encode(prompt + row["response"]).ids
        crossing.append(whole[: len(ids)] != ids)
    assert any(crossing) and ledger.compared == 2
    assert {kind: count for kind, (count, _) in ledger.differing.items()} == {inference.TOKEN: sum(crossing)}


def test_a_prompt_that_the_template_refuses_is_a_difference(tmp_path):
    """A template may refuse to render a prompt, e.g. one without messages."""
    template = "{%- if not messages %}{{- raise_exception('No messages!') }}{%- endif %}" + chatml("m.content")
    directory = make_directory(tmp_path / "model", template)
    row = {"messages": [says("Hello."), *chat("q", "a")]}
    path = write(tmp_path / "rows.json", [row])
    ledger = data.load(path, ChatTokenizer(directory), 100).ledger
    assert ledger.compared == 2 and ledger.differing == {inference.REFUSED: [1, f"{path}[0], answer 1: No messages!"]}


def test_the_first_rows_of_each_file_are_compared(tmp_path):
    """`compared` rows of each file; the share is rounded down, so that 100 % means all."""
    paths = [write(tmp_path / f"{name}.json", [{"prompt": "q", "response": "a"}] * 5) for name in "ab"]
    for compared, turns in ((1000, 10), (3, 6), (0, 0)):
        ledger = data.load(",".join(paths), tiny, 100, compared=compared).ledger
        assert ledger.compared == turns
        assert sum("prompts" in line for line in ledger.lines()) == bool(turns)
    long = write(tmp_path / "long.json", [{"messages": chat(*"qa" * 150)}])
    assert data.load(long, tiny, 10**5).ledger.compared == 100  # of 150 turns
    ledger.compared, ledger.differing = 10_000, {inference.TEXT: [1, "x[0], answer 1: y"]}
    assert ledger.lines()[-3:-1] == (
        "prompts  9,999 of 10,000 trained turns (99.9 %) follow the prompt that inference renders",
        f"prompts  1 not: {inference.TEXT}, e.g. x[0], answer 1: y")


SHORT = ["a", "final", "think", "o", ">", "message", "4", "model", "<", "s"]


@pytest.mark.parametrize("name", [*WRITTEN, "gptoss", "gemma4_v5", "glm4moe", "qwen3_5_think", "qwen3_5_nothink",
                                  "cohere2", "qwen3", "muse_glimmer"])
def test_short_answers_end_their_turns(name, made):
    """Answers whose text also stands in the template's own text before them, three turns of the same text."""
    tokenizer = made(name)
    for answer in SHORT:
        text, spans, _ = tokenizer.render_spans(
            formats.to_messages({"messages": chat("q1", answer, "q2", answer, answer, answer)}, "here"), "here")
        assert len(spans) == 3 and all(span.has_stop_token for span in spans)
        for span in spans:
            turn = text[span.start : span.stop]
            assert re.search(re.escape(answer) + r"(<\|?[^<>|]+\|?>)+$", turn) and "q2" not in turn
