"""Which tokens of a row are targets, and their weights. A row is a chat, a plain text, or tokens already."""

import functools
from typing import NamedTuple

import numpy as np

from settings.errors import UserError
from text.template import token_range
from text.unknown import Unknown, count_unknown

LOW, HIGH = 1e-20, 1e20  # of weights other than 0: sums of losses times weights stay exact enough in fp32


class Masked(NamedTuple):
    """The tokens of a row and their weights in the loss."""

    kind: str | None = None  # "chat", "text" or "tokens"; None: its reader dropped the row
    length: int = 0  # tokens before truncation
    dropped: str | None = None  # why the row is not trained; then the fields below are empty
    ids: list = []  # the tokens that are kept
    weights: np.ndarray = np.zeros(0, np.float32)  # of the tokens that are kept; 0: no target
    pieces: list = []  # [(start, stop), ...] of ids; each becomes a conversation of its own
    turns: int = 0  # assistant turns that are trained and not truncated
    stopped: int = 0  # turns among these whose stop token is a target
    reasoning: int = 0  # tokens of the reasoning of the turns that are trained, also if they are no targets
    reasoning_masked: int = 0  # tokens among these that are no targets
    unknown: Unknown = Unknown()


def mask(conversation, encoding, options, tokenizer):
    """The Masked of a row.

    conversation  data.Conversation
    encoding      of its text, by the tokenizers library
    options       data.Options
    tokenizer     template.ChatTokenizer

    Raises UserError, which names the row: too long, ids that the tokenizer does not have, unusable weights.
    """
    if conversation.dropped:
        return Masked(dropped=conversation.dropped)
    ids = encoding.ids  # makes a list each time that it is read
    masked = mask_row(conversation, encoding, ids, options, tokenizer)
    if conversation.tokens is not None:
        return masked
    return masked._replace(unknown=count_unknown(conversation.text, ids, tokenizer))


def mask_row(conversation, encoding, ids, options, tokenizer):
    """mask() of a row that its reader has not dropped, without its unknown characters."""
    if conversation.tokens is None and conversation.spans is None:
        return mask_text(document(ids, tokenizer), options.max_length)
    where, kind = conversation.where, "chat"
    if conversation.tokens is not None:
        kind, (ids, weights) = "tokens", check_tokens(conversation.tokens, tokenizer.size, where)
    length, kept = len(ids), min(len(ids), options.max_length)
    if length > kept and options.too_long == "error":
        raise UserError(f"{where} has {length} tokens, more than --max_length {kept}; raise it, or set "
                        "--too_long to truncate or drop")
    if length > kept and options.too_long == "drop":
        return Masked(kind, length, "too long")
    turns = stopped = reasoning = 0
    if kind == "chat":
        weights, turns, stopped, reasoning = make_weights(
            encoding, ids, conversation.spans, conversation.text, kept=kept,
            stop_token_ids=tokenizer.stop_token_ids, train_on_prompt=options.train_on_prompt,
            train_reasoning=options.train_reasoning)
    weights = check_weights(weights[:kept], where)
    if not weights.any():
        dropped = "without targets" + (" after truncation" if length > kept else "")
        return Masked(kind, length, dropped, turns=turns, stopped=stopped)
    return Masked(kind, length, None, ids[:kept], weights, [(0, kept)], turns, stopped, reasoning,
                  0 if options.train_reasoning else reasoning)


# ---- chats -----------------------------------------------------------------------------------------------


def make_weights(encoding, ids, spans, text, *, kept, train_on_prompt, train_reasoning, stop_token_ids):
    """The weights of the tokens of one conversation; 0: no target.

    A token is a target if it lies entirely inside a trained span.

    encoding, ids    of `text`, by the tokenizers library: n tokens
    spans            turns.Spans, the assistant's turns in order
    kept             n, or fewer if the conversation is truncated
    train_on_prompt  every token but the first is a target: those outside trained spans have weight 1
    train_reasoning  False: a span is trained from its answer on, without its reasoning
    stop_token_ids   the tokens that end a turn: one with calls may end with another one

    Returns (kept,) fp64, the number of trained turns that are not truncated, how many of these have their
    stop token among the targets, and the number of tokens of their reasoning.
    """
    weights = np.full(len(ids), float(train_on_prompt))
    turns = stopped = reasoning = 0
    for start, end, has_stop_token, weight, answer in spans:
        first, after = token_range(encoding, start, end, len(text))
        if kept < len(ids) and first >= kept:
            break  # this turn and all later ones are truncated; searching for their tokens would take long
        if weight and answer not in (None, start):
            begin = token_range(encoding, answer, end, len(text))[0]
            reasoning += begin - first
            first = first if train_reasoning else begin
        weight = weight or float(train_on_prompt)
        weights[first:after] = weight
        if weight and after <= kept:
            turns += 1
            stopped += int(has_stop_token and not set(stop_token_ids).isdisjoint(ids[first:after]))
    weights[:1] = 0  # nothing predicts the first token
    return weights[:kept], turns, stopped, reasoning


# ---- plain texts -----------------------------------------------------------------------------------------


def mask_text(ids, max_length):
    """The Masked of a plain text: every token is a target, but the first of each piece."""
    bounds = pieces(len(ids), max_length)
    if not bounds:
        return Masked("text", len(ids), "without targets")
    weights = np.ones(bounds[-1][1], np.float32)
    weights[[start for start, _ in bounds]] = 0
    return Masked("text", len(ids), None, ids, weights, bounds)


def document(ids, tokenizer):
    """The tokens of a plain text as transformers' tokenizer makes them, and its EOS token at the end.

    ids        the text's tokens, without special tokens
    tokenizer  a template.ChatTokenizer

    transformers adds what the post-processor in tokenizer.json says, mostly BOS or nothing. The EOS token
    teaches the model to end; TRL, LLaMA-Factory and axolotl append it too. A text that already begins or ends
    with these tokens does not get them twice.
    """
    before, after = ends(tokenizer)
    if ids[: len(before)] == before:
        before = []
    if after and ids[-len(after) :] == after:
        after = []
    return before + ids + after


@functools.lru_cache(4)
def ends(tokenizer):
    """(ids before, ids after) each text: what the post-processor adds, and the EOS token if it adds none."""
    raw = tokenizer.tokenizer
    probe = raw.encode("a")
    of_text = [i for i, is_added in enumerate(probe.special_tokens_mask) if not is_added]
    before, after = probe.ids[: of_text[0]], probe.ids[of_text[-1] + 1 :]
    eos = raw.token_to_id(tokenizer.special.get("eos_token", ""))
    if eos is not None and eos not in after:
        after.append(eos)
    return before, after


def pieces(length, max_length):
    """Cut `length` tokens into pieces: [(start, stop), ...], each of 2 to max_length tokens.

    A piece's first token has nothing before it, so it is no target. If one token remained for the last
    piece, the piece before it gives it another. Only with a max_length of 2 that is impossible: then the last
    of an odd number of tokens is not trained.
    """
    bounds = [(start, min(start + max_length, length)) for start in range(0, length, max_length)]
    if bounds and bounds[-1][1] - bounds[-1][0] == 1:
        last = bounds.pop()[1]
        if bounds and max_length > 2:
            bounds[-1] = bounds[-1][0], last - 2
            bounds.append((last - 2, last))
    return bounds


def check_text(text, where):
    """Raise UserError, which names the row, for a text that is not valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: the text contains half a character (a lone surrogate): {error}; "
                        "correct the row") from error


# ---- rows that are tokens already ------------------------------------------------------------------------


def check_tokens(tokens, size, where):
    """(ids, weights) of a row that is tokens already, as a list and an array (tokens,) fp64.

    tokens  (ids, weights), two lists
    size    number of ids that the tokenizer has

    Raises UserError, which names the row, for an id that the tokenizer does not have.
    """
    ids, weights = list(tokens[0]), np.array(tokens[1], dtype=np.float64)
    if len(ids) != len(weights):
        raise UserError(f"{where}: {len(ids)} tokens, but {len(weights)} labels or weights; write one each")
    wrong = next((i for i in ids if not 0 <= i < size), None)
    if wrong is not None:
        raise UserError(f"{where}: the tokenizer has the ids 0 to {size - 1}, but not {wrong}; tokenise the "
                        "row with the tokenizer of --model")
    weights[:1] = 0  # nothing predicts the first token
    return ids, weights


def check_weights(weights, where):
    """Weights as fp32. Raises UserError for one that is negative, nan, or outside what fp32 can sum."""
    usable = (weights == 0) | ((weights >= LOW) & (weights <= HIGH))
    if not usable.all():
        raise UserError(f"{where}: the weight {weights[~usable][0]:g} must be 0, or from {LOW:g} to {HIGH:g}")
    return weights.astype(np.float32)
