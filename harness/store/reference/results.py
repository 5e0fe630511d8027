"""Points as Results of kind "reference": never mixed with measurements, because whatever reads the store asks for its kind."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from klab.harness.store.reference.points import Point, Reading, points
from klab.harness.store.reference.tables import package_version, require
from klab.harness.store.result import Result, Status
from klab.kernels.contract import Chip, digest

KIND = "reference"
RUN = "published"


def results(
    chip: Chip,
    operators: Iterable[str] | None = None,
    backend: str | Sequence[str] | None = "trtllm",
    root: Path | None = None,
    *,
    flagged: bool = False,
    reading: Reading | None = None,
) -> Iterator[Result]:
    """The published rows of a chip as Results: one engine's, unless `backend` is None. Means, without spread, power or clocks.

    Rows that are traps are left out, or with `flagged` have the status unsupported and say why.
    """
    root = require(root)
    package = package_version(root)
    for point in points(chip, operators, backend=backend, root=root, flagged=flagged, reading=reading):
        yield result_of(point, chip, package)


def result_of(point: Point, chip: Chip, package: str) -> Result:
    """One row. Its kernel is named by its engine, so that it cannot be taken for one of klab's."""
    problem = point.problem
    source = re.sub(r"[^A-Za-z0-9_.,-]+", "_", point.kernel) or "unnamed"
    kernel = f"{problem.operator}/{point.table.backend}.{source}"
    provenance = {"table": point.table.label, "engine": point.engine, "version": point.version, "package": package}
    identity = digest([provenance, kernel])
    wide = problem.wide()
    bad = bool(point.flag)
    return Result(
        key=digest([KIND, identity, problem.key, chip.name]),
        status=Status.UNSUPPORTED if bad else Status.OK,
        kernel=kernel,
        backend=point.table.backend,
        library=True,
        source_digest=identity,
        operator=problem.operator,
        problem=problem.to_json(),
        problem_key=problem.key,
        problem_label=problem.label(),
        config={},
        chip=chip.name,
        policy={},
        run_id=RUN,
        recorded_at="",
        reason="; ".join(filter(None, (point.flag, point.note))),
        kind=KIND,
        median_us=point.us if point.us > 0 else None,
        flops=problem.flops(),
        bytes_moved=problem.bytes_moved(),
        math_dtype="" if problem.math_dtype == problem.dtype else problem.math_dtype,
        wide_key=wide.key if wide else "",
        energy_reason="the tables hold no power",
        device=point.device,
        environment=provenance,
    )
