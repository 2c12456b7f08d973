"""Ministral 3: the plain decoder whose queries grow with the logarithm of their position.

As in Llama 4: beyond the length that the model was first trained on, attention over more and more tokens
would become flatter. Where a document is no longer than that, nothing changes. Source: Ministral 3 (arXiv
2601.08584), transformers.
"""

import torch

import model
from families.config import FAMILIES, rope_values
from families.rope import ORIGINAL
from settings.errors import UserError


class Attention(model.Attention):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.beta, self.original_length = query_scaling(config)

    def project(self, x, documents):
        q, k, v = super().project(x, documents)
        growth = torch.log1p(torch.floor(documents.positions / self.original_length))
        return q * (1 + self.beta * growth)[:, None, None].to(q.dtype), k, v


def query_scaling(config):
    """(beta, length) of a ModelConfig: queries are multiplied by 1 + beta log(1 + floor(position / length)).

    Raises UserError if config.json lacks one of them, or has another kind of value.
    """
    rotary = rope_values(config.values, "full_attention", FAMILIES[config.model_type])
    found = [rotary.get(key) for key in ("llama_4_scaling_beta", ORIGINAL)]
    if any(type(value) not in (int, float) or not 0 <= value < 1e30 for value in found) or not found[1]:
        raise UserError(f"config.json: rope_parameters {rotary!r:.300} must have numbers "
                        f"llama_4_scaling_beta and {ORIGINAL}, by which the queries are scaled")
    return found


class Block(model.Block):
    attention_class = Attention


class Decoder(model.Decoder):
    block_class = Block


class CausalLM(model.CausalLM):
    decoder_class = Decoder
