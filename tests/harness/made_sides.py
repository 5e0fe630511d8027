"""Sides of made-up chips, whose points are drawn, and what these chips cost."""

import dataclasses
import itertools

import numpy as np

from klab.harness.catalog import find_chip, find_model
from klab.harness.catalog.models import PROFILES
from klab.harness.cost.estimate import Origin
from klab.harness.cost.ranges import Range
from klab.harness.cost.sides import Point, Side
from klab.harness.cost.staffing import Terms
from klab.harness.cost.workload import Deployment, Workload

MODEL = find_model("llama-3.1-70b")
H200 = find_chip("h200")
CARD = str(PROFILES / "examples" / "decode-card.toml")


def about(value, doubt=0.1):
    return Range(value * (1 - doubt), value, value * (1 + doubt))


def point(role, ttft_s, tpot_s, per_s, concurrency=1, load=1.0, joules=1000.0):
    times = (about(ttft_s), about(tpot_s), about(per_s))
    return Point(role, concurrency, *times, load / per_s, about(joules), {Origin.MODELLED: 1.0}, chunk_tokens=8192)


def side(chip, tp, points, most=1000, prompt_s=0.2, network=50.0):
    kind = dataclasses.replace(H200, name=chip, network_gb_per_s=network)
    roles = {role: tuple(p for p in points if p.role == role) for role in ("prefill", "decode", "both")}
    return Side(Deployment(MODEL, kind, tp), roles, most, about(prompt_s), about(100.0 * tp), "bfloat16")


def made_up(seed, chips=("a", "b", "c")):
    """Sides whose points are drawn: a prefill replica waits longer the fuller it is, a decode replica is slower the more it does."""
    rng = np.random.default_rng(seed)
    found = []
    for chip, tp in itertools.product(chips, (1, 2, 4)):
        prompt_s, speed, chunk = rng.uniform(0.1, 0.6) / tp, rng.uniform(2, 8) * tp, rng.uniform(1.2, 2)
        points = [
            point("prefill", prompt_s * (1 + load / (2 * (1 - load))), 0.0, load / prompt_s, 1, load) for load in (0.2, 0.5, 0.8, 0.95)
        ]
        for n in (1, 8, 32, 128):
            tpot_s = (5 + n * rng.uniform(0.1, 0.4)) / 1e3 * 8 / speed
            points.append(point("decode", 0.0, tpot_s, n / (tpot_s * 1023), n))
            points.append(point("both", prompt_s * (1 + n / 64), tpot_s * chunk, n / (tpot_s * chunk * 1023 + prompt_s), n))
        found.append(side(chip, tp, points, prompt_s=prompt_s))
    return found


def terms_of(*prices):
    return {chip: Terms(about(usd, 0.3), 1.0 + index) for index, (chip, usd) in enumerate(zip("abc", prices, strict=False))}


TERMS = terms_of(3.0, 5.0, 2.0)
ASKED = Workload(8192, 1024, slo_ttft_s=2.0, slo_tpot_s=0.02)
