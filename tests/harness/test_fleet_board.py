"""A run on seats that come and go, without processes: nothing is lost, nothing is told twice, and nobody waits for ever."""

import threading
import time
from dataclasses import replace

import pytest

from klab.harness.fleet import run as runs
from klab.harness.fleet.board import MOST_LOSSES, Board
from klab.harness.fleet.run import NO_DEVICE, Run, SeatLost, Wish, measure
from klab.harness.plan.trial import Policy, Trial
from klab.harness.store.result import Result, Status
from klab.kernels.contract import NoConfig
from klab.kernels.errors import CannotMeasure
from klab.kernels.matmul.problem import Matmul

CHIP = "h200"


def trials(names, shapes):
    """Of kernels that are only named."""
    return [Trial(f"matmul/{name}", "digest", Matmul(m, 48, 64, "float32"), NoConfig(), CHIP, Policy()) for m in shapes for name in names]


def row(trial, status=Status.OK, reason=""):
    return Result.of(trial, status, backend="cpu", library=False, run_id="r", reason=reason)


class FakeSeat:
    """Tells rows of each group, only `tells` where it is lost, which it is if `dies(group)`; comes back `lives` times. It measures
    nothing before `after` is set."""

    def __init__(self, chip=CHIP, dies=lambda group: False, tells=0, lives=0, blame=True, after=None):
        self.chip, self.dies, self.tells, self.lives, self.blame, self.after = chip, dies, tells, lives, blame, after
        self.groups, self.aborted = [], False

    def contest(self, group, wish):
        self.groups.append([trial.key for trial in group])
        assert self.after is None or self.after.wait(60)
        if self.dies(group):
            for trial in group[: self.tells]:
                yield row(trial)
            raise SeatLost("node 7 died", blame=self.blame)
        for trial in group:
            yield row(trial)

    def revive(self):
        self.lives -= 1
        return self.lives >= 0

    def abort(self):
        self.aborted = True


def carry(wanted, seats, recruit=None, deadline=None):
    told, notes = [], []
    stop = threading.Event()
    epitaph = lambda trial, why: row(trial, Status.CRASHED, why)  # noqa: E731
    made = Run(wanted, Wish(stop, deadline), epitaph=epitaph, recruit=recruit, note=notes.append)
    return measure(made, lambda: seats, told.append, notes=notes), told, notes


def keys(rows):
    return sorted(item.key for item in rows)


def test_what_a_lost_device_had_in_hand_is_measured_elsewhere_once():
    wanted = trials(["good", "half_speed", "wrong"], [4, 8, 16, 32])
    dying = threading.Event()
    first = FakeSeat(dies=lambda group: not dying.set(), tells=1)
    second = FakeSeat(after=dying)
    summary, told, notes = carry(wanted, [first, second])
    assert keys(told) == keys(wanted) and summary.by_status == {Status.OK: 12} and summary.stopped == ""
    assert len(first.groups) == 1, "it was not given another"
    assert notes == ["node 7 died; its 2 running trials are measured again"]


def test_a_device_that_comes_back_goes_on_alone():
    wanted = trials(["good", "half_speed"], [4, 8])
    deaths = iter([True, False, False])
    summary, told, _ = carry(wanted, [FakeSeat(dies=lambda group: next(deaths), lives=1)])
    assert keys(told) == keys(wanted) and summary.unfinished == []


def test_a_trial_that_takes_its_device_along_is_given_up_alone_and_says_so():
    wanted = trials(["good", "half_speed", "wrong"], [4, 8])
    poison = wanted[1].key
    seat = FakeSeat(dies=lambda group: poison in [t.key for t in group], lives=99)
    summary, told, _ = carry(wanted, [seat])
    assert keys(told) == keys(wanted)
    crashed = [item for item in told if item.status is Status.CRASHED]
    assert [item.key for item in crashed] == [poison]
    assert crashed[0].reason == f"lost with its device {MOST_LOSSES} times: node 7 died"
    assert summary.by_status == {Status.OK: 5, Status.CRASHED: 1}
    held = [group for group in seat.groups if poison in group]
    assert [len(group) for group in held] == [3, 3, 1], "in company twice, then by itself"


def test_a_device_that_cannot_measure_costs_no_trial_a_chance():
    wanted = trials(["good"], [4])
    board = Board(wanted)
    for _ in range(MOST_LOSSES + 2):
        group = board.take(CHIP)
        assert board.back(group, "no CUDA there", blame=False) == []
    assert board.take(CHIP) == wanted


def test_without_any_device_left_it_says_so_and_what_was_measured_stands():
    wanted = trials(["good"], [4, 8, 16])
    left = iter([False, True])
    summary, told, _ = carry(wanted, [FakeSeat(dies=lambda group: next(left))])
    assert len(told) == 1 and summary.stopped == NO_DEVICE and len(summary.unfinished) == 2
    with pytest.raises(CannotMeasure, match="node 7 died; its 1 running trial is measured again"):
        carry(wanted, [FakeSeat(dies=lambda group: True)])


def test_a_device_that_joins_later_takes_over(monkeypatch):
    monkeypatch.setattr(runs, "RECRUIT_S", 0.05)
    wanted = trials(["good", "half_speed"], [4, 8, 16])
    late = FakeSeat()
    offered = iter([[], [late]])
    summary, told, _ = carry(wanted, [FakeSeat(dies=lambda group: True)], recruit=lambda chips: next(offered, []))
    assert keys(told) == keys(wanted) and summary.stopped == "" and late.groups


def test_waiting_for_a_device_ends(monkeypatch):
    monkeypatch.setattr(runs, "RECRUIT_S", 0.05)
    monkeypatch.setattr(runs, "PATIENCE_S", 0.3)
    with pytest.raises(CannotMeasure):
        carry(trials(["good"], [4]), [FakeSeat(dies=lambda group: True)], recruit=lambda chips: [])


def test_trials_go_where_their_chip_is():
    here = trials(["good", "half_speed"], [4, 8])
    there = [replace(trial, chip="b200") for trial in here]
    seats = [FakeSeat(), FakeSeat("b200"), FakeSeat("b200")]
    mixed = [trial for pair in zip(here, there, strict=True) for trial in pair]
    summary, told, _ = carry(mixed, seats)
    assert keys(told) == keys(mixed) and not summary.unfinished
    assert {key for group in seats[0].groups for key in group} == {trial.key for trial in here}
    guest = here[0]
    wish = Wish(threading.Event(), guests={guest.problem.key: guest})
    assert wish.guest(here[:1]) is guest and wish.guest(there[:1]) is None, "a guest of another chip does not run along"


def test_an_idle_device_waits_for_what_may_come_back():
    wanted = trials(["good"], [4])
    begun, may_die = threading.Event(), threading.Event()
    first, second = FakeSeat(dies=lambda group: begun.set() or may_die.wait(60)), FakeSeat()
    board = Board(wanted)
    assert board.waiting() == 1
    made = Run(wanted, Wish(threading.Event()))
    made.start([first])
    assert begun.wait(60)
    thread = threading.Thread(target=made._measure, args=(second,))
    thread.start()
    time.sleep(0.1)  # time enough to find nothing to do
    assert second.groups == []
    may_die.set()
    thread.join(timeout=60)
    assert second.groups == [[wanted[0].key]]


def test_what_a_seat_raises_ends_the_run():
    broke = threading.Event()

    def broken(group):
        broke.set()
        raise ZeroDivisionError("a fault of klab's own")

    wanted = trials(["good"], [4, 8])
    seat = FakeSeat(dies=broken)
    with pytest.raises(ZeroDivisionError):
        carry(wanted, [seat, FakeSeat(after=broke)])
    assert seat.aborted
