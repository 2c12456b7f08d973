"""Characters that a tokenizer lacks: they become its unknown token, or vanish. Most tokenizers lack none."""

import functools
import json
from typing import NamedTuple

from tokenizers import pre_tokenizers

NONE, LOST = -1, -2  # no id: each byte has a token; characters without a token vanish
SHOWN = 5  # of the characters of a row


class Unknown(NamedTuple):
    """What the tokens of a text do not say."""

    tokens: int = 0  # that are the unknown token
    characters: int = 0  # without a token
    examples: tuple = ()  # some of these characters


def unknown_id(raw, parsed):
    """What becomes of characters that a vocabulary lacks: the id of the unknown token, LOST, or NONE.

    raw     tokenizers.Tokenizer
    parsed  its tokenizer.json
    """
    model, names = parsed["model"], []
    if '"ByteLevel"' in json.dumps([parsed.get("pre_tokenizer"), parsed.get("normalizer")]):
        names = pre_tokenizers.ByteLevel.alphabet()
    elif model.get("byte_fallback"):
        names = [f"<0x{byte:02X}>" for byte in range(256)]
    if names and all(raw.token_to_id(name) is not None for name in names):
        return NONE
    token = model.get("unk_token")
    number = model.get("unk_id") if token is None else raw.token_to_id(token)
    return LOST if number is None else number


def count_unknown(text, ids, tokenizer):
    """The Unknown of a text and its token ids, by a template.ChatTokenizer."""
    raw, number = tokenizer.tokenizer, tokenizer.unknown_id
    if number == NONE:
        return Unknown()
    if number != LOST:
        tokens = ids.count(number) - text.count(raw.id_to_token(number))  # a text may quote "<unk>"
        return Unknown(tokens, 0, examples(text, tokenizer)) if tokens > 0 else Unknown()
    for added in tokenizer.added.values():
        text = text.replace(added.content, "")
    text = raw.normalizer.normalize_str(text) if raw.normalizer else text
    characters = sum(text.count(char) for char in set(text) if lacks(tokenizer, char))
    return Unknown(0, characters, examples(text, tokenizer)) if characters else Unknown()


def examples(text, tokenizer):
    return tuple(char for char in sorted(set(text)) if lacks(tokenizer, char))[:SHOWN]


@functools.lru_cache(2**16)
def lacks(tokenizer, char):
    """Whether a vocabulary lacks a character. What the pre-tokenizer removes does not count."""
    raw = tokenizer.tokenizer
    if tokenizer.unknown_id != LOST:
        return tokenizer.unknown_id in raw.encode(char, add_special_tokens=False).ids
    pieces = [char]
    if raw.pre_tokenizer:
        pieces = [piece for piece, _ in raw.pre_tokenizer.pre_tokenize_str(char)]
    return any(sum(len(token.value) for token in raw.model.tokenize(piece)) < len(piece) for piece in pieces)
