"""Numbers between units, exactly: files have milliseconds, klab microseconds and seconds, and no digit is to be lost on the way.

x / 1000 * 1000 is not always x, while moving the decimal point in the text is exact. So the decoder leaves numbers with a point as
their bytes, and they become floats once the unit is known.
"""

from __future__ import annotations

import json
import math
from decimal import Decimal

from klab.kernels.contract import Json

decoder = json.JSONDecoder(parse_float=str.encode, parse_constant=lambda _: None)
"""Decodes JSON with numbers that have a point or an exponent as bytes (b"3.97"), so that they are told from text. NaN and Infinity, which
Python writes and JSON does not have, become null.
"""


def number(value: Json, power: int = 0) -> float | None:
    """value x 10^power, rounded once; None for what is no number. `value` comes from `decoder`."""
    if isinstance(value, bytes):
        try:
            return float(value + b"e%d" % power) if power else float(value)
        except ValueError:  # it has an exponent of its own
            return _shifted(value.decode(), power)
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return _shifted(value, power)


def _shifted(value: str | int, power: int) -> float:
    try:
        return float(Decimal(value).scaleb(power))
    except ArithmeticError:  # beyond all floats
        return math.inf


def numbers(values: Json, power: int) -> list[float]:
    """A list's numbers; nan for what is none; nothing where there is no list."""
    if not isinstance(values, list):
        return []
    try:
        return [float(v + b"e%d" % power) for v in values]  # all are as Kernel Tuner writes them: 30 values of 30
    except (TypeError, ValueError):
        return [math.nan if (found := number(v, power)) is None else found for v in values]


def text(value: float, power: int = 0) -> str:
    """JSON for value x 10^power, such that `number(text, -power)` is `value` again. `value` is finite."""
    plain = repr(float(value))
    if not power:
        return plain
    if "e" in plain:
        return f"{Decimal(plain).scaleb(power):e}"
    sign, plain = ("-", plain[1:]) if plain[0] == "-" else ("", plain)
    whole, _, fraction = plain.partition(".")
    if power < 0:
        whole, fraction = whole.zfill(1 - power)[:power], whole.zfill(1 - power)[power:] + fraction
    else:
        fraction = fraction.ljust(power + 1, "0")
        whole, fraction = (whole + fraction[:power]).lstrip("0") or "0", fraction[power:]
    return f"{sign}{whole}.{fraction.rstrip('0') or '0'}"


def thawed(value: Json) -> Json:
    """A value from `decoder` as plain JSON: its numbers are floats; null for one beyond them."""
    if isinstance(value, bytes):
        return found if math.isfinite(found := float(value)) else None
    if isinstance(value, str):
        return words(value)
    if isinstance(value, list):
        return [thawed(v) for v in value]
    if isinstance(value, dict):
        return {words(k): thawed(v) for k, v in value.items()}
    return value


def without(total: float, part: float) -> float:
    """The number that, added to `part`, is `total` again (their difference, but for its last bit)."""
    rest = total - part
    return next((r for r in (rest, math.nextafter(rest, math.inf), math.nextafter(rest, 0.0)) if r + part == total), rest)


def words(value: Json) -> str:
    """A text as it is, but for half characters ("\\ud800"), which nothing prints; empty for what is no text."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""
