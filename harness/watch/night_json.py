"""A night as JSON: the Night with all its fields, and beside them what a reader would otherwise have to compute."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from klab.harness.watch.series import Metric, Night, Verdict
from klab.harness.watch.wording import counts, fails, headline, outcome
from klab.kernels.contract import Json
from klab.kernels.errors import UsageError

# Added on writing, left out on reading: of a Night, and of each of its verdicts.
OF_NIGHT = ("headline", "counts", "fails", "outcome")
OF_VERDICT = ("name", "identity", "unit", "value", "judged_value", "fails")


def night_json(night: Night, *, strict: bool = False) -> str:
    """The text. `counts` by call, `fails`: does the night fail, and `outcome` as every output says it; of a verdict: the series' `name` and
    `identity`, the median `value` in `unit`, what was judged (`judged_value`), and whether it `fails` the night. What JSON cannot hold (an
    infinite error) is null.
    """
    said: dict[str, Any] = {"headline": headline(night), "counts": counts(night), "fails": outcome(night, strict) == "failed"}
    said["outcome"] = outcome(night, strict)
    said |= {f.name: getattr(night, f.name) for f in dataclasses.fields(night)}
    said["lapsed"] = [dataclasses.asdict(one) for one in night.lapsed]
    said["verdicts"] = [_verdict(one, strict) for one in night.verdicts]
    return json.dumps(_finite(said), indent=1, allow_nan=False) + "\n"


def read_night(text: str) -> Night:
    """The Night of such a text, or of a Night's own JSON; UsageError for what is neither."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not a night: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("verdicts", []), list):
        raise UsageError("not a night: it has no verdicts")
    plain = {name: value for name, value in found.items() if name not in OF_NIGHT}
    plain["verdicts"] = [
        {n: v for n, v in one.items() if n not in OF_VERDICT} if isinstance(one, dict) else one for one in found.get("verdicts", [])
    ]
    try:
        return Night.from_json(plain)
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"not a night: {error}") from None


def _verdict(one: Verdict, strict: bool) -> dict[str, Json]:
    point = one.point
    said: dict[str, Json] = {
        "name": one.series.name,
        "identity": one.series.identity,
        "unit": Metric(one.series.metric).unit,
        "value": point.value if point else None,
        "judged_value": point.judged_value if point else None,
        "fails": fails(one, strict),
    }
    return said | dataclasses.asdict(one)


def _finite(value: Json) -> Json:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
