"""A large store as a story: all rows counted and compared by DuckDB, and only those that matter read into memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from klab.harness.choose.profile import Profile
from klab.harness.measure.correction import Correction
from klab.harness.report.contest import Contest, contest, inserted, quoted
from klab.harness.report.request import Request
from klab.harness.report.runs import Run, named_runs, newest_first
from klab.harness.report.subject import Story, Subject
from klab.harness.store.index import Index
from klab.harness.store.result import Result
from klab.kernels.contract import canonical_json

# Of all chips together. Rows that compete are read whole; of those that stand so many are on the page with, and without, their samples.
COMPETE, SHOWN_WHOLE, SHOWN_LIGHT = 12_000, 2_000, 3_000
# Rows of a device with anchors that its level is taken from, the newest.
ANCHORED = 200
# Of a kernel's failures with one status or reason, so many are on the page before whole search spaces are.
FAILURES = 3


@dataclass(frozen=True)
class _Chip:
    """What is settled of a chip before any row is read whole: its contest now and without its newest run, and which rows stand."""

    name: str
    now: Contest
    newest_run: str
    before: Contest | None
    standing: str


def sifted(folders: Sequence[Path], request: Request) -> Story:
    """As `gather`, for a store too large to be held. UsageError for runs that are not there."""
    with Index(folders) as index:
        notes: list[str] = []
        _asked(index, request)
        chips = sorted(request.shown_chips or [chip for (chip,) in index.query("SELECT DISTINCT chip FROM asked")])
        share = max(len(chips), 1)
        factors, anchored = _anchored(index, request)
        settled = [_settled(index, request, chip, f"{number}", COMPETE // share, factors) for number, chip in enumerate(chips)]
        contests = [one for chip in settled for one in (chip.now, chip.before) if one is not None]
        whole = index.whole(" UNION ".join(f"SELECT n FROM {one.whole}" for one in contests)) if contests else {}
        subjects, before = [], {}
        for chip in settled:
            profile = _profile(index, request, chip.now, whole, anchored)
            if chip.before is not None:
                earlier = [row for row in anchored if row.run_id != chip.newest_run]
                before[chip.name] = _profile(index, request, chip.before, whole, earlier)
            subjects.append(_subject(index, request, chip, profile, whole, share))
        crowded = sum(chip.now.crowded for chip in settled)
        if crowded:
            notes.append(
                f"{crowded:,} problems have more results close to the best than are compared round by round: of each the nearest were"
            )
        left = sum(sum(subject.left_out.values()) for subject in subjects)
        notes.append(
            f"This is a large store: its {index.report.rows:,} rows were all counted and compared by their medians and intervals. "
            f"{sum(len(s.rows) for s in subjects):,} that stand are here whole, {sum(len(s.light) for s in subjects):,} without their "
            f"samples (wrong and failed ones, the newest run, the largest search spaces first), and {left:,} are counted only"
        )
        return Story(
            tuple(subjects),
            reading=(*index.report.lines(), *notes),
            before=before,
            newest_run={chip.name: chip.newest_run for chip in settled if chip.newest_run},
            failed_before={chip.name: _failed_before(index, chip) for chip in settled if chip.before is not None},
        )


def _asked(index: Index, request: Request) -> None:
    """Make the view `asked`: the rows of the chips, problems and runs that the page is about."""
    conditions = ["true"]
    if request.shown_chips:
        inserted(index, "asked_chips", request.shown_chips)
        conditions.append("chip IN (SELECT value FROM asked_chips)")
    for number, chip in enumerate(request.shown_chips):
        keys = request.keys(chip)
        if keys is not None:
            inserted(index, f"asked_keys_{number}", sorted(keys))
            conditions.append(f"(chip <> {quoted(chip)} OR problem_key IN (SELECT value FROM asked_keys_{number}))")
    if request.runs:
        chips = "AND chip IN (SELECT value FROM asked_chips)" if request.shown_chips else ""
        inserted(index, "asked_runs", named_runs(request.runs, _runs(index, chips)))
        conditions.append("(kind = 'reference' OR run_id IN (SELECT value FROM asked_runs))")
    index.query(f"CREATE OR REPLACE TEMP VIEW asked AS SELECT * FROM rows WHERE {' AND '.join(conditions)}")


def _runs(index: Index, condition: str) -> list[Run]:
    found = index.query(
        "SELECT run_id, max(at_us), list_sort(list(DISTINCT chip)), count(*) FROM rows "
        f"WHERE kind <> 'reference' {condition} GROUP BY run_id"
    )
    start = datetime(1970, 1, 1, tzinfo=UTC)
    return newest_first(Run(run, start + timedelta(microseconds=at), tuple(chips), count) for run, at, chips, count in found)


def _anchored(index: Index, request: Request) -> tuple[str, list[Result]]:
    """(a table of factors, the rows that devices are corrected by) where a chip has several devices of one kind; ("", none) otherwise."""
    several = "SELECT chip, device, epoch FROM asked WHERE kind = 'measured' GROUP BY ALL HAVING count(DISTINCT device_uuid) > 1"
    if not index.query(f"SELECT 1 FROM ({several}) LIMIT 1"):
        return "", []
    among = f"(chip, device, epoch) IN ({several}) AND kind = 'measured'"
    beside = index.whole(
        f"SELECT n FROM (SELECT n, row_number() OVER (PARTITION BY chip, device, epoch, device_uuid ORDER BY n DESC) AS back "
        f"FROM asked WHERE {among} AND anchored) WHERE back <= {ANCHORED}"
    )
    there = index.light(f"SELECT max(n) FROM asked WHERE {among} GROUP BY chip, device, epoch, device_uuid, run_id")
    rows = [*beside.values(), *(row for n, row in there.items() if n not in beside)]
    correction = Correction(rows, request.calibrations)
    index.db.execute("CREATE OR REPLACE TEMP TABLE factors (device_uuid VARCHAR, epoch VARCHAR, problem_key VARCHAR, factor DOUBLE)")
    for row in index.light(f"SELECT max(n) FROM asked WHERE {among} GROUP BY chip, device, epoch, device_uuid, problem_key").values():
        found = correction.factor(row)
        if found is not None:
            index.db.execute("INSERT INTO factors VALUES (?, ?, ?, ?)", [row.device_uuid, row.epoch, row.problem_key, found.value])
    return "factors", rows


def _settled(index: Index, request: Request, chip: str, tag: str, budget: int, factors: str) -> _Chip:
    now = contest(index, request, chip, f"now_{tag}", budget=budget, factors=factors)
    standing = f"standing_{tag}"
    # As query.latest: per trial its newest ok row, and its newest other row if that is newer.
    index.db.execute(
        f"CREATE OR REPLACE TEMP TABLE {standing} AS WITH newest AS ("
        "SELECT key, kind, max(n) FILTER (status = 'ok') AS fine, max(n) FILTER (status <> 'ok') AS failed "
        f"FROM mine_now_{tag} WHERE kind <> 'reference' GROUP BY key, kind) "
        "SELECT fine AS n FROM newest WHERE fine IS NOT NULL "
        "UNION ALL SELECT failed FROM newest WHERE failed IS NOT NULL AND coalesce(failed > fine, true)"
    )
    newest = index.query(f"SELECT run_id FROM rows WHERE n = (SELECT max(n) FROM {standing})")
    run = str(newest[0][0]) if newest else ""
    others = newest and index.query(f"SELECT 1 FROM here_now_{tag} WHERE kind <> 'reference' AND run_id <> ? LIMIT 1", run)
    before = contest(index, request, chip, f"before_{tag}", without=run, budget=budget, factors=factors) if others else None
    return _Chip(chip, now, run, before, standing)


def _failed_before(index: Index, chip: _Chip) -> frozenset[tuple[str, str]]:
    """What ended how in earlier runs, of kernels and of the trials that the newest run has (see `Story.failed_before`)."""
    earlier = (
        f"FROM asked WHERE chip = {quoted(chip.name)} AND status <> 'ok' AND kind <> 'reference' AND run_id <> {quoted(chip.newest_run)}"
    )
    mine = f"SELECT key FROM asked WHERE chip = {quoted(chip.name)} AND status <> 'ok' AND run_id = {quoted(chip.newest_run)}"
    return frozenset(
        index.query(f"SELECT DISTINCT kernel, status {earlier} UNION SELECT DISTINCT key, status {earlier} AND key IN ({mine})")
    )


def _profile(index: Index, request: Request, one: Contest, whole: Mapping[int, Result], anchored: Sequence[Result]) -> Profile:
    rows = [whole[n] for (n,) in index.query(f"SELECT n FROM {one.whole} ORDER BY n") if n in whole]
    rows += index.light(f"SELECT n FROM {one.stand_ins}").values()
    if anchored:
        correction = Correction([row for row in anchored if row.chip == one.chip], request.calibrations)
        rows = [correction.apply(row) for row in rows]
    return one.corrected(request.decided(one.chip, rows))


def _subject(index: Index, request: Request, chip: _Chip, profile: Profile, whole: Mapping[int, Result], share: int) -> Subject:
    """What of a chip is on the page: whole the rows that the profile names and the best of each kernel, then the nearest, up to a bound;
    light what the bound for those takes in.
    """
    named = {(c.wanted.problem_key, c.kernel, canonical_json(c.config)) for c in profile.choices}
    for c in profile.choices:
        rivals = (c.evidence.runner_up, c.evidence.library, c.evidence.default, *c.evidence.tied)
        named |= {(c.wanted.problem_key, rival.kernel, canonical_json(rival.config)) for rival in rivals if rival is not None}
    places = index.query(f"SELECT n, place FROM {chip.now.whole} WHERE n IN (SELECT n FROM {chip.standing}) ORDER BY place, n")
    ranked = [(n, whole[n]) for n, _ in places if n in whole]
    must = [n for n, row in ranked if (row.problem_key, row.kernel, canonical_json(row.config)) in named]
    kept = set(dict.fromkeys([*must, *(n for n, _ in ranked)][: max(len(must), SHOWN_WHOLE // share)]))
    inserted(index, "kept", [str(n) for n in kept])
    light = index.light(_light(chip, SHOWN_LIGHT // share))
    counts = dict(index.query(f"SELECT status, count(*) FROM {chip.standing} JOIN rows USING (n) GROUP BY status"))
    rows = _in_order(whole[n] for n in sorted(kept))
    for row in (*rows, *light.values()):
        counts[row.status.value] -= 1
    theirs = f"SELECT max(n) FROM asked WHERE kind = 'reference' AND chip = {quoted(chip.name)} GROUP BY key"
    published = index.light(f"{theirs} ORDER BY max(n) DESC LIMIT {SHOWN_LIGHT}")
    return Subject(
        chip.name,
        profile,
        request.known(chip.name, profile.device),
        tuple(rows),
        tuple(_in_order(published.values())),
        tuple(_in_order(light.values())),
        {status: count for status, count in counts.items() if count > 0},
    )


def _light(chip: _Chip, most: int) -> str:
    """The numbers of standing rows that are shown without samples: wrong ones, the best of each kernel on each problem, some failures of
    every kernel and status (of the newest run and of those before it, so that what fails newly can be told), some of every reason, in up to
    half of the room the newest run, and then whole search spaces, the largest first.
    """
    newest = f"run_id = {quoted(chip.newest_run)}"
    return f"""
    WITH left_over AS (
        SELECT n, problem_key, kernel, status, status = 'ok' AS fine, reason, {newest} AS new, middle_us
        FROM {chip.standing} JOIN rows USING (n)
        WHERE n NOT IN (SELECT value::BIGINT FROM kept)
    ), placed AS (
        SELECT *, count(*) OVER (PARTITION BY problem_key) AS size,
            row_number() OVER (PARTITION BY problem_key, kernel, fine ORDER BY middle_us) AS place,
            row_number() OVER (PARTITION BY kernel, status, new ORDER BY n DESC) AS of_status,
            row_number() OVER (PARTITION BY kernel, status, reason ORDER BY n DESC) AS of_reason,
            row_number() OVER (PARTITION BY new ORDER BY n DESC) AS back
        FROM left_over
    )
    SELECT n FROM placed ORDER BY
        NOT fine AND of_status <= CASE WHEN status = 'incorrect' THEN {most // 4} ELSE {FAILURES} END DESC,
        fine AND place = 1 DESC,
        NOT fine AND of_reason <= {FAILURES} DESC,
        new AND back <= {most // 2} DESC,
        size DESC, problem_key, n DESC
    LIMIT {most}
    """


def _in_order(rows: Iterable[Result]) -> list[Result]:
    """Rows by age, as `latest` sorts them."""
    return sorted(rows, key=lambda r: (r.operator, r.problem_label, r.kernel, r.key))
