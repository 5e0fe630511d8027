"""The three sentences that a manager needs: what won, what it means, and what changed with what to do next. Each says what the data say."""

from __future__ import annotations

from dataclasses import dataclass

from klab.harness.choose.profile import StepTime
from klab.harness.report.gain import Gain, Span, gain_of, headroom_of, step_gain, step_time
from klab.harness.report.sections.changes import changes_of, news
from klab.harness.report.subject import Story, Subject
from klab.harness.report.units import interval, percent, plain_ratio, time, times
from klab.harness.watch.wording import failing, headline, joined, line, name_of, outcome, plural

# More chips than these have their line in the tables alone.
MOST_CHIPS = 3
LONGEST_NAME = 80
FLOOR_SHARE = 0.995


@dataclass(frozen=True)
class Sentence:
    """`topic` is what is asked, `lines` the answer, chip by chip."""

    topic: str
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        """All of it."""
        return " ".join(self.lines)


def sentences(story: Story) -> tuple[Sentence, Sentence, Sentence]:
    """What won and by how much; what it means; what changed and what to do next. Pure: from the story alone."""
    chips = sorted(story.subjects, key=lambda subject: (subject.recorded, -len(subject.profile.choices), subject.chip))
    more = (f"{len(chips) - MOST_CHIPS} more chips are in the tables below.",) if len(chips) > MOST_CHIPS else ()
    first: tuple[str, ...] = ("Nothing yet: there are no results.",)
    second: tuple[str, ...] = ("Nothing can be said without results.",)
    third: tuple[str, ...] = (FIRST_RUN,)
    if chips:
        shown = chips[:MOST_CHIPS]
        no_plan = any(subject.profile.choices and not subject.profile.steps for subject in shown)
        first = (*(won(subject) for subject in shown), *more)
        second = (*(meaning(story, subject) for subject in shown), *((NO_PLAN,) if no_plan else ()))
        third = tuple(change(story, subject) for subject in shown)
    return Sentence("What won", first), Sentence("What it means", second), Sentence("What changed, and what next", third)


NO_PLAN = "What a step of a model takes needs its plan: `klab report --model NAME`."
FIRST_RUN = "Next: `klab run --model qwen3-0.6b --chip auto` makes first results."


def _chip(subject: Subject) -> str:
    return name(subject.chip) + (" (recorded elsewhere)" if subject.recorded else "")


def won(subject: Subject) -> str:
    """By how much the choices of a chip beat the best library."""
    chip, profile = _chip(subject), subject.profile
    if not profile.choices:
        return f"On {chip} {_nothing(subject)}"
    gain, count = gain_of(subject), len(profile.choices)
    if gain.ratio is None:
        return f"On {chip} {plural(count, 'problem')} {_have(count)} a choice, and no library has a valid time to compare with."
    if not gain.won + gain.tied + gain.lost:
        if gain.alone:
            apart = f"{gain.unopposed} {_have(gain.unopposed)} libraries alone, {gain.alone} own kernels alone"
            return f"On {chip} no problem has valid times of both a library and an own kernel: {apart}."
        which = "the only problem" if gain.problems == 1 else f"all {gain.problems} problems"
        return f"On {chip} libraries alone have valid times: they are the choice for {which}."
    ends = f"own kernels win {gain.won}, tie {gain.tied} and lose {gain.lost}{_rest(gain)}"
    if gain.problems == 1:
        return f"On {chip} the choice for the only comparable problem is {_times(gain.ratio)} as fast as the best library: {ends}."
    mean = f"geometric mean over {gain.problems} problems, 1 where a library is the choice"
    return f"On {chip} the chosen kernels are {_times(gain.ratio)} as fast as the best library ({mean}): {ends}."


def _rest(gain: Gain) -> str:
    parts = [
        f"{gain.unopposed} {_have(gain.unopposed)} no own kernel with a valid time" if gain.unopposed else "",
        f"{gain.alone} more {_have(gain.alone)} no library to compare with" if gain.alone else "",
    ]
    said = " and ".join(filter(None, parts))
    return f"; {said}" if said else ""


def _nothing(subject: Subject) -> str:
    """Why nothing has won."""
    asked = len(subject.profile.open)
    trials = len(subject.rows) + len(subject.light)
    if subject.reference and not trials:
        return f"there are only published figures ({len(subject.reference)}), no measurement of one's own, so nothing has won."
    if trials:
        failures = f" ({plural(len(subject.failed), 'failure')} below)" if subject.failed else ""
        return f"nothing has won: none of {plural(asked, 'problem')} has a valid result{failures}."
    of = f" of {plural(asked, 'problem')}" if asked else ""
    return f"nothing has won: nothing was measured{of}."


def meaning(story: Story, subject: Subject) -> str:
    """What the choices mean for the model's steps, or how near they are to the chip's limits."""
    chip, steps = _chip(subject), subject.profile.steps
    if not subject.profile.choices:
        return f"For {chip} nothing can be said without a valid time."
    if not steps:
        return _limits(subject, None)
    shown = _shown(steps)
    told = " ".join(_step(story, subject, step) for step in shown)
    return f"{told} {_limits(subject, max(shown, key=lambda step: step.us))}"


def _shown(steps: tuple[StepTime, ...]) -> list[StepTime]:
    """The first step that is no decode, and the decode step at the largest batch."""
    first = [step for step in steps if step.phase != "decode"][:1]
    decode = [step for step in steps if step.phase == "decode"]
    return [*first, *([max(decode, key=lambda step: step.batch)] if decode else [])]


def _step(story: Story, subject: Subject, step: StepTime) -> str:
    model = f" of {name(story.model)}" if story.model else ""
    which = f"a {step.phase} step{model} at batch {step.batch} on {_chip(subject)}"
    taken = step_time(subject, step)
    if taken is None:
        return f"What {which} takes is not known: none of its {plural(step.open, 'problem')} has a choice."
    covered = step.modelled_share
    of = f", {percent(covered)} of the step by its roofline" if covered is not None and covered < FLOOR_SHARE else ""
    if step.open:
        return f"What {which} takes is not known: {plural(step.open, 'problem')} of it {_have(step.open)} no choice yet."
    which = which[0].upper() + which[1:]
    figure = f"{which} takes {time(taken[0])} of kernel time ({interval(taken[1], taken[2])}{of})"
    ratio = step_gain(subject, step)
    if ratio is None:
        return f"{figure}; not every problem of it has a library to compare with."
    return f"{figure}, {_times(ratio)} as fast as with libraries alone."


def _limits(subject: Subject, step: StepTime | None) -> str:
    chip = _chip(subject)
    found = headroom_of(subject, step)
    if found is None:
        reason = subject.limits.reason or "the chip's limits are not known"
        return f"How near the kernels on {chip} are to its limits is not known: {line(reason)}."
    share, low, high = found.share
    figure = f"{_share(share)} ({_share(low)} to {_share(high)}) of the roofline"
    if step:
        part = f"What has a choice of the {step.phase} step" if step.open else f"The {step.phase} step"
        reach = f"{part} on {chip} reaches {figure}"
    elif found.problems == 1:
        reach = f"On {chip} the choice for the only problem reaches {figure}"
    else:
        reach = f"On {chip} the chosen kernels reach {figure} over {found.problems} problems, each counted once"
    if share > 1:
        return f"{reach}, by specified limits: above 100%, so a cache serves part of the bytes or a limit is a low guess."
    above = f"{time(found.left_us)} above its least time{' per step' if step else ''}, at {_share(found.left_share)}"
    left = f"; most is left in {name(found.left.wanted.label)} ({above})" if found.left_us > 0 and found.problems > 1 else ""
    return f"{reach}{', weighted by time' if found.problems > 1 else ''}{left}."


def change(story: Story, subject: Subject) -> str:
    """What the newest night or run changed, or how sure the choices are; then the first thing to do."""
    chip = _chip(subject)
    nights, changed = story.nights.get(subject.chip, ()), news(story, subject)
    parts = []
    if nights:
        parts.append(f"The night of {line(nights[-1].at, 40)[:10]} on {chip} {outcome(nights[-1])}: {headline(nights[-1])}.")
    if changed:
        parts.append(f"Since the newest run on {chip}, {changed}.")
    if not parts:
        parts.append(_sure(subject))
    return f"{' '.join(parts)} Next: {_next(story, subject)}."


def _sure(subject: Subject) -> str:
    chip, choices = _chip(subject), subject.profile.choices
    if not choices:
        return f"On {chip} there is nothing to compare with yet."
    rivalled = [choice for choice in choices if choice.evidence.runner_up is not None]
    clear = sum(not choice.evidence.tied_count for choice in rivalled)
    if not rivalled:
        return f"On {chip} there is nothing to compare with yet, and no choice has a rival."
    count, clear_of = len(rivalled), f"{'is' if clear == 1 else 'are'} clear of it by 95% intervals"
    sure = f"{clear} of {count} choices with a rival {clear_of}, {'the other is a tie' if count - clear == 1 else 'the others are ties'}"
    if clear == count:
        sure = f"all {plural(clear, 'choice')} with a rival {clear_of}" if clear > 1 else f"the only choice with a rival {clear_of}"
    elif not clear:
        sure = (
            f"none of {count} choices with a rival is clear of it by 95% intervals"
            if count > 1
            else "the only choice with a rival is a tie"
        )
    return f"On {chip} there is no earlier run or night to compare with; {sure}."


def _next(story: Story, subject: Subject) -> str:
    """The first of these that applies: what fails the night, what fails newly, what is stale or open, what has most time to gain."""
    profile, nights = subject.profile, story.nights.get(subject.chip, ())
    if nights and (bad := failing(nights[-1])):
        return f"look at {joined([name_of(one.series) for one in bad], 1)}, which failed the night"
    newly = [one for one in changes_of(story, subject) or () if one.kind in ("fails", "lost", "slower")]
    if newly:
        one = newly[0]
        what = f"{one.kernel} ({one.status})" if one.kind == "fails" else f"{one.problem}, which {_verb(one.kind)}"
        return f"look at {name(what)}"
    stale = sum(choice.stale for choice in profile.choices)
    if stale:
        return f"measure again, because {plural(stale, 'choice')} rest{'s' if stale == 1 else ''} on code that has changed since"
    if profile.open:
        one_more = "the problem" if len(profile.open) == 1 else f"the {len(profile.open)} problems"
        return f"measure {one_more} without a choice"
    found = headroom_of(subject)
    if found is not None and found.left_us > 0:
        return f"tune {name(found.left.wanted.label)}, where one launch has {time(found.left_us)} to gain"
    return "run again into the same store, so that the next page can say what changed"


def _verb(kind: str) -> str:
    return "lost its choice" if kind == "lost" else "became slower"


def _share(share: float) -> str:
    return f"{100 * share:.1f}%" if share >= 0.001 else "less than 0.1%"


def _times(span: Span) -> str:
    return f"{times(span[0])} ({plain_ratio(span[1])} to {plain_ratio(span[2])})" if span[1] != span[2] else times(span[0])


def _have(count: int) -> str:
    return "has" if count == 1 else "have"


def name(text: str) -> str:
    """A name of others in one line that leaves room for the sentence."""
    return line(text, LONGEST_NAME)
