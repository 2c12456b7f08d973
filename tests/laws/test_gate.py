"""Nodes that differ are refused before the first step: one line that names what differs, and the ranks (ranks/gate.py)."""

import json
import shutil

import pytest
from helpers import TINY, VALIDATION, model_directory, run_all

import sft
from ranks import gate

FLAGS = ("--train_data", VALIDATION, "--cache_dir", "none", "--max_steps", "2", "--batch_size", "2",
         "--max_length", "64", "--no-gradient_checkpointing", "--timeout", "60")
# {name: (more flags of rank 1, what else is changed there, what the line names)}
CASES = {
    "lr": (("--lr", "3e-5"), {}, "--lr 3e-05, not 2e-05"),
    "tp": (("--strategy", "megatron", "--tp", "2"), {}, "--strategy megatron, not fsdp; --tp 2, not 1"),
    "data": (("--train_data", "changed.jsonl"), {}, "another training data"),
    "model": (("--model", "changed_model"), {}, "another model"),
    "code": ((), {"ranks.gate.PROJECT": "changed_code"}, "another sft.py"),
    "directory": (("--output_dir", "mine"), {}, "--output_dir: rank 0's run.lock is not in it"),
    "same": ((), {}, None),
    "renamed": (("--train_data", "renamed.jsonl", "--model", "renamed_model"), {}, None),
    "validation": (("--val_data", VALIDATION), {}, "--val_data given, not none"),
    "resume": (("--resume_from", "auto"), {}, "--resume_from given, not none"),
    "torch": ((), {"torch.__version__": "2.0"}, "torch 2.0, not 2."),
    "config": (("--model", "changed_config"), {}, "another config.json"),
    "many": (("--lr", "1", "--seed", "1", "--epochs", "7", "--beta1", "0.5", "--beta2", "0.5", "--weight_decay", "0.5",
              "--grad_clip", "2"), {}, "; 2 more. All nodes need the same"),
}
SLOW = ("same", "renamed", "tp", "validation", "torch", "config", "many")  # with --full


@pytest.fixture(scope="module")
def ended(tmp_path_factory, request):
    """{name: (exit codes of the two ranks, their standard errors)}"""
    directory = tmp_path_factory.mktemp("differing")
    with open(VALIDATION, encoding="utf-8") as f:
        text = f.read()
    (directory / "renamed.jsonl").write_text(text)
    (directory / "changed.jsonl").write_text(text.replace(" the ", " a ", 1))
    model_directory(directory / "renamed_model")
    model_directory(directory / "changed_model", change_tensors=lambda t: t["model.embed_tokens.weight"][0].add_(1))
    model_directory(directory / "changed_config", {"rms_norm_eps": 1e-5})
    shutil.copytree(gate.PROJECT, directory / "changed_code",
                    ignore=shutil.ignore_patterns(".git", ".venv", "tests", "__pycache__", "data", "models", "docs"))
    with open(directory / "changed_code" / "sft.py", "a", encoding="utf-8") as f:
        f.write("# changed\n")
    cases = [{"name": name, "flags": flags, "patch": patch} for name, (flags, patch, _) in CASES.items()
             if name not in SLOW or request.config.getoption("--full")]
    (directory / "cases.json").write_text(json.dumps(cases))
    run_all([(0, ("differing_ranks", "cases.json", "--model", TINY, "--lr", "2e-5", *FLAGS))], directory)
    codes = json.loads((directory / "codes.json").read_text())
    return {name: (codes[name], [(directory / f"{name}.{rank}.err").read_text() for rank in range(2)])
            for name in codes}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.full) if name in SLOW else name
                                  for name in CASES])
def test_ranks_that_differ_are_refused_in_one_line(name, ended):
    """Exit code 2 on both. The same content under another path is the same."""
    codes, screens = ended[name]
    named = CASES[name][2]
    if named is None:
        assert codes == [0, 0], screens
        return
    assert codes == [2, 2]
    for screen in screens:  # one for each node
        assert screen.startswith("sft.py: error: rank ") and named in screen and screen.count("\n") == 1, screen
    assert any(screen.startswith("sft.py: error: rank 1 (on ") for screen in screens)


def test_the_line_names_all_ranks_that_differ_alike():
    answers = [{"host": f"n{rank // 2}", "values": {"--lr": "1" if rank < 2 else "2", "sft.py": ":a"}} for rank in range(4)]
    assert gate.describe(answers) == ("ranks 2, 3 (on n1) and rank 0 (on n0) differ: --lr 2, not 1. All nodes need the "
                                      "same")
    assert gate.describe(answers[:2]) == ""


def test_settings_are_shown_as_they_are_typed():
    values = gate.program(sft.Config())
    assert [values[f"--{name}"] for name in ("dtype", "packing", "epochs")] == ["none", "true", "3"]


def test_every_file_of_the_trainer_is_compared():
    code = gate.code()
    assert {"sft.py", "model.py", "ops/loss.py", "ranks/gate.py"} <= code.keys()
    assert not any(name.startswith("tests") for name in code)
