"""The scoreboard: nothing is run twice, a kill loses a line at most, and the page says what the runs say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import recorded_spaces
from typer.testing import CliRunner

from klab.harness.cli.main import build_app
from klab.harness.tune import strategy
from klab.harness.tune.replay import contestants, peers, score
from klab.harness.tune.replay.contestants import Contestant, source_digest
from klab.harness.tune.replay.scoreboard import Scoreboard, scoreboard
from klab.harness.tune.replay.scoreboard_page import comparison, markdown, verdict
from klab.harness.tune.replay.simulate import Run, Step
from klab.harness.tune.strategy import find_strategy
from klab.kernels.errors import UsageError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer runs of random search: no test here rests on the score."""
    monkeypatch.setattr(score, "RANDOM_RUNS", 100)


SPACES = [recorded_spaces.small_space(name="first"), recorded_spaces.small_space(seed=1, failing=0.4, name="second")]


def board(folder: Path, repeats: int = 4, names: tuple[str, ...] = ("random", "exhaustive")) -> Scoreboard:
    return scoreboard(SPACES, folder, names=names, repeats=repeats, evaluations=50, with_peers=False)


def test_only_what_is_missing_is_run(tmp_path: Path) -> None:
    first = board(tmp_path)
    assert sum(len(t.seeds) for t in first.missing()) == 2 * 2 * 4
    first.fill()
    assert board(tmp_path).missing() == []
    more = board(tmp_path, repeats=6)
    assert {t.seeds for t in more.missing()} == {(4, 5)}
    ran = []
    more.fill(on_run=lambda: ran.append(1))
    assert len(ran) == 2 * 2 * 2
    assert [s.repeats for s in more.standings()] == [6, 6]
    assert [s.repeats for s in board(tmp_path).standings()] == [4, 4]


def test_a_changed_strategy_is_run_again_and_the_others_are_not(tmp_path: Path) -> None:
    found = board(tmp_path)
    found.fill()
    found.contestants = [Contestant(c.name, c.origin, "other" if c.name == "random" else c.digest) for c in found.contestants]
    assert {t.contestant.name for t in found.missing()} == {"random"}
    assert scoreboard(SPACES, tmp_path, names=["random"], repeats=4, evaluations=60, with_peers=False).missing()


def test_a_torn_line_is_run_again_and_hurts_no_other(tmp_path: Path) -> None:
    found = board(tmp_path)
    found.fill()
    before = found.store.runs(SPACES[0], found.contestants[0])
    path = next(tmp_path.glob(f"first-*/{found.contestants[0].name}.runs"))
    path.write_bytes(path.read_bytes()[:-20])
    assert [t.seeds for t in found.missing()] == [(3,)]
    found.fill()
    assert found.missing() == []
    assert found.store.runs(SPACES[0], found.contestants[0]) == before


def test_processes_find_what_one_process_finds(tmp_path: Path) -> None:
    one, two = board(tmp_path / "one"), board(tmp_path / "two")
    one.fill()
    two.fill(jobs=2)
    for contestant in one.contestants:
        assert one.store.runs(SPACES[1], contestant) == two.store.runs(SPACES[1], contestant)


def test_a_digest_follows_what_a_strategy_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    random = find_strategy("random")
    before = source_digest(random)
    assert before == source_digest(random)
    assert before != source_digest(find_strategy("exhaustive"))
    real = contestants._source
    monkeypatch.setattr(contestants, "_source", lambda module: real(module) + (b"#" if module == "klab.harness.tune.space" else b""))
    assert source_digest(random) != before


def test_the_page_has_the_table_the_verdict_and_how_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = board(tmp_path)
    found.fill()
    page = markdown(found, command="klab simulate --scoreboard", licences=["Spaces: made for this test."])
    assert "did not take part" in page
    assert "Spaces: made for this test." in page
    assert SPACES[0].digest in page
    # The same runs with one of them as klab's default and the other as somebody else's.
    monkeypatch.setattr(strategy, "DEFAULT", "random")
    found.contestants = [Contestant(c.name, "klab" if c.name == "random" else "elsewhere 1.0", c.digest) for c in found.contestants]
    said = "\n".join(verdict(found, found.standings()))
    assert "against the best of 1 strategies of others" in said
    assert "| 20 | exhaustive |" in said
    assert "random (default)" in markdown(found, command="")


def always(space: int, ratio: float) -> list[Run]:
    """Runs that find this multiple of the optimum at once, give or take a thousandth."""
    best = SPACES[space].optimum_us
    return [Run(seed, (Step(1, 1.0, best * ratio * (1 + seed * 1e-4)),), 50, 60.0, ()) for seed in range(4)]


def test_the_page_says_where_the_default_wins_and_where_it_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategy, "DEFAULT", "ours")
    found = board(tmp_path)
    found.contestants = [
        Contestant("ours", "klab", "1"),
        Contestant("theirs", "elsewhere 1.0", "1"),
        Contestant("last", "elsewhere 1.0", "1"),
    ]
    for space, ratios in enumerate([(1.1, 1.5, 3.0), (1.2, 1.1, 3.0)]):
        for contestant, ratio in zip(found.contestants, ratios, strict=True):
            for run in always(space, ratio):
                found.store.append(SPACES[space], contestant, run)
    said = "\n".join(verdict(found, found.standings()))
    assert "against the best of 2 strategies of others" in said
    assert "| 20 | theirs | 0.8944 | [0.89" in said
    assert "`ours` is ahead of the best other, with an interval that excludes equality, at 20 and 50 evaluations." in said
    assert "of 4 pairs of a space and a budget, some other strategy has a lower mean on 2, on 2 of them" in said
    assert "- second at 20: 1.091 times theirs [1.09" in said
    assert "- first" not in said
    rows = comparison(found, found.standings())
    assert [(r["evaluations"], r["other"]) for r in rows if r["type"] == "duel"] == [(20, "theirs"), (50, "theirs")]
    assert [(r["space"], r["evaluations"]) for r in rows if r["type"] == "loss"] == [("second", 20), ("second", 50)]
    monkeypatch.setattr(strategy, "DEFAULT", "last")
    found.contestants = [Contestant(c.name, "klab" if c.name == "last" else "elsewhere 1.0", "1") for c in found.contestants]
    assert "`last` is behind it at 20 and 50." in "\n".join(verdict(found, found.standings()))


def nothing() -> list[Run]:
    """Runs that evaluated nothing."""
    return [Run(seed, (), 0, 0.0, (), "failed: ValueError: Can't sample more than the size") for seed in range(4)]


def test_a_strategy_that_could_not_run_is_no_bad_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategy, "DEFAULT", "ours")
    found = board(tmp_path)
    found.contestants = [Contestant("ours", "klab", "1"), *(Contestant(n, "elsewhere 1.0", "1") for n in ("partly", "never", "worse"))]
    made = {"ours": (1.2, 1.2), "partly": (None, 1.1), "never": (None, None), "worse": (1.5, 1.5)}
    for contestant in found.contestants:
        for space, ratio in enumerate(made[contestant.name]):
            for run in nothing() if ratio is None else always(space, ratio):
                found.store.append(SPACES[space], contestant, run)
    ranked = found.standings()
    assert [s.name for s in ranked] == ["ours", "worse", "partly", "never"]
    partly, never = ranked[2:]
    assert partly.mean == pytest.approx(1.1, rel=1e-3) and partly.evaluations == 50
    why = "ValueError: Can't sample more than the size"
    assert partly.could_not_run == {"first": why} and list(never.could_not_run) == ["first", "second"]
    duel = comparison(found, ranked)[0]
    assert (duel["other"], duel["spaces"]) == ("partly", 1) and duel["ratio"][0] == pytest.approx(1.2 / 1.1)
    assert [(r["space"], r["other"]) for r in comparison(found, ranked) if r["type"] == "loss"] == [("second", "partly")] * 2
    page = markdown(found, command="")
    assert f"| never | elsewhere 1.0 | 4 | could not run: {why} |" in page
    assert "| partly (could not run on 1 of 2 spaces) | elsewhere 1.0 |" in page
    assert "| 20 | partly (on 1 of 2 spaces) | 1.09" in page
    assert f"- `partly` on first could not run: {why}." in page
    assert "against the best of 2 strategies" in page and "nan" not in page
    assert "NaN" not in json.dumps([s.to_json() for s in ranked])
    assert "no comparison" in verdict(found, [ranked[0], never])[0]
    widths = {line.count("|") for line in page.splitlines() if line.startswith(("| ours", "| never", "| partly"))}
    assert len(widths) == 1


def test_without_the_peers_klabs_own_remain_and_the_reason_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in (peers.KERNEL_TUNER, "optuna") else real(name, *a))
    found = scoreboard(SPACES, tmp_path, names=["random"], repeats=2, evaluations=20)
    assert [c.name for c in found.contestants] == ["random"]
    assert "kernel-lab[peers]" in found.absent["peers"]


def test_a_strategy_whose_package_is_missing_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    random = find_strategy("random")
    monkeypatch.setitem(strategy._found, "needy", strategy.Registered("needy", random.make, "", needs="no_such_package"))
    found = scoreboard(SPACES, tmp_path, repeats=2, evaluations=20, with_peers=False)
    assert "needy" not in [c.name for c in found.contestants]
    assert "no_such_package" in found.absent["needy"]


def test_the_verb_fills_shows_and_writes_the_page(tmp_path: Path) -> None:
    files = [recorded_spaces.cache_file(space, tmp_path / f"{space.name}.json") for space in SPACES]
    page = tmp_path / "docs" / "page.md"

    def klab(*more: str) -> str:
        spaces = [word for file in files for word in ("--space", str(file))]
        wanted = ["-s", "random", "--repeats", "2", "--evaluations", "30", "--no-peers", "--runs", str(tmp_path / "runs")]
        found = CliRunner().invoke(build_app(), ["simulate", "--scoreboard", *spaces, *wanted, *more])
        assert found.exception is None
        return found.stdout

    assert klab("--show", "--json") == ""
    rows = [json.loads(line) for line in klab("--json").splitlines()]
    assert [(r["strategy"], r["runs"], list(r["best_over_optimum"])) for r in rows] == [("random", 2, ["20"])]
    assert "random" in klab("--show", "--markdown", str(page), "--note", "Spaces: made up, no licence.")
    text = page.read_text()
    assert "`klab simulate --scoreboard --space first --space second --repeats 2`" in text
    assert "- Spaces: made up, no licence." in text


def test_what_cannot_make_a_scoreboard_is_refused(tmp_path: Path) -> None:
    for spaces, repeats, evaluations, said in (([], 5, 50, "at least one"), (SPACES, 1, 50, "interval"), (SPACES, 5, 0, "too small")):
        with pytest.raises(UsageError, match=said):
            scoreboard(spaces, tmp_path, repeats=repeats, evaluations=evaluations, with_peers=False)
