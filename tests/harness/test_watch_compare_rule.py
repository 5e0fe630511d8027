"""Same, faster, slower or cannot tell: the rule of klab compare, on numbers that are made up."""

import math
import random
from collections import Counter

import pytest
from simulated_comparison import Noise, hunt, rates

from klab.harness.watch.compare_rule import (
    ALPHA,
    LOOKS,
    Answer,
    Found,
    Halfway,
    Question,
    Rounds,
    judge,
    overall,
    replicate,
    spent,
    together,
)
from klab.harness.watch.comparison import Comparison, Line

QUIET = (0.0010, -0.0008, 0.0004, -0.0003, 0.0001)


def logs(ratio, noise=QUIET):
    return [math.log(ratio) + n for n in noise]


@pytest.mark.parametrize(
    ("ratio", "answer"),
    [(1.0, "same"), (1.004, "same"), (0.995, "same"), (1.03, "slower"), (0.97, "faster"), (1.0101, "slower"), (1.0095, "cannot tell")],
)
def test_the_answer_follows_the_interval_and_the_margin(ratio, answer):
    found = judge(logs(ratio), [], alpha=0.025)
    assert found.answer == answer, found
    assert found.low < found.ratio < found.high and found.ratio == pytest.approx(ratio, rel=1e-3)


def test_a_wide_interval_cannot_be_told_however_large_the_middle():
    found = judge(logs(1.03, [n * 40 for n in QUIET]), [], alpha=0.025)
    assert found.answer is Answer.CANNOT_TELL and found.low < 1 < found.high and "wide" in found.reason


def test_few_replicates_say_nothing():
    found = judge(logs(1.5)[:2], [], alpha=0.025)
    assert found.answer is Answer.CANNOT_TELL and "too few" in found.reason
    assert judge([], [], alpha=0.025).answer is Answer.CANNOT_TELL


def test_a_slow_down_by_time_is_confirmed_in_cycles_where_there_is_a_clock():
    slow = logs(1.03)
    assert judge(slow, [n * 0.9 for n in slow], alpha=0.025).answer is Answer.SLOWER
    refuted = judge(slow, [-0.001] * len(slow), alpha=0.025)
    assert refuted.answer is Answer.CANNOT_TELL and "cycles" in refuted.reason
    fast = logs(0.97)
    assert judge(fast, [0.001] * len(fast), alpha=0.025).answer is Answer.CANNOT_TELL


def test_a_steady_drift_cancels_in_the_quads():
    # A B, B A, ...: time runs through the rounds of both, and each round is 1% slower than the one before.
    at = [(2 * lap, 2 * lap + 1) if lap % 2 == 0 else (2 * lap + 1, 2 * lap) for lap in range(16)]
    a, b = (Rounds(tuple(100.0 * (1 + 0.01 * pair[side]) for pair in at)) for side in (0, 1))
    told = replicate(a, b)
    assert told is not None and abs(told[0]) < 1e-9
    slower = replicate(a, Rounds(tuple(us * 1.03 for us in b.us)))
    assert slower is not None and slower[0] == pytest.approx(math.log(1.03), abs=1e-9)


def test_disturbed_quads_do_not_move_the_median_and_marked_ones_do_not_count():
    us = [100.0] * 16
    spiky = [*us]
    spiky[3] = spiky[8] = spiky[12] = 1000.0
    assert replicate(Rounds(tuple(us)), Rounds(tuple(spiky)))[0] == pytest.approx(0.0)
    half = tuple(1 if lap < 8 else 0 for lap in range(16))
    told = replicate(Rounds(tuple(us), marked=half), Rounds(tuple([500.0] * 8 + [100.0] * 8)))
    assert told == (pytest.approx(0.0), None)
    assert replicate(Rounds(tuple(us), marked=(1,) * 16), Rounds(tuple(us))) is None


def test_cycles_are_time_times_clock():
    clock = tuple([1500.0] * 16)
    lower = tuple([1450.0] * 16)
    told = replicate(Rounds((100.0,) * 16, clock), Rounds((100.0 * 1500 / 1450,) * 16, lower))
    assert told is not None and told[0] > 0.03 and told[1] == pytest.approx(0.0)
    assert replicate(Rounds((100.0,) * 16, (None,) * 16), Rounds((100.0,) * 16, clock))[1] is None


def test_what_is_spent_never_exceeds_the_error():
    for questions in (1, 7):
        for looks in range(len(LOOKS)):
            total = sum(spent(look, questions, last=False) for look in range(looks)) + spent(looks, questions, last=True)
            assert 2 * questions * total == pytest.approx(ALPHA)


def test_a_question_closes_when_it_is_clear_and_at_the_last_look():
    clear = Question()
    for value in logs(1.03):
        assert not clear.due()
        clear.add((value, None))
    assert clear.due() and clear.look(1).answer is Answer.SLOWER and not clear.open
    noisy = Question()
    for n in range(5):
        noisy.add((0.05 * (-1) ** n, None))
    assert noisy.look(1).answer is Answer.CANNOT_TELL and noisy.open
    assert noisy.look(1, last=True).answer is Answer.CANNOT_TELL and not noisy.open


@pytest.mark.parametrize(
    ("threshold", "ratio", "answer"),
    [
        (1.03, 1.03, "slower"),
        (1.03, 1.0, "same"),
        (1.03, 1.015, "cannot tell"),
        (1.03, 0.97, "same"),
        (0.97, 0.97, "faster"),
        (0.97, 1.0, "same"),
    ],
)
def test_halfway_tells_on_which_side_of_the_middle_a_commit_lies(threshold, ratio, answer):
    question = Halfway(threshold=math.log(threshold) / 2)
    for value in logs(ratio):
        question.add((value, None))
    assert question.look(1).answer == answer


def found(answer, ratio=1.0):
    return Found(Answer(answer), ratio, ratio * 0.999, ratio * 1.001, 5)


@pytest.mark.parametrize(
    ("answers", "mean", "answer", "plain", "strict"),
    [
        (["same", "same"], "same", "same", 0, 0),
        (["same", "slower"], "same", "slower", 1, 1),
        (["faster", "slower"], "faster", "slower", 1, 1),
        (["faster", "same"], "same", "faster", 0, 0),
        (["same", "cannot tell"], "same", "cannot tell", 0, 3),
        (["faster", "cannot tell"], "faster", "faster", 0, 3),
        (["same", "broken"], "same", "broken", 1, 1),
        (["cannot tell", "cannot tell"], "slower", "slower", 1, 1),
        (["not compared", "not compared"], "cannot tell", "not compared", 4, 4),
        (["same", "not compared"], "same", "same", 0, 0),
    ],
)
def test_one_answer_for_all_and_its_exit_code(answers, mean, answer, plain, strict):
    told = Comparison.of([Line(f"pair {n}", found(a)) for n, a in enumerate(answers)], found(mean))
    assert told.answer == answer and told.answer is overall([found(a) for a in answers], found(mean))[0]
    assert (told.exit_code(), told.exit_code(strict=True)) == (plain, strict)
    assert told.headline().startswith("B ")


def test_the_geometric_mean_has_the_passes_as_its_replicates():
    # Two pairs that go apart by the same amount: each is noisy, their mean is not.
    per_pass = [[0.02 * sign, -0.02 * sign + 0.0001 * n] for n, sign in enumerate((1, -1, 1, -1, 1))]
    assert together(per_pass, questions=3).answer is Answer.SAME


def test_telling_is_safe_and_worst_first():
    lines = [Line("fine", found("same")), Line("<b>|evil|\n", Found(Answer.BROKEN, reason="incorrect: `x` <script>"))]
    told = Comparison.of(lines, found("same"), alone=[("x", "only A has it")], notes=["torch: 2.1 on A, 2.2 on B"])
    assert [one.name for one in told.lines][1] == "fine"
    text = told.markdown("main", "a|b")
    assert "<script>" not in text and "<b>" not in text and "a\\|b" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 3 and all(row.replace("\\|", "").count("|") == 7 for row in rows)
    kinds = [row["type"] for row in told.to_json()]
    assert kinds == ["pair", "pair", "alone", "overall"]
    assert next(iter(told.to_json()))["low"] is None


def test_infinite_intervals_are_null_in_json():
    told = Comparison.of([Line("one", judge([0.1, 0.1], [], alpha=0.01))], judge([0.1, 0.1], [], alpha=0.01))
    assert all(row.get("high") is None for row in told.to_json())


# ci/overheads/test_compare_rates.py prints the same with more repetitions; docs/compare.md has the figures.
@pytest.mark.parametrize(
    "noise", [Noise(0.003), Noise(0.05), Noise(0.01, spikes=0.05), Noise(0.01, common=0.02)], ids=["quiet", "loud", "spiky", "common"]
)
def test_nothing_changed_is_called_slower_or_faster_in_few_comparisons(noise):
    _, whole, wrong, _ = rates([0.0] * 12, noise, times=150)
    # 150 comparisons with a true rate of 5% give more than 14 with a probability of 1%.
    assert wrong <= 14 / 150 and whole[Answer.SLOWER] <= 14 / 150


def test_three_percent_is_found_and_quiet_pairs_are_the_same():
    pairs, whole, _, passes = rates([math.log(1.03), *[0.0] * 11], Noise(0.003), times=40)
    assert pairs[Answer.SLOWER] >= 0.95 and whole[Answer.SLOWER] >= 0.95 and passes <= 12
    same, _, _, _ = rates([0.0] * 4, Noise(0.003), times=40)
    assert same[Answer.SAME] >= 0.95


def test_a_search_among_noisy_commits_finds_the_one_and_is_hardly_ever_wrong():
    rng = random.Random(1)
    ends = Counter(hunt(32, 1.03, Noise(0.005), rng) for _ in range(60))
    assert ends["found"] >= 57 and ends["wrong"] <= 2
    loud = Counter(hunt(32, 1.03, Noise(0.03), rng) for _ in range(60))
    assert loud["wrong"] <= 8 and loud["found"] < 60
