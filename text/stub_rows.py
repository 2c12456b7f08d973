"""A stand-in for formats.read_row. Remove this file when formats.py has it."""

from typing import NamedTuple

from text.formats import to_messages


class Row(NamedTuple):
    messages: list = None
    text: str = None
    tokens: tuple = None
    tools: list = None
    template_kwargs: dict = {}
    dropped: str = None
    unused: tuple = ()


def read_row(row, where, keys):
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return Row(text=row["text"])
    if isinstance(row, dict) and "input_ids" in row:
        mask = row.get("loss_mask") or [float(label != -100) for label in row["labels"]]
        return Row(tokens=(row["input_ids"], mask))
    turns = row.get("messages") if isinstance(row, dict) else None
    weights = [turn.get("weight") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    if any(isinstance(weight, float) for weight in weights):
        row = {**row, "messages": [{**turn, "weight": float(turn.get("weight") != 0)} for turn in row["messages"]]}
        messages = to_messages(row, where, keys)
        for message, weight in zip(messages, weights):
            message["weight"] = 1.0 if weight is None else float(weight)
        return Row(messages=messages, tools=row.get("tools"))
    messages = to_messages(row, where, keys)
    return Row(messages=messages, tools=row.get("tools"))
