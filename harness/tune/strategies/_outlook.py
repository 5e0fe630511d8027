"""What measured values and a prior's trend say about candidates not measured yet: the expected improvement, in logarithms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from klab.harness.tune.strategies._gaussian_process import Correlation, Posterior

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Values above the median count this much of their distance to it: which of two slow candidates is slower says little about the fast ones.
_SQUEEZE = 0.25
# A failure counts as this quantile of the values: bad, yet no cliff that bends the model around it.
_FAILED = 0.9
# A chance to be valid below this is not believed.
_LEAST_VALID = 0.02
# The prior's trend is believed by half (slope 0.5: another chip's ratios are partly right), give or take this, until values say otherwise.
_TREND_SLOPE, _TREND_SIGMA = 0.5, 0.5
# A prior that tells candidates apart by more than exp(4) = 55 times is believed no further.
_TREND_MOST = 4.0


def trend_of(expected: Floats | None) -> Floats | None:
    """Logarithms of a prior's expectation around their median, squeezed as values are; 0 where nothing is known; None when nothing is."""
    if expected is None:
        return None
    known = np.isfinite(expected) & (expected > 0)
    if not known.any():
        return None
    logs = np.zeros(len(expected))
    logs[known] = np.log(expected[known])
    logs[known] -= np.median(logs[known])
    squeezed: Floats = np.clip(_squeezed(logs), -_TREND_MOST, _TREND_MOST)
    return squeezed


@dataclass(frozen=True)
class Targets:
    """y: standardised values, failures at a quantile; ok: 1 where valid; best: the least valid y; trend: in the units of y."""

    y: Floats
    ok: Floats
    best: float
    trend: Floats
    scale: float


def targets(values: Floats, trend: Floats) -> Targets:
    """values: infinite for a failure; at least one is finite. trend: as `trend_of` gives, 0 where there is none."""
    valid = np.isfinite(values)
    good = values[valid]
    if good.min() > 0:
        good = np.log(good)
    good = _squeezed(good - np.median(good))
    y = np.full(len(values), np.quantile(good, _FAILED))
    y[valid] = good
    scale = max(float(y.std()), 1e-9)
    y = (y - y.mean()) / scale
    return Targets(y, valid.astype(np.float64), float(y[valid].min()), trend / scale, scale)


def fit(correlation: Correlation, x: NDArray[np.float32], known: Targets, steps: int) -> None:
    """Fit the correlation to what the trend leaves unexplained."""
    if known.y.std() > 1e-6:
        slope = _slope(np.ones(len(known.y)), known.trend, known.y, 1.0)[1]
        correlation.fit(x, known.y - slope * known.trend, steps)


def improvement(posterior: Posterior, known: Targets, trend: Floats, xi: float = 0.0) -> Floats:
    """Per candidate of the posterior's pool the logarithm of its expected improvement times its chance to be valid.

    trend: of the pool, as `trend_of` gives. The trend's slope is estimated along with everything else: a prior that is contradicted loses
    its weight with the evidence against it.
    """
    white = posterior.whitened(np.stack([np.ones(len(known.y)), known.trend, known.y, known.ok], axis=1))
    one, wt, wy, wok = white.T
    level, slope = _slope(one, wt, wy, 1.0)
    residual = wy - level * one - slope * wt
    signal = max(float(residual @ residual) / len(wy), 1e-12)
    if wt.any():
        level, slope = _slope(one, wt, wy, signal)
        residual = wy - level * one - slope * wt
    mean = level + posterior.mean(residual) + slope / known.scale * trend
    # Where noise is large the best value is the luckiest: no candidate's mean reaches it, and to improve on it would be to seek variance
    # alone (30% noise: 1.33 of the optimum after 200 evaluations; 1.14 with the best mean as what is to be beaten).
    best = max(known.best, float(mean.min())) if len(mean) else known.best
    score = _log_improvement(mean, np.sqrt(signal * posterior.variance), best - xi)
    if not known.ok.all():
        share = float(one @ wok) / float(one @ one)
        score += np.log(np.clip(share + posterior.mean(wok - share * one), _LEAST_VALID, 1.0))
    return score


def _slope(one: Floats, trend: Floats, y: Floats, variance: float) -> tuple[float, float]:
    """Level (nothing known before) and slope (_TREND_SLOPE +- _TREND_SIGMA known before) of whitened values; no slope without a trend."""
    if not trend.any():
        return float(one @ y) / float(one @ one), 0.0
    held = variance / _TREND_SIGMA**2
    a = np.array([[one @ one, one @ trend], [one @ trend, trend @ trend + held]])
    level, slope = np.linalg.solve(a, np.array([one @ y, trend @ y + held * _TREND_SLOPE]))
    return (float(level), float(slope)) if slope > 0 else (float(one @ y) / float(one @ one), 0.0)


def _squeezed(x: Floats) -> Floats:
    return np.where(x > 0, _SQUEEZE * x, x)


def _log_improvement(mean: Floats, sd: Floats, best: float) -> Floats:
    """log E[max(best - Y, 0)], also far below where the expectation itself is 0 in floating point."""
    z = (best - mean) / sd
    near = z * ndtr(z) + np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    far = -0.5 * z * z - 0.5 * math.log(2 * math.pi) - 2 * np.log(np.maximum(-z, 1.0))
    logs: Floats = np.where(z > -4, np.log(np.maximum(near, 1e-300)), far) + np.log(sd)
    return logs
