"""Is a turn trained after the same prompt that inference renders before it?

Many templates render a turn otherwise once another one follows, or end the prompt of inference with something
that no trained turn begins with, e.g. an open <think>. Then the model is asked for what it has not learned.
"""

import os
from typing import NamedTuple

import jinja2

from text import turns

# Why a prompt of inference is not what is trained before the turn, as the ledger says it
REFUSED = "the chat template refuses the prompt alone"
REASONING = "the reasoning of earlier answers is in only one of the two"
BEGIN = "the turn begins otherwise"
TEXT = "the text before the turn differs"
TOKEN = "a token crosses the end of the prompt"
AROUND = 40  # characters that an example shows
MOST = 100  # turns of a conversation that are compared: each renders the conversation up to it


class Prompt(NamedTuple):
    """How the prompt that inference renders before a trained turn compares with the training text."""

    end: int  # where it ends in the text, if it is the beginning of the text
    difference: str | None  # one of the texts above, or None
    example: str  # names the row and the answer


def compare(tokenizer, messages, text, spans, row, where):
    """The Prompts of a conversation's first trained turns. Each is rendered once more, which takes time.

    text, spans  of all messages, see ChatTokenizer.render_spans
    row          formats.Row
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = []
    for number, (i, span) in enumerate(zip(answers, spans), 1):
        if not span.weight or len(prompts) == MOST:
            continue
        place = f"{where}, answer {number}"
        try:
            prompt = tokenizer.render(messages[:i], True, row.tools, row.template_kwargs)
        except jinja2.TemplateError as error:
            prompts.append(Prompt(0, REFUSED, f"{place}: {error!s:.200}"))
            continue
        if text.startswith(prompt):
            prompts.append(Prompt(len(prompt), None, place))
            continue
        earlier = [messages[k] for k in answers[: number - 1]]
        last = messages[i - 1]["content"].strip() if i else ""
        prompts.append(Prompt(0, *difference(prompt, text, span.start, last, earlier, place)))
    return prompts


def difference(prompt, text, start, last, earlier, place):
    """(kind, example) of how a prompt differs from the text in which a turn is trained.

    start    where the turn begins in the text, behind its header
    last     the text of the message before the turn
    earlier  the answers before the turn
    """
    at = len(os.path.commonprefix([prompt, text]))
    kind, found = TEXT, prompt.rfind(last)
    if 0 <= found <= at - len(last):
        kind = BEGIN
    elif any(is_in(message, prompt) != is_in(message, text[:start]) for message in earlier):
        kind = REASONING
    return kind, (f"{place}: inference has {prompt[at : at + AROUND]!r}, training {text[at : at + AROUND]!r} "
                  f"after {prompt[max(at - AROUND, 0) : at]!r}")


def is_in(message, text):
    """Whether the reasoning of a message is in a text."""
    reasoning = turns.reasoning_of(message)
    return bool(reasoning) and turns.locate_forms(text, reasoning, 0, None) is not None


def crosses(encoding, end):
    """Whether a token of a text begins before the character `end` and ends after it."""
    token = encoding.char_to_token(end - 1) if end else None
    return token is not None and encoding.token_to_chars(token)[1] > end
