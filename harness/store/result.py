"""Result: what happened to a trial. Always a row, also when it failed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

from klab.kernels.contract import Json

if TYPE_CHECKING:
    from klab.harness.plan.trial import Trial

SCHEMA = 1


class Status(StrEnum):
    """How a trial ended. The list is closed: whatever happens is one of these."""

    OK = "ok"
    SCREENED = "screened"
    COMPILE_ERROR = "compile_error"
    INCORRECT = "incorrect"
    OUT_OF_MEMORY = "out_of_memory"
    CRASHED = "crashed"
    TIMEOUT = "timeout"
    THROTTLED = "throttled"
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True)
class Result:
    """One row of the store. Times in microseconds per launch, energy in joules per launch, power in watts of the GPU board.

    `samples_us` are the rounds in the order they were taken (each the mean of one batch of launches); `clocks_mhz`, `temperatures_c`,
    `throttle_reasons` (NVML's bit mask), and `marked` (1 where a hardware throttle makes the round not count) run beside them.
    `wide_error` is how far the output is from that of the unquantised problem `wide_key`, on the inputs before they were quantised:
    ||out - wide|| / ||wide||, the worst of the outputs. `math_dtype` is the dtype whose peak bounds the problem (empty: its dtype).
    Null means not measured, never zero. `energy_reason` says why energy_j is null or how it was cross-checked.
    """

    key: str
    status: Status
    kernel: str
    backend: str
    library: bool
    source_digest: str
    operator: str
    problem: Mapping[str, Json]
    problem_key: str
    problem_label: str
    config: Mapping[str, Json]
    chip: str
    policy: Mapping[str, Json]
    run_id: str
    recorded_at: str
    reason: str = ""
    kind: str = "measured"
    # correctness
    error: float | None = None
    tolerance: float | None = None
    checks: int = 0
    reference_device: str = ""
    wide_key: str = ""
    wide_error: float | None = None
    # time
    samples_us: tuple[float, ...] = ()
    median_us: float | None = None
    q1_us: float | None = None
    q3_us: float | None = None
    ci_low_us: float | None = None
    ci_high_us: float | None = None
    launches_per_round: int = 0
    launch_mode: str = ""
    l2_state: str = ""
    # state of the device while it ran
    clocks_mhz: tuple[float | None, ...] = ()
    temperatures_c: tuple[float | None, ...] = ()
    throttle_reasons: tuple[int | None, ...] = ()
    marked: tuple[int, ...] = ()
    sm_clock_mhz: float | None = None
    # power
    power_w: float | None = None
    idle_power_w: float | None = None
    energy_j: float | None = None
    energy_ci_low_j: float | None = None
    energy_ci_high_j: float | None = None
    energy_reason: str = ""
    power_trace: tuple[tuple[float, float], ...] = ()
    # work, as the problem counts it
    flops: float = 0.0
    bytes_moved: float = 0.0
    math_dtype: str = ""
    # how it was built
    compile_s: float | None = None
    build: Mapping[str, Json] = field(default_factory=dict)
    # where
    device: str = ""
    device_uuid: str = ""
    epoch: str = ""
    environment: Mapping[str, Json] = field(default_factory=dict)
    schema: int = SCHEMA

    @classmethod
    def of(cls, trial: Trial, status: Status, *, backend: str, library: bool, run_id: str, **found: Any) -> Self:
        """The row of a trial that ended now: what the trial says of itself, and what was `found`."""
        problem = trial.problem
        wide = problem.wide()
        return cls(
            key=trial.key,
            status=status,
            kernel=trial.kernel,
            backend=backend,
            library=library,
            source_digest=trial.source_digest,
            operator=problem.operator,
            problem=problem.to_json(),
            problem_key=problem.key,
            problem_label=problem.label(),
            config=trial.config.to_json_full(),
            chip=trial.chip,
            policy=trial.policy.to_json(),
            run_id=run_id,
            recorded_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            flops=problem.flops(),
            bytes_moved=problem.bytes_moved(),
            math_dtype="" if problem.math_dtype == problem.dtype else problem.math_dtype,
            wide_key=wide.key if wide else "",
            **found,
        )

    def to_json(self) -> dict[str, Json]:
        """A JSON object; fields at their default are left out, but for `schema`."""
        row: dict[str, Json] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
            if f.name == "schema" or default is dataclasses.MISSING or value != default:
                row[f.name] = value.value if isinstance(value, Status) else value
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Json]) -> Self:
        """The inverse of `to_json`, for rows already upgraded to the current schema. Raises ValueError or TypeError on a foreign row."""
        names = {f.name for f in dataclasses.fields(cls)}
        values = {name: _tuples(value) for name, value in row.items() if name in names}
        values["status"] = Status(values["status"])
        return cls(**values)


def _tuples(value: Json) -> Json:
    return tuple([_tuples(item) if isinstance(item, list) else item for item in value]) if isinstance(value, list) else value
