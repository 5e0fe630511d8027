"""The sensor's period and window, found again where they are known. Nothing here waits: the board and its clock are of paper."""

import json
from dataclasses import replace

import pytest
from fake_sensor import FakeBoard

from klab.harness.measure.calibrate import sensor_figures
from klab.harness.measure.sensor import (
    LEAST_CHANGES,
    LONGEST_PULSE_S,
    SHORTEST_PULSE_S,
    Observed,
    Recording,
    averaging_window,
    counter_window,
    pulse_lengths,
    record,
    update_period,
)


def watched(seconds=16.0, *, seed=0, **board):
    made = FakeBoard(seed=seed, **board)
    sensors = {"sensor": made.power_w, "counter": made.energy_j}
    return record(sensors, made, pulse_lengths(seconds, seed=seed), clock=made.clock, sleep=made.sleep)


def near(figure, truth, within):
    assert figure.value == pytest.approx(truth, rel=within), figure
    assert figure.low <= truth * 1.001, figure
    assert figure.high >= truth * 0.999, figure
    assert (figure.high - figure.low) / figure.value < 0.3, figure


@pytest.mark.parametrize(
    ("period_s", "window_s", "more"),
    [
        (0.1, 1.0, {}),  # the driver's average of an H100
        (0.1, 0.025, {}),  # the instantaneous reading of an A100 or H100
        (0.1, 0.1, {"phase_s": 0.07}),
        (0.02, 0.02, {}),
        (0.1, 0.025, {"lag_s": 0.04}),
        (0.016, 0.5, {}),
    ],
)
def test_the_period_and_the_window_are_found(period_s, window_s, more):
    found = watched(period_s=period_s, window_s=window_s, **more)
    near(update_period(found.sensors["sensor"]), 1e3 * period_s, 0.005)
    window = averaging_window(found.sensors["sensor"], found.busy)
    near(window, 1e3 * window_s, 0.06)
    shown_ms = float(window.note.split("ends ")[1].split()[0])
    assert shown_ms == pytest.approx(1e3 * more.get("lag_s", 0.0), abs=4)


@pytest.mark.parametrize("seen_s", [0.1, 0.025])
def test_a_counter_that_sees_a_part_of_the_time_is_told_from_one_that_sees_all(seen_s):
    found = watched(counter_window_s=seen_s)
    period = update_period(found.sensors["counter"])
    near(period, 100.0, 0.005)
    near(counter_window(found.sensors["counter"], found.busy, period), 1e3 * seen_s, 0.06)


@pytest.mark.parametrize("window_s", [0.025, 0.1])
def test_a_board_whose_power_rises_slowly_is_not_taken_for_a_longer_window(window_s):
    found = watched(12.0, period_s=0.1, window_s=window_s, rise_s=0.0065)
    window = averaging_window(found.sensors["sensor"], found.busy)
    near(window, 1e3 * window_s, 0.1)
    assert "the power follows the load within" in window.note


def test_a_rise_of_a_third_of_the_period_is_told_from_the_window():
    found = watched(12.0, period_s=0.1, window_s=0.025, rise_s=0.03, seed=2)
    window = averaging_window(found.sensors["sensor"], found.busy)
    near(window, 25.0, 0.1)


def test_a_rise_too_slow_to_be_told_gives_a_bound():
    found = watched(12.0, period_s=0.1, window_s=0.025, rise_s=0.07, seed=1)
    window = averaging_window(found.sensors["sensor"], found.busy)
    assert window.value is None
    assert window.low == 0.0
    assert 25.0 < window.high < 300.0
    assert "too slowly" in window.reason


def test_pauses_of_the_polling_cost_readings_and_not_the_truth():
    board = FakeBoard(period_s=0.1, window_s=0.025, noise=0.02)

    def sleep(seconds):
        board.sleep(seconds + (board.random.expovariate(1 / 0.03) if board.random.random() < 0.01 else 0.0))

    sensors = {"sensor": board.power_w, "counter": board.energy_j}
    found = record(sensors, board, pulse_lengths(16.0), clock=board.clock, sleep=sleep)
    seen = found.sensors["sensor"]
    assert LEAST_CHANGES < len(seen.sharp.changes) < len(seen.changes)
    near(update_period(seen), 100.0, 0.005)
    window = averaging_window(seen, found.busy)
    assert window.value == pytest.approx(25.0, rel=0.1)
    assert window.low <= 25.0 <= window.high
    assert len(found.busy) > 60, "where the load ran dry, the recording says so"


def test_what_much_noise_leaves_open_is_in_the_interval():
    found = watched(period_s=0.1, window_s=0.025, noise=0.05, seed=3)
    window = averaging_window(found.sensors["sensor"], found.busy)
    assert window.value == pytest.approx(25.0, rel=0.15)
    assert window.low <= 25.0 <= window.high <= 40.0


def test_a_counter_that_starts_again_loses_one_step():
    found = watched(10.0)
    whole = found.sensors["counter"]
    middle = len(whole.changes) // 2
    taken = whole.changes[middle][2]
    broken = replace(whole, changes=tuple((a, b, j - taken if i >= middle else j) for i, (a, b, j) in enumerate(whole.changes)))
    period = update_period(broken)
    near(counter_window(broken, found.busy, period), 100.0, 0.06)


def test_what_only_looks_like_an_average_says_so():
    found = watched(10.0, period_s=0.02, window_s=0.02, rise_s=0.15)
    assert "no plain average fits" in averaging_window(found.sensors["sensor"], found.busy).note


def test_repeated_readings_hide_updates_and_not_the_period():
    found = watched(period_s=0.1, window_s=0.1, step_w=40.0, noise=0.0)
    seen = found.sensors["sensor"]
    assert len(seen.changes) < 0.85 * 16 / 0.1, "some updates read the same as the one before"
    near(update_period(seen), 100.0, 0.01)


def test_one_that_changes_at_every_poll_has_a_bound_and_no_period():
    found = watched(5.0, period_s=0.0004, window_s=0.0004)
    period = update_period(found.sensors["sensor"])
    assert (period.value, period.low) == (None, 0.0)
    assert 1.0 < period.high < 4.0
    assert "as often as it is read" in period.reason
    window = averaging_window(found.sensors["sensor"], found.busy)
    assert window.value is None
    assert window.high < 6.0
    assert "shorter than can be told" in window.reason


def test_an_irregular_sensor_has_no_period():
    period = update_period(watched(period_s=0.05, window_s=0.05, jitter=0.9).sensors["sensor"])
    assert period.value is None
    assert "no regular interval" in period.reason


def test_a_reading_that_stands_still_has_neither():
    found = watched(6.0, idle_w=300.0, load_w=300.0, noise=0.0)
    assert "changed 0 times" in update_period(found.sensors["sensor"]).reason
    assert averaging_window(found.sensors["sensor"], found.busy).value is None


def test_a_sensor_that_does_not_see_the_load_has_no_window():
    found = watched(idle_w=300.0, load_w=300.0, noise=0.05)
    window = averaging_window(found.sensors["sensor"], found.busy)
    assert window.value is None
    assert "no averaging window explains" in window.reason


def test_a_sensor_that_falls_silent_is_told_and_the_others_are_kept():
    board = FakeBoard(dies_at=3.0)
    other = FakeBoard()

    def power():
        other.now = board.now
        return other.power_w()

    found = record({"counter": board.energy_j, "sensor": power}, board, pulse_lengths(6.0), clock=board.clock, sleep=board.sleep)
    figures = sensor_figures(found)
    assert "stopped answering" in figures["counter_period_ms"].reason
    assert figures["counter_window_ms"].value is None
    assert figures["sensor_period_ms"].value == pytest.approx(100.0, rel=0.01)
    assert "no such reading" in figures["average_period_ms"].reason


def test_without_pulses_there_is_no_window():
    board = FakeBoard(noise=0.05)
    found = record({"sensor": board.power_w}, board, [4.0], clock=board.clock, sleep=board.sleep)
    assert found.busy == ()
    assert "no load was run" in averaging_window(found.sensors["sensor"], found.busy).reason


def test_a_window_longer_than_the_grid_is_bounded():
    window = averaging_window((found := watched(20.0, window_s=2.6)).sensors["sensor"], found.busy)
    assert window.value is None
    assert window.low > 1500
    assert "longer than can be told" in window.reason


def test_pulses_are_of_many_lengths_and_always_the_same():
    lengths = pulse_lengths(40.0)
    assert lengths == pulse_lengths(40.0)
    assert lengths != pulse_lengths(40.0, seed=1)
    assert 40.0 <= sum(lengths) < 40.0 + LONGEST_PULSE_S
    assert min(lengths) >= SHORTEST_PULSE_S
    assert sum(length < 0.1 for length in lengths) > len(lengths) / 4


def test_the_load_is_on_when_the_recording_says_so():
    board = FakeBoard()
    found = record({"sensor": board.power_w}, board, [0.2, 0.3, 0.1, 0.05], clock=board.clock, sleep=board.sleep)
    assert [b - a for a, b in found.busy] == pytest.approx([0.3, 0.05], abs=0.011)
    assert [list(span) for span in found.busy] == [pytest.approx(span, abs=0.003) for span in board.spans]


def test_a_recording_comes_out_of_a_worker_as_it_was():
    found = watched(3.0)
    again = Recording.from_json(json.loads(json.dumps(found.to_json())))
    assert again.busy == found.busy
    assert again.sensors["sensor"].readings.tolist() == pytest.approx(found.sensors["sensor"].readings.tolist(), abs=1e-5)
    assert update_period(again.sensors["counter"]).value == pytest.approx(update_period(found.sensors["counter"]).value, rel=1e-4)


def test_nothing_seen_is_a_reason():
    assert update_period(Observed((), 0, 0.0, "it cannot be read")).reason == "it cannot be read"
    assert "changed 0 times" in update_period(Observed((), 10, 1.0)).reason
