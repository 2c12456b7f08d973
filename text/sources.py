"""Which files --train_data and --val_data name: paths, directories and hub datasets, with their weights."""

import os
import re

from disk.files import check_hub_endpoint
from settings.errors import UserError
from settings.venv import PROJECT
from text.containers import ENDINGS, read_rows

EXAMPLE = "./data/example_sft.json"


def data_files(spec):
    """The files that --train_data or --val_data names, in order: [(weight or None, [files]), ...].

    spec  sources separated by commas: each a file, a directory of files, or the id of a hub dataset. Either
          all or none end in :WEIGHT, the fraction of an epoch's conversations that come from this source.
          Weights are relative, so their sum may be any number.

    Raises UserError if a source does not exist or has no data files, or if only some have a weight.
    """
    groups = []
    for source in map(str.strip, spec.split(",")):
        match = None if os.path.exists(source) else re.fullmatch(r"(.+):(\d*\.?\d+)", source)
        path, weight = (match[1], float(match[2])) if match else (source, None)
        if path == EXAMPLE and not os.path.exists(path):  # the default of --train_data, in another directory
            path = os.path.join(PROJECT, path)
        if not os.path.exists(path) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
            path = hub_dataset(path)
        files = [path]
        if os.path.isdir(path):
            files = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names
                           if name.endswith(ENDINGS))
            # Splits of a hub dataset are files or folders: use only those with "train" in the path, if any.
            files = [f for f in files if "train" in os.path.relpath(f, path)] or files
            if not files:
                raise UserError(f"{path}: no data file in this directory ({', '.join(ENDINGS)})")
        elif not os.path.exists(path):
            raise UserError(f"{path}: no such data file; pass a JSON, JSON Lines or parquet file, a "
                            "directory, the id of a hub dataset, or several of these separated by commas")
        groups.append((weight, files))
    weights = [weight for weight, _ in groups]
    some_lack_weights = None in weights and any(weights)
    if some_lack_weights or 0 in weights:
        raise UserError(f"{spec}: either every source needs a weight above 0 (a.json:0.7,b.json:0.3), or "
                        "none may have one")
    return groups


def hub_dataset(name):
    """Download the files of a hub dataset, or find them in the hub's cache. Returns their directory."""
    check_hub_endpoint()
    from huggingface_hub import snapshot_download  # imported here: most runs read local files
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*" + ending for ending in ENDINGS]
        return snapshot_download(name, repo_type="dataset", allow_patterns=patterns)
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise UserError(f"{name} is neither a local file nor reachable as a hub dataset: "
                        f"{str(error).strip().splitlines()[-1]}") from error


def read_files(spec):
    """Yield ("file[row]", row) for every row of the files that `spec` names, see data_files.

    The first bytes decide the container: a JSON array, JSON Lines, gzip of either, or parquet (with pyarrow).
    Raises UserError if a file does not exist, or with the line and column where it is not JSON.
    """
    for _, files in data_files(spec):
        for file in files:
            for i, row in enumerate(read_rows(file)):
                yield f"{file}[{i}]", row
