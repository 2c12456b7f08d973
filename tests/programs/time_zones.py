"""sft.py on ranks in different time zones, given with commas: time_zones.py ZONES [flags]

Each rank prints the prompt of the first conversation. Etc/GMT+12 and Etc/GMT-14 never have the same date: they differ
by 26 hours. No fault is planted.
"""

import datetime
import os
import sys
import time

import data
import sft

rank, load = int(os.environ["RANK"]), data.load
os.environ["TZ"] = sys.argv.pop(1).split(",")[rank]
time.tzset()


def printing(spec, tokenizer, *args, **options):
    dataset = load(spec, tokenizer, *args, **options)
    prompt = tokenizer.tokenizer.decode(dataset.tokens[: dataset.loss_mask.argmax()].tolist())
    print(f"RANK {rank}, {datetime.date.today()} here: {prompt!r}", flush=True)
    return dataset


data.load = printing
sft.main()
