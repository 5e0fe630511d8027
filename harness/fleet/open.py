"""Which engine runs the trials: the devices of this machine, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from klab.harness.fleet.local import Fleet
from klab.harness.fleet.run import AnyFleet
from klab.harness.measure.limits import Limits
from klab.kernels.contract import Chip
from klab.kernels.errors import UsageError

__all__ = ["AnyFleet", "Engine", "open_fleet"]

KINDS = ("local", "ray")


@dataclass(frozen=True)
class Engine:
    """As the options name it. UsageError for an unknown kind, and for an address where there is nothing to connect to."""

    kind: str = "local"
    address: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"--fleet {self.kind}: klab has {' and '.join(KINDS)}")
        if self.address is not None and self.kind != "ray":
            raise UsageError("--address is of a Ray cluster: add --fleet ray")

    @property
    def is_local(self) -> bool:
        """Do the devices of this machine measure?"""
        return self.kind == "local"

    def chips(self, names: str) -> list[str]:
        """`h200,b200` -> their names, each once. "auto" is this machine's chip, or with a cluster all that it has.

        UsageError for none, or for several where one machine measures; CannotMeasure without the cluster.
        """
        found = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
        if not found:
            raise UsageError("--chip: name one")
        if self.is_local:
            if len(found) > 1:
                raise UsageError(f"--chip {names}: several chips in one run need a cluster (--fleet ray); name one")
            return found
        if found == ["auto"]:
            from klab.harness.fleet.cluster import Cluster, chips_there

            return chips_there(Cluster(self.address).nodes())
        if "auto" in found:
            raise UsageError(f"--chip {names}: auto stands alone")
        return found


def open_fleet(
    kind: str,
    chips: Sequence[Chip],
    run_id: str,
    *,
    address: str | None = None,
    kernel_dirs: Sequence[Path | str] = (),
    limits: Limits | None = None,
    only_devices: Sequence[str] | None = None,
) -> AnyFleet:
    """A fleet for trials of these chips. "local" takes one chip: a machine measures one after the other.

    UsageError for an unknown kind; CannotMeasure, before anything starts, where a chip is missing.
    """
    engine = Engine(kind, address)
    if not chips:
        raise UsageError("a fleet is of one chip at least")
    if not engine.is_local:
        from klab.harness.fleet.ray_fleet import RayFleet

        return RayFleet(chips, run_id, address=address, kernel_dirs=kernel_dirs, limits=limits, only_devices=only_devices)
    if len(chips) > 1:
        raise UsageError(f"{' and '.join(chip.name for chip in chips)} in one run need a cluster (--fleet ray): name one chip")
    return Fleet(chips[0], run_id, kernel_dirs=kernel_dirs, limits=limits, only_devices=only_devices)
