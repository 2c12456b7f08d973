"""The class of a model: model.CausalLM, or that of families/NAME.py for a family with other blocks."""

import importlib

import model

# model_type -> module of families/ whose CausalLM it is
MODULES = {
    "gemma2": "gemma",
    "gemma3_text": "gemma",
    "gemma4_text": "gemma4",
    "gemma4_unified_text": "gemma4",
    "granitemoehybrid": "granite",
    "ministral3": "ministral3",
    "olmo2": "olmo",
    "olmo3": "olmo",
    "phi3": "phi3",
    "qwen3_5_text": "qwen3_5",
}


def causal_lm(config):
    """The class for a families.config.ModelConfig. Other families' files are not imported."""
    module = MODULES.get(config.model_type)
    return importlib.import_module(f"families.{module}").CausalLM if module else model.CausalLM
