"""The top of the page and what changed: sentences word for word on made data, and the figures in them against sums made here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
from made_nights import eventful, night
from made_results import contest, failed, made, problems

from klab.harness.catalog import find_chip, find_model
from klab.harness.choose.decide import decide
from klab.harness.choose.profile import Profile, StepTime, Use
from klab.harness.plan import Scenario, plan
from klab.harness.report.gain import gain_of, geometric_mean, headroom_of, step_gain, step_time
from klab.harness.report.gather import story_of
from klab.harness.report.limits import Limits, bound, limits_of
from klab.harness.report.request import Request
from klab.harness.report.sections import changes, steps, strip
from klab.harness.report.sections.changes import changes_of, summary
from klab.harness.report.sections.sentences import Sentence, sentences
from klab.harness.report.subject import Story, tell
from klab.harness.store.result import Result, Status
from klab.kernels.matmul.problem import Matmul

NASTY = '<script>alert("x")</script>'
A, B = Matmul(64, 2048, 1024), Matmul(4096, 2048, 1024)


def story(rows: Sequence[Result], **changes: object) -> Story:
    def limits(chip: str, device: str) -> Limits:
        return limits_of(chip, device) if chip == "h200" else Limits(None, "the peaks of this CPU are not known")

    told = tell(rows, lambda chip, found: decide(found, None, chip), limits)
    return dataclasses.replace(told, **changes)  # type: ignore[arg-type]


def rounds(us: float) -> list[float]:
    """Ten rounds around a median, the same pattern at any level: ratios of two such rows are exact."""
    return [us * (1 + 0.001 * (n % 5 - 2)) for n in range(10)]


def row(problem: Matmul, kernel: str, us: float, **more: object) -> Result:
    ends = {"ci_low_us": 0.99 * us, "ci_high_us": 1.01 * us}
    return made(problem, kernel, samples=rounds(us), **ends | more)  # type: ignore[arg-type]


def texts(told: Story) -> list[str]:
    return [one.text for one in sentences(told)]


def test_two_problems_word_for_word() -> None:
    rows = [row(A, "torch", 20.0), row(A, "triton_a", 10.0), row(B, "torch", 40.0), row(B, "triton_a", 80.0)]
    first, second, third = texts(story(rows))
    assert first == (
        "On h200 the chosen kernels are 1.414× as fast as the best library (geometric mean over 2 problems, 1 where a "
        "library is the choice): own kernels win 1, tie 0 and lose 1."
    )
    chip = limits_of("h200", "").chip
    assert chip is not None
    least = [max(p.flops() / chip.peak_tflops["bfloat16"] / 1e6, p.bytes_moved() / chip.memory_gb_per_s / 1e3) for p in (A, B)]
    share = 100 * sum(least) / 50
    assert f"reach {share:.1f}% ({share / 1.01:.1f}% to {share / 0.99:.1f}%) of the roofline over 2 problems" in second
    assert f"most is left in {B.label()} ({40 - least[1]:.1f} µs above its least time" in second
    assert "What a step of a model takes needs its plan: `klab report --model NAME`." in second
    assert third == (
        "On h200 there is no earlier run or night to compare with; all 2 choices with a rival are clear of it by 95% intervals. "
        f"Next: tune {B.label()}, where one launch has {40 - least[1]:.1f} µs to gain."
    )


def test_an_interval_that_holds_one_is_a_tie_and_an_own_kernel_alone_is_no_win() -> None:
    """What is compared in different runs has the ends of both intervals: 10 us within 2% are not told from 10.1 us within 2%."""
    other = {"run_id": "run-2", "samples_us": (*rounds(10.1), 10.1)}
    rows = [row(A, "triton_a", 10.0, ci_low_us=9.8, ci_high_us=10.2, energy_j=None), row(A, "torch", 10.1, ci_low_us=9.9, ci_high_us=10.3)]
    rows[1] = dataclasses.replace(rows[1], **other)  # type: ignore[arg-type]
    alone = made(B, "triton_a", samples=rounds(5.0))
    gain = gain_of(story([*rows, alone]).subjects[0])
    assert (gain.won, gain.tied, gain.lost, gain.alone, gain.problems) == (0, 1, 0, 1, 1)
    assert "tie 1 and lose 0; 1 more has no library to compare with." in texts(story([*rows, alone]))[0]
    metered = dataclasses.replace(rows[0], energy_j=0.001, energy_ci_low_j=0.00099, energy_ci_high_j=0.00101)
    costly = dataclasses.replace(rows[1], energy_j=0.002, energy_ci_low_j=0.00199, energy_ci_high_j=0.00201)
    subject = story([metered, costly]).subjects[0]
    gain = gain_of(subject)
    assert not subject.profile.choices[0].library and (gain.won, gain.tied, gain.lost) == (0, 1, 0), "chosen for its energy"


def test_the_geometric_mean_of_a_contest() -> None:
    told = story(contest())
    subject = told.subjects[0]
    logs = []
    for problem in problems():
        best = {True: math.inf, False: math.inf}
        for one in subject.fine:
            if one.problem_key == problem.key:
                assert one.median_us is not None
                best[one.library] = min(best[one.library], one.median_us)
        logs.append(max(0.0, math.log(best[True] / best[False])))
    gain = gain_of(subject)
    assert gain.ratio is not None and gain.problems == len(logs) == gain.won + gain.lost
    assert gain.ratio[0] == pytest.approx(math.exp(sum(logs) / len(logs)), rel=2e-3)
    assert gain.ratio[1] <= gain.ratio[0] <= gain.ratio[2]
    assert geometric_mean([]) is None and geometric_mean([(0.0, 1.0, 1.0)]) is None
    assert geometric_mean([(2.0, 1.0, 4.0), (8.0, 4.0, 16.0)]) == pytest.approx((4.0, 2.0, 8.0))


def test_steps_add_launches_and_compare_only_what_is_measured() -> None:
    rows = [row(A, "torch", 20.0), row(A, "triton_a", 10.0), row(B, "torch", 40.0)]
    told = story(rows)
    subject = told.subjects[0]
    counts = {A.key: 3, B.key: 2}
    used = tuple(
        dataclasses.replace(c, wanted=dataclasses.replace(c.wanted, uses=(Use("decode", 8, "up", counts[c.wanted.problem_key]),)))
        for c in subject.profile.choices
    )
    step = StepTime("decode", 8, 110.0, 140.0, 0, 1.0)
    profile = dataclasses.replace(subject.profile, choices=used, steps=(step,), model="made")
    subject = dataclasses.replace(subject, profile=profile)
    assert step_time(subject, step) == pytest.approx((110.0, 0.99 * 110, 1.01 * 110))
    ratio = step_gain(subject, step)
    assert ratio is not None and ratio[0] == pytest.approx(140 / 110)
    whole = dataclasses.replace(told, subjects=(subject,), model="made")
    assert "A decode step of made at batch 8 on h200 takes 110 µs of kernel time (108.9 to 111.1 µs), 1.273×" in texts(whole)[1]
    no_library = dataclasses.replace(step, library_us=None)
    some = dataclasses.replace(subject, profile=dataclasses.replace(profile, steps=(no_library,)))
    assert step_gain(some, no_library) is None
    assert "not every problem of it has a library to compare with" in texts(dataclasses.replace(whole, subjects=(some,)))[1]
    lacking = dataclasses.replace(subject, profile=dataclasses.replace(profile, steps=(dataclasses.replace(step, open=2),)))
    text = texts(dataclasses.replace(whole, subjects=(lacking,)))[1]
    assert "is not known: 2 problems of it have no choice yet." in text and "110 µs of kernel" not in text
    assert step_gain(subject, dataclasses.replace(step, open=2)) is None
    assert ">2</td>" in str(steps.section(lacking)) and "&gt;= 110" in str(steps.section(lacking))
    half = dataclasses.replace(subject, profile=dataclasses.replace(profile, steps=(dataclasses.replace(step, modelled_share=0.5),)))
    assert "(108.9 to 111.1 µs, 50% of the step by its roofline)" in texts(dataclasses.replace(whole, subjects=(half,)))[1]


def test_the_share_of_the_roofline_weighs_by_time() -> None:
    subject = story([row(A, "torch", 20.0), row(B, "torch", 400.0)]).subjects[0]
    found = headroom_of(subject)
    least = {one.problem_key: bound(one, subject.limits) for one in subject.rows}
    times = [limit.us for limit in least.values() if limit]
    assert found is not None and found.share[0] == pytest.approx(sum(times) / 420) and found.left.wanted.problem_key == B.key


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], ("there are no results", "Nothing can be said", "klab run --model")),
        ([row(A, "triton_a", 10.0)], ("1 problem has a choice, and no library has a valid time", "roofline", "no choice has a rival")),
        ([row(A, "torch", 10.0)], ("libraries alone have valid times: they are the choice for the only problem", "reaches", "rival")),
        ([row(A, "torch", 9.0), row(B, "triton_a", 9.0)], ("of both a library and an own kernel: 1 has libraries alone, 1 own", "", "no")),
        ([row(A, "torch", 10.0, kind="reference")], ("only published figures (1)", "nothing can be said", "nothing to compare")),
        ([failed(A, "triton_a", Status.TIMEOUT, "slow")], ("none of 1 problem has a valid result (1 failure below)", "nothing", "without")),
        (contest("cpu"), ("On cpu the chosen kernels are", "is not known: the peaks of this CPU are not known", "run again")),
    ],
)  # fmt: skip
def test_on_little_data_a_sentence_says_so(rows: list[Result], words: tuple[str, ...]) -> None:
    told = texts(story(rows))
    for text, word in zip(told, words, strict=True):
        assert word in text, text
    assert "nan" not in " ".join(told).lower() and "None" not in " ".join(told)


def test_many_chips_do_not_make_a_wall_of_text() -> None:
    every = [dataclasses.replace(row(A, "triton_a", 10.0), chip=f"chip-{n}") for n in range(50)]
    first, *_ = sentences(story(every))
    assert len(first.lines) == 4 and first.lines[-1] == "47 more chips are in the tables below."
    shown = strip.section(story(every))
    assert "and 44 more chips" in shown and len(shown) < 12_000


def test_the_strip_tells_its_facts_and_escapes() -> None:
    rows = [row(A, NASTY, 10.0, device=NASTY, environment={"driver": NASTY, "commit": NASTY, "torch": "2.13.0"}, problem_label=NASTY)]
    shown = strip.section(story([*rows, row(A, "torch", 9.0, kind="reference")], model=NASTY, notes=(NASTY,)))
    assert "<script" not in shown and "beside them 1 published" in shown and "torch 2.13.0" in shown
    assert "1: 1 ok" in shown and "Verdicts" not in shown


def test_how_many_are_own_how_many_are_clear_and_how_much_of_a_step_they_are() -> None:
    planned = plan(find_model("qwen3-0.6b"), find_chip("h200"), Scenario(isl=512, osl=1, batches=(8,)))
    decode = [one for one in planned.step("decode", 8) if one.problem is not None and one.operator == "matmul"]
    first, second = (one.problem for one in decode[:2])
    assert isinstance(first, Matmul) and isinstance(second, Matmul)
    rows = [row(first, "triton_a", 10.0), row(first, "triton_b", 10.0), row(second, "triton_a", 10.0), row(second, "triton_b", 20.0)]
    told = story([*rows, row(Matmul(1, 64, 64), "torch", 5.0)], plans={"h200": planned})
    shown = strip.section(told)
    assert "h200: 3 of 3 problems; own kernels for 2, libraries for 1" in shown
    assert "1 of 2 choices with a rival is clear of it by 95% intervals, the other is a tie." in texts(told)[2]
    time_of = {one.problem.key: one.count * one.bound_us for one in decode if one.problem is not None}
    whole = sum(one.count * one.bound_us for one in planned.step("decode", 8))
    share = 100 * (time_of[first.key] + time_of[second.key]) / whole
    assert 0 < share < 90 and f"h200, decode batch 8: {share:.0f}% has a choice (modelled)" in shown


def before(rows: Sequence[Result]) -> Profile:
    return decide(list(rows), None, "h200")


def test_what_the_newest_run_changed() -> None:
    then = [row(A, "torch", 20.0), row(A, "triton_a", 10.0), row(B, "torch", 40.0)]
    again = {"run_id": "run-2", "recorded_at": "2026-11-21T10:00:00Z"}
    third = Matmul(1, 64, 64)
    now = [
        row(A, "triton_a", 12.0, **again), row(B, "triton_a", 30.0, **again), row(third, "torch", 7.0, **again),
        failed(A, "cuda_new", Status.INCORRECT, "off by 3", **again),
    ]  # fmt: skip
    told = story([*then, *now], before={"h200": before(then)}, newest_run={"h200": "run-2"})
    found = changes_of(told, told.subjects[0])
    assert found is not None
    kinds = {one.kind: one for one in found}
    assert list(kinds) == ["fails", "slower", "faster", "new"]
    slower = kinds["slower"].ratio
    assert slower == pytest.approx((1.2, 12 * 0.99 / 10.1, 12 * 1.01 / 9.9)) and not kinds["slower"].winner
    assert kinds["faster"].winner and kinds["faster"].problem_key == B.key and kinds["new"].problem_key == third.key
    assert kinds["fails"].status == "incorrect" and kinds["fails"].kernel == "matmul/cuda_new"
    words = (
        "of 3 problems 1 has another winner, 1 became faster and 1 slower beyond both 95% intervals, 1 got a choice; 1 kernel fails newly"
    )
    assert summary(found, before(then)) == words
    assert texts(told)[2] == f"Since the newest run on h200, {words}. Next: look at matmul/cuda_new (incorrect)."
    shown = changes.section(told)
    assert "Since the newest run (run-2)" in shown and "off by 3" in shown and "1.200×" in shown


def again(then: list[Result], now: list[Result]) -> Story:
    """Two runs as they are gathered from one store."""
    return story_of([*then, *now], Request(limits=lambda chip, device: Limits(None, "not known")))


def test_what_failed_before_does_not_fail_newly_and_what_was_fine_does() -> None:
    """The same trial, wrong in both runs, is no news; a kernel known to fail elsewhere that fails where it had a time is."""
    later = {"run_id": "run-2", "recorded_at": "2026-11-21T10:00:00Z"}
    wrong = failed(A, "cuda_x", Status.INCORRECT, "off")
    then, now = [row(A, "triton_a", 10.0), wrong], [row(A, "triton_a", 10.0, **later), dataclasses.replace(wrong, **later)]  # type: ignore[arg-type]
    told = again(then, now)
    assert changes_of(told, told.subjects[0]) == []
    then = [row(A, "triton_a", 10.0), row(A, "triton_b", 12.0), failed(B, "triton_b", Status.TIMEOUT, "slow")]
    told = again(then, [failed(A, "triton_b", Status.TIMEOUT, "slow here too", **later)])
    found = changes_of(told, told.subjects[0])
    assert found is not None and [(one.kind, one.problem_key, one.status) for one in found] == [("fails", A.key, "timeout")]
    third = failed(A, "triton_b", Status.TIMEOUT, "still", run_id="run-3", recorded_at="2026-11-22T10:00:00Z")
    told = again([*then, failed(A, "triton_b", Status.TIMEOUT, "slow here too", **later)], [third])
    assert changes_of(told, told.subjects[0]) == [], "it was told of the run before"


def test_choices_of_another_device_are_not_lost_ones() -> None:
    then = [row(A, "triton_a", 10.0), row(B, "triton_a", 10.0)]
    now = [row(A, "triton_a", 30.0, device="another", run_id="run-2", recorded_at="2026-11-21T10:00:00Z")]
    told = again(then, now)
    assert changes_of(told, told.subjects[0]) == []
    assert "the choices are of another device (another; before: NVIDIA H200), so times are not compared" in texts(told)[2]
    assert "of another device" in changes.section(told) and "lost" not in texts(told)[2]


def test_an_interval_that_reaches_zero_is_none() -> None:
    """Nothing is divided by it, and no sentence has an infinite figure."""
    rows = [row(A, "triton_a", 10.0, ci_low_us=0.0), row(A, "torch", 20.0, ci_low_us=-1.0, run_id="run-0")]
    told = story(rows, before={"h200": before(rows)}, newest_run={"h200": "run-1"})
    assert not told.subjects[0].profile.choices and "inf" not in " ".join(texts(told)).replace("infer", "")
    assert "no problem had or has a choice" in texts(told)[2]


def test_an_own_kernel_whose_rows_are_light_still_loses() -> None:
    subject = story([row(A, "torch", 10.0)]).subjects[0]
    slow = dataclasses.replace(row(A, "triton_a", 99.0), samples_us=(), marked=())
    assert (gain_of(subject).lost, gain_of(subject).unopposed) == (0, 1)
    found = gain_of(dataclasses.replace(subject, light=(slow,)))
    assert (found.lost, found.unopposed) == (1, 0)


def test_a_chosen_kernel_that_is_slower_than_a_library_has_lost() -> None:
    """As the winner of a final may be."""
    subject = story([row(A, "torch", 20.0), row(A, "triton_a", 10.0)]).subjects[0]
    choice = subject.profile.choices[0]
    assert choice.evidence.library is not None
    slower = dataclasses.replace(choice.evidence.library, ratio=0.97, ratio_interval=(0.96, 0.98))
    choice = dataclasses.replace(choice, evidence=dataclasses.replace(choice.evidence, library=slower))
    gain = gain_of(dataclasses.replace(subject, profile=dataclasses.replace(subject.profile, choices=(choice,))))
    assert (gain.won, gain.tied, gain.lost) == (0, 0, 1) and gain.ratio == pytest.approx((0.97, 0.96, 0.98))


def test_nothing_moved_nothing_said_and_nothing_to_compare() -> None:
    rows = [row(A, "torch", 20.0), row(A, "triton_a", 10.0)]
    same = story(rows, before={"h200": before(rows)}, newest_run={"h200": "run-2"})
    assert changes_of(same, same.subjects[0]) == []
    assert "none has another winner or a time that moved" in changes.section(same)
    near = again(rows, [row(A, "triton_a", 10.1, run_id="run-2", recorded_at="2026-11-21T10:00:00Z")])
    assert changes_of(near, near.subjects[0]) == [], "1% slower, and each known to 1%"
    alone = story(rows)
    assert changes_of(alone, alone.subjects[0]) is None and "a second run into the same store" in changes.section(alone)


def test_a_lost_choice_and_another_device() -> None:
    rows = [row(A, "triton_a", 10.0)]
    broken = failed(A, "triton_a", Status.CRASHED, "gone", run_id="run-2")
    told = story([broken], before={"h200": before(rows)}, newest_run={"h200": "run-2"})
    found = changes_of(told, told.subjects[0])
    assert found is not None and [one.kind for one in found] == ["fails", "lost"]
    elsewhere = story([row(A, "triton_a", 30.0, device="another")], before={"h200": before(rows)})
    assert changes_of(elsewhere, elsewhere.subjects[0]) == [], "times of two devices are not compared"


def test_the_newest_night_is_told_with_its_reasons() -> None:
    tonight, earlier = eventful()
    told = story([row(A, "triton_a", 10.0)], nights={"h200": (*earlier, tonight)})
    shown = changes.section(told)
    for words in ("1 broken", "2 slower (1 waived)", "its kernel is gone", "6.0% above the median of 20 nights", "+6.0%"):
        assert words in shown, words
    assert texts(told)[2].startswith("The night of 2026-11-01 on h200 failed: 1 broken") and "which failed the night" in texts(told)[2]
    quiet = story([row(A, "triton_a", 10.0)], nights={"h200": (night(),)})
    assert "no series was watched" in texts(quiet)[2] and "Verdicts of the newest night" in strip.section(quiet)


def test_a_sentence_is_its_lines() -> None:
    assert Sentence("t", ("a", "b")).text == "a b"
