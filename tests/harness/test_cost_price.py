"""Effective prices against cash flows stepped month by month, and against what others publish."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klab.harness.catalog.prices import find_price, load_facility, load_ownership, load_prices
from klab.harness.cost.price import (
    HOURS_PER_MONTH,
    NEVER,
    Terms,
    after_renewal,
    annuity,
    answer,
    own_parts,
    own_usd_per_hour,
    rent_usd_per_hour,
)
from klab.harness.cost.ranges import Range
from klab.harness.cost.sensitivity import propagate
from klab.kernels.errors import UsageError

RENT = {
    "usd_per_gpu_hour": 2.5, "prepaid_share": 0.25, "cost_of_capital": 0.1, "term_years": 3, "renewal_factor": 2.0, "horizon_years": 3,
    "utilisation": 1.0,
}  # fmt: skip
OWN = {
    "usd_per_gpu": 35_000, "beside_share": 0.1, "residual_share": 0.2, "life_years": 4, "cost_of_capital": 0.1, "opex_share": 0.04,
    "it_kw_per_gpu": 1.44, "pue": 1.2, "usd_per_kwh": 0.08, "colocation_usd_per_kw_month": 150, "load_share": 0.7, "utilisation": 1.0,
}  # fmt: skip


def exact(value):
    return Range.exact(float(value))


def worth(payments, capital):
    """Present value of (month, dollars)."""
    return sum(dollars * (1 + capital) ** (-month / 12) for month, dollars in payments)


def stepped_rent(at):
    """The payments of each contract, one after another, and the level monthly price of the same worth."""
    payments, month, months = [], 0, round(12 * at["horizon_years"])
    while month < months:
        length = min(round(12 * at["term_years"]), months - month)
        monthly = at["usd_per_gpu_hour"] * (at["renewal_factor"] if month else 1) * HOURS_PER_MONTH
        payments.append((month, at["prepaid_share"] * monthly * length))
        payments += [(month + k, (1 - at["prepaid_share"]) * monthly) for k in range(1, length + 1)]
        month += length
    level = worth(payments, at["cost_of_capital"]) / worth([(k, 1.0) for k in range(1, months + 1)], at["cost_of_capital"])
    return level / HOURS_PER_MONTH / at["utilisation"]


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"horizon_years": 6}, {"horizon_years": 4}, {"horizon_years": 2}, {"prepaid_share": 0},
        {"prepaid_share": 1, "utilisation": 0.4}, {"cost_of_capital": 0.0, "horizon_years": 7.5, "term_years": 1.5},
    ],
)  # fmt: skip
def test_rent_against_its_cash_flow(changes):
    at = RENT | changes
    assert rent_usd_per_hour(at) == pytest.approx(stepped_rent(at), rel=1e-9)


def test_rent_by_hand():
    # Free capital: what is paid when does not matter.
    assert rent_usd_per_hour(RENT | {"cost_of_capital": 0.0}) == pytest.approx(2.5)
    assert rent_usd_per_hour(RENT | {"cost_of_capital": 0.0, "horizon_years": 6}) == pytest.approx(3.75)
    assert rent_usd_per_hour(RENT | {"prepaid_share": 0}) == pytest.approx(2.5)
    assert rent_usd_per_hour(RENT) > 2.5  # money early costs
    # A renewal far away weighs less than the first term.
    assert 2.5 < rent_usd_per_hour(RENT | {"horizon_years": 6, "prepaid_share": 0}) < 3.75


@pytest.mark.parametrize("changes", [{}, {"cost_of_capital": 0.0}, {"residual_share": 0.0, "life_years": 6}, {"beside_share": 0.5}])
def test_ownership_against_its_loan(changes):
    """A loan of the capex is paid back by the capital part to the month, interest included, down to what is left at the end."""
    at = OWN | changes
    capex = at["usd_per_gpu"] * (1 + at["beside_share"])
    debt, monthly = capex, own_parts(at)["capital"] * HOURS_PER_MONTH
    for _ in range(12 * at["life_years"]):
        debt = debt * (1 + at["cost_of_capital"]) ** (1 / 12) - monthly
    assert debt == pytest.approx(at["residual_share"] * capex, rel=1e-9, abs=1e-6)


def test_ownership_by_hand():
    # $/delivered GPU-hour = (capex/years + opex)/(8760 x utilisation) where capital is free and nothing is left.
    plain = OWN | {"beside_share": 0.0, "residual_share": 0.0, "cost_of_capital": 0.0, "it_kw_per_gpu": 0.0, "utilisation": 0.5}
    assert own_usd_per_hour(plain) == pytest.approx((35_000 / 4 + 0.04 * 35_000) / (8760 * 0.5))
    parts = own_parts(OWN)
    assert parts["energy"] == pytest.approx(1.44 * 0.7 * 1.2 * 0.08) and parts["site"] == pytest.approx(1.44 * 150 / 730)
    assert own_usd_per_hour(OWN | {"utilisation": 0.25}) == pytest.approx(4 * own_usd_per_hour(OWN))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(OWN)), st.floats(1.01, 3))
def test_ownership_is_monotone(name, factor):
    more = own_usd_per_hour(OWN | {name: OWN[name] * factor})
    cheaper = name in ("life_years", "residual_share", "utilisation")
    assert more < own_usd_per_hour(OWN) if cheaper else more > own_usd_per_hour(OWN)


@pytest.mark.parametrize("chip", ["h100", "h200", "b200"])
def test_ownership_of_shipped_facts_agrees_with_what_is_published(chip):
    """InferenceX's costs of owners, from other inputs than ours: within a quarter, and inside the interval."""
    (own,) = [way for way in answer(chip, Terms()).ways if way.contract == "owned"]
    published = find_price(chip, "owned")
    assert own.usd_per_gpu_hour.low < published.low < published.high < own.usd_per_gpu_hour.high
    assert own.usd_per_gpu_hour.mid == pytest.approx(published.mid, rel=0.25)
    assert own.extreme.low < own.usd_per_gpu_hour.low and own.usd_per_gpu_hour.high < own.extreme.high
    assert any("guesses" in note for note in own.notes)
    # The provisioned kW hold the cooling: a site is rented for the IT part of them.
    facility = load_facility()
    assert own.inputs["it_kw_per_gpu"].mid == pytest.approx(facility.provisioned_kw(chip) / facility.pue.mid)


def test_the_interval_against_random_draws():
    """Independent errors of two standard deviations each: 95% of the draws lie where the root of the squares says."""
    rng = random.Random(7)
    inputs = {name: Range(0.9 * v, float(v), 1.1 * v) for name, v in OWN.items() if name != "utilisation"} | {"utilisation": exact(1)}
    found = propagate(own_usd_per_hour, inputs)
    draws = [own_usd_per_hour({n: rng.gauss(r.mid, (r.high - r.low) / 4) for n, r in inputs.items()}) for _ in range(4000)]
    inside = sum(found.likely.low <= draw <= found.likely.high for draw in draws) / len(draws)
    assert 0.93 < inside < 0.97
    assert all(found.extreme.low <= d <= found.extreme.high for d in draws[:500])
    assert [s.width for s in found.swings] == sorted((s.width for s in found.swings), reverse=True) and len(found.swings) == len(OWN) - 1


def test_propagate_by_hand():
    found = propagate(lambda at: at["a"] - at["b"], {"a": Range(7, 10, 14), "b": Range(1, 4, 7), "c": exact(1)})
    assert (found.likely.low, found.likely.mid, found.likely.high) == pytest.approx((6 - 18**0.5, 6, 11))
    assert (found.extreme.low, found.extreme.high) == (0, 13)
    assert [(s.name, s.at_low, s.at_high) for s in found.swings] == [("a", 3, 10), ("b", 9, 3)]


def test_break_even_is_where_both_cost_the_same():
    found = answer("h200", Terms(prepaid_share=exact(0.25)), quotes={"on_demand": "4", "reserved": "2"})
    ways = {way.contract: way for way in found.ways}
    for even in found.break_evens:
        assert even.against == "on_demand" and 0 < even.utilisation.low < even.utilisation.mid < 1
        assert ways[even.way].at(even.utilisation.mid).mid == pytest.approx(4.0)
    # A quote above the price on demand pays never.
    dear = answer("h200", Terms(), quotes={"on_demand": "2", "reserved": "3"})
    assert dear.break_evens[0].utilisation.low > 1 and dear.break_evens[0].to_json()["never"]
    assert answer("h200", Terms(), quotes={"on_demand": "0.001", "reserved": "3"}).break_evens[0].utilisation.mid == NEVER


def test_a_renewal_that_doubles():
    (rent,) = [way for way in answer("h200", Terms(cost_of_capital=exact(0)), quotes={"reserved": "2"}).ways if way.contract == "reserved"]
    assert after_renewal(rent, 1.0).mid == pytest.approx(2.0) and after_renewal(rent, 2.0).mid == pytest.approx(3.0)
    found = answer("h200", Terms(renewal_factor=exact(1.94), cost_of_capital=exact(0)), quotes={"reserved": "2"})
    assert found.renewals[1.94].mid == pytest.approx(2.94) and any("1.94 times" in line for line in found.remarks)


def test_on_demand_is_paid_by_the_used_hour():
    found = answer("h200", Terms(utilisation=exact(0.3)))
    by_hour, term, own = found.ways
    assert by_hour.usd_per_gpu_hour.mid == by_hour.at(1.0).mid == find_price("h200", "on_demand").mid
    assert term.usd_per_gpu_hour.mid == pytest.approx(term.at(1.0).mid / 0.3) and own.at(0.5).mid == pytest.approx(2 * own.at(1.0).mid)
    # What other verbs are given is per paid hour: they apply the utilisation themselves.
    assert [p.mid for p in found.prices] == pytest.approx([w.at(1.0).mid for w in found.ways])


def test_a_chip_that_nobody_prices():
    with pytest.raises(UsageError, match="no on_demand price for chip npu"):
        answer("npu", Terms())
    found = answer("npu", Terms(usd_per_gpu=exact(12_000), it_kw_per_gpu=exact(0.5)))
    assert [way.contract for way in found.ways] == ["owned"] and not found.break_evens
    assert [way.contract for way in answer("gb200", Terms()).ways] == ["reserved"]  # no street price, none on demand: said so
    assert any("street price" in line for line in answer("gb200", Terms()).remarks)


def test_terms_that_no_contract_has():
    for fields, said in (
        ({"utilisation": exact(0)}, "--utilisation is above 0"), ({"utilisation": exact(1.1)}, "at most 1"),
        ({"term_years": exact(0)}, "--term"), ({"prepaid_share": exact(2)}, "--prepaid is a share"),
        ({"cost_of_capital": exact(10)}, "0.1 is 10%"),
        ({"pue": exact(0.9)}, "--pue"),
        ({"horizon_years": 0.0}, "--horizon"), ({"usd_per_gpu": exact(-1)}, "--capex"), ({"life_years": exact(99)}, "--life"),
        ({"renewal_factor": exact(0)}, "--renewal"), ({"usd_per_kwh": exact(float("inf"))}, "--usd-per-kwh"),
        ({"term_years": exact(0.01)}, "month"), ({"life_years": exact(1e-9)}, "--life .* month"), ({"horizon_years": 1e-9}, "month"),
        ({"utilisation": exact(1e-300)}, "above 0"), ({"usd_per_gpu": exact(1e308)}, "at most 1e"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            Terms(**fields)


def test_annuity():
    assert annuity(48, 0.0) == 48 and annuity(12, 0.1) == pytest.approx(sum(1.1 ** (-k / 12) for k in range(1, 13)))
    assert load_ownership().cost_of_capital.high < 1 and load_facility().pue.low >= 1


def test_the_verb(klab, tmp_path):
    code, out, _ = klab("price")
    assert code == 0 and "InferenceX cost constants: 3-year rental 1.60" in out and "secondary" in out
    rows = [json.loads(line) for line in klab("price", "--json")[1].splitlines()]
    assert {row["kind"] for row in rows} == {"price", "facility", "ownership"} and all(row["source"] for row in rows)
    path = tmp_path / "mine.toml"
    code, out, err = klab("price", "-c", "H200", "--price", "2.2,2.63,3", "-u", "0.6", "--renewal", "1.94", "--out", path)
    assert code == 0 and "60% of the hours" in out and "break" not in err and "owned costs" in err and "1.94 times" in err
    assert find_price("h200", "reserved", path).mid > 2.63 and len(load_prices(path)) == 3
    rows = [json.loads(line) for line in klab("price", "-c", "h200", "--json")[1].splitlines()]
    assert [row["kind"] for row in rows if row["kind"] != "note"] == ["way"] * 3 + ["break_even"] * 2 + ["renewal"] * 2
    way = rows[1]
    assert way["contract"] == "reserved" and way["usd_per_gpu_hour"]["low"] <= way["usd_per_gpu_hour"]["mid"]
    assert way["by_utilisation"]["0.2"]["mid"] == pytest.approx(5 * way["usd_per_gpu_hour"]["mid"])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["-c", "cpu"], "no on_demand price for chip cpu"), (["-c", "h200", "-u", "0"], "above 0"),
        (["-c", "h200", "-p", "-2"], "positive"),
        (["-c", "h200", "--capex", "3,2,1"], "in this order"), (["-c", "h200", "--life", "x"], "not a number"),
        (["-c", "h200", "--prices", "/nowhere"], "cannot read"), (["-c", "h200", "--out", "/nowhere/x.toml"], "cannot write"),
        (["-c", "h200", "--opex", "nan"], "not a number"), (["-c", "h200", "--horizon", "1e-9"], "at least a month"),
        (["-c", "h200", "-p", " "], "an empty price"), (["-c", "h200", "-p", "$2"], "or low,mid,high"), (["-c", " "], "--chip is empty"),
        (["-c", "h200", "-p", "on_demand"], "where the reserved one"), (["-c", "h200", "-p", "1e308"], "positive number of dollars"),
        (["-c", "h200", "-p", "x" * 300], "unknown contract"), (["-u", "0.5", "-p", "2"], "--utilisation, --price: of which chip?"),
    ],
)  # fmt: skip
def test_the_verb_says_what_is_wrong(klab, args, said):
    code, out, err = klab("price", *args)
    assert code == 2 and said in err and not out


def test_every_guess_is_said(klab):
    """A published middle does not make guessed ends published, in no output."""
    out, err = klab("price")[1], klab("price", "-c", "h200")[2]
    assert "published, low and high guessed" in out and "secondary, mid guessed" in out
    assert "reserved: rests on guesses: usd_per_gpu_hour 1.41..1.6..2.25 (low and high), prepaid_share" in err
    assert "life_years 3..4..6 (low and high)" in err and "cost_of_capital 0.06..0.1..0.15, opex_share" in err
    given = klab("price", "-c", "h200", "-p", "2", "--prepaid", "0.2", "--cost-of-capital", "0.1", "--renewal", "1")[2]
    assert "reserved: rests on guesses" not in given


def test_two_prices_of_one_date_are_a_fault(klab, tmp_path):
    price = '[[price]]\nchip = "h200"\ncontract = "reserved"\nusd_per_gpu_hour = 2\ndate = "2026-05"\nsource = "us"\n'
    (tmp_path / "two.toml").write_text(2 * price)
    code, out, err = klab("price", "-c", "h200", "--prices", tmp_path / "two.toml")
    assert code == 2 and not out and "2 reserved prices of 2026-05" in err


def test_what_is_missing_is_said_in_json_too(klab):
    rows = [json.loads(line) for line in klab("price", "-c", "gb200", "--json")[1].splitlines()]
    notes = [row["text"] for row in rows if row["kind"] == "note"]
    assert any("no on_demand price for chip gb200" in text for text in notes)
    assert any("no street price for chip gb200" in text for text in notes)


def test_a_break_even_beyond_all_hours_is_no_share_of_them(klab):
    err = klab("price", "-c", "h200", "--price", "4.2", "--on-demand", "2,4.2,6")[2]
    assert "reserved is not cheaper than on_demand at the middle" in err and "more than 10" not in err
    # The break-even is capped; that is no figure to be shown.
    assert "at least 10 times as much" in klab("price", "-c", "h200", "--price", "1e5")[2]


def test_a_contract_that_outlives_the_horizon_is_said(klab):
    said = "as if it could be had for that long"
    assert said in klab("price", "-c", "h200", "--horizon", "4")[2] and said not in klab("price", "-c", "h200", "--horizon", "6")[2]


def test_a_contract_of_ones_own_prices(klab, tmp_path):
    price = '[[price]]\nchip = "h200"\ncontract = "reserved"\nusd_per_gpu_hour = 0.5\ndate = "2026-05"\nsource = "us"\n'
    (tmp_path / "mine.toml").write_text(price)
    rows = [json.loads(line) for line in klab("price", "-c", "h200", "-p", "reserved", "--prices", tmp_path, "--json")[1].splitlines()]
    assert rows[0]["inputs"]["usd_per_gpu_hour"]["mid"] == 0.5


def test_what_is_written_keeps_where_it_is_from(klab, tmp_path):
    path = tmp_path / "mine.toml"
    assert klab("price", "-c", "h200", "--out", path)[0] == 0
    assert find_price("h200", "on_demand", path) == find_price("h200", "on_demand")
    own = find_price("h200", "owned", path)
    assert own.confidence == "computed" and "rests on guesses: beside_share" in own.note
    assert klab("price", "-c", "h200", "--on-demand", "5", "--out", path)[0] == 0
    assert find_price("h200", "on_demand", path).confidence == "given"
