"""Fleet sizes against enumeration of all fleets, against arithmetic by hand, and by what must hold for every demand."""

import dataclasses
import itertools
import json
import math
import random
import sys

import pytest

from klab.harness.catalog import find_chip, find_model
from klab.harness.cli.main import main
from klab.harness.cost.answer import HOST_US
from klab.harness.cost.demand import Need
from klab.harness.cost.estimate import Estimator, Origin
from klab.harness.cost.fleet_month import Limits
from klab.harness.cost.fleet_options import Option, Supply, Unserved, options_for, supply_of
from klab.harness.cost.fleet_size import FleetSize, fleet_for
from klab.harness.cost.money import Selling
from klab.harness.cost.ranges import Range
from klab.harness.cost.serving import OperatingPoint, meets, operating_points
from klab.harness.cost.steps import Steps
from klab.harness.cost.workload import Deployment, Workload
from klab.kernels.errors import UsageError

MODEL = find_model("qwen3-0.6b")
W = Workload(isl=900, osl=100)


def supply(name="h200", usd=2.0, kw=1.73):
    chip = find_chip(name)
    return Supply(chip, Estimator(chip), usd if isinstance(usd, Range) else Range.exact(usd), kw)


def option(need, of, tp, rate, joules=100.0, label=Origin.MODELLED):
    """A replica of `tp` GPUs with this rate, low and high 20% off."""
    rate = rate if isinstance(rate, Range) else Range(0.8 * rate, rate, 1.2 * rate)
    point = OperatingPoint(
        Deployment(MODEL, of.chip, tp),
        W,
        8,
        Range.exact(0.1),
        Range.exact(0.01),
        rate,
        Range.exact(joules),
        0.5,
        {label: 1.0},
        {label: 1.0},
    )
    return Option(need, of, point)


def need(rate, growth=0.0, peak=1.0, name="n", **fields):
    return Need(name, MODEL.name, rate, W, growth, peak, **fields)


def test_by_hand():
    """100 requests/s x 1.5 at the peak, 10 per replica of 2 GPUs, a fifth kept free: 18.75 -> 19 replicas, 38 GPUs, 5 machines."""
    size = FleetSize([need(100, growth=0.1, peak=1.5)], [option(0, supply(usd=Range(1, 2, 4)), 2, 10)])
    months = size.months(1)
    assert months[0].replicas == {0: 19} and months[0].gpus == {"h200": 40} and months[1].replicas == {0: 21}
    assert months[0].kw == pytest.approx(40 * 1.73) and months[0].use == pytest.approx(100 / 190)
    assert months[0].usd.mid == pytest.approx(40 * 2 * 730)
    # Replicas that are a fifth faster or slower: 16 and 24, 32 and 48 GPUs, at 1 and 4 dollars.
    assert (months[0].gpus_range.low, months[0].gpus_range.high) == (32, 48)
    assert (months[0].usd.low, months[0].usd.high) == pytest.approx((32 * 730, 48 * 4 * 730))
    assert months[0].usd_per_mtok.mid == pytest.approx(40 * 2 * 730 / (100 * 3600 * 730 * 1000 / 1e6))
    # Boards: 100 J a request, and a share of 700 W on each of the GPUs that wait.
    assert months[0].board_kw.mid == pytest.approx(100 * 0.1 + 0.15 * 0.7 * 2 * (19 - 10))
    # The row's own share is 38 of the 40 GPUs.
    (row,) = months[0].rows
    assert (row.gpus, row.kw) == (38, pytest.approx(38 * 1.73)) and row.usd.mid == pytest.approx(38 * 2 * 730)
    assert (row.usd.low, row.usd.high) == pytest.approx((32 * 730, 48 * 4 * 730))
    assert months[0].idle_gpus == pytest.approx(2 * (19 - 10)) and months[0].batch_gpus == 0


def test_the_choice_against_all_choices():
    """The total of whole machines is the least of every combination of one option per need."""
    rng = random.Random(3)
    for trial in range(15):
        supplies = [supply("h200", rng.uniform(1, 3)), supply("b200", rng.uniform(1, 5), 2.17)]
        needs = [need(rng.uniform(1, 400), peak=rng.uniform(1, 4)) for _ in range(3)]
        options = [option(at, s, tp, tp * rng.uniform(1, 12)) for at in range(3) for s in supplies for tp in (1, 2, 4, 8)]
        limits = Limits(machine=rng.choice([1, 4, 8]), headroom=rng.choice([0.0, 0.3]))
        size = FleetSize(needs, options, limits=limits)

        def usd(chosen, needs=needs, options=options, limits=limits, supplies=supplies):
            gpus = {}
            for at in chosen:
                one = options[at]
                replicas = math.ceil(needs[one.need].peak(0) / (one.requests_per_s.mid * (1 - limits.headroom)))
                whole = one.gpus if one.gpus <= limits.machine else limits.machine * math.ceil(one.gpus / limits.machine)
                gpus[one.chip] = gpus.get(one.chip, 0) + replicas * whole
            return sum(math.ceil(gpus.get(s.chip.name, 0) / limits.machine) * limits.machine * s.usd_per_gpu_hour.mid for s in supplies)

        every = itertools.product(*([at for at, one in enumerate(options) if one.need == n] for n in range(3)))
        least = min(map(usd, every))
        # Ties go to fewer GPUs, at most a ten-thousandth dearer.
        assert usd(size.chosen(0).values()) == pytest.approx(least, rel=3e-4), trial
        assert size.months(0)[0].usd.mid / 730 == pytest.approx(least, rel=3e-4)


def test_the_capacity_against_all_fleets():
    rng = random.Random(5)
    for _ in range(8):
        supplies = [supply("h200"), supply("b200", 3.0, 2.17)]
        needs = [need(rng.uniform(5, 30), peak=2.0), need(rng.uniform(5, 30))]
        options = [option(at, s, tp, tp * rng.uniform(2, 9)) for at in range(2) for s, tp in zip(supplies, (2, 4), strict=True)]
        had = {"h200": 8, "b200": 16}
        size = FleetSize(needs, options, limits=Limits(gpus=had, headroom=0.25))
        best = 0.0
        for counts in itertools.product(range(5), repeat=4):
            gpus = {chip: sum(c * o.gpus for c, o in zip(counts, options, strict=True) if o.chip == chip) for chip in had}
            if any(gpus[chip] > had[chip] for chip in had):
                continue
            served = [
                sum(c * o.requests_per_s.mid for c, o in zip(counts, options, strict=True) if o.need == n) * 0.75 / needs[n].peak(0)
                for n in range(2)
            ]
            best = max(best, min(served))
        found = size.capacity()
        assert found.scale.mid == pytest.approx(best, rel=1e-4) and found.scale.low < best < found.scale.high
        assert all(found.gpus.get(chip, 0) <= had[chip] for chip in had)
        dollars = 730 * sum(count * {"h200": 2.0, "b200": 3.0}[chip] for chip, count in found.gpus.items())
        tokens = found.scale.mid * sum(one.average(0) for one in needs) * 1000 * 730 * 3600
        assert (found.usd.mid, found.usd_per_mtok.mid) == pytest.approx((dollars, dollars / tokens * 1e6))
        assert found.usd_per_mtok.low < found.usd_per_mtok.mid < found.usd_per_mtok.high


def test_a_power_budget():
    h200, b200 = supply(), supply("b200", 3.0, 2.17)
    needs = [need(40, growth=0.2)]
    options = [option(0, h200, 1, 5.0), option(0, b200, 1, 7.0)]
    for kw in (14, 100, 500):
        found = FleetSize(needs, options, limits=Limits(kw=kw)).capacity()
        assert found.kw <= kw
        # 8 H200 take 13.84 kW and give 40 requests/s, 8 B200 17.36 and 56: per kW the B200 wins, by a machine the H200 may fill the rest.
        most = max(h * 40 + b * 56 for h in range(40) for b in range(30) if 13.84 * h + 17.36 * b <= kw)
        assert found.scale.mid == pytest.approx(most * 0.8 / 40, rel=1e-4)
    assert FleetSize(needs, options, limits=Limits(kw=13)).capacity() is None
    size = FleetSize(needs, options, limits=Limits(kw=100))
    full = size.lasts(12)
    assert size.capacity(full).scale.mid < 1 <= size.capacity(full - 1).scale.mid
    assert FleetSize(needs, options, limits=Limits(kw=1e5)).lasts(12) is None
    # Each row alone does at least what it does beside others.
    two = FleetSize([need(40), need(10)], [*options, option(1, h200, 2, 9.0)], limits=Limits(gpus={"h200": 64, "b200": 64}))
    room = two.capacity()
    assert all(alone >= room.scale.mid for alone in room.alone.values())


def test_dollars_and_kilowatts_may_choose_differently():
    options = [option(0, supply(usd=1.0), 1, 5.0), option(0, supply("b200", 3.0, 2.17), 1, 8.0)]
    by = {goal: FleetSize([need(500)], options, limits=Limits(objective=goal)).months(0)[0] for goal in ("cost", "kw")}
    assert set(by["cost"].gpus) == {"h200"} and set(by["kw"].gpus) == {"b200"}
    assert by["kw"].kw < by["cost"].kw and by["kw"].usd.mid > by["cost"].usd.mid


def test_the_choice_is_made_for_the_largest_month_and_kept():
    """One machine of either chip holds today's demand, and the cheaper one is the H200's; in a year the B200 is."""
    options = [option(0, supply(usd=2.0), 1, 1.0), option(0, supply("b200", 3.0, 2.17), 1, 5.0)]
    small = FleetSize([need(1, growth=0.5)], options)
    assert set(small.months(0)[0].gpus) == {"h200"} and {tuple(month.gpus) for month in small.months(12)} == {("b200",)}
    assert set(FleetSize([need(100, growth=-0.5)], options).months(12)[12].gpus) == {"b200"}


def test_what_must_hold():
    options = [option(0, supply(), 1, 3.0), option(0, supply("b200", 4.0, 2.17), 2, 11.0)]
    months = FleetSize([need(50, growth=0.3)], options).months(12)
    assert all(a.usd.mid <= b.usd.mid for a, b in itertools.pairwise(months))
    dearer = [option(0, supply(usd=2.2), 1, 3.0), option(0, supply("b200", 4.4, 2.17), 2, 11.0)]
    for a, b in zip(months, FleetSize([need(50, growth=0.3)], dearer).months(12), strict=True):
        assert b.usd.mid == pytest.approx(1.1 * a.usd.mid) and a.gpus == b.gpus
    # Enough at the peak, and one replica less is not.
    for month in months:
        ((at, count),) = month.replicas.items()
        one = options[at].requests_per_s.mid * 0.8
        assert (count - 1) * one < 50 * 1.3**month.month <= count * one + 1e-6
    # A shrinking demand is sized for today.
    shrinking = FleetSize([need(50, growth=-0.1)], options).months(6)
    assert shrinking[0].usd.mid >= shrinking[6].usd.mid
    assert FleetSize([need(0.001)], options, limits=Limits(least_replicas=2)).months(0)[0].replicas in ({0: 2}, {1: 2})


def test_replicas_do_not_straddle_machines():
    limits = Limits(machine=8)
    assert [limits.share_of_machine(tp) for tp in (1, 2, 4, 8)] == [1 / 8, 1 / 4, 1 / 2, 1]
    assert limits.share_of_machine(3) == 1 / 2 and limits.share_of_machine(5) == 1 and limits.share_of_machine(16) == 2
    size = FleetSize([need(10)], [option(0, supply(), 3, 1.0)], limits=Limits(headroom=0))
    assert size.months(0)[0].gpus == {"h200": 40}  # ten replicas of 3, two to a machine


def test_margin_and_batch():
    sold = Need("a", MODEL.name, 10, W, selling=Selling(1.0, 5.0))
    month = FleetSize([sold], [option(0, supply(usd=Range(1, 2, 3)), 1, 5.0)]).months(0)[0]
    revenue = 10 * 3600 * 730 * (900 * 1 + 100 * 5) / 1e6
    assert month.revenue_usd == pytest.approx(revenue) and month.gross_margin.mid == pytest.approx(1 - 8 * 2 * 730 / revenue)
    assert month.gross_margin.low < month.gross_margin.mid < month.gross_margin.high
    assert FleetSize([sold, need(1)], [option(0, supply(), 1, 5.0), option(1, supply(), 1, 5.0)]).months(0)[0].gross_margin is None
    batch = Need("b", MODEL.name, 8, Workload(900, 100, offline=True), peak_over_average=5)
    size = FleetSize([batch, need(8, peak=5)], [option(0, supply(), 1, 1.0), option(1, supply(), 1, 1.0)], limits=Limits(headroom=0))
    found = size.months(0)[0]
    assert found.replicas == {0: 8, 1: 40} and (found.batch_gpus, found.idle_gpus) == pytest.approx((8, 32))


def test_the_label_is_the_weakest():
    parts = [option(0, supply(), 1, 5.0, label=Origin.MEASURED), option(1, supply(), 1, 5.0, label=Origin.REFERENCE)]
    size = FleetSize([need(1), need(1)], parts)
    assert size.label(size.months(0)[0]) is Origin.REFERENCE
    modelled = dataclasses.replace(parts[1], point=dataclasses.replace(parts[1].point, energy_shares={Origin.MODELLED: 1.0}))
    size = FleetSize([need(1), need(1)], [parts[0], modelled])
    assert (size.label(size.months(0)[0]), size.label(size.months(0)[0], energy=True)) == (Origin.REFERENCE, Origin.MODELLED)


def test_limits_that_are_none():
    for fields, said in (
        ({"headroom": 1.0}, "--headroom"), ({"machine": 0}, "--machine"), ({"kw": 0.0}, "--kw"), ({"kw": -1.0}, "--kw"),
        ({"least_replicas": 0}, "--least"), ({"objective": "joy"}, "cost or kw"), ({"gpus": {"h200": 0}}, "whole machines of 8"),
        ({"gpus": {"h200": 12}}, "whole machines of 8"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            Limits(**fields)
    with pytest.raises(UsageError, match="--kw-per-gpu h200=KW"):
        FleetSize([need(1)], [option(0, supply(kw=None), 1, 5.0)], limits=Limits(kw=100.0))
    assert FleetSize([need(1)], [option(0, supply(kw=None), 1, 5.0)]).months(0)[0].kw is None
    with pytest.raises(UsageError, match="--kw or --gpus"):
        FleetSize([need(1)], [option(0, supply(), 1, 5.0)]).capacity()


def test_options_of_a_real_model():
    have = supply_of(find_chip("h200"), price="1,2,3", results=[], reference=False)
    slow = Need("chat", "qwen3-8b", 10, Workload(2048, 256, slo_tpot_s=0.02, slo_ttft_s=2.0))
    found = options_for(0, slow, [have], (1, 2))
    assert [(o.chip, o.gpus) for o in found] == [("h200", 1), ("h200", 2)] and all(meets(o.point) for o in found)
    every = operating_points(Steps(found[0].point.deployment, have.estimator, HOST_US), slow.workload)
    assert found[0].point.requests_per_s.mid == max(point.requests_per_s.mid for point in every if meets(point))
    never = options_for(0, Need("chat", "qwen3-8b", 10, Workload(2048, 256, slo_tpot_s=1e-5)), [have], (1,))
    assert isinstance(never, Unserved) and "meets TPOT 0.01 ms" in never.reason and never.nearest.concurrency == 1
    large = options_for(1, Need("big", "llama-3.1-405b", 10, Workload(2048, 256)), [have], (1, 2))
    assert (
        isinstance(large, Unserved)
        and "406 GB" in large.reason
        and "--tp 8 may hold it" in large.reason
        and "do not fit into 127 GB" in large.reason
        and "fp8_block" in large.reason
    )
    odd = options_for(1, Need("odd", "qwen3-8b", 10, Workload(2048, 256), tp=7), [have])
    assert isinstance(odd, Unserved) and "7" in odd.reason
    with pytest.raises(UsageError, match="not billed by the token"):
        fleet_for([Need("x", "flux.1-dev", 1, W)], [have])
    decode = dataclasses.replace(have, chip=dataclasses.replace(have.chip, name="card", phases=("decode",)))
    alone = options_for(0, slow, [decode], (1,))
    assert isinstance(alone, Unserved) and "card is made for decode alone" in alone.reason
    # As the checkpoint is stored, unless asked otherwise.
    (stored,) = fleet_for([Need("x", "gpt-oss-20b", 1, W)], [have], sizes=(1,)).options
    (wide,) = fleet_for([Need("x", "gpt-oss-20b", 1, W, quantization="none")], [have], sizes=(1,)).options
    assert "mxfp4" in stored.point.deployment.quantization and not wide.point.deployment.quantization
    long = FleetSize([Need("x", MODEL.name, 1, Workload(100_000, 100))], [option(0, have, 1, 5.0)])
    assert any("exceeds the 40960 tokens" in note for note in long.notes)
    with pytest.raises(UsageError, match="unknown model"):
        fleet_for([Need("x", "qwen9", 1, W)], [have])


@pytest.fixture
def klab(monkeypatch, capsys, tmp_path):
    """Run a command line on a demand; returns (exit code, stdout, stderr)."""

    def run(demand, *args):
        path = tmp_path / "demand.csv"
        path.write_text(demand)
        line = ["klab", "fleet-size", "--demand", str(path), "--results", str(tmp_path), "--no-reference", *map(str, args)]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


DEMAND = """model,tokens_per_day,isl,osl,growth_per_month,peak_over_average,slo_tpot,offline,tp,sell_input,sell_output
qwen3-0.6b,5e9,1024,128,0.1,2,20ms,,1,0.05,0.1
qwen3-0.6b,5e9,1024,128,0.1,2,,yes,1,0.05,0.1
"""


def test_the_verb(klab):
    code, out, err = klab(DEMAND, "--chips", "h200", "--months", 2, "--gpus", "h200=16")
    assert "16 h200: " in err and "$/Mtok at that demand" in err
    assert code == 0 and "Month by month (modelled)" in out and "What 16 h200 can serve (modelled)" in out and "margin" in out
    assert "the offline rows would keep" in err and "h200 reserved" in err
    code, out, _ = klab(DEMAND, "--chips", "h200", "--months", 2, "--kw", 40, "--json", "--price", "h200=1,1.5,2")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["kind"] for row in rows] == ["chip", "option", "option", "month", "month", "month", "capacity", "note"]
    assert {row["label"] for row in rows if "label" in row} == {"modelled"}
    assert rows[0]["usd_per_gpu_hour"] == {"low": 1, "mid": 1.5, "high": 2}
    months = [row for row in rows if row["kind"] == "month"]
    assert all(m["usd"]["low"] <= m["usd"]["mid"] <= m["usd"]["high"] for m in months)
    room = rows[-2]
    assert room["provisioned_kw"] <= 40 and room["label"] == "modelled"
    assert sum(room["gpus"].values()) >= sum(one["replicas"] * one["gpus_per_replica"] for one in room["served_by"])
    assert room["usd"]["mid"] == pytest.approx(room["gpus"]["h200"] * 1.5 * 730)


def test_the_verb_when_the_rows_do_not_fit(klab):
    code, out, _ = klab(DEMAND, "--chips", "h200", "--months", 0, "--kw", 13, "--json")
    (room,) = [row for row in map(json.loads, out.splitlines()) if row["kind"] == "capacity"]
    assert code == 1 and room["scale"] is None and room["outgrown_in_month"] == 0


def test_the_verb_when_something_is_not_served(klab):
    code, out, err = klab(DEMAND.replace("20ms", "0.01ms"), "--chips", "h200", "--months", 1)
    assert code == 1 and "nothing on offer meets TPOT" in err and "nearest is h200" in err
    assert "qwen3-0.6b #2" in out and "qwen3-0.6b #1" not in out
    rows = map(json.loads, klab(DEMAND.replace("20ms", "0.01ms"), "--chips", "h200", "--months", 0, "--json")[1].splitlines())
    (one,) = [row for row in rows if row["kind"] == "unserved"]
    assert one["nearest"]["tpot_s"]["mid"] > 1e-5 and one["nearest"]["label"] == "modelled"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--chips", "h300"], "unknown chip"), (["--chips", "cpu"], "no reserved price"), (["--contract", "spot"], "unknown contract"),
        (["--gpus", "h200=many"], "not a number"), (["--gpus", "h200"], "CHIP=VALUE"), (["--gpus", "h200=0"], "whole machines"),
        (["--gpus", "b200=8", "--chips", "h200"], "leaves out"), (["--price", "a100=2"], "not among the chips"),
        (["--price", "h200=-2"], "positive"),
        (["--kw", "0"], "--kw"), (["--months", "-1"], "--months"), (["--tp", "0"], "--tp"), (["--headroom", "1"], "--headroom"),
        (["--gpus", "h200=nan"], "whole GPUs"), (["--gpus", "h200=inf"], "whole GPUs"), (["--gpus", "h200=8.9"], "whole GPUs"),
        (["--gpus", "h200=8,H200=16"], "twice"), (["--price", "h200=1", "--price", "h200=2"], "--price gives h200 twice"),
        (["--kw-per-gpu", "h200=1,h200=2"], "twice"), (["--price", "h200=1e308"], "positive number of dollars"),
        (["--gpus", "h200=8e15"], "more than"), (["--kw", "1e30"], "at most"), (["--machine", "1000000000"], "at most"),
        (["--least-replicas", "1000000000"], "at most"), (["--headroom", "0.9999999999999999"], "at most"),
        (["--kw-per-gpu", "h200=-1"], "positive number of kilowatts"), (["--objective", "fun"], "cost or kw"),
    ],
)  # fmt: skip
def test_the_verb_says_what_is_wrong(klab, args, said):
    code, out, err = klab(DEMAND, *args)
    assert code == 2 and said in err and not out


def test_json_stays_json_whatever_the_solver_prints(monkeypatch, capfd, tmp_path):
    """HiGHS prints a line of its own to the process's stdout for some sizes."""
    path = tmp_path / "demand.csv"
    path.write_text("model,tokens_per_day,isl,osl\nqwen3-8b,1e9,1024,128\nqwen3-30b-a3b,1e8,1024,128\n")
    line = ["klab", "fleet-size", "--demand", path, "--results", tmp_path, "--no-reference", "--months", 0, "--tp", "1,2", "--json"]
    for limit in (["--gpus", "h200=8000"], ["--chips", "h200", "--kw", "10000"]):
        monkeypatch.setattr(sys, "argv", [str(part) for part in [*line, *limit]])
        with pytest.raises(SystemExit):
            main()
        kinds = {json.loads(row)["kind"] for row in capfd.readouterr().out.splitlines()}
        assert {"month", "capacity"} <= kinds


def test_growth_beyond_all_measure(klab):
    text = DEMAND.replace(",0.1,2,20ms", ",10,2,20ms")
    code, out, err = klab(text, "--chips", "h200", "--months", 120)
    assert code == 2 and not out and "growth of 10 a month" in err and "--months" in err


def test_a_large_machine_is_a_whole_one():
    size = FleetSize([need(1)], [option(0, supply(), 1, 10)], limits=Limits(machine=10_000))
    assert size.months(0)[0].gpus == {"h200": 10_000}


def test_the_least_that_does(klab):
    """What does not fit is told what would: two rows, each a replica of 1 GPU, in one machine of 8."""
    code, _, err = klab(DEMAND, "--chips", "h200", "--months", 0, "--kw", 13)
    assert code == 1 and "not even 1 replica of every row" in err and "that takes 8 h200 (13.84 kW)" in err
    out = klab(DEMAND, "--chips", "h200", "--months", 0, "--kw", 13, "--json")[1]
    (room,) = [row for row in map(json.loads, out.splitlines()) if row["kind"] == "capacity"]
    assert room["least_gpus"] == {"h200": 8} and room["least_provisioned_kw"] == pytest.approx(13.84)
    # In kW where they are limited: three replicas of 4 GPUs take two machines of either chip.
    have = [supply("h200", 9, 1.73), supply("b200", 1, 2.17)]
    needs = [need(1, name=name) for name in "abc"]
    options = [option(at, one, 4, 5.0) for at in range(3) for one in have]
    assert FleetSize(needs, options, limits=Limits(kw=10)).least() == ({"h200": 16}, pytest.approx(16 * 1.73))


def test_a_request_too_long_is_told_what_fits(klab):
    code, _, err = klab("model,tokens_per_day,isl,osl\nqwen3-8b,1e9,2000000,128\n", "--chips", "h200", "--months", 0, "--tp", "1")
    assert code == 1 and "GB of cache for one request of 2000128 tokens" in err
    fits = int(err.split("up to ")[1].split()[0])
    assert fits < 2_000_000
    for isl, good in ((fits - 128, True), (fits - 127, False)):
        text = f"model,tokens_per_day,isl,osl\nqwen3-8b,1e9,{isl},128\n"
        assert (klab(text, "--chips", "h200", "--months", 0, "--tp", "1")[0] == 0) == good


def test_a_contract_of_ones_own_prices(tmp_path):
    price = '[[price]]\nchip = "h200"\ncontract = "owned"\nusd_per_gpu_hour = 0.5\ndate = "2026-05"\nsource = "us"\n'
    (tmp_path / "mine.toml").write_text(price)
    assert supply_of(find_chip("h200"), price="owned", prices=tmp_path, results=[tmp_path]).usd_per_gpu_hour.mid == 0.5
    with pytest.raises(UsageError, match="empty price"):
        supply_of(find_chip("h200"), price="", results=[tmp_path])


def test_how_long_it_lasts_against_every_month(monkeypatch):
    have = supply()
    for growths, halving in (((0.0, 0.0), True), ((0.3, 0.1), True), ((0.05, 0.0), True), ((-0.5, 0.4), False)):
        needs = [need(20, growth=growth, name=name) for growth, name in zip(growths, "ab", strict=True)]
        options = [option(0, have, 1, 5.0), option(1, have, 2, 9.0)]
        size = FleetSize(needs, options, limits=Limits(gpus={"h200": 16}))
        scales = [size.capacity(month).scale.mid for month in range(20)]
        asked = []
        monkeypatch.setattr(
            size, "_scale", lambda month, *rest, size=size, asked=asked: asked.append(month) or FleetSize._scale(size, month, *rest)
        )
        assert size.lasts(19) == next((month for month, scale in enumerate(scales) if scale < 1 - 1e-6), None)
        assert not halving or len(asked) <= 5


def test_an_answer_that_is_not_proven_is_said(monkeypatch):
    import scipy.optimize

    real = scipy.optimize.milp
    size = FleetSize([need(100)], [option(0, supply(), 2, 10)])
    size.months(0)
    assert not any("solver" in note for note in size.notes)

    def hurried(*args, **options):
        found = real(*args, **options)
        found.status, found.mip_gap = 1, 0.034
        return found

    monkeypatch.setattr(scipy.optimize, "milp", hurried)
    size.months(0)
    assert any("up to 3.40% better may exist" in note for note in size.notes)
