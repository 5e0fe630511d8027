"""Two sets of stored results: what was measured on other days is judged by what days differ by."""

import dataclasses
import json

import pytest
from made_results import made, problems

from klab.harness.store.journal import Journal
from klab.harness.store.result import Status
from klab.harness.watch.compare_results import compare_results
from klab.harness.watch.compare_run import Request
from klab.kernels.errors import UsageError

PROBLEM = problems()[3]


def row(run, level=100.0, kernel="triton_tiled", problem=PROBLEM, seed=0, anchor=None, **changes):
    found = made(problem, kernel, level_us=level, noise=0.002, seed=seed, run_id=run, **changes)
    if anchor:
        us = [anchor] * len(found.samples_us)
        build = {**found.build, "anchors": {name: {"us": us, "mhz": [None] * len(us)} for name in ("matmul", "copy")}}
        found = dataclasses.replace(found, build=build)
    return found


@pytest.fixture
def stored(tmp_path):
    def store(name, rows):
        with Journal(tmp_path / name, name) as journal:
            for one in rows:
                journal.append(one)
        return str(tmp_path / name)

    return store


def compared(stored, a, b, **request):
    return compare_results(stored("a", a), stored("b", b), Request(**request))


def runs(levels, name, **more):
    return [row(f"{name}{n}", level, seed=n, **more) for n, level in enumerate(levels)]


def test_one_run_each_is_held_against_the_drift_between_days(stored):
    near = compared(stored, runs([100.0], "a"), runs([102.0], "b"))
    (line,) = near.lines
    assert line.found.answer == "cannot tell" and "3% is allowed" in line.found.reason and near.exit_code(strict=True) == 3
    assert line.found.low < 0.995 and line.found.high > 1.045


def test_one_run_each_tells_what_is_beyond_any_drift(stored):
    assert compared(stored, runs([100.0], "a"), runs([110.0], "b")).answer == "slower"


def test_several_runs_show_what_they_differ_by(stored):
    steady = [100.0, 100.2, 99.9, 100.1]
    assert compared(stored, runs(steady, "a"), runs([x * 1.03 for x in steady], "b")).answer == "slower"


def test_several_noisy_runs_show_that_they_cannot_tell(stored):
    noisy = compared(stored, runs([100.0, 104.0, 97.0, 101.0], "a"), runs([103.0, 107.0, 100.0, 104.0], "b"))
    assert noisy.answer == "cannot tell"


def test_equal_runs_are_the_same(stored):
    steady = [100.0, 100.2, 99.9, 100.1]
    found = compared(stored, runs(steady, "a"), runs(steady[::-1], "b"))
    assert found.answer == "same" and found.exit_code(strict=True) == 0 and found.lines[0].differs == "nothing"


def test_an_anchor_of_the_same_laps_takes_out_what_the_days_had_in_common(stored):
    # The second day is 10% slower in everything, the kernel included.
    found = compared(stored, runs([100.0], "a", anchor=50.0), runs([110.0], "b", anchor=55.0))
    assert "anchor" in found.lines[0].found.reason and found.lines[0].found.ratio == pytest.approx(1.0, abs=0.005)
    assert compared(stored, runs([100.0], "c", anchor=50.0), runs([110.0], "d")).lines[0].found.ratio > 1.05


def test_another_board_and_another_driver_are_said(stored):
    other = [
        dataclasses.replace(one, device_uuid="GPU-other", environment={**one.environment, "driver": "999.1"}) for one in runs([108.0], "b")
    ]
    found = compared(stored, runs([100.0], "a"), other)
    assert "different devices" in found.lines[0].found.reason and found.answer == "cannot tell"
    assert any(note.startswith("driver: ") and "999.1 in B" in note for note in found.notes)


def test_a_kernel_that_fails_on_b_is_broken_also_where_it_worked_before(stored):
    good = runs([100.0], "a")
    failed = dataclasses.replace(
        good[0],
        status=Status.INCORRECT,
        reason="output 0 differs",
        median_us=None,
        samples_us=(),
        recorded_at="2026-11-21T00:00:00Z",
        run_id="c",
    )
    for b in ([failed], [*good, failed]):
        found = compare_results(stored(f"a{len(b)}", good), stored(f"b{len(b)}", b), Request())
        assert found.answer == "broken" and "output 0 differs" in found.lines[0].found.reason and found.exit_code() == 1
    back = compare_results(stored("x", [failed]), stored("y", good), Request())
    assert back.answer == "not compared" and "fails on A" in back.lines[0].found.reason


def test_each_kernel_is_taken_at_its_best_and_what_one_side_lacks_is_said(stored):
    a = [row("r", 100.0, config={"block_m": 64}), row("r", 120.0, config={"block_m": 128}), row("r", 50.0, kernel="cuda_mma")]
    b = [row("s", 140.0, config={"block_m": 64}), row("s", 80.0, config={"block_m": 128})]
    found = compared(stored, a, b)
    (line,) = found.lines
    assert (
        found.answer == "faster"
        and (line.a["config"], line.b["config"]) == ({"block_m": 64}, {"block_m": 128})
        and line.differs == "config"
    )
    assert [why for name, why in found.alone if "cuda_mma" in name] == ["only A has it"]


def test_of_a_kernel_whose_code_changed_within_a_set_the_newest_counts(stored):
    old = dataclasses.replace(row("old", 50.0, recorded_at="2026-11-19T00:00:00Z"), source_digest="older")
    (line,) = compared(stored, [old, row("a", 100.0)], [row("b", 100.0)]).lines
    assert line.found.ratio == pytest.approx(1.0, abs=0.01) and line.differs == "nothing"
    # Also where the newest code was measured with another configuration.
    elsewhere = dataclasses.replace(old, config={"block_m": 8})
    found = compare_results(stored("c", [elsewhere, row("c", 100.0)]), stored("d", [row("d", 100.0)]), Request())
    assert found.lines[0].found.ratio == pytest.approx(1.0, abs=0.01) and found.lines[0].differs == "nothing"


def test_cold_and_warm_caches_are_two_things(stored):
    warm = [dataclasses.replace(one, policy={**one.policy, "l2": "warm"}) for one in runs([50.0], "b")]
    with pytest.raises(UsageError, match="in common"):
        compared(stored, runs([100.0], "a"), warm)


def test_energies_are_compared_by_their_own_interval(stored):
    def joules(value, run):
        return dataclasses.replace(
            row(run), energy_j=value, energy_ci_low_j=0.999 * value, energy_ci_high_j=1.001 * value, sm_clock_mhz=None, clocks_mhz=()
        )

    found = compared(stored, [joules(1.0, "a")], [joules(1.2, "b")], metric="energy")
    assert found.answer == "slower" and found.metric == "energy" and "energy B/A" in found.headline()


def test_filters_and_torn_lines(stored, tmp_path):
    a = stored("a", [*runs([100.0], "a"), row("a", 10.0, problem=problems()[0])])
    b = stored("b", [*runs([100.0], "b"), row("b", 10.0, problem=problems()[0])])
    with (next((tmp_path / "b").glob("*.jsonl"))).open("a") as file:
        file.write('{"key": ')
    found = compare_results(a, b, Request(problems=(PROBLEM.label(),)))
    assert len(found.lines) == 1 and any("torn" in note for note in found.notes)
    with pytest.raises(UsageError):
        compare_results(a, b, Request(kernels=("nothing",)))
    # A row of a later klab costs only itself, and is said.
    later = stored("b", [dataclasses.replace(row("later", 300.0), policy={"of_later": 1})])
    found = compare_results(a, later, Request(problems=(PROBLEM.label(),)))
    assert found.lines[0].found.replicates == 1 and any("of_later" in note and "1 skipped" in note for note in found.notes)


def test_the_verb_compares_two_folders(klab, stored, tmp_path):
    a, b = stored("a", runs([100.0], "a")), stored("b", runs([120.0], "b"))
    code, out, err = klab("compare", a, b, "--json", "--out", tmp_path / "out")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and [one["type"] for one in rows] == ["pair", "overall"] and rows[-1]["answer"] == "slower" and "B is slower" in err
    kept = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert kept[0]["type"] == "sides" and kept[1:] == rows and "B is slower" in (tmp_path / "out" / "summary.md").read_text()
    assert klab("compare", a, a, "--strict")[0] == 3
    assert klab("compare", a, tmp_path / "nothing")[0] == 2
