"""The acceptance of a machine on one page, for the provider: what was found, what was expected, what was run. It loads nothing."""

from __future__ import annotations

from collections.abc import Sequence

from klab.harness.report.html import Markup, el, pairs, table
from klab.harness.report.shell import document
from klab.harness.watch.accept import Acceptance
from klab.harness.watch.accept_load import Device
from klab.harness.watch.grade import Check, Grade, Outcome, findings, number

_WORDS = {
    Outcome.ACCEPTED: "Every check passed, or says why it is not known.",
    Outcome.WARNINGS: "Nothing refuses this machine; what is warned of should be answered.",
    Outcome.UNDECIDED: "What must be known to accept a machine could not be found out.",
    Outcome.REFUSED: "At least one check failed.",
}
_MARK = {Grade.PASS: "pass", Grade.WARN: "warn", Grade.FAIL: "fail", Grade.UNKNOWN: "unknown"}
# Points of a drawn line: a page of eight devices stays below 200 KB.
_POINTS = 120
_WIDE, _HIGH, _LEFT, _LOW = 380, 120, 44, 16
_HUES = ("#2c5fb3", "#b3541e", "#2e8b57", "#8a4fb3", "#b32c6b", "#6b8e23", "#1f8a9c", "#8b6d2f")


def accept_page(found: Acceptance) -> str:
    """The page as text. Everything shown is escaped: names of devices and drivers are other people's."""
    title = f"Acceptance: {len(found.devices)} x {found.title}, {found.outcome.value}"
    content = [_strip(found), el("main", _findings(found), _devices(found), _charts(found), _everything(found)), _footer(found)]
    return document(title, content, styles=("page.css", "accept.css"), scripted=False)


def _strip(found: Acceptance) -> Markup:
    grade = {Outcome.ACCEPTED: "pass", Outcome.WARNINGS: "warn", Outcome.REFUSED: "fail", Outcome.UNDECIDED: "unknown"}[found.outcome]
    counts = {g: sum(check.grade == g for check in found.checks) for g in Grade}
    where = found.environment
    host = f"{where.get('host', 'not known')}, {where.get('cpu_model', '')}"
    software = ", ".join(f"{name} {where[name]}" for name in ("driver", "cuda", "torch") if where.get(name))
    facts: list[tuple[str, object]] = [
        ("Machine", f"{len(found.devices)} x {found.title}"),
        ("Host", host),
        ("Measured", f"{found.at.replace('T', ' ').replace('+00:00', ' UTC')}, {found.seconds / 60:.1f} minutes"),
        ("Software", software or "not known"),
        ("Expected of", f"{found.reference}: {found.expected_from}"),
        ("Checks", ", ".join(f"{count} {g.value}" for g, count in counts.items())),
    ]
    verdict = el("p", el("span", found.outcome.value, class_=f"verdict {grade}"), " ", _WORDS[found.outcome])
    return el("header", el("h1", f"Acceptance of {len(found.devices)} x {found.title}"), verdict, pairs(facts))


def _findings(found: Acceptance) -> Markup:
    rows = [
        (_grade(one.grade), one.devices, [one.names, el("small", one.topic)], one.value, [one.expected, _small(one.origin)],
         [one.reason, _small(one.remedy)])
        for one in findings(found.checks)
    ]  # fmt: skip
    shown = table(("grade", "device", "check", "found", "expected", "reason and remedy"), rows) if rows else el("p", "Nothing to report.")
    return el("section", el("h2", "Findings"), shown)


def _small(text: str) -> Markup | None:
    return el("small", text) if text else None


def _grade(grade: str) -> Markup:
    return el("span", grade, class_=f"mark {_MARK[Grade(grade)]}")


# Under which title the figures of a device stand: (title, name of the check).
_COLUMNS = (
    ("matmul TFLOP/s", "sustained matmul"), ("copy GB/s", "copy bandwidth"), ("slope", "steadiness"), ("dip", "slowest half minute"),
    ("noise", "noise of the matmul"),
    ("clock MHz", "clock under load"), ("power W", "power under load"), ("GPU C", "temperature"), ("memory C", "memory temperature"),
    ("wrong results", "right results"), ("ECC errors", "uncorrected errors"), ("remapped rows", "remapped rows"),
)  # fmt: skip


def _device_cells(found: Acceptance) -> tuple[list[str], list[list[Check | None]]]:
    """(columns, the checks of each device under them); a column that no device has is left out."""
    known = {(check.device, check.name): check for check in found.checks}
    shown = [(title, name) for title, name in _COLUMNS if any((device.index, name) in known for device in found.devices)]
    return [title for title, _ in shown], [[known.get((device.index, name)) for _, name in shown] for device in found.devices]


def _devices(found: Acceptance) -> Markup:
    """One line per device, with the grade of each figure."""
    columns, rows = _device_cells(found)
    lines: list[list[object]] = []
    for device, checks in zip(found.devices, rows, strict=True):
        bus = str(device.before.get("pci_bus_id") or "")
        dot = el("span", " \u25cf", style=f"color: {_HUES[len(lines) % len(_HUES)]}") if len(found.devices) > 1 else None
        name = [el("b", str(device.index)), dot, el("small", f"{device.id} {bus}".strip())]
        lines.append([name, *(check and el("span", _short(check), class_=_MARK[Grade(check.grade)]) for check in checks)])
    return el("section", el("h2", "Devices"), table(("device", *columns), lines, numbers=columns))


def _short(check: Check | None) -> str:
    """The figure without its unit, or the first word of the value; the grade where there is neither."""
    if check is None:
        return ""
    if check.figure is not None and check.unit:
        return number(check.figure)
    return check.value.split(" ")[0] or check.grade


def _charts(found: Acceptance) -> Markup | None:
    drawn = []
    for name, title, unit in (
        ("tflops", "rate of the matmul", "TFLOP/s"),
        ("temperature_c", "temperature", "C"),
        ("sm_clock_mhz", "clock", "MHz"),
        ("power_w", "power", "W"),
    ):
        lines = [_line(device, name) for device in found.devices]
        if any(lines):
            drawn.append(el("figure", el("figcaption", f"{title} ({unit})"), chart(lines)))
    if not drawn:
        return None
    note = el("p", "The dot of a device in the table has the colour of its line.", class_="note") if len(found.devices) > 1 else None
    return el("section", el("h2", "Under load"), note, el("div", drawn, class_="charts"))


def _line(device: Device, name: str) -> list[tuple[float, float]]:
    points = [(float(line["at"]), float(line[name])) for line in device.trace if line.get(name) is not None]
    stride = -(-len(points) // _POINTS) or 1
    return points[::stride]


def chart(lines: Sequence[Sequence[tuple[float, float]]]) -> Markup:
    """Lines over seconds as SVG, one hue per device, with the least and greatest value at the axis."""
    points = [point for line in lines for point in line]
    top, bottom = max(v for _, v in points), min(v for _, v in points)
    reach = max(top - bottom, 0.02 * abs(top), 1e-9)
    top, bottom, end = top + 0.08 * reach, bottom - 0.08 * reach, max(max(at for at, _ in points), 1e-9)

    def place(at: float, value: float) -> str:
        x = _LEFT + (_WIDE - _LEFT - 6) * at / end
        y = 6 + (_HIGH - _LOW - 6) * (top - value) / (top - bottom)
        return f"{x:.1f},{y:.1f}"

    base = _HIGH - _LOW
    frame = [
        el("line", x1=str(_LEFT), y1=str(base), x2=str(_WIDE - 6), y2=str(base), class_="grid"),
        el("line", x1=str(_LEFT), y1="6", x2=str(_LEFT), y2=str(base), class_="grid"),
        el("text", number(top), x=str(_LEFT - 4), y="13", text_anchor="end"),
        el("text", number(bottom), x=str(_LEFT - 4), y=str(base), text_anchor="end"),
        el("text", f"{end:.0f} s", x=str(_WIDE - 6), y=str(_HIGH - 4), text_anchor="end"),
    ]
    drawn = [
        el("polyline", points=" ".join(place(at, v) for at, v in line), stroke=_HUES[i % len(_HUES)])
        for i, line in enumerate(lines)
        if line
    ]
    return el("svg", frame, drawn, viewBox=f"0 0 {_WIDE} {_HIGH}", role="img")


def _everything(found: Acceptance) -> Markup:
    rows = [
        (_grade(check.grade), "machine" if check.device < 0 else str(check.device), check.topic, check.name, check.value,
         [check.expected, _small(check.origin)], check.reason)
        for check in found.checks
    ]  # fmt: skip
    columns = ("grade", "device", "topic", "check", "found", "expected", "reason")
    return el("details", el("summary", f"All {len(rows)} checks"), table(columns, rows), class_="all")


def _footer(found: Acceptance) -> Markup:
    states = " ".join(f"{what}." for what in found.ran)
    commit = found.environment.get("commit")
    return el(
        "footer",
        el("p", f"What was run: {states} Data: random normal numbers; the first product compared with float64. No setting was changed.",
           class_="note"),
        el("p", "What it cannot show: faults that need hours or days, the network between machines, and collectives of several GPUs. "
           "Devices are named by a hash of their UUID and by their PCI address; serial numbers are not read.", class_="note"),
        [el("p", note, class_="note") for note in found.notes],
        el("p", f"Made by klab{f' at {str(commit)[:12]}' if commit else ''}. The raw readings are in the JSON beside this page.",
           class_="note"),
    )  # fmt: skip


FINDINGS = ("grade", "device", "check", "found", "expected", "reason", "remedy")


def finding_rows(found: Acceptance) -> list[tuple[str, ...]]:
    """What did not pass, for a terminal: cells of FINDINGS."""
    return [(one.grade, one.devices, one.names, one.value, one.expected, one.reason, one.remedy) for one in findings(found.checks)]


def device_rows(found: Acceptance) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(columns, rows) with the figures of each device, for a terminal."""
    columns, rows = _device_cells(found)
    return ("device", *columns), [
        (f"{device.index} {device.id}", *(_short(check) for check in checks)) for device, checks in zip(found.devices, rows, strict=True)
    ]
