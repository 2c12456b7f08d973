"""A run of very many small steps leaves nothing behind in the process, however long it goes on.

    python tests/hostile/long_run.py [--steps 20000]

Trains the embedded model on short conversations, with evaluations and checkpoints in between. Prints one JSON line:
resident memory, open files and steps a second of each quarter. Fails unless memory in the last quarter is within 1 % of
the second's, files are no more than at first, each step has its line, and the speed does not fall by a tenth.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
import sft  # noqa: E402
from screen.log import Log  # noqa: E402


def watch(samples, every):
    """Note (resident bytes, open files, seconds since the last note) after every so many steps."""
    step, then = Log.step, [time.perf_counter()]

    def watched(self, number, **values):
        step(self, number, **values)
        if number % every == 0:
            with open("/proc/self/statm", encoding="ascii") as f:
                resident = int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            now = time.perf_counter()
            samples.append((resident, len(os.listdir("/proc/self/fd")), now - then[0]))
            then[0] = now

    Log.step = watched


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20000)
    steps, samples = parser.parse_args().steps, []
    every, between = max(1, steps // 400), min(500, steps // 4)
    watch(samples, every)
    with tempfile.TemporaryDirectory() as directory:
        rows, out = os.path.join(directory, "rows.jsonl"), os.path.join(directory, "out")
        with open(rows, "w", encoding="utf-8") as f:
            for i in range(64):
                f.write(json.dumps({"prompt": f"{i}?", "response": str(i * i)}) + "\n")
        sys.argv = ["sft.py", "--model", os.path.join(ROOT, "models", "tiny"), "--train_data", rows, "--val_data", rows, "--output_dir", out,
                    "--max_steps", str(steps), "--batch_size", "2", "--max_length", "64", "--lr", "1e-3",
                    "--no-gradient_checkpointing", "--keep_checkpoints", "2", *(
                        word for name in ("eval_steps", "save_steps") for word in (f"--{name}", str(between)))]
        sft.main()
        with open(os.path.join(out, "metrics.jsonl"), encoding="utf-8") as f:
            lines = [json.loads(line) for line in f]
    quarters = [samples[len(samples) * i // 4 : len(samples) * (i + 1) // 4] for i in range(4)]
    memory, files, seconds = ([column(q) for q in quarters] for column in (
        lambda q: statistics.mean(s[0] for s in q), lambda q: max(s[1] for s in q),
        lambda q: statistics.median(s[2] for s in q)))  # a median: the machine may have had something else to do
    print(json.dumps({"steps": steps, "resident_mib": [round(m / 2**20, 1) for m in memory], "files": files,
                      "steps_per_second": [round(every / s, 1) for s in seconds]}))
    trained = [line["step"] for line in lines if "loss" in line]
    assert trained == list(range(1, steps + 1)), "steps are missing in metrics.jsonl, or there twice"
    assert [line["step"] for line in lines if "val_loss" in line] == list(range(between, steps + 1, between))
    assert files[3] <= files[0], f"open files rise: {files}"
    if steps >= 2000:  # before, caches are still being filled
        assert abs(memory[3] / memory[1] - 1) <= 0.01, f"memory is not flat: {memory}"
        assert seconds[3] <= 1.1 * seconds[0], f"it slows down: {seconds}"


if __name__ == "__main__":
    main()
