"""One engine over several processes: rank 0 decides, every rank computes its part of the model. No MLX, no sockets.

    rank 0     scheduler ─► LeadRunner ─┬─► its own runner (samples)
                                        └─► messages ─► Follower ─► its runner (does not)      rank 1, 2, ...

What the scheduler asks of a runner is sent on as plain data, in order, so that every rank holds the same rows; their
layers meet in the collectives of the forward pass. Kept prefixes stay where they were computed: rank 0's prefix cache
holds handles, and a handle that is forgotten there is forgotten everywhere. Tokens are sampled on rank 0 alone, with
grammar, seeds and penalties, and are known before the next step is sent; so steps do not overlap. Guesses are rank 0's
too: the others compute the tokens they are told, and hear with the next step how many of them were kept.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from vllm_mlx.engine.engine import Launched, Runner
from vllm_mlx.engine.prefix_cache import Lease, Segment
from vllm_mlx.engine.request import Request
from vllm_mlx.engine.sequence import Sequence as EngineSequence
from vllm_mlx.engine.step import StepPlan, StepResult
from vllm_mlx.errors import EngineError

# ── what rank 0 says ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Agree:
    """How rank 0 computes: rows in groups, prompts in packs. A rank that does otherwise would order rows otherwise."""

    manner: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Open:
    """A row for a sequence, filled with kept segments and perhaps a checkpoint."""

    request: Request
    tokens: tuple[int, ...]
    num_cached: int
    segments: tuple[int, ...]
    checkpoint: int | None


@dataclass(frozen=True, slots=True)
class Take:
    """Keep the row's tokens [start, end) under a handle."""

    handle: int
    request_id: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Keep:
    """Keep the row's whole state at a position under a handle."""

    handle: int
    request_id: str
    position: int


@dataclass(frozen=True, slots=True)
class Split:
    handle: int
    num_tokens: int
    left: int
    right: int


@dataclass(frozen=True, slots=True)
class Forget:
    handles: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Close:
    request_id: str


@dataclass(frozen=True, slots=True)
class Launch:
    """A step. `rows`: of each of its sequences the tokens that are new since it was last sent, and its progress."""

    plan: StepPlan
    rows: Mapping[str, tuple[tuple[int, ...], int]]
    drafts: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Verified:
    """Of rows that had guesses in the last step, how many of them hold."""

    kept: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Adapt:
    """Load an adapter, of which these are the files."""

    name: str
    files: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Unadapt:
    name: str


Message = Agree | Open | Take | Keep | Split | Forget | Close | Launch | Verified | Adapt | Unadapt
Send = Callable[[Sequence[Message]], None]


# ── rank 0 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Kept:
    """A segment or checkpoint: rank 0's part, and the handle by which the others know theirs."""

    def __init__(self, own: Segment, handle: int, lead: LeadRunner) -> None:
        self.own = own
        self.handle = handle
        self._lead = lead
        weakref.finalize(self, lead.forgotten.append, handle)

    @property
    def nbytes(self) -> int:
        return self.own.nbytes

    def split(self, num_tokens: int) -> tuple[Segment, Segment]:
        left, right = self.own.split(num_tokens)
        one, two = self._lead.keep(left), self._lead.keep(right)
        self._lead.say(Split(self.handle, num_tokens, one.handle, two.handle))
        return one, two


@dataclass(frozen=True)
class OwnLease:
    """A lease as rank 0's own runner takes it: its parts of the kept pieces."""

    num_tokens: int
    pieces: tuple[Segment, ...]
    checkpoint: Segment | None

    def segments(self) -> list[Segment]:
        return list(self.pieces)


@dataclass(frozen=True)
class LeadLaunched:
    """`guessed`: the rows that have drafts in this step."""

    inner: Launched
    guessed: frozenset[str] = frozenset()

    @property
    def plan(self) -> StepPlan:
        return self.inner.plan

    @property
    def allows_overlap(self) -> bool:
        return False


def manner_of(runner: Any) -> tuple[object, ...]:
    """What must be the same on all ranks."""
    return tuple(getattr(runner, name, None) for name in ("is_batched", "can_group", "can_pack", "needs_checkpoint"))


class Led(Runner[Any], Protocol):
    """A runner that others can follow: what it guesses is known before the step is launched."""

    def draft(self, plan: StepPlan, sequences: Mapping[str, EngineSequence]) -> tuple[tuple[int, ...], ...]: ...

    def launch(
        self,
        plan: StepPlan,
        sequences: Mapping[str, EngineSequence],
        drafts: tuple[tuple[int, ...], ...] | None = None,
    ) -> Any: ...


class LeadRunner:
    """A runner whose every word is passed on. `send` takes what was said since the last step, in order.

    `lost` is told when this rank failed in a step that the others were sent: they cannot be brought back in step.
    `ended` is called after each step.
    """

    def __init__(
        self, inner: Led, send: Send, lost: Callable[[str], None], ended: Callable[[], None] = lambda: None
    ) -> None:
        self._inner = inner
        self._send = send
        self._lost = lost
        self._ended = ended
        self._unsent: list[Message] = [Agree(manner_of(inner))]
        self._handles = itertools.count()
        self._num_sent: dict[str, int] = {}
        self.forgotten: list[int] = []

    def say(self, message: Message) -> None:
        self._unsent.append(message)

    def keep(self, own: Segment) -> Kept:
        return Kept(own, next(self._handles), self)

    def bytes_for(self, num_tokens: int) -> int:
        return self._inner.bytes_for(num_tokens)

    def open(self, sequence: EngineSequence, lease: Lease | None) -> None:
        pieces = [s for s in lease.segments() if isinstance(s, Kept)] if lease is not None and lease.num_tokens else []
        checkpoint = lease.checkpoint if lease is not None and lease.num_tokens else None
        kept = checkpoint if isinstance(checkpoint, Kept) else None
        num_cached = lease.num_tokens if lease is not None else 0
        own = OwnLease(num_cached, tuple(piece.own for piece in pieces), kept.own if kept is not None else None)
        self._inner.open(sequence, own)  # type: ignore[arg-type]  # what a runner reads of a lease
        # Closures do not travel, and only rank 0 needs the grammar.
        request = replace(sequence.request, make_constraint=None, extra={})
        handles = tuple(piece.handle for piece in pieces)
        self.say(Open(request, tuple(sequence.tokens), num_cached, handles, kept.handle if kept is not None else None))
        self._num_sent[sequence.id] = len(sequence.tokens)

    def segment(self, sequence: EngineSequence, start: int, end: int) -> Segment:
        kept = self.keep(self._inner.segment(sequence, start, end))
        self.say(Take(kept.handle, sequence.id, start, end))
        return kept

    def checkpoint(self, sequence: EngineSequence, position: int) -> Segment | None:
        own = self._inner.checkpoint(sequence, position)
        if own is None:
            return None
        kept = self.keep(own)
        self.say(Keep(kept.handle, sequence.id, position))
        return kept

    def close(self, sequence: EngineSequence) -> None:
        self._inner.close(sequence)
        self.say(Close(sequence.id))
        del self._num_sent[sequence.id]

    def launch(self, plan: StepPlan, sequences: Mapping[str, EngineSequence]) -> LeadLaunched:
        rows = {}
        for request_id in (*plan.decode, *(chunk.request_id for chunk in plan.chunks)):
            sequence = sequences[request_id]
            rows[request_id] = tuple(sequence.tokens[self._num_sent[request_id] :]), sequence.num_computed
            self._num_sent[request_id] = len(sequence.tokens)
        drafts = self._inner.draft(plan, sequences)
        self.say(Launch(plan, rows, drafts))
        unsent, self._unsent = self._unsent, []
        gone, self.forgotten[:] = tuple(self.forgotten), []
        self._send([*unsent, *([Forget(gone)] if gone else [])])
        try:
            guessed = frozenset(id for id, draft in zip(plan.decode, drafts, strict=False) if draft)
            return LeadLaunched(self._inner.launch(plan, sequences, drafts), guessed)
        except Exception as error:  # raised again; whatever it is, the other ranks wait in a collective for ever
            self._lost(f"rank 0 failed in a step: {type(error).__name__}: {error}")
            raise

    def collect(self, launched: LeadLaunched) -> StepResult:
        try:
            result = self._inner.collect(launched.inner)
            self._ended()
            kept = {s.request_id: len(s.token_ids) - 1 for s in result.sampled if s.request_id in launched.guessed}
            if kept:
                self.say(Verified(kept))
            return result
        except Exception as error:  # raised again; whatever it is, the other ranks wait in a collective for ever
            self._lost(f"rank 0 failed in a step: {type(error).__name__}: {error}")
            raise

    def reset(self) -> None:
        self._inner.reset()

    def metrics(self) -> Mapping[str, object]:
        return self._inner.metrics()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)  # facts of the runner that the assembly reads


class LeadBank:
    """Rank 0's adapters; the others are sent the files, and load them before the next step."""

    def __init__(self, bank: Bank, say: Callable[[Message], None]) -> None:
        self._bank = bank
        self._say = say

    def load(self, name: str, folder: Path) -> Any:
        facts = self._bank.load(name, folder)
        files = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in (".json", ".safetensors")}
        self._say(Adapt(name, files))
        return facts

    def unload(self, name: str) -> None:
        self._bank.unload(name)
        self._say(Unadapt(name))


# ── the other ranks ─────────────────────────────────────────────────────────────────────────────────────────────────


class Rows(Protocol):
    """What a follower asks of its runner: as the scheduler does, but nothing is sampled."""

    def open(self, sequence: EngineSequence, lease: Any) -> None: ...

    def segment(self, sequence: EngineSequence, start: int, end: int) -> Segment: ...

    def checkpoint(self, sequence: EngineSequence, position: int) -> Segment | None: ...

    def close(self, sequence: EngineSequence) -> None: ...

    def draft(self, plan: StepPlan, sequences: Mapping[str, EngineSequence]) -> tuple[tuple[int, ...], ...]: ...

    def launch(
        self,
        plan: StepPlan,
        sequences: Mapping[str, EngineSequence],
        drafts: tuple[tuple[int, ...], ...] | None = None,
    ) -> Any: ...

    def collect(self, launched: Any) -> StepResult: ...

    def keep(self, request_id: str, num_tokens: int) -> None: ...


class Bank(Protocol):
    """`models.adapters.AdapterBank`, as far as ranks need it."""

    def load(self, name: str, folder: Path) -> Any: ...

    def unload(self, name: str) -> None: ...


class Follower:
    """Does what rank 0 says. One thread: the one that owns MLX in this process. `bank`: this rank's adapters."""

    def __init__(self, runner: Rows, bank: Bank | None = None) -> None:
        self._runner = runner
        self._bank = bank
        # What is loaded may be read late, so the files stay as long as the adapter does.
        self._folders: dict[str, TemporaryDirectory[str]] = {}
        self._sequences: dict[str, EngineSequence] = {}
        self._kept: dict[int, Segment] = {}

    def follow(self, messages: Sequence[Message]) -> None:
        for message in messages:
            self._do(message)

    def _do(self, message: Message) -> None:
        match message:
            case Agree():
                if message.manner != manner_of(self._runner):
                    raise EngineError("this rank computes in another manner than rank 0; give all the same libraries")
            case Open():
                sequence = EngineSequence(message.request, 0, 0.0, list(message.tokens))
                self._sequences[sequence.id] = sequence
                checkpoint = self._kept[message.checkpoint] if message.checkpoint is not None else None
                pieces = tuple(self._kept[handle] for handle in message.segments)
                self._runner.open(sequence, OwnLease(message.num_cached, pieces, checkpoint))
            case Take():
                sequence = self._sequences[message.request_id]
                self._kept[message.handle] = self._runner.segment(sequence, message.start, message.end)
            case Keep():
                state = self._runner.checkpoint(self._sequences[message.request_id], message.position)
                assert state is not None, "rank 0 kept a state that this rank has not"
                self._kept[message.handle] = state
            case Split():
                left, right = self._kept[message.handle].split(message.num_tokens)
                self._kept[message.left], self._kept[message.right] = left, right
            case Forget():
                for handle in message.handles:
                    del self._kept[handle]
            case Close():
                self._runner.close(self._sequences.pop(message.request_id))
            case Launch():
                for request_id, (tokens, num_computed) in message.rows.items():
                    sequence = self._sequences[request_id]
                    sequence.tokens += tokens
                    sequence.num_computed = num_computed
                self._runner.draft(message.plan, self._sequences)  # puts new rows into the batch; guesses nothing
                self._runner.collect(self._runner.launch(message.plan, self._sequences, message.drafts))
            case Verified():
                for request_id, num_tokens in message.kept.items():
                    self._runner.keep(request_id, num_tokens)
            case Adapt():
                self._adapt(message)
            case Unadapt():
                assert self._bank is not None
                self._bank.unload(message.name)
                self._folders.pop(message.name).cleanup()

    def _adapt(self, message: Adapt) -> None:
        assert self._bank is not None
        folder = self._folders[message.name] = TemporaryDirectory(prefix="vllm-mlx-adapter-")
        for name, content in message.files.items():
            (Path(folder.name) / name).write_bytes(content)
        self._bank.load(message.name, Path(folder.name))
