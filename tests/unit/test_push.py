"""tools/push.py, --push_to_hub and the model card: the real huggingface_hub speaks to a hub in this process."""

import json
import os
import re
import sys
from types import SimpleNamespace

import fake_hub
import pytest
import torch
import yaml
from helpers import EXAMPLES, TINY, VALIDATION, model_directory, run_all
from safetensors.torch import save_file

import sft
from disk import checkpoint, hub
from screen import card, picture, publish
from settings.errors import UserError
from tools import export, push

SHORT = ("--lr", "1e-3", "--batch_size", "8", "--max_length", "64")


@pytest.fixture
def server(monkeypatch, tmp_path):
    with fake_hub.running() as running:
        monkeypatch.chdir(tmp_path)
        yield running.use(monkeypatch)


def pushed(step, name="me/model", **options):
    push.push(push.Config(directory=str(step), name=name, **options))


def front_of(content):
    return yaml.safe_load(content.decode().split("---\n")[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The output directory of a run with validation."""
    out = tmp_path_factory.mktemp("runs") / "full"
    sys.argv = ["sft.py", "--model", TINY, "--train_data", EXAMPLES, "--output_dir", str(out), *SHORT, "--max_steps", "3",
                "--save_steps", "2", "--eval_steps", "1", "--val_data", VALIDATION]
    sft.main()
    return out


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """models/tiny in several weight files."""
    directory = tmp_path_factory.mktemp("shards") / "shards"
    export.export([TINY], str(directory), file_bytes=500_000)
    assert len([name for name in os.listdir(directory) if name.endswith(".safetensors")]) > 3
    return directory


def test_a_step_is_pushed_with_a_card_and_without_training_state(server, run):
    """What the hub has loads as the step does. A second push sends nothing again."""
    step = run / "checkpoints/step_2"
    pushed(step, private=True)
    repository = server.repos["me/model"]
    assert server.private["me/model"] and not [path for path in repository if "training_state" in path]
    kept = {path: content for path, content in repository.items() if path in os.listdir(step)}
    assert all(content == (step / path).read_bytes() for path, content in kept.items())
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= kept.keys()
    assert set(repository) - set(kept) == {"README.md", "loss.png", ".gitattributes"}
    assert not (step / "README.md").exists()  # the step directory stays as it was saved
    n_puts = len(server.puts)
    pushed(step)
    assert len(server.puts) == n_puts


def test_the_card_says_where_the_model_comes_from(server, run):
    """Front matter, the ledger, settings that are not the defaults, the command, losses up to the step."""
    pushed(run / "checkpoints/step_2")
    readme, png = (server.repos["me/model"][name] for name in ("README.md", "loss.png"))
    assert front_of(readme) == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["sft"]}
    text = readme.decode()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(line["loss"] for line in lines if line["step"] == 2 and "loss" in line)
    later = next(line["loss"] for line in lines if line["step"] == 3 and "loss" in line)
    assert f"| loss, step 2 | {last:.4f} |" in text and f"{later:.4f}" not in text
    assert all(line in text for line in json.loads((run / "ledger.json").read_text())["train"][1:])
    assert "lr: 1e-3" in text and "epochs" not in text
    command = next(line for line in text.splitlines() if line.startswith("./train.sh"))
    assert "--lr 1e-3 " in command and "--train_data example_sft.json" in command and "output_dir" not in command
    assert str(run) not in text and os.path.dirname(EXAMPLES) not in text  # no path of this machine
    assert png.startswith(b"\x89PNG") and "![loss](loss.png)" in text


def test_the_command_of_a_card_is_that_of_the_run():
    """Quoted for a shell; all ranks; hub names stay."""
    defaults = {"model": "a/b", "lr": 2e-5, "packing": True, "run_name": None, "train_data": "x", "tokenizer": None}
    origin = card.Origin.__new__(card.Origin)
    values = {"model": "Qwen/Qwen2.5-0.5B", "lr": 1e-5, "packing": False, "run_name": "mine",
              "train_data": "my data.json,HuggingFaceH4/no_robots", "tokenizer": "/home/ann/secret/tok"}
    origin.ranks, origin.settings = 4, {name: card.shown(value) for name, value in values.items()
                                        if name not in card.NOT_SHOWN and value != defaults[name]}
    assert card.command(origin) == (
        "./train.sh --n_gpus 4 --model Qwen/Qwen2.5-0.5B --lr 1e-5 --packing false "
        "--train_data 'my data.json,HuggingFaceH4/no_robots' --tokenizer tok")


@pytest.mark.parametrize("text, result", [
    ("files    2: /data/ann/a.json, ~/b/c.json", "files    2: a.json, c.json"), ("https://a.b/c d/e", "https://a.b/c d/e"),
    ("lr / peak", "lr / peak"), ("data/a.json", "data/a.json"), ("x=/a/b/c.json:2", "x=c.json:2")])
def test_folders_of_this_machine_are_not_published(text, result):
    """Relative paths and addresses stay."""
    assert card.without_folders(text) == result


def test_datasets_and_licence_of_a_card(tmp_path, monkeypatch):
    """Hub datasets, not files; the licence of the base's own card, whose link becomes an address."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there/a.json").write_text("[]")
    assert card.hub_datasets("HuggingFaceH4/no_robots,there/a.json,Org/data@train:2") == [
        "HuggingFaceH4/no_robots", "Org/data"]
    assert card.hub_datasets("gone/a.json") == []
    base = model_directory(tmp_path / "base")
    origin = card.Origin(str(base), {})
    origin.local_base = str(base)
    assert card.license_of(origin, online=False) == {}
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: q\nlicense_link: LICENSE\ntags: [a]\n---\nText")
    assert card.license_of(origin, online=False) == {"license": "other", "license_name": "q"}


def test_the_licence_of_a_base_on_the_hub(server, tmp_path, monkeypatch):
    """A push asks the hub for the base's card."""
    server.repos["Org/base"] = {"README.md": b"---\nlicense: other\nlicense_link: LICENSE\n---\n"}
    pushed(model_directory(tmp_path / "merged"), base="Org/base")
    front = front_of(server.repos["me/model"]["README.md"])
    assert front["base_model"] == "Org/base" and front["license"] == "other"
    assert front["license_link"] == "https://huggingface.co/Org/base/blob/main/LICENSE"


def test_what_a_user_wrote_in_readme_is_kept(server, run, tmp_path, capsys):
    """On the hub: it stays. In the directory: it is pushed as it is. An edited card is the user's too."""
    step = run / "checkpoints/step_2"
    pushed(step)
    written = server.repos["me/model"]["README.md"]
    assert card.is_ours(written.decode()) and not card.is_ours(written.decode() + "more")
    pushed(run / "checkpoints/step_3")
    assert card.is_ours(server.repos["me/model"]["README.md"].decode())
    assert server.repos["me/model"]["README.md"] != written  # the card of this program is replaced
    edited = written.replace(b"## Data", b"## My data")
    server.repos["me/model"]["README.md"] = edited
    capsys.readouterr()
    pushed(step)
    assert server.repos["me/model"]["README.md"] == edited and "so it stays" in capsys.readouterr().out
    directory = model_directory(tmp_path / "mine")
    (directory / "README.md").write_text("My words")
    pushed(directory, "me/other")
    assert server.repos["me/other"]["README.md"] == b"My words" and "as it is" in capsys.readouterr().out


def test_an_adapter_names_a_base_that_others_have(server, tmp_path, capsys):
    """A local path is a warning; --base puts a hub id in its place, in the repository only."""
    step = tmp_path / "adapter"
    step.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": TINY, "r": 1, "lora_alpha": 1, "target_modules": ["q"]}
    (step / "adapter_config.json").write_text(json.dumps(config))
    save_file({"base_model.model.model.layers.0.q.lora_A.weight": torch.ones(1, 2)}, step / "adapter_model.safetensors")
    pushed(step)
    assert "--base ORG/NAME" in capsys.readouterr().err
    assert front_of(server.repos["me/model"]["README.md"])["library_name"] == "peft"
    before = (step / "adapter_config.json").read_bytes()
    pushed(step, base="Qwen/Qwen2.5-0.5B")
    config = json.loads(server.repos["me/model"]["adapter_config.json"])
    assert config == {**json.loads(before), "base_model_name_or_path": "Qwen/Qwen2.5-0.5B"}
    assert front_of(server.repos["me/model"]["README.md"])["base_model"] == "Qwen/Qwen2.5-0.5B"
    assert (step / "adapter_config.json").read_bytes() == before
    assert "warning" not in capsys.readouterr().err


def test_a_push_that_was_cut_continues(server, shards):
    """Nothing is visible before all is there, and what was sent is not sent again."""
    directory, server.breaks = shards, 2
    with pytest.raises(UserError, match="start it again"):
        pushed(directory)
    assert list(server.repos["me/model"]) == [".gitattributes"] and len(server.puts) == 2
    server.breaks = None
    pushed(directory)
    weights = [os.path.getsize(directory / name) for name in os.listdir(directory) if name.endswith(".safetensors")]
    assert sorted(server.puts) == sorted(weights)
    assert len(server.commits) == 1  # one commit has all files


def test_weights_of_an_earlier_push_are_removed(server, shards, tmp_path):
    """Programs would read model.safetensors before the index. Other files of the user stay."""
    whole = model_directory(tmp_path / "whole")
    pushed(whole)
    server.repos["me/model"].update({"LICENSE": b"mine", "gguf/model.safetensors": b"mine"})
    pushed(shards)
    repository = server.repos["me/model"]
    assert "model.safetensors" not in repository and repository["LICENSE"] == b"mine"
    assert "gguf/model.safetensors" in repository and "model.safetensors.index.json" in repository
    pushed(whole)
    assert sorted(p for p in repository if "safetensors" in p) == ["gguf/model.safetensors", "model.safetensors"]


def test_a_link_out_of_the_directory_is_not_pushed(server, tmp_path):
    """A model directory may be somebody else's, and a link in it may lead to a private file."""
    (tmp_path / "secret").write_text("private")
    directory = model_directory(tmp_path / "model")
    os.symlink(tmp_path / "secret", directory / "notes.txt")
    with pytest.raises(UserError, match="outside its directory"):
        pushed(directory)
    assert not any(b"private" in content for files_of in server.repos.values() for content in files_of.values())


@pytest.mark.parametrize("name, part", [
    ("model", "a user or an organisation is missing"), ("a/b/c", "not a name"), ("me/a--b", "not a name"),
    ("you/model", "no member of it; use me/model"), ("me/.x", "not a name"),
    ("me/my model", "[Tt]ype --push_to_hub ORG/NAME"), ("https://hub/me/model", "[Tt]ype --push_to_hub ORG/model")])
def test_a_bad_name_is_an_error_before_training(server, train, name, part):
    """Names of an organisation of the user are fine, in any case."""
    with pytest.raises(UserError, match=part):
        train("--push_to_hub", name)
    hub.check("lab/model")
    assert not server.repos


TOKENS = {"missing": (None, "there is no token"), "invalid": ("hf_bad", "does not accept the token"),
          "read": (fake_hub.TOKEN, "can only read"), "offline": (fake_hub.TOKEN, "HF_HUB_OFFLINE"),
          "unreachable": (fake_hub.TOKEN, "did not answer")}


@pytest.mark.parametrize("kind", TOKENS)
def test_a_token_that_can_not_push_is_an_error_before_training(kind, server, train, monkeypatch, tmp_path):
    """Before a model is read, and nothing is created."""
    from huggingface_hub import constants

    token, part = TOKENS[kind]
    monkeypatch.setenv("HF_TOKEN", token or "")
    if kind == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif kind == "unreachable":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    server.role = "read" if kind == "read" else "write"
    with pytest.raises(UserError, match=part):
        train("--push_to_hub", "me/model")
    assert not server.repos and not (tmp_path / "out/metrics.jsonl").exists()


def test_a_run_pushes_its_last_step(server, train, tmp_path):
    """Also one that is complete when it is resumed, as after a push that failed."""
    train(*SHORT, "--max_steps", 1, "--push_to_hub", "me/model")
    weights = (tmp_path / "out/checkpoints/step_1/model.safetensors").read_bytes()
    assert server.repos["me/model"]["model.safetensors"] == weights
    server.repos.clear()
    train("--resume_from", "auto")
    assert server.repos["me/model"]["model.safetensors"] == weights


def test_a_run_with_keep_best_pushes_the_best_step(server, run):
    """Which is not the last one."""
    checkpoint.set_link(str(run / "checkpoints"), 2, "best")
    for keep_best, step in (True, 2), (False, 3):
        cfg = sft.Config(output_dir=str(run), push_to_hub="me/model", keep_best=keep_best, val_data=VALIDATION)
        publish.at_end(cfg, SimpleNamespace(rank=0))
        weights = (run / f"checkpoints/step_{step}/model.safetensors").read_bytes()
        assert server.repos["me/model"]["model.safetensors"] == weights


def test_a_finished_run_that_is_resumed_elsewhere_is_pushed(server, run, tmp_path):
    """No step is left, so the new directory has no checkpoint: the one that was resumed is the result."""
    sys.argv = ["sft.py", "--resume_from", str(run / "checkpoints/step_3"), "--output_dir", str(tmp_path / "new"),
                "--push_to_hub", "me/model"]
    sft.main()
    content = (run / "checkpoints/step_3/model.safetensors").read_bytes()
    assert server.repos["me/model"]["model.safetensors"] == content


def test_a_push_that_fails_does_not_lose_the_run(server, run, tmp_path, capsys):
    """The exit code is 1, and the line that is printed pushes the run."""
    os.symlink(run, tmp_path / "my out")
    server.breaks = 0
    code = publish.at_end(sft.Config(output_dir="my out", push_to_hub="me/model"), SimpleNamespace(rank=0))
    printed = capsys.readouterr().err
    assert code == 1 and "not pushed: " in printed
    server.breaks = None
    words = re.search(r"'([^']*)' (\S+)$", printed.strip())
    assert words[1] == "my out/checkpoints/latest"
    pushed(words[1], words[2])
    assert "model.safetensors" in server.repos["me/model"]


def test_a_directory_without_a_model_is_refused(server, run, tmp_path):
    """A run: the error names its latest step."""
    with pytest.raises(UserError, match="checkpoints/latest"):
        pushed(run)
    with pytest.raises(UserError, match="no such directory"):
        pushed(tmp_path / "missing")
    with pytest.raises(UserError, match="is missing; type ORG/model$"):
        pushed(run / "checkpoints/step_2", name="model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is no model directory"):
        pushed(tmp_path / "empty")
    broken = model_directory(tmp_path / "broken")
    os.truncate(broken / "model.safetensors", 1000)
    with pytest.raises(UserError, match="truncated"):
        pushed(broken)
    assert server.repos.get("me/model", {}).keys() <= {".gitattributes"}


def test_a_picture_has_the_points_where_they_are():
    """The lowest and the highest loss are at the edges of the plot, and a PNG reader finds the pixels."""
    import zlib

    import numpy as np

    content = picture.of_losses([(1, 4.0), (2, 2.0), (3, 1.0)], [(3, 1.0)])
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[12:16] == b"IHDR"
    size, start = int.from_bytes(content[33:37]), 41
    assert content[37:41] == b"IDAT"
    rows = np.frombuffer(zlib.decompress(content[start : start + size]), np.uint8)
    pixels = rows.reshape(picture.HEIGHT, 1 + 3 * picture.WIDTH)[:, 1:].reshape(picture.HEIGHT, picture.WIDTH, 3)
    right, bottom = picture.WIDTH - picture.RIGHT, picture.HEIGHT - picture.BOTTOM
    assert tuple(pixels[bottom - 1, right - 1]) == picture.ORANGE  # the validation, the lowest and last point
    assert tuple(pixels[picture.TOP, picture.LEFT]) == picture.BLUE  # the first loss, the highest
    assert tuple(pixels[2, 2]) == (255, 255, 255)
    assert picture.ticks(0, 10) == [0, 2, 4, 6, 8, 10] and picture.ticks(1, 3, is_whole=True) == [1, 2, 3]
    assert picture.of_losses([(1, 2.0), (2, 2.0)], [])  # equal losses have a range too
    xs, ys = picture.thinned(list(range(10_000)), [0.0] * 5000 + [9.0] + [0.0] * 4999)
    assert len(xs) <= 2 * picture.WIDTH and 9.0 in ys


def test_text_of_a_run_can_not_end_a_block_of_the_card(tmp_path):
    """Names of files and settings may come from anywhere."""
    text = card.fenced("a\n```\n<script>x</script>\n````\nb")
    assert text.startswith("`````\n") and text.endswith("\n`````")
    assert card.plain("a <b>\n# [x](y)") == r"a \<b\> \# \[x\](y)"


def test_other_ranks_neither_ask_nor_push(server, monkeypatch):
    """The hub limits how often one asks who a token belongs to."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    hub.check("me/model")
    with pytest.raises(UserError, match="ORG/c"):
        hub.check("a/b/c")
    publish.at_end(SimpleNamespace(push_to_hub="me/model", selfcheck=False), SimpleNamespace(rank=1))
    publish.at_end(SimpleNamespace(push_to_hub=None, selfcheck=False), SimpleNamespace(rank=0))
    publish.at_end(SimpleNamespace(push_to_hub="me/model", selfcheck=True), SimpleNamespace(rank=0))
    assert not server.repos


@pytest.mark.full
def test_two_ranks_push_once(server, tmp_path):
    """One commit, of all weight files."""
    run_all([(2, ("--model", TINY, "--train_data", EXAMPLES, *SHORT, "--max_steps", 1, "--output_dir", "out",
                  "--push_to_hub", "me/model"))], tmp_path)
    assert len(server.commits) == 1 and "--n_gpus 2" in server.repos["me/model"]["README.md"].decode()
    step = tmp_path / "out/checkpoints/step_1"
    names = [name for name in os.listdir(step) if name.endswith(".safetensors")]
    assert len(names) == 2
    assert all(server.repos["me/model"][name] == (step / name).read_bytes() for name in names)
