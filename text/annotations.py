"""What a row says beside its conversation: tools, template variables, labels, weights; or its token ids."""

import math

from text.keys import plain, row_use
from text.messages import EMPTY, decoded, flag_of, is_finite, listed, said_by, shown

UNCLEAR = {"yes", "no", "y", "n", "on", "off", "t", "f"}  # flags that are not read
RESERVED = {"messages", "tools", "documents", "add_generation_prompt"}  # no row may set these of a template


def read_tools(columns):
    """The list of tools of a row, or None."""
    tools, what = columns.take("tools"), listed(columns.by_use.get("tools", []))
    tools = decoded(tools, what, columns.where)
    if tools in EMPTY:
        return None
    tools = [decoded(tool, "a tool", columns.where) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise columns.error(f"{what} must be a list of objects or its JSON, it is {shown(tools)}")
    return [as_tool(tool, columns) for tool in tools]


def as_tool(tool, columns):
    """A tool in OpenAI's form. Others write the function alone, or its "input_schema" (Anthropic)."""
    function = decoded(tool.get("function"), "a function", columns.where)
    if function is None and "name" in tool and {"parameters", "input_schema", "description"} & tool.keys():
        function = {key: value for key, value in tool.items() if key != "type"}
        tool = {}
    if not isinstance(function, dict):
        return tool
    if function.get("input_schema") not in EMPTY:
        if function.get("parameters") not in (*EMPTY, function["input_schema"]):
            raise columns.error('"parameters" and "input_schema" of a tool differ; remove one: '
                                f"{shown(function)}")
        function = {key: value for key, value in function.items() if key != "parameters"}
        function = {{"input_schema": "parameters"}.get(key, key): value for key, value in function.items()}
    if isinstance(function.get("parameters"), str):
        function["parameters"] = decoded(function["parameters"], "the parameters of a tool", columns.where)
    return {"type": "function", **tool, "function": function}


def read_template_kwargs(columns):
    """The variables that a row sets for the chat template."""
    kwargs = decoded(columns.take("kwargs"), '"chat_template_kwargs"', columns.where) or {}
    if not isinstance(kwargs, dict):
        raise columns.error(f'"chat_template_kwargs" must be an object or its JSON, it is {shown(kwargs)}')
    kwargs = {name: read_variable(name, value, columns) for name, value in kwargs.items()}
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    for column in columns.by_use.get("kwarg", []):
        name = plain(column)
        value = read_variable(name, columns.value(column), columns)
        if kwargs.get(name, value) != value:
            raise columns.error(f'column "{column}" is {shown(value)}; it may not differ from '
                                '"chat_template_kwargs"')
        if value is not None:
            kwargs[name] = value
    for name in kwargs:
        if name in RESERVED or name.endswith("_token"):
            raise columns.error(f'"chat_template_kwargs" has "{name:.60}", which the trainer sets; remove it')
    return kwargs


def read_variable(name, value, columns):
    """The value of a variable of the chat template; a flag may be 0, 1 or a text, as tables have it."""
    if name == "reasoning_effort":
        if not isinstance(value, str):
            raise columns.error(f'"{name}" must be a text, it is {shown(value)}')
    elif row_use(name) == "kwarg":
        flag = flag_of(value)
        if flag is None and said_by(value) is not None:
            raise columns.error(f'"{name}" must be true or false, it is {shown(value)}')
        return flag
    elif isinstance(value, str) and isinstance(said_by(value), bool):
        raise columns.error(f'"{name:.60}" is the text {shown(value)}, which templates take for true; write '
                            "true or false without quotes")
    return value


def read_label(columns):
    """Why a conversation that is labelled as a bad one is not trained, or None."""
    dropped = None
    for name in columns.by_use.get("label", []):
        if not isinstance(columns.row[name], bool) and plain(name) == "label":
            continue  # of a classification
        flag = flag_of(columns.value(name))
        if flag is None:
            raise columns.error(f'"{name:.60}" must be true or false, it is {shown(columns.row[name])}')
        dropped = dropped if flag else f"{name} is false"
    return dropped


def read_weight(columns):
    """(weight of the losses of a row, why it is not trained or None)."""
    dropped = None
    for name in [*columns.by_use.get("train", []), *columns.by_use.get("mask", [])]:
        value = columns.row[name]
        if isinstance(value, list):
            raise columns.error(f'column "{name:.60}" is a list; write "train" into each message instead')
        flag = flag_of(value)
        if isinstance(value, str) and value.strip().lower() in UNCLEAR:
            raise columns.error(f'column "{name:.60}" must be true or false, it is {shown(value)}')
        if flag is None or (plain(name) == "loss" and isinstance(said_by(value), float)):
            continue  # "loss": 1.0 is a score, "train": "train" a split; pandas has 1.0 for true beside gaps
        columns.used.add(name)
        if flag == (row_use(name) == "mask"):
            dropped = f"{name} is {str(flag).lower()}"
    weights = [said_by(columns.value(name)) for name in columns.by_use.get("weight", [])]
    weights = [weight for weight in weights if weight is not None] or [1.0]
    weight = weights[0]
    if any(other != weight for other in weights):
        raise columns.error(f"the columns {listed(columns.by_use['weight'])} differ; remove all but one")
    if not is_finite(weight) or weight < 0:
        raise columns.error(f"{listed(columns.by_use['weight'])} must be a number of at least 0, it is "
                            f"{shown(weight)}; rename the column if it is no weight of the loss")
    return float(weight), dropped


def product(of_row, weight, columns):
    """The weight of a row times that of a message or a token, which must not become 0 or infinite."""
    result = of_row * weight
    if math.isinf(result) or (not result and of_row and weight):
        raise columns.error(f"the weight {of_row:g} of the row times {weight:g} in it is {result:g}; write "
                            "weights nearer to 1")
    return result


# ---- tokens -----------------------------------------------------------------------------------------------


def read_tokens(columns):
    """(ids, weights) of a tokenised row: input_ids with labels, with a mask, with both or with neither."""
    ids = columns.take("tokens")
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise columns.error(f'"input_ids" must be a list of token ids, it is {shown(ids)}')
    weights = [1.0] * len(ids)
    for name in columns.by_use.get("labels", []):
        labels = of_each_token(columns, name, ids)
        for i, (token, label) in enumerate(zip(ids, labels)):
            if label >= 0 and label != token:
                raise columns.error(f'"{name}" is {label} at {i}, where input_ids is {token}; a label is the '
                                    "token at its own place, not shifted, or -100")
        weights = [weight * (label >= 0) for weight, label in zip(weights, labels)]
    for name in columns.by_use.get("token_mask", []):
        mask = of_each_token(columns, name, ids)
        if min(mask) < 0:
            raise columns.error(f'"{name}" must have numbers of at least 0, it has {min(mask)}')
        weights = [weight * float(value) for weight, value in zip(weights, mask)]
    for name in columns.by_use.get("attention", []):
        if any(value != 1 for value in of_each_token(columns, name, ids)):
            raise columns.error(f'"{name}" has a 0; remove the padding, rows may have any length')
    for name in columns.by_use.get("packed", []):
        lengths = columns.value(name)
        if not isinstance(lengths, list) or len(lengths) > 1 + plain(name).startswith("cu"):
            raise columns.error(f'"{name}" has several documents; write each as a row of its own')
    for name in columns.by_use.get("positions", []):
        if of_each_token(columns, name, ids) != list(range(len(ids))):
            raise columns.error(f'"{name}" must be 0, 1, 2, ...; write packed documents as rows of their own')
    return ids, weights


def of_each_token(columns, name, ids):
    """The value of a column that has a number for each token."""
    values = columns.value(name)
    if not isinstance(values, list) or len(values) != len(ids) or not all(
            map(is_finite, values)):
        raise columns.error(f'"{name}" must have a number for each of the {len(ids)} input_ids, it is '
                            f"{shown(values)}")
    return values
