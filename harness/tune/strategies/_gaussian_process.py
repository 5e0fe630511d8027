"""An exact Gaussian process that learns one observation at a time: Matern 5/2, a length scale per feature, numpy and scipy alone."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack, solve_triangular
from scipy.optimize import minimize

Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]

NOISE = 1e-2
_LEAST_NOISE, _MOST_NOISE = 1e-5, 1.0
# Widths of the log-normal priors: a length scale may well be e times the typical one, the noise e^2 times.
_LENGTH_SIGMA, _NOISE_SIGMA = 2.0, 2.0


class Correlation:
    """k(a, b) = (1 + r + r^2/3) exp(-r), r^2 = 5 sum_f w_f (a_f - b_f)^2; `noise` is relative to the signal's variance."""

    def __init__(self, features: int) -> None:
        # A length scale of sqrt(features)/2 puts typical points of the unit cube at moderate correlation whatever their dimension.
        self._typical = -2 * math.log(math.sqrt(features) / 2)
        self._theta = np.append(np.full(features, self._typical), math.log(NOISE))

    @property
    def weights(self) -> Floats:
        """1 / length scale^2 per feature."""
        weights: Floats = np.exp(self._theta[:-1])
        return weights

    @property
    def noise(self) -> float:
        """Variance of the noise, in units of the signal's."""
        return math.exp(self._theta[-1])

    def between(self, a: Floats32, b: Floats32) -> Floats32:
        """Shape (a, b)."""
        w: Floats32 = self.weights.astype(np.float32)
        aw = a * w
        r: Floats32 = np.matmul(np.float32(-2) * aw, b.T, dtype=np.float32)
        r += (aw * a).sum(axis=1, keepdims=True)
        r += (b * b) @ w
        np.maximum(r, 0, out=r)
        r *= 5
        third = r / 3
        np.sqrt(r, out=r)
        third += r
        third += 1
        np.negative(r, out=r)
        np.exp(r, out=r)
        r *= third
        return r

    def fit(self, x: Floats32, y: Floats, steps: int) -> None:
        """Maximise the posterior density of length scales and noise from where they are; mean and signal variance are profiled out."""
        typical, count = self._typical, len(self._theta) - 1
        bounds = [(typical - 8, typical + 8)] * count + [(math.log(_LEAST_NOISE), math.log(_MOST_NOISE))]
        options = {"maxiter": steps}
        found = minimize(
            self._loss, self._theta, args=(x.astype(np.float64), y), jac=True, method="L-BFGS-B", bounds=bounds, options=options
        )
        if np.all(np.isfinite(found.x)):
            self._theta = found.x

    def _loss(self, theta: Floats, x: Floats, y: Floats) -> tuple[float, Floats]:
        n, w, noise = len(y), np.exp(theta[:-1]), math.exp(theta[-1])
        xw = x * w
        r2 = np.maximum((xw * x).sum(axis=1)[:, None] + (x * x) @ w - 2 * xw @ x.T, 0)
        r = np.sqrt(5 * r2)
        e = np.exp(-r)
        k = (1 + r + (5 / 3) * r2) * e
        k[np.diag_indices(n)] += noise
        factor, bad = lapack.dpotrf(k, lower=1)
        if bad:
            return 1e10, np.zeros_like(theta)
        inverse = lapack.dpotri(factor, lower=1)[0]
        inverse = np.tril(inverse) + np.tril(inverse, -1).T
        ones = inverse.sum(axis=1)
        residual = y - (ones @ y) / ones.sum()
        a = inverse @ residual
        signal = max(float(residual @ a) / n, 1e-12)
        g = 0.5 * (np.outer(a, a) / signal - inverse)
        g_noise = -noise * float(np.trace(g))
        g *= (-5 / 6) * (1 + r) * e
        g_w = -w * 2 * (g.sum(axis=1) @ (x * x) - (x * (g @ x)).sum(axis=0))
        z, zn = (theta[:-1] - self._typical) / _LENGTH_SIGMA, (theta[-1] - math.log(NOISE)) / _NOISE_SIGMA
        loss = n / 2 * math.log(signal) + float(np.log(np.diag(factor)).sum()) + 0.5 * float(z @ z) + 0.5 * zn * zn
        return loss, np.append(g_w + z / _LENGTH_SIGMA, g_noise + zn / _NOISE_SIGMA)


class Posterior:
    """What the observations say about a pool of candidates. Points are added first, their values later: a point that is being measured
    already lowers the variance around it. Costs n * pool per point and n^2 per set of values."""

    def __init__(self, correlation: Correlation, x: Floats32, pool: Floats32, room: int) -> None:
        self._correlation = correlation
        n = len(x)
        self._x = np.empty((n + room, x.shape[1]), dtype=np.float32)
        self._x[:n] = x
        self._nugget = correlation.noise + 1e-6
        k = correlation.between(x, x).astype(np.float64)
        k[np.diag_indices(n)] = 1 + self._nugget
        self._l = np.zeros((n + room, n + room))
        self._l[:n, :n] = np.linalg.cholesky(k)
        self._l32 = self._l[:n, :n].astype(np.float32)
        self.count, self.room = n, room
        self.look_at(pool)

    def look_at(self, pool: Floats32) -> None:
        """Another pool, shape (candidates, features); before any point is added."""
        n = len(self._l32)
        self._pool = pool
        self._v = np.empty((n + self.room, len(pool)), dtype=np.float32)
        near = self._correlation.between(self._x[:n], pool)
        self._v[:n] = solve_triangular(self._l32, near, lower=True, check_finite=False)
        self._variance = 1 - np.einsum("ij,ij->j", self._v[:n], self._v[:n])

    def add(self, x: Floats32) -> None:
        """One more point, shape (features,); `room` is one less."""
        n = self.count
        near = self._correlation.between(x[None], self._x[:n])[0].astype(np.float64)
        row = solve_triangular(self._l[:n, :n], near, lower=True, check_finite=False)
        last = math.sqrt(max(1 + self._nugget - float(row @ row), self._nugget))
        self._l[n, :n], self._l[n, n], self._x[n] = row, last, x
        v = (self._correlation.between(x[None], self._pool)[0] - row.astype(np.float32) @ self._v[:n]) / np.float32(last)
        self._v[n] = v
        self._variance -= v * v
        self.count += 1
        self.room -= 1

    def whitened(self, columns: Floats) -> Floats:
        """Columns of values of the first len(columns) points, made independent and of unit variance."""
        n = len(columns)
        white: Floats = solve_triangular(self._l[:n, :n], columns, lower=True, check_finite=False)
        return white

    def mean(self, white_residual: Floats) -> Floats:
        """The pool's expected deviation from the trend, for residuals that `whitened` gave."""
        return (white_residual.astype(np.float32) @ self._v[: len(white_residual)]).astype(np.float64)

    @property
    def variance(self) -> Floats:
        """Of the pool, in units of the signal's; every point counts, measured or not yet."""
        variance: Floats = np.maximum(self._variance, 1e-9).astype(np.float64)
        return variance
