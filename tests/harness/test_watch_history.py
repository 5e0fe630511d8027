import dataclasses
import json
import math
import multiprocessing
import os
import threading

import pytest

from klab.harness.watch import history as histories
from klab.harness.watch.history import History, last_seen, points_by_series
from klab.harness.watch.night_json import night_json
from klab.harness.watch.series import Night, Point, Series, Verdict
from klab.kernels.errors import CannotMeasure

SERIES = Series("cpu", "norm", "abc", "2x64 fp32", "chosen", "time", ("llama",))
POINT = Point(
    values=(1.25, 1.5, 1.0), anchored=(0.1, 0.2, 0.3), anchor="copy", kernel="norm/cpu_blocked", config={"rows": 4}, epoch="e", error=1e-7
)


def night(number=1, *, chip="cpu", value=None, reason="as usual"):
    point = POINT if value is None else dataclasses.replace(POINT, values=(value,))
    return Night(
        identity=f"202611{number:02d}T020000Z-abcdef",
        at=f"2026-11-{number:02d}T02:00:00Z",
        chip=chip,
        verdicts=(Verdict(SERIES, "ok", reason, point, ratio=1.01, low=0.99, high=1.03, nights=7), Verdict(SERIES, "missing", "gone")),
        epochs={"e": {"torch": "2.13"}},
        devices={"GPU-1": {"device": "made"}},
        notes=("a note",),
    )


def test_a_night_comes_back_as_it_was_added(tmp_path):
    history = History(tmp_path / "new")
    assert history.nights("cpu") == [] and history.chips() == []
    for number in (3, 1, 2):
        history.add(night(number))
    assert history.nights("cpu") == [night(1), night(2), night(3)]
    assert history.nights("cpu", last=2) == [night(2), night(3)]
    assert history.chips() == ["cpu"] and not history.problems
    assert not [p for p in (tmp_path / "new").rglob("*") if p.name.startswith(".")], "no part files stay"


def test_points_are_told_by_series_oldest_first_with_their_night(tmp_path):
    history = History(tmp_path)
    for number in (2, 1):
        history.add(night(number, value=float(number)))
    points = history.points_by_series("cpu")[SERIES.identity]
    assert [p.values for p in points] == [(1.0,), (2.0,)]
    assert [p.night for p in points] == [night(1).identity, night(2).identity]
    assert points_by_series([]) == {}
    empty = Night("n", "2026-11-09T02:00:00Z", "cpu", verdicts=(Verdict(SERIES, "unknown", "", Point(reason="not reached")),))
    assert last_seen([night(1), night(2), empty]) == {SERIES.identity: 1}


def test_two_nights_of_one_name_are_both_kept_and_one_night_twice_is_one(tmp_path):
    history = History(tmp_path)
    first = history.add(night(1, value=1.0))
    second = history.add(night(1, value=2.0))
    assert first != second and history.add(night(1, value=2.0)) == second
    assert sorted(n.verdicts[0].point.value for n in history.nights("cpu")) == [1.0, 2.0]


def test_many_writers_at_once_lose_nothing(tmp_path):
    threads = [threading.Thread(target=History(tmp_path).add, args=(night(1, value=float(n)),)) for n in range(1, 9)]
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=History(tmp_path).add, args=(night(1, value=float(n)),)) for n in range(9, 12)]
    for one in [*others, *threads]:
        one.start()
    for one in [*others, *threads]:
        one.join(120)
    assert sorted(n.verdicts[0].point.value for n in History(tmp_path).nights("cpu")) == [float(n) for n in range(1, 12)]


def test_a_file_system_without_links_keeps_all_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    history = History(tmp_path)
    history.add(night(1, value=1.0))
    history.add(night(1, value=2.0))
    assert sorted(n.verdicts[0].point.value for n in history.nights("cpu")) == [1.0, 2.0]


BAD = {
    "a.json": b"",
    "b.json": b'{"identity": "x", "at": "2026',
    "c.json": b"[1, 2]",
    "d.json": b"\xff\xfe\x00",
    "e.json": b'{"identity": "x"}',
    "f.json": b'{"identity": "x", "at": "y", "chip": "cpu", "tomorrow": 1}',
    "g.json": b'{"identity": "x", "at": "y", "chip": "cpu", "verdicts": [{"call": "maybe"}]}',
    "h.json": b"[" * 100_000,
    "i.json": b'{"identity": "x", "at": "y", "chip": "h200"}',
    "j.json": b'{"identity": 7, "at": null, "chip": "cpu"}',
}


def test_what_is_no_night_is_reported_and_stops_nothing(tmp_path):
    history = History(tmp_path)
    history.add(night(1))
    for name, content in BAD.items():
        (tmp_path / "cpu" / name).write_bytes(content)
    (tmp_path / "cpu" / "k.json").mkdir()
    (tmp_path / "cpu" / ".hidden.json").write_text("not looked at")
    (tmp_path / "cpu" / "notes.txt").write_text("not looked at")
    assert history.nights("cpu") == [night(1)]
    told = "\n".join(history.problems)
    assert len(history.problems) == len(BAD) + 1 and all(f"/{name}: left out of the history: " in told for name in [*BAD, "k.json"])
    history.nights("cpu")
    assert len(history.problems) == len(BAD) + 1, "each is told once"


WRONG = [
    (("point", "values"), [1.0, "2"]), (("point", "anchored"), 5), (("point", "anchored"), [[1.0]]), (("point", "config"), [1]),
    (("point", "epoch"), ["e"]), (("point", "looks"), True), (("series", "chip"), {}), (("series", "metric"), "speed"),
    (("series",), None), (("ratio",), "1.0"), (("reason",), 7), (("call",), "well"),
]  # fmt: skip


@pytest.mark.parametrize(("where", "value"), WRONG)
def test_a_value_of_another_kind_is_told_here_and_not_after_hours_of_measuring(tmp_path, where, value):
    history = History(tmp_path)
    path = history.add(night(1))
    history.add(night(2))
    data = json.loads(path.read_text())
    inside = data["verdicts"][0]
    for name in where[:-1]:
        inside = inside[name]
    inside[where[-1]] = value
    path.write_text(json.dumps(data))
    assert history.nights("cpu") == [night(2)] and len(history.problems) == 1
    assert history.problems[0].startswith(f"{path}: left out of the history: ")


@pytest.mark.timeout(120)
def test_a_pipe_in_the_folder_is_not_waited_for(tmp_path):
    history = History(tmp_path)
    history.add(night(1))
    os.mkfifo(tmp_path / "cpu" / "pipe.json")
    assert history.nights("cpu") == [night(1)] and "is no regular file" in history.problems[0]


def test_a_value_that_was_infinite_leaves_the_others_readable(tmp_path):
    history = History(tmp_path)
    point = dataclasses.replace(POINT, values=(math.inf, 2.0, 4.0))
    history.add(dataclasses.replace(night(1), verdicts=(Verdict(SERIES, "ok", "", point),)))
    (found,) = history.nights("cpu")[0].points().values()
    assert len(found.values) == 3 and found.value == 3.0


def test_a_huge_file_is_not_read(tmp_path, monkeypatch):
    history = History(tmp_path)
    path = history.add(night(1))
    monkeypatch.setattr(histories, "LARGEST_BYTES", path.stat().st_size - 1)
    assert history.nights("cpu") == [] and "larger than" in history.problems[0]


def test_a_full_or_read_only_disk_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotMeasure, match="cannot write the night"):
        History(tmp_path / "file").add(night(1))


def test_numbers_that_json_has_not_are_stored_as_null(tmp_path):
    verdict = Verdict(SERIES, "broken", "wrong", dataclasses.replace(POINT, error=math.inf), ratio=math.nan)
    history = History(tmp_path)
    path = history.add(dataclasses.replace(night(1), verdicts=(verdict,)))
    json.loads(path.read_text(), parse_constant=pytest.fail)
    back = history.nights("cpu")[0].verdicts[0]
    assert back.point.error is None and back.ratio is None


def test_the_night_json_of_the_outputs_may_lie_in_a_history(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "copied.json").write_text(night_json(night(1)))
    assert History(tmp_path).nights("cpu") == [night(1)]


def test_names_cannot_leave_the_folder(tmp_path):
    history = History(tmp_path / "inside")
    path = history.add(dataclasses.replace(night(1), identity="../../out", chip="../cpu"))
    assert path.is_relative_to(tmp_path / "inside") and history.nights("../cpu")[0].identity == "../../out"
