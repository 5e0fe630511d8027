"""`klab report` as its user runs it."""

from __future__ import annotations

import json
from pathlib import Path

from made_results import contest
from typer.testing import CliRunner

from klab.harness.cli.main import build_app
from klab.harness.store.journal import Journal
from klab.kernels.errors import UsageError


def test_the_verb(tmp_path: Path) -> None:
    with Journal(tmp_path / "store", "run") as journal:
        for row in contest():
            journal.append(row)
    out = tmp_path / "new" / "page.html"
    words = ["report", "--results", str(tmp_path / "store"), "--out", str(out), "--json"]
    done = CliRunner().invoke(build_app(), words, catch_exceptions=False)
    told = json.loads(done.stdout)
    assert done.exit_code == 0 and told["page"] == str(out) and told["chips"] == ["h200"] and told["results"]["ok"] == 64
    assert out.stat().st_size < 8e6 and "triton_split_kv" in out.read_text()


def test_nothing_measured_is_a_page_that_says_so(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = CliRunner().invoke(build_app(), ["report", "--results", str(tmp_path), "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0 and "no results in" in done.stderr and "There are no results to show yet" in out.read_text()


def test_bad_requests(tmp_path: Path) -> None:
    for words in (["--chip", "tpu"], ["--results", str(tmp_path / "nowhere")], ["--model", "nobody"]):
        done = CliRunner().invoke(build_app(), ["report", *words])
        assert isinstance(done.exception, UsageError)
