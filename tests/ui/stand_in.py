"""A model for the browser tests: it answers by what the last message says, in a known way and at a known pace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from tests.api.fakes import FakeGeneration
from vllm_mlx.generation.events import Accepted, Finished, GenerationUsage, OutputEvent
from vllm_mlx.generation.request import GenerationRequest, MediaPart
from vllm_mlx.parsers.events import ReasoningDelta, TextDelta, ToolCallDelta, ToolCallEnded, ToolCallStarted

MARKDOWN = """\
## Binary search

It halves a **sorted** list until one place is left, so it needs about $\\log_2 n$ looks.

```python
def find(values: list[int], wanted: int) -> int | None:
    low, high = 0, len(values)
    while low < high:  # the place is in [low, high)
        middle = (low + high) // 2
        if values[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return low if low < len(values) and values[low] == wanted else None
```

| values | looks | seconds |
| :--- | ---: | ---: |
| 1,000 | 10 | 0.000004 |
| 1,000,000 | 20 | 0.000009 |

Its cost follows from halving:

$$T(n) = T\\left(\\frac{n}{2}\\right) + O(1) \\implies T(n) = O(\\log n)$$

1. Sort once.
2. Search *often*; see [the article](https://example.org/search).
"""


def pieces(text: str) -> list[str]:
    """Text in pieces of about a token."""
    words = text.split(" ")
    return [word if i == len(words) - 1 else word + " " for i, word in enumerate(words)]


@dataclass
class StandIn(FakeGeneration):
    """`delay_s` lies between two pieces. A test clears `gate` to hold an answer back."""

    delay_s: float = 0.0
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    fails_next: BaseException | None = None
    breaks_next: BaseException | None = None

    def __post_init__(self) -> None:
        self.gate.set()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[OutputEvent]:
        self.requests.append(request)
        if (error := self.fails_next) is not None:
            self.fails_next = None
            raise error
        self.running.add(request.id)
        self.cancel_events[request.id] = asyncio.Event()
        num_prompt = 40 * len(request.messages)
        is_done = False
        try:
            yield Accepted(request.id, num_prompt)
            num_completion = 0
            reason = "stop"
            for event in self.says(request):
                await asyncio.sleep(self.delay_s)
                await self.gate.wait()
                if num_completion == 3 and (error := self.breaks_next) is not None:
                    self.breaks_next = None
                    raise error
                if self.cancel_events[request.id].is_set():
                    reason = "cancelled"
                    break
                if type(event) is ToolCallEnded:
                    reason = "tool_calls"
                num_completion += 1
                yield event
            is_done = True
            cached = num_prompt - 40 if len(request.messages) > 1 else 0
            yield Finished(reason, GenerationUsage(num_prompt, num_completion, cached))
        finally:
            self.running.discard(request.id)
            if not is_done:
                self.closed.append(request.id)

    def says(self, request: GenerationRequest) -> list[OutputEvent]:
        last = request.messages[-1]
        asked = last.text.lower()
        thought = []
        if request.reasoning.enabled:
            text = "The person asks something. I look at it from two sides."
            thought = [ReasoningDelta(piece) for piece in pieces(text)]
        return thought + self._answer(request, asked)

    def _answer(self, request: GenerationRequest, asked: str) -> list[OutputEvent]:
        last = request.messages[-1]
        if last.role == "tool":
            return [TextDelta(piece) for piece in pieces(f"The tool says: {last.text}")]
        if request.output_format is not None:
            return [TextDelta(piece) for piece in ('{"city": ', '"Rome", ', '"people": 2800000}')]
        if request.tools and "time" in asked:
            arguments = [ToolCallDelta(0, piece) for piece in ('{"city": ', '"Tokyo"}')]
            return [ToolCallStarted(0, "get_time"), *arguments, ToolCallEnded(0)]
        if request.tools and "sum" in asked:
            return [ToolCallStarted(0, "calculate"), ToolCallDelta(0, '{"expression": "19 * 23"}'), ToolCallEnded(0)]
        num_images = sum(isinstance(part, MediaPart) for message in request.messages for part in message.parts)
        if num_images and "picture" in asked:
            return [TextDelta(piece) for piece in pieces(f"I see {num_images} picture{'s' * (num_images > 1)}.")]
        if "binary search" in asked:
            return [TextDelta(piece) for piece in pieces(MARKDOWN)]
        if "long" in asked:
            return [TextDelta(f"word{i} ") for i in range(400)]
        return [TextDelta(piece) for piece in pieces(f"You said: {last.text}")]
