"""The strip of a night's page: when, on what, from which commit, and how it ended; and the words of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from klab.harness.report.html import Markup, el, pairs
from klab.harness.watch.series import Call, Night
from klab.harness.watch.wording import commit_of, counts, headline, lapsed_lines, line, outcome

WORDS = (
    ("ok", "Within the limit of its baseline."),
    ("faster, slower", "Beyond the limit, and still so when it was measured again in fresh processes the same night."),
    ("suspect", "Beyond the limit, and not confirmed. It fails no night, unless that is asked for (--strict)."),
    ("unknown", "Not judged: too few nights of this epoch, or too noisy, or not reached within the budget. The reason says which."),
    ("missing", "It was watched and gave no value tonight."),
    ("broken", "It crashed, hung, or computed something wrong."),
    ("waived", "A failing verdict that somebody answers for until a date; it is shown and fails no night. A waiver past its date fails "
     "every night until it is renewed or removed."),
    ("tonight", "The median over fresh processes, as measured."),
    ("against usual", "What was judged, over its baseline, with its 95% interval: above zero is worse. Where the night had an anchor, both "
     "sides are divided by the anchor's time in the same minutes."),
    ("anchor", "A fixed kernel (a library's matmul, a copy of memory) that is measured in the same laps: what slows it down as well is the "
     "machine's doing."),
    ("epoch", "What must be equal for nights to be compared: driver, CUDA, Triton, torch, power limit, GPU. A new one is reported, not "
     "judged."),
    ("change", "Where the level of a series changed, found afterwards from its whole history: a historian's view, which fails no night."),
    ("role", "chosen: the kernel that the profile names. library: the best library kernel. The curve of a role goes on when another kernel "
     "takes it."),
)  # fmt: skip


def strip(night: Night, earlier: Sequence[Night], strict: bool = False) -> Markup:
    """The facts, with a list of what a reader must know before believing the rest."""
    end = outcome(night, strict)
    colours = {"failed": "slower", "passed": "faster"}
    facts: list[tuple[str, object]] = [
        ("Verdict", el("b", end, class_=colours.get(end, "unknown"))),
        ("Series", headline(night)),
        ("Chip", line(night.chip, 60)),
        ("Devices", _devices(night)),
        ("Night", [line(night.at, 40), el("small", line(night.identity, 80))]),
        ("Commit", commit_of(night)),
        ("Took", f"{night.seconds / 60:.0f} min" if night.seconds >= 60 else f"{night.seconds:.0f} s"),
        ("Policy", line(night.policy, 100) or "not recorded"),
        ("Nights before it", len(earlier)),
        ("The last nights", _run([*earlier, night])),
    ]
    notes = [el("li", el("b", told)) for told in lapsed_lines(night)] + [el("li", line(note)) for note in night.notes]
    aside = el("aside", el("h2", "Know before reading"), el("ul", notes), class_="warnings") if notes else None
    return el("header", el("h1", f"klab nightly: {line(night.chip, 60)}"), pairs(facts), aside)


def _devices(night: Night) -> object:
    named = []
    for uuid, known in night.devices.items():
        name = known.get("device") if isinstance(known, Mapping) else None
        named.append(el("span", line(name or "", 60), el("small", line(uuid, 60)), class_="line"))
    return named or "not recorded"


def _run(nights: Sequence[Night], most: int = 30) -> Markup:
    """A box per night: passed, doubtful or failed, oldest first."""
    boxes = []
    for night in nights[-most:]:
        found = counts(night)
        kind = {"failed": Call.SLOWER, "passed": Call.OK}.get(outcome(night), Call.UNKNOWN)
        if kind == Call.OK and (found[Call.SUSPECT] or found["waived"]):
            kind = Call.SUSPECT
        boxes.append(el("span", class_=f"box {kind.value}", title=f"{line(night.at, 40)}: {headline(night)}"))
    return el("span", boxes, class_="run")


def words() -> Markup:
    """Every word that the page uses."""
    return el("section", el("h2", "Words"), pairs(WORDS), id="words")
