"""Demand: which models are asked for, how often and how fast that grows; read from a CSV file."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from klab.harness.cost.demand_columns import COLUMNS
from klab.harness.cost.money import Selling
from klab.harness.cost.price import HOURS_PER_MONTH
from klab.harness.cost.workload import Workload
from klab.harness.plan.quantization import check_format
from klab.harness.plan.scenario import Scenario
from klab.kernels.dtypes import long_name
from klab.kernels.errors import UsageError

# Words for the wide model where the checkpoint is stored narrow.
WIDE = ("none", "off")
SECONDS_PER_DAY = 86_400
SECONDS_PER_MONTH = 3600 * HOURS_PER_MONTH
# Beyond this a forecast is no forecast; it also keeps (1 + growth)^month finite.
MOST_PER_SECOND = 1e9
# A request in 30 years: less is no demand, and its cost per token no figure.
LEAST_PER_SECOND = 1e-9


@dataclass(frozen=True)
class Need:
    """One row of a demand: `requests_per_s` of a model on average in month 0, each with the workload's prompt and generated tokens.

    `growth_per_month` compounds. `peak_over_average`: what the fleet is sized for, over the average. `tp`: None lets sizes compete.
    `quantization`: empty for the format that the checkpoint is stored in.
    """

    name: str
    model: str
    requests_per_s: float
    workload: Workload
    growth_per_month: float = 0.0
    peak_over_average: float = 1.0
    quantization: str = ""
    kv_dtype: str = ""
    tp: int | None = None
    expert_parallel: bool = False
    selling: Selling | None = None

    def average(self, month: int) -> float:
        """Requests per second on average in a month."""
        return self.requests_per_s * (1 + self.growth_per_month) ** month

    def peak(self, month: int) -> float:
        """Requests per second that must be served; batch work waits for the troughs, so its average is enough."""
        return self.average(month) * (1.0 if self.workload.offline else self.peak_over_average)

    @property
    def tokens_per_request(self) -> int:
        """Prompt and generated."""
        return self.workload.isl + self.workload.osl

    def tokens_per_month(self, month: int) -> float:
        """Prompt and generated tokens of a month of 730 hours."""
        return self.average(month) * self.tokens_per_request * SECONDS_PER_MONTH

    def usd_per_month(self, month: int) -> float | None:
        """What a month is sold for; None without a selling price."""
        if self.selling is None:
            return None
        return self.average(month) * SECONDS_PER_MONTH * self.selling.usd_per_request(self.workload)


def read_demand(path: Path) -> list[Need]:
    """The rows of a CSV file (commas, semicolons or tabs; `#` starts a comment line). UsageError names the line and the column at fault."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no UTF-8 text: save it as CSV UTF-8") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    lines = [(at, line) for at, line in enumerate(text.splitlines(), 1) if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise UsageError(f"{path} is empty: its first line names columns ({', '.join(COLUMNS)})")
    comma = max(",;\t", key=lines[0][1].count)
    try:
        rows = list(csv.reader(io.StringIO("\n".join(line for _, line in lines)), delimiter=comma, skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise UsageError(f"{path} is no CSV: {error}") from error
    width = max((len(row) for row in rows if any(map(str.strip, row))), default=0)
    # Spreadsheets write commas behind the last column.
    while width > 1 and not any(row[width - 1 :] and row[width - 1].strip() for row in rows):
        width -= 1
    rows = [row[:width] for row in rows]
    header = [name.strip().lower() for name in rows[0]]
    _check_header(path, header)
    if len(rows) != len(lines):
        raise UsageError(f"{path}: a quoted value runs over the end of its line")
    if len(rows) == 1:
        raise UsageError(f"{path} has columns and no rows")
    needs = [_need(f"{path} line {at}", header, row) for (at, _), row in zip(lines[1:], rows[1:], strict=True)]
    names = [need.name for need in needs]
    return [_named(need, at, names) for at, need in enumerate(needs)]


def seconds_of(text: str) -> float:
    """`25ms`, `2s`, `1.5` (seconds) -> seconds; ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(ms|s|)", text.strip())
    if found is None:
        raise ValueError("a time is written 2s or 25ms")
    return float(found[1]) * (1e-3 if found[2] == "ms" else 1.0)


def _check_header(path: Path, header: list[str]) -> None:
    unknown = [name for name in header if name not in COLUMNS]
    if unknown:
        raise UsageError(f"{path}: unknown column {', '.join(map(repr, unknown))}; there are {', '.join(COLUMNS)}")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise UsageError(f"{path}: column {', '.join(twice)} is there twice")
    missing = [name for name in ("model", "isl", "osl") if name not in header]
    if missing or not {"tokens_per_day", "requests_per_s"} & set(header):
        raise UsageError(f"{path} lacks the column {', '.join(missing or ['tokens_per_day (or requests_per_s)'])}")


def _need(where: str, header: list[str], row: list[str]) -> Need:
    if len(row) != len(header):
        raise UsageError(f"{where} has {len(row)} values for {len(header)} columns")
    given = {name: text.strip() for name, text in zip(header, row, strict=True) if text.strip()}
    missing = [name for name in ("model", "isl", "osl") if name not in given]
    if missing:
        raise UsageError(f"{where} lacks {', '.join(missing)}")
    values: dict[str, Any] = {}
    for name, text in given.items():
        try:
            values[name] = _READ.get(name, str)(text)
        except ValueError as error:
            raise UsageError(f"{where}: {name} is {text!r}: {error}") from None
    if values.get("offline") and (kept := [name for name in ("slo_ttft", "slo_tpot") if name in values]):
        raise UsageError(f"{where}: offline and {' and '.join(kept)} contradict each other: for batch work no latency is promised")
    try:
        workload = Workload(**_workload_fields(values))
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    rates = [name for name in ("tokens_per_day", "requests_per_s") if name in values]
    if len(rates) != 1:
        raise UsageError(f"{where}: give {'only one of' if rates else ''} tokens_per_day or requests_per_s".replace("  ", " "))
    rate = values[rates[0]]
    if rates[0] == "tokens_per_day":
        rate /= (workload.isl + workload.osl) * SECONDS_PER_DAY
    if not LEAST_PER_SECOND <= rate < MOST_PER_SECOND:
        raise UsageError(
            f"{where}: {rates[0]} is {given[rates[0]]}: a demand is above 0 "
            f"({LEAST_PER_SECOND:g} to {MOST_PER_SECOND:g} requests per second)"
        )
    growth, peak, tp = values.get("growth_per_month", 0.0), values.get("peak_over_average", 1.0), values.get("tp")
    if not -1 < growth <= 10:
        raise UsageError(f"{where}: growth_per_month is {given['growth_per_month']}: a share above -1 and at most 10 (0.1 is 10% a month)")
    if not 1 <= peak <= 1000:
        raise UsageError(f"{where}: peak_over_average is {given['peak_over_average']}: the peak is 1 to 1000 times the average")
    if tp is not None and tp < 1:
        raise UsageError(f"{where}: tp is {tp}: at least 1 GPU")
    selling = None
    if "sell_input" in values or "sell_output" in values:
        try:
            selling = Selling(values.get("sell_input", 0.0), values.get("sell_output", 0.0))
        except UsageError:
            raise UsageError(f"{where}: sell_input and sell_output are dollars per million tokens, not negative and not both 0") from None
    try:
        if values.get("quantization", "none").lower() not in WIDE:
            check_format(values["quantization"])
        if "kv_dtype" in values:
            values["kv_dtype"] = Scenario(kv_dtype=long_name(values["kv_dtype"])).kv_dtype
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    words = {name: values[name] for name in ("quantization", "kv_dtype", "expert_parallel") if name in values}
    return Need(values.get("name", given["model"]), given["model"], rate, workload, growth, peak, tp=tp, selling=selling, **words)


def _workload_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    names = {"slo_ttft": "slo_ttft_s", "slo_tpot": "slo_tpot_s"}
    known = ("isl", "osl", "slo_ttft", "slo_tpot", "prefix_hit", "offline", "draft_tokens", "acceptance")
    return {names.get(name, name): values[name] for name in known if name in values}


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError("not a number (write 1500000 or 1.5e6, without thousands separators or %)")
    return value


def _whole(text: str) -> int:
    value = _number(text)
    if value != int(value):
        raise ValueError("not a whole number")
    return int(value)


def _yes(text: str) -> bool:
    if text.lower() not in ("yes", "true", "1", "no", "false", "0"):
        raise ValueError("yes or no")
    return text.lower() in ("yes", "true", "1")


def _named(need: Need, at: int, names: list[str]) -> Need:
    """With a number behind the name where several rows have it."""
    if names.count(need.name) == 1:
        return need
    return replace(need, name=f"{need.name} #{names[: at + 1].count(need.name)}")


_READ: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("tokens_per_day", "requests_per_s", "growth_per_month", "peak_over_average", "prefix_hit", "acceptance"), _number),
    **dict.fromkeys(("sell_input", "sell_output"), _number),
    **dict.fromkeys(("isl", "osl", "tp", "draft_tokens"), _whole),
    **dict.fromkeys(("slo_ttft", "slo_tpot"), seconds_of),
    **dict.fromkeys(("offline", "expert_parallel"), _yes),
}
