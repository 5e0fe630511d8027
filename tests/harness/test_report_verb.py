"""`klab report` as its user runs it."""

from __future__ import annotations

import dataclasses
import json
import webbrowser
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result as Done
from made_nights import history
from made_results import contest
from typer.testing import CliRunner

from klab.harness.cli.main import build_app
from klab.harness.store.journal import Journal
from klab.harness.watch.history import History
from klab.kernels.errors import UsageError


def klab(*words: object) -> Done:
    return CliRunner().invoke(build_app(), ["report", *map(str, words)], catch_exceptions=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: the second measured some of it again."""
    folder = tmp_path_factory.mktemp("results")
    with Journal(folder, "run") as journal:
        for row in contest():
            journal.append(row)
        for row in contest(seed=1)[:10]:
            journal.append(dataclasses.replace(row, run_id="again-2", recorded_at="2026-11-21T10:00:00Z"))
    return folder


def test_the_verb(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    done = klab("--results", store, "--out", out, "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == 0 and told["page"] == str(out) and told["chips"] == ["h200"] and told["results"]["ok"] == 64
    assert out.stat().st_size < 8e6 and "triton_split_kv" in out.read_text()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the verb asks to be written, without the writing."""
    from klab.harness.report import write
    from klab.harness.report.subject import Story

    seen: dict[str, Any] = {}

    def note(folders: list[Path], out: Path, **given: Any) -> Story:
        seen.update(given, folders=folders, out=out, story=write.story_from(folders, **given | {"catalogue": None}))
        out.write_text("page")
        told: Story = seen["story"]
        return told

    monkeypatch.setattr(write, "write_report", note)
    return seen


def test_named_runs(store: Path, tmp_path: Path, asked: dict[str, Any]) -> None:
    assert klab("--results", store, "--out", tmp_path / "page.html", "--runs", "latest", "--json").exit_code == 0
    assert {row.run_id for subject in asked["story"].subjects for row in subject.rows} == {"again-2"}
    assert klab("--results", store, "--out", tmp_path / "page.html", "--runs", "ag,run-1", "--runs", "previous").exit_code == 0
    assert asked["runs"] == ["ag", "run-1", "previous"]
    for word, said in (("nothing", "no run 'nothing': again-2 (2026-11-21 10:00, h200, 10 rows); run-1"), (" , ", "names no run")):
        with pytest.raises(UsageError) as error:
            klab("--results", store, "--out", tmp_path / "page.html", "--runs", word)
        assert said in str(error.value)


def test_the_history_and_what_is_published(store: Path, tmp_path: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kept = History(tmp_path / "kept")
    for night in history(2, 3):
        kept.add(night)
    assert klab("--results", store, "--out", tmp_path / "page.html", "--history", tmp_path / "kept").exit_code == 0
    assert len(asked["story"].nights["h200"]) == 3 and not asked["reference"]
    with pytest.raises(UsageError, match="is no folder"):
        klab("--results", store, "--history", tmp_path / "nowhere")
    monkeypatch.setenv("KLAB_REFERENCE", str(tmp_path / "no tables"))
    with pytest.raises(UsageError):
        klab("--results", store, "--out", tmp_path / "page.html", "--reference")


def test_open_shows_the_page_or_says_where_it_is(
    store: Path, tmp_path: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, opened = tmp_path / "a page.html", list[str]()
    monkeypatch.setattr(webbrowser, "open", lambda address: bool(opened.append(address)))
    done = klab("--results", store, "--out", out, "--open")
    assert done.exit_code == 0 and opened == [out.as_uri()] and "there is no browser here" in done.stderr and str(out) in done.stderr
    monkeypatch.setattr(webbrowser, "open", lambda address: True)
    assert "no browser" not in klab("--results", store, "--out", out, "--open").stderr


def test_two_runs_on_one_page(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "compared.html"
    done = klab("--results", store, "--compare", "run-1", "again-2", "--out", out, "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == 0 and told["page"] == str(out) and "run-1" in told["a"] and "again-2" in told["b"] and out.exists()
    with pytest.raises(UsageError, match="--compare says what is read"):
        klab("--results", store, "--compare", "run-1", "again-2", "--runs", "latest")


def test_a_notebook_beside_the_page(store: Path, tmp_path: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from klab.harness.report import notebook

    monkeypatch.setattr(notebook, "write_notebook", lambda story, path, **_: path.write_text(f"{len(story.subjects)} chip"))
    done = klab("--results", store, "--out", tmp_path / "page.html", "--notebook", tmp_path / "book.ipynb")
    assert done.exit_code == 0 and (tmp_path / "book.ipynb").read_text() == "1 chip" and "book.ipynb" in done.stderr
    with pytest.raises(UsageError, match=r"end in \.ipynb"):
        klab("--results", store, "--notebook", "book.html")


def test_nothing_measured_is_a_page_that_says_so(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = klab("--results", tmp_path, "--out", out)
    assert done.exit_code == 0 and "no results in" in done.stderr and "There are no results to show yet" in out.read_text()


def test_bad_requests(tmp_path: Path) -> None:
    for words in (["--chip", "tpu"], ["--results", tmp_path / "nowhere"], ["--model", "nobody"], ["--isl", "512"]):
        with pytest.raises(UsageError):
            klab(*words)
