"""What a page is asked to be about, and how the choice on it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from klab.harness.choose.decide import decide
from klab.harness.choose.profile import Profile, profile_path, read_profile
from klab.harness.measure.calibration import Calibration
from klab.harness.measure.correction import corrected
from klab.harness.plan.rows import Plan
from klab.harness.report.limits import Limits, limits_of, with_measured
from klab.harness.store.result import Result
from klab.kernels.contract import Chip
from klab.kernels.discover import Catalogue, approximations_of
from klab.kernels.errors import KlabError


@dataclass(frozen=True)
class Request:
    """chips: only these (default: those of the plans, else all that have results). plans: by chip; with one, only its problems are shown.
    catalogue: the kernels as they are now. runs: words that name runs (see `named_runs`), whose rows alone are looked at.
    limits: of a chip and device. calibrations: by device.
    """

    chips: Sequence[str] = ()
    plans: Mapping[str, Plan] = field(default_factory=dict)
    catalogue: Catalogue | None = None
    runs: Sequence[str] = ()
    limits: Callable[[str, str], Limits] = limits_of
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)

    @property
    def shown_chips(self) -> list[str]:
        """The chips that were asked for; empty for all."""
        return list(self.chips or self.plans)

    def known(self, chip: str, device: str) -> Limits:
        """The limits of a chip and device, with what was measured of it."""
        return with_measured(self.limits(chip, device), self.calibrations)

    def keys(self, chip: str) -> set[str] | None:
        """The problems to show for a chip: the plan's and what approximates them in narrower formats; None for all."""
        if chip not in self.plans:
            return None
        problems = self.plans[chip].problems()
        return {p.key for p in problems} | {p.key for wide in problems for p in approximations_of(wide)}

    def chip_limits(self, chip: str) -> Chip | None:
        """The chip for default configurations, where kernels are known."""
        plan = self.plans.get(chip)
        return plan.chip if plan else self.known(chip, "").chip if self.catalogue else None

    def previous(self, chip: str) -> Profile | None:
        """Last time's profile of the plan, where there is one; a file that is something else does not stop a report."""
        plan = self.plans.get(chip)
        if plan is None:
            return None
        try:
            return read_profile(profile_path(plan.chip.name, plan.model.name))
        except KlabError:
            return None

    def profile(self, chip: str, rows: Sequence[Result]) -> Profile:
        """The choice from these rows, those of several devices of a kind corrected."""
        comparable, _ = corrected(rows, self.calibrations)
        return self.decided(chip, comparable)

    def decided(self, chip: str, rows: Sequence[Result]) -> Profile:
        """The choice from rows that are comparable as they are."""
        plan = self.plans.get(chip)
        return decide(rows, plan, chip, catalogue=self.catalogue, previous=self.previous(chip), limits=self.chip_limits(chip))
