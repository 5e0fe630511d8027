"""The profile as a file: the same choice gives the same bytes, a foreign file is a clear line, a full disk leaves the old one."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from made_results import contest

from klab.harness.choose.choose import choose
from klab.harness.choose.profile import Profile, profile_path, read_profile, write_text
from klab.kernels.errors import CannotMeasure, UsageError


def profile() -> Profile:
    return dataclasses.replace(choose(contest(), None), model="toy", scenario={"isl": 1024, "tp": 1})


def test_it_comes_back_and_is_stable(tmp_path: Path) -> None:
    first = profile()
    path = tmp_path / "tuned" / "h200" / "toy.json"
    write_text(path, first.to_text())
    back = read_profile(path)
    assert back is not None and back.to_text() == first.to_text()
    again = choose(contest(), None, previous=back)
    assert dataclasses.replace(again, model="toy", scenario={"isl": 1024, "tp": 1}).to_text() == first.to_text()


def test_the_text_is_for_review() -> None:
    text = profile().to_text()
    data = json.loads(text)
    assert text.startswith('{\n "schema": 1,\n') and text.endswith("}\n")
    first = data["choices"][0]
    assert {"kernel", "config", "source_digest", "evidence"} <= set(first)
    assert {"median_us", "interval_us", "runner_up", "library", "tied", "samples", "run_ids", "device", "epoch", "versions"} <= set(
        first["evidence"]
    )
    assert first["evidence"]["versions"]["torch"] == "2.13.0"
    labels = [c["wanted"]["label"] for c in data["choices"] if c["wanted"]["operator"] == "matmul"]
    assert [int(label.split()[1].split("x")[0]) for label in labels] == [1, 8, 64, 512, 4096]
    assert all(len(number.lstrip("0.-")) <= 12 for number in text.replace(",", "").split() if number.replace(".", "").isdigit())


def test_where_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert profile_path("h200", "qwen3-0.6b").parts[-4:] == ("profiles", "tuned", "h200", "qwen3-0.6b.json")
    assert profile_path("h200", "qwen3-0.6b", "energy").name == "qwen3-0.6b.energy.json"
    monkeypatch.setattr("klab.harness.choose.profile.checkout", lambda: None)
    assert profile_path("cpu", "m") == Path("klab-profiles/tuned/cpu/m.json")


def test_no_file_is_no_profile(tmp_path: Path) -> None:
    assert read_profile(tmp_path / "none.json") is None


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": 1}', '{"schema": 1, "choices": [1], "open": [], "notes": []}', "\0"])
def test_a_foreign_file_is_one_clear_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(UsageError, match="is not a profile that klab wrote") as caught:
        read_profile(tmp_path / "p.json")
    assert "\n" not in str(caught.value)


def test_a_newer_profile_says_to_update(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"schema": 9}')
    with pytest.raises(UsageError, match=r"schema 9.*update klab"):
        read_profile(tmp_path / "p.json")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot read"):
        read_profile(tmp_path / "p.json")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.json"
    write_text(path, "old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CannotMeasure, match="No space left on device"):
            write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(CannotMeasure, match="cannot write"):
        write_text(path / "below" / "x.json", "new")
