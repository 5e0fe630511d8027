"""Picking rows by what a person names: operator, kernel, chip, status."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from klab.harness.store.result import Result, Status
from klab.kernels.errors import UsageError


@dataclass
class Selection:
    """Which rows to keep; an empty list keeps all. `seen` gathers what was there, for `check_names`."""

    operators: Collection[str] = ()
    kernels: Collection[str] = ()
    chips: Collection[str] = ()
    statuses: Collection[str] = ()
    seen: dict[str, set[str]] = field(default_factory=lambda: {"operator": set(), "kernel": set(), "chip": set()})

    def __post_init__(self) -> None:
        unknown = sorted(set(self.statuses) - {status.value for status in Status})
        if unknown:
            raise UsageError(f"unknown status {', '.join(unknown)}; known: {', '.join(Status)}")

    def of(self, results: Iterable[Result]) -> Iterator[Result]:
        """The rows that match. A kernel may be named `operator/name` or by its bare name."""
        for result in results:
            self.seen["operator"].add(result.operator)
            self.seen["kernel"].add(result.kernel)
            self.seen["chip"].add(result.chip)
            if self._matches(result):
                yield result

    def _matches(self, r: Result) -> bool:
        return (
            (not self.operators or r.operator in self.operators)
            and (not self.kernels or r.kernel in self.kernels or r.kernel.partition("/")[2] in self.kernels)
            and (not self.chips or r.chip in self.chips)
            and (not self.statuses or r.status.value in self.statuses)
        )

    def check_names(self) -> None:
        """After reading: UsageError for a name that no row has, listing those that rows do have."""
        bare = {kernel.partition("/")[2] for kernel in self.seen["kernel"]}
        for what, named, known in (
            ("operator", self.operators, self.seen["operator"]),
            ("kernel", self.kernels, self.seen["kernel"] | bare),
            ("chip", self.chips, self.seen["chip"]),
        ):
            for name in sorted(set(named) - known):
                there = ", ".join(sorted(self.seen[what])) or "none, the store is empty"
                raise UsageError(f"no result of {what} {name!r}; the store has: {there}")
