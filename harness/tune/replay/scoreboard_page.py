"""The scoreboard as Markdown: the table, the default against the best of the others, where it loses, and how all this was made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from klab.harness.tune import strategy
from klab.harness.tune.replay.contestants import KLAB
from klab.harness.tune.replay.scoreboard import Scoreboard, default_of
from klab.harness.tune.replay.standings import WITHIN, Duel, Interval, Loss, Standing, duels, losses
from klab.kernels.contract import Json

_READING = """\
How to read it:

- The columns headed by a number of evaluations: geometric mean over spaces of the mean over runs of best found / optimum after so many
  distinct candidates; `p90` the same of the 90th percentile over runs. Found is what the search would hand out then, judged by its recorded
  full time; a run with nothing valid yet counts as having the slowest valid candidate.
- `s to 5%`: simulated GPU seconds (recorded compiling and benchmarking, failed candidates too) until within 5% of the optimum: restricted
  mean per space, in which a run that has not arrived when random search would have used up its budget counts as arriving there; geometric
  mean over spaces. `reached`: the share of runs that did arrive by then.
- `score`: 0 is random search, 1 the optimum at once; mean over spaces, with the 95% bootstrap interval over runs
  (harness/tune/replay/score.py says how it differs from the score of Willemsen et al.).
- `made`: mean number of distinct candidates evaluated, of {budget}. A strategy that stops earlier keeps its last best.
- A strategy is told its whole budget; what it has after fewer evaluations is read off the same run. Those that plan by the budget
  (Kernel Tuner's simulated annealing and hybrid_vndx) might do better at 20 or 50 when told 20 or 50.
- The others propose points outside the space and points they know already; neither costs them an evaluation or a second, which is
  generous to them. Their own computing time is not charged, nor is klab's.
- A strategy that evaluated nothing at all on a space could not run there: that space is left out of its figures, it is no rival there,
  and it stands below those that ran everywhere. Against the default it counts on the spaces that it did run on.
- The best other is chosen after the fact, per budget, from the same runs: the best of many is partly the luckiest, which works against
  klab; the second interval lets every resample choose again. klab's default was chosen among klab's own strategies on spaces like these,
  which works for klab: spaces that nobody looked at are the fair test."""


def markdown(board: Scoreboard, *, command: str, licences: Sequence[str] = ()) -> str:
    """The whole page. licences: what is known of the spaces' source and licence."""
    found = board.standings()
    parts = [
        "# Scoreboard of search strategies",
        "Made by `klab simulate --scoreboard`; not edited by hand. Lower is better in every column but `score` and `reached`.",
        _table(found, board),
        _READING.format(budget=board.store.evaluations),
        "\n".join(verdict(board, found)),
        _spaces(board, found),
        _made(board, found, command, licences),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def verdict(board: Scoreboard, found: Sequence[Standing]) -> list[str]:
    """The default strategy against the best of the others, as lines of Markdown: a table of duels, and where it loses."""
    one = default_of(found)
    rivals = [s for s in found if s.origin != KLAB]
    if one is None:
        return [f"klab's default strategy ({strategy.DEFAULT}) did not take part, so there is no comparison with the others."]
    if not rivals:
        return ["No other tuner's strategy took part, so there is no comparison with others."]
    fought = duels(one, rivals)
    if not fought:
        return ["No other tuner's strategy could run on a space on which klab's default ran, so there is no comparison with others."]
    return [
        f"## klab's default, `{one.name}`, against the best of {sum(bool(s.ran) for s in rivals)} strategies of others",
        "",
        "| evaluations | best other | ratio of geometric means | 95% interval | interval against whichever is best in each resample |",
        "|---:|---|---:|---|---|",
        *(
            f"| {d.mark} | {d.other}{_of_spaces(d, one)} | {d.ratio.value:.4f} | {_span(d.ratio)} | {_span(d.against_any)} |"
            for d in fought
        ),
        "",
        _sentence(one, fought),
        "",
        *_where(board, losses(one, rivals), len(one.marks)),
    ]


def comparison(board: Scoreboard, found: Sequence[Standing]) -> list[dict[str, Json]]:
    """The same as rows: type "duel" per mark, type "loss" per space and mark where another strategy is ahead. Empty without a rival."""
    one = default_of(found)
    rivals = [s for s in found if s.origin != KLAB]
    if one is None or not rivals:
        return []
    rows: list[dict[str, Json]] = []
    for d in duels(one, rivals):
        intervals = {"ratio": _numbers(d.ratio), "ratio_against_any": _numbers(d.against_any)}
        rows.append({"type": "duel", "strategy": one.name, "other": d.other, "evaluations": d.mark, "spaces": d.spaces, **intervals})
    for x in losses(one, rivals):
        space = board.spaces[x.space].name
        row = {"strategy": one.name, "other": x.other, "space": space, "evaluations": x.mark, "ratio": _numbers(x.ratio)}
        rows.append({"type": "loss", **row})
    return rows


def _sentence(one: Standing, fought: Sequence[Duel]) -> str:
    won = [d.mark for d in fought if d.ratio.high < 1]
    lost = [d.mark for d in fought if d.ratio.low > 1]
    level = [d.mark for d in fought if not d.ratio.excludes_one]
    said = []
    if won:
        said.append(f"ahead of the best other, with an interval that excludes equality, at {_list(won)} evaluations")
    if level:
        towards = ", ".join(f"{d.ratio.value:.4f} at {d.mark}" for d in fought if d.mark in level)
        said.append(f"not told apart from it at {_list(level)} ({towards})")
    if lost:
        said.append(f"behind it at {_list(lost)}")
    return f"Over all spaces `{one.name}` is {'; '.join(said)}."


def _of_spaces(duel: Duel, one: Standing) -> str:
    return "" if duel.spaces == len(one.groups) else f" (on {duel.spaces} of {len(one.groups)} spaces)"


def _where(board: Scoreboard, lost: Sequence[Loss], marks: int) -> Iterator[str]:
    clear = [x for x in lost if x.ratio.excludes_one]
    pairs = len(board.spaces) * marks
    if not lost:
        yield f"On no single space and budget ({pairs} pairs) has any other strategy a lower mean."
        return
    yield (
        f"Where it loses: of {pairs} pairs of a space and a budget, some other strategy has a lower mean on {len(lost)}, "
        f"on {len(clear)} of them with a 95% interval that excludes equality."
    )
    if clear:
        yield ""
        yield from (f"- {_loss(board, x)}" for x in clear)
    unclear = [x for x in lost if not x.ratio.excludes_one]
    if unclear:
        yield ""
        yield "Not told apart from equality: " + "; ".join(_loss(board, x) for x in unclear) + "."


def _loss(board: Scoreboard, x: Loss) -> str:
    return f"{board.spaces[x.space].name} at {x.mark}: {x.ratio.value:.3f} times {x.other} {_span(x.ratio)}"


def columns(board: Scoreboard) -> list[str]:
    """Heads of the table."""
    within = [f"{head} {share:.0%}" for share in WITHIN for head in ("s to", "reached")]
    return ["strategy", "from", "runs", "made", *(str(m) for m in board.marks), *(f"p90 {m}" for m in board.marks), *within, "score"]


def cells(standing: Standing) -> list[str]:
    """One row of the table."""
    reaches = [standing.reach(share) for share in WITHIN]
    name = standing.name + (" (default)" if standing.origin == KLAB and standing.name == strategy.DEFAULT else "")
    if not standing.ran:
        # The first figure's place has the reason; the rest is empty.
        rest = 2 * len(standing.marks) + 2 * len(WITHIN)
        return [name, standing.origin, str(standing.repeats), f"could not run: {_reasons(standing)}", *[""] * rest, ""]
    if standing.could_not_run:
        name += f" (could not run on {len(standing.could_not_run)} of {len(standing.groups)} spaces)"
    return [
        name,
        standing.origin,
        str(standing.repeats),
        f"{standing.evaluations:.0f}",
        *(f"{v:.4f}" for v in standing.mean),
        *(f"{v:.4f}" for v in standing.percentile90),
        *(cell for r in reaches for cell in (f"{r.restricted_mean_s:.0f}", f"{r.reached:.0%}")),
        f"{standing.score.value:.3f} {_span(standing.score)}",
    ]


def _reasons(standing: Standing) -> str:
    """Without what would break a cell of a table."""
    return "; ".join(dict.fromkeys(standing.could_not_run.values())).replace("|", "/").replace("\n", " ")


def _table(found: Sequence[Standing], board: Scoreboard) -> str:
    heads = columns(board)
    lines = ["| " + " | ".join(heads) + " |", "|" + "|".join("---" if h in ("strategy", "from") else "---:" for h in heads) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cells(s)) + " |" for s in found)])


def _spaces(board: Scoreboard, found: Sequence[Standing]) -> str:
    one = default_of(found)
    rivals = [s for s in found if s.origin != KLAB]
    lines = [
        "## The spaces one by one",
        "",
        "| space | device | candidates | failed | within 5% | optimum ms | budget s | score window | klab default | best other |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    for i, (space, yard) in enumerate(zip(board.spaces, board.yardsticks, strict=True)):
        near = int((space.time_us <= 1.05 * yard.optimum_us).sum())
        bad = len(space.space) - int((space.time_us < float("inf")).sum())
        mine = " ".join(f"{v:.3f}" for v in one.ratios[i].mean(axis=0)) if one else ""
        here = [r for r in rivals if i in r.ran]
        best = " ".join(f"{min(r.ratios[i].mean(axis=0)[m] for r in here):.3f}" for m in range(len(board.marks))) if here else ""
        limit_s = (one or found[0]).groups[i].limit_s if found else float("nan")
        lines.append(
            f"| {space.name} | {space.device} | {len(space.space)} | {bad} | {near} | {yard.optimum_us / 1e3:.4g} | {limit_s:.0f} "
            f"| {yard.window_evaluations} ({yard.window_s:.0f} s) | {mine} | {best} |"
        )
    marks = ", ".join(map(str, board.marks))
    return "\n".join([*lines, "", f"The last two columns: mean best / optimum after {marks} evaluations; the best other of each budget."])


def _made(board: Scoreboard, found: Sequence[Standing], command: str, licences: Sequence[str]) -> str:
    origins = dict.fromkeys(s.origin for s in found if s.origin != KLAB)
    fewer = ", ".join(f"`{s.name}` {s.repeats}" for s in found if s.repeats < board.repeats)
    lines = [
        "## How it was made",
        "",
        f"- Command: `{command}`",
        f"- {board.repeats} repeats (seeds 0 to {board.repeats - 1}, the same for all), {board.store.evaluations} evaluations each.",
        f"- Others: {', '.join(origins) or 'none'}; each strategy with its own default options.",
        *(f"- Not here: {name}: {why}." for name, why in board.absent.items()),
        *([f"- Fewer runs than that on some space: {fewer}."] if fewer else []),
        *(f"- `{s.name}` on {space} could not run: {why}." for s in found for space, why in s.could_not_run.items()),
        *(f"- `{s.name}`: {n} runs {why}." for s in found for why, n in s.failures.items()),
        *(f"- {text}" for text in licences),
        *(f"- Space {space.name}: digest {space.digest}, kernel {space.kernel}." for space in board.spaces),
        *(f"- klab's `{c.name}`: source digest {c.digest}." for c in board.contestants if c.origin == KLAB),
    ]
    return "\n".join(lines)


def _span(interval: Interval) -> str:
    return f"[{interval.low:.3f}, {interval.high:.3f}]"


def _numbers(interval: Interval) -> list[float]:
    """Value, low, high."""
    return [interval.value, interval.low, interval.high]


def _list(marks: Sequence[int]) -> str:
    return ", ".join(map(str, marks[:-1])) + (" and " if len(marks) > 1 else "") + str(marks[-1])
