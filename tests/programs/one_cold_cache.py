"""sft.py with a cache of tokenised data for each rank, as on several nodes: one_cold_cache.py PLANTED [flags]

Rank R's home directory is ./home_R. Planted in tokenising, so only where the cache is cold: PLANTED is `nothing`, `slow`
(seven seconds, with progress) or `stuck` (no progress).
"""

import os
import sys
import time

import data
import sft

tokenise = data.tokenise
os.environ["HOME"] = os.path.abspath(f"home_{os.environ['RANK']}")
planted = sys.argv.pop(1)


def planted_tokenise(spec, sources, tokenizer, options, directory, progress=None):
    print("TOKENISES", os.environ["RANK"], flush=True)
    if planted == "stuck":
        time.sleep(60)
    for _ in range(70 if planted == "slow" else 0):
        time.sleep(0.1)
        progress()
    tokenise(spec, sources, tokenizer, options, directory, progress)


data.tokenise = planted_tokenise
sft.main()
