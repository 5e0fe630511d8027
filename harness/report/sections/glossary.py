"""The words of the page."""

from __future__ import annotations

from klab.harness.report.html import Markup, el, pairs

WORDS = (
    ("measured", "Timed by klab on the device named, after its output was checked. Figures and tables show these alone, unless said."),
    ("reference", "Published by somebody else (a datasheet, a paper), with its source: the specified limits of a chip are of this kind."),
    ("modelled", "Computed, not timed: the roofline's bound, and the peaks of a CPU."),
    ("screened", "Compiled for the chip without running; says nothing about speed."),
    ("median", "The middle of the rounds' times; each round is the mean of a batch of launches."),
    ("interval", "95% bootstrap interval of the median within its run. It does not cover how one device differs from the next."),
    ("tie", "Candidates whose difference is smaller than its uncertainty. Any of them would do."),
    ("of roofline", "The least time that the problem's flops and bytes need at the chip's specified limits, over the median. Above 100%: a "
     "cache served part of the bytes, or the limit is a low guess."),
    ("speed", "The problem's least flops (or bytes) over the median; work that a kernel does beyond that does not count in its favour."),
    ("against best library", "The best library kernel's time over the chosen one's: above 1, the choice is faster."),
    ("error", "Norm of the difference from the reference over the reference's norm; the worst over all checks."),
    ("energy", "Joules per launch of the whole board, idle power included. Null is not zero: where it is missing the reason is given."),
)  # fmt: skip


def section() -> Markup:
    """Every label that the page uses."""
    return el("section", el("h2", "Words"), pairs(WORDS), id="words")
