"""Transfer: what it takes to move a prompt's cache from the replica that prefilled it to the one that decodes it, and who waits for it."""

from __future__ import annotations

from dataclasses import dataclass

from klab.harness.catalog.architecture import Model
from klab.harness.cost.ranges import Range
from klab.harness.plan.memory import cache_bytes
from klab.kernels.contract import Chip
from klab.kernels.errors import UsageError

# Share of a network link's rate that the moves reach. Mooncake's transfer engine prints 190 GB/s of 8 x 50 and 87 of 4 x 25 (0.48, 0.87);
# low is a guess for caches cut into many small pages (vLLM issue 50913 saw a tenth of a link at 167 MB in 1,785 pieces).
LINK_SHARE = Range(0.3, 0.6, 0.9)
# Agreeing on a move and posting its pieces. vLLM issue 50913: 7 to 12 ms for 1,800 pieces; a layer-wise push through Mooncake ends 58 ms
# behind the prefill whatever the length. The low end is a guess: one message there and back, and descriptors prepared beforehand.
START_S = Range(0.001, 0.010, 0.060)
# Of a receiving link's time, what may be busy: beyond, moves from several senders wait for one another longer than they take. A guess.
LINK_LOAD = 0.8


@dataclass(frozen=True)
class Link:
    """The way from one GPU of a sending replica to one of a receiving replica. `gb_per_s`: one way per GPU; `source`: who says so."""

    gb_per_s: float
    source: str
    share: Range = LINK_SHARE
    start_s: Range = START_S

    @property
    def bytes_per_s(self) -> Range:
        """What a move reaches."""
        return self.share * (self.gb_per_s * 1e9)


def link_between(sender: Chip, receiver: Chip, gb_per_s: float | None = None) -> Link:
    """The lesser of both chips' networks, or `gb_per_s` where the user states it. UsageError where a chip states none."""
    if gb_per_s is not None:
        return Link(gb_per_s, "given by you")
    for chip in (sender, receiver):
        if chip.network_gb_per_s is None:
            raise UsageError(
                f"chip {chip.name} states no network_gb_per_s, so no cache can be sent: add it to its file, or say --link GB/S"
            )
    slower = min((sender, receiver), key=lambda chip: chip.network_gb_per_s or 0.0)
    return Link(
        slower.network_gb_per_s or 0.0, f"network of {slower.name}: {slower.provenance.get('network_gb_per_s', 'no source stated')}"
    )


@dataclass(frozen=True)
class Transfer:
    """The cache of one prompt on its way. `received_bytes`: per receiving GPU, what it will keep; `sent_bytes`: per sending GPU. `pieces`:
    layers, each of which can leave when it is computed.
    """

    link: Link
    received_bytes: float
    sent_bytes: float
    pieces: int

    @property
    def seconds(self) -> Range:
        """From the first byte to the last, alone on its links: the end with more bytes per link sets the pace."""
        return Range.exact(max(self.received_bytes, self.sent_bytes)) / self.link.bytes_per_s

    @property
    def sends_per_s(self) -> Range:
        """Requests per second that leave one sending replica when its links never rest."""
        return self.link.bytes_per_s / self.sent_bytes

    @property
    def receipts_per_s(self) -> Range:
        """Requests per second that one receiving replica takes in, its links busy for LINK_LOAD of the time."""
        return self.link.bytes_per_s * LINK_LOAD / self.received_bytes

    def waiting_s(self, receipts_per_s: float) -> float:
        """Mean wait of a move for others to the same replica, at mid: they come at random and take equally long (M/D/1)."""
        one_s = self.received_bytes / self.link.bytes_per_s.mid
        load = min(receipts_per_s * one_s, LINK_LOAD)
        return load * one_s / (2 * (1 - load))

    def exposed_s(self, prefill_s: Range, overlap: bool) -> Range:
        """What the first token waits for the move, behind a prefill that computes for `prefill_s`.

        With `overlap` every layer leaves when it is computed: all is hidden but what the link lags behind the computing, and the last
        layer. A fast link behind a slow prefill is the low end, a slow link behind a fast prefill the high end.
        """
        if not overlap:
            return self.seconds + self.link.start_s
        ends = (
            (self.seconds.low, prefill_s.high),
            (self.seconds.mid, prefill_s.mid),
            (self.seconds.high, prefill_s.low),
        )
        return Range(*(behind_s(move, compute, self.pieces) for move, compute in ends)) + self.link.start_s


def behind_s(move_s: float, compute_s: float, pieces: int) -> float:
    """How long after the last of `pieces` is computed it has arrived, when each is sent as soon as it is there, one after another.

    Piece i of n is computed at i/n of `compute_s` and the moves follow one another: the slowest chain starts at the first or at the last.
    """
    return max(move_s - compute_s * (1 - 1 / pieces), move_s / pieces)


def transfer(model: Model, cache_dtype: str, tokens: int, sender_tp: int, receiver_tp: int, link: Link) -> Transfer:
    """The move of a cache of `tokens` between replicas of these tensor-parallel sizes, each GPU over its own link.

    Every receiving GPU gets what it keeps, rank from rank as engines do: latents, and key/value heads where there are fewer than GPUs,
    cross the network once per receiving GPU. Prompt tokens that the prefill found in its cache are sent too.
    """
    received = cache_bytes(model, cache_dtype, tokens, receiver_tp)
    if received <= 0:
        raise UsageError(f"{model.name} keeps no cache: there is nothing to hand over, so no apart pools for prefill and decode")
    return Transfer(link, received, received * receiver_tp / sender_tp, model.stack.layers)
