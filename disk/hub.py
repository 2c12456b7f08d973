"""Push a model or adapter directory to a repository of the Hugging Face hub.

huggingface_hub is imported where it is used: it is slow, and most runs push nothing.
"""

import contextlib
import os
import shlex
import sys

from disk import checkpoint, files, pretrained
from settings.errors import UserError, printable

# Weights that an earlier push may have left in a repository. Programs read model.safetensors before an index,
# and take a directory with adapter_config.json for an adapter, so they must not stay beside other weights.
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", pretrained.INDEX_FILE,
           pretrained.ADAPTER_FILE, pretrained.ADAPTER_CONFIG)
TOKENS = "https://huggingface.co/settings/tokens"


def errors():
    """The exceptions of a failed push: of huggingface_hub, of its HTTP package, and of the system."""
    from huggingface_hub.errors import HfHubHTTPError

    # RuntimeError: one upload of several failed. ValueError: the hub refuses the card, or answers nonsense
    return (OSError, RuntimeError, ValueError, *HfHubHTTPError.__bases__)


def check(name, flag="--push_to_hub"):
    """Check, before a run, what a push after it needs: a repository's name and a token that may write.

    Rank 0 asks the hub, the others check the name only.

    Raises UserError for a malformed name, offline mode, a token that is missing, invalid or can only read,
    and for the name of somebody else. What a fine-grained token may do is not known until the push.
    """
    check_name(name, flag)
    if int(os.environ.get("RANK", "0")):
        return
    files.check_hub_endpoint()
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{flag} {name}: the environment sets HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE), so "
                        "nothing can be pushed; unset it, or push later with tools/push.py")
    login = shlex.quote(os.path.join(os.path.dirname(sys.executable), "hf"))
    remedy = f"run `{login} auth login`, or set HF_TOKEN, with a token that may write: {TOKENS}"
    try:
        user = HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise UserError(f"{flag} {name}: there is no token of the hub; {remedy}") from error
    except errors() as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status in (401, 403):
            raise UserError(f"{flag} {name}: the hub does not accept the token; {remedy}") from error
        raise UserError(f"{flag} {name}: the hub did not answer who the token belongs to: {reason(error)}; "
                        "try again, or push later with tools/push.py") from error
    role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise UserError(f"{flag} {name}: the token can only read; {remedy}")
    names = [user.get("name", ""), *(org.get("name", "") for org in user.get("orgs") or ())]
    owner = name.partition("/")[0]
    if role == "write" and owner.lower() not in map(str.lower, names):
        raise UserError(f"{flag} {name}: the token belongs to {names[0]}, who is not {owner} and no member "
                        f"of it; use {names[0]}/{name.partition('/')[2]}, or another token")


def check_name(name, flag):
    """Raise UserError unless a text is the name of a repository, ORG/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    last = os.path.basename(name.rstrip("/"))
    try:
        validate_repo_id(last)
    except HFValidationError:
        last = ""
    last = "NAME" if last.lower() in ("", "true") else last  # true: as in other trainers
    example = f"{flag} ORG/{last}" if flag.startswith("--") else f"ORG/{last}"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{flag} {name:.200}: not a name of the hub: {error!s:.200} "
                        f"Type {example}") from error
    if name.count("/") != 1:
        raise UserError(f"{flag} {name}: the name of a user or an organisation is missing; type {example}")


def fetch_card(name):
    """Let the hub's cache have the README.md of a model, which says its license; if it can't, do nothing."""
    from huggingface_hub import HfApi

    with contextlib.suppress(errors()):
        HfApi().hf_hub_download(name, "README.md")


def pushed_files(directory):
    """{name in the repository: path} of the files of a directory, without training state and hidden files.

    Raises UserError for a link out of the directory, and if its weights are incomplete.
    """
    pretrained.stored_entries(directory)
    found = {}
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders
                      if not name.startswith(".") and name != checkpoint.STATE_DIRECTORY]
        for name in names:
            path = os.path.join(folder, name)
            if name.startswith(".") or name.endswith(".tmp"):
                continue
            files.check_link(path)
            if not os.path.isfile(path):
                raise UserError(f"{path} is not a file; remove it")
            found[os.path.relpath(path, directory)] = path
    return dict(sorted(found.items()))


def push(directory, name, card, changed, is_replaceable, private=False):
    """Push a directory to the repository `name`, which is created if it does not exist; return its address.

    card            {name in the repository: bytes} of README.md and its picture
    changed         {name in the repository: bytes} of other files that differ from those of the directory
    is_replaceable  a function: the text of a README.md -> whether a card may take its place. If not, the
                    README.md of the repository stays, and the card is not pushed
    private         whether a new repository is private; an existing one stays as it is

    Weight files are uploaded one by one, and then one commit makes all files visible at once: the repository
    never has a part of a model. A push that was interrupted is started again: a file that the hub has is not
    sent again, and of the one that was cut only what is missing, if huggingface_hub uses hf_xet. The same
    commit removes weights of an earlier push that this one does not have.

    Raises the errors() of the requests.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import filter_repo_objects

    api, sources = HfApi(), {**pushed_files(directory), **changed, **card}
    address = str(api.create_repo(name, private=private or None, exist_ok=True))
    there = api.list_repo_files(name)
    if "README.md" in there:
        with open(api.hf_hub_download(name, "README.md"), "rb") as f:
            before = f.read()
        if before != card["README.md"] and not is_replaceable(before.decode(errors="replace")):
            print(f"card     the README.md of {name} is not one that this program wrote, so it stays; delete "
                  "it there to get the card")
            sources = {path: source for path, source in sources.items() if path not in card}
    additions = [CommitOperationAdd(path, source) for path, source in sources.items()]
    weights = [operation for operation in additions if operation.path_in_repo.endswith(".safetensors")]
    for i, operation in enumerate(weights, 1):
        print(f"push     file {i} of {len(weights)}: {printable(operation.path_in_repo)}", flush=True)
        api.preupload_lfs_files(name, [operation], free_memory=False)
    stale = [path for path in filter_repo_objects(there, allow_patterns=list(WEIGHTS)) if path not in sources]
    api.create_commit(name, [*additions, *map(CommitOperationDelete, stale)],
                      commit_message=f"Push {os.path.basename(os.path.abspath(directory))}")
    return address


def reason(error):
    """The last line of an error's message, or its kind."""
    error = error.__cause__ or error  # one upload of several: what it failed of
    lines = str(error).strip().splitlines()
    return f"{lines[-1]:.300}" if lines else type(error).__name__
