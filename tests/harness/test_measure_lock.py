import subprocess
import sys
import time

import pytest

from klab.harness.measure.lock import exclusive, lock_path
from klab.kernels.errors import CannotMeasure

HOLD = """
import sys, time
from klab.harness.measure.lock import exclusive
with exclusive("GPU-1"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KLAB_LOCK_DIR", str(tmp_path))


@pytest.fixture
def holder():
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_names_the_process_that_holds_it(holder):
    with pytest.raises(CannotMeasure, match=f"GPU-1 is being measured by process {holder.pid}"), exclusive("GPU-1"):
        pass


def test_other_devices_are_free(holder):
    with exclusive("GPU-2"):
        pass


def test_dies_with_its_process(holder):
    holder.kill()
    holder.wait()
    with exclusive("GPU-1"):
        pass


def test_waits_for_the_holder_to_end(holder):
    began = time.monotonic()
    with pytest.raises(CannotMeasure), exclusive("GPU-1", wait_s=0.2):
        pass
    assert time.monotonic() - began >= 0.2


def test_can_be_taken_again_after_release():
    for _ in range(2):
        with exclusive("cpu"):
            pass


def test_two_users_share_the_file():
    with exclusive("cpu"):
        assert lock_path("cpu").stat().st_mode & 0o777 == 0o666


def test_a_folder_that_is_gone_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    monkeypatch.setenv("KLAB_LOCK_DIR", str(tmp_path / "gone"))
    with pytest.raises(CannotMeasure, match="KLAB_LOCK_DIR"), exclusive("cpu"):
        pass


def test_a_link_is_not_followed(tmp_path):
    target = tmp_path / "precious"
    target.write_text("kept")
    lock_path("cpu").symlink_to(target)
    with pytest.raises(CannotMeasure, match="cannot lock"), exclusive("cpu"):
        pass
    assert target.read_text() == "kept"
