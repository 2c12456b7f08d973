"""Measures the memory of loading: loading_memory.py MODEL

No fault is planted. Prints the number of parameters, then the peak memory in bytes after reading the embedding alone,
then after loading the model.
"""

import re
import sys

import torch

from disk import files, pretrained
from families.config import ModelConfig
from model import CausalLM


def status(key):
    """A figure of /proc/self/status in bytes. Unlike ru_maxrss, VmHWM does not start at the parent's peak."""
    with open("/proc/self/status", encoding="utf-8") as f:
        return int(re.search(key + r":\s+(\d+) kB", f.read())[1]) * 1024


torch.set_num_threads(2)
config = ModelConfig.from_dict(files.read_json(sys.argv[1] + "/config.json"))
before = status("VmRSS")
embedding = pretrained.weight_entries(sys.argv[1])["model.embed_tokens.weight"]
pretrained.read_into(embedding, torch.empty(embedding.shape))
alone = status("VmHWM") - before
with torch.device("meta"):
    model = CausalLM(config)
model.to_empty(device="cpu")
model.tie_weights()
pretrained.load_weights(model, sys.argv[1])
print(sum(p.numel() for p in model.parameters()), alone, status("VmHWM") - before)
