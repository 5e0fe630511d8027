"""Every Triton kernel gives the reference's answer in Triton's interpreter, in fp16 and fp32, on every example it fits."""

import subprocess
import sys
from pathlib import Path

import pytest
from contest import kernels

# One process per operator: starting one costs 5 s, and the variable that switches the interpreter on is read at import.
OPERATORS = sorted({kernel.problem_type.operator for kernel in kernels("triton")})


@pytest.mark.interpreter
@pytest.mark.parametrize("operator", OPERATORS)
def test_agrees_with_reference(operator):
    script = Path(__file__).with_name("interpreted_triton.py")
    done = subprocess.run([sys.executable, str(script), operator, "1"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
