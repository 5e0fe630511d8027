"""A Ray cluster: how klab connects to it, what it has, and where in it a chip's trials can run."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from klab.harness.catalog.chips import load_chips
from klab.kernels.contract import Chip, Json
from klab.kernels.errors import CannotMeasure, UsageError

# Ray's name of the resource that says which accelerators a node has; the same word takes a node's place in tests (--resources).
ACCELERATOR = "accelerator_type:"
INSTALL = "--fleet ray needs Ray: pip install 'kernel-lab[ray]'"
KNOCK_S = 5.0
# What an HTTP/2 client says first (RFC 9113, 3.4), and the type of the frame with which every server of that kind, Ray's too, answers.
SETTINGS = b"\x04"
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + SETTINGS + b"\0" * 5
START = "start one with `ray start --head` (docs/fleet.md), or give --address"


@dataclass(frozen=True)
class Node:
    """A live node: `gpus` and `cpus` as Ray counts them, `accelerators` the amounts by type ("H200": 1)."""

    id: str
    address: str
    gpus: int
    cpus: int
    accelerators: Mapping[str, float]
    memory_bytes: float = 0.0

    @property
    def described(self) -> str:
        """`8 x H200`, or `64 CPUs`."""
        if self.gpus:
            return f"{self.gpus} x {' or '.join(self.accelerators) or 'a GPU of unknown type'}"
        fakes = " and ".join(f"{amount:g} x {kind}" for kind, amount in self.accelerators.items())
        return fakes or (f"{self.cpus} CPU{'s' if self.cpus > 1 else ''}" if self.cpus else "no CPU for tasks")


@dataclass(frozen=True)
class Place:
    """Where one device of a chip is: the node, and what Ray is asked for."""

    chip: str
    node: Node
    options: Mapping[str, Json]


def nodes_of(rows: Iterable[Mapping[str, Any]]) -> list[Node]:
    """The live nodes in what `ray.nodes()` tells."""
    found = []
    for row in rows:
        if not row.get("Alive"):
            continue
        resources = row.get("Resources") or {}
        kinds = {key.removeprefix(ACCELERATOR): float(n) for key, n in resources.items() if key.startswith(ACCELERATOR)}
        label = (row.get("Labels") or {}).get("ray.io/accelerator-type")
        if label and resources.get("GPU") and not kinds:
            kinds[str(label)] = 1.0
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
        memory = float(resources.get("memory", 0.0))
        found.append(Node(str(row["NodeID"]), str(row.get("NodeManagerAddress", "?")), gpus, cpus, kinds, memory))
    return sorted(found, key=lambda node: (node.address, node.id))


def is_type(chip: Chip, accelerator: str) -> bool:
    """Is Ray's accelerator type ("H200") this chip? By its name or a word of its title: a GH200 is no H200.

    Rough on purpose: Ray calls an H200 NVL an H200 too. The node itself looks closer (fleet.devices.matches).
    """
    wanted = re.sub(r"[^a-z0-9]", "", accelerator.lower())
    words = re.findall(r"[a-z0-9]+", f"{chip.title.lower()}")
    joined = {"".join(words[a:b]) for a, b in combinations(range(len(words) + 1), 2)}
    return bool(wanted) and (wanted == re.sub(r"[^a-z0-9]", "", chip.name.lower()) or wanted in joined)


def places(nodes: Sequence[Node], chips: Sequence[Chip]) -> list[Place]:
    """Every device of these chips: one place per GPU; for a CPU one per node, and that on nodes without a GPU where there are such.

    A chip of kind cpu that is not plainly "cpu" is where a node was started with that accelerator type as a resource.
    """
    found: list[Place] = []
    for chip in chips:
        for node in nodes:
            kind = next((name for name in node.accelerators if is_type(chip, name)), None)
            if chip.kind == "cuda" and kind is not None:
                # Labels alone make no resource to ask for: then the node's name is all that pins it.
                pinned = {"accelerator_type": kind} if node.accelerators[kind] else {}
                found += [Place(chip.name, node, {"num_gpus": 1, "num_cpus": 0, **pinned})] * node.gpus
            elif chip.kind == "cpu" and chip.name != "cpu" and kind is not None:
                wanted = {"num_cpus": 0, "resources": {ACCELERATOR + kind: 1}}
                found += [Place(chip.name, node, wanted)] * int(node.accelerators[kind])
        if chip.name == "cpu":
            able = [node for node in nodes if node.cpus]
            # The whole node, so that nothing else that Ray runs disturbs it.
            found += [
                Place("cpu", node, {"num_cpus": node.cpus}) for node in [n for n in able if not n.gpus and not n.accelerators] or able
            ]
    return found


def lacking(nodes: Sequence[Node], chips: Sequence[Chip]) -> str:
    """Which of the chips the cluster does not have, and what it has, in one line; "" when it has all. Ray would wait for ever."""
    there = {place.chip for place in places(nodes, chips)}
    absent = [chip.title for chip in chips if chip.name not in there]
    if not absent:
        return ""
    has = Counter(node.described for node in nodes)
    told = ", ".join(f"{count} node{'s' if count > 1 else ''} with {what}" for what, count in sorted(has.items())) or "no live node"
    return f"the cluster has no {' and no '.join(absent)} (it has {told})"


def chips_there(nodes: Sequence[Node]) -> list[str]:
    """The names of the catalogue's chips that the cluster has; "cpu" where it has no GPU. CannotMeasure for GPUs that are not in it."""
    known = [chip for chip in load_chips() if chip.kind == "cuda"]
    found = [chip.name for chip in known if any(node.gpus and is_type(chip, kind) for node in nodes for kind in node.accelerators)]
    strange = sorted({node.described for node in nodes if node.gpus})
    if not found and strange:
        raise CannotMeasure(f"the cluster has {', '.join(strange)}, which the catalogue does not know: name a chip file with --chip")
    return found or ["cpu"]


def screeners(nodes: Sequence[Node], memory_bytes: int, busy: Iterable[str] = ()) -> list[Place]:
    """Places to compile: one per CPU of the nodes that have no GPU and none of the `busy` node ids, as far as their memory goes."""
    found: list[Place] = []
    for node in nodes:
        if not node.gpus and not node.accelerators and node.id not in set(busy):
            room = int(node.memory_bytes // memory_bytes) if node.memory_bytes else node.cpus
            found += [Place("", node, {"num_cpus": 1})] * max(0, min(node.cpus, room))
    return found


def _knock(address: str) -> None:
    """CannotMeasure where nobody listens at `host:port`, or nobody who speaks as Ray does: Ray itself tries for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon:
        if address in ("auto", "local"):
            return
        raise UsageError(f"--address {address}: write HOST:PORT, or local for a cluster of this machine alone")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S) as line:
            if os.environ.get("RAY_USE_TLS", "0") == "0":
                line.sendall(HELLO)
                answer = line.recv(9)
                if answer[3:4] != SETTINGS:
                    raise CannotMeasure(f"no Ray cluster at {address} (something else answers there); {START}")
    except ValueError:
        raise UsageError(f"--address {address}: write HOST:PORT") from None
    except OSError as error:
        raise CannotMeasure(f"no Ray cluster at {address} ({error.strerror or error}); {START}") from None


class Cluster:
    """The connection of this process to a Ray cluster; `close` ends it if `connect` made it."""

    def __init__(self, address: str | None = None) -> None:
        """`address` as ray.init takes it; without one $RAY_ADDRESS, or the cluster that runs on this machine. "local" starts one here.

        UsageError for an address that klab cannot use, CannotMeasure without Ray or a cluster.
        """
        if address is not None and address.startswith("ray://"):
            raise UsageError(f"--address {address}: klab joins the cluster itself, run it on one of its machines (docs/fleet.md)")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise CannotMeasure(INSTALL) from None
        self._ray, self._owner = ray, not ray.is_initialized()
        if self._owner:
            given = address if address is not None else os.environ.get("RAY_ADDRESS") or "auto"
            _knock(given)
            # Ray prints what it hears of a lost node on standard output, in the midst of JSON lines; its debugger silences it so.
            ray._private.worker._worker_logs_enabled = False
            quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False, "configure_logging": False}
            if given == "local":
                quiet |= {"include_dashboard": False, "object_store_memory": 100 << 20}
            self._sigterm = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
            try:
                ray.init(address=given, **quiet)
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                where = "" if given in ("auto", "local") else f" at {given}"
                why = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise CannotMeasure(f"no Ray cluster{where} ({why[:200]}); {START}") from error
            finally:
                # Ray takes SIGTERM for itself: whoever had it before (a mirror that uploads the last rows) keeps it.
                if self._sigterm is not signal.SIG_DFL:
                    self._restore()

    def nodes(self) -> list[Node]:
        """Those that live now."""
        return nodes_of(self._ray.nodes())

    def close(self) -> None:
        """Leave the cluster; what this process started there ends. A connection that was there before stays."""
        if self._owner and self._ray.is_initialized():
            self._ray.shutdown()
            self._restore()

    def _restore(self) -> None:
        """Give SIGTERM back; only the main thread may, and only there has Ray taken it."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._sigterm)
