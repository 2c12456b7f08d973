"""Rotary positions: the frequencies of each layer, from config.json.

Sources: RoFormer (arXiv 2104.09864); linear scaling (2306.15595); the scaling of Llama 3.1; YaRN
(2309.00071); LongRoPE (2402.13753). Where these leave something open, transformers is followed.
"""

import math
from dataclasses import dataclass

import torch

from settings.errors import UserError

ORIGINAL = "original_max_position_embeddings"
# rope_type -> the keys that it needs. YaRN and LongRoPE need the original length too, which has a default.
REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "proportional": ("partial_rotary_factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
    "yarn": ("factor", ORIGINAL),
    "longrope": ("short_factor", "long_factor", ORIGINAL),
}
# rope_type -> the keys that it may have
OPTIONAL = {"yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
            "longrope": ("factor", "attention_factor"), "proportional": ("factor",)}
# The lowest values of keys that divide, or whose logarithm is computed; 0 for the others
LOWEST = {"factor": 1e-3, "rope_theta": 1, ORIGINAL: 2, "attention_factor": 1e-3}
LISTS = ("short_factor", "long_factor")


@dataclass(frozen=True)
class Rope:
    """How a layer rotates queries and keys. Equal ones are computed once for all their layers."""

    frequencies: tuple  # (pairs,) radians per position; a head's first 2 * pairs values are rotated
    factor: float = 1.0  # cosine and sine are multiplied by it: YaRN's attention factor
    long_frequencies: tuple | None = None  # those of documents of more than original_length tokens (LongRoPE)
    original_length: int | None = None  # without long_frequencies: longer documents are refused

    @property
    def ends_at_length(self):
        """Whether documents of more than original_length tokens are refused."""
        return self.original_length is not None and self.long_frequencies is None


def read(values, head_dim, types):
    """The Rope of a model or of one kind of its layers.

    values    rope_theta, rope_type, what that type needs, and max_position_embeddings, under Hugging Face's
              names
    head_dim  values of a head that are rotated
    types     which values of rope_type the family has

    Raises UserError for a rope_type that is not among them, and for missing or malformed values.
    """
    rope_type = values.get("rope_type", values.get("type", "default"))
    if rope_type == "dynamic" and rope_type not in types:
        raise UserError("config.json: rope_type dynamic is not supported: its frequencies change with each "
                        "token that is generated, and training can't compute the same. It scales nothing up "
                        "to max_position_embeddings tokens: remove it to train on those, or use yarn")
    if not isinstance(rope_type, str) or rope_type not in types:
        raise UserError(f"config.json: rope scaling {values!r:.200} is not supported; rope_type may be "
                        f"{', '.join(types)}")
    check(values, rope_type, head_dim)
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequency = float(values["rope_theta"]) ** -exponent
    if rope_type == "linear":
        frequency = frequency / values["factor"]
    elif rope_type == "proportional":  # the pairs of low frequency are not rotated
        n_rotated = int(values["partial_rotary_factor"] * head_dim // 2)
        frequency[n_rotated:] = 0
        frequency = frequency / (values.get("factor") or 1)
    elif rope_type == "llama3":  # divides low frequencies only, with a smooth transition
        low, high = values["low_freq_factor"], values["high_freq_factor"]
        turns = values[ORIGINAL] * frequency / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * kept + frequency / values["factor"] * (1 - kept)
    elif rope_type == "yarn":
        return yarn(values, frequency, head_dim)
    elif rope_type == "longrope":
        short, long = (tuple((frequency / torch.tensor(values[key], device="cpu")).tolist()) for key in LISTS)
        return Rope(short, longrope_factor(values), long, int(values[ORIGINAL]))
    limit = values["max_position_embeddings"] if rope_type == "dynamic" else None
    return Rope(tuple(frequency.tolist()), original_length=limit)


def check(values, rope_type, head_dim):
    """Raise UserError for missing and for malformed values."""
    missing = [key for key in REQUIRED[rope_type] if key not in values]
    if missing:
        raise UserError(f"config.json: rope scaling {values!r:.200} lacks {', '.join(missing)}")
    may_be_null = {*OPTIONAL.get(rope_type, ())} | ({"factor"} if rope_type == "yarn" else set())
    for key in ("rope_theta", *REQUIRED[rope_type], *OPTIONAL.get(rope_type, ())):
        value, lowest = values.get(key), LOWEST.get(key, 0)
        if key in LISTS:
            check_list(key, value, -(-head_dim // 2))
        elif not (value is None and key in may_be_null) and not is_number(value, lowest):
            raise UserError(f"config.json: {key} is {value!r:.60}; it must be a number of at least {lowest}")
    if rope_type == "yarn" and values.get("truncate", True) not in (True, False):
        raise UserError(f"config.json: truncate is {values['truncate']!r:.60}; it must be true or false")


def check_list(key, value, pairs):
    """Raise UserError if a value is not a list of one factor for each pair of rotated values."""
    if not isinstance(value, list) or len(value) != pairs or not all(is_number(x, 1e-3) for x in value):
        length = f", it has {len(value)}" if isinstance(value, list) else ""
        raise UserError(f"config.json: {key} is {value!r:.100}; it must be a list of {pairs} numbers above "
                        f"0, one for every two values of a head that are rotated{length}")


def is_number(value, lowest):
    return type(value) in (int, float) and lowest <= value < 1e30


def yarn(values, frequency, head_dim):
    """The Rope of YaRN. High frequencies stay as they are, low ones are divided by the factor.

    In between, the share of the divided ones rises linearly with the index of the pair.
    """
    original, base = values[ORIGINAL], max(values["rope_theta"], 1 + 1e-9)
    factor = values["factor"] or values["max_position_embeddings"] / original

    def pair_of(turns):
        """The pair that makes this many turns within the original length, not rounded."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = (pair_of(max(values.get(key) or default, 1e-6))
                   for key, default in (("beta_fast", 32), ("beta_slow", 1)))
    if values.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = float(max(first, 0)), float(min(last, head_dim - 1))
    if first == last:
        last += 0.001
    divided = ((torch.arange(len(frequency), device="cpu") - first) / (last - first)).clamp(0, 1)
    frequency = frequency / factor * divided + frequency * (1 - divided)
    attention_factor = values.get("attention_factor")
    if attention_factor is None:
        above, below = values.get("mscale"), values.get("mscale_all_dim")
        above, below = (above, below) if above and below else (1, 0)
        growth = 0.1 * math.log(max(factor, 1))
        attention_factor = (1 + above * growth) / (1 + below * growth)
    return Rope(tuple(frequency.tolist()), attention_factor)


def longrope_factor(values):
    """LongRoPE's attention factor."""
    factor, attention_factor = values.get("factor"), values.get("attention_factor")
    factor = values["max_position_embeddings"] / values[ORIGINAL] if factor is None else factor
    if attention_factor is None:
        return math.sqrt(1 + math.log(max(factor, 1)) / math.log(values[ORIGINAL]))
    return attention_factor
