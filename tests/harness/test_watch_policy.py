from datetime import date
from pathlib import Path

import pytest

from klab.harness.catalog.chips import find_chip
from klab.harness.watch.night import estimate_night_s
from klab.harness.watch.policy import Waiver, read_policy, without_energy
from klab.harness.watch.rule import Rule
from klab.harness.watch.series import Call, Night, Point, Series, Verdict
from klab.harness.watch.tracked import watched
from klab.harness.watch.waivers import accept, covers, lapsed, since_accepted, waive, waiver_notes
from klab.kernels.discover import discover
from klab.kernels.errors import UsageError

ROOT = Path(__file__).parents[2]
TRACK = '[[track]]\nmodel = "qwen3-0.6b"\nchip = "cpu"\n'


def written(tmp_path, text):
    path = tmp_path / "policy.toml"
    path.write_text(text)
    return path


def series(label="1x64", role="chosen", chip="cpu"):
    return Series(chip, "norm", f"key-{label}", label, role, "time")


def night(at, *verdicts, policy=""):
    return Night(identity=at.replace("-", ""), at=f"{at}T02:00:00Z", chip="cpu", verdicts=tuple(verdicts), policy=policy)


def test_the_policy_that_ships_can_be_read_and_tracks_every_chip_that_ci_has():
    policy = read_policy(ROOT / "ci" / "policy.toml")
    assert {track.chip for track in policy.tracks} == {"h200", "b200", "cpu"}
    assert policy.measure.processes >= 3 and policy.measure.anchors == ("matmul", "copy") and policy.measure.budget == "2h"
    assert policy.rule == Rule()
    assert not policy.waivers and not policy.accepted


@pytest.mark.parametrize("chip", ["h200", "b200"])
def test_the_policy_that_ships_fits_its_budget(chip):
    policy, found_chip = read_policy(ROOT / "ci" / "policy.toml"), find_chip(chip)
    found = watched(policy, found_chip, discover())
    # What a night promises is shown at 200 series (docs/night.md).
    assert 100 <= len(found.series()) <= 220
    assert estimate_night_s(policy, found_chip, found) < (1 - policy.measure.recheck_share) * 7200
    names = [series.name for series in found.series().values()]
    assert len(set(names)) == len(names)


def test_every_table_is_read(tmp_path):
    text = """
[history]
folder = "s3://bucket/nights"
[measure]
processes = 7
min_rounds = 9
limit_s = 1
budget = "90m"
[rule]
floor = 0.05
spans = [1, 4]
[[track]]
model = "deepseek-v3"
chip = ["h200", "b200"]
tp = 8
quantization = "fp8_block"
batch = 64
phase = "decode"
metrics = ["time"]
[[waiver]]
series = "h200 matmul * chosen time"
owner = "ann"
expires = 2027-01-31
[[accept]]
series = "b200 *"
owner = "bob"
since = "2026-12-01"
reason = "checks its input now"
"""
    policy = read_policy(written(tmp_path, text))
    assert policy.history == "s3://bucket/nights"
    assert policy.measure.processes == 7 and policy.measure.trial == {"min_rounds": 9, "limit_s": 1.0}
    assert (policy.rule.floor, policy.rule.spans) == (0.05, (1, 4))
    assert [track.chip for track in policy.tracks] == ["h200", "b200"]
    assert policy.tracks[0].scenario == {"tp": 8, "quantization": "fp8_block", "batches": (64,)}
    assert policy.tracks[0].metrics == ("time",) and policy.tracks[0].roles == ("chosen", "library")
    assert policy.waivers[0].expires == date(2027, 1, 31) and policy.accepted[0].since == "2026-12-01"
    assert not without_energy(read_policy(written(tmp_path, TRACK + 'metrics = ["energy"]'))).tracks


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "tracks nothing"),
        ("[[track]\nmodel=", "is not TOML"),
        ('[tracks]\nmodel = "x"', "unknown key tracks"),
        ('[track]\nmodel = "x"', "write [[track]] with two brackets"),
        ('[[track]]\nchip = "cpu"', "track 1 lacks model"),
        ('[[track]]\nmodel = "x"', "track 1 lacks chip"),
        (TRACK + "modle = 1", "track 1: unknown key modle"),
        (TRACK + "batch = [0]", "track 1: batch is a list of whole numbers from 1"),
        (TRACK + 'batch = "8"', "track 1: batch"),
        (TRACK + "isl = -1", "isl is at least 1"),
        (TRACK + "isl = true", "track 1: isl is a whole number"),
        (TRACK + "dtype = 16", "track 1: dtype is a text"),
        (TRACK + 'roles = ["fastest"]', "track 1: roles are of chosen, library"),
        (TRACK + 'metrics = "power"', "track 1: metrics are of time, energy"),
        (TRACK + "[measure]\nprocesses = 0", "measure: processes is a number of processes, 1 to 100"),
        (TRACK + "[measure]\nprocess = 5", "measure: unknown key process"),
        (TRACK + '[measure]\nbudget = "soon"', "measure: budget 'soon' is not a time"),
        (TRACK + "[measure]\nrecheck_share = 1.5", "measure: recheck_share"),
        (TRACK + '[measure]\nanchors = ["saxpy"]', "measure: anchors are of matmul, copy, not saxpy"),
        (TRACK + "[measure]\nlimit_s = nan", "measure: limit_s is a number"),
        (TRACK + "[rule]\nflor = 0.1", "rule: unknown key flor"),
        (TRACK + "[rule]\nfloor = -0.1", "rule: floor"),
        (TRACK + '[rule]\nwindow = "ten"', "rule: window is a whole number"),
        (TRACK + '[[waiver]]\nseries = "*"\nexpires = 2027-01-31', "waiver 1 lacks owner"),
        (TRACK + '[[waiver]]\nseries = "*"\nowner = " "\nexpires = 2027-01-31', "waiver 1: owner is a text"),
        (TRACK + '[[waiver]]\nseries = "*"\nowner = "ann"', "waiver 1 lacks expires"),
        (TRACK + '[[waiver]]\nseries = "*"\nowner = "ann"\nexpires = "2027-02-31"', "waiver 1: expires is a day that there is"),
        (TRACK + '[[waiver]]\nseries = "*"\nowner = "ann"\nexpires = 2027-01-31T00:00:00', "waiver 1: expires is a day"),
        (TRACK + '[[waiver]]\nseries = "*"\nowner = "ann"\nexpires = 2027-01-31\nuntil = 1', "waiver 1: unknown key until"),
        (TRACK + '[[accept]]\nseries = "*"\nowner = "ann"', "accept 1 lacks since"),
        (TRACK + '[[accept]]\nseries = "*"\nowner = "ann"\nsince = "2027-01-31T25:00"', "accept 1: since is a day or a moment"),
        (TRACK + "[history]\nfolder = 7", "history: folder is a text"),
    ],
)
def test_what_is_wrong_with_a_policy_is_said_by_the_name_of_its_key(tmp_path, text, says):
    with pytest.raises(UsageError) as error:
        read_policy(written(tmp_path, text))
    assert says in str(error.value) and "policy.toml" in str(error.value) and "\n" not in str(error.value).split(" is not TOML")[0]


def test_an_unknown_chip_is_an_error_that_names_those_that_are_tracked(tmp_path):
    policy = read_policy(written(tmp_path, TRACK))
    with pytest.raises(UsageError, match=r"tracks nothing on h200 \(it has cpu\)"):
        policy.tracks_of("h200")


def test_the_digest_is_of_what_is_tracked_on_the_chip_alone(tmp_path):
    plain = read_policy(written(tmp_path, TRACK))
    waived = read_policy(written(tmp_path, TRACK + '[[waiver]]\nseries = "*"\nowner = "ann"\nexpires = 2027-01-31'))
    other = read_policy(written(tmp_path, TRACK + TRACK.replace("cpu", "h200")))
    less = read_policy(written(tmp_path, TRACK + 'phase = "decode"'))
    assert plain.digest("cpu") == waived.digest("cpu") == other.digest("cpu") != less.digest("cpu")


def test_a_model_beside_the_policy_is_found_from_anywhere(tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    policy = read_policy(written(tmp_path, '[[track]]\nmodel = "mine.json"\nchip = "cpu"'))
    assert policy.tracks[0].model == str(tmp_path / "mine.json")


def test_a_glob_takes_names_and_identities_and_brackets_stand_for_themselves():
    one = series("1x64 [a]")
    assert covers("cpu norm * chosen time", one) and covers("cpu norm 1x64 [a] chosen time", one) and covers(one.identity, one)
    assert not covers("h200 *", one) and not covers("cpu norm 1x64 a chosen time", one) and not covers("norm", one)


def test_a_waiver_covers_until_its_last_day_and_an_expired_one_fails():
    slower = Verdict(series(), "slower", "+9%")
    fine = Verdict(series("2x64"), "ok", "as usual")
    waiver = Waiver("cpu norm *", "ann", date(2026, 12, 31), "known")
    last_day = waive([slower, fine], [waiver], date(2026, 12, 31))
    assert [v.fails for v in last_day] == [False, False] and last_day[0].waiver == "waived by ann until 2026-12-31: known"
    assert last_day[1].waiver == ""
    after = waive([slower, fine], [waiver], date(2027, 1, 1))
    assert after[0].fails and after[0].reason == "+9%; the waiver of ann expired on 2026-12-31"
    assert not waiver_notes(after, [waiver], date(2027, 1, 1)), "the night says it in a line of its own"
    longer = Waiver("*", "bob", date(2027, 6, 1))
    assert "bob" in waive([slower], [waiver, longer], date(2027, 1, 1))[0].waiver


def test_a_waiver_lapses_after_its_last_day_whatever_it_covers():
    waivers = [Waiver("cpu norm *", "ann", date(2026, 12, 31), "known"), Waiver("h200 *", "eve", date(2026, 12, 30))]
    assert lapsed(waivers, date(2026, 12, 30)) == ()
    assert [one.owner for one in lapsed([*waivers, *waivers], date(2026, 12, 31))] == ["eve"]
    told = [one.told for one in lapsed(waivers, date(2027, 1, 1))]
    assert told[0] == "the waiver of ann for 'cpu norm *' (known) expired on 2026-12-31: renew it in the policy or remove it"
    assert "'h200 *' expired on 2026-12-30" in told[1]


def test_owners_read_of_waivers_that_end_soon_or_do_nothing():
    slower, fine = Verdict(series(), "slower", "+9%"), Verdict(series("2x64"), "ok", "")
    waivers = [
        Waiver("cpu norm 1x64 *", "ann", date(2026, 12, 31)),
        Waiver("cpu norm 2x64 *", "bob", date(2026, 12, 31)),
        Waiver("h200 *", "eve", date(2026, 12, 31)),
    ]
    notes = waiver_notes([slower, fine], waivers, date(2026, 12, 28))
    assert "ann" in notes[0] and "in 3 days" in notes[0]
    assert "bob" in notes[1] and "not needed" in notes[1]
    assert "eve" in notes[2] and "covers nothing" in notes[2]
    assert not waiver_notes([slower], waivers[:1], date(2026, 6, 1))


def test_a_level_is_accepted_since_the_first_night_of_the_slow_down(tmp_path):
    path = written(tmp_path, "# kept\n" + TRACK)
    days = ["2026-11-01", "2026-11-02", "2026-11-03", "2026-11-04"]
    calls = ["slower", "ok", "slower", "slower"]
    nights = [
        night(d, Verdict(series(), c, "", Point(values=(1.0,))), Verdict(series(role="library"), "ok", "", Point(values=(1.0,))))
        for d, c in zip(days, calls, strict=True)
    ]
    made, count = accept(path, "cpu norm 1x64 chosen time", "ann", 'checks "all" now', {"cpu": nights}, "2026-11-05T09:00:00Z")
    assert (made.since, count) == ("2026-11-03T02:00:00Z", 1)
    policy = read_policy(path)
    assert policy.accepted == (made,) and path.read_text().startswith("# kept\n")
    assert since_accepted(nights, policy.accepted) == {series().identity: 2}
    assert since_accepted(nights, ()) == {}
    made, count = accept(path, "* library time", "ann", "", {"cpu": nights}, "2026-11-05T09:00:00Z")
    assert (made.since, count) == ("2026-11-05T09:00:00Z", 1) and len(read_policy(path).accepted) == 2


@pytest.mark.parametrize(
    ("given", "since"),
    [
        ("2026-12-01", "2026-12-01"),
        ("2026-12-01T02:00:00Z", "2026-12-01T02:00:00Z"),
        ("2026-12-01T02:00:00+02:00", "2026-12-01T00:00:00Z"),
        ("2026-12-01T02:00:00", "2026-12-01T02:00:00Z"),
    ],
)
def test_a_level_is_accepted_since_a_day_or_a_moment(tmp_path, given, since):
    for text in (given, f'"{given}"'):
        policy = read_policy(written(tmp_path, TRACK + f'[[accept]]\nseries = "*"\nowner = "ann"\nsince = {text}'))
        assert policy.accepted[0].since == since
    nights = [night(day, Verdict(series(), "ok", "", Point(values=(1.0,)))) for day in ("2026-11-30", "2026-12-01")]
    assert since_accepted(nights, policy.accepted) == {series().identity: 1}


def test_an_acceptance_of_nothing_or_by_nobody_changes_no_file(tmp_path):
    path = written(tmp_path, TRACK)
    nights = {"cpu": [night("2026-11-01", Verdict(series(), "slower", "", Point()))]}
    for words, says in ((("cpu matmul *", "ann"), "no series"), (("*", " "), "--owner")):
        with pytest.raises(UsageError, match=says):
            accept(path, *words, "", nights, "2026-11-05T09:00:00Z")
    assert path.read_text() == TRACK


def test_only_failing_calls_are_waived():
    everything = [Verdict(series(c.value), c.value, "") for c in Call]
    waived = waive(everything, [Waiver("*", "ann", date(2026, 12, 31))], date(2026, 1, 1))
    assert {v.call for v in waived if v.waiver} == {"slower", "missing", "broken"}
