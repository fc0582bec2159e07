"""`serve --distributed`: how the processes of one server find each other, and end together. Composition root.

MLX's own launcher (`mlx.launch`, `mpirun`) starts the same command on every machine. Rank 0 serves; the others load
their part of the model and follow (`engine/ranks.py`). Beside MLX's collectives there is one connection from each rank
to rank 0: plans go through it, and its end tells that a process is gone, which a collective would await without end. So
that a machine or a cable that is gone is noticed too, the system probes the connection, and rank 0 says every now and
then that it is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import queue
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_mlx.backend import ModelFiles, load_blas
from vllm_mlx.errors import ModelLoadError, SettingsError, VllmMlxError
from vllm_mlx.models.json_file import read_json
from vllm_mlx.settings import Settings

if TYPE_CHECKING:
    from vllm_mlx.engine.ranks import LeadRunner
    from vllm_mlx.engine.runner import ModelRunner
    from vllm_mlx.models.base import LanguageModel

log = logging.getLogger(__name__)

KEY_BYTES = 32
HOST_BYTES = 128
LAST_WORDS_S = 2.0
"""How long answers may take to be written once a rank is lost."""
BEATS_A_TIMEOUT = 4
"""How often rank 0 is heard, and a connection probed, within --distributed-timeout."""
MOST_BEAT_S = 10.0
NUM_SAMPLES, SAMPLE_BYTES = 16, 1 << 16


@dataclass(frozen=True)
class Hello:
    """What a rank says first."""

    rank: int
    fingerprint: str


class RankLost(VllmMlxError):
    """A process of the group is gone, or out of step."""


@dataclass(frozen=True)
class Place:
    """This process in the group, and where rank 0 can be reached."""

    rank: int
    size: int
    host: str
    port: int
    key: bytes
    listener: Listener | None

    @classmethod
    def take(cls) -> Place:
        """Join the group that the launcher made; waits for all. Raises SettingsError when there is none."""
        from vllm_mlx.models import sharding  # imports MLX: after the BLAS

        rank, size = sharding.place()
        if size < 2:
            raise SettingsError(
                "--distributed needs several processes; start it with MLX's launcher: "
                "mlx.launch -n 2 -- vllm-mlx serve MODEL --distributed tensor."
            )
        note = bytes(KEY_BYTES + HOST_BYTES + 8)
        listener = None
        if rank == 0:
            key, host = secrets.token_bytes(KEY_BYTES), _own_address()
            listener = Listener((host, 0), backlog=size, authkey=key)
            note = key + host.encode().ljust(HOST_BYTES, b"\0") + listener.address[1].to_bytes(8, "little")
        said = sharding.shared(note)
        host = said[KEY_BYTES : KEY_BYTES + HOST_BYTES].rstrip(b"\0").decode()
        port = int.from_bytes(said[KEY_BYTES + HOST_BYTES :], "little")
        return cls(rank, size, host, port, said[:KEY_BYTES], listener)


class Lead:
    """Rank 0's end. `on_lost` hears once, from any thread, why the group cannot go on; the process then ends.

    `closes`: the server is shutting down, and ranks may go.
    """

    def __init__(self, place: Place, files: ModelFiles, step_timeout_s: float) -> None:
        self._place = place
        self._fingerprint = fingerprint(files.folder)
        self._step_timeout_s = step_timeout_s
        self._connections: list[Connection] = []
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._beat_s = beat_s(step_timeout_s)
        self._step_began: float | None = None
        self._why: str | None = None
        self.closes = False
        self.on_lost: Callable[[str], None] = lambda why: None

    def gather(self, welcome: Any) -> None:
        """Wait for all ranks, check that they hold the same model, and tell each `welcome`."""
        assert self._place.listener is not None
        for _ in range(self._place.size - 1):
            connection = self._place.listener.accept()
            hello = connection.recv()
            if hello.fingerprint != self._fingerprint:
                raise ModelLoadError(f"Rank {hello.rank} has other model files than rank 0; give all ranks the same.")
            keep_alive(connection, self._beat_s)
            self._connections.append(connection)
            threading.Thread(target=self._watch, args=(hello.rank, connection), daemon=True).start()
        for connection in self._connections:
            connection.send(welcome)
        for work in (self._beat, self._watch_time):
            threading.Thread(target=work, daemon=True).start()

    def lead(self, runner: ModelRunner) -> LeadRunner:
        """The runner that the others follow, which guesses no more than their layers can take back."""
        from vllm_mlx.engine.ranks import LeadRunner
        from vllm_mlx.models import sharding

        runner.guessing.bound(sharding.least(runner.guessing.most_draft))
        return LeadRunner(runner, self.send, self.lost, self.step_ended)

    def send(self, messages: Sequence[Any]) -> None:
        """Tell all ranks; the step begins."""
        if self._why is not None:
            raise RankLost(self._why)
        self._step_began = time.monotonic()
        self._send_all(messages)

    def _send_all(self, what: Any) -> None:
        with self._sending:
            for connection in self._connections:
                connection.send(what)

    def step_ended(self) -> None:
        self._step_began = None

    def lost(self, why: str) -> None:
        """The group cannot go on: answer everybody, then end this process. Only the first cause is told."""
        with self._lock:
            if self._why is not None or self.closes:
                return
            self._why = why
        log.error("%s; all processes end", why)
        self.on_lost(why)
        # The MLX thread may wait in a collective for ever, so there is no other way out.
        threading.Timer(LAST_WORDS_S, os._exit, (1,)).start()

    def _watch(self, rank: int, connection: Connection) -> None:
        try:
            why = connection.recv()  # a rank says nothing more, but why it ends
        except EOFError:
            why = "its process has ended"
        except OSError as error:
            why = f"its connection broke ({error.strerror or error})"
        self.lost(f"rank {rank} is lost: {why}")

    def _beat(self) -> None:
        """A thread of its own, since a rank that is stuck may not take what is sent to it."""
        while self._why is None and not self.closes:
            with contextlib.suppress(OSError):  # `_watch` hears of it too
                self._send_all(None)
            time.sleep(self._beat_s)

    def _watch_time(self) -> None:
        while self._why is None and not self.closes:
            time.sleep(0.2)
            began = self._step_began
            if began is not None and time.monotonic() - began > self._step_timeout_s:
                self.lost(f"a step has taken longer than {self._step_timeout_s:g} s: a rank is stuck")


def follow(settings: Settings, place: Place) -> int:
    """Be one of the other ranks until rank 0 is gone. Returns the exit code; this thread owns MLX here."""
    files = ModelFiles.fetch(settings)
    from vllm_mlx.engine.assembly import build_runner  # imports MLX
    from vllm_mlx.engine.ranks import Follower
    from vllm_mlx.models import sharding

    connection = Client((place.host, place.port), authkey=place.key)
    timeout_s = settings.model.distributed_timeout
    keep_alive(connection, beat_s(timeout_s))
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    try:
        model = load_part(files)
        # Rank 0 drains on a signal, and tells by its end when this rank may go.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        connection.send(Hello(place.rank, fingerprint(files.folder)))
        options = connection.recv()
        threading.Thread(target=_receive, args=(connection, messages, timeout_s), daemon=True).start()
        runner = build_runner(model, options, samples=False)
        sharding.least(runner.guessing.most_draft)  # rank 0 is told in `Lead.lead`
        follower = Follower(runner, model.adapters)
        log.info("rank %d of %d holds its part of %s", place.rank, place.size, files.profile.name)
        while True:
            follower.follow(messages.get())
    except EOFError:
        return 0  # rank 0 ended before this rank was needed
    except Exception as error:  # whatever went wrong here, rank 0 answers for it
        log.exception("rank %d ends", place.rank)
        connection.send(f"{type(error).__name__}: {error}")
        return 1


def load_part(files: ModelFiles) -> LanguageModel:
    """This rank's part of the model. On the thread that owns MLX."""
    from vllm_mlx.models import loader  # imports MLX

    model = files.settings.model
    return loader.load(
        files.folder,
        mllm=model.mllm,
        dtype=model.dtype,
        trust_remote_code=model.trust_remote_code,
        split=splitter(files),
    ).model


def splitter(files: ModelFiles) -> Callable[[Any], None]:
    """What takes this rank's part of the model in `files`."""
    from vllm_mlx.models import sharding  # imports MLX

    kind = files.settings.model.distributed
    assert kind is not None
    return sharding.splitter(kind, files.profile, read_json(files.folder / "config.json"))


def fingerprint(folder: Path) -> str:
    """Equal on machines that hold the same model: config, and names, sizes and samples of the weights."""
    digest = hashlib.blake2b((folder / "config.json").read_bytes(), digest_size=16)
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as weights:
            for part in range(NUM_SAMPLES):
                weights.seek(size * part // NUM_SAMPLES)
                digest.update(weights.read(SAMPLE_BYTES))
    return digest.hexdigest()


def join(settings: Settings) -> Place:
    """Load the BLAS and join the group."""
    load_blas(settings)
    return Place.take()


def _receive(connection: Connection, messages: queue.SimpleQueue[Any], timeout_s: float) -> None:
    """Read ahead of the computing thread, so that rank 0's end is noticed while that one waits in a collective."""
    try:
        while connection.poll(timeout_s):
            if (message := connection.recv()) is not None:
                messages.put(message)
        log.error("rank 0 has not been heard for %g s; this rank ends", timeout_s)
        os._exit(1)
    except EOFError:
        os._exit(0)
    except OSError as error:
        log.error("the connection to rank 0 broke (%s); this rank ends", error.strerror or error)
        os._exit(1)


def beat_s(timeout_s: float) -> float:
    return min(MOST_BEAT_S, timeout_s / BEATS_A_TIMEOUT)


def keep_alive(connection: Connection, every_s: float) -> None:
    """Have the system probe a connection nobody speaks on, and give one up that does not answer three times."""
    seconds = max(1, int(every_s))
    with socket.socket(fileno=os.dup(connection.fileno())) as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        idle = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", None))  # Linux, macOS
        options = [(idle, seconds), (getattr(socket, "TCP_KEEPINTVL", None), seconds)]
        options += [(getattr(socket, "TCP_KEEPCNT", None), 3)]
        # What was sent and not acknowledged is not probed; it is given up after as long.
        options += [(getattr(socket, "TCP_USER_TIMEOUT", None), 4000 * seconds)]
        for option, value in options:
            if option is not None:
                own.setsockopt(socket.IPPROTO_TCP, option, value)


def _own_address() -> str:
    """Where the other ranks reach this machine: as the launcher's host file calls it, else by its name."""
    if (nccl := os.environ.get("NCCL_HOST_IP")) is not None:
        return nccl
    if (file := os.environ.get("MLX_HOSTFILE")) is not None:
        hosts = json.loads(Path(file).read_text())
        first = hosts[0][0] if isinstance(hosts[0], list) else hosts[0]
        return str(first).rsplit(":", 1)[0].strip("[]")
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in os.environ and os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"] == os.environ.get(
        "OMPI_COMM_WORLD_SIZE"
    ):
        return "127.0.0.1"
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"
