"""Which files --train_data and --val_data name: paths, directories, hub datasets, their rows, weights."""

import fnmatch
import functools
import glob
import itertools
import json
import os
import re
from typing import NamedTuple

import yaml

from disk.files import check_hub_endpoint
from settings.errors import UserError
from settings.venv import PROJECT
from text import llamafactory
from text.containers import ENDINGS, SPLITS, read_rows, split_order

EXAMPLE = "./data/example_sft.json"
GRAMMAR = "[NAME=]SOURCE[:CONFIG or ENTRY][@SPLIT][[ROWS]][:WEIGHT]"
HUB_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
SUFFIX = re.compile(r"\s*(?::(?P<config>[^,:@\[\]#]+))??(?:@(?P<split>[^,:@\[\]]+))?"
                    r"(?:\[(?P<rows>[^,\[\]]*)\])?(?::(?P<weight>\s*\d*\.?\d+(?:[eE][-+]?\d+)?))?\s*(?:,|$)")
KEYS = ("path", "name", "config", "entry", "split", "rows", "weight")  # of a source that is a mapping in YAML
# What others write for a hub dataset -> what to write here
HUB, SPLIT = HUB_NAME.pattern, rf"((?:{'|'.join(SPLITS)})(?:_\w+)?)"
OTHERS = ((rf"(?:https?://[^/]+/|hf://)datasets/({HUB})/viewer/([\w.-]+)/([\w.-]+)", r"\1:\2@\3"),
          (rf"(?:(?:https?://[^/]+/|hf://|HF::|hf::)(?:datasets/)?|datasets/)({HUB})", r"\1"),
          (rf"({HUB}(?::[\w.-]+)?)#(\d+)", r"\1[:\2]"),
          (rf"({HUB})/{SPLIT}", r"\1@\2"), (rf"({HUB})/([\w.-]+)/{SPLIT}", r"\1:\2@\3"))
SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}")  # train-00000-of-00002.parquet
LISTS = "dataset_info.json", "data/dataset_info.json"  # where LLaMA-Factory looks for the names of --dataset
METADATA = re.compile(r"(dataset_infos?|dataset_dict|state|\w+_infos)\.json|cache-.*\.arrow|"
                      r"(readme|license|licence|requirements|notice)\.txt", re.IGNORECASE)
# Files of a run or a model beside the data: they are read only if a directory has nothing else.
LOGS = re.compile(r"(.*[^a-z])?(logs?|config|args|arguments|state|info|results|metrics|stats|metadata|schema|"
                  r"loss)\.(json|jsonl|csv|txt)(\.gz|\.zst)?", re.IGNORECASE)


class Source(NamedTuple):
    """One source of --train_data or --val_data. Its repr is part of the token cache's key."""

    weight: float | None  # relative share of an epoch's conversations
    name: str | None  # NAME= before it
    files: list  # paths
    rows: slice = slice(None)  # of all rows of its files, one file after another
    columns: llamafactory.Entry | None = None  # how LLaMA-Factory's dataset_info.json describes a row
    split: str | None = None  # which rows of a file like {"train": [...], "test": [...]}, see split_order


class Wanted(NamedTuple):
    """What is written for one source, not yet looked up."""

    path: str
    name: str | None = None
    config: str | None = None
    split: str | None = None
    rows: str | None = None
    weight: str | None = None


def data_files(spec, split=None):
    """The Sources that --train_data or --val_data names, in order.

    spec   sources separated by commas, each written as GRAMMAR says: a file, a directory of files, the id of
           a hub dataset, or dataset_info.json of LLaMA-Factory. Or a JSON list of such texts and of objects
           with KEYS, or an object {name: such a text}: so lists and mappings of YAML and Python arrive. A
           path that exists is always taken as it is, the longest one first.
           Either all sources or none have a WEIGHT, the fraction of an epoch's conversations that come from
           this source. Weights are relative, so their sum may be any number.
    split  None: train files are read; "validation" (of --val_data): validation files, or else test files

    Raises UserError if a source does not exist, has no such files, or if it is not clear which are meant.
    """
    sources = [resolve(wanted, split) for wanted in parse(spec)]
    weights = [source.weight for source in sources]
    if any(weight is not None and not 0 < weight < float("inf") for weight in weights) or (
            None in weights and any(weights)):
        raise UserError(f"{spec}: either every source needs a weight above 0 (a.json:0.7,b.json:0.3), or "
                        "none may have one")
    return sources


def set_names(spec):
    """The names of the validation sets that --val_data names, in order; [] if no source has one.

    Sources of the same name are one set, and those without are one set together. Raises UserError where only
    some have a name.
    """
    wanted = parse(spec)
    names = list(dict.fromkeys(source.name for source in wanted if source.name))
    unnamed = [source.path for source in wanted if not source.name]
    if names and unnamed:
        raise UserError(f"{spec}: only some of the sources have a name, {listed(names)}; write NAME= before "
                        f"{listed(unnamed)} too, or before none: then they are one set")
    return names


# ---- the grammar ----------------------------------------------------------------------------------------


def parse(spec):
    """The Wanted sources of a text, see data_files."""
    if spec.lstrip().startswith(("[", "{")) and not find(spec):
        try:
            items = json.loads(spec)
        except ValueError as error:
            raise UserError(f"{spec:.200}: a list of sources must be JSON or YAML: {error}") from error
        if isinstance(items, dict) and "path" not in items:  # {name: source}
            return [wanted._replace(name=label(name)) for name, source in items.items()
                    for wanted in parse(str(source))]
        items = items if isinstance(items, list) else [items]
        return [wanted for item in items for wanted in (
            [from_mapping(item)] if isinstance(item, dict) else parse(str(item)))]
    found, at = [], 0
    while at < len(spec) or not found:
        wanted, at = parse_one(spec, at)
        found.append(wanted)
    return found


def label(name):
    """The name of a source without blanks around it; None if nothing is left. It is shown on the screen."""
    name = (name or "").strip()
    if not name.isprintable():
        raise UserError(f"the name {name!r:.100} of a source has characters that can't be shown; use others")
    return name or None


def find(path):
    """The path as the file system has it, or None if it does not exist."""
    if "\0" in path:
        return None
    for candidate in (path, os.path.expanduser(path.strip())):
        if os.path.exists(candidate):
            return candidate
    if path.strip() == EXAMPLE:  # the default of --train_data, in another directory
        return os.path.join(PROJECT, EXAMPLE)
    return None


def parse_one(spec, at):
    """(the Wanted source that begins at this position of the text, the position after its comma)"""
    name = re.compile(r"\s*([^=,:@\[\]/]+)=").match(spec, at)
    for begin, word in [(at, None), *([(name.end(), label(name[1]))] if name else [])]:
        cuts = [cut.start() for cut in re.compile(r"[,:@\[]|$").finditer(spec, begin)]
        for cut in reversed(cuts):  # the longest path that exists
            suffix = SUFFIX.match(spec, cut)
            path = find(spec[begin:cut]) if suffix else None
            if path:
                return Wanted(path, word, **suffix.groupdict()), suffix.end()
    end = spec.find(",", at)
    end = len(spec) if end < 0 else end
    text = spec[at:end].strip()
    match = re.fullmatch(rf"(?:([^=,:@\[\]/]+)=)?\s*({HUB_NAME.pattern}){SUFFIX.pattern}", text)
    if match and not match[2].lower().endswith(ENDINGS):
        return Wanted(match[2], label(match[1]), *match.groups()[2:]), end + 1
    label_of, _, path = text.rpartition("=")
    if re.search(r"[:@\[\]/]", label_of) and find(re.split(r"[:@\[]", path)[0]):
        raise UserError(f"{text}: the name {label_of} can't have any of : @ [ ] / in it; write another one")
    path = re.match(r"(?:([^=,:@\[\]/]+)=)?([^:@\[]*)", text)[2]
    if find(path):
        raise UserError(f"{text}: can't read {text[len(path):]!r} after the path {path}; write {GRAMMAR}, "
                        "for example rows.jsonl[:1000]:0.5 or DIRECTORY@test")
    raise missing(path or text or spec, text.removeprefix(f"{name[1]}=") if name else text)


def missing(path, text):
    """The UserError for a path that does not exist, with what to write where others write `text`."""
    parts = sorted(glob.glob(path) if "\0" not in path else []) or re.split(r"[;\s]+", text)
    found = [",".join(parts)] if parts != [text] and all(map(os.path.exists, parts)) else []
    for written in (text.rstrip("/"), re.split(r"/*[:@\[](?!.*/)", text.rstrip("/"))[0]):
        found += [f"{file}:{written}" for file in LISTS if written and os.path.isfile(file)
                  and llamafactory.has_entry(file, written)]
        found += local_split(written)
        matches = ((re.fullmatch(pattern, written), here) for pattern, here in OTHERS)
        found += [match.expand(here) for match, here in matches if match]
    way = "".join(f"write {here:.200}; or " for here in found[:1])
    return UserError(f"{path}: no such data file; {way}pass a JSON, JSON Lines, CSV, text or parquet file, a "
                     f"directory, the id of a hub dataset, or several of these separated by commas: "
                     f"{GRAMMAR}")


def local_split(path):
    """["DIR@train"] for a path DIR/train that does not exist, if DIR has such a split; otherwise []."""
    folder, _, word = path.rpartition("/")
    if not folder or not os.path.isdir(folder):
        return []
    splits = {split for file in list_files(folder) for split in split_of(file)}
    return [f"{folder}@{word}"] if {word, SPLITS.get(word.lower(), word)} & splits else []


def from_mapping(item):
    """The Wanted source of a mapping in a YAML file: {path, name, config or entry, split, rows, weight}."""
    unknown = [key for key in item if key not in KEYS]
    if unknown or not item.get("path"):
        raise UserError(f"a source that is a mapping needs path, and may have {', '.join(KEYS[1:])}; it has "
                        f"{', '.join(map(str, item)) or 'nothing'}")
    texts = {key: str(value) for key, value in item.items() if value not in (None, "", "null", "~")}
    path, rows, weight = texts["path"], texts.get("rows"), texts.get("weight")
    if weight is not None and not re.fullmatch(r"\d*\.?\d+([eE][-+]?\d+)?", weight):
        raise UserError(f"{path}: weight must be a number above 0, it is {weight}")
    return Wanted(find(path) or path, label(texts.get("name")), texts.get("config") or texts.get("entry"),
                  texts.get("split"), rows.strip("[]") if rows else None, weight)


def row_slice(rows, path):
    """The slice of a text such as "10:20"; all rows if it is None."""
    match = re.fullmatch(r"\s*(\d{0,18})\s*:\s*(\d{0,18})\s*", ":" if rows is None else rows)
    limits = [int(text) if text else None for text in (match.groups() if match else "00")]
    if limits[1] is not None and (limits[0] or 0) >= limits[1]:
        raise UserError(f"{path}[{rows}]: rows must be [START:STOP], counted from 0, without STOP itself: "
                        "[:1000] is the first thousand, [1000:] all others")
    return slice(*limits)


# ---- what is written -> files ---------------------------------------------------------------------------


def resolve(wanted, split):
    """The Source that a Wanted one means; `split` as in data_files."""
    path, rows, columns = wanted.path, row_slice(wanted.rows, wanted.path), None
    weight = None if wanted.weight is None else float(wanted.weight)
    if os.path.basename(path) == "dataset_info.json" and os.path.isfile(path):
        columns, place, samples = llamafactory.read_entry(path, wanted.config)
        if wanted.rows is None:
            rows = slice(samples)
        wanted = wanted._replace(**{**place, "split": wanted.split or place["split"]})
        path = wanted.path
    in_file = None  # the split of a file that has several
    if os.path.isdir(path):
        names = choose(list_files(path), read_readme(path), path, wanted, split)
        files = [os.path.join(path, name) for name in names]
    elif os.path.exists(path):
        if wanted.config:
            way = f"; for a split write {path}@{wanted.config}" if wanted.config.lower() in SPLITS else ""
            raise UserError(f"{path}:{wanted.config}: a file has no configs, only a directory or a hub "
                            f"dataset has{way}; pass the file alone, or with a weight above 0, such as :0.5")
        files, in_file = [path], wanted.split or split
    elif HUB_NAME.fullmatch(path) and not path.lower().endswith(ENDINGS) and not local_split(path):
        files = hub_files(path, wanted, split)
    else:
        raise missing(path, path)
    for file in files:
        if not os.path.isfile(file):
            raise UserError(f"{file} is not a file; write the data to a file: it is read more than once")
    stems = {}  # name without its ending: files
    for file in files:
        stems.setdefault(re.sub(r"(\.[a-z]+)(\.gz|\.zst)?$", "", file, flags=re.IGNORECASE), []).append(file)
    twice = next((names for names in stems.values() if len(names) > 1), None)
    if twice:
        raise UserError(f"{listed(twice)}: the same name in several formats, so probably the same rows "
                        "twice; name the files to read, or move the others away")
    return Source(weight, wanted.name, files, rows, columns, in_file)


def list_files(directory):
    """The data files of a directory, relative to it, sorted; hidden files and folders are skipped."""
    found, seen = [], {os.path.realpath(directory)}
    for folder, folders, names in os.walk(directory, followlinks=True):
        folders[:] = [name for name in sorted(folders) if not is_hidden(name) and not is_seen(
            os.path.realpath(os.path.join(folder, name)), seen)]
        found += [os.path.relpath(os.path.join(folder, name), directory) for name in names]
    return data_names(found)


def is_seen(path, seen):
    """Whether a path is in the set, and add it: a link may lead to a folder that is read already."""
    before = len(seen)
    seen.add(path)
    return len(seen) == before


def is_hidden(name):
    return name.startswith((".", "__MACOSX", "__pycache__"))


def data_names(names):
    """Those of the files of a directory that are data, sorted."""
    names = [name for name in names if name.lower().endswith(ENDINGS) and not any(
        map(is_hidden, name.split(os.sep))) and not METADATA.fullmatch(os.path.basename(name))]
    names = [name for name in names if not LOGS.fullmatch(os.path.basename(name))] or names
    texts = (".txt", ".txt.gz", ".txt.zst")  # beside other data they are notes
    return sorted([name for name in names if not name.lower().endswith(texts)] or names)


def split_of(path):
    """(the split's name, which of train, validation, test it is) of a file; None for what is not in its path.

    The words of the name count, then those of the folders from the inner to the outer ones. A part that names
    several splits, such as train_test_split, says nothing.
    """
    parts = path.split(os.sep)
    shard = SHARD.match(parts[-1])
    for part in reversed(parts):
        kinds = {SPLITS[word] for word in re.findall(r"[^\W\d_]+", part.lower()) if word in SPLITS}
        if len(kinds) == 1:
            kind = kinds.pop()
            return (shard[1] if shard and part is parts[-1] else kind), kind
    if shard and shard[1] == "data" and len(parts) > 1:  # save_to_disk: SPLIT/data-00000-of-00001.arrow
        return parts[-2], None
    return (shard[1] if shard else None), None


def choose(names, configs, where, wanted, split):
    """Those of the data files `names` of a directory or hub dataset that are meant.

    configs  {config: {split: [patterns]}} of its README.md, see read_readme
    where    the directory or dataset, for errors
    """
    if not names:
        raise UserError(f"{where}: no data file in this directory ({', '.join(ENDINGS)})")
    splits = None
    if wanted.name in configs and not wanted.config:
        raise UserError(f"{where} has a config {wanted.name}, but a name is a label here; write {where}:"
                        f"{wanted.name}, in YAML config: {wanted.name}; or choose another name")
    if configs:
        config = wanted.config or ("default" if "default" in configs else None)
        if config is None and len(configs) == 1:
            config = next(iter(configs))
        if config is None:
            raise UserError(f"{where} has several configs: {listed(configs)}; choose one: "
                            f"{where}:{next(iter(configs))}")
        if config in configs:
            splits = {file: (name, split_of(name)[1]) for name, patterns in configs[config].items()
                      for file in names if any(matches(file, pattern) for pattern in patterns)}
    if splits is None:
        names = in_folder(names, configs, where, wanted.config)
        splits = {name: split_of(name) for name in names}
    if wanted.split:
        return by_split(splits, where, wanted.split)
    kinds = [kind for _, kind in splits.values()]
    if split is None:
        kind = "train" if "train" in kinds else None
    else:
        own = SPLITS.get(os.path.basename(os.path.normpath(where)).lower())
        if own in split_order(split) and not any(kinds):  # --val_data DIR/validation
            return sorted(splits)
        kind = next((kind for kind in split_order(split) if kind in kinds), "")
    found = {file: name for file, (name, own) in splits.items() if own == kind}
    if not found:
        what = "train" if split is None else "validation or test"
        names = sorted({name for name, _ in splits.values() if name})
        raise UserError(f"{where} has no {what} file; it has {listed(splits)}; pass a file, or "
                        f"{where}{':' * bool(wanted.config)}{wanted.config or ''}@"
                        f"{names[0] if names else 'all'}")
    several = sorted({name or "files without a split" for name in found.values()})
    if len(several) > 1 and kind in several:  # train beside train_extra
        return sorted(file for file, name in found.items() if name == kind)
    if len(several) > 1:
        raise UserError(f"{where} has several splits: {listed(several)}; choose one: {where}@{several[0]}")
    return sorted(found)


def by_split(splits, where, word):
    """The files of a split that is written: by its name, by what it means, or by a whole word in the path."""
    if word == "all":
        return sorted(splits)
    means = SPLITS.get(word.lower())
    found = [file for file, (name, _) in splits.items() if name == word]
    found = found or [file for file, (_, kind) in splits.items() if means and kind == means]
    whole = re.compile(rf"(?<![^\W\d_]){re.escape(word)}(?![^\W\d_])", re.IGNORECASE)
    found = found or [file for file in splits if not means and whole.search(file)]
    if not found:
        names = {name or kind or file for file, (name, kind) in splits.items()}
        raise UserError(f"{where}@{word}: no such split; it has {listed(sorted(names))}")
    return sorted(found)


def in_folder(names, configs, where, config):
    """The files of a config that is a folder. Without one, several folders with splits are an error."""
    folders = {}
    for name in names:
        folder, inner, rest = name.partition(os.sep)
        if inner and split_of(folder)[1] is None:
            folders.setdefault(folder, []).append(rest)
    if config is not None:
        found = [name for name in names if name.startswith(config.rstrip("/") + os.sep)]
        if not found:
            there = listed(configs or folders) or "none"
            splits = {split for name in names for split in split_of(name)}.union(*configs.values(), SPLITS)
            way = f"; for a split write {where}@{config}" if {config, config.lower()} & splits else ""
            raise UserError(f"{where}:{config}: no such config; it has {there}{way}")
        return found
    with_splits = [folder for folder, rest in folders.items() if any(split_of(name)[1] for name in rest)]
    if len(with_splits) > 1:
        raise UserError(f"{where} has several configs: {listed(with_splits)}; choose one: "
                        f"{where}:{with_splits[0]}")
    return names


def listed(names, count=20):
    """Names for an error, shortened, in one line."""
    names = [" ".join(str(name)[:80].split()) for name in names]
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def read_readme(directory):
    """{config: {split: [patterns]}} of the block `configs:` in a dataset's README.md; {} if it has none.

    Source: https://huggingface.co/docs/hub/datasets-manual-configuration
    """
    path = os.path.join(directory, "README.md")
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8", errors="replace") as f:
        block = re.match(r"---\n(.*?\n)---", f.read(2**18), re.DOTALL)
    if not block or not re.search(r"^configs:", block[1], re.MULTILINE):
        return {}
    configs = {}
    try:
        for config in yaml.safe_load(block[1])["configs"]:
            files = config.get("data_files", [])
            if isinstance(files, (str, dict)):
                files = [files]
            splits = configs.setdefault(str(config["config_name"]), {})
            for item in files:
                item = item if isinstance(item, dict) else {"split": "train", "path": item}
                patterns = [item["path"]] if isinstance(item["path"], str) else item["path"]
                folder = config.get("data_dir", "")
                splits.setdefault(str(item.get("split", "train")), []).extend(
                    os.path.normpath(os.path.join(folder, pattern)) for pattern in patterns)
            if not files:  # a config without data_files: all of its data_dir, or of its folder
                configs.pop(str(config["config_name"]))
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: its configs can't be read: {' '.join(str(error).split()):.200}; correct "
                        "them, or name the data files themselves") from error
    return configs


def matches(name, pattern):
    """Whether a pattern of README.md means this file; * stays inside a folder, ** does not."""
    name, pattern = name.replace(os.sep, "/"), pattern.replace(os.sep, "/")
    if name.startswith(pattern.rstrip("/") + "/"):
        return True
    same_depth = "**" in pattern or name.count("/") == pattern.count("/")
    return same_depth and any(fnmatch.fnmatchcase(name, p) for p in (pattern, pattern.replace("**/", "")))


# ---- the hub --------------------------------------------------------------------------------------------


def hub_files(name, wanted, split):
    """Download the files of a hub dataset that are meant, or find them in the hub's cache. Returns paths."""
    check_hub_endpoint()
    # imported here: most runs read local files
    from huggingface_hub import HfApi, snapshot_download
    from httpx import HTTPError
    from huggingface_hub.errors import (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError,
                                        OfflineModeIsEnabled)

    try:
        directory = snapshot_download(name, repo_type="dataset", allow_patterns=["README.md"])
        try:
            names = data_names(HfApi().list_repo_files(name, repo_type="dataset"))
        except (HTTPError, OfflineModeIsEnabled, OSError):  # the hub's cache may have the files
            names = list_files(directory)
        chosen = choose(names, read_readme(directory), name, wanted, split)
        patterns = [glob.escape(file) for file in chosen]
        directory = snapshot_download(name, repo_type="dataset", allow_patterns=patterns)
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        raise UserError(f"{name} is neither a local file nor reachable as a hub dataset: "
                        f"{str(error).strip().splitlines()[-1]}") from error
    return [os.path.join(directory, file) for file in chosen]


# ---- rows -----------------------------------------------------------------------------------------------


def read_sources(sources):
    """Yield (number of the file, number of its row, row, where) for the rows of Sources, one after another.

    In JSON Lines a row is a UserError where the line is not JSON; the reader of rows must raise it.
    """
    first = 0
    for source in sources:
        named, seen = frozenset(dict(source.columns.columns) if source.columns else ()), {}
        rows = ((first + i, n, row, where) for i, file in enumerate(source.files)
                for n, (where, row) in enumerate(read_rows(file, source.split, named)))
        for file, n, row, where in itertools.islice(rows, source.rows.start, source.rows.stop):
            if source.columns and isinstance(row, dict):
                seen.update(row)
                row, where = source.columns.to_row(row, where)
            yield file, n, row, where
        if source.columns and source.rows == slice(None):
            source.columns.check(seen, source.files[0])
        first += len(source.files)


def read_files(spec):
    """Yield (where, row) for every row that `spec` names, see data_files. Raises UserError with the place."""
    for _, _, row, where in read_sources(data_files(spec)):
        if isinstance(row, UserError):
            raise row
        yield where, row


def source_name(row, name, file):
    """What a row's source is called in losses by source: NAME=, or its column "source", or the file."""
    value = row.get("source") if isinstance(row, dict) and not name else None
    if isinstance(value, (str, int)) and str(value).strip():
        return str(value).strip()[:100]
    return name or name_of_file(file)


@functools.lru_cache(1000)
def name_of_file(file):
    """What the screen calls a file: "data/train.jsonl", "org/name/en.parquet"."""
    name = file.replace("/./", "/")  # train.sh in another folder: PROJECT/./data/...
    return re.sub(r"^.*/datasets--([^/]+)/snapshots/[^/]+/", lambda m: m[1].replace("--", "/") + "/", name)


def describe_files(files, count=3):
    """The names of files in a line: "data/train.jsonl, org/name/en.parquet and 4 more"."""
    more = f" and {len(files) - count:,} more" if len(files) > count else ""
    return ", ".join(map(name_of_file, files[:count])) + more
