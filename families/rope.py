"""Rotary positions: the frequencies of each layer, from config.json.

Sources: RoFormer (arXiv 2104.09864); linear scaling (2306.15595); the scaling of Llama 3.1.
"""

import math
from dataclasses import dataclass

import torch

from settings.errors import UserError

# rope_type -> the keys that it needs
REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class Rope:
    """How a layer rotates queries and keys. Equal ones are computed once for all their layers."""

    frequencies: tuple  # (pairs,) radians per position; a head's first 2 * pairs values are rotated
    factor: float = 1.0  # cosine and sine are multiplied by it: YaRN's attention factor


def read(values, head_dim, types):
    """The Rope of a model or of one kind of its layers.

    values    rope_theta, rope_type and what that type needs, under Hugging Face's names
    head_dim  values of a head that are rotated
    types     which values of rope_type the family has

    Raises UserError for a rope_type that is not among them, and for missing or malformed values.
    """
    rope_type = values.get("rope_type", values.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in types:
        raise UserError(f"config.json: rope scaling {values!r:.200} is not supported; rope_type may be "
                        f"{', '.join(types)}")
    missing = [key for key in REQUIRED[rope_type] if key not in values]
    if missing:
        raise UserError(f"config.json: rope scaling {values!r:.200} lacks {', '.join(missing)}")
    for key in ("rope_theta", *REQUIRED[rope_type]):
        value = values[key]
        if type(value) not in (int, float) or not 0 <= value < 1e30:
            raise UserError(f"config.json: {key} is {value!r:.60}; it must be a number of at least 0")
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequency = float(values["rope_theta"]) ** -exponent
    if rope_type == "linear":
        frequency = frequency / values["factor"]
    elif rope_type == "llama3":  # divides low frequencies only, with a smooth transition
        low, high = values["low_freq_factor"], values["high_freq_factor"]
        turns = values["original_max_position_embeddings"] * frequency / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * kept + frequency / values["factor"] * (1 - kept)
    return Rope(tuple(frequency.tolist()))
