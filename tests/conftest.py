"""What the tests share: the project on sys.path, no hub, and one way to run the trainer inside the test's process."""

import json
import os
import sys
import tempfile

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, *(os.path.join(ROOT, "tests", name) for name in ("unit", "laws", "hostile", "docs"))]
os.environ["HF_HUB_OFFLINE"] = "1"  # transformers asks the hub for adapters even of a local directory
os.environ["HOME"] = tempfile.mkdtemp()  # an empty cache of tokenised data, for subprocesses too
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: tiny models gain nothing, and ranks share the cores


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="all layouts of the laws and all slow tests; three times as long")


def pytest_collection_modifyitems(config, items):
    given = {"full": config.getoption("--full"), "repo": "repo" in config.getoption("-m")}
    for item in items:
        for marker, option in ("full", "--full"), ("repo", "-m repo"):
            if item.get_closest_marker(marker) and not given[marker]:
                item.add_marker(pytest.mark.skip(reason=f"only with {option}"))


def pytest_configure(config):
    config.addinivalue_line("markers", "full: only with --full")
    config.addinivalue_line("markers", "repo: pins texts that a fork may change freely; only with -m repo")


@pytest.fixture
def train(tmp_path, monkeypatch):
    """A function: flags of sft.py -> its training lines in metrics.jsonl. Runs in tmp_path, into out/ unless told."""
    import sft

    def run(*flags, model="tiny", out="out"):
        monkeypatch.chdir(tmp_path)
        # the directory of tiny, not its name, with which configs/tiny.yaml would be applied
        directory = f"{ROOT}/models/tiny" if model == "tiny" else str(model)
        words = ["sft.py", "--model", directory, "--output_dir", out]
        words += ["--train_data", f"{ROOT}/data/example_sft.json"]
        monkeypatch.setattr(sys, "argv", words + [str(flag) for flag in flags])
        sft.main()
        with open(tmp_path / out / "metrics.jsonl", encoding="utf-8") as f:
            return [json.loads(line) for line in f]

    return run
