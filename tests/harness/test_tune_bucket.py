"""One configuration for several shapes: regret, what cannot serve, where to cut; and `klab choose --bucket`."""

import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_results import failed, made
from typer.testing import CliRunner

from klab.harness.choose.buckets import lines
from klab.harness.choose.choose import wanted_from
from klab.harness.cli.main import build_app
from klab.harness.store.journal import Journal
from klab.harness.store.result import Status
from klab.harness.tune.bucket import HOWS, best_for_bucket, buckets, buckets_at
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.errors import UsageError
from klab.kernels.matmul.problem import Matmul

VALUES = {
    "1": {"small": 10.0, "middle": 10.2, "large": 20.0, "breaks": 9.0},
    "8": {"small": 12.0, "middle": 11.0, "large": 18.0, "breaks": 10.0},
    "64": {"small": 40.0, "middle": 33.0, "large": 30.0, "breaks": math.inf},
}


def test_regret_is_against_each_shape_s_own_best():
    found = best_for_bucket(VALUES)
    assert [s.config for s in found.ranking] == ["middle", "small", "large"]
    assert found.best.regrets == pytest.approx((10.2 / 9 - 1, 11 / 10 - 1, 33 / 30 - 1))
    assert found.best.regret == pytest.approx((10.2 / 9 * 1.1 * 1.1) ** (1 / 3) - 1)
    assert found.fails == {"breaks": ("64",)}, "the best on two shapes failed on the third"
    assert best_for_bucket(VALUES, "worst").best.regret == pytest.approx(10.2 / 9 - 1)


def test_a_hole_is_a_failure():
    holes = {"1": {"a": 1.0}, "8": {"b": 1.0, "c": float("nan")}, "64": {"a": 2.0, "b": 1.0}}
    found = best_for_bucket(holes)
    assert found.best is None and found.ranking == () and found.fails == {"a": ("8",), "b": ("1",), "c": ("1", "8", "64")}
    assert [b.shapes for b in buckets(holes, 2)] == [("1",), ("8", "64")]
    nothing = VALUES | {"128": {"a": math.inf}}
    cut = buckets(nothing, 1)
    assert [(b.shapes, b.best and b.best.config) for b in cut] == [(("1", "8", "64"), "middle"), (("128",), None)]


def test_cuts_are_where_the_regret_is_least():
    assert [b.shapes for b in buckets(VALUES, 2)] == [("1", "8"), ("64",)]
    assert [b.best.config for b in buckets(VALUES, 2)] == ["breaks", "large"]
    assert len(buckets(VALUES, 3)) == 2, "a third bucket would gain nothing"
    assert [b.shapes for b in buckets_at(VALUES, ["8"])] == [("1",), ("8", "64")]
    with pytest.raises(UsageError, match="cannot begin at 9: the shapes are 1, 8, 64"):
        buckets_at(VALUES, ["9"])
    for wrong in (lambda: best_for_bucket({}), lambda: best_for_bucket(VALUES, "mean"), lambda: buckets(VALUES, 0)):
        with pytest.raises(UsageError):
            wrong()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_other_cut_is_better(data):
    shapes, configs = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    cell = st.one_of(st.floats(1.0, 3.0), st.just(math.inf))
    values = {str(s): {f"c{c}": data.draw(cell) for c in range(configs)} for s in range(shapes)}
    how, count = data.draw(st.sampled_from(HOWS)), data.draw(st.integers(1, 4))
    served = {s: row for s, row in values.items() if any(map(math.isfinite, row.values()))}

    def total(cut):
        if any(b.best is None for b in cut):
            return math.inf
        logs = [math.log1p(r) for b in cut for r in b.best.regrets]
        return sum(logs) if how == "geomean" else max(logs, default=0.0)

    found = [b for b in buckets(values, count, how) if b.shapes[0] in served]
    assert [s for b in found for s in b.shapes] == list(served) and len(found) <= count
    if not served:
        return
    keys = list(served)
    every = [
        buckets_at(served, [keys[n] for n in starts], how)
        for k in range(min(count, len(keys)))
        for starts in itertools.combinations(range(1, len(keys)), k)
    ]
    assert total(found) == pytest.approx(min(map(total, every)), abs=1e-9)


def test_lines_are_of_problems_that_differ_in_one_size():
    problems = [Matmul(m, 64, 32) for m in (64, 8, 1)] + [Matmul(8, 128, 32), Matmul(1, 64, 32, "float32"), Matmul(8, 64, 16)]
    problems += [DecodeAttention((n,) * b, 8, 2, 64) for n, b in ((128, 1), (128, 16), (256, 1))]
    problems += [DecodeAttention((64, 128), 8, 2, 64)]
    wanted = wanted_from([made(p) for p in problems])
    found = {(line.operator, line.axis): line.sizes for line in lines(wanted)}
    assert found == {("matmul", "m"): (1, 8, 64), ("decode_attention", "kv_lens.count"): (1, 16)}
    assert [line.sizes for line in lines(wanted, "kv_lens.each")] == [(128, 256)]
    assert [line.sizes for line in lines(wanted, "n")] == [(64, 128)] and lines(wanted, "head_dim") == []


def store_of(tmp_path, times, **how):
    with Journal(tmp_path / "store", "run") as journal:
        for m, row in times.items():
            for block, level in row.items():
                problem = Matmul(m, 256, 128)
                if level is None:
                    journal.append(failed(problem, "triton_a", Status.CRASHED, "gone", config={"block": block}))
                else:
                    journal.append(made(problem, "triton_a", config={"block": block}, samples=[level] * 20, **how))
    return ["choose", "--chip", "h200", "--results", str(tmp_path / "store"), "--bucket"]


def test_the_verb(tmp_path):
    words = store_of(tmp_path, {1: {16: 10.0, 64: 11.0}, 8: {16: 10.0, 64: 10.5, 128: 9.0}, 64: {16: 30.0, 64: 20.0, 128: None}})
    done = CliRunner().invoke(build_app(), [*words, "geomean", "--json"], catch_exceptions=False)
    (told,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == 0 and told["config"] == {"block": 64} and told["axis"] == "m" and told["incomplete"] == 1
    assert [(s["size"], s["own_best"]["config"]["block"], round(s["regret"], 6)) for s in told["shapes"]] == [
        (1, 16, 0.1), (8, 128, round(10.5 / 9 - 1, 6)), (64, 64, 0.0),
    ]  # fmt: skip
    two = CliRunner().invoke(build_app(), [*words, "worst", "--buckets", "2", "--json"], catch_exceptions=False)
    configs = [(line["config"], [s["size"] for s in line["shapes"]]) for line in map(json.loads, two.stdout.splitlines())]
    assert configs == [({"block": 16}, [1, 8]), ({"block": 64}, [64])]
    shown = CliRunner().invoke(build_app(), [*words, "worst"], catch_exceptions=False)
    assert "matmul, m 1..64: triton_a block=64 (worst regret 16.67%; latency, us)" in shown.stdout and "the same" in shown.stdout


def test_a_bucket_that_nothing_serves_says_what_is_missing(tmp_path):
    words = store_of(tmp_path, {1: {16: 10.0}, 8: {64: 10.0}, 64: {16: None}})
    done = CliRunner().invoke(build_app(), [*words, "geomean"], catch_exceptions=False)
    assert done.exit_code == 4 and "matmul 64x256x128 bf16: none of 1 results may be chosen: 1 x crashed: gone" in done.stderr
    words = store_of(tmp_path / "other", {1: {16: 10.0, 64: 11.0}, 8: {64: 10.0, 128: 9.0}, 16: {128: 9.0, 64: None}})
    done = CliRunner().invoke(build_app(), [*words, "geomean"], catch_exceptions=False)
    assert done.exit_code == 4 and "the nearest, matmul/triton_a block=128, has none on matmul 1x256x128 bf16" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bucket", "mean"], "unknown regret 'mean'; known: geomean, worst"),
        (["--buckets", "2"], "go with --bucket"),
        (["--bucket", "worst", "--buckets", "0"], "at least one bucket"),
        (["--bucket", "worst", "--bucket-by", "page_size"], "in page_size"),
        (["--bucket", "worst", "--out", "x.json"], "leave out --out"),
    ],
)
def test_a_bad_request_is_one_line(tmp_path, words, said):
    base = store_of(tmp_path, {1: {16: 10.0}, 8: {16: 10.0}})[:-1]
    done = CliRunner().invoke(build_app(), [*base, *words])
    assert isinstance(done.exception, UsageError) and said in str(done.exception) and "\n" not in str(done.exception)


def test_other_objectives(tmp_path):
    energies = {"energy_j": 0.05, "energy_ci_low_j": 0.049, "energy_ci_high_j": 0.051}
    words = store_of(tmp_path, {1: {16: 10.0, 64: 11.0}, 8: {16: 10.0, 64: 10.5}}, **energies)
    for objective, value in (("energy", 0.05), ("energy-delay", 0.05 * 10e-6)):
        done = CliRunner().invoke(build_app(), [*words, "geomean", "--objective", objective, "--json"], catch_exceptions=False)
        assert json.loads(done.stdout)["shapes"][0]["value"] == pytest.approx(value)
    priced = [*words[:-1], "--objective", "cost", "--usd-per-hour", "3.6", "--usd-per-kwh", "0.36"]
    profile = CliRunner().invoke(build_app(), [*priced, "--json"], catch_exceptions=False)
    first = json.loads(profile.stdout.splitlines()[0])
    assert first["objective"] == "cost" and "by cost at 3.6 USD/h and 0.36 USD/kWh" in first["notes"]
    unpriced = CliRunner().invoke(build_app(), [*words[:-1], "--objective", "cost"])
    assert isinstance(unpriced.exception, UsageError) and "--usd-per-hour and --usd-per-kwh" in str(unpriced.exception)
