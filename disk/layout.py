"""The text model inside a model directory: its part of config.json, and its tensors' names in the files.

A multimodal model (Qwen3.5, Gemma 3 and 4, Ministral 3) has the text model's values in `text_config` of its
config.json, and beside the text model's tensors those of a vision tower, a projector, ... The text model's
names then begin with another prefix than `model.`, and not with the same one in all programs and versions.
"""

import re
from collections import defaultdict
from dataclasses import dataclass

from settings.errors import UserError

HEAD = "lm_head.weight"
# Tensors that only a text model has under one prefix; a vision tower has layers, but no embed_tokens.
ANCHOR = re.compile(r"((?:.*?\.)?)(embed_tokens\.weight|norm\.weight|layers\.0\.).*")
PARTS = ("embed_tokens", "layers", "norm")  # of a text model with a prefix that other models have too
# Layers that predict further tokens, for faster inference. Neither transformers nor this trainer reads them.
MTP = re.compile(r"(model\.|language_model\.)*mtp[._]")
# What PEFT's names begin with instead of `model.`: in a multimodal model of transformers 5, and of older ones
FULL_PREFIX = "model.language_model."
ADAPTER_PREFIXES = ("model.language_model.model.", FULL_PREFIX, "language_model.model.")
ADAPTER_HEADS = ("model.language_model.lm_head.", "language_model.lm_head.")


def is_multimodal(config_json):
    """Whether a config.json is of a multimodal model."""
    return isinstance(config_json, dict) and isinstance(config_json.get("text_config"), dict)


def text_part(config_json):
    """The object in a config.json that has the text model's values."""
    return config_json["text_config"] if is_multimodal(config_json) else config_json


def with_values(config_json, **values):
    """A copy of a config.json with values of the text model changed, at each place that has them.

    A value that is nowhere is added to the text model's.
    """
    if not is_multimodal(config_json):
        return {**config_json, **values}
    outside = {key: value for key, value in values.items() if key in config_json}
    return {**config_json, **outside, "text_config": {**config_json["text_config"], **values}}


def with_dtype(config_json, dtype):
    """A copy of a config.json that says `dtype`, a torch.dtype, at each place that says one."""
    name = str(dtype).removeprefix("torch.")

    def of(part):
        return {**part, **{key: name for key in ("torch_dtype", "dtype") if key in part}}

    config = of(config_json)
    return {**config, "text_config": of(config["text_config"])} if is_multimodal(config) else config


@dataclass(frozen=True)
class TextNames:
    """How the files of a model directory name the text model's tensors.

    prefix  what stands there in place of `model.`
    head    the name of lm_head.weight
    """

    prefix: str
    head: str

    @classmethod
    def find(cls, names, multimodal, directory):
        """The TextNames of a directory, from the names of its tensors.

        Raises UserError if two prefixes, or two heads, could be the text model's.
        """
        found = defaultdict(set)
        for name in names:
            match = None if MTP.match(name) else ANCHOR.fullmatch(name)
            if match:
                found[match[1]].add(match[2])
        most = max([1, *map(len, found.values())])
        best = sorted(prefix for prefix, anchors in found.items() if len(anchors) == most)
        if most == 1 or (not multimodal and "model." in best):
            best = [FULL_PREFIX if multimodal else "model."]
        if len(best) > 1:
            raise UserError(f"{directory} has several text models, under {', '.join(best[:4])}: which one is "
                            "to be trained is not known; keep the tensors of one")
        prefix = best[0]
        heads = [name for name in names
                 if name.endswith(HEAD) and prefix.startswith(name.removesuffix(HEAD))]
        if len(heads) > 1:
            raise UserError(f"{directory} has several heads: {', '.join(sorted(heads)[:4])}; keep one")
        usual = prefix.removesuffix("model.") if prefix.endswith("language_model.model.") else ""
        return cls(prefix, heads[0] if heads else usual + HEAD)

    def in_files(self, name):
        """The name in the files of a parameter of the model."""
        return self.head if name == HEAD else self.prefix + name.removeprefix("model.")

    def of_model(self, name):
        """The parameter's name of a tensor in the files; None if it is not the text model's."""
        if name == self.head:
            return HEAD
        rest = name.removeprefix(self.prefix)
        is_other = not name.startswith(self.prefix) or MTP.match(name)
        if is_other or (self.prefix in ("", "model.") and rest.partition(".")[0] not in PARTS):
            return None
        return "model." + rest


def name_in_adapter(name, multimodal):
    """PEFT's name, without its own prefix, of a tensor of an adapter: that of the model that users load.

    For a multimodal model this is the whole one (AutoModelForImageTextToText, vLLM). AutoModelForCausalLM
    loads the same, except for Qwen3.5: there it is a text model with other names, which PEFT refuses.
    """
    return FULL_PREFIX + name.removeprefix("model.") if multimodal and name.startswith("model.") else name


def name_of_adapter(name):
    """The name in the model of an adapter's tensor: the reverse of name_in_adapter, for older names too."""
    for prefix in ADAPTER_PREFIXES:
        if name.startswith(prefix + "layers.") or name.startswith(prefix + "embed_tokens."):
            return "model." + name.removeprefix(prefix)
    for head in ADAPTER_HEADS:
        if name.startswith(head):
            return "lm_head." + name.removeprefix(head)
    return name
