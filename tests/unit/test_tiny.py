"""models/tiny is what tests/make_tiny.py writes."""

import filecmp
import os
import subprocess
import sys

import pytest
from helpers import TESTS, TINY


@pytest.mark.repo
def test_the_embedded_model_is_made_again_byte_for_byte(tmp_path):
    subprocess.run([sys.executable, os.path.join(TESTS, "make_tiny.py"), "again"], cwd=tmp_path, check=True)
    made = sorted(os.listdir(tmp_path / "again"))
    assert made == sorted(os.listdir(TINY))
    assert filecmp.cmpfiles(TINY, tmp_path / "again", made, shallow=False) == (made, [], [])
