"""Loads a data file through the token cache and prints the digest of the data: slow_tokenise.py FILE MODEL CACHE

Planted: tokenising takes two more seconds and prints MADE.
"""

import sys
import time

import data
from text.template import ChatTokenizer

tokenise = data.tokenise


def slow(*args):
    print("MADE")
    time.sleep(2)  # until the other processes have started
    tokenise(*args)


data.tokenise = slow
print(data.load(sys.argv[1], ChatTokenizer(sys.argv[2]), 64, cache_dir=sys.argv[3]).digest)
