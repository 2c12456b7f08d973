"""A row of a data file -> a conversation, a plain text, or tokens. Owns which shapes of rows are accepted.

Nothing that a row says is dropped without a word: each column and each key of a message is used, refused with
the reason, or listed as not used. text/keys.py has the tables of those that are known.
"""

import json
import re
from typing import NamedTuple

from settings.errors import UserError
from text.annotations import product, read_label, read_template_kwargs, read_tokens, read_tools, read_weight
from text.columns import SHAPES, TURNS, Columns, is_null, values_of, without_nulls
from text.keys import MEDIA_MARK, NAMES, ROLES, ROW_KEYS, STRONG, nearest, plain, row_use
from text.messages import (EMPTY, decoded, decoded_turns, has_role, is_empty, is_finite, is_pair, is_turns,
                           listed, one_reasoning, read_text, read_turn, read_turns, shown)

KEYS = "prompt", "response", "messages"  # defaults of --prompt_key, --response_key and --messages_key
# Values of a column "reasoning" that say whether there is any, as in Nemotron's data
NO_THOUGHTS = {"on", "off", "true", "false", "yes", "no", "none", "low", "medium", "high"}
# A misspelled column is compared with these
MAIN_COLUMNS = tuple(name for key in ROW_KEYS for name in key.names.split()
                     if key.use in ("messages", "prompt", "response", "context", "text"))
NO_CONTEXT = {"nan", "NaN", "null", "None", "<noinput>"}  # how tables and Alpaca's data write no input


class Row(NamedTuple):
    """What a row says. Exactly one of messages, text and tokens is set, or dropped is.

    messages         [{"role", "content", "weight", ...}, ...]; weight: of its tokens' losses, 0: not trained
    text             plain text, of which every token is a target
    tokens           (ids, weights), lists of equal length; weight 0: no target
    tools            list of dicts, or None
    template_kwargs  variables of the chat template
    dropped          why the row is not trained, for the ledger, or None
    unused           columns that are not used, and "messages.KEY" for unknown keys of messages
    """

    messages: list | None = None
    text: str | None = None
    tokens: tuple | None = None
    tools: list | None = None
    template_kwargs: dict = {}
    dropped: str | None = None
    unused: tuple = ()


def read_row(row, where, keys=KEYS):
    """The Row of a JSON value in any of the accepted shapes, see docs/data.md.

    where  "file[row]", for errors
    keys   of the prompt, the response and the list of messages; a row without them is read by KEYS

    Raises UserError, which names the row, and what to write or to pass instead.
    """
    if is_turns(row):
        row = {"messages": row}
    columns = Columns(row, where, keys)
    refuse_columns(columns)
    weight, dropped = read_weight(columns)
    if "tokens" in columns.by_use:
        ids, weights = read_tokens(columns)
        tokens = ids, [product(weight, w, columns) for w in weights]
        return Row(tokens=None if dropped else tokens, dropped=dropped, unused=columns.unused())
    messages = read_conversation(columns)
    if messages is None:
        if weight != 1:
            raise columns.error(f"{listed(columns.by_use['weight'])} of a plain text must be 1; mix sources "
                                "by weight instead, see docs/data.md")
        text = columns.take("text")
        return Row(text=None if dropped else text, dropped=dropped, unused=columns.unused())
    dropped = dropped or read_label(columns)
    for message in messages if weight != 1 else ():
        message["weight"] = product(weight, message["weight"], columns)
    tools, template_kwargs = read_tools(columns), read_template_kwargs(columns)
    return Row(None if dropped else messages, tools=tools, template_kwargs=template_kwargs, dropped=dropped,
               unused=columns.unused())


def to_messages(row, where, keys=KEYS):
    """The messages of a row that has to be a conversation. Raises UserError, which names the row."""
    read = read_row(row, where, keys)
    if read.messages is None:
        found = read.dropped or "it is a plain or a tokenised text"
        raise UserError(f"{where}: a conversation is needed here, but {found}")
    return read.messages


# ---- columns ----------------------------------------------------------------------------------------------


def refuse_columns(columns):
    """Raise UserError for a column that changes what has to be trained in a way that is not supported."""
    reasons = {
        "media": "text training can't use it; pass rows without it, or remove the column if the texts do not "
                 "depend on it",
        "doubtful": "its name says that it changes what is trained, but it is not known; docs/data.md has "
                    "those that are. Rename it if it does not"}
    if "tokens" not in columns.by_use:
        reasons["refused"] = "it is not supported, see docs/data.md"
        reasons["token_mask"] = 'it masks tokens, but the row has no "input_ids"'
    for use, reason in reasons.items():
        for name in columns.by_use.get(use, []):
            if not is_empty(columns.row[name]):
                raise columns.error(f'column "{name:.60}": {reason}')


# ---- conversations ----------------------------------------------------------------------------------------


def read_conversation(columns):
    """The messages of a row, or None if it is plain text."""
    lists, pair = choose(columns)
    if not lists and not pair:
        is_half = columns.by_use.get("prompt") or columns.by_use.get("response")
        texts = [columns.row[name] for name in columns.by_use.get("text", [])]
        if texts and isinstance(texts[0], str) and texts[0].strip() and not is_half:
            return None
        raise no_shape(columns)
    messages = read_list(columns, lists) if lists else read_pair(columns, *pair)
    if system := columns.take("system"):
        system = read_turn({"role": "system", "content": system}, columns)
        if messages[0]["role"] != "system":
            messages = system + messages
        elif said(messages[:1]) != said(system):
            raise columns.error(f"the column {listed(columns.by_use['system'])} differs from the first "
                                "message, which is a system message too; remove one")
    if not any(m["role"] == "assistant" for m in messages):
        roles = dict.fromkeys(m["role"] for m in messages)
        raise columns.error("no assistant message, so there is nothing to train; the roles are "
                            f"{listed(roles)}")
    for message in messages:
        content = message["content"]
        if "<" in content and message["role"] == "user" and MEDIA_MARK.search(content):
            raise columns.error(f"the user message {shown(content)} has the place of an image, video or "
                                "audio; text training can't use it")
    check_depends(columns, messages)
    return messages


def is_named(columns):
    """Whether the user has named the columns that hold this row's conversation."""
    return any(key != default and values_of(columns.row, key) for key, default in zip(columns.keys, KEYS))


def check_depends(columns, messages):
    """Raise UserError for choices, passages, ... that the answer may depend on and that no prompt has."""
    names = columns.by_use.get("depends", [])
    if "A" in columns.row and "B" in columns.row:  # MMLU's choices
        names = [*names, *(name for name in columns.row if len(name) == 1 and name in "ABCDEFGHIJ")]
    if not names or is_named(columns):
        return
    prompts = " ".join(shown_text(m["content"]) for m in messages if m["role"] != "assistant")
    for name in names:
        texts = texts_in(columns.row[name])
        texts = [text for text in texts if len(text) > 1] or texts  # without the labels A, B, C, D
        if all(re.search(rf"(?<![0-9A-Za-z]){re.escape(text)}(?![0-9A-Za-z])", prompts) for text in texts):
            continue
        roles = "prompt", "response", "messages"
        way = "write it into the prompt, or remove the column if answers do not depend on it"
        found = [next(iter(columns.by_use.get(role, [])), None) for role in roles[:2]]
        if all(found) and tuple(found) != KEYS[:2]:
            way += f". To train without them pass --prompt_key {found[0]:.60} --response_key {found[1]:.60}"
        raise columns.error(f'no prompt has the text of column "{name:.60}", {shown(columns.row[name])}; '
                            f"{way}")


def texts_in(value):
    """All texts in a JSON value, of lists and objects too."""
    if isinstance(value, (list, dict)):
        items = value.values() if isinstance(value, dict) else value
        return [text for item in items for text in texts_in(item)]
    return [shown_text(value)] if value not in EMPTY else []


def choose(columns):
    """Which columns hold the conversation: (columns of lists, None), ([], (prompt, response)) or ([], None).

    Columns that the user has named come first. Raises UserError where it is ambiguous what is trained.
    """
    keys, row = columns.keys, columns.row
    named = [(values_of(row, key) or [None])[0] for key in keys]
    if keys[:2] != KEYS[:2] and not is_null(named[0]) and not is_null(named[1]):
        return [], keys[:2]
    if keys[2] != KEYS[2] and named[2] not in EMPTY:
        return [keys[2]], None
    refuse_preference(columns)
    if lists := columns.by_use.get("messages"):
        return lists, None
    prompts = columns.names("prompt") or columns.names("context")[:1]
    responses = columns.names("response")
    if not prompts and not responses:
        prompts, responses = ([name for name in row if plain(name) in NAMES[role].split()] for role in NAMES)
    if len(prompts) > 1:  # a column that another one quotes is no second prompt
        texts, prompts = {name: shown_text(row[name]) for name in prompts}, []
        for name in sorted(texts, key=lambda name: -len(texts[name])):
            if not any(texts[name] in texts[other] for other in prompts):
                prompts.append(name)
    if len(responses) > 1:
        texts = {shown_text(row[name]): name for name in reversed(responses)}
        responses = [name for name in responses if name in texts.values()]
        strong = [name for name in responses if plain(name) in STRONG]
        responses = strong if len(strong) == 1 else responses
    if prompts and responses and len(prompts + responses) > 2:
        raise columns.error(f"the columns {listed([*prompts, *responses])} may all be the question or the "
                            f"answer; {column_flags([], keys)}, or remove those that are not")
    return [], (prompts[0], responses[0]) if prompts and responses else None


def refuse_preference(columns):
    """Raise UserError for a row with a better and a worse answer, unless its messages are the better one."""
    row, names = columns.row, columns.by_use.get("preference", [])
    lists, prompts = columns.by_use.get("messages", []), columns.by_use.get("prompt", [])
    if not names or (lists and row.get("chosen") == row[lists[0]]):
        return
    better = next((name for name in names if plain(name) in (
        "chosen", "chosen_response", "preferred_output")), None)
    turns = row[better] if better and is_turns(row[better]) else []
    prompts = [*prompts, *lists, *(["input.messages"] if values_of(row, "input.messages") else [])]
    prompts = prompts or columns.by_use.get("context", [])
    if any(ROLES.get(str(turn.get("role") or turn.get("from")).lower()) == "user" for turn in turns):
        way = f"to train on the better answers, pass --messages_key {better}"
    elif better and prompts:
        prompt = f"--prompt_key {prompts[0]} " if prompts[0] != KEYS[0] else ""
        way = f"to train on the better answers, pass {prompt}--response_key {better}"
    elif better:
        way = 'to train on the better answers, write them as "messages"'
    else:
        way = "to train on the answer beside it, remove the column"
    raise columns.error(f"{listed(names)}: this trainer learns from answers, not from preferences; {way}")


def shown_text(value):
    """The text of a column, up to white space, to search it in others."""
    return " ".join((value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).split())


def column_flags(names, keys):
    """For an error: the flags that name the columns of a row, and those passed flags that they replace."""
    prompt, response = "COLUMN", "COLUMN"
    if len(names) == 2 and all(re.fullmatch(r"[\w.-]{1,60}", name) for name in names):
        prompt, response = names
    hint = f"pass --prompt_key {prompt} --response_key {response}"
    passed = [f"--{default}_key {key}" for default, key in zip(KEYS, keys) if key != default]
    return hint + (f" instead of {' '.join(passed)}" if passed else "")


def no_shape(columns):
    """The UserError for a row of no known shape: what is missing, its columns, and flags that name them."""
    given, keys = columns.given, columns.keys
    uses = dict(columns.uses)
    uses.update({key: use for key, use in zip(keys, ("prompt", "response", "messages")) if key in given})
    for use, role, other in ("prompt", "user", "response"), ("response", "assistant", "prompt"):
        nulls = [name for name in given if uses.get(name) == use and is_null(given[name])]
        is_half = any(uses.get(name) == other and not is_null(given[name]) for name in given)
        if nulls and is_half and not columns.names(use):
            return columns.error(f"the content of the {role} message must be a string, it is "
                                 f"{shown(given[nulls[0]])}; remove the row or write the text of "
                                 f'"{nulls[0]:.60}"')
    if {"role", "from"} & given.keys() and {"content", "value"} & given.keys():
        return columns.error(f'the row is a single message; a row is {{"messages": {TURNS}}}')
    for name in given:
        if uses.get(name) == "messages":
            return not_a_list(columns, name, given[name])
    kinds = {*uses.values()} & {"text", "prompt", "response"}
    text = columns.names("text")
    if kinds == {"text"} and text and not isinstance(columns.row[text[0]], str):
        return columns.error(f'"{text[0]:.60}" must be a text, it is {shown(columns.row[text[0]])}')
    names, unknown = [], []  # of columns, or of those inside them
    for name, value in given.items():
        found = [f"{name}.{inner}" for inner in value] if isinstance(value, dict) else [name]
        names += found
        unknown += [] if uses.get(name) else found
    prompts = columns.by_use.get("prompt") or columns.by_use.get("context")
    responses = columns.by_use.get("response")
    lacks = []
    if responses:
        lacks.append(f"no question for {listed(responses)}")
    elif prompts:
        lacks.append(f"no answer to {listed(prompts)}")
    elif text:
        lacks.append(f'"{text[0]:.60}" is empty')
    near = {name: nearest(name, MAIN_COLUMNS) for name in unknown[:1000]}
    if unknown:  # first those that look misspelled
        shown_first = sorted(near, key=lambda name: near[name] is None)[:8]
        found = [f"{name!r:.62}" + (f" ({near[name]}?)" if near[name] else "") for name in shown_first]
        more = f" and {len(unknown) - 8:,} more" if len(unknown) > 8 else ""
        lacks.append(f"unrecognised columns {', '.join(found)}{more}")
    lack = "; ".join(lacks) or "no question and no answer"
    lists = [name for name in names for turns in values_of(given, name) if is_turns(turns) and any(
        ROLES.get(str(turn.get("role", turn.get("from"))).lower()) == "assistant" for turn in turns)]
    meant = {row_use(known): [name] for name, known in near.items() if known}
    if prompts or responses or meant:
        names = [*(prompts or meant.get("prompt", ())), *(responses or meant.get("response", ()))]
    way = column_flags(names, keys)
    way = f"pass --messages_key {lists[0]:.60}" if lists else way
    return columns.error(f"{lack}; accepted are {SHAPES}, or {way}")


def not_a_list(columns, name, value):
    return columns.error(f'"{name:.60}" must be a non-empty list of {{"role", "content"}} objects, it is '
                         f"{shown(value)}")


def read_list(columns, names):
    """The messages of a row that has them in a list, or the same ones in several lists."""
    found = []
    for name in names:
        turns = columns.value(name)
        if isinstance(turns, str) and turns.lstrip()[:1] in ("[", "{", '"'):
            turns = without_nulls(decoded(turns, f'"{name:.60}"', columns.where), columns.where)
        if isinstance(turns, list) and all(isinstance(turn, str) and turn[:1] == "{" for turn in turns):
            turns = [decoded(turn, f'a message in "{name:.60}"', columns.where) for turn in turns]
        is_struct = isinstance(turns, dict) and (has_role(turns) or is_pair(turns))
        if is_struct and all(isinstance(value, list) for value in turns.values()):
            turns = [dict(zip(turns, values)) for values in zip(*turns.values())]  # Arrow's struct of lists
            turns = without_nulls(turns, columns.where)
        if not isinstance(turns, list) or not turns:
            raise not_a_list(columns, name, turns)
        found.append(read_turns(turns, columns))
    for name, other in zip(names[1:], found[1:]):
        if said(other) != said(found[0]):
            raise columns.error(f"the columns {listed([names[0], name])} have different messages; pass "
                                f"--messages_key {name:.60} to train on those, or remove one")
    messages, by_user = found[0], names[0] == columns.keys[2] != KEYS[2]
    histories = columns.by_use.get("history", [])
    if any(not is_said(text, messages) for name in histories for text in texts_in(columns.row[name])):
        raise columns.error(f'column "{histories[0]:.60}" beside "{names[0]:.60}"; put its turns into the '
                            "messages")
    for name in columns.by_use.get("context", []) if not by_user else []:
        check_said(columns, name, messages)
    for name in columns.by_use.get("response", []) if not by_user else []:
        if plain(name) not in STRONG or is_said(columns.row[name], messages):
            continue
        prompts, way = columns.by_use.get("prompt", []), "remove what should not be trained"
        if messages[-1]["role"] != "assistant":
            way = f"pass --prompt_key {names[0]:.60} --response_key {name:.60} to train on it as their answer"
        elif prompts and (prompts[0], name) != KEYS[:2]:
            way += f", or pass --prompt_key {prompts[0]:.60} --response_key {name:.60} to train on it"
        raise columns.error(f'column "{name:.60}" has an answer that the messages in "{names[0]:.60}" do not '
                            f"have; {way}")
    return messages


def said(messages):
    """What a conversation says, to compare two."""
    return [(m["role"], m["content"].strip()) for m in messages]


def is_said(value, messages):
    """Whether a column only repeats what is in the messages."""
    contents = dict.fromkeys(shown_text(message["content"]) for message in messages)

    def is_there(value):
        if isinstance(value, list):
            return all(isinstance(turn, dict) and is_there(turn.get("content", turn.get("value")))
                       for turn in value)
        text = shown_text(value)
        return text in contents or any(text in content for content in contents)

    return is_there(value)


def check_said(columns, name, messages):
    """Raise UserError if a column has a text that prompts may depend on and that no message has."""
    if not is_said(columns.row[name], messages):
        raise columns.error(f'no message has the text of column "{name:.60}"; add it to a message, or remove '
                            "the column")


def read_pair(columns, prompt_key, response_key):
    """The messages of a row with a prompt and an answer, each of them a text or a list of messages."""
    prompt, answer = (decoded_turns(columns.value(key), columns) for key in (prompt_key, response_key))
    prompt = [prompt] if isinstance(prompt, dict) and has_role(prompt) else prompt
    contexts = [name for name in columns.by_use.get("context", []) if name not in columns.used]
    if is_turns(prompt):
        messages = read_turns(prompt, columns, trained=False)
        for name in contexts:
            check_said(columns, name, messages)
    else:
        texts = [read_text(prompt, "user", columns)]
        for name in contexts:
            if isinstance(columns.row[name], str) and columns.row[name].strip() in NO_CONTEXT:
                continue  # it is listed as not used
            value = columns.value(name)
            if not isinstance(value, str) and not is_finite(value):
                raise columns.error('the content of the user message must be a string, but column '
                                    f'"{name:.60}" is {shown(value)}')
            if value != prompt or plain(prompt_key) == "instruction":  # Alpaca joins the two in any case
                texts.append(read_text(value, "user", columns))
        messages = [{"role": "user", "content": "\n".join(filter(None, texts)), "weight": 1.0}]
    messages = read_history(columns) + messages
    turns = [answer] if isinstance(answer, dict) else answer
    if is_turns(turns):
        answers = read_turns(turns, columns)
        if answers[0]["role"] != "assistant":  # they repeat the prompt, or its end
            before, after = said(messages), said(answers)
            repeated = [n for n in range(1, len(answers)) if before[-n:] == after[:n]]
            answers = answers[max(repeated, default=0) :]
        return messages + answers
    turn = {"role": "assistant", "content": answer}
    thoughts = {name: columns.row[name] for name in columns.by_use.get("reasoning", [])}
    thoughts = {name: columns.value(name) for name, text in thoughts.items()
                if isinstance(text, str) and text.strip().lower() not in NO_THOUGHTS}
    if text := one_reasoning(thoughts, columns):
        turn["reasoning_content"] = text
    return messages + read_turn(turn, columns)


def read_history(columns):
    """The messages of the column "history": pairs of texts, or messages. Its answers are trained."""
    history = decoded(columns.take("history"), '"history"', columns.where)
    history = [] if history is None else history
    if is_turns(history) or (isinstance(history, list) and history and all(map(is_pair, history))):
        return read_turns(history, columns)
    if not isinstance(history, list) or not all(isinstance(p, list) and len(p) == 2 for p in history):
        raise columns.error('"history" must be [["question", "answer"], ...] or a list of messages, it is '
                            f"{history!r:.60}")
    return [message for pair in history for role, text in zip(("user", "assistant"), pair)
            for message in read_turn({"role": role, "content": text}, columns)]
