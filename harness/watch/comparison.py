"""What a comparison found, and how it is told: JSON, lines of a table, Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from klab.harness.watch.compare_rule import MARGIN, Answer, Found, overall
from klab.harness.watch.wording import line
from klab.kernels.contract import Json, canonical_json

# What must be seen first stands first.
ORDER = (Answer.BROKEN, Answer.SLOWER, Answer.CANNOT_TELL, Answer.FASTER, Answer.SAME, Answer.NOT_COMPARED)


@dataclass(frozen=True)
class Line:
    """One compared pair. `a` and `b` say what ran: {"kernel", "config", "source_digest"}."""

    name: str
    found: Found
    a: Mapping[str, Json] = field(default_factory=dict)
    b: Mapping[str, Json] = field(default_factory=dict)

    @property
    def differs(self) -> str:
        """In what the sides' kernels differ: "source", "config", "source and config", "kernel"; "nothing": only what is around them."""
        if self.a.get("kernel") != self.b.get("kernel"):
            return "kernel"
        source = ["source"] if self.a.get("source_digest") != self.b.get("source_digest") else []
        config = ["config"] if canonical_json(self.a.get("config")) != canonical_json(self.b.get("config")) else []
        return " and ".join(source + config) or "nothing"


@dataclass(frozen=True)
class Comparison:
    """`lines` per pair, worst first; `mean` is the geometric mean over them; `alone`: (what only one side has, why it was not compared)."""

    answer: Answer
    why: str
    lines: Sequence[Line]
    mean: Found
    margin: float = MARGIN
    alone: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    passes: int = 0
    stopped: str = ""
    metric: str = "time"

    @classmethod
    def of(cls, lines: Iterable[Line], mean: Found, **more: Json) -> Comparison:
        """With the overall answer."""
        ordered = sorted(lines, key=lambda one: (ORDER.index(one.found.answer), -(one.found.ratio or 0.0), one.name))
        answer, why = overall([one.found for one in ordered], mean)
        return cls(answer, why, ordered, mean, **more)

    def exit_code(self, strict: bool = False) -> int:
        """0 same or faster, 1 slower or broken, 4 nothing could be compared; with `strict` 3 where anything cannot be told."""
        if self.answer.fails:
            return 1
        if self.answer is Answer.NOT_COMPARED:
            return 4
        doubt = Answer.CANNOT_TELL in (self.answer, *(one.found.answer for one in self.lines))
        return 3 if strict and doubt else 0

    def headline(self) -> str:
        """`B is slower: 1 of 12 are slower; geometric mean of time B/A 1.004 (0.999..1.009)`."""
        said = {
            Answer.SAME: "B is the same as A",
            Answer.CANNOT_TELL: "B cannot be told from A",
            Answer.NOT_COMPARED: "B was not compared with A",
        }.get(self.answer, f"B is {self.answer.value}")
        mean = f"; geometric mean of {self.metric} B/A {shown(self.mean)}" if self.mean.ratio is not None else ""
        return f"{said}: {self.why}{mean}{f'; {len(self.alone)} not compared' if self.alone else ''}"

    def to_json(self) -> Iterator[dict[str, Json]]:
        """One object per pair, then one for all."""
        for one in self.lines:
            yield {"type": "pair", "name": one.name, **_json(one.found), "differs": one.differs, "a": dict(one.a), "b": dict(one.b)}
        for name, why in self.alone:
            yield {"type": "alone", "name": name, "reason": why}
        more = {"reason": self.why, "metric": self.metric, "margin": self.margin, "pairs": len(self.lines), "passes": self.passes}
        more |= {"stopped": self.stopped, "notes": list(self.notes)}
        yield {"type": "overall", **_json(self.mean), **more, "answer": self.answer.value}

    def markdown(self, a: str, b: str) -> str:
        """For a job summary or a comment: the headline, the table, the notes. Cells of others' text can do no harm."""
        rows = [f"**{_cell(self.headline())}**", "", f"A: {_cell(a)}  ", f"B: {_cell(b)}", ""]
        if self.lines:
            rows += [f"| problem and kernel | {self.metric} B/A | interval | in cycles | runs | answer |", "|---|--:|---|--:|--:|---|"]
        for one in self.lines:
            ratio, interval, cycles = figures(one.found)
            said = f"{one.found.answer.value}{f': {one.found.reason}' if one.found.reason else ''}"
            rows.append(f"| {_cell(one.name)} | {ratio} | {interval} | {cycles} | {one.found.replicates} | {_cell(said)} |")
        rows += ["", *(f"- {_cell(f'{name}: {why}')}" for name, why in self.alone), *(f"- {_cell(note)}" for note in self.notes)]
        return "\n".join(rows) + "\n"


def figures(found: Found) -> tuple[str, str, str]:
    """(ratio, interval, ratio in cycles) as text, each empty where there is none."""
    if found.ratio is None:
        return "", "", ""
    interval = "" if found.low is None or found.high is None or not math.isfinite(found.high) else f"{found.low:.4f}..{found.high:.4f}"
    return f"{found.ratio:.4f}", interval, "" if found.cycles is None else f"{found.cycles:.4f}"


def shown(found: Found) -> str:
    """`1.0300 (1.0251..1.0349)`."""
    ratio, interval, _ = figures(found)
    return f"{ratio} ({interval})" if interval else ratio


def _json(found: Found) -> dict[str, Json]:
    finite = {
        name: value if value is None or math.isfinite(value) else None
        for name, value in vars(found).items()
        if isinstance(value, float | None)
    }
    return {**vars(found), **finite, "answer": found.answer.value}


def _cell(text: str) -> str:
    """One line that Markdown and HTML take as it is."""
    escaped = line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{c}" if c in "\\|`*_[]#" else c for c in escaped)
