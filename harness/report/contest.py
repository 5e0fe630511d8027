"""What of a large store decides a chip's choices: the rules of harness/choose in SQL, down to the rows that must be read whole.

It says which device is meant, which rows may be chosen from, which candidates there are, and which of them are near enough to the best (or
the best of their kind) to be compared round by round. Everything beyond is counted here and not read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from klab.harness.catalog.cpu_probe import probe
from klab.harness.choose.candidates import state
from klab.harness.choose.decide import defaults_of, sources_of
from klab.harness.choose.profile import Profile
from klab.harness.choose.settle import Defaults
from klab.harness.choose.wrong import distrust
from klab.harness.report.request import Request
from klab.harness.store.index import Index
from klab.harness.store.index_sql import config_hash
from klab.kernels.contract import Json, canonical_json

# Beyond this ratio of medians, and with intervals apart, nothing is compared round by round (choose/compare.py: 1.1, twice over).
NEAR = 1.25
# (factor on NEAR, how many of all, how many of each kernel are read in any case). A row is corrected by the anchor of its own laps, which
# is known when it is read whole; until then its device's factor stands for it, a few percent off.
NONE, MARGIN = (1.0, 2, 1), (1.25, 6, 3)
# A lap further back in a candidate's history weighs as much as so many places among the nearest.
HISTORY = 4
LEAST, MOST = 12, 400

USABLE = (
    "status = 'ok' AND kind = 'measured' AND checks > 0 AND coalesce(error <= tolerance, false) AND NOT throttled AND counted_rounds >= 5"
)
VERIFIED = "status IN ('ok', 'throttled') AND kind = 'measured' AND checks > 0 AND coalesce(error <= tolerance, false)"
REFUSAL = f"""CASE
    WHEN status <> 'ok' THEN CASE WHEN reason <> '' THEN status || ': ' || reason ELSE status END
    WHEN kind <> 'measured' THEN kind || ', not measured'
    WHEN NOT ({VERIFIED}) THEN 'its output was not checked'
    WHEN throttled THEN 'throttled in most of its rounds'
    WHEN counted_rounds < 5 AND (median_us IS NULL OR ci_low_us IS NULL OR ci_high_us IS NULL) THEN 'no interval of its time'
    WHEN counted_rounds < 5 THEN concat(counted_rounds, ' counting round', CASE WHEN counted_rounds = 1 THEN '' ELSE 's' END,
        ', and 5 are the least')
    ELSE refused END"""


@dataclass(frozen=True)
class Contest:
    """Of one chip: the meant device, how many rows of others are set aside, the rows that compete (a table with n), those that stand for
    problems without candidates (likewise), how many candidates a problem has, why it has none, and of how many problems not all were read.
    """

    chip: str
    device: str
    elsewhere: Mapping[str, int]
    whole: str
    stand_ins: str
    counted: Mapping[str, int]
    why_open: Mapping[str, str]
    crowded: int

    def corrected(self, profile: Profile) -> Profile:
        """A profile made from the contest's rows alone, with what it says of all rows put right."""
        choices = tuple(
            dataclasses.replace(c, evidence=dataclasses.replace(c.evidence, candidates=self.counted[c.wanted.problem_key]))
            for c in profile.choices
        )
        unsolved = tuple(dataclasses.replace(one, reason=self.why_open.get(one.wanted.problem_key, one.reason)) for one in profile.open)
        notes = profile.notes
        if self.elsewhere:
            others, count = ", ".join(sorted(self.elsewhere)), sum(self.elsewhere.values())
            notes = (f"{count} results of other devices of this chip are set aside: {others}", *notes)
        return dataclasses.replace(profile, choices=choices, open=unsolved, notes=notes)


def contest(index: Index, request: Request, chip: str, tag: str, *, without: str = "", budget: int, factors: str = "") -> Contest:
    """The contest of a chip, among the rows of the table `asked`, where those of the run `without` are left out.

    tag: part of the names of its tables. budget: about how many rows are read whole. factors: a table of (device_uuid, epoch, problem_key,
    factor) by which times of several devices of one kind are made comparable.
    """
    db = index.db
    index.query(
        f"CREATE OR REPLACE TEMP VIEW here_{tag} AS SELECT * FROM asked WHERE chip = {quoted(chip)} "
        f"AND (kind = 'reference' OR run_id <> {quoted(without)})"
    )
    device = _device(index, chip, tag)
    elsewhere: dict[str, int] = {}
    mine = f"mine_{tag}"
    if device:
        aside = f"SELECT device, count(*) FROM here_{tag} WHERE device NOT IN ({quoted(device)}, '') GROUP BY device"
        elsewhere = dict(index.query(aside))
    only = f"WHERE device IN ({quoted(device)}, '')" if device else ""
    index.query(f"CREATE OR REPLACE TEMP VIEW {mine} AS SELECT * FROM here_{tag} {only}")
    limits = request.chip_limits(chip)
    defaults = defaults_of(request.catalogue, limits) if request.catalogue and limits else None
    _states(index, mine, tag)
    _refused(index, defaults, mine, tag)
    _sources(index, request, tag)
    db.execute(_candidates(mine, tag, factors))
    _defaults(index, defaults, tag)
    counted = dict(index.query(f"SELECT problem_key, count(*) FROM candidates_{tag} GROUP BY ALL"))
    each = min(MOST, max(LEAST, budget // max(len(counted), 1)))
    db.execute(_ranked(tag, *(MARGIN if factors else NONE)))
    db.execute(_whole(tag, each))
    crowded = index.query(f"SELECT count(DISTINCT problem_key) FROM ranked_{tag} WHERE near AND n NOT IN (SELECT n FROM whole_{tag})")[0][0]
    db.execute(
        f"CREATE OR REPLACE TEMP TABLE stand_ins_{tag} AS SELECT max(n) AS n FROM {mine} "
        f"WHERE problem_key NOT IN (SELECT problem_key FROM candidates_{tag}) GROUP BY problem_key"
    )
    return Contest(chip, device, elsewhere, f"whole_{tag}", f"stand_ins_{tag}", counted, _why_open(index, mine, tag), crowded)


def _device(index: Index, chip: str, tag: str) -> str:
    """As `decide.this_device`, else the device of the newest row that may be chosen."""
    if chip == "cpu":
        model = probe().model
        if index.query(f"SELECT 1 FROM here_{tag} WHERE device = {quoted(model)} LIMIT 1"):
            return model
    newest = index.query(f"SELECT device FROM here_{tag} WHERE {USABLE} ORDER BY n DESC LIMIT 1")
    return str(newest[0][0]) if newest else ""


def _states(index: Index, mine: str, tag: str) -> None:
    """What times must share to be compared, by the policies and cache states that there are; their order is that of `candidates`."""
    db = index.db
    one_each = f"SELECT min(n) FROM {mine} GROUP BY policy, l2_state"
    found = [(row, state(row)) for row in index.light(one_each).values()]
    order = {key: n for n, key in enumerate(sorted({key for _, key in found}))}
    db.execute(f"CREATE OR REPLACE TEMP TABLE states_{tag} (n BIGINT, state INTEGER, untouched BOOLEAN, cold BOOLEAN)")
    numbers = list(index.light(one_each))
    for n, (_, key) in zip(numbers, found, strict=True):
        db.execute(f"INSERT INTO states_{tag} VALUES (?, ?, ?, ?)", [n, order[key], key[0], key[1] == "cold"])
    db.execute(
        f"CREATE OR REPLACE TEMP TABLE policies_{tag} AS "
        f"SELECT r.policy, r.l2_state, s.state, s.untouched, s.cold FROM states_{tag} s JOIN rows r USING (n)"
    )


def _refused(index: Index, defaults: Defaults | None, mine: str, tag: str) -> None:
    """What wrong results that stand keep from being chosen: code, and configurations of code (see choose/wrong.py)."""
    db = index.db
    db.execute(f"CREATE OR REPLACE TEMP TABLE bad_code_{tag} (kernel VARCHAR, source_digest VARCHAR, why VARCHAR)")
    db.execute(f"CREATE OR REPLACE TEMP TABLE bad_config_{tag} (n BIGINT, why VARCHAR)")
    wrong = index.light(
        f"SELECT n FROM (SELECT arg_max(status, n) AS status, max(n) AS n FROM {mine} "
        f"WHERE status = 'incorrect' OR ({VERIFIED}) GROUP BY key) WHERE status = 'incorrect'"
    )
    doubt = distrust(list(wrong.values()), defaults)
    codes: dict[tuple[str, str], str] = {}
    for n, row in wrong.items():
        db.execute(f"INSERT INTO bad_config_{tag} VALUES (?, ?)", [n, doubt(row)])
        # A configuration that no row has: what is said of it is said of the code.
        why = doubt(dataclasses.replace(row, config={"": ""}))
        if why:
            codes[row.kernel, row.source_digest] = why
    for (kernel, source), why in codes.items():
        db.execute(f"INSERT INTO bad_code_{tag} VALUES (?, ?, ?)", [kernel, source, why])
    db.execute(
        f"CREATE OR REPLACE TEMP VIEW judged_{tag} AS SELECT m.*, coalesce(code.why, config.why) AS refused FROM {mine} m "
        f"LEFT JOIN bad_code_{tag} code ON (code.kernel, code.source_digest) = (m.kernel, m.source_digest) "
        "LEFT JOIN (SELECT r.kernel, r.source_digest, r.config_hash, min(b.why) AS why "
        f"FROM bad_config_{tag} b JOIN rows r USING (n) GROUP BY ALL) config "
        "ON (config.kernel, config.source_digest, config.config_hash) = (m.kernel, m.source_digest, m.config_hash)"
    )


def _sources(index: Index, request: Request, tag: str) -> None:
    """The code of each kernel as it is now."""
    index.db.execute(f"CREATE OR REPLACE TEMP TABLE sources_{tag} (kernel VARCHAR, source_digest VARCHAR)")
    now: Mapping[str, str] = sources_of(request.catalogue) if request.catalogue else {}
    for pair in now.items():
        index.db.execute(f"INSERT INTO sources_{tag} VALUES (?, ?)", list(pair))


def _defaults(index: Index, defaults: Defaults | None, tag: str) -> None:
    """The default configuration of each candidate's kernel: a choice is compared with that of its kernel, however slow it is."""
    index.db.execute(f"CREATE OR REPLACE TEMP TABLE defaults_{tag} (problem_key VARCHAR, kernel VARCHAR, config_hash UBIGINT)")
    if defaults is None:
        return
    one_each = index.light(f"SELECT max(n) FROM candidates_{tag} GROUP BY problem_key, kernel").values()
    found = [(row.problem_key, row.kernel, canonical_json(config)) for row in one_each if (config := defaults(row)) is not None]
    if found:
        index.db.execute(
            f"INSERT INTO defaults_{tag} SELECT problem_key, kernel, {config_hash('config::JSON')} "
            "FROM (SELECT unnest(?::VARCHAR[]) AS problem_key, unnest(?::VARCHAR[]) AS kernel, unnest(?::VARCHAR[]) AS config)",
            [list(column) for column in zip(*found, strict=True)],
        )


def _candidates(mine: str, tag: str, factors: str) -> str:
    """As `choose.candidates`: per problem the candidates of the state that counts, each with its newest row."""
    factor = (
        f"LEFT JOIN {factors} f ON (f.device_uuid, f.epoch, f.problem_key) = (u.device_uuid, u.epoch, u.problem_key)" if factors else ""
    )
    by = "coalesce(f.factor, 1.0)" if factors else "1.0"
    return f"""
    CREATE OR REPLACE TEMP TABLE usable_{tag} AS
    SELECT u.n, u.problem_key, u.kernel, u.config_hash, u.source_digest, u.library, p.state, p.untouched, p.cold,
        u.middle_us / {by} AS us, coalesce(u.ci_low_us / {by}, 0) AS low, coalesce(u.ci_high_us / {by}, 1e300) AS high,
        CASE WHEN u.energy_ci_low_j IS NOT NULL AND u.energy_ci_high_j IS NOT NULL THEN u.energy_j END AS energy
    FROM judged_{tag} u JOIN policies_{tag} p ON (p.policy, p.l2_state) = (u.policy, u.l2_state) {factor}
    WHERE {USABLE} AND refused IS NULL;
    CREATE OR REPLACE TEMP TABLE candidates_{tag} AS
    WITH code AS (
        SELECT problem_key, state, kernel,
            coalesce(max(s.source_digest) FILTER (s.source_digest = u.source_digest), arg_max(u.source_digest, n)) AS source_digest
        FROM usable_{tag} u LEFT JOIN sources_{tag} s USING (kernel) GROUP BY problem_key, state, kernel
    ), found AS (
        SELECT problem_key, state, kernel, config_hash, source_digest, max(n) AS n, max(n) FILTER (energy IS NOT NULL) AS metered
        FROM usable_{tag} JOIN code USING (problem_key, state, kernel, source_digest)
        GROUP BY problem_key, state, kernel, config_hash, source_digest
    ), chosen AS (
        SELECT problem_key, arg_max(state, (untouched, cold, many, newest, state)) AS state FROM (
            SELECT problem_key, state, any_value(untouched) AS untouched, any_value(cold) AS cold, max(u.n) AS newest,
                (SELECT count(*) FROM found f WHERE (f.problem_key, f.state) = (u.problem_key, u.state)) AS many
            FROM usable_{tag} u GROUP BY problem_key, state
        ) GROUP BY problem_key
    )
    SELECT * FROM found JOIN chosen USING (problem_key, state);
    """


def _ranked(tag: str, slack: float, first: int, of_kernel: int) -> str:
    """The candidates of each problem in the order in which they matter: `must` be read, `near` to the best, `fallback` (a default)."""
    return f"""
    CREATE OR REPLACE TEMP TABLE ranked_{tag} AS
    WITH timed AS (
        SELECT c.*, u.us, u.low, u.high, u.library, e.energy,
            min(u.us) OVER problem AS least, arg_min(u.high, u.us) OVER problem AS least_high
        FROM candidates_{tag} c JOIN usable_{tag} u USING (n) LEFT JOIN usable_{tag} e ON e.n = c.metered
        WINDOW problem AS (PARTITION BY c.problem_key)
    ), close AS (
        SELECT *, us <= {NEAR * slack} * least OR low <= least_high AS near,
            row_number() OVER (PARTITION BY problem_key ORDER BY us, kernel) <= {first}
            OR row_number() OVER (PARTITION BY problem_key, kernel ORDER BY us, config_hash) <= {of_kernel} AS must,
            (problem_key, kernel, config_hash) IN (SELECT (problem_key, kernel, config_hash) FROM defaults_{tag}) AS fallback
        FROM timed
    )
    SELECT *, row_number() OVER (PARTITION BY problem_key ORDER BY must DESC, near DESC, frugal <= 2 DESC, us, kernel) AS place FROM (
        SELECT *, CASE WHEN near AND energy IS NOT NULL THEN
            row_number() OVER (PARTITION BY problem_key, near AND energy IS NOT NULL ORDER BY energy) ELSE 1000 END AS frugal
        FROM close
    ) WHERE must OR near OR fallback;
    """


def _whole(tag: str, each: int) -> str:
    """Of each problem about `each` rows: the newest one of each candidate in their order, and the more of its history the nearer it is."""
    return f"""
    CREATE OR REPLACE TEMP TABLE whole_{tag} AS
    WITH history AS (
        SELECT u.n, r.problem_key, r.place, r.must OR r.fallback AS must, r.metered,
            row_number() OVER (PARTITION BY r.problem_key, r.kernel, r.config_hash, r.source_digest ORDER BY u.n DESC) AS back
        FROM ranked_{tag} r JOIN usable_{tag} u USING (problem_key, state, kernel, config_hash, source_digest)
    ), ordered AS (
        SELECT *, row_number() OVER (PARTITION BY problem_key ORDER BY place + {HISTORY} * (back - 1), back) AS turn FROM history
    ), taken AS (SELECT * FROM ordered WHERE turn <= {each} OR (must AND back = 1))
    SELECT n, min(problem_key) AS problem_key, min(place) AS place FROM (
        SELECT n, problem_key, place FROM taken
        UNION ALL SELECT metered, problem_key, place FROM taken WHERE back = 1 AND metered IS NOT NULL
    ) GROUP BY n;
    """


def _why_open(index: Index, mine: str, tag: str) -> dict[str, str]:
    """As `Selection.why_open` for the problems without candidates."""
    found: dict[str, list[tuple[int, str]]] = {}
    for key, why, count in index.query(
        f"SELECT problem_key, {REFUSAL} AS why, count(*) FROM judged_{tag} "
        f"WHERE problem_key NOT IN (SELECT problem_key FROM candidates_{tag}) GROUP BY ALL"
    ):
        found.setdefault(key, []).append((count, why or ""))
    told = {}
    for key, reasons in found.items():
        most = sorted(reasons, key=lambda item: (-item[0], item[1]))
        listed = "; ".join(f"{count} x {why}" for count, why in most[:3])
        told[key] = f"none of {sum(count for count, _ in reasons)} results may be chosen: {listed}{'; ...' if len(most) > 3 else ''}"
    return told


def quoted(value: str) -> str:
    """A text in SQL."""
    return "'" + value.replace("'", "''") + "'"


def inserted(index: Index, table: str, values: Collection[Json]) -> None:
    """A temporary table of one column `value` with these texts."""
    index.db.execute(f"CREATE OR REPLACE TEMP TABLE {table} AS SELECT unnest(?::VARCHAR[]) AS value", [list(values)])
