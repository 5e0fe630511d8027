"""Time, memory and size of a page from 5,000 and from 1,000,000 Results, each in a process of its own.

python -m pytest ci/overheads/test_report_scale.py --benchmark-enable -s

The million takes 2 GB of disk with 20 rounds per row, 6 GB with 100, as JSON lines; packed and compacted far less.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "tests" / "harness"))
THOUSANDS, MILLION = 5_000, 1_000_000
PAGE_BYTES, MEMORY_MB = 8e6, 2000.0
# (rows, rounds, form): the seconds that a page may take on two cores.
CASES: dict[tuple[int, int, str], float] = {
    (THOUSANDS, 20, "jsonl"): 10.0,
    (THOUSANDS, 100, "jsonl"): 10.0,
    (MILLION, 20, "jsonl"): 60.0,
    (MILLION, 20, "jsonl.gz"): 60.0,
    (MILLION, 20, "parquet"): 60.0,
    (MILLION, 100, "jsonl"): 60.0,
}


def written(folder: Path, rows: int, rounds: int, form: str) -> float:
    """A store of this form; its megabytes."""
    from made_store import write_store

    write_store(folder, rows, rounds=rounds, packed=form == "jsonl.gz")
    if form == "parquet":
        _to_parquet(folder)
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e6


def _to_parquet(folder: Path) -> None:
    """What `klab results --compact` makes of the files, without the check of every row, which takes minutes."""
    import duckdb

    from klab.harness.store.schema import COLUMNS

    columns = ", ".join(f"'{name}': '{kind}'" for name, kind in COLUMNS.items())
    files = sorted(folder.iterdir())
    for start in range(0, len(files), 25):
        names = [str(path) for path in files[start : start + 25]]
        with duckdb.connect(config={"threads": 2, "memory_limit": "1GB", "temp_directory": str(folder / "spill")}) as db:
            source = f"read_json({names}, format = 'newline_delimited', columns = {{{columns}}})"
            db.execute(f"COPY (SELECT * FROM {source}) TO '{folder}/compact-{start:05d}.parquet' (FORMAT parquet, COMPRESSION zstd)")
        for path in files[start : start + 25]:
            path.unlink()


def child(folder: str, page: str) -> None:
    """Print one JSON line: what making the page takes."""
    started = time.perf_counter()
    from klab.harness.choose.profile import write_text
    from klab.harness.report.page import render
    from klab.harness.report.write import story_from
    from klab.kernels.discover import discover

    story = story_from([Path(folder)], catalogue=discover())
    told = time.perf_counter()
    write_text(Path(page), render(story))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {
        "seconds": time.perf_counter() - started,
        "story_s": told - started,
        "rss_mb": peak / (1e6 if sys.platform == "darwin" else 1e3),
        "page_mb": Path(page).stat().st_size / 1e6,
        "standing": sum(story.statuses.values()),
        "choices": sum(len(subject.profile.choices) for subject in story.subjects),
    }
    print(json.dumps(found))


def measured(folder: Path, page: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, str(folder), str(page)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", list(CASES), ids=lambda case: f"{case[0]} rows of {case[1]} rounds, {case[2]}")
def test_a_page_of_a_store(benchmark: Any, case: tuple[int, int, str], tmp_path: Path) -> None:
    megabytes = written(tmp_path / "store", *case)
    found = benchmark.pedantic(measured, args=(tmp_path / "store", tmp_path / "page.html"), rounds=1)
    benchmark.extra_info.update(found)
    print(
        f"\n{case[0]:,} rows of {case[1]} rounds as {case[2]} ({megabytes:,.0f} MB): {found['seconds']:.1f} s ({found['story_s']:.1f} s "
        f"until the story is told), {found['rss_mb']:,.0f} MB at the peak, a page of {found['page_mb']:.1f} MB with "
        f"{found['choices']} choices from {found['standing']:,} rows that stand"
    )
    for path in (tmp_path / "store").iterdir():
        path.unlink()
    assert found["page_mb"] * 1e6 < PAGE_BYTES and found["rss_mb"] < MEMORY_MB and found["seconds"] < CASES[case]


if __name__ == "__main__":
    child(*sys.argv[1:])
