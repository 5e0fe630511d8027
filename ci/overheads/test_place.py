"""What klab place takes over 4 chips x 3 tensor-parallel sizes (aim: below 10 s on 2 cores), with everything that it answers.

pytest ci/overheads/test_place.py --benchmark-enable --benchmark-columns=min,mean,rounds

The second case needs published tables (pip install -e '.[reference]', or KLAB_REFERENCE): three of the chips are then estimated from these.
"""

from __future__ import annotations

import os

import pytest

from klab.harness.catalog import find_chip, find_model
from klab.harness.catalog.models import PROFILES
from klab.harness.cost.place import Demand
from klab.harness.cost.placement import Answer, Question, place
from klab.harness.cost.ranges import Range
from klab.harness.cost.sources import estimator_for
from klab.harness.cost.staffing import Terms
from klab.harness.cost.workload import Workload
from klab.harness.store.reference import available

CHIPS = ("h100", "h200", "b200", str(PROFILES / "examples" / "decode-card.toml"))
USD_PER_GPU_HOUR = (3.18, 4.24, 7.25, 3.0)


@pytest.mark.parametrize("tables", [False, True], ids=["modelled", "published tables"])
def test_four_chips_three_sizes(tables: bool, benchmark) -> None:
    if tables and available() is None:
        pytest.skip("no published tables are installed: pip install -e '.[reference]'")
    chips = [find_chip(name) for name in CHIPS]
    terms = {chip.name: Terms(Range(0.5 * usd, usd, 2 * usd), 2.0) for chip, usd in zip(chips, USD_PER_GPU_HOUR, strict=True)}
    asked = Demand(Workload(8192, 1024, slo_ttft_s=2.0, slo_tpot_s=0.025), 20.0)
    question = Question(find_model("qwen3-32b"), chips, asked, terms, tps=(2, 4, 8))

    def whole() -> Answer:
        # Fresh estimators: reading the tables counts.
        estimators = {chip.name: estimator_for(chip, results=[], reference=None if tables else False) for chip in chips}
        return place(question, estimators, os.cpu_count() or 1)

    answer = benchmark.pedantic(whole, rounds=2)
    assert answer.ranking.compared == 3 * 3 + 9 * 12 and answer.ranking.winner is not None and len(answer.sensitivities) == 9
