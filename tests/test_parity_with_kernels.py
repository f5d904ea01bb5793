"""The parity tests again, with support/kernels.py in the place of the plain classes."""

import subprocess
import sys

import pytest
from conftest import ROOT

FILES = [f"tests/test_{name}.py" for name in ("model", "vit", "paligemma", "fusion", "lora")]


@pytest.mark.slow
@pytest.mark.plain_only
def test_kernels_pass_the_parity_tests():
    command = [sys.executable, "-m", "pytest", "--kernels", "-q", "-m", "not slow", *FILES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
