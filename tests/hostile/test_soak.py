"""A run that is killed in each phase comes out as one that is not, to the bit: tests/hostile/soak.py, a short one."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.mark.full  # .ci/run has the short one; by default test_sft and test_signals kill and stop runs
@pytest.mark.parametrize("kills", [6, 60])
def test_kills_change_nothing(kills):
    """Each phase is hit, on one rank or on two; with --full each move that makes a checkpoint as well."""
    result = subprocess.run([sys.executable, os.path.join(ROOT, "tests", "hostile", "soak.py"), "--kills", str(kills)],
                            capture_output=True, text=True, timeout=900)
    print(result.stdout)
    assert result.returncode == 0, result.stderr[-2000:]
