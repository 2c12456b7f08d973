"""Push a step, or another model directory, to a hub: python tools/push.py STEP ORG/NAME"""

if __name__ == "__main__":
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from settings import venv

    venv.enter()  # where torch is missing, continue in the .venv that train.sh made

import sys
from dataclasses import dataclass

import sft
from disk import files, hub
from screen import card, publish
from settings.errors import UserError, run
from settings.parser import check, parse, setting


@dataclass
class Config:
    """Push a step, or another model directory, to a hub: python tools/push.py STEP ORG/NAME [flags]

    Training state stays here. Start it again after an interruption: what the hub has is not sent again.
    """

    directory: str = setting("./outputs/checkpoints/latest", "step, adapter or model directory", group="push")
    name: str | None = setting(None, "repository, ORG/NAME; it is created if it does not exist")
    private: bool = setting(False, "create a private repository; one that exists stays as it is")
    base: str | None = setting(None, "base model's hub id, for the card and adapter_config.json")

    def __post_init__(self):
        check(self)


def push(cfg):
    """Push cfg.directory. Raises UserError for what is wrong here or refused by the hub."""
    if not cfg.name:
        raise UserError("the repository is missing: python tools/push.py STEP ORG/NAME")
    if cfg.base:
        hub.check_name(cfg.base, "--base")
    directory = files.follow(cfg.directory)
    publish.check_directory(directory)
    hub.check(cfg.name, "repository")
    try:
        publish.publish(directory, cfg.name, card.defaults_of(sft.Config), cfg.private, cfg.base)
    except UserError:
        raise
    except hub.errors() as error:
        raise UserError(f"{cfg.name}: {hub.reason(error)}; start it again: what the hub has is not sent "
                        "again") from error


def main():
    cfg, _ = parse(Config, sys.argv[1:], positional=["directory", "name"])
    push(cfg)


if __name__ == "__main__":
    run(main)
