"""How `klab screen` shows its candidates to people: a table of at most 160 columns, all else in --json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from klab.harness.cli._setup import Setup
    from klab.harness.plan.trial import Trial
    from klab.harness.tune.screen import Screened

COLUMNS = ("kernel", "problem", "config", "regs", "stack", "smem", "unit", "model us", "verdict")
RIGHT = ("regs", "stack", "smem", "model us")
# Characters; 130 with the columns of numbers, and three more per column for its frame.
_KERNEL, _PROBLEM, _CONFIG, _VERDICT = 20, 28, 30, 30


def rows(found: Sequence[Screened], setup: Setup) -> list[tuple[object, ...]]:
    """One per candidate, in COLUMNS."""
    return [_cells(item, setup) for item in found]


def legend(found: Sequence[Screened]) -> str:
    """What the table's short words stand for."""
    names = dict.fromkeys((short, name) for item in found for name, short in _short(item.trial).items() if short != name)
    fields = ", ".join(f"{short} {name}" for short, name in names)
    return (
        "regs: registers per thread. stack: B per thread. smem: KB of shared memory per block. unit: matrix unit, TMA, warp specialisation "
        "(ws). config: where it differs from its kernel's default"
        f"{f' ({fields})' if fields else ''}. model us: modelled, not measured. --json has every field and reason in full."
    )


def _cells(item: Screened, setup: Setup) -> tuple[object, ...]:
    """The function with the most registers stands for the launch; a merge kernel beside it is small."""
    trial = item.trial
    main = max(item.functions, key=lambda f: f["registers"] * f["threads"], default=None)
    shown: tuple[object, ...] = ("",) * 4
    if main is not None:
        unit = [main["matrix_unit"].replace("none", ""), "tma" * main["tma"], "ws" * main["warp_specialised"]]
        stack = max(f["stack_bytes"] for f in item.functions)
        shown = (main["registers"], stack, f"{main['smem_bytes'] / 1024:.0f}", " ".join(filter(None, unit)))
    expected = "" if item.expected_us is None else f"{item.expected_us:.1f}"
    verdict = ": ".join(filter(None, (item.rule or "kept", item.reason)))
    # The problem's label begins with the operator.
    kernel = trial.kernel.partition("/")[2]
    problem, config = _cut(trial.problem.label(), _PROBLEM), _cut(_config(trial, setup), _CONFIG)
    return (_cut(kernel, _KERNEL), problem, config, *shown, expected, _cut(verdict, _VERDICT))


def _config(trial: Trial, setup: Setup) -> str:
    values, short = trial.config.to_json_full(), _short(trial)
    try:
        usual = setup.catalogue.kernels[trial.kernel].default(trial.problem, setup.chip).to_json_full()
    except Exception:  # noqa: BLE001  whatever a kernel's author did wrong; the row says it
        usual = {}
    changed = [f"{short[name]}={value}" for name, value in values.items() if name not in usual or usual[name] != value]
    return " ".join(changed) or ("default" if values else "-")


def _short(trial: Trial) -> dict[str, str]:
    """Initials of a name's words (block_m: bm); a name of one word, or one whose initials another has too, stays."""
    names = list(trial.config.to_json_full())
    initials = {name: "".join(word[:1] for word in name.split("_")) if "_" in name else name for name in names}
    counted = list(initials.values())
    return {name: short if counted.count(short) == 1 else name for name, short in initials.items()}


def _cut(text: str, most: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."
