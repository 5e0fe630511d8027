"""Every Triton kernel gives the reference's answer in Triton's interpreter, in fp16 and fp32, on every example it fits."""

import subprocess
import sys
from pathlib import Path

import pytest
from contest import kernels


@pytest.mark.interpreter
@pytest.mark.parametrize("kernel", kernels("triton"), ids=lambda k: k.id)
def test_agrees_with_reference(kernel):
    script = Path(__file__).with_name("interpreted_triton.py")
    done = subprocess.run([sys.executable, str(script), kernel.id, "1"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
