"""Which parameters of a search matter: the shares against spaces whose answer is known, and against noise."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from test_report_search import grid, one_space, rows_of

from klab.harness.report.figures import search_failures, search_importance
from klab.harness.report.figures.search_trees import one_way, shares
from klab.harness.store.result import Status


def variance_shares(codes: np.ndarray, y: np.ndarray) -> list[float]:
    """The exact answer on a complete grid, by definition: every interaction's variance divided equally among its parameters."""
    width = codes.shape[1]
    effect: dict[tuple[int, ...], np.ndarray] = {(): np.full(len(y), y.mean())}
    shares = [0.0] * width
    for size in range(1, width + 1):
        for names in itertools.combinations(range(width), size):
            keys = [tuple(row) for row in codes[:, names]]
            means = {key: np.mean([value for value, other in zip(y, keys, strict=True) if other == key]) for key in set(keys)}
            whole = np.array([means[key] for key in keys])
            effect[names] = whole - sum(part for other, part in effect.items() if set(other) < set(names))
            for name in names:
                shares[name] += float((effect[names] ** 2).mean()) / size / float(y.var())
    return shares


def complete(*levels: int) -> np.ndarray:
    return np.array(list(itertools.product(*map(range, levels))))


KNOWN: dict[str, tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]] = {
    "additive": (complete(4, 4, 3, 5), lambda c: c[:, 0] + np.array([0, 1, -1, 0.5])[c[:, 1]] + 0.2 * c[:, 2]),
    "interacting": (complete(4, 5, 3, 2), lambda c: (c[:, 0] - 1.5) * (c[:, 1] - 2.0) + 0.3 * c[:, 2]),
    "exclusive or": (complete(2, 2, 4, 5, 3), lambda c: 1.0 * (c[:, 0] ^ c[:, 1])),
    "one level of many": (complete(8, 6, 4), lambda c: 3.0 * (c[:, 0] == 5) + 0.5 * c[:, 2]),
}


@pytest.mark.parametrize("name", KNOWN)
def test_shares_of_known_spaces(name: str) -> None:
    codes, function = KNOWN[name]
    y = function(codes).astype(float)
    exact = variance_shares(codes, y)
    assert sum(exact) == pytest.approx(1.0)
    for ordered in (True, False):
        found = shares(codes, y, [ordered] * codes.shape[1])
        assert found is not None
        # What an interaction's parts are credited with depends on which is split first: their sum does not.
        room = 0.25 if name == "exclusive or" else 0.1
        assert (found.share < np.array(exact) + room).all(), (name, ordered)
        assert (found.share > np.array(exact) - room - found.unexplained[0]).all(), "what is missing is told as not explained"
        assert (found.low <= found.share).all() and (found.share <= found.high).all()
        unused = [n for n, share in enumerate(exact) if share < 1e-9]
        assert (found.share[unused] < 0.03).all() and (found.low[unused] <= 0.01).all()
        assert found.unexplained[0] == pytest.approx(1 - found.share.sum()) and found.unexplained[0] < (0.3 if ordered else 0.7)
        assert [found.alone[n] < 0.02 for n in (0, 1)] == [name in ("interacting", "exclusive or")] * 2 or name == "one level of many"


def test_alone_is_a_one_way_analysis() -> None:
    """Against the textbook's F: epsilon squared is (F - 1) times the degrees of freedom between, over the total in units of the error."""
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 5, 80)
    y = 0.7 * codes + rng.normal(size=80)
    groups = [y[codes == level] for level in range(5)]
    error = sum(((g - g.mean()) ** 2).sum() for g in groups) / 75
    f = sum(len(g) * (g.mean() - y.mean()) ** 2 for g in groups) / 4 / error
    expected = (f - 1) * 4 * error / ((y - y.mean()) ** 2).sum()
    assert one_way(codes, y) == pytest.approx(expected, rel=1e-9)
    assert one_way(np.arange(80), y) == 0.0, "a value of its own for everybody explains nothing"
    assert one_way(np.zeros(80, dtype=int), y) == 0.0


def test_noise_is_nobodys() -> None:
    """Parameters of many values explain nothing of noise, where a share without a correction would be large."""
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(0, k, 150) for k in (2, 8, 30, 100)], axis=1)
    y = rng.normal(size=150)
    found = shares(codes, y, [True] * 4)
    assert found is not None and (found.share < 0.08).all() and (found.low <= 0).all() and found.unexplained[2] > 0.9
    raw = np.bincount(codes[:, 3], (y - y.mean())) ** 2 / np.maximum(np.bincount(codes[:, 3]), 1)
    assert raw.sum() / ((y - y.mean()) ** 2).sum() > 0.5 and found.alone[3] < 0.2


def test_an_incomplete_grid_whose_parameters_go_together() -> None:
    """b has no effect and is tried high where a is high: alone it seems to explain much, beside a it does not."""
    rng = np.random.default_rng(5)
    a = rng.integers(0, 6, 300)
    b = np.clip(a + rng.integers(-1, 2, 300), 0, 5)
    c = rng.integers(0, 4, 300)
    y = 1.0 * a + 0.5 * c
    found = shares(np.stack([a, b, c], axis=1), y, [True] * 3)
    assert found is not None
    assert found.alone[1] > 0.6 and found.share[1] < 0.5 * found.alone[1] and found.share[0] > 2 * found.share[1]
    assert found.share[2] == pytest.approx((0.25 * c.var()) / y.var(), abs=0.05)


def test_a_permutation_of_the_times_leaves_nothing_to_explain() -> None:
    codes, function = KNOWN["additive"]
    y = function(codes)
    rng = np.random.default_rng(1)
    told = 0
    for seed in range(6):
        found = shares(codes, rng.permutation(y), [True] * 4, most=130, seed=seed)
        assert found is not None and abs(found.share).max() < 0.15 and abs(found.share.sum()) < 0.2
        told += int((found.low >= search_importance.MATTERS).sum())
    assert told <= 2, "of 24 intervals hardly one leaves out zero"
    kept = shares(codes, y, [True] * 4, most=130)
    assert kept is not None and kept.low[0] > 0.3


def test_names_that_begin_alike_have_bars_of_their_own() -> None:
    points = [{"n" * 40 + "a": a, "n" * 40 + "b": b} for a in range(4) for b in range(4)]
    space = one_space(rows_of(points, lambda p: Status.TIMEOUT if p["n" * 40 + "a"] == 3 else 1.0 + p["n" * 40 + "a"]))
    matter = search_importance.draw(space, search_importance.data(space), "i")
    broken = search_failures.draw(space, search_failures.data(space), "f")
    assert matter is not None and broken is not None
    assert len(set(matter.traces[0]["y"])) == 3
    (bars,) = broken.traces
    assert len(set(bars["y"])) == len(bars["y"]) == 5 and set(bars["y"]) == set(broken.layout["yaxis"]["categoryarray"])


def test_shares_are_the_same_again_and_refuse_too_little() -> None:
    codes, function = KNOWN["additive"]
    y = function(codes)
    first, second = shares(codes, y, [True] * 4), shares(codes, y, [True] * 4)
    assert first is not None and second is not None and (first.share == second.share).all() and (first.low == second.low).all()
    part = shares(codes, y, [True] * 4, most=100)
    assert part is not None and part.configurations == 100
    assert shares(codes[:7], y[:7], [True] * 4) is None and shares(codes, np.ones(len(y)), [True] * 4) is None


def test_importance_of_a_space() -> None:
    points = grid(block=(16, 32, 64, 128), warps=(2, 4, 8), stages=(1, 2, 3), vector=("a", "b"), group=(8,))
    rows = rows_of(points, lambda p: Status.OUT_OF_MEMORY if p["stages"] == 3 else p["block"] * (1 if p["warps"] < 8 else 1.5))
    space = one_space(rows)
    table = search_importance.data(space)
    assert table["parameter"].tolist()[:2] == ["block", "warps"] and table["parameter"].iloc[-1] == "not explained"
    assert "group" not in set(table["parameter"]), "it never varied"
    logs = np.log([p["block"] * (1 if p["warps"] < 8 else 1.5) for p in points if p["stages"] < 3])
    part = np.var(np.log([16, 32, 64, 128])) / logs.var()
    assert table["share_percent"].iloc[0] == pytest.approx(100 * part, abs=6)
    assert (table["low_percent"] <= table["share_percent"]).all() and table["configurations"].iloc[0] == 48
    figure = search_importance.draw(space, table, "i")
    assert figure is not None and figure.table is table and figure.caption.startswith("block explains 9")
    assert "vector" in figure.caption and "hardly matter" in figure.caption
    assert [trace["meta"]["rows"] for trace in figure.traces] == [list(range(len(table))), list(range(len(table) - 1))]
