"""What --train_data and --val_data name: the grammar, files of directories and hub datasets, dataset_info.json."""

import json
import os
import re

import pytest
from data_helpers import sources, tiny
from helpers import target_texts, write

import data
import sft
from settings import parser
from settings.errors import UserError
from text import containers
from text.sources import describe_files, data_files, parse, read_files, read_sources

LINE = '{"prompt": "q", "response": "a"}\n'


def make(tmp_path, *names, content=LINE):
    """Write files into the directory tmp_path/d; returns its path."""
    for name in names:
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_text(content, encoding="utf-8")
    return str(tmp_path / "d")


def chosen(directory, suffix="", split=None):
    """The files that are read of a directory, relative to it."""
    return [os.path.relpath(file, directory) for source in data_files(directory + suffix, split)
            for file in source.files]


def refused(spec, split=None):
    with pytest.raises(UserError) as error:
        data_files(spec, split)
    return str(error.value)


# ---- the grammar ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, expected", [
    ("a.json", {}), (" a.json ", {}), ("a.json:0.7", dict(weight=0.7)), ("a.json:2", dict(weight=2.0)),
    ("a.json:1e-3", dict(weight=0.001)), ("a.json:.5", dict(weight=0.5)), ("x=a.json", dict(name="x")),
    ("my set=a.json", dict(name="my set")), ("a.json[:1000]", dict(rows=slice(None, 1000))),
    ("a.json[1000:]", dict(rows=slice(1000, None))), ("a.json[10:20]", dict(rows=slice(10, 20))),
    ("a.json[:]", {}), ("a.json@test", dict(split="test")),
    ("v=a.json@test[5:]:0.25", dict(name="v", split="test", rows=slice(5, None), weight=0.25)),
], ids=str)
def test_each_part_of_the_grammar(text, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.json", [])
    [source] = data_files(text)
    assert source._asdict() == dict(weight=None, name=None, files=["a.json"], rows=slice(None), columns=None,
                                    split=None) | expected


@pytest.mark.parametrize("name", [
    "a,b.json", "a, b.json", "a:0.5", "a.json:0.5", "org:name@split", "x@test", "a[:5]", "a[1].json", "x=y.json",
    "名字 é.json",
    " lead.json", "a=b,c:d@e[f].jsonl", "[a].json", "{a}.json", "a'b\".json", "a\\b.json", "%41.json", "-x.json"])
def test_an_existing_path_wins(name, tmp_path, monkeypatch):
    """Any file name can be passed, alone, between others, with all that may follow; the longest one wins."""
    monkeypatch.chdir(tmp_path)
    for other in ("a", "b.json", "plain.json", "a.json", name):
        write(tmp_path / other, [])
    assert [s.files for s in data_files(name)] == [[name]]
    assert [s.files for s in data_files(f"plain.json,{name},b.json")] == [["plain.json"], [name], ["b.json"]]
    [one, two] = data_files(f"n={name}[:3]:0.5, plain.json:1")
    assert (one.name, one.files, one.rows, one.weight) == ("n", [name], slice(None, 3), 0.5)
    assert (two.files, two.weight) == (["plain.json"], 1)


def test_a_path_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path / "a.json", [])
    assert data_files("~/a.json:0.5")[0].files == [path]


@pytest.mark.parametrize("text, say", [
    ("a.json[5]", r"a.json\[5\]: rows must be \[START:STOP\]"), ("a.json[-5:]", "rows must be"),
    ("a.json[:10%]", "rows must be"), ("a.json[5:5]", "rows must be"), ("a.json[:0]", "rows must be"),
    ("a.json[1:2:3]", "rows must be"), ("a.json@", "can't read '@' after the path a.json"),
    ("a.json:[:5]", r"can't read ':\[:5\]' after the path a.json; write \[NAME=\]SOURCE"),
    ("a.json:en", "a.json:en: a file has no configs"), ("a.json:-1", "a.json:-1: a file has no configs"),
    ("a.json:nan", "a file has no configs"), ("a.json:0", "weight above 0"), ("a.json:1e999", "weight above 0"),
    ("a.json,a.json:0.5", "either every source needs a weight"), ("", "no such data file"),
    ("a.json,,a.json", "no such data file"), ("missing.json", "^missing.json: no such data file; pass a JSON"),
    ("a.json,data/missing.json:0.5", "^data/missing.json: no such data file"),
    ("x=missing.csv", "^missing.csv: no such data file"), ('[{"path": "a.json", "splits": "x"}]',
                                                           "it has path, splits"),
    ('[{"split": "x"}]', "needs path"), ('[{"path": "a.json", "weight": "x"}]', "weight must be a number"),
    ('[{"path": "a.json"', "must be JSON or YAML"), ('[{"path": "a.json", "rows": "5"}]', "rows must be"),
])
def test_what_is_not_the_grammar_is_named(text, say, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.json", [])
    assert re.search(say, refused(text))


def test_a_missing_file_is_reported_before_a_model_is_loaded(tmp_path):
    with pytest.raises(UserError, match="missing.json: no such data file"):
        data.load(str(tmp_path / "missing.json"), None, 100)


def test_rows_count_through_all_files_of_a_source(tmp_path):
    """[2:5] of files with 3 and 4 rows: the last of the first and two of the second, with their own places."""
    directory = tmp_path / "d"
    directory.mkdir()
    for name, count in (("a.json", 3), ("b.json", 4)):
        write(directory / name, [{"n": f"{name}{i}"} for i in range(count)])
    got = [row["n"] for _, row in read_files(f"{directory}[2:5]")]
    assert got == ["a.json2", "b.json0", "b.json1"]
    places = [(file, n, where) for file, n, _, where in read_sources(data_files(f"{directory}[2:5],{directory}[:1]"))]
    assert places == [(0, 2, f"{directory}/a.json[2]"), (1, 0, f"{directory}/b.json[0]"),
                      (1, 1, f"{directory}/b.json[1]"), (2, 0, f"{directory}/a.json[0]")]


def test_rows_and_splits_reach_the_dataset(tmp_path):
    """data.load reads the slice, and the cache's key differs for another slice."""
    path = write(tmp_path / "rows.json", [{"prompt": "q", "response": f"a{i}"} for i in range(4)])
    for spec, expected in ((f"{path}[1:3]", [1, 2]), (f"{path}[3:]", [3])):
        dataset = data.load(spec, tiny, 100, cache_dir=str(tmp_path / "cache"))
        assert sources(dataset) == [f"{path}[{i}]" for i in expected]
    directory = make(tmp_path, "train.jsonl", "test.jsonl")
    assert data.load(directory, tiny, 100, split="validation").files == [f"{directory}/test.jsonl"]


@pytest.mark.parametrize("text, expected", [
    ("train_data:\n- {path: 'a,b.json', weight: 0.5}\n- path: b\n  rows: '[:5]'\n  weight: 1\n  name: x\n",
     [("a,b.json", None, slice(None), 0.5), ("b", "x", slice(None, 5), 1.0)]),
    ("train_data: [b, 'a,b.json']\n", [("b", None, slice(None), None), ("a,b.json", None, slice(None), None)]),
    ("train_data:\n- {path: b, rows: [1:2]}\n- a,b.json\n", [("b", None, slice(1, 2), None),
                                                             ("a,b.json", None, slice(None), None)]),
    ("val_data:\n- path: b\n  name: null\n", [("b", None, slice(None), None)])])
def test_a_list_in_a_yaml_file(text, expected, tmp_path, monkeypatch):
    """Lists of texts and of mappings; the saved config.yaml gives the same sources."""
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.json", "b"):
        write(tmp_path / name, [])
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    for _ in range(2):
        config, _ = parser.parse(sft.Config, ["--config", "run.yaml"])
        spec = config.val_data or config.train_data
        assert [(s.files[0], s.name, s.rows, s.weight) for s in data_files(spec)] == expected
        parser.write_yaml(config, "run.yaml")


@pytest.mark.parametrize("text, say", [
    ("train_data:\n- {path: a, path: b}\n", "the key path appears twice"),
    ("train_data:\n- &a {path: b}\n- *a\n", "anchors and aliases"), ("train_data: [[a]]\n", "must be a plain value"),
    ("lora_targets:\n- {path: b}\n", "must be a plain value")])
def test_a_list_in_a_yaml_file_is_checked(text, say, tmp_path):
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=say):
        parser.parse(sft.Config, ["--config", str(tmp_path / "run.yaml")])


def test_a_mapping_names_all_parts():
    item = {"path": "org/name", "name": "n", "config": "en", "split": "test", "rows": "5:6", "weight": 0.5}
    [one] = parse(json.dumps([item]))
    assert one == parse("n=org/name:en@test[5:6]:0.5")[0]
    [entry] = parse(json.dumps([{"path": "d.json", "entry": "e:,@"}]))
    assert entry.config == "e:,@"


# ---- files of a directory -------------------------------------------------------------------------------


@pytest.mark.parametrize("names, train, validation", [
    (["train.jsonl", "test.jsonl"], ["train.jsonl"], ["test.jsonl"]),
    (["train.jsonl", "val.jsonl", "test.jsonl"], ["train.jsonl"], ["val.jsonl"]),
    (["a_train.csv", "a_dev.csv", "a_test.csv"], ["a_train.csv"], ["a_dev.csv"]),
    (["Training-1.json", "Training-2.json", "Eval.json"], ["Training-1.json", "Training-2.json"], ["Eval.json"]),
    (["train/a.jsonl", "train/b.jsonl", "validation/a.jsonl"], ["train/a.jsonl", "train/b.jsonl"],
     ["validation/a.jsonl"]),
    (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
     ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], ["data/test-00000-of-00001.parquet"]),
    (["train/data-00000-of-00001.arrow", "train/state.json", "test/data-00000-of-00001.arrow", "dataset_dict.json",
      "train/dataset_info.json", "train/cache-1f.arrow"],
     ["train/data-00000-of-00001.arrow"], ["test/data-00000-of-00001.arrow"]),
    (["constrained_writing.jsonl", "dialogues.jsonl"], ["constrained_writing.jsonl", "dialogues.jsonl"], None),
    (["contest.jsonl", "latest.jsonl", "device.jsonl", "retrieval.jsonl"],
     ["contest.jsonl", "device.jsonl", "latest.jsonl", "retrieval.jsonl"], None),
    (["strain.jsonl", "trainer.jsonl", "test.jsonl"], ["strain.jsonl", "trainer.jsonl"], ["test.jsonl"]),
    (["rows.jsonl", "training_log.json", "train_config.json", "trainer_state.json", "dataset_infos.json"],
     ["rows.jsonl"], None),
    (["train.jsonl", "train_test_split/test.jsonl"], ["train.jsonl"], ["train_test_split/test.jsonl"]),
    (["train_test_split.jsonl", "train.jsonl", "val.jsonl"], ["train.jsonl"], ["val.jsonl"]),
    (["rows.jsonl", ".hidden.jsonl", "._rows.jsonl", ".ipynb_checkpoints/rows-checkpoint.jsonl", "__MACOSX/rows.jsonl"],
     ["rows.jsonl"], None),
    (["a.jsonl", "b.json", "c.jsonl.gz", "d.csv", "e.tsv.zst", "f.parquet", "g.ndjson", "README.md", "notes.txt",
      "x.bak"],
     ["a.jsonl", "b.json", "c.jsonl.gz", "d.csv", "e.tsv.zst", "f.parquet", "g.ndjson"], None),
    (["a.txt", "b.txt", "README.txt"], ["a.txt", "b.txt"], None), (["log.json"], ["log.json"], None),
    (["dialog.jsonl", "catalog.json"], ["catalog.json", "dialog.jsonl"], None),
    (["en/rows.jsonl", "zh/rows.jsonl"], ["en/rows.jsonl", "zh/rows.jsonl"], None),
    (["test.jsonl", "dev.jsonl"], None, ["dev.jsonl"]),
], ids=lambda x: " ".join(x) if x else "none")
def test_files_are_chosen_by_whole_split_words(names, train, validation, tmp_path):
    """Hidden files, metadata and logs are skipped; --val_data never gets a train file of the same directory."""
    directory = make(tmp_path, *names)
    for expected, split in ((train, None), (validation, "validation")):
        if expected is None:
            what = "train" if split is None else "validation or test"
            say = refused(directory, split)
            assert f"has no {what} file; it has" in say and all(name in say for name in train or validation)
        else:
            assert chosen(directory, split=split) == expected
    assert set(chosen(directory, "@all")) >= {*(train or ()), *(validation or ())}


def test_a_folder_that_bears_the_name_of_the_split(tmp_path):
    """--val_data DIR/validation with any file names; for training a folder's own name does not matter."""
    directory = make(tmp_path, "validation/rows.jsonl") + "/validation"
    assert chosen(directory, split="validation") == chosen(directory) == ["rows.jsonl"]


@pytest.mark.parametrize("word, expected", [
    ("train", ["train.jsonl"]), ("validation", ["val_easy.jsonl", "val_hard.jsonl"]), ("valid", ["val_easy.jsonl",
        "val_hard.jsonl"]),
    ("hard", ["val_hard.jsonl"]), ("extra", ["extra-00000-of-00001.parquet"]), ("test", None), ("har", None), ("rain",
        None)])
def test_a_split_is_chosen_by_its_word(word, expected, tmp_path):
    directory = make(tmp_path, "train.jsonl", "val_easy.jsonl", "val_hard.jsonl", "extra-00000-of-00001.parquet")
    if expected is None:
        assert "no such split; it has extra, train, validation" in refused(f"{directory}@{word}")
    else:
        assert chosen(directory, f"@{word}") == chosen(directory, f"@{word}", "validation") == expected


@pytest.mark.parametrize("names, say, suffix, expected", [
    (["train_sft-00000-of-00001.parquet", "train_gen-00000-of-00001.parquet"],
     "has several splits: train_gen, train_sft",
     "@train_sft", ["train_sft-00000-of-00001.parquet"]),
    (["en-00000-of-00001.parquet", "zh-00000-of-00001.parquet"], "has several splits: en, zh", "@zh",
     ["zh-00000-of-00001.parquet"]),
    (["en/train.jsonl", "en/test.jsonl", "zh/train.jsonl"], "has several configs: en, zh", ":zh", ["zh/train.jsonl"]),
    (["sft/data-00000-of-00001.arrow", "rm/data-00000-of-00001.arrow"], "has several splits: rm, sft", "@sft",
     ["sft/data-00000-of-00001.arrow"]),
    (["a.jsonl", "a.csv"], "the same name in several formats", "/a.csv", ["a.csv"])])
def test_several_without_a_choice_are_an_error(names, say, suffix, expected, tmp_path):
    directory = make(tmp_path, *names)
    assert say in refused(directory)
    assert chosen(directory, suffix) == expected
    assert "no such config; it has" in refused(directory + ":nope")


README = """---
license: mit
configs:
- config_name: en
  data_files:
  - split: train
    path: data/en-*.jsonl
  - {split: test, path: [held/en.jsonl, 'more/**/x.jsonl']}
- config_name: zh
  data_dir: data
  data_files: "zh*"
---
# Title
"""


def test_the_configs_of_readme_md(tmp_path):
    """Of https://huggingface.co/docs/hub/datasets-manual-configuration."""
    directory = make(tmp_path, "data/en-1.jsonl", "data/en-2.jsonl", "data/zh.jsonl", "held/en.jsonl", "more/a/x.jsonl",
                     "other.jsonl", "data/deep/en-3.jsonl")
    make(tmp_path, "README.md", content=README)
    assert "has several configs: en, zh; choose one" in refused(directory)
    assert chosen(directory, ":en") == ["data/en-1.jsonl", "data/en-2.jsonl"]
    assert chosen(directory, ":en", "validation") == chosen(directory, ":en@test") == ["held/en.jsonl",
        "more/a/x.jsonl"]
    assert chosen(directory, ":zh") == ["data/zh.jsonl"]
    assert "no such config; it has en, zh" in refused(directory + ":fr")
    assert "no validation or test file" in refused(directory + ":zh", "validation")
    assert f"or {directory}:zh@train" in refused(directory + ":zh", "validation")
    make(tmp_path, "README.md", content=README.replace("config_name: zh", "config_name: default"))
    assert chosen(directory) == ["data/zh.jsonl"]
    make(tmp_path, "README.md", content="---\nconfigs:\n- [a\n---\n")
    assert "README.md: its configs can't be read" in refused(directory)
    make(tmp_path, "README.md", content="---\nA rule: and: text\n---\n")
    assert "other.jsonl" in chosen(directory)


def test_a_pattern_of_readme_md_stays_in_the_directory(tmp_path):
    directory = make(tmp_path, "a.jsonl", "../secret.jsonl")
    make(tmp_path, "README.md", content=README.replace("data/en-*", "../secret"))
    assert "no train file" in refused(directory + ":en")


def test_links_are_followed_once(tmp_path):
    directory = make(tmp_path, "v1/a.jsonl", "../elsewhere/b.jsonl")
    for name, target in (("latest", "v1"), ("loop", "."), ("out", "../elsewhere")):
        os.symlink(target, os.path.join(directory, name))
    assert chosen(directory) == ["latest/a.jsonl", "out/b.jsonl"]


def test_a_directory_without_data_is_named(tmp_path):
    directory = make(tmp_path, "README.md")
    assert re.search(re.escape(directory) + r": no data file .*\.jsonl.*\.csv.*\.parquet", refused(directory))


def test_a_pipe_in_a_directory_is_refused(tmp_path):
    """Also before it is hashed for the cache, which would wait for ever."""
    directory = make(tmp_path, "a.jsonl")
    os.mkfifo(os.path.join(directory, "b.jsonl"))
    assert "b.jsonl is not a file" in refused(directory)


def test_the_files_for_the_screen():
    hub = "/x/hub/datasets--org--name/snapshots/0a1b/data/train.parquet"
    assert describe_files(["a.jsonl", hub]) == "a.jsonl, org/name/data/train.parquet"
    assert describe_files(["./data/x.json", "/a/./b//c.json"]) == "./data/x.json, /a/b//c.json"
    assert describe_files(list("abcde")) == "a, b, c and 2 more"


# ---- the hub --------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function: names of files -> the list of what is downloaded of a hub dataset that has them."""
    import huggingface_hub

    def start(*names, online=True):
        downloads = []
        directory = make(tmp_path, *names)
        make(tmp_path, "README.md", content=README if "data/en-1.jsonl" in names else "")

        def snapshot_download(name, repo_type, allow_patterns):
            assert (name, repo_type) == ("owner/name", "dataset")
            downloads.append(allow_patterns)
            return directory

        def list_repo_files(self, name, repo_type):
            if not online:
                raise huggingface_hub.errors.OfflineModeIsEnabled("offline")
            return [*names, ".gitattributes", "README.md"]

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
        return downloads

    return start


@pytest.mark.parametrize("online", [True, False])
def test_only_what_is_meant_is_downloaded(hub, online):
    """owner/name that is not a path; README.md first, then the files of the split, or those that the cache has."""
    downloads = hub("data/train-00000.json", "data/test-00000.json", online=online)
    dataset = data.load("owner/name", tiny, 100)
    assert [file[-21:] for file in dataset.files] == ["data/train-00000.json"]
    assert downloads == [["README.md"], ["data/train-00000.json"]]
    assert data.load("x=owner/name@test[:1]", tiny, 100, split="validation").files[0].endswith("test-00000.json")


def test_a_config_of_a_hub_dataset(hub):
    downloads = hub("data/en-1.jsonl", "data/zh.jsonl", "held/en.jsonl")
    assert "owner/name has several configs: en, zh; choose one: owner/name:en" in refused("owner/name")
    assert data_files("owner/name:en@test:0.5")[0].files[0].endswith("held/en.jsonl")
    assert downloads[-1] == ["held/en.jsonl"]


def test_an_unreachable_hub_is_one_line(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_, **__):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert refused("owner/name") == "owner/name is neither a local file nor reachable as a hub dataset: no network"
    assert "no such data file" in refused("owner/name.jsonl")  # what names a file is not looked up


@pytest.mark.parametrize("spec, way", [
    ("owner/name:train", "owner/name@train"), ("owner/name:test[:10]", "owner/name@test"),
    ("owner/name:train_sft:0.5", "owner/name@train_sft"), ("owner/name:Validation", "owner/name@Validation"),
    ("owner/name/train", "owner/name@train"), ("x=owner/name/train/:0.5", "owner/name@train"),
    ("owner/name/train_sft", "owner/name@train_sft"), ("owner/name/en/train", "owner/name:en@train"),
    ("owner/name#500", "owner/name[:500]"), ("owner/name:en#500", "owner/name:en[:500]"),
    ("hf://datasets/owner/name", "owner/name"), ("https://huggingface.co/datasets/owner/name", "owner/name"),
    ("https://huggingface.co/datasets/owner/name/viewer/en/test", "owner/name:en@test"),
    ("https://hf-mirror.com/datasets/owner/name/", "owner/name"), ("HF::owner/name", "owner/name"),
    ("datasets/owner/name", "owner/name"), ("DIR:train", "DIR@train"), ("DIR/train", "DIR@train"),
    ("DIR/test/[:5]", "DIR@test"), ("DIR:validation", "DIR@validation"), ("a.json:train", "a.json@train"),
    ("DIR/train_sft", "DIR@train_sft"), ('[{"path": "owner/name", "config": "train"}]', "owner/name@train"),
    ('[{"path": "DIR/train"}]', "DIR@train"),
])
def test_a_split_that_is_written_otherwise_is_named(spec, way, hub, tmp_path, monkeypatch):
    """What other trainers call a subset, a folder, or a part of a URL: the error says how to write it here."""
    hub("train_sft-00000-of-00001.json", "test-00000.json", "train.json", "validation.json")
    (tmp_path / "d").rename(tmp_path / "DIR")
    monkeypatch.chdir(tmp_path)
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "DIR"))
    write(tmp_path / "a.json", [])
    assert f"write {way}" in refused(spec)


def test_several_files_are_separated_by_commas(tmp_path, monkeypatch):
    """The error for a pattern, and for other separators, has the files."""
    make(tmp_path, "a.json", "b.json")
    monkeypatch.chdir(tmp_path)
    for spec in ("d/*.json", "d/a.json;d/b.json", "d/a.json d/b.json", "d/?.json", '[{"path": "d/*.json"}]'):
        assert "write d/a.json,d/b.json; or" in refused(spec)
    assert "write" not in refused("d/*.csv")
    assert "no such data file" in refused("\0d/*.json")


def test_a_folder_of_a_split_is_its_files(tmp_path):
    """DIR:train and DIR/train are what they look like where there is such a folder."""
    directory = make(tmp_path, "train/a.json", "test/b.json")
    assert chosen(directory, ":train") == chosen(directory, "/train") == ["train/a.json"]


def test_a_config_that_is_passed_as_a_name_is_named(tmp_path):
    """axolotl and TRL call the config of a hub dataset its name."""
    make(tmp_path, "data/en-1.jsonl", "data/zh.jsonl", "held/en.jsonl")
    directory = make(tmp_path, "README.md", content=README)
    for spec in (json.dumps([{"path": directory, "name": "zh"}]), f"zh={directory}"):
        assert f"but a name is a label here; write {directory}:zh, in YAML config: zh" in refused(spec)
    assert data_files(f"zh={directory}:zh")[0].name == "zh"


def test_an_entry_without_its_file_is_named(tmp_path, monkeypatch):
    """LLaMA-Factory's --dataset has names of entries only."""
    (tmp_path / "data").mkdir()
    entry(tmp_path / "data", {}, [], name="identity")
    monkeypatch.chdir(tmp_path)
    assert "write data/dataset_info.json:identity" in refused("identity")
    assert "dataset_info" not in refused("other")


# ---- LLaMA-Factory --------------------------------------------------------------------------------------


def entry(tmp_path, entry, rows, name="e", **more):
    """Write dataset_info.json with an entry, and its file; returns the spec of the entry."""
    (tmp_path / "dataset_info.json").write_text(json.dumps({name: {"file_name": "r.json", **entry}, **more}))
    write(tmp_path / "r.json", rows)
    return f"{tmp_path / 'dataset_info.json'}:{name}"


OPENAI_TAGS = dict(role_tag="role", content_tag="content", user_tag="user", assistant_tag="assistant",
                   system_tag="system")


@pytest.mark.parametrize("info, row, expected", [
    ({}, {"instruction": "i", "input": "x", "output": "o"}, {"instruction": "i", "input": "x", "output": "o"}),
    ({"columns": dict(prompt="q", query="more", response="a", system="s", history="h", tools="t")},
     {"q": "i", "more": "x", "a": "o", "s": "S", "h": [["p", "r"]], "t": "[]", "id": 7},
     {"instruction": "i", "input": "x", "output": "o", "system": "S", "history": [["p", "r"]], "tools": "[]", "id": 7}),
    ({"columns": dict(prompt="instruction", response="output")}, {"instruction": "i", "input": "x", "output": "o"},
     {"instruction": "i", "input (not named in dataset_info.json)": "x", "output": "o"}),
    ({"columns": dict(prompt="text")}, {"text": "t", "id": 1}, {"text": "t", "id": 1}),
    ({"formatting": "sharegpt"}, {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
     {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
    ({"formatting": "sharegpt", "columns": dict(messages="m", tools="t"), "tags": OPENAI_TAGS},
     {"m": [{"role": "system", "content": "s"}, {"role": "user", "content": "q", "loss": False},
            {"role": "assistant", "content": "a"}, {"role": "observation", "content": "{}"}], "t": "[]"},
     {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q", "loss": False},
                        {"from": "gpt", "value": "a"}, {"from": "observation", "value": "{}"}], "tools": "[]"}),
    ({"formatting": "sharegpt", "tags": dict(role_tag="who", content_tag="what", user_tag="Q", assistant_tag="A",
                                             function_tag="F", observation_tag="O")},
     {"conversations": [{"who": "Q", "what": "q"}, {"who": "F", "what": "{}"}, {"who": "O", "what": "1"},
                        {"who": "A", "what": "a"}, {"who": "?", "what": "x"}, 5]},
     {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{}"},
                        {"from": "observation", "value": "1"}, {"from": "gpt", "value": "a"},
                        {"from": "?", "value": "x"}, 5]}),
    ({"formatting": "openai", "columns": dict(messages="messages"), "tags": {**OPENAI_TAGS, "observation_tag": "tool"}},
     {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [{}]},
                   {"role": "tool", "content": "1"}]},
     {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [{}]},
                   {"role": "tool", "content": "1"}]}),
    ({"formatting": "openai"}, {"conversations": [{"role": "human", "content": "q"}, {"role": "gpt", "content": "a"}]},
     {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}),
    ({"columns": dict(prompt="a", response="b")}, {"a": "q", "b": "r", "instruction": "other", "messages": []},
     {"instruction": "q", "output": "r", "instruction (not named in dataset_info.json)": "other",
      "messages (not named in dataset_info.json)": []}),
], ids=range(10))
def test_an_entry_says_what_columns_mean(info, row, expected, tmp_path):
    """Each column and tag of LLaMA-Factory; other columns stay, under a name that is not read as conversation text."""
    [(where, got)] = read_files(entry(tmp_path, info, [row]))
    assert got == expected and where.split(" (")[0] == f"{tmp_path / 'r.json'}[0]"


TAGS = dict(role_tag="who", content_tag="what", user_tag="Q", assistant_tag="A")


@pytest.mark.parametrize("info, row, say", [
    ({"columns": dict(prompt="ques", response="ans")}, {"question": "q", "ans": "a"},
     r'r.json: dataset_info.json has "prompt": "ques", but there is no such column; there are "question", "ans"; '
     "correct"),
    ({"columns": dict(prompt="q", response="ans")}, {"q": "q", "answer": "a"},
     '"response": "ans", but .* "q", "answer"'),
    ({"formatting": "sharegpt", "columns": dict(messages="chat")}, {"conversations": []}, '"messages": "chat", but'),
    ({"formatting": "sharegpt"}, {"messages": []}, '"messages": "conversations", but .* there are "messages"'),
    ({}, {"prompt": "q", "response": "a"}, '"prompt": "instruction", but .* there are "prompt", "response"'),
    ({"columns": dict(prompt="q", response="a", system="sys")}, {"q": "q", "a": "a", "persona": "s"},
     'r.json: dataset_info.json has "system": "sys", but there is no such column; there are "q", "a", "persona"'),
    ({"columns": dict(prompt="q", query="in", response="a")}, {"q": "q", "a": "a"}, '"query": "in", but'),
    ({"columns": dict(prompt="q", response="a")}, {"q": None, "a": "a"},
     r'r.json\[0\] \(read q as instruction, a as output\): .* write the text of "instruction"'),
    ({"formatting": "sharegpt", "columns": dict(messages="m"), "tags": TAGS}, {"m": [{"who": "X", "what": "q"}]},
     r'\(read m as conversations, who as from, what as value\): unknown "from"'),
], ids=str)
def test_a_column_that_rows_lack_is_named_as_the_entry_has_it(info, row, say, tmp_path):
    """With the key of the entry, and the columns that there are; later errors say which columns were renamed."""
    spec = entry(tmp_path, info, [row])
    with pytest.raises(UserError) as error:
        data.load(spec, tiny, 100)
    assert re.search(say, str(error.value)) and len(str(error.value)) < 700


def test_a_column_that_some_rows_lack_is_no_error(tmp_path):
    """JSON has no fixed columns: a row without a system prompt, or with the query only, is one of many."""
    info = {"columns": dict(prompt="q", query="more", response="a", system="s")}
    rows = [{"q": "q", "a": "a"}, {"more": "m", "a": "a", "s": "S"}]
    with pytest.raises(UserError, match=r'r.json\[2\]: .* has "response": "a", but .* there are "q", "b"'):
        data.load(entry(tmp_path, info, [*rows, {"q": "q", "b": "a"}]), tiny, 100)
    assert [row for _, row in read_files(entry(tmp_path, info, rows))] == [
        {"instruction": "q", "output": "a"}, {"input": "m", "output": "a", "system": "S"}]
    assert len(list(read_files(entry(tmp_path, info, rows) + "[:1]"))) == 1  # other rows may have the columns


def test_columns_that_an_entry_does_not_name_are_not_read(tmp_path):
    """Under any name that the reader of rows knows, and in turns too."""
    more = {"Question": "x", "choices": ["y"], "chosen": "a", "rejected": "b", "reasoning": "z", "id": 1}
    spec = entry(tmp_path, {"columns": dict(prompt="q", response="chosen")}, [{"q": "q", **more}])
    dataset = data.load(spec, tiny, 100)
    assert dataset.ledger.unused == {f"{name} (not named in dataset_info.json)" if name != "id" else name: 1
                                     for name in more if name != "chosen"}
    assert target_texts(dataset, 0) == ["a<|im_end|>"]
    spec = entry(tmp_path, {"formatting": "sharegpt", "tags": TAGS}, [{"conversations": [
        {"from": "web", "who": "Q", "what": "q"}, {"who": "A", "what": "a", "value": "5"}]}])
    dataset = data.load(spec, tiny, 100)
    assert target_texts(dataset, 0) == ["a<|im_end|>"] and sorted(dataset.ledger.unused) == [
        "messages.from (not named in dataset_info.json)", "messages.value (not named in dataset_info.json)"]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [10, 2**20])
def test_a_single_conversation_under_tags_of_its_own_is_one_row(indent, chunk, tmp_path, monkeypatch):
    """The only list of an object holds its turns if the entry says so, and its rows if those have the columns."""
    monkeypatch.setattr(containers, "CHUNK", chunk)
    row = {"m": [{"who": "Q", "what": "q"}, {"who": "A", "what": "a"}]}
    spec = entry(tmp_path, {"formatting": "sharegpt", "columns": dict(messages="m"), "tags": TAGS}, [])
    for content, count in ((row, 1), ({"all": [row, row]}, 2), ({"m": [row]}, 1)):
        (tmp_path / "r.json").write_text(json.dumps(content, indent=indent))
        dataset = data.load(spec, tiny, 100)
        assert [target_texts(dataset, i) for i in range(len(dataset))] == [["a<|im_end|>"]] * count


def test_an_entry_is_trained(tmp_path):
    spec = entry(tmp_path, {"columns": {"prompt": "q", "response": "a"}}, [{"q": "Hi?", "a": "Yes."}] * 3)
    plain = write(tmp_path / "plain.json", [{"instruction": "Hi?", "output": "Yes."}] * 3)
    assert data.load(f"{spec}[:2]", tiny, 100).tokens.tolist() == data.load(f"{plain}[:2]", tiny, 100).tokens.tolist()


def test_num_samples_and_weights_of_entries(tmp_path):
    rows = [{"instruction": "q", "output": "a", "n": i} for i in range(5)]
    spec = entry(tmp_path, {"num_samples": 2}, rows, identity={"file_name": "r.json"})
    assert [row["n"] for _, row in read_files(spec)] == [0, 1]
    assert [row["n"] for _, row in read_files(spec + "[3:]")] == [3, 4]
    assert [s.weight for s in data_files(f"{spec}:0.5,{tmp_path / 'dataset_info.json'}:identity:2")] == [0.5, 2]


@pytest.mark.parametrize("info, say", [
    ({"columns": {"chosen": "c", "rejected": "r"}, "ranking": True}, "preferred and rejected answers"),
    ({"ranking": True}, "preferred"),
    ({"columns": {"kto_tag": "label"}}, "KTO"), ({"columns": {"images": "i"}}, "images"),
    ({"columns": {"videos": "v"}}, "videos"),
    ({"columns": {"audios": "a"}}, "audio"), ({"formatting": "chatml"}, "alpaca, sharegpt, openai"),
    ({"columns": ["a"]}, "columns must be an object of texts"), ({"tags": {"role_tag": 5}},
                                                                 "tags must be an object of texts"),
    ({"num_samples": 0}, "num_samples must be"), ({"file_name": "gone.json"}, "gone.json does not exist"),
    ({"file_name": None, "script_url": "x"}, "script_url is a Python script"),
    ({"file_name": None, "ms_hub_url": "a/b"}, "ms_hub_url is on ModelScope"),
    ({"file_name": None, "cloud_file_name": "s3://a"}, "cloud_file_name is in a cloud store"),
    ({"file_name": None}, "no file_name and no hf_hub_url")])
def test_an_entry_that_cannot_be_trained_on_says_why(info, say, tmp_path):
    spec = entry(tmp_path, info, [])
    assert refused(spec).startswith(f"{spec}: ") and say in refused(spec)


def test_an_entry_must_be_named(tmp_path):
    """The error lists the entries."""
    spec = entry(tmp_path, {}, [], other={"file_name": "x"})
    path = spec.removesuffix(":e")
    assert refused(path) == f"{path}: name one of its entries; it has e, other; write {path}:e"
    assert refused(path + ":x") == f"{path}:x: no such entry; it has e, other; write {path}:e"


def test_an_entry_on_the_hub(hub, tmp_path):
    hub("data/en-1.jsonl", "data/zh.jsonl", "held/en.jsonl")
    spec = entry(tmp_path, {"hf_hub_url": "owner/name", "subset": "en", "split": "test", "columns": {
        "prompt": "prompt", "response": "response"}}, [])
    assert data_files(spec)[0].files[0].endswith("held/en.jsonl")
    assert data_files(spec + "@train")[0].files[0].endswith("data/en-1.jsonl")
    assert [row for _, row in read_files(spec)] == [{"instruction": "q", "output": "a"}]
