"""A bug keeps its traceback, wherever it is; an error in the input is one line."""

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, TINY, VALIDATION, model_directory, run_all

PLACES = ("loop", "data", "checkpoint")
BUGS = {"unpack": "ValueError: too many values to unpack (expected 2)",
        "convert": "ValueError: invalid literal for int",
        "concatenate": "ValueError: all the input array dimensions|all the input arrays must have same number of dim"}
FLAGS = ("--train_data", VALIDATION, "--cache_dir", "none", "--max_steps", 1, "--batch_size", 1, "--max_length", 64,
         "--no-gradient_checkpointing")


@pytest.fixture(scope="module")
def ended(tmp_path_factory, half):
    """{(where, what): (exit code, standard error)} of runs of sft.py with an error planted there."""
    directory = tmp_path_factory.mktemp("errors")
    broken = model_directory(directory / "broken", change_tensors=lambda t: t["model.norm.weight"].fill_(math.nan))
    cases = [*itertools.product(PLACES, (*BUGS, "user_error", "missing_file")), ("none", "nan", "--model", str(broken))]
    (directory / "cases.json").write_text(json.dumps(cases))
    run_all([(0, ("planted_error", "cases.json", "--model", half, *FLAGS))], directory)
    codes = json.loads((directory / "codes.json").read_text())
    return {case[:2]: (code, (directory / f"{'.'.join(case[:2])}.err").read_text()) for case, code in zip(cases, codes)}


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("what", BUGS)
def test_a_bug_keeps_its_traceback(where, what, ended):
    """The traceback has file and line of the planted statement, and the exit code is 1."""
    code, screen = ended[where, what]
    assert code == 1 and screen.count("Traceback (most recent call last):") == 1
    assert re.search(rf'File ".*planted_error\.py", line \d+, in {what}\n', screen), screen
    assert any(f": {text}" in f": {screen.splitlines()[-1]}" for text in BUGS[what].split("|")), screen


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("what, line", [
    ("user_error", "sft.py: error: --planted 1: it must be 2"),
    ("missing_file", "sft.py: error: nowhere.txt: No such file or directory")])
def test_an_error_of_the_input_is_one_line(where, what, line, ended):
    """With exit code 2, wherever it is raised."""
    code, screen = ended[where, what]
    assert code == 2 and screen.startswith(line) and screen.count("\n") == 1, screen


def test_a_run_stopped_by_a_loss_that_is_not_finite_is_one_line(ended):
    """With exit code 1, as it may be neither the input nor a bug."""
    code, screen = ended["none", "nan"]
    assert code == 1 and screen.startswith("sft.py: error: step 1: loss nan") and screen.count("\n") == 1, screen


def test_a_run_whose_output_is_closed_continues(tmp_path):
    """With | head a run trains to its end and says once that its text is lost; --help ends quietly."""
    command = f"{sys.executable} -u {ROOT}/sft.py --model {TINY} {' '.join(map(str, FLAGS))} --output_dir out"
    ended = subprocess.run(["bash", "-c", f"set -o pipefail; {command} | head -n 1"], cwd=tmp_path, text=True,
                           capture_output=True, timeout=300)
    assert ended.returncode == 0 and ended.stderr.count("\n") == 1
    assert "standard output can't be written (Broken pipe)" in ended.stderr and "continues" in ended.stderr
    assert os.readlink(tmp_path / "out" / "checkpoints" / "latest") == "step_1"
    ended = subprocess.run(["bash", "-c", f"set -o pipefail; {sys.executable} {ROOT}/sft.py --help | head -n 1"],
                           cwd=tmp_path, text=True, capture_output=True)
    assert ended.returncode == 0 and ended.stderr == ""


def test_with_a_screen_that_is_gone_ctrl_c_saves(tmp_path):
    """`2>&1 | tee log` and Ctrl-C: tee ends first. The run saves and has the exit code of the signal."""
    flags = FLAGS[:-3] + ("--max_steps", 100_000, "--output_dir", "out")
    with subprocess.Popen([sys.executable, os.path.join(ROOT, "sft.py"), "--model", TINY, *map(str, flags)],
                          cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        process.stdout.close()
        metrics, limit = tmp_path / "out" / "metrics.jsonl", time.monotonic() + 60
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < limit:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    assert os.path.exists(tmp_path / "out" / "checkpoints" / "latest" / "model.safetensors")


STREAMS = """
import os, sys
sys.path.insert(0, sys.argv[1])
sys.argv[0] = sys.argv[2]
from settings import errors
def main():
    f = open("file", "w")
    print("×…é", flush=True)
    with errors.contextlib.suppress(OSError):
        os.write(2, b"a signal")
    raise errors.UserError("--lr x: it must be a number")
errors.run(main)
"""


@pytest.mark.parametrize("name", ["sft.py", "show.py"])
@pytest.mark.parametrize("closed, shown", [
    ("2>&-", "x...\\xe9"), (">&-", "a signal"), ("2>&- >&- <&-", ""), ("2>/dev/full >/dev/full", "")])
def test_a_stream_that_is_closed_or_full(name, closed, shown, tmp_path):
    """What is printed reaches no other file, and the exit code stays that of the error. ASCII output is plain."""
    if name == "show.py" and "full" in closed:
        return  # a tool whose output can't be written is of no use
    command = f"{sys.executable} -c '{STREAMS}' {ROOT} {name} {closed}"
    ended = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True,
                           env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert ended.returncode == 2 and (tmp_path / "file").read_text() == "", ended.stderr
    assert shown in ended.stdout + ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize("end, code", [("pass", 0), ("raise errors.UserError('wrong')", 2)])
def test_a_process_with_threads_of_gloo_skips_the_last_part_of_pythons_end(end, code):
    """In it, such a thread could abort the process. What is printed arrives, and functions of atexit are called."""
    lines = ["import atexit, sys", "from settings import errors", "class Late:",
             "    def __del__(self): print('late', flush=True)", "late = Late()", "def main():",
             "    errors.exits_at_once = True", "    atexit.register(print, 'registered')", "    print('printed')",
             f"    {end}", "errors.run(main)"]
    result = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (code, "printed\nregistered\n"), result.stderr
