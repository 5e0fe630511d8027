"""The words of the page."""

from __future__ import annotations

from klab.harness.report.html import Markup, el, pairs

WORDS = (
    ("measured", "Timed by klab on the device named, after its output was checked. Figures and tables show these alone, unless said."),
    ("reference", "Published by somebody else (a datasheet, a paper), with its source: the specified limits of a chip are of this kind."),
    ("modelled", "Computed, not timed: the roofline's bound, and the peaks of a CPU."),
    ("screened", "Compiled for the chip without running; says nothing about speed."),
    ("median", "The middle of the rounds' times; each round is the mean of a batch of launches."),
    ("interval", "95% interval of the median within its run, by order statistics. It does not cover how one device differs from the next."),
    ("tie", "Candidates whose difference is smaller than its uncertainty. Any of them would do."),
    ("of roofline", "The least time that the problem's flops and bytes need at the chip's specified limits, over the median. Above 100%: a "
     "cache served part of the bytes, or the limit is a low guess."),
    ("speed", "The problem's least flops (or bytes) over the median; work that a kernel does beyond that does not count in its favour."),
    ("at clock", "The same share with the arithmetic peak at the SM clock that was measured; memory keeps its specified limit."),
    ("against library, default, rival", "The other's time over the choice's: above 1, the choice is faster. From the rounds that both "
     "took in turns where there are such, else from both intervals at their worst."),
    ("geometric mean", "Over the problems that have a choice and a library: the n-th root of the product of the best library's time over "
     "the choice's, 1 where a library is the choice. Its interval has all of theirs at the same end: never narrower than independent "
     "errors."),
    ("win, tie, lose", "An own kernel wins where the interval against the best library lies above 1, ties where it holds 1 (or where it is "
     "in a tie that a library won), and loses where the choice is a library's."),
    ("weighted by time", "The sum of the least times over the sum of the measured ones: slow problems weigh more."),
    ("before", "The choices as they would be without the results of the newest run."),
    ("fails newly", "In the newest run a kernel failed with a status it never had before, or in a trial that had a valid time before."),
    ("error", "Norm of the difference from the reference over the reference's norm; the worst over all checks."),
    ("energy", "Joules per launch of the whole board, idle power included. Null is not zero: where it is missing the reason is given."),
)  # fmt: skip


def section() -> Markup:
    """Every label that the page uses."""
    return el("section", el("h2", "Words"), pairs(WORDS), id="words")
