"""Processes that load a data file through the token cache at once: slow_tokenise.py N FILE MODEL CACHE

Each of the N processes is a fork of this one and prints the digest of the data. Planted: tokenising takes two more
seconds and prints MADE.
"""

import os
import sys
import time

import data
from text.template import ChatTokenizer

tokenise = data.tokenise


def slow(*args):
    print("MADE", flush=True)
    time.sleep(2)  # until the other processes have started
    tokenise(*args)


data.tokenise = slow
children = []
for _ in range(int(sys.argv[1])):
    children.append(os.fork())
    if children[-1] == 0:
        print(data.load(sys.argv[2], ChatTokenizer(sys.argv[3]), 64, cache_dir=sys.argv[4]).digest, flush=True)
        os._exit(0)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
