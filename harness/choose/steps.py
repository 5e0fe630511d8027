"""What the choices add up to, step by step: count x median."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from klab.harness.choose.profile import Choice, Open, StepTime, Use


def steps_of(choices: Sequence[Choice], unsolved: Iterable[Open]) -> tuple[StepTime, ...]:
    """The time of each step that the choices occur in, prefill first, then by batch."""
    chosen_us: dict[tuple[str, int], float] = defaultdict(float)
    library_us: dict[tuple[str, int], float] = defaultdict(float)
    no_library: set[tuple[str, int]] = set()
    for choice in choices:
        library = choice.evidence.median_us if choice.library else choice.evidence.library and choice.evidence.library.median_us
        for use in choice.wanted.uses:
            step = (use.phase, use.batch)
            chosen_us[step] += use.count * choice.evidence.median_us
            library_us[step] += use.count * (library or 0.0)
            if library is None:
                no_library.add(step)
    missing = Counter((phase, batch) for one in unsolved for phase, batch in {(use.phase, use.batch) for use in one.wanted.uses})
    order = sorted(chosen_us.keys() | missing.keys(), key=lambda step: (step[0] == "decode", step))
    return tuple(
        StepTime(*step, chosen_us[step], None if step in no_library or missing[step] else library_us[step], missing[step]) for step in order
    )


def with_shares(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """The choices with each use's share of its step filled in."""
    total = {(step.phase, step.batch): step.us for step in steps_of(choices, ())}

    def filled(choice: Choice) -> Choice:
        def share(use: Use) -> Use:
            whole = total[(use.phase, use.batch)]
            return dataclasses.replace(use, share=use.count * choice.evidence.median_us / whole if whole else None)

        uses = tuple(share(use) for use in choice.wanted.uses)
        return dataclasses.replace(choice, wanted=dataclasses.replace(choice.wanted, uses=uses))

    return tuple(filled(choice) for choice in choices)
