"""What the tables of `klab cost` share: words, numbers, and where the time goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from klab.harness.cli._console import out, table, talk

if TYPE_CHECKING:
    from klab.harness.cost.estimate import Origin
    from klab.harness.cost.explain import Missing
    from klab.harness.cost.ranges import Range
    from klab.harness.cost.serving import OperatingPoint
    from klab.harness.cost.single_pass import PassPoint

# Narrower terminals are shown where the time goes without the words on the longest launch, which fill lines.
WIDE = 140
# Launches that were not measured are listed down to this share of the time, and at most so many.
LISTED_SHARE, LISTED = 0.005, 12


def say(text: str, style: str | None = None) -> None:
    """A line on stdout."""
    out.print(text, style=style, markup=False, soft_wrap=True)


def coverage(time_shares: Mapping[Origin, float], energy_shares: Mapping[Origin, float], chip: str) -> str:
    """What the totals rest on, in words."""
    time, energy = ({str(o): s for o, s in shares.items()} for shares in (time_shares, energy_shares))
    return (
        f"coverage: {time['measured']:.0%} of the time and {energy['measured']:.0%} of the energy rest on kernels that klab measured on "
        f"{chip}, {time['reference']:.0%} and {energy['reference']:.0%} on published measurements, the rest is modelled. "
        "Below 90% a total is not called measured."
    )


def show_operators(point: OperatingPoint | PassPoint, unit: str = "request") -> None:
    """Where the time of a unit goes."""
    from klab.harness.cost.explain import spent

    rows = []
    for one in spent(point):
        origins = ", ".join(f"{share:.0%} {origin}" for origin, share in one.origins.items() if share >= 0.005)
        kernels = ", ".join(kernel.partition("/")[2] or kernel for kernel in one.kernels[:2])
        rows.append((one.operator, g(one.seconds.mid * 1e3), f"{one.share:.1%}", g(one.joules.mid), origins, kernels, one.how))
    columns = ("operator", f"ms per {unit}", "of the time", f"J per {unit}", "rests on", "kernels", "the longest launch")
    shown = len(columns) if not out.is_terminal or out.width >= WIDE else len(columns) - 1
    table("Where the time goes", columns[:shown], [row[:shown] for row in rows], right=columns[1:4])


def show_launches(point: OperatingPoint | PassPoint, chip: str) -> list[Missing]:
    """The launches that klab has not measured on the chip; returns them."""
    from klab.harness.cost.explain import missing

    lacking = missing(point)
    if lacking:
        listed = [one for one in lacking if one.share >= LISTED_SHARE][:LISTED] or lacking[:LISTED]
        rows = [(one.label, f"{one.share:.1%}", one.origin, one.how) for one in listed]
        title = f"Not measured by klab on {chip}: {len(lacking)} launches, {sum(one.share for one in lacking):.0%} of the time"
        table(title, ("launch", "of the time", "taken as", "from"), rows, right=("of the time",))
    return lacking


def talk_notes(notes: Sequence[str]) -> None:
    """On stderr."""
    for line in notes:
        talk.print(line, style="yellow", markup=False, soft_wrap=True)


def span(value: Range | None) -> str:
    """`2 (1..3)`."""
    return f"{g(value.mid)} ({g(value.low)}..{g(value.high)})" if value else ""


def g(value: float) -> str:
    """Three digits, or whole thousands."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def seconds(value: float | None) -> str:
    """`1.5 s`, `25 ms`."""
    if value is None:
        return ""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
