"""Who wins, who ties, and what settles it; nothing depends on the order of rows, on chance, or on what may not be chosen."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_results import contest, failed, made, problems

from klab.harness.choose import compare
from klab.harness.choose.choose import choose, wanted_from
from klab.harness.choose.profile import Choice, Profile
from klab.harness.store.result import Result, Status
from klab.kernels.errors import UsageError
from klab.kernels.matmul.problem import Matmul

SHAPE = Matmul(16, 256, 128)
DRIFT = [1 + 0.15 * (n % 7) / 7 for n in range(20)]


def flat(level: float, wobble: float = 0.0, rounds: int = 20) -> list[float]:
    return [level * (1 + wobble * ((n * 7) % 5 - 2) / 2) for n in range(rounds)]


def with_energy(row: Result, joules: float, width: float = 0.01) -> Result:
    low, high = joules * (1 - width), joules * (1 + width)
    return dataclasses.replace(row, energy_j=joules, energy_ci_low_j=low, energy_ci_high_j=high, power_w=400.0)


def only(rows: list[Result], **how: Any) -> Choice:
    profile = choose(rows, None, **how)
    (choice,) = profile.choices
    return choice


def test_the_fastest_wins() -> None:
    rows = [made(SHAPE, "torch", samples=flat(100, 0.01)), made(SHAPE, "triton_a", samples=flat(80, 0.01))]
    choice = only(rows)
    assert choice.kernel == "matmul/triton_a" and choice.evidence.settled_by == "alone" and choice.evidence.tied_count == 0
    library = choice.evidence.library
    assert library is not None and library.ratio == pytest.approx(1.25) and library.how == "same rounds"
    assert library.ratio_interval[0] <= 1.25 <= library.ratio_interval[1]


def test_rounds_taken_together_are_compared_pair_by_pair() -> None:
    """15% of common drift hides 2% from the intervals, but not from the ratios."""
    a, b = made(SHAPE, "triton_a", samples=flat(100), drift=DRIFT), made(SHAPE, "triton_b", samples=flat(102), drift=DRIFT)
    assert only([a, b]).evidence.tied_count == 0 and only([a, b]).kernel == "matmul/triton_a"
    apart = only([a, dataclasses.replace(b, run_id="run-2")])
    assert apart.evidence.tied_count == 1, "from different runs only the intervals count, and they overlap"
    assert apart.evidence.runner_up is not None and apart.evidence.runner_up.how == "separate"
    other_card = only([a, dataclasses.replace(b, device_uuid="GPU-1")])
    assert other_card.evidence.tied_count == 1, "two cards do not share a round"


def test_a_lower_median_yields_to_whoever_beats_it_round_by_round() -> None:
    """a's newest row came from a warm moment of another run; in the run that has both, b was faster in every round."""
    b = made(SHAPE, "triton_b", samples=flat(100, 0.002))
    then = made(SHAPE, "triton_a", samples=flat(104, 0.002))
    now = dataclasses.replace(made(SHAPE, "triton_a", samples=flat(99, 0.03)), run_id="run-2", recorded_at="2026-11-21T10:00:00Z")
    assert only([b, then, now]).kernel == "matmul/triton_b"


def test_marked_rounds_do_not_count() -> None:
    slow = [300.0] * 5 + flat(80, 0.01, 15)
    row = made(SHAPE, "triton_a", samples=slow, median_us=80.0, ci_low_us=79.5, ci_high_us=80.5, marked=(1,) * 5 + (0,) * 15)
    choice = only([row, made(SHAPE, "torch", samples=flat(100, 0.01))])
    assert choice.kernel == "matmul/triton_a"
    assert choice.evidence.library is not None and choice.evidence.library.ratio == pytest.approx(1.25, rel=0.02)


MAY_NOT: dict[str, dict[str, Any]] = {
    "unchecked": {"checks": 0},
    "no error recorded": {"error": None},
    "wrong": {"error": 1.0},
    "throttled": {"status": Status.THROTTLED},
    "marked throughout": {"marked": (1,) * 20},
    "incorrect": {"status": Status.INCORRECT},
    "timeout": {"status": Status.TIMEOUT},
    "screened": {"status": Status.SCREENED, "kind": "screened"},
    "modelled": {"kind": "modelled"},
    "reference": {"kind": "reference"},
    "checked and timed once": {"samples_us": (1.0,), "marked": (0,), "median_us": 1.0, "ci_low_us": 1.0, "ci_high_us": 1.0},
    "four rounds that count": {"marked": (0, 1, 1, 1, 1, 0, 0, 0), "samples_us": (1.0,) * 8},
    "no interval": {"ci_low_us": None, "samples_us": (1.0, 1.0), "marked": (0, 0)},
}


@pytest.mark.parametrize("what", MAY_NOT)
def test_what_may_not_be_chosen_is_not(what: str) -> None:
    tempting = made(SHAPE, "triton_a", samples=flat(1), **MAY_NOT[what])
    assert only([tempting, made(SHAPE, "torch")]).kernel == "matmul/torch"
    profile = choose([tempting], wanted_from([tempting]))
    assert not profile.choices and profile.open[0].reason.startswith("none of 1 results may be chosen: 1 x ")


def test_a_kernel_that_was_wrong_with_its_default_is_not_chosen_anywhere() -> None:
    small = Matmul(3, 5, 7)
    fast = [made(SHAPE, "triton_a", config={"block": n}, samples=flat(1)) for n in (64, 128)]
    library = made(SHAPE, "torch")

    def wrong(block: int) -> Result:
        return failed(small, "triton_a", Status.INCORRECT, "out is off by 0.3", config={"block": block}, error=0.3, checks=1)

    def default(row: Result) -> dict[str, object] | None:
        return {"block": 16 if row.problem_key == small.key else 64}

    assert only([*fast, library]).kernel == "matmul/triton_a"
    profile = choose([*fast, wrong(16)], wanted_from(fast), defaults=default)
    assert profile.open[0].reason.endswith("2 x wrong on " + small.label() + ": out is off by 0.3")
    assert [c.kernel for c in choose([*fast, library, wrong(16)], wanted_from(fast), defaults=default).choices] == ["matmul/torch"]
    # Wrong with another configuration than the default: that configuration alone is refused.
    for how in (default, None):
        (choice,) = choose([*fast, library, wrong(128)], wanted_from(fast), defaults=how).choices
        assert choice.kernel == "matmul/triton_a" and choice.config == {"block": 64}
    repaired = dataclasses.replace(wrong(16), source_digest="of last year's code")
    assert choose([*fast, repaired], wanted_from(fast), defaults=default).choices
    again = dataclasses.replace(made(small, "triton_a", config={"block": 16}), recorded_at="2026-11-21T00:00:00Z")
    assert choose([*fast, wrong(16), again], wanted_from(fast), defaults=default).choices


def test_a_problem_without_results_is_open() -> None:
    wanted = wanted_from([made(SHAPE)])
    assert choose([], wanted, chip="h200").open[0].reason == "never measured on this device"
    rows = [failed(SHAPE, "triton_a", Status.CRASHED, "illegal memory access") for _ in range(3)]
    rows += [failed(SHAPE, "triton_b", Status.TIMEOUT, "")]
    assert choose(rows, wanted).open[0].reason == ("none of 4 results may be chosen: 3 x crashed: illegal memory access; 1 x timeout")


def tie() -> tuple[Result, Result]:
    a = made(SHAPE, "triton_a", config={"block": 64, "stages": 3}, samples=flat(100, 0.02))
    b = made(SHAPE, "triton_b", config={"block": 128}, samples=list(reversed(flat(100.05, 0.02))))
    return a, b


def chosen(*rows: Result, **how: Any) -> tuple[str, str]:
    choice = only(list(rows), **how)
    assert choice.evidence.tied_count == len(rows) - 1
    return choice.kernel.removeprefix("matmul/"), choice.evidence.settled_by


def test_a_tie_goes_to_lower_energy_then_last_time_then_the_simpler() -> None:
    a, b = tie()
    before_a, before_b = choose([a], None), choose([b], None)
    assert chosen(with_energy(a, 0.05), with_energy(b, 0.04), previous=before_a) == ("triton_b", "energy")
    assert chosen(with_energy(a, 0.04), with_energy(b, 0.05), previous=before_b) == ("triton_a", "energy")
    assert chosen(with_energy(a, 0.0402), with_energy(b, 0.04), previous=before_a) == ("triton_a", "previous choice"), "overlap"
    assert chosen(with_energy(a, 0.05), b, previous=before_a) == ("triton_a", "previous choice"), "one has no energy"
    assert chosen(a, b, previous=before_a) == ("triton_a", "previous choice")
    assert chosen(a, b, previous=before_b) == ("triton_b", "simplicity"), "it is the simpler as well"
    assert chosen(a, b) == ("triton_b", "simplicity"), "one field to set instead of two"


def test_the_default_is_simpler_than_any_other() -> None:
    a, b = tie()
    defaults = {"matmul/triton_a": {"block": 64, "stages": 3}, "matmul/triton_b": {"block": 64}}
    assert chosen(a, b, defaults=lambda row: defaults[row.kernel]) == ("triton_a", "simplicity")
    near = {"matmul/triton_a": {"block": 64, "stages": 2}, "matmul/triton_b": {"block": 64}}
    assert chosen(a, b, defaults=lambda row: near[row.kernel]) == ("triton_a", "simplicity"), "one field each: then the name"


def test_last_time_does_not_save_what_is_slower_now() -> None:
    fast, slow = made(SHAPE, "triton_a", samples=flat(80, 0.01)), made(SHAPE, "triton_b", samples=flat(100, 0.01))
    assert only([fast, slow], previous=choose([slow], None)).kernel == "matmul/triton_a"


def test_the_objective_energy() -> None:
    fast = with_energy(made(SHAPE, "triton_a", samples=flat(80, 0.01)), 0.05)
    frugal = with_energy(made(SHAPE, "triton_b", samples=flat(95, 0.01)), 0.04)
    unmetered = made(SHAPE, "triton_c", samples=flat(10, 0.01), energy_reason="the window was too short")
    rows = [fast, frugal, unmetered]
    assert only(rows).kernel == "matmul/triton_c" and only(rows, objective="energy").kernel == "matmul/triton_b"
    equal = [with_energy(fast, 0.04), frugal]
    assert only(equal, objective="energy").evidence.settled_by == "latency"
    refused = choose([unmetered], None, "energy", chip="h200")
    assert refused.open[0].reason.endswith("1 x no energy: the window was too short")
    with pytest.raises(UsageError, match="unknown objective 'speed'; known: latency, energy"):
        choose(rows, None, "speed")


def test_energy_measured_apart_still_settles() -> None:
    a, b = tie()
    metered = [
        dataclasses.replace(with_energy(r, j), key=r.key + "e", recorded_at="2026-11-19T00:00:00Z") for r, j in ((a, 0.05), (b, 0.04))
    ]
    choice = only([a, b, *metered], previous=choose([a], None))
    assert (choice.kernel, choice.evidence.settled_by, choice.evidence.energy_j) == ("matmul/triton_b", "energy", 0.04)


def test_states_of_the_cache_are_not_mixed() -> None:
    warm = made(SHAPE, "triton_a", samples=flat(50, 0.01), l2_state="warm")
    cold = made(SHAPE, "triton_b", samples=flat(100, 0.01))
    choice = only([warm, cold])
    assert choice.kernel == "matmul/triton_b" and choice.evidence.candidates == 1 and choice.evidence.l2_state == "cold"
    assert only([warm]).evidence.l2_state == "warm"


def test_devices_and_chips_are_not_mixed() -> None:
    here = made(SHAPE, "torch", recorded_at="2026-11-21T10:00:00Z")
    elsewhere = made(SHAPE, "triton_a", samples=flat(10), device="NVIDIA H200 (another board)")
    profile = choose([here, elsewhere], None)
    assert profile.choices[0].kernel == "matmul/torch" and "1 results of other devices" in profile.notes[0]
    assert choose([here, elsewhere], None, device=elsewhere.device).choices[0].kernel == "matmul/triton_a"
    with pytest.raises(UsageError, match="cpu, h200"):
        choose([here, made(SHAPE, chip="cpu")], None)
    assert choose([here, made(SHAPE, chip="cpu")], None, chip="cpu").device.startswith("Example CPU")


def test_stale_code_is_flagged_or_refused() -> None:
    old = made(SHAPE, "triton_a", samples=flat(50, 0.01))
    library = made(SHAPE, "torch")
    now = {"matmul/triton_a": "new", "matmul/torch": library.source_digest}
    profile = choose([old, library], None, sources=now)
    assert profile.choices[0].stale and profile.choices[0].kernel == "matmul/triton_a" and "stale" in profile.notes[0]
    current = choose([old, library], None, sources=now, current_only=True).choices[0]
    assert current.kernel == "matmul/torch" and not current.stale
    again = dataclasses.replace(old, source_digest="new", samples_us=tuple(flat(60, 0.01)), median_us=60.0, ci_low_us=59.0, ci_high_us=61.0)
    standing = only([old, again, library], sources=now)
    assert not standing.stale and standing.evidence.median_us == 60.0, "rows of the present code stand for the kernel"
    newest = dataclasses.replace(again, recorded_at="2026-11-21T00:00:00Z")
    assert only([old, newest, library]).source_digest == "new", "the newest code, where the present one is unknown"


def test_shares_of_a_phase_add_up() -> None:
    from klab.harness.choose.profile import Use

    rows = contest()
    wanted = [dataclasses.replace(w, uses=(Use("decode", 8, "attention", 28),)) for w in wanted_from(rows)]
    choices = choose(rows, wanted).choices
    assert sum(use.share or 0 for c in choices for use in c.wanted.uses) == pytest.approx(1.0)
    assert len(choices) == len(problems())


@settings(max_examples=25, deadline=None)
@given(
    levels=st.lists(st.sampled_from([99.0, 100.0, 100.2, 101.0, 130.0]), min_size=1, max_size=6),
    wobble=st.sampled_from([0.0, 0.003, 0.05]),
    runs=st.lists(st.sampled_from(["run-1", "run-2"]), min_size=6, max_size=6),
    energies=st.lists(st.sampled_from([None, 0.04, 0.0401, 0.05]), min_size=6, max_size=6),
    objective=st.sampled_from(["latency", "energy"]),
    seed=st.integers(0, 1000),
)
def test_the_order_of_rows_does_not_matter(
    levels: list[float], wobble: float, runs: list[str], energies: list[float | None], objective: str, seed: int
) -> None:
    rows = []
    for n, level in enumerate(levels):
        row = made(SHAPE, f"triton_{n % 3}", config={"block": n}, samples=flat(level, wobble), run_id=runs[n])
        joules = energies[n]
        rows.append(row if joules is None else with_energy(row, joules))
    rows += [failed(SHAPE, "triton_9", Status.TIMEOUT, "hung"), dataclasses.replace(rows[0], status=Status.THROTTLED)]
    wanted = wanted_from(rows)
    first = choose(rows, wanted, objective)
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    again = choose(shuffled, wanted, objective)
    assert again.to_text() == first.to_text()
    for choice in first.choices:
        assert objective == "latency" or choice.evidence.energy_j is not None
        kept = choose(shuffled, wanted, objective, previous=first)
        assert kept.choices[0].kernel == choice.kernel and kept.choices[0].config == choice.config, "a second choice changes nothing"


def test_an_empty_store_gives_an_empty_profile() -> None:
    assert choose([], None) == Profile("", "latency")


def in_contest(row: Result, contest: str, **facts: Any) -> Result:
    return dataclasses.replace(row, build={"contest": {"id": contest, "contestants": 8} | facts})


def test_one_contest_shares_its_laps_up_to_where_the_first_ended() -> None:
    long, short = DRIFT, DRIFT[:12]
    a = in_contest(made(SHAPE, "triton_a", samples=flat(100), drift=long), "c1")
    b = in_contest(made(SHAPE, "triton_b", samples=flat(102, rounds=12), drift=short), "c1")
    evidence = only([a, b]).evidence
    assert evidence.tied_count == 0 and evidence.runner_up is not None
    assert evidence.runner_up.how == "same rounds" and evidence.runner_up.ratio == pytest.approx(1.02)
    apart = only([a, dataclasses.replace(in_contest(b, "c2"), samples_us=a.samples_us, marked=a.marked)]).evidence
    assert apart.runner_up is not None and apart.runner_up.how == "separate", "equally many rounds of another contest are not shared"


def test_the_blocks_of_one_final_count_together() -> None:
    """Each block leaves 1% open, all of them together do not; rounds of the search before them (another policy) are not mixed in."""

    def block(kernel: str, level: float, n: int, **policy: Any) -> Result:
        samples = (
            [level * (1 + 0.02 * (((7 * i + 3 * n) % 5) - 2) * (-1) ** i) for i in range(16)] if kernel == "triton_b" else [level] * 16
        )
        row = made(SHAPE, kernel, samples=samples, seed=n, policy={"max_rounds": 16} | policy)
        return in_contest(dataclasses.replace(row, key=f"{row.key}{n}"), f"c{n}")

    blocks = [block(kernel, level, n, seed=n) for n in range(1, 9) for kernel, level in (("triton_a", 100.0), ("triton_b", 101.2))]
    search = [block(kernel, level, 0, max_rounds=40) for kernel, level in (("triton_a", 150.0), ("triton_b", 100.0))]
    evidence = only([*search, *blocks]).evidence
    assert evidence.tied_count == 0 and evidence.runner_up is not None and evidence.runner_up.how == "same rounds"
    together = evidence.runner_up.ratio_interval
    alone = only([*search, *blocks[-2:]]).evidence
    rival = alone.runner_up or alone.tied[0]
    assert together[1] - together[0] < 0.6 * (rival.ratio_interval[1] - rival.ratio_interval[0])


def test_groups_are_compared_through_their_baseline() -> None:
    """The second group ran while the device was 5% slower: the intervals would name the wrong one, the baseline does not."""
    baseline = {"baseline": "matmul/torch", "baseline_config": {}}
    a = made(SHAPE, "triton_a", samples=flat(100, 0.004))
    a = in_contest(a, "c1", **baseline, ratio=0.80, ratio_low=0.798, ratio_high=0.802)
    b = made(SHAPE, "triton_b", samples=flat(102, 0.004))
    b = in_contest(b, "c2", **baseline, ratio=0.777, ratio_low=0.775, ratio_high=0.779)
    choice = only([a, b])
    assert choice.kernel == "matmul/triton_b" and choice.evidence.tied_count == 0
    rival = choice.evidence.runner_up
    assert rival is not None and rival.how == "same baseline" and rival.ratio == pytest.approx(0.80 / 0.777)
    elsewhere = in_contest(b, "c2", **(baseline | {"baseline": "matmul/cupy"}), ratio=0.777, ratio_low=0.775, ratio_high=0.779)
    assert only([a, elsewhere]).kernel == "matmul/triton_a", "another baseline anchors nothing"


def test_rows_that_never_reached_a_device_are_of_none() -> None:
    dropped = failed(SHAPE, "triton_x", Status.UNSUPPORTED, "spills", kind="screened", device="")
    profile = choose([made(SHAPE), dropped], None)
    assert profile.notes == () and profile.choices[0].kernel == "matmul/torch"


def nearly_equal() -> list[Result]:
    """A default, another configuration and a library that nothing tells apart; the medians go up by 0.5%."""
    runs = [("triton_a", {"block": 64}, 100.0), ("triton_a", {"block": 128}, 99.5), ("torch", {}, 100.5)]
    return [
        dataclasses.replace(made(SHAPE, name, config=config, samples=flat(level, 0.1)), run_id=f"run-{n}")
        for n, (name, config, level) in enumerate(runs)
    ]


def test_simplicity_does_not_choose_what_is_slower_than_the_default() -> None:
    rows = nearly_equal()

    def default(row: Result) -> dict[str, object] | None:
        return {} if row.library else {"block": 64}

    choice = only(rows, defaults=default)
    assert (choice.config, choice.evidence.settled_by, choice.evidence.tied_count) == ({"block": 64}, "simplicity", 2)
    assert only(rows).kernel == "matmul/torch", "where no default is known, a library is the simpler"
    assert only(rows, defaults=default, previous=choose([rows[2]], None)).config == {"block": 64}, "nor does habit"
    faster = dataclasses.replace(rows[2], median_us=99.0)
    assert only([*rows[:2], faster], defaults=default).kernel == "matmul/torch"


def test_the_winner_of_a_final_is_the_choice() -> None:
    rows = nearly_equal()
    final = {SHAPE.key: ("matmul/triton_a", {"block": 64}, "the default: nothing is clearly faster")}
    choice = only(rows, finals=final)
    assert (choice.kernel, choice.config) == ("matmul/triton_a", {"block": 64})
    evidence = choice.evidence
    assert (evidence.settled_by, evidence.final_reason, evidence.tied_count) == ("final", "the default: nothing is clearly faster", 2)
    assert evidence.runner_up is not None and evidence.runner_up.config == {"block": 128}
    again = Profile.from_text(choose(rows, None, finals=final).to_text(), "here")
    assert again.choices[0].evidence.final_reason == evidence.final_reason


def test_a_winner_that_may_not_be_chosen_is_noted_and_not_chosen() -> None:
    rows = nearly_equal()
    wrong = made(SHAPE, "triton_b", samples=flat(50), status=Status.INCORRECT)
    for winner in (("matmul/triton_b", {}, "won"), ("matmul/triton_a", {"block": 32}, "won")):
        profile = choose([*rows, wrong], None, finals={SHAPE.key: winner})
        assert profile.choices[0].evidence.settled_by == "simplicity" and not profile.choices[0].evidence.final_reason
        assert any("the winner of its final" in note and winner[0] in note for note in profile.notes)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_plainly_slower_is_not_resampled_and_nothing_else_changes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The profile is to the letter that of comparing everything with everything."""
    rng = random.Random(seed)
    rows = [
        made(shape, f"triton_{n}", level_us=100 * rng.choice((1, 1.001, 1.004, 1.02, 1.09, 1.3)), noise=0.004, drift=DRIFT, seed=seed)
        for shape in problems()[:6]
        for n in range(8)
    ]
    compared: list[int] = []
    ratio = compare.ratio
    monkeypatch.setattr(compare, "ratio", lambda *given: compared.append(1) or ratio(*given))
    text = choose(rows, None).to_text()
    few = len(compared)
    monkeypatch.setattr(compare, "_close_ratio", compare.ratio)
    assert choose(rows, None).to_text() == text and few < (len(compared) - few) / 2
