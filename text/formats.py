"""A row of a data file -> messages in one format. Owns which shapes of rows are accepted."""

import json
import re

from settings.errors import UserError

SHAPES = ('{"prompt", "response"}, {"instruction", "input"?, "output"}, {"messages" or "conversations": '
          '[{"role", "content"}, ...]} or {"conversations": [{"from", "value"}, ...]}')
KEYS = "prompt", "response", "messages"  # defaults of --prompt_key, --response_key and --messages_key
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
                  "system": "system", "observation": "tool", "tool": "tool"}
REASONING = "reasoning_content", "thinking", "reasoning"  # keys of a message that may hold its reasoning


def values_of(row, key):
    """[the value of a key], or [] if the row does not have it. If there is no key "a.b", it is b inside a."""
    if key in row:
        return [row[key]]
    outer, _, inner = key.partition(".")
    return values_of(row[outer], inner) if inner and isinstance(row.get(outer), dict) else []


def to_messages(row, where, keys=KEYS):
    """The messages of a row in any of the accepted formats: [{"role", "content", "weight", ...}, ...].

    where  "file[row]", for errors
    keys   of the prompt, the response and the list of messages; a row without them is read by KEYS

    Raises UserError, which names the row: unknown columns, an unknown role, an empty answer, or no answer.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be an object, not {type(row).__name__}; accepted are {SHAPES}")
    named = values_of(row, keys[0]) + values_of(row, keys[1])
    default = values_of(row, KEYS[0]) + values_of(row, KEYS[1])
    turn_keys = [key for key in (keys[2], KEYS[2], "conversations") if key in row]
    turns = next((row[key] for key in turn_keys if row[key]), None)
    has_named_pair = keys[:2] != KEYS[:2] and len(named) == 2
    if isinstance(turns, list) and not has_named_pair:
        messages = [to_message(turn, where) for turn in turns]
    elif len(named) == 2 or len(default) == 2:
        messages = exchange(*(named if len(named) == 2 else default), where)
    elif "instruction" in row and "output" in row:
        messages = alpaca_messages(row, where)
    elif turn_keys:
        key = turn_keys[0]
        raise UserError(f'{where}: "{key}" must be a non-empty list of {{"role", "content"}} objects, it is '
                        f"{json.dumps(row[key], default=str):.60}")
    else:
        columns = ", ".join(map(repr, row)) or "(none)"
        raise UserError(f"{where}: unrecognised columns {columns:.200}; accepted are {SHAPES}, "
                        f"or {column_flags(row, keys)}")
    if row.get("system") and messages and messages[0]["role"] != "system":
        messages.insert(0, to_message({"role": "system", "content": row["system"]}, where))
    if not any(m["role"] == "assistant" for m in messages):
        raise UserError(f"{where}: no assistant message, so there is nothing to train")
    return messages


def column_flags(row, keys):
    """For an error: the flags that name the columns of a row, and those passed flags that they replace."""
    prompt, response = "COLUMN", "COLUMN"
    if len(row) == 2 and all(re.fullmatch(r"[\w.-]{1,60}", name) for name in row):
        prompt, response = row
    hint = f"pass --prompt_key {prompt} --response_key {response}"
    passed = [f"--{default}_key {key}" for default, key in zip(KEYS, keys) if key != default]
    return hint + (f" instead of {' '.join(passed)}" if passed else "")


def exchange(question, answer, where):
    """The two messages of a question and its answer."""
    return [to_message({"role": "user", "content": question}, where),
            to_message({"role": "assistant", "content": answer}, where)]


def alpaca_messages(row, where):
    """The messages of an Alpaca row: instruction, input, output, and history as LLaMA-Factory has it."""
    texts = row["instruction"], row.get("input") or ""
    history = row.get("history") or []
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f'{where}: "instruction" and "input" must be strings, they are {texts!r:.80}')
    if not isinstance(history, list) or not all(isinstance(p, list) and len(p) == 2 for p in history):
        raise UserError(f'{where}: "history" must be [["question", "answer"], ...], it is {history!r:.60}')
    question = "\n".join(filter(None, texts))
    pairs = [*history, (question, row["output"])]
    return [message for pair in pairs for message in exchange(*pair, where)]


def to_message(turn, where):
    """One message, checked. Keys of ShareGPT become role and content, and `train` becomes `weight`.

    Raises UserError, which names the row.
    """
    if not isinstance(turn, dict) or not ("role" in turn or "from" in turn):
        raise UserError(f'{where}: a message must be {{"role", "content"}} or {{"from", "value"}}, it is '
                        f"{turn!r:.80}")
    message = {k: v for k, v in turn.items() if k not in ("from", "value", "train")}
    if "from" in turn:
        if not isinstance(turn["from"], str) or turn["from"] not in SHAREGPT_ROLES:
            raise UserError(f"{where}: unknown \"from\": {turn['from']!r:.60}; it must be one of "
                            f"{', '.join(SHAREGPT_ROLES)}")
        message.update(role=SHAREGPT_ROLES[turn["from"]], content=turn.get("value"))
    weight = turn.get("weight", turn.get("train", True))
    if weight not in (0, 1):
        raise UserError(f'{where}: "train" must be true or false (or "weight" 1 or 0), it is {weight!r:.60}')
    if not isinstance(message["role"], str):
        raise UserError(f"{where}: a role must be a string, it is {message['role']!r:.60}")
    message["weight"] = float(weight)
    reasoning = {key: message[key] for key in REASONING if message.get(key) is not None}
    if reasoning:  # set both keys that templates read, as transformers does
        text = next(iter(reasoning.values()))
        message.update({"thinking": text, **reasoning, "reasoning_content": text})
    calls = message["role"] == "assistant" and message.get("tool_calls")
    if calls and not is_list_of_calls(calls):
        raise UserError(f'{where}: "tool_calls" must be a list of objects, as templates read them, not '
                        f"{calls!r:.60}")
    content = message.get("content")
    if calls and content is None:
        content = ""
    message["content"] = content
    if not isinstance(content, str):
        raise UserError(f"{where}: the content of the {message['role']:.60} message must be a string, it is "
                        f"{json.dumps(content, default=str):.60}; remove the row or write the text")
    if message["role"] == "assistant" and not calls and not content.strip():
        raise UserError(f"{where}: an empty answer; remove the row or write what the model should say")
    return message


def is_list_of_calls(calls):
    """Whether "tool_calls" is [{"name", ...} or {"function": {"name", ...}}, ...]: a list of objects."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        return False
    return all(isinstance(call.get("function") or call, dict) for call in calls)
