"""The class of a model: model.CausalLM, or that of families/NAME.py for a family with other blocks."""

import importlib

import model

MODULES = {"qwen3_5_text": "qwen3_5"}  # model_type -> module of families/ whose CausalLM it is


def causal_lm(config):
    """The class for a families.config.ModelConfig. Other families' files are not imported."""
    module = MODULES.get(config.model_type)
    return importlib.import_module(f"families.{module}").CausalLM if module else model.CausalLM
