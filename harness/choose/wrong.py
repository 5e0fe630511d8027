"""What a wrong result says of other results: a kernel that fails where its own default runs is not to be trusted elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from klab.harness.choose.settle import Defaults
from klab.harness.store.query import standing_incorrect
from klab.harness.store.result import Result
from klab.kernels.contract import canonical_json

Distrust = Callable[[Result], str | None]
"""Why a row may not be chosen from because of what other rows showed, or None."""


def distrust(rows: Sequence[Result], defaults: Defaults | None) -> Distrust:
    """By the wrong results that stand among `rows` (of one chip): of a kernel's code all rows are refused when its default configuration
    was wrong on any problem, and the rows of one configuration when that was. `defaults` as for `settle`; None: only the latter.
    """
    codes: dict[tuple[str, str], str] = {}
    configs: dict[tuple[str, str, str], str] = {}
    for row in standing_incorrect(rows):
        why = f"wrong on {row.problem_label}" + (f": {row.reason}" if row.reason else "")
        config = canonical_json(row.config)
        configs.setdefault((row.kernel, row.source_digest, config), why)
        default = defaults(row) if defaults else None
        if default is not None and canonical_json(default) == config:
            codes.setdefault((row.kernel, row.source_digest), why)

    def why_not(row: Result) -> str | None:
        code = row.kernel, row.source_digest
        return codes.get(code) or configs.get((*code, canonical_json(row.config)))

    return why_not
