"""Talk to a model: python chat.py outputs/checkpoints/latest [--prompt "..."]

The model is a directory (a step directory too), an adapter directory, a hub id or `tiny`. Without --prompt it
is a conversation on the terminal (/help lists its commands), or one answer to the text on stdin.
An answer ends with the token that ended a turn in training.
"""

if __name__ == "__main__":
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
    from settings import venv

    venv.enter()  # where torch is missing, continue in the .venv that train.sh made

import sys
from dataclasses import dataclass

import jinja2
import numpy as np
import torch

import sft
from disk import checkpoint, pretrained
from disk.run import ModelPaths
from model import generate, sample_function
from ranks import processes
from screen import terminal
from settings import errors
from settings.errors import UserError
from settings.parser import check, parse, setting
from text.template import ChatTokenizer


@dataclass
class Config:
    """Talk to a model: python chat.py DIR [flags]"""

    model: str = setting("./outputs/checkpoints/latest", "model or adapter directory, hub id, or tiny",
                         group="chat")
    base: str | None = setting(None, "base model of an adapter; none: as adapter_config.json names it")
    prompt: str | None = setting(None, "answer this prompt, or else the text piped into stdin, then exit")
    system: str | None = setting(None, "system message")
    template_kwargs: str | None = setting(None, "variables of the template; none: as in the model's training")
    temperature: float = setting(0.0, "0: the most likely token; 1: sample from the model's distribution",
                                 low=0, high=100)
    top_p: float = setting(1.0, "sample from the most likely tokens with this total probability",
                           low=1e-6, high=1, needs="temperature")
    max_new_tokens: int = setting(1024, "longest answer, in tokens", low=1)
    seed: int = setting(42, "seed of the sampling", low=0)

    def __post_init__(self):
        check(self)


def load(name, base=None, template_kwargs=None):
    """(model, tokenizer, ids that end an answer) of a model directory, or of an adapter and its base model.

    A prompt is rendered as in training: a step directory has the template, and what the run set for it.

    Raises UserError if `base` is given for a full model, or if an adapter has no base model.
    """
    paths = ModelPaths.of_model(name, base)
    of_run = checkpoint.state_of(paths.adapter or paths.model).get("template_kwargs")
    tokenizer = ChatTokenizer(paths.tokenizer, template_kwargs=template_kwargs or of_run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = sft.Config(dtype="fp32", use_lora=paths.adapter is not None, gradient_checkpointing=False)
    model, _ = sft.build(cfg, paths, processes.single_process(device), trains=False)
    generation = pretrained.generation_config(paths.model, paths.config_json, tokenizer.stop_token_id)
    return model.eval(), tokenizer, set(np.atleast_1d(generation["eos_token_id"]).tolist())


def answer(model, tokenizer, eos_ids, messages, cfg):
    """Yield the answer's text piece by piece. No piece ends inside a multi-byte character."""
    try:
        prompt = tokenizer.render(messages, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        raise UserError(f"the model's chat template refuses this conversation: {error}") from error
    tokens = tokenizer.encode(prompt)
    # below 0.001 logits / temperature may overflow, and the most likely token has the probability 1
    sample = sample_function(cfg.temperature if cfg.temperature >= 1e-3 else 0.0, cfg.top_p)
    ids, shown = [], ""
    for token in generate(model, tokens, cfg.max_new_tokens, eos_ids, sample):
        ids.append(token)
        text = tokenizer.tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # an incomplete character decodes to this
            yield text[len(shown) :]
            shown = text
    if ids[-1] not in eos_ids:
        print(f"\n(cut at {len(ids):,} tokens by --max_new_tokens)", end="", file=sys.stderr, flush=True)


def main():
    cfg, _ = parse(Config, sys.argv[1:], positional=["model"])
    torch.manual_seed(cfg.seed)
    model, tokenizer, eos_ids = load(cfg.model, cfg.base, cfg.template_kwargs)
    start = [{"role": "system", "content": cfg.system}] if cfg.system else []
    messages = list(start)
    is_interactive = cfg.prompt is None and sys.stdin.isatty()
    if is_interactive:
        terminal.greet(cfg.model)
    while True:
        line = terminal.checked(lambda: cfg.prompt) if cfg.prompt else terminal.read_prompt(is_interactive)
        if is_interactive and line == "/quit":
            return
        if is_interactive and line == "/reset":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": line})
        reply = ""
        try:
            for piece in answer(model, tokenizer, eos_ids, messages, cfg):
                print(terminal.shown(piece), end="", flush=True)
                reply += piece
        except KeyboardInterrupt:  # ends the answer, not the conversation
            if not is_interactive:
                raise
        print()
        if not is_interactive:
            return
        messages.append({"role": "assistant", "content": reply})


if __name__ == "__main__":
    errors.run(main)
