import dataclasses

import pytest
from night_fleet import Clock, NightFleet
from night_lab import CPU, Lab

from klab.harness.watch.looks import Looks
from klab.harness.watch.points import cycles_of, find_point
from klab.harness.watch.tracked import watched
from klab.kernels.discover import discover


@pytest.fixture(scope="module")
def catalogue():
    return discover(only=("norm", "activation", "embedding"))


@pytest.fixture
def lab(tmp_path, catalogue):
    return Lab(tmp_path, catalogue)


def rows_of(lab, changes):
    """One trial and its rows, one per entry of `changes`."""
    trial = watched(lab.policy, CPU, lab.catalogue).tracked[0].trials[0]
    fleet = NightFleet()
    return trial, [dataclasses.replace(fleet.row(trial, 100.0), **change) for change in changes]


def test_rows_of_two_devices_are_not_mixed(lab):
    trial, rows = rows_of(
        lab, [{"device_uuid": u, "median_us": m} for u, m in (("a", 1.0), ("b", 2.0), ("a", 1.1), ("b", 2.1), ("b", 2.2))]
    )
    point = find_point([(trial, [rows])], "time", "copy", processes=5).point
    assert point.device_uuid == "b" and point.values == (2.0, 2.1, 2.2)
    three = [dataclasses.replace(row, device_uuid=uuid) for row, uuid in zip(rows, "abcab", strict=True)]
    mixed = find_point([(trial, [three])], "time", "copy", processes=5).point
    assert (mixed.device_uuid, len(mixed.values)) == ("several", 5), "none has most of them, so all count"


def test_entries_of_a_point_are_of_the_same_process(lab):
    bare = {"build": {}}
    clocks = {"clocks_mhz": (1000.0,) * 9}
    trial, rows = rows_of(lab, [clocks, {**clocks, **bare}, clocks, clocks])
    point = find_point([(trial, [rows])], "time", "copy", processes=4).point
    assert len(point.values) == len(point.anchored) == len(point.cycles) == 3, "the process without an anchor is left out"
    assert point.cycles[0] == pytest.approx(point.values[0] * 1000, rel=0.01)
    hot = {"clocks_mhz": (1000.0,) * 4 + (500.0,) * 5, "marked": (0,) * 4 + (1,) * 5}
    trial, rows = rows_of(lab, [hot])
    assert cycles_of(rows[0]) == pytest.approx(rows[0].median_us * 1000, rel=0.01), "rounds that were throttled do not count"
    trial, rows = rows_of(lab, [{"clocks_mhz": (1000.0,) * 4 + (None,) * 5}])
    assert cycles_of(rows[0]) is None
    trial, rows = rows_of(lab, [bare, bare, clocks])
    point = find_point([(trial, [rows])], "time", "copy", processes=3).point
    assert (len(point.values), point.anchored, point.cycles, point.anchor) == (3, (), (), ""), "most have none, so none is used"


def test_a_look_that_was_cut_is_left_out_and_a_first_one_is_no_point(lab):
    trial, rows = rows_of(lab, [{}] * 5)
    assert len(find_point([(trial, [rows[:3], rows[3:]])], "time", "copy", processes=3).point.values) == 5
    cut = find_point([(trial, [rows, rows[:2]])], "time", "copy", processes=5).point
    assert (len(cut.values), cut.looks) == (5, 1)
    first = find_point([(trial, [rows[:2]])], "time", "copy", processes=5)
    assert first.point is None and "2 of 5 processes" in first.reason


def test_a_look_uses_what_time_its_passes_leave(lab):
    trials = [t for one in watched(lab.policy, CPU, lab.catalogue).tracked for t in one.trials]
    fleet = NightFleet(clock=Clock())

    def quicker(trial, process):  # compiling is over
        fleet.trial_s = 0.5
        return 100.0

    fleet.outcome = quicker
    looks = Looks(fleet, lambda row: None, clock=fleet.clock)
    assert looks.take(0, [(t,) for t in trials], 3, 6.6) == []
    assert all(len(looks.rows[t.key][0]) == 3 for t in trials)
