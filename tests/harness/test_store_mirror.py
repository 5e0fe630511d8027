"""The rules of a mirror: what changed on one side follows to the other, and nothing is lost. A folder stands for the object store."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest

from klab.harness.store.mirror import PROBE, Mirror
from klab.harness.store.urls import Url, is_url, reason
from klab.kernels.errors import CannotMeasure, UsageError

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "store" / "bucket" / "nightly"
    folder.mkdir(parents=True)
    return folder


def mirror(store: Path, machine: str = "a", name: str = "") -> Mirror:
    """The mirror of a machine; asked for again, it is another process of that machine."""
    root = store / name if name else store
    filesystem = fsspec.filesystem("file", auto_mkdir=True, skip_instance_cache=True)
    return Mirror(Url("s3", str(root)), store.parents[2] / f"mirror-{machine}{name}", filesystem)


def put(mirror: Mirror, name: str, text: str) -> Path:
    path = mirror.files / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def texts(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def age(path: Path) -> None:
    """As if it had been written an hour ago."""
    then = time.time() - 3600
    os.utime(path, (then, then))


def later(path: Path) -> None:
    """As if it had been written a second later: the clock of files moves in steps of some milliseconds."""
    then = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(then, then))


def test_what_one_machine_writes_another_reads(store: Path) -> None:
    a = mirror(store)
    put(a, "part.jsonl", "1\n")
    put(a, "calibration/gpu.json", "{}")
    put(a, ".hidden", "temporary")
    a.push()
    assert texts(store) == {"part.jsonl": "1\n", "calibration/gpu.json": "{}"}
    b = mirror(store, "b")
    b.pull()
    assert texts(b.files) == texts(store) and b.moved.down == 2 and not b.unsent()


def test_a_file_that_grew_is_uploaded_again_and_nothing_else_is(store: Path) -> None:
    a = mirror(store)
    put(a, "still.jsonl", "0\n")
    part = put(a, "part.jsonl", "1\n")
    a.push()
    with part.open("a") as file:
        file.write("2\n")
    assert a.unsent() == 1
    a.push()
    assert a.moved.up == 3 and texts(store)["part.jsonl"] == "1\n2\n"
    a.pull()
    assert a.moved.down == 0


def test_what_a_killed_process_left_behind_is_uploaded_by_the_next(store: Path) -> None:
    put(mirror(store), "part.jsonl", "1\n")
    later = mirror(store)
    later.pull()
    assert later.unsent() == 1
    later.push()
    assert texts(store) == {"part.jsonl": "1\n"}


def test_a_process_that_died_between_the_upload_and_its_note_of_it_doubles_nothing(store: Path) -> None:
    a = mirror(store)
    part = put(a, "part.jsonl", "1\n2\n")
    (store / "part.jsonl").write_text("1\n")  # uploaded, and then it grew
    again = mirror(store)
    again.pull()
    assert part.read_text() == "1\n2\n"
    again.push()
    assert texts(store) == {"part.jsonl": "1\n2\n"} and not again.unsent() and not again.moved.notes


@pytest.mark.parametrize("first", ["push", "pull"])
def test_two_machines_with_one_name_for_a_file_keep_both(store: Path, first: str) -> None:
    a, b = mirror(store), mirror(store, "b")
    put(a, "part.jsonl", "from a\n")
    put(b, "part.jsonl", "from b\n")
    a.push()
    getattr(b, first)()
    b.push()
    b.pull()
    found = texts(store)
    assert sorted(found.values()) == ["from a\n", "from b\n"] and found["part.jsonl"] == "from a\n"
    assert texts(b.files) == found and "both are kept" in b.moved.notes[0]
    assert all(name.endswith(".jsonl") for name in found)


def test_an_output_that_two_machines_made_anew_is_there_twice(store: Path) -> None:
    (store / "report.html").write_text("old")
    a, b = mirror(store), mirror(store, "b")
    for one in (a, b):
        one.pull()
    for one in (a, b):
        later(put(one, "report.html", f"of {one.folder.name}"))
        one.push()
    assert sorted(texts(store).values()) == ["of mirror-a", "of mirror-b"]


def test_an_output_that_one_machine_made_anew_replaces_the_old_one(store: Path) -> None:
    (store / "report.html").write_text("old")
    a = mirror(store)
    a.pull()
    later(put(a, "report.html", "new"))
    a.push()
    assert texts(store) == {"report.html": "new"}


def test_what_vanished_from_the_store_is_put_aside_and_not_uploaded_again(store: Path) -> None:
    a = mirror(store)
    age(put(a, "part.jsonl", "1\n"))
    a.push()
    (store / "part.jsonl").unlink()
    a.pull()
    assert not texts(a.files) and list(texts(a.folder / "gone").values()) == ["1\n"] and "no longer in" in a.moved.notes[0]
    a.push()
    assert not texts(store)


def test_what_vanished_and_may_have_its_writer_here_stays(store: Path) -> None:
    a = mirror(store)
    part = put(a, "part.jsonl", "1\n")
    a.push()
    (store / "part.jsonl").unlink()
    a.pull()
    with part.open("a") as file:
        file.write("2\n")
    a.push()
    assert texts(store) == {"part.jsonl": "1\n2\n"}


def test_a_damaged_state_costs_a_comparison_alone(store: Path) -> None:
    a = mirror(store)
    put(a, "part.jsonl", "1\n")
    a.push()
    (a.folder / "state.json").write_text('{"part.jsonl": [1,')
    again = mirror(store)
    again.pull()
    again.push()
    assert texts(store) == texts(again.files) == {"part.jsonl": "1\n"}


def test_names_from_the_store_cannot_leave_the_mirror(store: Path) -> None:
    a = mirror(store)
    keys = [
        "../../evil.jsonl",
        "/etc/evil.jsonl",
        "x/../../evil.jsonl",
        "fine.jsonl",
        "fine.jsonl/below.jsonl",
        "new\nline.jsonl",
        "n" * 300,
    ]
    a.fs.find = lambda root, detail: {f"{root}/{key}": {"size": 2, "type": "file", "ETag": "1"} for key in keys}
    asked: list[list[str]] = []

    def get(remote: list[str], local: list[str]) -> None:
        asked.append(remote)
        for path in local:
            Path(path).write_text("1\n")

    a.fs.get = get
    a.pull()
    assert asked == [[f"{store}/fine.jsonl"]] and list(texts(a.files)) == ["fine.jsonl"]
    assert len(a.moved.notes) == 6


def test_a_transfer_that_was_cut_short_is_done_again(store: Path) -> None:
    (store / "part.jsonl").write_text("1\n2\n")
    a = mirror(store)
    real = a.fs.get

    def short(remote: list[str], local: list[str]) -> None:
        for path in local:
            Path(path).write_text("1\n")

    a.fs.get = short
    a.pull()
    a.fs.get = real
    a.push()
    a.pull()
    assert texts(a.files) == texts(store) == {"part.jsonl": "1\n2\n"} and not a.unsent()


def test_a_folder_here_that_is_a_file_there_stops_nothing(store: Path) -> None:
    (store / "x").write_text("hostile")
    (store / "part.jsonl").write_text("1\n")
    a = mirror(store)
    put(a, "x/own.jsonl", "2\n")
    a.pull()
    assert texts(a.files) == {"part.jsonl": "1\n", "x/own.jsonl": "2\n"} and "x is left out" in a.moved.notes[0]


def test_sigterm_unwinds_a_process_that_follows_and_then_ends_it(store: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    a = mirror(store)
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with pytest.raises(SystemExit) as ended:
            a.follow(every_s=60)
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            put(a, "part.jsonl", "1\n")
            signal.raise_signal(signal.SIGTERM)
        assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        a.close()
        assert texts(store) == {"part.jsonl": "1\n"}
        a.follow(every_s=60)
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        a.close()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_full_disk_here_is_not_the_stores_fault_and_holds_back_no_upload(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = mirror(store)
    put(a, "part.jsonl", "1\n")
    a.pull()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr("klab.harness.store.mirror._save", full)
        with pytest.raises(CannotMeasure, match=r"cannot keep a mirror of .*No space left on device.*KLAB_MIRROR"):
            a.push()
    assert texts(store) == {"part.jsonl": "1\n"}
    a.fs.find = full  # as if a download had no room
    with pytest.raises(CannotMeasure, match=r"cannot keep a mirror of .*No space left"):
        a.pull()


def test_a_file_of_its_own(store: Path) -> None:
    (store / "beside.json").write_text("not mine")
    one = mirror(store, name="night.json")
    one.pull()
    assert one.path == one.files / "night.json" and not one.path.exists()
    put(one, "night.json", "{}")
    one.push()
    one.pull()
    assert texts(store) == {"night.json": "{}", "beside.json": "not mine"} and texts(one.files) == {"night.json": "{}"}


def test_ready_says_why_the_store_takes_nothing(store: Path) -> None:
    a = mirror(store)
    a.ready()
    assert not texts(store)

    def refuse(path: str, data: bytes) -> None:
        raise PermissionError(13, "Forbidden by policy", path)

    a.fs.pipe_file = refuse
    with pytest.raises(CannotMeasure, match=r"cannot write s3://.*access was denied"):
        a.ready()
    assert PROBE not in texts(store)


def test_following_survives_a_store_that_is_away_for_a_while(store: Path) -> None:
    a = mirror(store)
    real, away = a.fs.pipe_file, [True]

    def sometimes(path: str, data: bytes, **how: str) -> None:
        if away[0]:
            raise TimeoutError("away")
        real(path, data, **how)

    a.fs.pipe_file = sometimes
    put(a, "part.jsonl", "1\n")
    a.follow(every_s=0.01)
    _until(lambda: a.trouble)
    assert "no connection" in a.trouble and not texts(store)
    away[0] = False
    _until(lambda: texts(store) == {"part.jsonl": "1\n"})
    a.close()


def test_a_disk_that_takes_no_mirror_is_one_line(store: Path) -> None:
    a = mirror(store)
    a.folder.parent.mkdir(exist_ok=True)
    a.folder.write_text("a file is in the way")
    with pytest.raises(CannotMeasure, match=r"cannot keep a mirror of .*KLAB_MIRROR"):
        a.pull()


def test_close_says_what_stays_here_and_where(store: Path) -> None:
    a = mirror(store)
    put(a, "part.jsonl", "1\n")

    def away(path: str, data: bytes, **how: str) -> None:
        raise ConnectionError("away")

    a.fs.pipe_file = away
    with pytest.raises(CannotMeasure, match=r"files kept in .*mirror-a.files: 1; the next klab command") as raised:
        a.close()
    assert str(store) in str(raised.value)
    again = mirror(store)
    again.close()
    assert texts(store) == {"part.jsonl": "1\n"}


AZURE = "abfs://container@account.dfs.core.windows.net/x"


@pytest.mark.parametrize(
    ("given", "shown"),
    [("s3://b/x/", "s3://b/x"), (Path("s3://b/x"), "s3://b/x"), ("S3://b//x", "s3://b/x"), (AZURE, AZURE)],
)
def test_urls_survive_a_path(given: Path | str, shown: str) -> None:
    assert is_url(given) and str(Url.parse(given)) == shown


@pytest.mark.parametrize("given", ["results", "/a/b", "./x", "C:/x", "a:b", "s3:", Path("x/s3:/b")])
def test_paths_are_no_urls(given: Path | str) -> None:
    assert not is_url(given)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("http://host/x", "no object store"),
        ("s3://AKIAKEY:topsecret@bucket/x", "credentials"),
        ("s3://topsecret@bucket/x", "credentials"),
        ("s3://bucket/x?X-Amz-Signature=topsecret", "one folder or file"),
        ("s3://bucket/*.jsonl", "one folder or file"),
        ("s3://bucket/../x", "names no bucket"),
        ("s3://bucket/\x1b[31m", "names no bucket"),
        ("simplecache::s3://b/x", "is no URL"),
    ],
)
def test_urls_that_are_refused(given: str, why: str) -> None:
    with pytest.raises(UsageError, match=why) as raised:
        Url.parse(given)
    assert "topsecret" not in str(raised.value) and "\x1b" not in str(raised.value)


def test_the_text_of_a_services_error_is_not_repeated() -> None:
    botocore = pytest.importorskip("botocore.exceptions")
    answer = {"Error": {"Code": "SignatureDoesNotMatch", "Message": "AKIAKEY topsecret", "AWSAccessKeyId": "AKIAKEY"}}
    told = [reason(botocore.ClientError(answer, "PutObject"))]
    outer = PermissionError("AKIAKEY topsecret")
    outer.__cause__ = botocore.ClientError(answer, "PutObject")
    told.append(reason(outer))
    told.append(reason(botocore.EndpointConnectionError(endpoint_url="https://AKIAKEY:topsecret@host:9/b?sig=topsecret")))
    told.append(reason(RuntimeError("AKIAKEY topsecret")))
    assert told[0] == "the service answered SignatureDoesNotMatch" and "host:9" in told[2]
    assert not any("topsecret" in one or "AKIAKEY" in one for one in told)


def _until(true: object, limit_s: float = 120.0) -> None:
    assert callable(true)
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.01)
