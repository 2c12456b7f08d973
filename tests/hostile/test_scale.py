"""Long conversations and long messages take time and memory in proportion to their length."""

import random
import re
import tracemalloc

import jinja2.sandbox
import pytest
from data_helpers import QWEN3, tiny
from helpers import chat, make_directory

from settings.errors import UserError
from text import formats, turns
from text.template import ChatTokenizer


def test_a_template_may_ask_for_the_number_of_messages_at_each_message(tmp_path):
    """Qwen3's does. Its cost grew with the square of their number, and 3,000 turns exceeded the limit."""
    tokenizer = ChatTokenizer(make_directory(tmp_path / "model", QWEN3, [], eos_token="<|im_end|>"))
    messages = formats.to_messages({"messages": chat("q", "a") * 3000}, "here")
    assert len(tokenizer.render_spans(messages, "here").spans) == 3000


def by_pattern(text, content, start, barrier, stop=None):
    """turns.locate with a pattern of all words: simple, but its memory is hundreds of times the content's."""
    stop = len(text) if stop is None else stop
    position = text.find(content, start, stop)
    place = (position, position + len(content)) if position >= 0 else None
    if not place or barrier and barrier.search(text, start, position):
        match = re.compile(r"\s+".join(map(re.escape, content.split()))).search(text, start, stop)
        place = match.span() if match else None
    return None if place and barrier and barrier.search(text, start, place[0]) else place


def test_contents_are_located_as_by_a_pattern():
    draw, found = random.Random(0), 0
    pieces = ["a", "b", "ab", " ", "  ", "\n", "<e>", "<e>\n", "e", "\x1c", "\x85", "\u3000", "\u200b", "\u2028"]
    barriers = [None, turns.any_of(["<e>", "<e>\n"]), turns.any_of(["e"]), turns.any_of([])]
    for _ in range(20000):
        text, content = ("".join(draw.choices(pieces, k=draw.randrange(most))) for most in (25, 6))
        start, stop = draw.randrange(len(text) + 1), draw.choice([None, draw.randrange(len(text) + 1)])
        case = text, content.strip(), start, draw.choice(barriers), stop
        place = turns.locate(*case)
        assert place == by_pattern(*case), case
        found += place is not None
    assert 3000 < found < 17000


def test_a_long_content_is_located_in_memory_of_a_few_times_its_size():
    text = "word " * 100_000
    tracemalloc.start()
    place = turns.locate(text, "word\n" * 99_999 + "word", 0, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert place == (0, len(text) - 1) and peak < 40 * len(text)


def test_attributes_are_those_of_jinja():
    """The sandbox's shorter ways to read x.name give what jinja's gives, for keys with names of methods too."""
    theirs = jinja2.sandbox.ImmutableSandboxedEnvironment()
    ours = tiny.sandbox
    names = "role items keys pop update copy mro get __class__ _x append format upper missing".split()
    namespace = ours.globals["namespace"](role=1)
    values = [dict.fromkeys(names, 1), {}, [1], "text", 5, None, namespace, dict, len, "".format]
    for value in values:
        for name in names * 2:  # the second time from memory
            a, b = (env.getattr(value, name) for env in (ours, theirs))
            assert type(a) is type(b) and getattr(a, "__name__", 0) == getattr(b, "__name__", 0), (value, name)


@pytest.mark.parametrize("order", [1, -1])
def test_arguments_are_found_in_any_order(order):
    arguments = {"path": "a\n\"b\"", "n": 5, "on": True, "list": ["x", None]}
    written = list(arguments.items())[::order]
    turn = "call " + "; ".join(f"{key} = {turns.json.dumps(value)}" for key, value in written)
    calls = [{"name": "call", "arguments": arguments}]
    turns.check_calls(calls, turn, "here")
    with pytest.raises(UserError, match="the argument"):
        turns.check_calls(calls, turn.replace("5", "6"), "here")
