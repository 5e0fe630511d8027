"""The pipes: a worker answers whatever its kernels print, dies alone, and leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from klab.harness.measure.client import WorkerClient, WorkerDied, WorkerHung, scrubbed
from klab.harness.plan.trial import Policy
from klab.kernels.contract import Chip
from klab.kernels.discover import discover
from klab.kernels.errors import CannotMeasure, UsageError
from klab.kernels.matmul.problem import Matmul

CONTESTANTS = Path(__file__).with_name("contestants")
CHIP = Chip("cpu", "CPU", "cpu", 1, 2000, 2000, {"float32": 0.05}, 8 << 30, 10.0, 1 << 18)
PROBLEM = Matmul(8, 48, 64, "float32")
POLICY = Policy(warmup_ms=1.0, round_ms=0.2, threads=1)


@pytest.fixture(scope="module")
def client():
    client = WorkerClient(CHIP, kernel_dirs=[CONTESTANTS])
    yield client
    client.kill()


@pytest.fixture(scope="module")
def kernels():
    return discover([CONTESTANTS]).kernels


def open_problem(client):
    client.start()
    return client.ask("open", limit_s=60, operator="matmul", problem=PROBLEM.to_json(), policy=POLICY.to_json())


def prepare(client, kernels, name, limit_s=60.0):
    kernel = kernels[f"matmul/{name}"]
    return client.ask(
        "prepare", limit_s=limit_s, slot=0, kernel=kernel.id, source_digest=kernel.source_digest, config={}, policy=POLICY.to_json()
    )


def test_a_chatty_kernel_does_not_disturb_the_answers(client, kernels):
    assert open_problem(client)["status"] == "ok"
    assert prepare(client, kernels, "chatty")["status"] == "ok"
    for _ in range(20):
        assert client.ask("sample", limit_s=30, slot=0)["us"] > 0


def test_hello_tells_the_environment_and_the_kernels(client):
    client.start()
    assert client.kernels["matmul/good"] == {"backend": "torch", "library": True}
    assert client.environment["kind"] == "cpu"
    assert client.environment["torch"]
    assert os.uname().nodename not in json.dumps(client.environment)


@pytest.mark.parametrize(("name", "how"), [("aborts", "SIGABRT"), ("segfaults", "SIGSEGV"), ("scribbles", "something else than an answer")])
def test_a_kernel_that_kills_its_process_kills_no_other(client, kernels, name, how):
    open_problem(client)
    with pytest.raises(WorkerDied, match=how):
        prepare(client, kernels, name)
    assert not client.alive
    open_problem(client)
    assert prepare(client, kernels, "good")["status"] == "ok"


def test_a_hanging_kernel_is_killed_in_time(client, kernels):
    open_problem(client)
    pid = client.pid
    began = time.monotonic()
    with pytest.raises(WorkerHung, match="no answer to prepare within 1 s"):
        prepare(client, kernels, "hangs", limit_s=1.0)
    assert time.monotonic() - began < 60.0
    assert not exists(pid)


def test_a_worker_that_is_killed_from_outside_says_so(client, kernels):
    open_problem(client)
    os.kill(client.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match="SIGKILL"):
        prepare(client, kernels, "good")


def test_what_makes_no_sense_is_refused_and_the_worker_lives(client):
    client.start()
    with pytest.raises(UsageError, match="unknown operator 'nonsense'"):
        client.ask("open", limit_s=30, operator="nonsense", problem={}, policy={})
    with pytest.raises(CannotMeasure, match="unknown operation"):
        client.ask("exec", limit_s=30)
    assert client.alive


def test_a_worker_that_cannot_start_is_one_line(tmp_path):
    client = WorkerClient(CHIP, kernel_dirs=[CONTESTANTS, tmp_path / "absent"])
    with pytest.raises(UsageError, match="absent is not a folder"):
        client.start()
    client.kill()


def test_an_aborted_client_starts_no_more():
    client = WorkerClient(CHIP)
    client.abort()
    with pytest.raises(CannotMeasure):
        client.start()


def test_secrets_do_not_reach_the_worker():
    given = {"PATH": "/bin", "HF_TOKEN": "x", "AWS_SECRET_ACCESS_KEY": "y", "CUDA_HOME": "/c", "OMP_NUM_THREADS": "1", "SSH_AUTH_SOCK": "z"}
    assert scrubbed(given) == {"PATH": "/bin", "CUDA_HOME": "/c", "OMP_NUM_THREADS": "1"}


def test_a_worker_does_not_outlive_its_parent(tmp_path):
    script = f"""
import os
from klab.harness.measure.client import WorkerClient
from klab.kernels.contract import Chip
client = WorkerClient(Chip(**{CHIP.__dict__!r}))
client.start()
print(client.pid, flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    pid = int(done.stdout)
    for _ in range(600):
        if not exists(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the worker is still there after a minute")


def exists(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
