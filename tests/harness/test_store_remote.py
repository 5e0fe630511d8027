"""Results behind s3:// URLs, against a local S3 server: run, kill, resume, two writers, a bucket that is not there, and no secrets."""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_results import made
from tiny_model import CONFIG

from klab.harness.store import journal as journals
from klab.harness.store import remote
from klab.harness.store.journal import Journal
from klab.harness.store.mirror import PROBE
from klab.harness.store.read import ReadReport, iter_results
from klab.kernels.errors import CannotMeasure
from klab.kernels.matmul.problem import Matmul

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

Klab = Callable[..., tuple[int | str, str, str]]

KEY, SECRET = "AKIAEXAMPLEKEYID", "s3cr3tExampleAccessKey"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    made_server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    made_server.start()
    host, port = made_server.get_host_and_port()
    yield f"http://{host}:{port}"
    made_server.stop()


@pytest.fixture
def bucket(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty folder in a bucket, reached with credentials from the environment; its machine has an empty mirror."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    settings = {
        "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": server,
        "AWS_CONFIG_FILE": str(tmp_path / "none"), "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true", "KLAB_MIRROR": str(tmp_path / "mirror"),
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    files = store()
    if not files.exists("nights"):
        files.mkdir("nights")
    yield f"s3://nights/{tmp_path.name}"
    remote._open.clear()


@functools.cache
def store():
    """The server as the tests look at it: one client, because making one takes half a second."""
    import fsspec

    return fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)


def objects(url: str) -> dict[str, bytes]:
    root = url.removeprefix("s3://")
    found = [key for key in store().find(root) if not key.endswith(PROBE)]  # which comes and goes
    return {key.removeprefix(root + "/"): content for key, content in store().cat(found, on_error="omit").items()} if found else {}


def another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    remote._open.clear()
    monkeypatch.setenv("KLAB_MIRROR", str(tmp_path / name))


def seeds(url: str) -> list[int]:
    """Which made-up rows are in the store, as a machine without a mirror reads it."""
    rows, report = [], ReadReport()
    for n, content in enumerate(objects(url).values()):
        path = Path(os.environ["KLAB_MIRROR"]).parent / f"check-{n}.jsonl"
        path.write_bytes(content)
        rows += list(iter_results(path, report))
    assert not report.skipped
    return sorted(int(row.recorded_at[-3:-1]) for row in rows)


def write(url: str, numbers: list[int], run_id: str = "run") -> Journal:
    journal = Journal(remote.local_of(url), run_id)
    journal.ready()
    for n in numbers:
        journal.append(made(Matmul(1, 64, 64), seed=n))
    return journal


def test_a_run_is_known_to_the_next_machine(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, klab: Klab) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    asked = (
        "--model",
        tmp_path / "config.json",
        "--chip",
        "cpu",
        "--isl",
        "32",
        "--osl",
        "8",
        "--batch",
        "2",
        "--phase",
        "decode",
        "-k",
        "norm/torch_norm",
    )
    code, out, err = klab("measure", *asked, "--results", bucket, "--json")
    first = [json.loads(line) for line in out.splitlines()][-1]
    assert code == 0 and first["results"] == bucket and first["new"]["ok"] > 0, err
    parts = objects(bucket)
    assert len(parts) == 1 and next(iter(parts.values())).count(b"\n") == first["new"]["ok"]
    assert "uploaded" in err

    another_machine(monkeypatch, tmp_path, "second")
    monkeypatch.setenv("KLAB_RESULTS", bucket)
    # What a worker of its own would say after four seconds.
    epoch = json.loads(next(iter(parts.values())).splitlines()[0])["epoch"]
    monkeypatch.setattr("klab.harness.tune.job.Job.epochs", lambda *_: [epoch])
    code, out, second_err = klab("measure", *asked, "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["known"] == first["new"]["ok"] and objects(bucket) == parts
    code, out, _ = klab("results", "--json")
    assert code == 0 and len(out.splitlines()) == first["new"]["ok"]
    code, _, told = klab("choose", "--chip", "cpu", "--out", f"{bucket}/packs/tiny.json")
    assert code == 0 and b'"choices"' in objects(bucket)["packs/tiny.json"] and f"{bucket}/packs/tiny.json" in told

    kept = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()] + list(objects(bucket).values())
    words = (err + second_err + out + told).encode()
    assert kept and not any(secret.encode() in text for text in [*kept, words] for secret in (KEY, SECRET))


WRITER = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[3])
from klab.harness.store import remote
from klab.harness.store.journal import Journal
from klab.kernels.matmul.problem import Matmul
from made_results import made
journal = Journal(remote.local_of(sys.argv[1]), "run")
mirror = remote.mirror_of(journal.folder)
mirror.follow(every_s=float(sys.argv[2]))
journal.ready()
for n in (1, 2, 3):
    journal.append(made(Matmul(1, 64, 64), seed=n))
print("written", flush=True)
time.sleep(60)
"""


def start_writer(url: str, every_s: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, url, str(every_s), str(Path(__file__).parent)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_rows_are_uploaded_while_the_run_goes_on(bucket: str, tmp_path: Path) -> None:
    writer = start_writer(bucket, 0.05)
    try:
        end = time.monotonic() + 60
        while not objects(bucket) or seeds(bucket) != [1, 2, 3]:
            assert time.monotonic() < end and writer.poll() is None
            time.sleep(0.05)
    finally:
        kill(writer)
    write(bucket, [4], "resumed")
    remote.settle()
    assert seeds(bucket) == [1, 2, 3, 4]


def test_what_a_kill_left_in_the_mirror_is_uploaded_by_the_next_run(bucket: str) -> None:
    kill(start_writer(bucket, 3600))
    assert not objects(bucket)
    folder = remote.local_of(bucket)
    assert seeds(bucket) == [1, 2, 3]
    assert len(list(iter_results(folder))) == 3 and remote.shown(folder) == bucket


def test_two_machines_whose_part_files_have_one_name(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write(bucket, [1, 2])
    one = remote.mirror_of(first.folder)
    another_machine(monkeypatch, tmp_path, "second")
    second = write(bucket, [3])
    assert one is not None and first.path is not None and second.path is not None and first.path.name == second.path.name
    one.close()
    assert any("both are kept" in line for line in remote.settle())
    assert seeds(bucket) == [1, 2, 3]
    first.append(made(Matmul(1, 64, 64), seed=4))
    one.close()
    assert seeds(bucket) == [1, 2, 3, 4]


def test_two_machines_that_replace_one_object_at_once_keep_both(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second looks, the first writes, the second writes: its look is outdated."""
    store().pipe_file(f"{bucket}/page.html", b"old")
    machines = []
    for name in ("first", "second"):
        another_machine(monkeypatch, tmp_path, name)
        (remote.local_of(bucket) / "page.html").write_text(f"of the {name}")
        machines.append(remote.mirror_of(remote.local_of(bucket)))
    first, second = machines
    assert first is not None and second is not None
    look, meanwhile = second.fs.info, [first.push]

    def info(key: str) -> object:
        found = look(key)
        while meanwhile:
            meanwhile.pop()()
        return found

    second.fs.info = info
    second.push()
    assert sorted(objects(bucket).values()) == [b"of the first", b"of the second"] and objects(bucket)["page.html"] == b"of the first"


def test_a_page_is_named_by_its_url(bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from klab.harness.cli import run

    monkeypatch.setattr("klab.harness.report.write.write_report", lambda *_, **__: None)
    setup, job = SimpleNamespace(chip=SimpleNamespace(name="h200", kind="cuda"), plan=None, catalogue=None), SimpleNamespace(sources=list)
    run._report([setup], job, remote.local_of(bucket) / "page.html", as_json=True)  # type: ignore[list-item, arg-type]
    assert json.loads(capsys.readouterr().out)["page"] == f"{bucket}/page.html"


def test_a_long_run_has_parts_of_a_bounded_size(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "REMOTE_PART_BYTES", 3000)
    write(bucket, list(range(8)))
    remote.settle()
    assert seeds(bucket) == list(range(8))
    assert len(objects(bucket)) > 2 and max(map(len, objects(bucket).values())) < 7000


def test_a_bucket_that_goes_away_costs_no_row(bucket: str, server: str, monkeypatch: pytest.MonkeyPatch, klab: Klab) -> None:
    journal = write(bucket, [1])
    mirror = remote.mirror_of(journal.folder)
    assert mirror is not None
    with monkeypatch.context() as away:
        away.setattr(mirror.fs, "pipe_file", _refused)
        journal.append(made(Matmul(1, 64, 64), seed=2))
        code, _, told = klab("chips")
    assert code == CannotMeasure.exit_code and "files kept in" in told and ": 1; the next klab command" in told
    remote.local_of(bucket)
    assert seeds(bucket) == [1, 2]


def _refused(*_: object, **__: object) -> None:
    raise ConnectionRefusedError("away")


@pytest.mark.parametrize(
    ("where", "endpoint", "code", "why"),
    [
        ("s3://nights/x", "http://127.0.0.1:9", 4, "no connection to 127.0.0.1:9"),
        ("s3://no-such-bucket/x", "", 4, "the bucket does not exist"),
        ("gs://nights/x", "", 2, "pip install gcsfs"),
        (f"s3://{KEY}:{SECRET}@nights/x", "", 2, "a URL with credentials is not read"),
        ("s3://nights/rows.jsonl", "", 2, "is a file; new results need a folder"),
    ],
)
def test_what_cannot_be_reached_is_told_before_anything_is_measured(
    bucket: str, monkeypatch: pytest.MonkeyPatch, klab: Klab, where: str, endpoint: str, code: int, why: str
) -> None:
    if where.startswith("gs"):
        monkeypatch.setitem(sys.modules, "gcsfs", None)
    if endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setattr("klab.harness.tune.job.Job.run", lambda *_: pytest.fail("it measured"))
    ended, out, err = klab("measure", "--model", "qwen3-0.6b", "--chip", "cpu", "--results", where)
    assert ended == code and why in " ".join(err.split()) and not out
    assert KEY not in err and SECRET not in err and "Traceback" not in err


def test_without_credentials_it_says_where_they_come_from(bucket: str, monkeypatch: pytest.MonkeyPatch, klab: Klab) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    code, _, err = klab("results", "--results", bucket)
    assert code == 4 and "no credentials were found; credentials come from" in err


def test_nothing_behind_a_url_is_a_usage_error(bucket: str, klab: Klab) -> None:
    code, _, err = klab("results", "--results", f"{bucket}/none")
    assert code == 2 and f"{bucket}/none holds nothing" in err


def test_kernels_come_from_this_machine_alone(bucket: str, klab: Klab) -> None:
    code, _, err = klab("measure", "--model", "qwen3-0.6b", "--chip", "cpu", "--kernels", f"{bucket}/kernels")
    assert code == 2 and "kernel files are code" in err


def test_nothing_is_deleted_behind_a_url(bucket: str, klab: Klab) -> None:
    pytest.importorskip("duckdb")
    write(bucket, [1, 2])
    remote.settle()
    code, _, err = klab("results", "--results", bucket, "--compact", "--delete-originals")
    assert code == 2 and "nothing is deleted behind a URL" in err
    code, _, err = klab("results", "--results", bucket, "--compact")
    assert f"{bucket}: 2 new rows in {bucket}/" in " ".join(err.split())
    assert code == 0 and sorted(Path(name).suffix for name in objects(bucket)) == [".jsonl", ".parquet"]
