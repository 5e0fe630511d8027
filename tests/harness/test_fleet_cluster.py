"""What klab makes of a cluster's nodes, and what travels to them: no Ray needed."""

import dataclasses
import json
import socket
import threading
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from test_fleet_local import CHIP, CONTESTANTS, H200, trials

from klab.harness.fleet import cluster, ray_seat
from klab.harness.fleet.cluster import Node, chips_there, is_type, lacking, nodes_of, places, screeners
from klab.harness.fleet.open import Engine, open_fleet
from klab.harness.fleet.parcel import ToldQuarantine, klab_digest, order, pack_folders, trial_of, unpack_folders
from klab.harness.fleet.run import SeatLost, Wish
from klab.harness.measure.quarantine import Quarantine
from klab.harness.store.result import Result, Status
from klab.kernels.discover import discover
from klab.kernels.errors import CannotMeasure, UsageError

B200 = dataclasses.replace(H200, name="b200", title="NVIDIA B200 SXM 180 GB", compute_capability=(10, 0))


@pytest.fixture(scope="module")
def catalogue():
    return discover([CONTESTANTS])


def told(node_id, address, alive=True, labels=None, **resources):
    renamed = {name.replace("type_", "accelerator_type:"): amount for name, amount in resources.items()}
    return {"NodeID": node_id, "Alive": alive, "NodeManagerAddress": address, "Resources": renamed, "Labels": labels or {}}


MIXED = [
    told("d", "10.0.0.4", CPU=64.0, memory=8.0 * (2 << 30)),
    told("a", "10.0.0.1", GPU=8.0, CPU=128.0, type_H200=1.0),
    told("b", "10.0.0.2", GPU=4.0, CPU=128.0, type_B200=1.0),
    told("c", "10.0.0.3", GPU=8.0, CPU=128.0, type_GB200=1.0),
    told("x", "10.0.0.9", alive=False, GPU=8.0, type_H200=1.0),
    told("h", "10.0.0.5"),
]


def test_every_gpu_of_a_live_node_is_a_place_for_its_chip():
    found = places(nodes_of(MIXED), [H200, B200])
    assert [(place.chip, place.node.address) for place in found] == [("h200", "10.0.0.1")] * 8 + [("b200", "10.0.0.2")] * 4
    assert found[0].options == {"num_gpus": 1, "num_cpus": 0, "accelerator_type": "H200"}


@pytest.mark.parametrize(
    ("kind", "is_it"), [("H200", True), ("GH200", False), ("H20", False), ("h200", True), ("B200", False), ("", False)]
)
def test_a_type_of_rays_is_a_chip_by_its_whole_name(kind, is_it):
    assert is_type(H200, kind) is is_it


def test_a_label_serves_where_there_is_no_resource():
    (node,) = nodes_of([told("a", "10.0.0.1", GPU=2.0, labels={"ray.io/accelerator-type": "H200"})])
    assert node.described == "2 x H200" and len(places([node], [H200])) == 2


def test_a_chip_that_the_cluster_lacks_is_named_with_what_there_is():
    assert lacking(nodes_of(MIXED), [H200, B200]) == ""
    told_of = lacking(nodes_of(MIXED[:2]), [H200, B200])
    assert told_of == "the cluster has no NVIDIA B200 SXM 180 GB (it has 1 node with 64 CPUs, 1 node with 8 x H200)"
    assert "no live node" in lacking([], [H200])
    assert lacking(nodes_of([told("a", "10.0.0.1", GPU=8.0, CPU=8.0)]), [H200]).endswith("(it has 1 node with 8 x a GPU of unknown type)")


def test_a_cpu_is_measured_on_nodes_without_gpus_where_there_are_such():
    cpu = dataclasses.replace(CHIP, name="cpu")
    assert [(p.node.id, p.options) for p in places(nodes_of(MIXED), [cpu])] == [("d", {"num_cpus": 64})]
    assert [p.node.id for p in places(nodes_of(MIXED[1:3]), [cpu])] == ["a", "b"]
    fake = dataclasses.replace(CHIP, name="fakea", title="Fake A")
    with_fakes = nodes_of([*MIXED, told("f", "10.0.0.6", CPU=1.0, type_FAKEA=2.0)])
    assert [p.node.id for p in places(with_fakes, [fake])] == ["f", "f"]


def test_screening_takes_the_cpus_of_nodes_without_gpus_as_far_as_memory_goes():
    found = screeners(nodes_of(MIXED), 2 << 30)
    assert [place.node.id for place in found] == ["d"] * 8, "64 CPUs, and memory for 8 compilers"
    assert screeners(nodes_of(MIXED), 2 << 30, busy=["d"]) == []


def test_auto_is_every_chip_that_the_cluster_has():
    assert chips_there(nodes_of(MIXED)) == ["b200", "h200"]
    assert chips_there(nodes_of(MIXED[:1])) == ["cpu"]
    with pytest.raises(CannotMeasure, match="1 x L4, which the catalogue does not know"):
        chips_there(nodes_of([told("a", "10.0.0.1", GPU=1.0, type_L4=1.0)]))


def test_an_engine_is_one_of_two_and_names_its_chips(monkeypatch):
    with pytest.raises(UsageError, match="--fleet slurm: klab has local and ray"):
        Engine("slurm")
    with pytest.raises(UsageError, match="add --fleet ray"):
        Engine("local", "10.0.0.1:6379")
    assert Engine().chips("h200") == ["h200"]
    with pytest.raises(UsageError, match="several chips in one run need a cluster"):
        Engine().chips("h200,b200")
    with pytest.raises(UsageError, match="name one"):
        Engine("ray").chips(" , ")
    assert Engine("ray").chips("h200, b200,h200") == ["h200", "b200"]
    with pytest.raises(UsageError, match="auto stands alone"):
        Engine("ray").chips("auto,h200")
    monkeypatch.setattr(cluster, "Cluster", lambda address: SimpleNamespace(nodes=lambda: nodes_of(MIXED)))
    assert Engine("ray").chips("auto") == ["b200", "h200"]
    with pytest.raises(UsageError, match="h200 and b200 in one run need a cluster"):
        open_fleet("local", [H200, B200], "r")


@pytest.mark.parametrize(
    ("address", "error", "said"),
    [
        ("ray://10.0.0.1:10001", UsageError, "klab joins the cluster itself"),
        ("headnode", UsageError, "write HOST:PORT"),
        ("", UsageError, "write HOST:PORT"),
        ("127.0.0.1:port", UsageError, "write HOST:PORT"),
        ("127.0.0.1:{closed}", CannotMeasure, r"no Ray cluster at 127.0.0.1:\d+ \(Connection refused\); start one with `ray start --head`"),
    ],
)
def test_an_address_that_leads_nowhere_is_one_line_at_once(address, error, said):
    pytest.importorskip("ray")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        with pytest.raises(error, match=said):
            cluster.Cluster(address.format(closed=held.getsockname()[1]))


@pytest.mark.parametrize(("answer", "said"), [(b"", "timed out"), (b"HTTP/1.1 400 Bad Request\r\n\r\n", "something else answers there")])
def test_who_listens_and_is_no_cluster_is_one_line_at_once_too(answer, said, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(cluster, "KNOCK_S", 30.0 if answer else 0.2)
    with socket.create_server(("127.0.0.1", 0)) as held:
        if answer:
            threading.Thread(target=lambda: held.accept()[0].sendall(answer), daemon=True).start()
        with pytest.raises(CannotMeasure, match=rf"no Ray cluster at 127.0.0.1:\d+ \({said}\); start one"):
            cluster.Cluster(f"127.0.0.1:{held.getsockname()[1]}")


def test_a_trial_travels_with_its_key(catalogue):
    (trial,) = trials(catalogue, ["good"], [4])
    there = trial_of(json.loads(json.dumps(trial.to_json())))
    assert there.key == trial.key and there.config.label() == trial.config.label() and there.config.key == trial.config.key
    again = trial_of(json.loads(json.dumps(there.to_json())))
    assert again.key == trial.key
    with pytest.raises(UsageError, match="unknown operator"):
        trial_of({**trial.to_json(), "operator": "telepathy"})


def test_an_order_holds_everything_that_a_contest_needs(catalogue):
    group = trials(catalogue, ["good", "half_speed"], [4])
    wish = Wish(threading.Event(), guests={group[0].problem.key: group[1]}, keep_data=True, anchors=("matmul",))
    sent = json.loads(order(group, wish, 7.5, {group[1].key: (Status.TIMEOUT, "skipped: it hung")}))
    assert [trial_of(data).key for data in sent["trials"]] == [trial.key for trial in group]
    assert trial_of(sent["guest"]).key == group[1].key
    assert (sent["left_s"], sent["keep_data"], sent["anchors"]) == (7.5, True, ["matmul"])
    quarantine = ToldQuarantine()
    quarantine.told = {key: (Status(status), reason) for key, (status, reason) in sent["skip"].items()}
    assert quarantine.verdict(group[1]) == (Status.TIMEOUT, "skipped: it hung") and quarantine.verdict(group[0]) is None


def test_kernel_folders_travel_as_text_and_come_out_the_same(tmp_path, catalogue):
    packed = json.loads(json.dumps(pack_folders([CONTESTANTS])))
    with ExitStack() as keep:
        assert unpack_folders(packed, keep) == [CONTESTANTS.resolve()], "the same files are here already"
        packed[0]["path"] = "/nowhere"
        (made,) = unpack_folders(packed, keep)
        there = discover([made])
        assert there.kernels["matmul/good"].path.is_relative_to(made)
        assert there.kernels["matmul/good"].source_digest == catalogue.kernels["matmul/good"].source_digest
    assert not made.exists()


@pytest.mark.parametrize("name", ["../out.py", "/etc/out.py", "a/../../out.py", "weights.pkl"])
def test_no_file_of_a_folder_lands_outside_of_it(name, tmp_path):
    with ExitStack() as keep, pytest.raises(UsageError, match="no name for a kernel file"):
        unpack_folders([{"path": str(tmp_path / "none"), "files": {name: "x = 1"}}], keep)


def test_a_folder_that_holds_too_much_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="is not a folder"):
        pack_folders([tmp_path / "none"])
    monkeypatch.setattr("klab.harness.fleet.parcel.MOST_BYTES", 10)
    (tmp_path / "big.py").write_text("x = 1\n" * 10)
    with pytest.raises(UsageError, match="too much to send to every node"):
        pack_folders([tmp_path])
    (tmp_path / "big.py").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot be sent"):
        pack_folders([tmp_path])


def test_the_digest_of_klab_is_of_what_measures():
    assert len(klab_digest()) == 16 and klab_digest() == klab_digest()


def test_a_death_is_told_in_a_few_words():
    def death(kind, text=""):
        return ray_seat._how(type(kind, (Exception,), {})(text))

    assert death("ActorDiedError", "The actor died because its node has died. Node Id: 12") == "its node died"
    assert death("ActorDiedError", "connection error code 2. Common causes: (1) the OOM killer, (2) ray stop") == "its process died"
    assert death("ActorUnavailableError", "The actor may have recovered") == "it cannot be reached"
    assert death("OutOfMemoryError") == "its node was out of memory"
    assert death("RaySystemError", "something new\nand more of it") == "something new"


def test_what_one_node_learned_of_a_kernel_holds_for_all(catalogue):
    here, there = trials(catalogue, ["hangs"], [4, 8])
    fleet = SimpleNamespace(quarantine=Quarantine())
    node = Node("a", "10.0.0.1", 0, 1, {})
    seat = ray_seat.RaySeat(fleet, cluster.Place("cpu", node, {}))
    hung = Result.of(here, Status.TIMEOUT, backend="cpu", library=False, run_id="r", reason="no answer")
    seat._note([here], hung)
    assert fleet.quarantine.verdict(there) == (Status.TIMEOUT, f"skipped: it hung on {here.problem.label()} in this run")
    seat._note([there], dataclasses.replace(hung, key=there.key, reason="skipped: it hung on another"))
    assert len(fleet.quarantine._offences[(here.kernel, here.source_digest, Status.TIMEOUT)]) == 1, "a skip is no second offence"


def scripted(answers, group, **wish):
    """A seat whose actor gives these answers one after the other; returns it with the names of what it was asked."""
    asked = []
    fleet = SimpleNamespace(quarantine=Quarantine(), skips=lambda group: {})
    seat = ray_seat.RaySeat(fleet, cluster.Place("cpu", Node("a", "10.0.0.1", 0, 1, {}), {}))
    seat._actor = SimpleNamespace(stop=SimpleNamespace(remote=lambda: asked.append("stop")))
    left = iter(answers)

    def ask(method, *arguments, **limits):
        asked.append(method)
        return {} if method == "begin" else next(left)

    seat._ask, seat.leave = ask, lambda: asked.append("leave")
    return seat, seat.contest(group, Wish(threading.Event(), **wish)), asked


def news(*rows, done=False, **more):
    return {"rows": [json.dumps(row.to_json()) for row in rows], "done": done, **more}


def ended(trial, status=Status.OK, reason=""):
    return Result.of(trial, status, backend="cpu", library=False, run_id="r", reason=reason)


def test_a_worker_that_was_killed_from_outside_gives_no_row_but_another_try(catalogue):
    group = trials(catalogue, ["good", "half_speed", "wrong"], [4])
    killed = ended(group[1], Status.CRASHED, "killed by SIGKILL (out of host memory?), in sample")
    seat, rows, _ = scripted([news(ended(group[0])), news(killed), news(ended(group[2]), done=True)], group)
    assert [next(rows).key, next(rows).key] == [group[0].key, group[2].key]
    with pytest.raises(SeatLost, match=r"10\.0\.0\.1: the measuring process was killed from outside"):
        next(rows)
    assert seat.revive(), "the actor is still there"
    own = ended(group[1], Status.CRASHED, "killed by SIGSEGV, in sample")
    _, rows, _ = scripted([news(own, done=True)], group)
    assert next(rows).status is Status.CRASHED, "a kernel's own crash is its row"


def test_a_node_that_cannot_measure_says_so_and_is_not_asked_again(catalogue):
    group = trials(catalogue, ["good"], [4])
    refused = {"refused": "the measuring process does not start: no CUDA", "exit_code": 4}
    seat, rows, asked = scripted([news(ended(group[0]), done=True, **refused)], group)
    assert next(rows).key == group[0].key, "what it had told before stands"
    with pytest.raises(SeatLost, match=r"10\.0\.0\.1: the measuring process does not start: no CUDA") as lost:
        next(rows)
    assert not lost.value.blame and asked[-1] == "leave" and seat._revived == ray_seat.REVIVALS
    _, rows, _ = scripted([news(done=True, error="ZeroDivisionError: division by zero")], group)
    with pytest.raises(RuntimeError, match=r"on 10\.0\.0\.1: ZeroDivisionError"):
        next(rows)


def test_a_contest_that_does_not_end_at_its_deadline_is_cut_off(catalogue):
    group = trials(catalogue, ["good"], [4])
    late = time.monotonic() - ray_seat.OVERTIME_S - 1.0
    _, rows, asked = scripted([news()] * 3, group, deadline=late)
    assert list(rows) == [] and asked == ["begin", "next", "leave"]


def test_a_request_to_stop_reaches_the_node_once(catalogue):
    group = trials(catalogue, ["good"], [4])
    seat, _, asked = scripted([news(), news(), news(ended(group[0]), done=True)], group)
    stop = threading.Event()
    stop.set()
    assert len(list(seat.contest(group, Wish(stop)))) == 1
    assert asked == ["begin", "stop", "next", "next", "next"]
