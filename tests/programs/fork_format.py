"""docs/fork.md, another data format: rows become these messages, and a run works. Starts in a copy that has
the change."""

import json

from helpers import TINY, metrics, sft_main

from text.formats import to_messages
from text.sources import read_files

row = {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada.", "category": "closed_qa"}
with open("dolly.jsonl", "w", encoding="utf-8") as f:
    f.write(json.dumps(row) + "\n" + json.dumps({**row, "context": ""}) + "\n")
found = [to_messages(row, where) for where, row in read_files("dolly.jsonl")]
assert [m[0]["content"] for m in found] == ["Ada wrote it.\n\nWho?", "Who?"]
assert [m[1]["content"] for m in found] == ["Ada.", "Ada."]
sft_main("--model", TINY, "--train_data", "dolly.jsonl", "--cache_dir", "none", "--max_steps", 1,
         "--no-gradient_checkpointing", "--output_dir", "out")
assert metrics("out")[0]["target_tokens"] > 4
