"""The project and tests/ on sys.path, no hub, and one way to run the trainer inside the test's process."""

import gc
import os
import signal
import sys
import tempfile

import pytest

TESTS = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(TESTS), TESTS]
os.environ["HF_HUB_OFFLINE"] = "1"  # transformers asks the hub for adapters even of a local directory
os.environ["HOME"] = tempfile.mkdtemp()  # an empty cache of tokenised data, for subprocesses too
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: threads do not help tiny models
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no pool of processes, which import torch each
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"  # nor ten of them that try the CPU's instructions
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's & does that; the tests send interrupts
    signal.signal(signal.SIGINT, signal.default_int_handler)
pytest.register_assert_rewrite("helpers")
from helpers import EXAMPLES, TINY, metrics  # noqa: E402

# each option is a marker too: tests with that marker are skipped without the option
OPTIONS = {"full": "all layouts of the laws and all slow tests: three times as long",
           "repo": "tests of this repository's own prose, sizes and diffs, which a fork need not pass"}


def pytest_addoption(parser):
    for name, text in OPTIONS.items():
        parser.addoption(f"--{name}", action="store_true", help=f"also run {text}")


def pytest_collection_modifyitems(config, items):
    for name in OPTIONS:
        skip = pytest.mark.skip(reason=f"only with --{name}")
        for item in items:
            if item.get_closest_marker(name) and not config.getoption(f"--{name}"):
                item.add_marker(skip)


def pytest_configure(config):
    for name, text in OPTIONS.items():
        config.addinivalue_line("markers", f"{name}: {text}; skipped unless --{name} is given")


@pytest.fixture
def one_thread():
    """With tensors this small, waiting for a second thread costs more than it saves: six times more when busy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def objects_that_stay():
    """Exclude what exists before a file's tests from gc.collect(), which each sft.train() calls: modules, tests and
    session fixtures are a million objects, and to look at all of them takes half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def addmm_on_meta():
    """torch.addmm with out_dtype on device meta, as the loss calls it. torch 2.11 takes the dtype for beta there; its
    function of CUDA is right."""
    import torch

    library = torch.library.Library("aten", "IMPL")
    if torch.__version__ < "2.13":
        library.impl("addmm.dtype_out", lambda *_, out, **__: out, "Meta", allow_override=True)
    return library  # when it is freed, the function is, too


@pytest.fixture(scope="session")
def half(tmp_path_factory):
    """The directory of models/tiny with the first two of its four layers: a step takes two thirds of the time."""
    from helpers import model_directory

    def cut(tensors):
        for name in [name for name in tensors if ".layers.2." in name or ".layers.3." in name]:
            del tensors[name]

    return model_directory(tmp_path_factory.mktemp("half") / "model", {"num_hidden_layers": 2}, cut)


@pytest.fixture
def train(tmp_path, monkeypatch, half):
    """A function: flags of sft.py -> the lines of its metrics.jsonl. Runs in tmp_path; `out` is --output_dir.

    The model is `half` unless another one is given.
    """
    import sft

    def run(*flags, model=half, out="out"):
        monkeypatch.chdir(tmp_path)
        words = ["sft.py", "--model", str(model), "--output_dir", out, "--train_data", EXAMPLES]
        monkeypatch.setattr(sys, "argv", words + [str(flag) for flag in flags])
        sft.main()
        return metrics(tmp_path / out)

    return run
