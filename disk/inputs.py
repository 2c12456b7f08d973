"""Check the files and directories that settings name, in the first second of a run.

Before the processes join and before a model is downloaded, which takes minutes to hours. Each error names the
setting that was typed.
"""

import errno
import os
import re
import tempfile

from disk import checkpoint, files, foreign, hub, peft, pretrained
from families.config import ModelConfig
from settings import parser
from settings.errors import UserError
from text import containers, formats, sources


def checked(cfg, origins):
    """Check all paths of an sft.Config.

    origins  of the settings, from settings.parser.parse: the error names the file that a path is written in

    Raises UserError for what does not exist or can't be used.
    """
    try:
        check(cfg)
    except UserError as error:
        name = str(error).partition(" ")[0].removeprefix("--")
        if name in origins and parser.files_read({name: origins[name]}):
            raise UserError(f"{error} ({name} is set in {origins[name]})") from error
        raise


def check(cfg):
    """Check all paths of an sft.Config."""
    resumed = None
    if cfg.resume_from:
        resumed = checkpoint.resume_directory(cfg.resume_from, os.path.join(cfg.output_dir, "checkpoints"))
    check_data("--train_data", cfg.train_data)
    if cfg.val_data:
        check_data("--val_data", cfg.val_data, "validation")
        check_sets(cfg)
    elif isinstance(cfg.keep_best, str):
        raise UserError(f"--keep_best {cfg.keep_best}: --val_split makes one set, without a name; use "
                        "--keep_best alone")
    if cfg.sample_prompts:
        check_prompts(cfg.sample_prompts, (cfg.prompt_key, cfg.response_key, cfg.messages_key))
    if cfg.tokenizer:
        check_tokenizer(cfg.tokenizer)
    if cfg.resume_adapter:
        check_adapter(cfg.resume_adapter)
    template = cfg.chat_template or ""
    if is_template_file(template) and not os.path.isfile(template):
        raise UserError(f"--chat_template {template}: no such file; use a file with a Jinja template")
    if not resumed or cfg.use_lora:  # a resumed full model is read from its checkpoint
        check_model(cfg)
    check_output(cfg.output_dir)
    if cfg.push_to_hub:
        hub.check(cfg.push_to_hub)


def is_template_file(name):
    """Whether a --chat_template is a file, and not the name of one of the model's templates."""
    return os.sep in name or name.endswith((".jinja", ".txt"))


def is_hub_id(name):
    return re.fullmatch(pretrained.HUB_ID, name) is not None


def check_data(flag, spec, split=None):
    """Raise UserError if a source of --train_data or --val_data does not exist.

    split  as in sources.data_files

    The id of a hub dataset is not checked: to see what it has, it would have to be downloaded.
    """
    try:
        for wanted in sources.parse(spec):
            if os.path.exists(wanted.path):
                sources.resolve(wanted, split)
    except UserError as error:
        raise UserError(f"{flag} {error}") from error


def check_sets(cfg):
    """Raise UserError if only some sources of --val_data have a name, or --keep_best names none of them."""
    try:
        names = sources.set_names(cfg.val_data)
    except UserError as error:
        raise UserError(f"--val_data {error}") from error
    if isinstance(cfg.keep_best, str) and cfg.keep_best not in names:
        there = f"the sets are {sources.listed(names)}" if names else "its one set has no name: write " \
            f"--val_data {cfg.keep_best}=FILE,NAME=FILE, or --keep_best alone"
        raise UserError(f"--keep_best {cfg.keep_best}: no validation set of --val_data is called so; {there}")


def check_prompts(path, keys):
    """Raise UserError if the prompts of --sample_prompts can't be read. They are few, so all are read."""
    if not os.path.exists(path) and is_hub_id(path):
        return
    try:
        if path.endswith(".txt"):
            if os.path.exists(path) and not os.path.isfile(path):  # to open a pipe would block
                raise UserError(f"{path} is not a file; write the prompts to a file")
            with containers.open_text(path) as f:
                f.read()
        else:
            for where, row in sources.read_files(path):
                formats.to_messages(row, where, keys)
    except OSError as error:
        raise UserError(f"--sample_prompts {path}: {error.strerror}; use a .txt file with one prompt a line, "
                        "or a data file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--sample_prompts {path}: not UTF-8 text: {error}; convert it, for example with "
                        "iconv -f gbk -t utf-8") from error
    except UserError as error:
        raise UserError(f"--sample_prompts {error}") from error


def check_tokenizer(name):
    if is_hub_id(name) and not os.path.exists(name):
        return
    try:
        foreign.check_tokenizer(pretrained.model_directory(name, "--tokenizer"))
    except UserError as error:
        message = str(error)
        if not message.startswith("--tokenizer "):
            message = f"--tokenizer {message}"
        raise UserError(message) from error


def check_adapter(directory):
    if not os.path.isdir(directory):
        raise UserError(f"--resume_adapter {directory}: no such directory; use an adapter directory such as "
                        "outputs/lora/checkpoints/latest")
    try:
        peft.read_config(directory)
    except UserError as error:
        raise UserError(f"--resume_adapter {error}") from error


def check_model(cfg):
    """Check the files of a local --model, all but its weights. A hub's is checked when it is downloaded."""
    if is_hub_id(cfg.model) and not os.path.exists(cfg.model):
        return
    directory = pretrained.model_directory(cfg.model)
    foreign.check_model(directory)
    try:
        config = ModelConfig.from_dict(files.read_json(os.path.join(directory, "config.json")))
        config.check_tp(cfg.tp)
        config.check_sp(cfg.sp, int(os.environ.get("WORLD_SIZE", "1")) // (cfg.tp * cfg.replicas), cfg.tp)
    except UserError as error:
        raise UserError(f"--model {cfg.model}: {error}") from error
    adapter = cfg.resume_from or cfg.resume_adapter  # it mostly has the tokenizer
    if not cfg.tokenizer and not adapter:
        foreign.check_tokenizer(directory)


def check_output(directory):
    """Create --output_dir. Raises UserError if that fails, or nothing can be written to it."""
    try:
        os.makedirs(directory, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        remedy = "change its permissions, or use" if error.errno in (errno.EACCES, errno.EPERM) else "use"
        raise UserError(f"--output_dir {directory}: {error.strerror}; {remedy} another "
                        "--output_dir") from error
