"""What flips a placement, against ranking again there."""

import dataclasses
import itertools

import pytest
from made_sides import ASKED, H200, MODEL, TERMS, made_up, point, side, terms_of

from klab.harness.catalog import find_chip, find_model
from klab.harness.cost.estimate import Estimator
from klab.harness.cost.flips import by_length, by_link, by_price, by_rate, certainty
from klab.harness.cost.place import Demand, ranked
from klab.harness.cost.ranges import Range
from klab.harness.cost.sides import Builder, sides_of
from klab.harness.cost.staffing import Terms
from klab.harness.cost.workload import Deployment


@pytest.mark.parametrize("seed", range(5))
def test_prices_flip_where_it_is_said(seed):
    sides = made_up(seed)
    demand = Demand(ASKED, 40.0)
    ranking = ranked(sides, demand, TERMS)
    found = by_price(ranking, TERMS)
    assert {one.what for one in found} == {f"price of {chip}" for chip in "abc"}
    base, flips = ranking.winner.shape, 0
    for one in found:
        chip = one.what[-1]

        def values(usd, chip=chip):
            """Least $/h by shape, and of all."""
            options = ranked(sides, demand, TERMS | {chip: Terms(Range.exact(usd), 1.0)}).options
            return {option.shape: option.value for option in reversed(options)}, options[0].value

        for flip in one.flips:
            away = 0.001 if flip.up else -0.001
            before, least = values(flip.at * (1 - away))
            assert before[base] == pytest.approx(least)
            after, least = values(flip.at * (1 + away))
            assert after[flip.winner.shape] == pytest.approx(least) and after[base] > least * (1 + 1e-9)
            flips += 1
        for up in {True, False} - {flip.up for flip in one.flips}:
            there, least = values(one.high if up else one.low)
            assert there[base] == pytest.approx(least)
    assert flips


def test_no_price_helps_what_takes_more_of_everything():
    pools = [point("prefill", 0.5, 0, 10.0), point("decode", 0, 0.01, 10.0), point("both", 0.5, 0.01, 10.0)]
    sides = [side("a", 2, pools[2:]), side("b", 1, pools[1:2]), side("a", 4, pools[:1])]
    ranking = ranked(sides, Demand(ASKED, 10.0, count="replicas"), TERMS)
    assert [option.name for option in ranking.options] == ["a x 2", "a x 4 -> b x 1"]
    assert {one.what: one.flips for one in by_price(ranking, TERMS)} == {"price of a": (), "price of b": ()}


def test_the_link_flips_where_it_is_said():
    demand = Demand(ASKED, 40.0, count="fractions")
    flips = 0
    for seed in range(3):
        sides = made_up(seed)
        ranking = ranked(sides, demand, TERMS)
        for flip in by_link(sides, ranking, TERMS).flips:
            away = 1.03 if flip.at > 50 else 1 / 1.03

            def shape(speed, sides=sides):
                return ranked(sides, dataclasses.replace(demand, link_gb_per_s=speed), TERMS).winner.shape

            assert shape(flip.at / away) == ranking.winner.shape != shape(flip.at * away)
            assert flip.behind == pytest.approx(flip.behind_unrounded) and flip.behind > 0
            flips += 1
    assert flips


def test_rounding_is_told_from_what_would_flip_anyway():
    sides = made_up(3)
    ranking = ranked(sides, Demand(ASKED, 3.0), TERMS)
    found = by_rate(sides, ranking, TERMS)
    for flip in found.flips:
        # To a fraction the rate changes nothing, so what flips is the rounding.
        base = ranked(sides, Demand(ASKED, 3.0, count="fractions"), TERMS)
        shapes = {option.shape: option.value for option in reversed(base.options)}
        expected = shapes[ranking.winner.shape] / shapes[flip.winner.shape] - 1
        assert flip.behind > 0 and flip.behind_unrounded == pytest.approx(expected)


@pytest.mark.parametrize("model", [MODEL, find_model("deepseek-v3")], ids=lambda model: model.name)
def test_lengths_flip_as_when_asked_for_anew(model):
    """Against all sides built for the other length: longer prompts want larger steps and more GPUs, experts do not slow down evenly."""
    chips = [H200, find_chip("b200")]
    terms = {"h200": Terms(Range.exact(4.24), 1.0), "b200": Terms(Range.exact(7.25), 1.0)}
    builder = Builder({chip.name: Estimator(chip) for chip in chips})
    like = Deployment(model, H200, 1, quantization="fp8_block" if "deepseek" in model.name else "")

    def at(isl):
        w = dataclasses.replace(ASKED, isl=isl, slo_tpot_s=0.025)
        sides = [one for chip in chips for one in sides_of(chip, None, like, w, builder)[0]]
        return sides, ranked(sides, Demand(w, 20.0), terms)

    sides, ranking = at(8192)
    flips = {flip.up: flip for flip in by_length(builder, sides, ranking, terms).flips}
    for up in (False, True):
        flip = flips.get(up)
        for isl in (16384, 32768) if up else (4096, 2048):
            anew = at(isl)[1]
            base = next((option.value for option in anew.options if option.shape == ranking.winner.shape), None)
            if flip is None or (isl < flip.at if up else isl > flip.at):
                assert base == pytest.approx(anew.winner.value)
            elif isl == flip.at:
                assert flip.winner.shape == anew.winner.shape and flip.behind == pytest.approx(base / anew.winner.value - 1, abs=0.02)
                assert flip.kept == (isl // 2 if up else isl * 2)


def test_corners():
    # a takes 10 GPUs (9.09 to 11.1) at 3 $ (2.1 to 3.9), b takes 6 (5.45 to 6.67) at 5.5 $ (3.85 to 7.15).
    sides = [side("a", 1, [point("both", 0.1, 0.01, 1.0)]), side("b", 1, [point("both", 0.1, 0.01, 1 / 0.6)])]
    terms = terms_of(3.0, 5.5)
    ranking = ranked(sides, Demand(ASKED, 10.0, count="fractions"), terms)
    assert ranking.winner.name == "a x 1"
    ends = {chip: (gpus / 1.1, gpus / 0.9) for chip, gpus in (("a", 10), ("b", 6))}
    times = [(3.0 * a, 5.5 * b) for a, b in itertools.product(ends["a"], ends["b"])]
    prices = [(x * a, y * b) for a, b in itertools.product(ends["a"], ends["b"]) for x in (2.1, 3.9) for y in (3.85, 7.15)]
    for found, corners in ((certainty(ranking, terms, prices=False), times), (certainty(ranking, terms, prices=True), prices)):
        assert (found.corners, found.share) == (len(corners), pytest.approx(sum(a <= b for a, b in corners) / len(corners)))
        assert found.rival.name == "b x 1" and found.share < 1
    assert certainty(ranked(sides, Demand(ASKED, 10.0, "kw"), terms), terms, prices=True) is None
