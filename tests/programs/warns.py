"""A run that warns: warns.py [flags of sft.py], under torchrun.

Planted: each step warns on every rank, each step on all ranks but 0 warns of something else, and rank 0 prints "the
ninth" to standard error in step 9; answers to --sample_prompts have 12 tokens at most.
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
