"""The turns of a row -> messages: roles, contents, calls, and the weight of each message's losses.

The functions take the Columns of text/formats.py: for errors, which name the row, and to list unknown keys.
"""

import functools
import contextlib
import json
import math
import re

from settings.errors import UserError
from text.keys import (CALL_ROLES, COMMON_ROLES, MESSAGE, PAIRS, ROLE_NAMES, ROLES, message_use, nearest,
                       plain)

REASONING = [key for key in MESSAGE if MESSAGE[key].use == "reasoning"]
EMPTY = None, "", [], {}


def is_empty(value):
    """Whether a JSON value holds nothing: [null] and {"bytes": null} are as empty as null."""
    if isinstance(value, (list, dict)):
        return all(map(is_empty, value.values() if isinstance(value, dict) else value))
    return value in EMPTY


ARGUMENTS = "arguments", "parameters", "args", "input"  # keys of a call
CALLS = [key for key in MESSAGE if MESSAGE[key].use == "calls"]
TEXTS = "text", "value", "content"  # keys of a part of a content
THOUGHTS = "thinking", "reasoning", *TEXTS  # of a thinking part
MARKS = "train", "mask", "weight", "doubtful"
# A block of reasoning before an answer; templates read the first kind, also if it lacks its first tag
BLOCK = re.compile("|".join(rf"\s*{re.escape(begin)}(.*?){re.escape(end)}" for begin, end in (
    ("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"), ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"), ("<|START_THINKING|>", "<|END_THINKING|>"))) + r"|((?:(?!<think>).)*?)</think>",
    re.DOTALL | re.IGNORECASE)
TURNS = re.compile(r"""\s*\[\s*\{\s*["'](role|from)["']\s*:""")
WORDS = {"": None, "null": None, "true": True, "false": False}
NUMBER = re.compile(r"[+-]?(\d{1,18}\.?\d{0,18}|\.\d{1,18})(e[+-]?\d{1,3})?")
HARMLESS = {"channel": ("final",), "recipient": ("all", "assistant")}  # of gpt-oss
REFUSED = {"media": "text training can't use it", "refused": "it is not supported, see docs/data.md",
           "channel": "only final may be trained; write thoughts as reasoning_content of the answer",
           "recipient": "write a call as tool_calls",
           "doubtful": 'it may say what is trained, but it is not known; use "train" or "weight"'}


def shown(value):
    """A JSON value in an error."""
    return f"{json.dumps(value, default=str):.60}"


def is_finite(value):
    """Whether a value is a number that a float can hold: not NaN, nor an integer of 400 digits."""
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:
        return False


def listed(names):
    return ", ".join(f'"{" ".join(name[:60].split())}"' for name in names)  # in one line


def decoded_turns(value, columns):
    """A value whose text is that of a list of messages, as such a list; any other value as it is."""
    if not isinstance(value, str) or not TURNS.match(value):
        return value
    text = value.strip()
    with contextlib.suppress(ValueError, RecursionError):
        if json.JSONDecoder().raw_decode(text)[1] < len(text):
            return value  # a text that begins with JSON
    turns = decoded(value, "a list of messages", columns.where)
    return turns if is_turns(turns) else value


def decoded(value, what, where):
    """A JSON value that may be written as the text of one. An empty text is null."""
    if not isinstance(value, str):
        return value
    try:
        decoded = json.loads(value) if value.strip() else None
        return json.loads(decoded) if isinstance(decoded, str) and decoded[:1] in ("[", "{") else decoded
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {what} is a text, but not the text of JSON ({error!s:.80}): "
                        f"{shown(value)}") from error


# ---- turns ------------------------------------------------------------------------------------------------


def is_turns(value):
    """Whether a value is a list of messages."""
    return isinstance(value, list) and bool(value) and all(
        isinstance(turn, dict) and has_role(turn) for turn in value)


def is_pair(turn):
    """Whether a value is a turn that has both a question and its answer."""
    return isinstance(turn, dict) and {"user", "assistant"} <= {PAIRS.get(plain(key)) for key in turn}


def has_role(turn):
    return "role" in turn or "from" in turn or any(plain(key) in ("role", "from") for key in turn)


@functools.lru_cache(4096)
def plain_keys(keys):
    """{key: how the tables write it} of a tuple of a message's keys; None if each is as they write it."""
    names = {key: plain(key) if plain(key) in MESSAGE or plain(key) in PAIRS else key for key in keys}
    return None if names == {key: key for key in keys} else names


def with_plain_keys(turn, columns):
    """A turn with its known keys as the tables write them: "Role" and " role" are role."""
    names = plain_keys(tuple(turn))
    if names is None:
        return turn
    result = {}
    for key, value in turn.items():
        name = names[key]
        value = result.get(name) if value in EMPTY else value
        if result.get(name) not in (*EMPTY, value):
            raise columns.error(f'a message has two different values of "{name}": {shown(turn)}')
        result[name] = turn[key] if value is None else value
    return result


def read_turns(turns, columns, trained=True):
    """The messages of a list of turns.

    A turn function_call after an answer of the same weight is a part of its message: calls in parallel, or an
    answer that ends in a call (ms-swift). With a reasoning of its own it is a message of its own.

    trained  whether answers without a mark of their own are trained
    """
    messages = []
    for turn in turns:
        turn = with_plain_keys(turn, columns) if isinstance(turn, dict) else turn
        for message in read_turn(turn, columns, trained):
            last = messages[-1] if messages else {}
            is_call = "tool_calls" in message and plain(str(turn.get("role", turn.get("from")))) in CALL_ROLES
            is_more = is_call and not message["content"].strip() and "reasoning_content" not in message
            if is_more and (last.get("role"), last.get("weight")) == ("assistant", message["weight"]):
                last.setdefault("tool_calls", []).extend(message["tool_calls"])  # both lists are our own
            else:
                messages.append(message)
    return messages


def read_turn(turn, columns, trained=True):
    """The messages of one turn: one, or more for {"human": question, "assistant": answer}.

    Each has "role", "content", "weight", and the keys that templates read. Raises UserError, which names the
    row.
    """
    if isinstance(turn, dict) and turn.keys() == {"role", "content"}:  # most messages: a shorter way
        role, content = turn["role"], turn["content"]
        is_plain = isinstance(content, str) and role in ("user", "assistant", "system")
        if is_plain and (content.strip() or role != "assistant"):
            return [{**turn, "weight": float(trained or role != "assistant")}]
    if isinstance(turn, dict) and not {"role", "from"} & turn.keys():
        by_role = {PAIRS[key]: value for key, value in turn.items() if key in PAIRS}
        if {"user", "assistant"} <= by_role.keys():
            marks = {key: value for key, value in turn.items() if key not in PAIRS}
            return [message for role in ("system", "user", "assistant") if by_role.get(role)
                    for message in read_turn({"role": role, "content": by_role[role],
                                              **(marks if role == "assistant" else {})}, columns, trained)]
    if not isinstance(turn, dict) or not {"role", "from"} & turn.keys():
        raise columns.error('a message must be {"role", "content"} or {"from", "value"}, it is '
                            f"{turn!r:.80}")
    role = read_role(turn, columns)
    message = {"role": "assistant" if role == "function_call" else role}
    for key, value in turn.items():
        use = message_use(key)
        if use in REFUSED and not is_empty(value) and value not in HARMLESS.get(use, ()):
            raise columns.error(f'key "{key:.60}" of a message: {REFUSED[use]}')
        if use is None and value not in EMPTY:
            columns.message_keys[key] = None
        if use in (None, "template"):
            message[key] = value
    read_content(turn, role, message, columns)
    message["weight"] = read_message_weight(turn, message["role"], trained, columns)
    return [message]


def read_role(turn, columns):
    """The role of a turn: user, assistant, system, tool, or function_call, whose content is calls.

    A `role` that is none of them goes to the chat template: its own roles have any name, and a message that
    it does not write is an error (ChatTokenizer.render_spans). One that looks like a misspelled role is an
    error, as its message would not be trained.
    """
    role = turn.get("role")
    is_name = isinstance(role, str) and re.fullmatch(r"[\w .-]{1,60}", role)
    if is_name and "from" not in turn and plain(role) not in ROLES and not is_misspelled(role):
        columns.message_keys[f"role {role}"] = None
        return role
    roles = {plain(turn[key]) if isinstance(turn[key], str) else shown(turn[key])
             for key in ("role", "from") if key in turn}
    found = {ROLES.get(role) for role in roles}
    if len(found) > 1 or None in found:
        key = "role" if "role" in turn else "from"
        text = ", ".join(sorted(roles))
        near = f" ({nearest(text, ROLE_NAMES)}?)" if nearest(text, ROLE_NAMES) else ""
        raise columns.error(f'unknown "{key}": {text!r:.60}{near}; it must be one of {", ".join(ROLE_NAMES)}')
    return found.pop()


def is_misspelled(role):
    """Whether a role is a common one with a letter wrong. With more letters (users) it is another word."""
    near = nearest(role, COMMON_ROLES) if role.isalpha() else None
    return near is not None and near not in plain(role)


def read_content(turn, role, message, columns):
    """Set content, reasoning_content and tool_calls of a message."""
    contents = [turn[key] for key in ("content", "value", "text") if key in turn]
    filled = [content for content in contents if content not in EMPTY]
    if any(content != filled[0] for content in filled[1:]):
        raise columns.error(f"a message has two different contents: {contents!r:.80}")
    content = next(iter([*filled, *contents]), None)
    reasoning = {key: turn[key] for key in REASONING if key in turn}
    if message["role"] != "assistant":
        for key, value in reasoning.items():
            if value not in EMPTY:
                columns.message_keys[f"{key} of {message['role']}"] = None
        reasoning = {}
    if isinstance(content, list) and any(map(is_thought, content)):
        content, reasoning["a part of the content"] = split_thoughts(content, message["role"], columns)
    if role == "function_call":
        if any(not is_empty(decoded(turn.get(key), f'"{key}"', columns.where)) for key in CALLS):
            raise columns.error("a message whose content is a call has other calls in a key of its own; "
                                f"remove one: {shown(turn)}")
        calls, content = read_function_calls(content, columns)
    else:
        calls = read_calls_of(turn, columns)
    if calls:
        if message["role"] != "assistant":
            raise columns.error(f"calls in a {message['role']} message; only the assistant makes calls")
        message["tool_calls"] = calls
        content = "" if content in EMPTY else content
    if not contents and not calls:
        texts = [key for key, value in turn.items() if isinstance(value, str) and key not in ("role", "from")]
        elsewhere = f", not as {listed(texts)}" if texts else ""
        raise columns.error(f"the content of the {role} message must be a string, it is null; remove the "
                            f'row or write the text as "content"{elsewhere}')
    message["content"] = read_text(content, message["role"], columns)
    set_reasoning(message, reasoning, columns)
    if message["role"] == "assistant" and not calls and not message["content"].strip():
        raise columns.error("an empty answer; remove the row or write what the model should say")


# ---- reasoning --------------------------------------------------------------------------------------------


def one_reasoning(found, columns):
    """The reasoning that {name: text} have, or None. An empty one is absent; two that differ are an error.

    White space may differ: then it is the first one.
    """
    found = {name: text for name, text in found.items()
             if text not in EMPTY and not (isinstance(text, str) and not text.strip())}
    if not all(isinstance(text, str) for text in found.values()):
        raise columns.error(f"the reasoning of a message must be a string, it is {shown(found)}")
    if len({squeezed(text) for text in found.values()}) > 1:
        texts = ", ".join(f"{listed([name])}: {shown(text)}" for name, text in found.items())
        raise columns.error(f"an answer has two different reasonings; remove one: {texts}")
    return next(iter(found.values()), None)


def squeezed(text):
    return "".join(text.split())


def set_reasoning(message, reasoning, columns):
    """Set the reasoning of a message: {where it is: text}, unless its content begins with the same.

    A content that begins with reasoning stays as it is: templates read that too, and some would write both.
    """
    text = one_reasoning(reasoning, columns)
    if text is None:
        return
    if block := BLOCK.match(message["content"]):
        inner = next(group for group in block.groups() if group is not None)
        if one_reasoning({**reasoning, "the beginning of the content": inner}, columns) and inner.strip():
            return
        message["content"] = message["content"][block.end() :].lstrip()  # an empty block
    keys = [key for key in REASONING if key in reasoning]
    message.update(dict.fromkeys(["reasoning_content", "thinking", *keys], text))  # as transformers does


def is_thought(part):
    """Whether a part of a content is the reasoning before an answer."""
    return isinstance(part, dict) and part.get("type") in ("thinking", "reasoning")


def split_thoughts(parts, role, columns):
    """(the parts of a content that are not thinking parts, the text of those that are)."""
    thoughts, rest = [], []
    for part in parts:
        if not is_thought(part):
            rest.append(part)
            continue
        check_part(part, THOUGHTS, columns)
        text = one_reasoning({key: part[key] for key in THOUGHTS if key in part}, columns)
        if text is None:
            continue
        if role != "assistant":
            columns.message_keys[f"content.{part['type']} of {role}"] = None
            continue
        if rest and read_text(rest, role, columns).strip():
            raise columns.error("reasoning behind a text of the same message; write it before the text, or "
                                f"as a message of its own: {shown(part)}")
        thoughts.append(text)
    return rest, "".join(thoughts)


# ---- texts ------------------------------------------------------------------------------------------------


def read_text(value, role, columns):
    """The text of a content: a string, a number as JSON has it, or a list of text parts, which are joined."""
    if isinstance(value, str):
        return value
    if is_finite(value) and not isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, dict) and "type" in value:
        value = [value]
    if not isinstance(value, list) or not value:
        raise columns.error(f"the content of the {role} message must be a string, it is {shown(value)}; "
                            "remove the row or write the text")
    texts = []
    for part in value:
        text = None
        if isinstance(part, dict) and part.get("type", "text") in ("text", "input_text", "output_text"):
            given = [part[key] for key in TEXTS if key in part]
            filled = [text for text in given if text not in EMPTY]
            if any(text != filled[0] for text in filled):
                raise columns.error(f"a part of a content has two different texts: {shown(part)}; remove one")
            text = next(iter([*filled, *given]), None)
        if not isinstance(text, str):
            kind = str(part.get("type")) if isinstance(part, dict) else ""
            way = "text training can't use it"
            if kind.startswith(("tool", "function")):
                way = 'write a call as "tool_calls", and its result as a message of the role tool'
            raise columns.error(f"the content of the {role} message must be a string or a list of "
                                f'{{"type": "text", "text"}}, but a part is {shown(part)}; {way}')
        check_part(part, TEXTS, columns)
        texts.append(text)
    return "".join(texts)


def check_part(part, known, columns):
    """List the unknown keys of a part of a content. Raises UserError for a mark, or for media."""
    for key, value in part.items():
        use = message_use(key)
        if key == "type" or key in known or is_empty(value) or (use in MARKS and said_by(value) is None):
            continue
        if use in MARKS:
            raise columns.error(f'{listed([key])} of a part of a content; marks are for whole messages, so '
                                "write its parts as messages")
        if use == "media":
            raise columns.error(f'{listed([key])} of a part of a content: {REFUSED[use]}')
        columns.message_keys[f"content.{key}"] = None


# ---- weights ----------------------------------------------------------------------------------------------


def said_by(value):
    """The number, true, false or null that a text says, as tables have them; anything else as it is."""
    if not isinstance(value, str):
        return value
    word = value.strip().lower()
    if word in WORDS:
        return WORDS[word]
    if not NUMBER.fullmatch(word):
        return value
    return int(word) if word.isdigit() else float(word)


def flag_of(value):
    """True or False, as true, 1, "true" or "1" say; None for anything else."""
    value = said_by(value)
    return bool(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None


def read_message_weight(turn, role, trained, columns):
    """The weight of a message: its number, 1 if there is none, or 0 if a flag says that it is not trained."""
    flags, weights = {}, {}
    for key, value in turn.items():
        use = message_use(key)
        if use in ("train", "mask", "weight") and (value := said_by(value)) is None:
            continue
        if use in ("train", "mask"):
            flag = flag_of(value)
            if flag is None:
                raise columns.error(f'"{key}" must be true or false, it is {value!r:.60}; "weight" may be a '
                                    "number")
            flags[key] = flag != (use == "mask")
        elif use == "weight":
            if not is_finite(value) or value < 0:
                raise columns.error(f'"{key}" must be a number of at least 0, it is {value!r:.60}')
            weights[key] = float(value)
    if len(set(flags.values())) > 1 or len(set(weights.values())) > 1:
        raise columns.error(f"{listed([*flags, *weights])} of a message contradict each other; remove all "
                            "but one")
    for key, value in {**flags, **weights}.items():
        if role != "assistant" and value and message_use(key) != "mask":
            raise columns.error(f'"{key}": {shown(turn[key])} in a {role} message, but only answers are '
                                "trained; remove it. --train_on_prompt trains on all tokens of all prompts")
    if not flags and not weights:
        return float(trained or role != "assistant")
    return next(iter(weights.values()), 1.0) * next(iter(flags.values()), True)


# ---- calls ------------------------------------------------------------------------------------------------


def read_calls_of(turn, columns):
    """The calls in the keys of a message, or []. Two keys that have different calls are an error."""
    found = {}
    for key in CALLS:
        value = decoded(turn.get(key), f'"{key}"', columns.where)
        if value not in EMPTY and not (isinstance(value, dict) and is_empty(value)):
            found[key] = read_calls(value, columns)
    said = [[(f["name"], f.get("arguments") or {}) for f in (call.get("function") or call for call in calls)]
            for calls in found.values()]
    if any(calls != said[0] for calls in said):
        raise columns.error(f"{listed(found)} of a message have different calls; remove one")
    return next(iter(found.values()), [])


def read_calls(calls, columns, what='"tool_calls"'):
    """A list of calls, or []. They get OpenAI's form, with arguments that are objects."""
    calls = decoded(calls, what, columns.where)
    calls = [] if calls is None else calls
    calls = calls if isinstance(calls, list) else [calls]
    return [read_call(call, calls, columns) for call in calls]


def read_call(call, calls, columns):
    """A call in OpenAI's form; one that is only a name stays as it is, and its other keys are listed."""
    call = decoded(call, "a call", columns.where)
    function = (call.get("function") or call) if isinstance(call, dict) else None
    function = decoded(function, "a function", columns.where)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise columns.error('"tool_calls" must be a list of objects {"function": {"name", "arguments"}}, '
                            f"as templates read them, not {calls!r:.60}")
    is_flat, name = function is call, function["name"]
    if call.get("name", name) != name:
        raise columns.error(f"a call has two different names: {shown(call)}")
    outer = {} if is_flat else {key: value for key, value in call.items() if key != "function"}
    arguments, what = {}, f"the arguments of the call of {' '.join(name[:60].split())}"
    pairs = [*function.items(), *outer.items()]
    for key, value in pairs:
        if plain(key) in ARGUMENTS:
            value = decoded(value, what, columns.where)
            if value in EMPTY:
                continue
            if not isinstance(value, dict):
                raise columns.error(f"{what} must be an object or its JSON, they are {shown(value)}")
            if arguments and arguments != value:
                raise columns.error(f'{what} are given twice: {shown(arguments)}, and {listed([key])}: '
                                    f"{shown(value)}; remove one")
            arguments = value
        elif key not in ("name", "id", "type", "function") and not is_empty(value):
            if message_use(key) in MARKS:
                raise columns.error(f"{listed([key])} of a call; marks are for whole messages")
            columns.message_keys[f"tool_calls.{key}"] = None
    if is_flat and not any(plain(key) in ARGUMENTS for key in call):
        return call  # a form of the template's own
    inner, outer = ({key: value for key, value in part.items() if plain(key) not in ARGUMENTS}
                    for part in (function, outer))
    if is_flat:  # {"name", "arguments"} alone
        inner.pop("function", None)
        outer = {"type": "function", **{key: inner.pop(key) for key in ("id", "type") if key in inner}}
    return {**outer, "function": {**inner, "arguments": arguments}}


def read_function_calls(content, columns):
    """(calls, text before them) of a function_call: the JSON of {"name", "arguments"}, or a list of these."""
    text = ""
    if isinstance(content, str):  # reasoning may come before
        before, mark, content = content.rpartition("</think>")
        text = before + mark
    calls = read_calls(content, columns, '"function_call"')
    if not calls:
        raise columns.error(f"a function_call without a call: {shown(content)}")
    return calls, text
