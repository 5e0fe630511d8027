"""How long `klab cost` takes from the shell, start of Python included (aim: below 2 s on two cores).

pytest ci/overheads/test_cost_verb.py --benchmark-enable --benchmark-columns=median,min,max,rounds -s

With published tables where they are installed, or where KLAB_REFERENCE names them.
"""

import os
import subprocess
import sys

import pytest

from klab.harness.store.reference.tables import available

CASES = {
    "llama-3.1-70b, --tp auto": ["-m", "llama-3.1-70b"],
    "deepseek-v3, --tp auto": ["-m", "deepseek-v3"],
    "gpt-oss-120b, --tp auto": ["-m", "gpt-oss-120b"],
    "llama-3.1-8b, speculation": ["-m", "llama-3.1-8b", "--draft", "3"],
    "flux.1-dev": ["-m", "flux.1-dev"],
}


@pytest.mark.parametrize("reference", ["no", "yes"], ids=["modelled", "published tables"])
@pytest.mark.parametrize("case", list(CASES))
def test_cost_verb(case, reference, benchmark) -> None:
    if reference == "yes" and available() is None:
        pytest.skip("no published tables are here (pip install -e '.[reference]')")
    line = [sys.executable, "-m", "klab.harness.cli", "cost", "-c", "h200", *CASES[case], "--reference", reference, "--json"]

    def run() -> None:
        done = subprocess.run(line, env=os.environ | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True)
        assert done.returncode in (0, 1) and done.stdout.splitlines()[-1].startswith('{"type": "answer"'), done.stderr

    benchmark.pedantic(run, rounds=3, iterations=1)
