"""What pictures and hours of speech cost: held against the arithmetic done by hand."""

import dataclasses
import math

import pytest

from klab.harness.catalog.chips import find_chip
from klab.harness.catalog.models import find_model
from klab.harness.catalog.prices import Price
from klab.harness.cost.answer import Question
from klab.harness.cost.estimate import Estimator
from klab.harness.cost.explain import spent, unit_command
from klab.harness.cost.ranges import ZERO
from klab.harness.cost.single_pass import Task
from klab.harness.cost.units import answer_units, unit_money
from klab.kernels.errors import UsageError

H200 = find_chip("h200")
PRICE = Price("h200", "given", 2.0, 3.0, 5.0, "2026-11", "here", "given")


def test_pictures():
    flux = find_model("flux.1-dev")
    question = Question(flux, H200, tps=(1, 2), price=PRICE, sell_unit=0.02, host_us=ZERO)
    found = answer_units(question, Task(denoise_steps=10), Estimator(H200), [PRICE])
    p, money = found.point, found.money
    assert found.feasible and p.unit == "image" and found.label == "modelled"
    assert money.usd_per_unit.mid == pytest.approx(3.0 * p.deployment.tp / 3600 / p.units_per_s.mid)
    assert money.gross_margin.mid == pytest.approx(1 - money.usd_per_unit.mid / 0.02)
    assert money.megawatt == "GPU boards" and found.contracts[0][1].usd_per_unit == money.usd_per_unit
    # A batch a hundred times slower for less than a hundredth of the cost is not chosen.
    cheapest = min(found.money_of(q).usd_per_unit.mid for o in found.options for q in o.points)
    assert cheapest <= money.usd_per_unit.mid <= cheapest * 1.011
    slower = [q for o in found.options for q in o.points if q.latency_s.mid < p.latency_s.mid]
    assert all(found.money_of(q).usd_per_unit.mid > cheapest * 1.0099 for q in slower)
    assert (
        unit_command(p, "flux.1-dev", "h200") == f"klab run --model flux.1-dev --chip h200 --isl 4096 --tp 1 --with prefill_batch={p.batch}"
    )
    parts = spent(p)
    assert sum(s.seconds.mid for s in parts) == pytest.approx(1 / p.units_per_s.mid)
    assert sum(s.joules.mid for s in parts) == pytest.approx(p.joules_per_unit.mid)
    hurried = answer_units(dataclasses.replace(question, objective="latency"), Task(denoise_steps=10, slo_s=1e-3), Estimator(H200))
    assert not hurried.feasible and hurried.point.batch == 1 and hurried.point.deployment.tp == 2
    idle = answer_units(question, Task(denoise_steps=10, utilisation=0.25), Estimator(H200))
    assert idle.money.usd_per_unit.mid == pytest.approx(4 * money.usd_per_unit.mid, rel=0.02)
    small = dataclasses.replace(H200, memory_bytes=int(10e9))
    lacks = answer_units(dataclasses.replace(question, chip=small), Task(), Estimator(small))
    assert lacks.point is None and not lacks.feasible and "GB of weights" in lacks.options[0].why_not
    with pytest.raises(UsageError, match="dollars per image"):
        unit_money(p, PRICE, sell=-1.0)


def test_an_hour_of_speech():
    found = answer_units(Question(find_model("whisper-large-v3"), H200, tps=(1,), price=PRICE, host_us=ZERO), Task(), Estimator(H200))
    assert found.point.unit == "audio hour" and math.isfinite(found.money.usd_per_unit.high)
    assert "--osl 98" in unit_command(found.point, "whisper-large-v3", "h200")
