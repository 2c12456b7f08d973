"""models/tiny is the output of tests/make_tiny.py."""

import filecmp
import os
import subprocess
import sys

import pytest
from helpers import TESTS, TINY


@pytest.mark.repo
def test_make_tiny_reproduces_the_embedded_model_byte_for_byte(tmp_path):
    subprocess.run([sys.executable, os.path.join(TESTS, "make_tiny.py"), "again"], cwd=tmp_path, check=True)
    names = sorted(os.listdir(tmp_path / "again"))
    assert names == sorted(os.listdir(TINY))
    assert filecmp.cmpfiles(TINY, tmp_path / "again", names, shallow=False) == (names, [], [])
