"""docs/fork.md, another data format: rows become these messages, and a run works. Starts in a copy that has
the change."""

import json

from helpers import TINY, metrics, sft_main

from text.formats import read_row
from text.sources import read_files

row = {"turns": ["Who?", "Ada.", "When?", "In 1843."], "system": "Be brief.", "source": "web"}
with open("turns.jsonl", "w", encoding="utf-8") as f:
    f.write(json.dumps(row) + "\n" + json.dumps({"turns": row["turns"][:2]}) + "\n")
found = [read_row(row, where) for where, row in read_files("turns.jsonl")]
assert [m["content"] for m in found[0].messages] == ["Be brief.", "Who?", "Ada.", "When?", "In 1843."]
assert [m["role"] for m in found[0].messages] == ["system", "user", "assistant", "user", "assistant"]
assert found[0].unused == ("source",) and len(found[1].messages) == 2
sft_main("--model", TINY, "--train_data", "turns.jsonl", "--cache_dir", "none", "--max_steps", 1,
         "--no-gradient_checkpointing", "--output_dir", "out")
assert metrics("out")[0]["target_tokens"] > 4
