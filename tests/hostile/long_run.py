"""A run of very many small steps needs constant memory, open files and time per step.

    python tests/hostile/long_run.py [--steps 20000]

Trains the tiny model on short conversations, with evaluations and checkpoints in between. Prints one JSON line with
resident memory, open files and steps per second of each quarter. Fails if memory in the last quarter differs by more
than 1 % from the second quarter, open files increase, a step has no line in metrics.jsonl, or the speed falls by 10 %.
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
    """After every `every` steps, append (resident bytes, open files, seconds since the last sample) to `samples`."""
    record, last = Log.record, time.perf_counter()

    def watched(self, number, values):
        nonlocal last
        record(self, number, values)
        if number % every == 0:
            with open("/proc/self/statm", encoding="ascii") as f:
                resident = int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            now = time.perf_counter()
            samples.append((resident, len(os.listdir("/proc/self/fd")), now - last))
            last = now

    Log.record = watched


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
        sys.argv = ["sft.py", "--model", os.path.join(ROOT, "models", "tiny"), "--train_data", rows,
                    "--val_data", rows, "--output_dir", out, "--max_steps", str(steps), "--batch_size", "2",
                    "--max_length", "64", "--lr", "1e-3", "--no-gradient_checkpointing", "--keep_checkpoints", "2",
                    "--eval_steps", str(between), "--save_steps", str(between)]
        sft.main()
        with open(os.path.join(out, "metrics.jsonl"), encoding="utf-8") as f:
            lines = [json.loads(line) for line in f]
    quarters = [samples[len(samples) * i // 4 : len(samples) * (i + 1) // 4] for i in range(4)]
    memory = [statistics.mean(resident for resident, _, _ in quarter) for quarter in quarters]
    files = [max(n_files for _, n_files, _ in quarter) for quarter in quarters]
    # the median, as other processes may have used the machine for some time
    seconds = [statistics.median(duration for _, _, duration in quarter) for quarter in quarters]
    print(json.dumps({"steps": steps, "resident_mib": [round(m / 2**20, 1) for m in memory], "files": files,
                      "steps_per_second": [round(every / s, 1) for s in seconds]}))
    trained = [line["step"] for line in lines if "loss" in line]
    assert trained == list(range(1, steps + 1)), "metrics.jsonl lacks steps or has some twice"
    assert [line["step"] for line in lines if "val_loss" in line] == list(range(0, steps + 1, between))
    assert files[3] <= files[0], f"open files increase: {files}"
    if steps >= 2000:  # in shorter runs, caches are still growing
        assert abs(memory[3] / memory[1] - 1) <= 0.01, f"memory is not constant: {memory}"
        assert seconds[3] <= 1.1 * seconds[0], f"steps become slower: {seconds}"


if __name__ == "__main__":
    main()
