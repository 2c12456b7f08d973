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
    turns = turns if isinstance(turns, list) else []
    weights = [turn.get("weight") for turn in turns if isinstance(turn, dict)]
    if any(isinstance(weight, float) for weight in weights):
        row = {**row, "messages": [{k: v for k, v in turn.items() if k != "weight"} for turn in turns]}
    messages = to_messages(row, where, keys)
    for message, weight in zip(messages, weights):
        if isinstance(weight, float):
            message["weight"] = weight
    return Row(messages=messages, tools=row.get("tools"))
