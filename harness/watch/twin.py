"""Two workers on one device, one per side, that a contest takes for one: so the sides' kernels run in turns, in the contest's own laps."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from klab.harness.measure.client import START_LIMIT_S, WorkerClient, WorkerDied, WorkerHung
from klab.harness.measure.session import Answer
from klab.harness.store.result import Status
from klab.harness.watch.sides import Side
from klab.kernels.contract import Chip, Json
from klab.kernels.errors import CannotMeasure, KlabError

# What Python says where one end of a protocol does not know what the other asks for.
_STRANGE = ("unexpected keyword argument", "unknown operation", "required positional argument", "required keyword-only argument")


class SideClient(WorkerClient):
    """A worker that runs a side's own klab. `chip`: as the side's own profiles have it, where it said so."""

    def __init__(self, side: Side, chip: Chip, *, fields: Json = None, cuda_device: str = "", kernel_dirs: Sequence[Path] = ()) -> None:
        super().__init__(chip, cuda_device=cuda_device, kernel_dirs=kernel_dirs)
        self.side = side
        self._fields = fields
        self._visible = cuda_device

    def invocation(self) -> tuple[list[str], dict[str, str]]:
        """The side's Python, its packages, its worker."""
        return self.side.command("klab.harness.measure.worker"), {**self.side.variables(), "CUDA_VISIBLE_DEVICES": self._visible}

    def chip_fields(self) -> Json:
        """The side's own."""
        return self._fields or super().chip_fields()


class Twin(WorkerClient):
    """`clients[slot]` answers what is asked of a slot; what concerns the problem is asked of both. For contests of two trials.

    An error says which side it came from; an answer that shows that a side speaks another protocol is CannotMeasure.
    """

    def __init__(self, clients: Sequence[SideClient]) -> None:
        super().__init__(clients[0].chip)
        self.clients = list(clients)

    @property
    def alive(self) -> bool:
        """Both are there."""
        return all(client.alive for client in self.clients)

    @property
    def pid(self) -> int | None:
        """There are two processes: none is the worker."""
        return None

    def start(self, *, limit_s: float = START_LIMIT_S) -> None:
        """Start both at the same time. CannotMeasure, naming the side, when one does not come up."""
        broken: list[tuple[SideClient, BaseException]] = []

        def start(client: SideClient) -> None:
            try:
                client.start(limit_s=limit_s)
            except BaseException as error:  # noqa: BLE001  raised again below, in the caller's thread
                broken.append((client, error))

        threads = [threading.Thread(target=start, args=(client,)) for client in self.clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for client, error in broken:
            self.kill()
            if isinstance(error, WorkerHung):
                raise WorkerHung(f"{_who(client)}: {error}") from None
            if isinstance(error, KeyError | TypeError | AttributeError):
                raise _stranger(client, f"its greeting lacks {error}") from None
            if isinstance(error, KlabError):
                if any(words in str(error) for words in _STRANGE):
                    raise _stranger(client, str(error)) from None
                raise CannotMeasure(f"{_who(client)}: {error}") from None
            raise error
        self.environment = self.clients[0].environment
        self.kernels = self.clients[0].kernels | self.clients[1].kernels

    def ask(self, operation: str, *, limit_s: float, **fields: Json) -> Answer:
        """The answer of the slot's side, or of both: the first that is not ok."""
        if "slot" in fields:
            return self._one(self.clients[fields["slot"]], operation, limit_s, fields)
        answers = [self._one(client, operation, limit_s, fields) for client in self.clients]
        bad = [answer for answer in answers if answer.get("status", Status.OK.value) != Status.OK.value or answer.get("fatal")]
        return bad[0] if bad else answers[0]

    def _one(self, client: SideClient, operation: str, limit_s: float, fields: Json) -> Answer:
        try:
            answer = client.ask(operation, limit_s=limit_s, **fields)
        except WorkerHung as error:
            raise WorkerHung(f"{error} ({_who(client)})") from None
        except WorkerDied as error:
            if any(words in str(error) for words in _STRANGE):
                raise _stranger(client, str(error)) from None
            raise WorkerDied(f"{error} ({_who(client)})") from None
        except KlabError as error:
            raise _stranger(client, str(error)) from None
        if "status" not in answer or (operation == "sample" and answer["status"] == Status.OK.value and "us" not in answer):
            raise _stranger(client, f"it answers {operation} with {', '.join(answer) or 'nothing'}")
        return answer

    def abort(self) -> None:
        """Both, for good."""
        for client in self.clients:
            client.abort()

    def kill(self) -> None:
        """End both."""
        for client in self.clients:
            client.kill()


def _who(client: SideClient) -> str:
    return f"{client.side.name}, {client.side.title}"


def _stranger(client: SideClient, what: str) -> CannotMeasure:
    return CannotMeasure(
        f"{_who(client)}: its worker and this klab do not understand each other ({what}): measure each side with its own `klab measure "
        "--results DIR`, and compare the two folders"
    )
