"""`klab results`: filters, the three forms, and what is said when there is nothing."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path

import pytest
from click.testing import Result as Done
from made_results import contest, made
from typer.testing import CliRunner

from klab.harness.cli.main import build_app
from klab.harness.store.journal import Journal
from klab.harness.store.read import iter_results
from klab.kernels.errors import UsageError
from klab.kernels.matmul.problem import Matmul


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with Journal(tmp_path / "store", "run") as journal:
        for row in contest():
            journal.append(row)
        journal.append(dataclasses.replace(contest()[0], recorded_at="2026-11-19T00:00:00Z", error=0.0))
    return tmp_path / "store"


def ask(folder: Path, *words: str) -> Done:
    return CliRunner().invoke(build_app(), ["results", "--results", str(folder), *words], env={"COLUMNS": "200"})


def test_json_lines_are_rows(store: Path) -> None:
    rows = [json.loads(line) for line in ask(store, "--json").stdout.splitlines()]
    assert len(rows) == len(contest()) and {row["schema"] for row in rows} == {1}
    assert len(ask(store, "--json", "--all").stdout.splitlines()) == len(contest()) + 1, "history too"
    assert len(ask(store, "--json", "--limit", "3").stdout.splitlines()) == 3


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--operator", "matmul"], "operator", "matmul"),
        (["--kernel", "cuda_mma"], "kernel", "matmul/cuda_mma"),
        (["--kernel", "matmul/cuda_mma"], "kernel", "matmul/cuda_mma"),
        (["--status", "crashed"], "status", "crashed"),
        (["--chip", "h200", "--status", "incorrect"], "status", "incorrect"),
    ],
)
def test_filters(store: Path, words: list[str], name: str, value: str) -> None:
    rows = [json.loads(line) for line in ask(store, "--json", *words).stdout.splitlines()]
    assert rows and {row[name] for row in rows} == {value}


def test_csv_has_units_in_its_names(store: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(ask(store, "--csv").stdout)))
    assert len(rows) == len(contest()) and {"median_us", "gb_per_s", "power_w", "energy_j"} <= set(rows[0])
    crashed = next(row for row in rows if row["status"] == "crashed")
    assert crashed["median_us"] == "" and crashed["reason"] == "illegal memory access"


def test_the_table(store: Path) -> None:
    done = ask(store, "--operator", "matmul", "--limit", "4")
    assert done.exit_code == 0 and "matmul 1x2048x1024 bf16" in done.stdout and "more: --limit" in done.stderr


def test_brackets_in_names_are_text(tmp_path: Path) -> None:
    with Journal(tmp_path, "run") as journal:
        journal.append(made(Matmul(1, 2, 3), "odd", config={"tile": "[/bold]"}))
    assert "[/bold]" in ask(tmp_path).stdout


def test_unknown_names_list_the_known(store: Path) -> None:
    for words, said in ((["--kernel", "nope"], "cuda_mma"), (["--chip", "tpu"], "h200"), (["--status", "good"], "compile_error")):
        done = ask(store, *words)
        assert isinstance(done.exception, UsageError) and said in str(done.exception)
    assert isinstance(ask(store, "--json", "--csv").exception, UsageError)
    assert isinstance(ask(store, "--delete-originals").exception, UsageError)
    assert isinstance(ask(store / "nowhere").exception, UsageError)


def test_an_empty_store_says_what_to_do(tmp_path: Path) -> None:
    done = ask(tmp_path)
    assert done.exit_code == 0 and done.stdout == "" and "klab run" in done.stderr


def test_spoiled_files_are_told_on_stderr(store: Path) -> None:
    (store / "x.jsonl").write_text("???\n")
    done = ask(store, "--json")
    assert "x.jsonl: 1 skipped" in done.stderr and len(done.stdout.splitlines()) == len(contest())


def test_compaction(store: Path) -> None:
    assert "new rows in" in ask(store, "--compact").stderr
    assert len(list(store.glob("*.parquet"))) == 1 and len(list(store.glob("*.jsonl"))) == 1
    assert len(list(iter_results(store))) == len(contest()) + 1
