"""What `klab.kernels.apply` adds to a call of a kernel, once its launch is built (aim: below 5 us).

pytest ci/overheads/test_apply_overhead.py --benchmark-enable --benchmark-columns=median,iqr,rounds
"""

import json

import pytest

from klab.harness.catalog import find_chip
from klab.harness.choose.decide import limits_of
from klab.harness.choose.profile import SCHEMA
from klab.kernels import apply
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.discover import discover
from klab.kernels.matmul.problem import Matmul

BUCKETS = (1, 8, 32, 128, 512, 2048, 8192)


@pytest.fixture(scope="module")
def tuned():
    kernels = discover(only=("matmul", "decode_attention")).kernels

    def choice(problem, kernel):
        found = kernels[kernel]
        wanted = {"problem": problem.to_json(), "label": problem.label()}
        config = found.default(problem, find_chip("cpu")).to_json_full()
        return {"wanted": wanted, "kernel": kernel, "config": config, "source_digest": found.source_digest}

    choices = [choice(Matmul(m, 4096, 4096), "matmul/torch_matmul") for m in BUCKETS]
    choices += [choice(DecodeAttention((4096,) * batch, 32, 8, 128), "decode_attention/cpu_split_kv") for batch in (1, 32, 128)]
    return apply(json.loads(json.dumps({"schema": SCHEMA, "choices": choices, "limits": limits_of(find_chip("cpu"))})))


@pytest.mark.parametrize(
    "make", [lambda: Matmul(20, 4096, 4096), lambda: DecodeAttention((4096,) * 128, 32, 8, 128)], ids=["matmul", "decode of 128 sequences"]
)
@pytest.mark.parametrize("kept", [True, False], ids=["problem kept", "problem made in the call"])
def test_finding_the_launch(tuned, make, kept, benchmark) -> None:
    problem = make()
    tuned.launch(problem)
    benchmark((lambda: tuned.launch(problem)) if kept else (lambda: tuned.launch(make())))


def test_building_a_launch_for_a_new_size(tuned, benchmark) -> None:
    sizes = iter(range(1, 1_000_000))
    benchmark.pedantic(lambda: tuned.launch(Matmul(next(sizes), 4096, 4096)), rounds=200)
