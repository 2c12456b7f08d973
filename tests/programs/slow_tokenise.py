"""Loads a data file through the token cache: slow_tokenise.py FILE MODEL CACHE prints the digest of the data.

Planted: tokenising takes two seconds more, and prints MADE.
"""

import sys
import time

import data
from text.template import ChatTokenizer

tokenise = data.tokenise


def slow(*arguments):
    print("MADE")
    time.sleep(2)  # until the others have started, too
    tokenise(*arguments)


data.tokenise = slow
print(data.load(sys.argv[1], ChatTokenizer(sys.argv[2]), 64, cache_dir=sys.argv[3]).digest)
