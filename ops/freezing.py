"""--freeze: parameters that stay as they are in full fine-tuning; and how settings name parts of a model."""

import re

import torch

from settings.errors import UserError


def read_names(text, flag):
    """(entries, pattern) of a setting that names parts of a model, with commas or a regular expression.

    entries  the names; of a regular expression only itself
    pattern  the compiled regular expression; None for names

    Raises UserError if it is neither.
    """
    entries = [entry.strip() for entry in text.split(",")]
    if all(re.fullmatch(r"[\w.]+", entry) for entry in entries):
        return entries, None
    try:
        return [text], re.compile(text)
    except re.error as error:
        raise UserError(f"{flag} {text}: not a regular expression: {error}") from error


def freeze(model, names, bf16=False):
    """Freeze parameters of a model, in place: they get no gradient and no optimizer state.

    names  names and regular expressions, with commas; a comma in brackets is part of an expression. A name
           freezes each part of the model that is called so, with all that is in it: embed_tokens, layers.0,
           mlp, self_attn.q_proj. An expression freezes the parts whose full names it matches:
           model.layers.[0-7]. Full names may be those in the files of a multimodal model
    bf16   store them in bf16, in which the run computes. Checkpoints copy them from the model's files

    If head and embedding are one tensor, either name freezes both.

    Raises UserError for an entry that matches nothing, and if nothing is left to train.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for entry in re.split(r",(?![^({\[]*[)}\]])", names):
        (entry,), pattern = read_names(entry.strip(), "--freeze")
        matched = [name for name in parameters if is_part(name, entry, pattern)]
        if not matched:
            raise UserError(f"--freeze {names}: {entry} matches nothing in the text model; use names and "
                            "regular expressions with commas, such as embed_tokens, layers.0 or "
                            "mlp.down_proj; an expression matches full names, such as "
                            f"{next(iter(parameters)).removesuffix('.weight')}. "
                            "What is not the text model stays as it is anyway")
        for name in matched:
            p = parameters[name].requires_grad_(False)
            if bf16:
                p.data = p.data.to(torch.bfloat16)
    if not any(p.requires_grad for p in parameters.values()):
        tied = " (head and embedding are one tensor)" if model.config.tie_word_embeddings else ""
        raise UserError(f"--freeze {names} leaves nothing to train{tied}; freeze less")


def is_part(name, entry, pattern):
    """Whether a parameter is, or is inside, a part of the model that is named by an entry of read_names."""
    spellings = [name]
    if name.startswith("model."):  # as in the files of multimodal models
        rest = name.removeprefix("model.")
        spellings += [f"model.language_model.{rest}", f"language_model.model.{rest}"]
    elif name.startswith("lm_head."):
        spellings.append(f"language_model.{name}")
    if pattern is None:
        return any(f".{entry}." in f".{spelling}." for spelling in spellings)
    return any(pattern.fullmatch(".".join(parts[:n]))
               for parts in (spelling.split(".") for spelling in spellings) for n in range(1, len(parts) + 1))
