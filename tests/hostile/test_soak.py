"""A run that is killed and resumed gives bitwise the result of one that is not: tests/hostile/soak.py, shortened."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.mark.full  # .ci/run has the shorter one; without --full test_sft and test_signals kill and stop runs
@pytest.mark.parametrize("kills, flags", [(6, ()), (60, ()), (60, ("--", "--async_save"))])
def test_kills_change_nothing(kills, flags):
    """6 kills: one in each phase, on one rank or on two. 60: also while a checkpoint is written and before each
    call that publishes it."""
    result = subprocess.run([sys.executable, os.path.join(ROOT, "tests", "hostile", "soak.py"), "--kills", str(kills),
                             *flags], capture_output=True, text=True, timeout=900)
    print(result.stdout)
    assert result.returncode == 0, result.stderr[-2000:]
