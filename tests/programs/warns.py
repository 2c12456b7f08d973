"""A run that warns: warns.py [flags of sft.py], under torchrun

Planted: in each step, every rank raises the same warning, and all ranks except 0 raise a second one; in step 9, rank 0
prints "the ninth" to standard error. Answers to --sample_prompts have at most 12 tokens.
"""

import os
import sys
import warnings

import sft

lr_at = sft.lr_at
warnings.simplefilter("always")


def warn(step, *args):
    warnings.warn("a warning of the test")
    if os.environ["RANK"] != "0":
        warnings.warn("not of rank 0")
    elif step == 9:
        print("the ninth", file=sys.stderr)
    return lr_at(step, *args)


sft.lr_at, sft.samples.SAMPLE_TOKENS = warn, 12
sft.main()
