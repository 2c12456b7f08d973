"""Damage to checkpoints: writes that fail, files that are truncated, changed or swapped, and hostile files."""

import builtins
import errno
import json
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY, header
from safetensors.torch import save_file
from checkpoint_helpers import TIED, UNTIED, Run, listing, loaded, published

from disk import checkpoint, files, pretrained, writer
from screen.log import JsonLines
from settings import errors
from settings.errors import UserError

FAST = ("--lr", "1e-3", "--batch_size", "8", "--max_length", "128")
LATEST = Path("out", "checkpoints", "latest")


@pytest.fixture
def run(tmp_path):
    """A run of the tied model, bf16 on the disk, before its first save."""
    return Run(published(tmp_path / "base", TIED, torch.bfloat16), tmp_path / "checkpoints")


@pytest.fixture
def file_limit():
    """A function that limits the size of files, in bytes, to imitate a full disk. Reset after the test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Writes that fail


def fail_at(monkeypatch, count, code):
    """Let the count-th call that changes the disk fail with an error number, as the system would.

    Returns the log, [(call, path), ...].
    """
    log = []

    def path_of(name, args):
        if name == "write":
            return args[0].path
        if name in ("symlink", "replace"):
            return str(args[-1])
        if name == "fsync":
            return os.readlink(f"/proc/self/fd/{args[0]}")
        return str(args[0])

    def failing(operation, name):
        def wrapper(*args, **kwargs):
            if name == "open" and args[1:] != ("wb",) or name == "write" and args[0].size:  # a file's first write
                return operation(*args, **kwargs)
            path = path_of(name, args)
            log.append((name, path))
            if len(log) != count + 1:
                return operation(*args, **kwargs)
            filename = [path] if name != "fsync" else []  # the real error of os.fsync names no file
            raise OSError(code, os.strerror(code), *filename)
        return wrapper

    for holder, name in ((writer.TensorFile, "write"), (os, "fsync"), (os, "replace"), (os, "symlink"),
                         (os, "makedirs"), (shutil, "rmtree")):
        monkeypatch.setattr(holder, name, failing(getattr(holder, name), name))
    monkeypatch.setattr(files, "open", failing(builtins.open, "open"), raising=False)
    return log


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="paths of descriptors are in Linux's /proc")
def test_a_write_that_fails_costs_no_checkpoint(run, monkeypatch):
    """Whichever write fails: the error names the file, latest is a complete step before and after (also if that
    step is being saved again), and the next save leaves no temporary files."""
    run.save(1)
    with monkeypatch.context() as patch:
        log = fail_at(patch, -1, 0)
        run.save(1)
    assert {name for name, _ in log} == {
        "write", "fsync", "replace", "symlink", "makedirs", "rmtree", "open"}
    step = 1
    for is_saved_again in (False, True):
        for moment in range(len(log)):
            code = (errno.ENOSPC, errno.EROFS, errno.ESTALE, errno.EIO)[moment % 4]
            step += not is_saved_again
            with monkeypatch.context() as patch:
                tried = fail_at(patch, moment, code)
                try:
                    run.save(step)
                except OSError as error:
                    assert error.errno == code and str(error.filename) == tried[moment][1], tried[moment]
                else:
                    assert len(tried) <= moment, tried[moment]  # a new step takes fewer calls
            resumed = checkpoint.resume_directory("auto", run.root)
            checkpoint.verify(resumed)
            assert os.path.basename(resumed) in (f"step_{step}", f"step_{step - 1}")
            (run.root / "tmp_best").symlink_to("step_0")  # as a failed move of that link leaves it
            run.save(step)
            assert not [name for name in os.listdir(run.root) if name.startswith("tmp")]
            checkpoint.verify(checkpoint.resume_directory("auto", run.root))


@pytest.mark.parametrize("flags", [(), ("--async_save",)], ids=["", "async_save"])
def test_a_run_on_a_full_disk_ends_with_one_line_and_can_resume(train, file_limit, capsys, flags):
    """The line has the file, the error and the remedy; exit code 2. The run then resumes from the checkpoint before."""
    train(*FAST, "--max_steps", 1)
    capsys.readouterr()
    file_limit(3_000_000)
    with pytest.raises(SystemExit) as info:
        errors.run(lambda: train(*FAST, "--max_steps", 3, "--save_steps", 2, "--resume_from", "auto", *flags))
    file_limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"sft.py: error: out/checkpoints/tmp_step_2/training_state/tensors.safetensors: File too "
                        r"large; raise ulimit -f; --resume_from auto then continues from .*", line)
    lines = train(*FAST, "--max_steps", 3, "--resume_from", "auto")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert sorted(os.listdir("out/checkpoints")) == ["latest", "step_1", "step_2", "step_3"]  # --save_steps of the run


def test_a_line_that_does_not_fit_on_the_disk_is_an_error_and_is_removed(tmp_path, file_limit):
    """It leaves half a line in metrics.jsonl, which a resumed run removes. An error names any other damaged line."""
    path = str(tmp_path / "metrics.jsonl")
    lines = JsonLines(path, 0)
    file_limit(110)  # four lines and a half
    for step in range(1, 5):
        lines.write(step=step, loss=1.5)
    with pytest.raises(OSError, match=re.escape(path)):
        lines.write(step=5, loss=1.5)
    assert os.path.getsize(path) == 110
    JsonLines(path, 2)
    assert [json.loads(line)["step"] for line in open(path)] == [1, 2]
    os.remove(path)
    with pytest.raises(FileNotFoundError, match=re.escape(path)):
        lines.sync()
    for damaged in (b"\x00\n", b"\xff\n", b"[]\n", b'{"step": null}\n', b'{"step": tru\n'):
        with open(path, "wb") as f:
            f.write(b'{"step": 1}\n' + damaged)
        with pytest.raises(UserError, match=re.escape(f"{path}, line 2")):
            JsonLines(path, 2)


# Files that differ from what was saved


def refusal(directory):
    with pytest.raises(UserError, match="--resume_from") as info:
        checkpoint.verify(directory)
    return str(info.value)


def test_every_truncated_changed_or_swapped_file_is_named(run):
    """Each file of a step, and its manifest: truncated at 50 places, one of 200 bits flipped, replaced by the same
    file of the step before, or removed."""
    other, saved = run.save(1), run.save(2)
    checkpoint.verify(saved)
    generator, swapped, names = random.Random(0), set(), listing(saved)
    assert {"config.json", "model.safetensors", "tokenizer.json", "training_state/manifest.json",
            "training_state/state.json", "training_state/tensors.safetensors"} <= set(names)
    for name in names:
        path = Path(saved, name)
        intact, of_other_step = path.read_bytes(), Path(other, name).read_bytes()
        n_bytes = len(intact)
        damaged = [intact[:n] for n in generator.sample(range(n_bytes), min(50, n_bytes))]
        for n in generator.sample(range(8 * n_bytes), min(200, 8 * n_bytes)):
            damaged.append(intact[: n // 8] + bytes([intact[n // 8] ^ 1 << n % 8]) + intact[n // 8 + 1 :])
        for content in damaged:
            path.write_bytes(content)
            assert name in refusal(saved)
        if of_other_step != intact:
            path.write_bytes(of_other_step)
            assert name in refusal(saved)
            swapped.add(name)
        os.remove(path)
        assert name in refusal(saved)
        path.write_bytes(intact)
    assert swapped == {"model.safetensors", *(n for n in names if n.startswith("training_state/"))}
    checkpoint.verify(saved)


@pytest.mark.parametrize("content", ["[]", "null", '{"step": 1}', '{"step": 1, "files": [1]}', "{}"])
def test_a_malformed_manifest_is_refused(run, content):
    """Valid JSON, but not the manifest of a step."""
    saved = run.save(1)
    Path(saved, checkpoint.MANIFEST).write_text(content)
    assert "manifest.json is not as it was saved" in refusal(saved)


def test_a_directory_with_the_name_of_another_step_is_refused(run):
    """Pruning and the links go by the name. A copy with a name that is not step_N is accepted."""
    saved = run.save(1)
    shutil.copytree(saved, run.root / "copy")
    checkpoint.verify(str(run.root / "copy"))
    os.rename(saved, run.root / "step_2")
    assert "of step 1, not of step_2" in refusal(str(run.root / "step_2"))


def test_an_added_file_is_refused_if_it_would_be_read(run):
    """All safetensors files in training_state/ are read, so an additional one matters; a README does not."""
    saved = run.save(1)
    Path(saved, "README.md").write_text("mine")
    checkpoint.verify(saved)
    save_file({"a": torch.ones(1)}, Path(saved, "training_state", "tensors-2.safetensors"))
    assert "tensors-2.safetensors was added" in refusal(saved)


@pytest.mark.full
def test_two_ranks_share_the_files(train, tmp_path):
    """Each rank reads some of the files. The error names the damaged file, whichever rank reads it, and no other."""
    train(*FAST, "--max_steps", 1, model=TINY)
    for name in ("model.safetensors", "training_state/state.json"):
        path = tmp_path / LATEST / name
        intact = path.read_bytes()
        path.write_bytes(intact[:-1] + b"\x01")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                 f"{ROOT}/sft.py", "--model", "tiny", "--train_data", f"{ROOT}/data/example_sft.json", *FAST,
                 "--max_steps", "2", "--output_dir", str(tmp_path / "out"), "--resume_from", "auto"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode
        assert f"not as it was saved: {name} has changed" in result.stderr
        path.write_bytes(intact)


# Hostile files


@pytest.mark.parametrize("state", [
    "null", "[]", "7", '"step"', "{}",
    *(f'{{"step": {step}}}' for step in ("true", "-1", "0", "1.0", '"1"', "[1]"))])
def test_a_state_without_a_valid_step_is_refused(tmp_path, state):
    """Other JSON values, a missing step, and steps that are not positive integers."""
    (tmp_path / "training_state").mkdir()
    (tmp_path / "training_state" / "state.json").write_text(state)
    with pytest.raises(UserError, match="state.json: step must be"):
        checkpoint.load_state(str(tmp_path))


@pytest.mark.parametrize("updates", ["true", "-1", "1.0", '"1"', "[1]", "null"])
def test_a_state_with_invalid_updates_is_refused(tmp_path, updates):
    """The number of updates must be an integer of at least 0."""
    (tmp_path / "training_state").mkdir()
    (tmp_path / "training_state" / "state.json").write_text(f'{{"step": 7, "updates": {updates}}}')
    with pytest.raises(UserError, match="state.json: updates must be an integer of at least 0"):
        checkpoint.load_state(str(tmp_path))


@pytest.mark.parametrize("file", ["", ".", "..", "a\0.safetensors", "\ud800.safetensors", "a/b.safetensors",
                                  "a\\b.safetensors", "/x.safetensors", "pytorch_model.bin", ".safetensors",
                                  5000 * "a" + ".safetensors"])
def test_an_index_with_an_invalid_file_name_is_refused(tmp_path, file):
    """Paths, control characters, other endings, 5,000 characters. The error is short and printable."""
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(UserError, match="weight_map must name files") as info:
        pretrained.weight_entries(str(tmp_path))
    assert str(info.value).isprintable() and len(str(info.value)) < 1000


@pytest.mark.parametrize("content", [
    header([10**12], 4 * 10**12), header([10**12], 16), header([2**62, 2**62], 16), header([-4], 16),
    header([4.0], 16), header([4], -16), header([4], 16, 2**60), header([4], 16, 2**64 - 1)],
    ids=["elements", "elements-in-16-bytes", "overflow", "negative", "float", "offset", "exabytes",
         "minus-one"])
def test_a_header_that_claims_too_much_is_refused(tmp_path, content):
    """Immediately, before memory is allocated."""
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="model.safetensors is truncated or not safetensors"):
        pretrained.weight_entries(str(tmp_path))


def test_weights_behind_links_are_read_and_a_pipe_is_not(tmp_path):
    """The hub's cache consists of links into a directory of blobs. Reading a pipe would block forever."""
    home = tmp_path / "models--one--model"
    source, snapshot = published(home / "blobs", UNTIED), home / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for name in os.listdir(source):
        (snapshot / name).symlink_to(os.path.join("..", "..", "blobs", name))
    for p, expected in zip(loaded(snapshot)[0].parameters(), loaded(source)[0].parameters(), strict=True):
        assert torch.equal(p, expected)
    os.remove(snapshot / "model.safetensors")
    os.mkfifo(snapshot / "model.safetensors")
    writer = os.open(snapshot / "model.safetensors", os.O_RDWR)  # so that the test would fail, not block
    os.write(writer, bytes(16))
    with pytest.raises(UserError, match="model.safetensors is not a file"):
        pretrained.weight_entries(str(snapshot))
    os.close(writer)


class Bomb:
    """Creates a directory when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_beside_the_weights_is_never_opened(train, tmp_path):
    """In a model directory and in a checkpoint, under names that other trainers read."""
    mark, model = tmp_path / "mark", tmp_path / "model"
    bomb = pickle.dumps(Bomb(str(mark)))
    shutil.copytree(pretrained.model_directory("tiny"), model)
    for name in ("pytorch_model.bin", "training_args.bin", "consolidated.00.pth", "vocab.pkl"):
        (model / name).write_bytes(bomb)
    train(*FAST, "--max_steps", 1, model=model)
    for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt"):
        (tmp_path / LATEST / "training_state" / name).write_bytes(bomb)
        (tmp_path / LATEST / name).write_bytes(bomb)
    assert len(train(*FAST, "--max_steps", 2, "--resume_from", "auto", model=model)) == 2
    assert not mark.exists()
    for name in ("model.safetensors", "model.safetensors.index.json"):
        (model / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="has no model.safetensors; pytorch_model.bin is in a format that can run code"):
        train(*FAST, "--max_steps", 1, model=model, out="other")
    assert not mark.exists()
    pickle.loads(bomb)
    assert mark.exists()  # the bomb works


def test_nothing_that_can_run_code_is_called():
    """In any file outside tests/, including comments."""
    banned = re.compile(r"pickle|marshal|shelve|torch\.(load|save)\b|(?<!construct)_object(_list)?\(|np\.load\(|shell=True|"
                        r"os\.system|(?<![.\w])(eval|exec)\(|yaml\.(load\((?!.*BaseLoader)|unsafe_load\(|full_load\()|"
                        r"trust_remote_code=True")
    folders = ("", "disk", "families", "ops", "ranks", "screen", "settings", "text", "tools")
    sources = sorted(path for folder in folders for path in Path(ROOT, folder).glob("*.py"))
    assert len(sources) > 30
    breaches = [f"{path.name}:{i}: {line.strip()}" for path in sources
                for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
                if banned.search(line)]
    assert breaches == []
