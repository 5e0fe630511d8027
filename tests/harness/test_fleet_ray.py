"""A real Ray cluster of four nodes on this machine, with made-up accelerators: who measures what, and what dies with whom.

Nothing here waits without a limit, and no limit is near what a busy machine takes; where Ray is absent, all is skipped.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from fault_table import fault

from klab.harness.fleet import ray_fleet
from klab.harness.fleet.open import open_fleet
from klab.harness.fleet.parcel import klab_digest
from klab.harness.fleet.ray_fleet import RayFleet
from klab.harness.measure import environment
from klab.harness.plan.trial import Policy, Trial
from klab.harness.store.read import ReadReport, iter_results
from klab.harness.store.result import Status
from klab.harness.tune import remote_compiler
from klab.harness.tune.remote_compiler import remote_compilers
from klab.kernels.contract import Chip
from klab.kernels.discover import discover
from klab.kernels.errors import CannotMeasure
from klab.kernels.matmul.problem import Matmul

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'kernel-lab[ray]'")
pytestmark = pytest.mark.timeout(400)

FAKE_A = Chip("fakea", "Fake A", "cpu", 1, 2000, 2000, {"float32": 0.05}, 8 << 30, 10.0, 1 << 18)
FAKE_B = dataclasses.replace(FAKE_A, name="fakeb", title="Fake B")
H200 = dataclasses.replace(FAKE_A, name="h200", title="NVIDIA H200", kind="cuda", compute_capability=(9, 0))
POLICY = Policy(warmup_ms=1.0, round_ms=0.3, min_rounds=6, max_rounds=10, limit_s=5.0, threads=1)
# A second for each trial, whatever its noise: time enough to kill somebody.
SLOW = Policy(**{**POLICY.to_json(), "max_rounds": 10**6, "target_ci": 1e-9, "limit_s": 1.0})
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
SECRET = "KLAB_TEST_TOKEN"
# Longer than anything here takes on a machine whose cores are wanted by many.
AMPLE_S = 180.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head with a CPU alone, two nodes with a "Fake A" each, one with a "Fake B". Every node has locks of its own."""
    from ray.cluster_utils import Cluster

    # Whoever runs this may have a token of Ray's in his home, or none.
    before, sigterm = dict(os.environ), signal.getsignal(signal.SIGTERM)
    # Processes that Ray starts in advance are not needed, and cost what the tests take.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_prestart_worker_first_driver": "0"}
    os.environ.pop("RAY_ADDRESS", None)

    def variables():
        return {"KLAB_LOCK_DIR": str(tmp_path_factory.mktemp("locks")), "AWS_SECRET_ACCESS_KEY": SECRET, "RAY_worker_niceness": "0"}

    made = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    nodes = {}
    try:
        # A head that is started in this process takes SIGTERM for itself, for all tests that follow.
        signal.signal(signal.SIGTERM, sigterm)
        for name, kind in (("a1", "FAKEA"), ("a2", "FAKEA"), ("b", "FAKEB")):
            nodes[name] = made.add_node(**NODE, resources={f"accelerator_type:{kind}": 1}, env_vars=variables(), wait=False)
        made.wait_for_nodes(timeout=AMPLE_S)
        yield SimpleNamespace(ray=made, address=made.address, nodes=nodes)
    finally:
        with suppress(Exception):
            ray.shutdown()
        made.shutdown()
        signal.signal(signal.SIGTERM, sigterm)
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def fleet(cluster):
    """One for all tests that measure: a worker takes seconds to start."""
    with RayFleet([FAKE_A, FAKE_B], "r", address=cluster.address, place_s=AMPLE_S) as made:
        yield made


@pytest.fixture(autouse=True)
def _a_busy_machine(monkeypatch):
    """Nothing is given up because this machine is slow, and sources that somebody edits meanwhile are read anew."""
    klab_digest.cache_clear()
    monkeypatch.setattr(ray_fleet, "STRAGGLERS_S", AMPLE_S)
    monkeypatch.setattr(remote_compiler, "COME_UP_S", AMPLE_S)


@pytest.fixture(scope="module")
def kernel():
    return discover(only=["matmul"]).kernels["matmul/torch_matmul"]


def trials(kernel, chip, shapes, policy=POLICY):
    problems = [Matmul(m, 48, 64, "float32") for m in shapes]
    return [Trial.of(kernel, problem, kernel.default(problem, chip), chip.name, policy) for problem in problems]


def keys(rows):
    return sorted(row.key for row in rows)


def children(pid):
    """The measuring processes that an actor has started."""
    with suppress(OSError):
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return []


def gone(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def seat_on(fleet, cluster, name):
    return next(seat for seat in fleet._seats if seat.place.node.id == cluster.nodes[name].node_id)


def test_trials_of_two_chips_go_where_they_belong_and_give_the_same_rows(fleet, cluster, kernel):
    wanted = [*trials(kernel, FAKE_A, [4, 8, 16]), *trials(kernel, FAKE_B, [4, 8])]
    told = []
    summary = fleet.run(wanted, told.append)
    assert keys(told) == keys(wanted) and summary.by_status == {Status.OK: 5} and summary.notes == [] and fleet.size == 3
    assert {(row.key, row.chip) for row in told} == {(trial.key, trial.chip) for trial in wanted}
    facts = {**environment.software(), **environment.host(), "kind": "cpu", "threads": 1}
    for row in told:
        assert row.epoch == environment.epoch(facts) and row.run_id == "r" and row.checks and row.median_us
        assert facts.items() <= dict(row.environment).items() and environment.checkout().keys() <= row.environment.keys()
        assert row.build["contest"]["contestants"] == 1 and row.device == environment.cpu_model()
    pids = [seat.hello["pid"] for seat in fleet._seats]
    assert all(SECRET.encode() in Path(f"/proc/{pid}/environ").read_bytes() for pid in pids), "the nodes do have a secret"
    workers = [worker for pid in pids for worker in children(pid)]
    assert len(workers) == 3
    assert not any(SECRET.encode() in Path(f"/proc/{worker}/environ").read_bytes() for worker in workers)


def strike(seat, method, blow):
    """Do it once, when the seat's node has answered: "begin" is before any row was told, "next" mostly in the midst of the measuring."""
    asks = seat._ask

    def ask(asked, *arguments, **limits):
        answer = asks(asked, *arguments, **limits)
        if asked == method:
            seat._ask = asks
            blow()
        return answer

    seat._ask = ask


def test_a_worker_that_is_killed_costs_no_row(fleet, cluster, kernel):
    wanted = trials(kernel, FAKE_B, [20], SLOW)
    seat, told = seat_on(fleet, cluster, "b"), []
    (worker,) = children(seat.hello["pid"])
    strike(seat, "next", lambda: os.kill(worker, signal.SIGKILL))
    fleet.run(wanted, told.append)
    assert keys(told) == keys(wanted) and {row.status for row in told} == {fault("ray-worker").row} and gone(worker)


def test_an_actor_that_is_killed_is_started_again(fleet, cluster, kernel):
    wanted = trials(kernel, FAKE_B, [28])
    seat, told = seat_on(fleet, cluster, "b"), []
    actor = seat.hello["pid"]
    strike(seat, "begin", lambda: os.kill(actor, signal.SIGKILL))
    fleet.run(wanted, told.append)
    declared = fault("ray-actor")
    assert keys(told) == keys(wanted) and {row.status for row in told} == {declared.row}
    assert seat.hello["pid"] != actor
    assert any(re.search(rf"was lost \(.+\); {declared.says}", note) for note in fleet.notes), fleet.notes


def test_a_node_that_dies_in_the_middle_loses_nothing_and_doubles_nothing(fleet, cluster, kernel, capsys):
    wanted = trials(kernel, FAKE_A, [40, 41, 42, 43], SLOW)
    dying, told = seat_on(fleet, cluster, "a1"), []
    strike(dying, "begin", lambda: cluster.ray.remove_node(cluster.nodes["a1"], allow_graceful=False))
    summary = fleet.run(wanted, told.append)
    assert keys(told) == keys(wanted), "each once"
    declared = fault("ray-node")
    assert {row.status for row in told} == {declared.row} and summary.unfinished == [] and summary.stopped == ""
    assert [note for note in summary.notes if "was lost" in note and declared.says in note]
    assert dying.lost
    assert capsys.readouterr().out == "", "standard output is for rows"


def test_refreshing_ends_the_workers_and_keeps_the_devices(fleet):
    before = {worker for seat in fleet._seats if not seat.lost for worker in children(seat.hello["pid"])}
    fleet.refresh()
    assert before and all(gone(worker) for worker in before)
    assert all(not gone(seat.hello["pid"]) for seat in fleet._seats if not seat.lost), "the actors stay, and with them the locks"


def test_a_chip_that_the_cluster_lacks_is_an_error_before_anything_starts(cluster):
    with pytest.raises(CannotMeasure, match=r"the cluster has no NVIDIA H200 \(it has .*1 node with 1 x FAKEB"):
        open_fleet("ray", [FAKE_B, H200], "r", address=cluster.address)


def test_a_node_with_another_klab_does_not_measure(fleet, cluster, kernel, monkeypatch):
    fleet.close()  # its actors hold the devices
    monkeypatch.setattr(ray_fleet, "klab_digest", lambda: "another")
    with (
        RayFleet([FAKE_B], "r", address=cluster.address) as strict,
        pytest.raises(CannotMeasure, match=r"has other sources of klab \(at .*, here .*\)"),
    ):
        strict.run(trials(kernel, FAKE_B, [4]), pytest.fail)


def test_a_device_that_somebody_else_has_is_not_waited_for_for_ever(cluster, kernel):
    class Somebody:
        def here(self):
            return True

    with RayFleet([FAKE_B], "r", address=cluster.address, place_s=2.0) as late:
        holder = ray.remote(Somebody).options(num_cpus=0, resources={"accelerator_type:FAKEB": 1}).remote()
        assert ray.get(holder.here.remote(), timeout=AMPLE_S)
        with pytest.raises(CannotMeasure, match="the device was not free in time"):
            late.run(trials(kernel, FAKE_B, [4]), pytest.fail)


def test_nodes_without_gpus_compile(cluster, kernel):
    with (
        RayFleet([FAKE_B], "r", address=cluster.address) as made,
        remote_compilers(made, FAKE_B, [], 1 << 30) as makers,
    ):
        assert made.notes == [] and len(makers) == 1
        compiler = makers[0]()
        (trial,) = trials(kernel, FAKE_B, [4])
        assert compiler.ask(trial, AMPLE_S)["status"] == "ok"
        compiler._make_local = lambda: SimpleNamespace(ask=lambda *_: {"status": "here"}, kill=lambda: None, close=lambda: None)
        ray.kill(compiler._actor)
        assert compiler.ask(trial, AMPLE_S)["status"] == "here", "this machine compiles in its place"


DRIVER = """
import sys
sys.path.insert(0, {tests!r})
import test_fleet_ray as t
kernel = t.discover(only=["matmul"]).kernels["matmul/torch_matmul"]
endless = t.Policy(**{{**t.SLOW.to_json(), "limit_s": 1e6}})
fleet = t.open_fleet("ray", [t.FAKE_B], "r", address={address!r})
fleet.environment()
actor = fleet._seats[0].hello["pid"]
print(actor, *t.children(actor), flush=True)
fleet.run(t.trials(kernel, t.FAKE_B, [4], endless), print)
"""


def test_when_the_driver_dies_so_do_its_actors_and_their_workers(cluster):
    script = DRIVER.format(tests=str(Path(__file__).parent), address=cluster.address)
    driver = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(pids) == 2 and not any(gone(pid) for pid in pids)
    finally:
        driver.kill()
        driver.wait(timeout=AMPLE_S)
    until = time.monotonic() + AMPLE_S / 2
    while not all(gone(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert all(gone(pid) for pid in pids)


CHIP_FILE = """
name = "{name}"
kind = "cpu"
sm_count = 1
spec_clock_mhz = 2000
max_clock_mhz = 2000
memory_bytes = 8000000000
memory_gb_per_s = 10
l2_bytes = 262144
[peak_tflops]
float32 = 0.05
bfloat16 = 0.05
"""


def test_the_verb_measures_two_chips_in_one_run(cluster, klab, tmp_path):
    for name in ("fakea", "fakeb"):
        (tmp_path / f"{name}.toml").write_text(CHIP_FILE.format(name=name))
    chips = f"{tmp_path / 'fakea.toml'},{tmp_path / 'fakeb.toml'}"
    shared = ("--model", "qwen3-0.6b", "--phase", "decode", "--batch", "1", "--kernel", "activation/torch_activation", "--chip", chips)
    where = ("--results", tmp_path / "rows", "--fleet", "ray", "--address", cluster.address)
    code, out, err = klab("measure", *shared, *where, "--json")
    assert code == 0, err
    rows = list(iter_results([tmp_path / "rows"], ReadReport()))
    assert {row.chip for row in rows} == {"fakea", "fakeb"} and {row.status for row in rows} == {Status.OK}
    told = [json.loads(line) for line in out.splitlines()]
    assert {item["chip"] for item in told if "chip" in item} == {"fakea", "fakeb"}
    assert [item["new"] for item in told if item.get("type") == "outcome"] == [{"ok": 2}]
