"""Range: a figure with its bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from klab.kernels.contract import Json


@dataclass(frozen=True)
class Range:
    """low <= mid <= high, of one unit that the name it is kept under states.

    Errors are taken as common to all that is added up (a model that is 5% off is so everywhere): sums add the bounds. That is the widest
    answer; it is never narrower than the truth for independent errors.
    """

    low: float
    mid: float
    high: float

    def __post_init__(self) -> None:
        """ValueError for bounds that are none."""
        if math.isnan(self.low + self.mid + self.high) or not self.low <= self.mid <= self.high:
            raise ValueError(f"not a range: {self.low}, {self.mid}, {self.high}")

    @classmethod
    def exact(cls, value: float) -> Range:
        """A figure without doubt."""
        return cls(value, value, value)

    @classmethod
    def of(cls, function: Callable[..., float], *ranges: Range) -> Range:
        """`function` of ranges that move together (all low, all mid, all high): what a model says when its times are that much off.

        Right where the function is monotone along that line; its three values are put in order.
        """
        values = [function(*(getattr(one, end) for one in ranges)) for end in ("low", "mid", "high")]
        return cls(min(values), values[1], max(values))

    def __add__(self, other: Range | float) -> Range:
        if not isinstance(other, Range):
            return Range(self.low + other, self.mid + other, self.high + other)
        return Range(self.low + other.low, self.mid + other.mid, self.high + other.high)

    __radd__ = __add__

    def __mul__(self, other: Range | float) -> Range:
        """By a number of either sign, or by a range; both ranges must not be negative."""
        if isinstance(other, Range):
            if min(self.low, other.low) < 0:
                raise ValueError("only ranges that are not negative are multiplied")
            return Range(self.low * other.low, self.mid * other.mid, self.high * other.high)
        ends = sorted((self.low * other, self.high * other))
        return Range(ends[0], self.mid * other, ends[1])

    __rmul__ = __mul__

    def __truediv__(self, other: Range | float) -> Range:
        """By a positive number or a positive range whose error is independent of this one's."""
        if isinstance(other, Range):
            if self.low < 0 or other.low <= 0:
                raise ValueError("a range that is not negative is divided by a positive one")
            return Range(self.low / other.high, self.mid / other.mid, self.high / other.low)
        return self * (1 / other)

    @property
    def doubt(self) -> float:
        """Half the width over the middle: 0.05 is +-5%."""
        return (self.high - self.low) / 2 / self.mid if self.mid else 0.0

    def to_json(self) -> dict[str, Json]:
        """Three numbers."""
        return {"low": self.low, "mid": self.mid, "high": self.high}


ZERO = Range(0.0, 0.0, 0.0)
