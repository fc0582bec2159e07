"""A model whose next token is a hash of what its KV cache holds: any mix-up of rows or prefixes changes the text.

Two layers are imitated: a sliceable one (the list of keys written so far) and, with `is_hybrid`, a recurrent one (a
running hash that can only be kept whole). Media positions are known to it by their content numbers, as in a cache key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from vllm_mlx.engine.packing import pack_chunks
from vllm_mlx.engine.prefix_cache import Lease, Segment
from vllm_mlx.engine.request import Request
from vllm_mlx.engine.sequence import Sequence
from vllm_mlx.engine.step import Sampled, StepPlan, StepResult

VOCAB = 211
BYTES_PER_TOKEN = 10
STATE_BYTES = 37


def mix(state: int, value: int) -> int:
    return (state * 6364136223846793005 + value * 1442695040888963407 + 12345) & ((1 << 61) - 1)


def next_token(keys: list[int], state: int, seed: int) -> int:
    """The token after `keys`; every stored key counts (a cheap stand-in for attention), and so does the state."""
    return (mix(mix(hash(tuple(keys)) & ((1 << 61) - 1), state), seed) >> 13) % VOCAB


def state_after(keys: list[int]) -> int:
    state = 7
    for key in keys:
        state = mix(state, key)
    return state


def lone_run(request: Request, *, is_hybrid: bool) -> list[int]:
    """The completion this request must get, whatever else is going on."""
    keys = list(request.prompt.cache_key)
    completion: list[int] = []
    while len(completion) < request.max_tokens:
        state = state_after(keys) if is_hybrid else 0
        token = next_token(keys, state, request.sampling.seed or 0)
        completion.append(token)
        keys.append(token)
        if token in request.stop_token_ids and len(completion) > request.sampling.min_tokens:
            break
    return completion


@dataclass(frozen=True)
class FakeSegment:
    keys: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return len(self.keys) * BYTES_PER_TOKEN

    def split(self, num_tokens: int) -> tuple[Segment, Segment]:
        return FakeSegment(self.keys[:num_tokens]), FakeSegment(self.keys[num_tokens:])


@dataclass(frozen=True)
class FakeState:
    state: int
    position: int
    nbytes: int = STATE_BYTES

    def split(self, num_tokens: int) -> tuple[Segment, Segment]:
        raise AssertionError("a checkpoint is never split")


@dataclass
class FakeRow:
    keys: list[int] = field(default_factory=list)
    state: int = 7
    device_token: int | None = None
    kept: dict[int, FakeState] = field(default_factory=dict)

    def write(self, key: int) -> None:
        self.keys.append(key)
        self.state = mix(self.state, key)

    def keep(self) -> None:
        """Keep the state as it is now, and the one before; as the real runner does."""
        self.kept[len(self.keys)] = FakeState(self.state, len(self.keys))
        for old in sorted(self.kept)[:-2]:
            del self.kept[old]


@dataclass
class FakeLaunched:
    plan: StepPlan
    result: StepResult
    allows_overlap: bool
    drafts: dict[str, tuple[Sequence, FakeRow, list[int]]] = field(default_factory=dict)
    error: Exception | None = None


class FakeRunner:
    """Executes plans on lists. `fault` is asked at each launch and collect, and may raise.

    `decodes_answers`: a chunk, or a stored prefix, that reaches into an answer is an error.
    """

    def __init__(
        self,
        *,
        is_hybrid: bool,
        checkpoint_step: int = 0,
        fault: Callable[[str], None] = lambda where: None,
        needs_host: Callable[[Request], bool] = lambda request: False,
        draft: Callable[[list[int], int], list[int]] = lambda true_tokens, limit: [],
        decodes_answers: bool = False,
        samples: bool = True,
    ) -> None:
        self.checkpoint_step = checkpoint_step if is_hybrid else 0
        self.rows: dict[str, FakeRow] = {}
        self.is_hybrid = is_hybrid
        self._fault = fault
        self._needs_host = needs_host
        self._draft = draft
        self._decodes_answers = decodes_answers
        self._samples = samples
        self._guessed: dict[str, tuple[FakeRow, list[int]]] = {}
        self.num_computed = 0
        self.num_kept = 0

    def bytes_for(self, num_tokens: int) -> int:
        return num_tokens * BYTES_PER_TOKEN + (STATE_BYTES if self.is_hybrid and num_tokens else 0)

    def open(self, sequence: Sequence, lease: Lease | None) -> None:
        assert sequence.id not in self.rows
        row = FakeRow()
        if lease is not None and lease.num_tokens:
            assert not self._decodes_answers or lease.num_tokens < sequence.num_prompt_tokens
            for segment in lease.segments():
                row.keys += segment.keys
            assert len(row.keys) >= lease.num_tokens
            del row.keys[lease.num_tokens :]
            if self.is_hybrid:
                assert lease.checkpoint.position == lease.num_tokens
                row.state = lease.checkpoint.state
        self.rows[sequence.id] = row

    def segment(self, sequence: Sequence, start: int, end: int) -> FakeSegment:
        keys = self.rows[sequence.id].keys
        assert end <= len(keys), "asked for keys that were never computed"
        return FakeSegment(tuple(keys[start:end]))

    def checkpoint(self, sequence: Sequence, position: int) -> FakeState | None:
        return self.rows[sequence.id].kept.get(position)

    def close(self, sequence: Sequence) -> None:
        del self.rows[sequence.id]

    def draft(self, plan: StepPlan, sequences: Mapping[str, Sequence]) -> tuple[tuple[int, ...], ...]:
        drafts = []
        for request_id, limit in zip(plan.decode, plan.draft_limits, strict=bool(plan.draft_limits)):
            sequence, draft = sequences[request_id], []
            if limit and sequence.num_computed <= len(sequence.cache_key) and not self.is_hybrid and self._samples:
                done = sequence.num_completion_tokens
                draft = self._draft(lone_run(sequence.request, is_hybrid=False)[done:], limit)
                assert len(draft) <= limit and done + 1 + len(draft) <= sequence.request.max_tokens
            drafts.append(tuple(draft))
        return tuple(drafts)

    def launch(
        self,
        plan: StepPlan,
        sequences: Mapping[str, Sequence],
        drafts: tuple[tuple[int, ...], ...] | None = None,
    ) -> FakeLaunched:
        self._fault("launch")
        sampled = []
        drafts = self.draft(plan, sequences) if drafts is None else drafts
        guesses: dict[str, tuple[Sequence, FakeRow, list[int]]] = {}
        for request_id, draft in zip(plan.decode, drafts or ((),) * len(plan.decode), strict=True):
            sequence, row = sequences[request_id], self.rows[request_id]
            position = sequence.num_computed - 1
            assert len(row.keys) == position, f"decoding position {position} on a row of {len(row.keys)}"
            known = sequence.cache_key
            key = known[position] if position < len(known) else row.device_token
            row.write(key)
            row.device_token = next_token(
                row.keys, row.state if self.is_hybrid else 0, sequence.request.sampling.seed or 0
            )
            if draft:
                guesses[request_id] = (sequence, row, list(draft))
            if sequence.is_repeating:
                assert self._decodes_answers and row.device_token == known[position + 1], "the answer has changed"
            else:
                sampled.append(Sampled(request_id, (row.device_token,)))
            if self.checkpoint_step and len(row.keys) % self.checkpoint_step == 0:
                row.keep()
        packs = pack_chunks(plan.chunks)
        assert sorted(c.request_id for pack in packs for c in pack) == sorted({c.request_id for c in plan.chunks})
        for chunk in (chunk for pack in packs for chunk in pack):
            sequence, row = sequences[chunk.request_id], self.rows[chunk.request_id]
            assert len(row.keys) == chunk.start, f"chunk at {chunk.start} on a row of {len(row.keys)}"
            assert not self._decodes_answers or chunk.end < sequence.num_prompt_tokens
            for key in sequence.cache_key[chunk.start : chunk.end]:
                row.write(key)
            if chunk.keep_state:
                row.keep()
        self.num_computed += plan.num_tokens
        overlap = not any(self._needs_host(sequences[i].request) for i in plan.decode)
        return FakeLaunched(plan, StepResult(tuple(sampled)), overlap and not guesses, guesses)

    def _verify(self, row: FakeRow, draft: list[int], sequence: Sequence) -> list[int]:
        """Keep what the row would have chosen; the keys of the others are taken back."""
        kept = []
        for guess in draft:
            if guess != row.device_token:
                break
            row.write(guess)
            row.device_token = next_token(row.keys, 0, sequence.request.sampling.seed or 0)
            kept.append(row.device_token)
        self.num_kept += len(kept)
        return kept

    def keep(self, request_id: str, num_tokens: int) -> None:
        """Of a rank that does not sample: what the one that does has kept."""
        row, draft = self._guessed.pop(request_id)
        for guess in draft[:num_tokens]:
            row.write(guess)

    def collect(self, launched: FakeLaunched) -> StepResult:
        self._fault("collect")
        if not self._samples:
            self._guessed = {id: (row, draft) for id, (_, row, draft) in launched.drafts.items()}
            return StepResult()
        sampled = []
        for one in launched.result.sampled:
            tokens = one.token_ids
            if one.request_id in launched.drafts:
                sequence, row, draft = launched.drafts[one.request_id]
                tokens += tuple(self._verify(row, draft, sequence))
            sampled.append(Sampled(one.request_id, tokens))
        return StepResult(tuple(sampled))

    def reset(self) -> None:
        assert not self.rows, "rows outlived a failed step"

    def metrics(self) -> dict[str, object]:
        return {}
