"""Push a model or adapter directory with its card to a hub: at the end of a run, or by tools/push.py."""

import os
import shlex
import sys

from disk import checkpoint, files, hub, peft, pretrained
from screen import card
from settings import venv
from settings.errors import UserError, printable


def publish(directory, name, defaults, private=False, base=None):
    """Push a directory to the repository `name` of the hub; print where it is.

    defaults  {name: default} of sft.Config, for the card
    private   whether a new repository is private
    base      hub id of the base model; none: as the run or the adapter names it

    Raises UserError for a directory that is no complete model or adapter, and hub.errors().
    """
    check_directory(directory)
    changed, named = {}, base
    if pretrained.is_adapter(directory):
        config = peft.read_config(directory)
        named = base or config.get("base_model_name_or_path")
        if base:
            changed[pretrained.ADAPTER_CONFIG] = files.encoded({**config, "base_model_name_or_path": base})
        elif not card.is_hub_id(named):
            print(printable(f"warning: {pretrained.ADAPTER_CONFIG} names the base model by a path of this "
                            f"machine, {named}: nobody else can load the adapter; push it again with "
                            f"{venv.command('tools/push.py')} and --base ORG/NAME"), file=sys.stderr)
    contents = card.files_of([directory], defaults, title=name.partition("/")[2], base=base, online=True)
    if not card.is_ours(contents[card.README].decode(errors="replace")):
        print(f"card     {os.path.join(directory, card.README)} is pushed as it is")
    address = hub.push(directory, name, contents, changed, card.is_ours, private)
    print(printable(f"pushed   {directory} to {address}"))


def check_directory(directory):
    """Raise UserError unless a directory has a model or an adapter."""
    names = ("config.json", pretrained.ADAPTER_CONFIG)
    if any(os.path.isfile(os.path.join(directory, name)) for name in names):
        return
    if not os.path.isdir(directory):
        raise UserError(f"{directory}: no such directory; use a step directory such as "
                        "outputs/checkpoints/latest")
    latest = os.path.join(directory, "checkpoints", "latest")
    advice = f"name one of its steps, such as {latest}" if os.path.exists(latest) else (
        "use a step directory such as outputs/checkpoints/latest")
    raise UserError(f"{directory} is no model directory: it has no config.json and no {names[1]}; {advice}")


def at_end(cfg, ranks):
    """--push_to_hub: push what a run made, its best step with --keep_best, otherwise the last one.

    A push that fails does not cost the run, which is saved: a line says what to type. Only rank 0 does
    anything.

    Returns the exit code of the process: 1 if the push has failed, so that a script notices, 130 for Ctrl-C.
    """
    if not cfg.push_to_hub or cfg.selfcheck or ranks.rank:
        return 0
    root = os.path.join(cfg.output_dir, "checkpoints")
    names = ["best"] * bool(cfg.keep_best) + ["latest"]
    links = filter(os.path.exists, (os.path.join(root, name) for name in names))
    # without a link, the run had no step left and was resumed from another directory
    link = next(links, None) or checkpoint.resume_directory(cfg.resume_from, root)
    try:
        publish(files.follow(link), cfg.push_to_hub, card.defaults_of(type(cfg)))
        return 0
    except KeyboardInterrupt:
        why, code = "interrupted", 130
    except hub.errors() as error:
        why, code = hub.reason(error), 1
    again = f"{venv.command('tools/push.py')} {shlex.quote(link)} {cfg.push_to_hub}"
    print(printable(f"not pushed: {why}; the run is complete and saved; to push it, type {again}"),
          file=sys.stderr)
    return code
