"""What guessing ahead brings on real text, with verdicts: `python -m tools.measure_guessing [edit] [prose] [noise]`.

A model of 30 million random weights cannot edit a file; so it computes every step, and a script says what comes out
(`scripted_model.py`). Guesses are looked up, computed, verified and thrown away as ever.

    edit    a source file in the prompt, and the file again with a name changed, a line added and one taken out
    prose   a page of English, after a prompt that has nothing to do with it
    noise   the worst case: three tokens that came before come again all the time, and what follows them is chance

Two engines, one that guesses, take turns on the same text; seconds are those of decoding, without the prompt, in
processor time (neighbours on the machine do not count). Every round has another text, and answers must be equal token
for token. Ends with code 1 when a promise is missed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vllm_mlx import blas

blas.load()  # before MLX

from rich.console import Console  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from tools.scripted_model import ScriptedModel  # noqa: E402
from vllm_mlx.bench.main import default_folder  # noqa: E402
from vllm_mlx.bench.model import VOCAB, build  # noqa: E402
from vllm_mlx.bench.report import Number, Report  # noqa: E402
from vllm_mlx.engine import speculative  # noqa: E402
from vllm_mlx.engine.assembly import EngineOptions, build_engine  # noqa: E402
from vllm_mlx.engine.request import Prompt, Request  # noqa: E402
from vllm_mlx.engine.step import EngineStatus, TokenEvent  # noqa: E402
from vllm_mlx.models.loader import load  # noqa: E402

ROOT = Path(__file__).parents[1]
ROUNDS = 5
FILES = ("chunking.py", "markers.py", "packing.py", "media_cache.py", "background.py", "queue_policy.py",
         "disk_index.py")
PAGES = ("caching.md", "agents.md", "tool-calling.md", "multimodal.md", "embeddings.md", "audio.md", "mcp.md")
NUM_ANSWER, NUM_PROMPT = 160, 160
# Ids that the demo's tokenizer uses, so that texts look as they do to a model for text.
NOISE_ALPHABET = 6

Script = tuple[list[int], list[int]]  # prompt, answer


class ProcessorClock:
    """So that the engine judges what guessing costs by the same clock."""

    perf_counter = staticmethod(time.process_time)


def edit(number: int) -> Script:
    """A file, and the file as it is after a small change."""
    lines = (ROOT / "vllm_mlx" / "engine" / FILES[number % len(FILES)]).read_text().splitlines()[:32]
    rng = random.Random(number)
    words = [word for line in lines for word in line.replace("(", " ").split() if word.isidentifier() and len(word) > 4]
    old = rng.choice(words)
    changed = [line.replace(old, f"{old}_of_all") for line in lines]
    changed.insert(rng.randrange(3, 12), "    # Kept in step with the page about it.")
    del changed[rng.randrange(15, 28)]
    ask = f"Rename {old} to {old}_of_all, drop what is not needed, and give me the whole file:\n"
    return encode(ask + "\n".join(lines) + "\n```python\n"), encode("\n".join(changed))[:NUM_ANSWER]


def prose(number: int) -> Script:
    text = (ROOT / "docs" / PAGES[number % len(PAGES)]).read_text()
    other = (ROOT / "docs" / PAGES[(number + 3) % len(PAGES)]).read_text()
    return encode(other)[:NUM_PROMPT], encode(text)[:NUM_ANSWER]


def noise(number: int) -> Script:
    """Of six letters: nearly every three of them have been seen, and the next one is right once in six times."""
    rng = random.Random(number)
    ids = [300 + rng.randrange(NOISE_ALPHABET) for _ in range(NUM_PROMPT + NUM_ANSWER)]
    return ids[:NUM_PROMPT], ids[NUM_PROMPT:]


_tokenizer = Tokenizer.from_file(str(ROOT / "vllm_mlx" / "demo" / "tokenizer.json"))


def encode(text: str) -> list[int]:
    ids = list(_tokenizer.encode(text, add_special_tokens=False).ids)
    assert max(ids) < VOCAB, "the demo's tokenizer has outgrown the benchmark's model"
    return ids


class Subject:
    """An engine on the scripted model."""

    def __init__(self, model: ScriptedModel, speculation: str) -> None:
        self._model = model
        self._count = 0
        self._answers: dict[str, list[int]] = {}
        options = EngineOptions(memory_bytes=4 << 30, prefix_cache_bytes=0, speculation=speculation)
        self._model.script = []
        self.engine = build_engine(model, options, self._publish)  # type: ignore[arg-type]

    def run(self, script: Script, num_rows: int) -> float:
        """Seconds from when all prompts are computed to the last token; raises where an answer is not the script."""
        prompt, answer = script
        self._model.script = [*prompt, *answer]
        names = []
        for _ in range(num_rows):
            self._count += 1
            names.append(f"r{self._count}")
            self._answers[names[-1]] = []
            # Nothing is remembered of earlier answers: this is about what stands in the prompt.
            self.engine.submit(Request(names[-1], Prompt(tuple(prompt)), len(answer), skips_prefix_cache=True))
        scheduler = self.engine.scheduler
        while scheduler.waiting or any(row.is_prefilling for row in scheduler.running.values()):
            self.engine.step()
        started = time.process_time()
        while self.engine.has_work:
            self.engine.step()
        seconds = time.process_time() - started
        for name in names:
            if self._answers.pop(name) != answer:
                raise AssertionError(f"an answer of {num_rows} rows is not what the model said")
        return seconds

    def _publish(self, events: list[TokenEvent], status: EngineStatus) -> None:
        for event in events:
            self._answers[event.request_id] += event.token_ids


# How it is written, and for each number of rows how many times as fast guessing is promised to be.
WORKS: dict[str, tuple[Callable[[int], Script], dict[int, float]]] = {
    "edit": (edit, {1: 1.5, 4: 0.97}),
    "prose": (prose, {1: 0.97, 8: 0.97}),
    "noise": (noise, {1: 0.97, 8: 0.97}),
}


def measure(model: ScriptedModel, name: str, num_rows: int) -> Number:
    """How many times as fast the engine that guesses is."""
    make, promises = WORKS[name]
    plain, guessing = Subject(model, "off"), Subject(model, "auto")
    for side in (plain, guessing):
        side.run(make(100), num_rows)  # kernels, and what a step costs
    ratios = []
    for number in range(ROUNDS):
        sides = (plain, guessing) if number % 2 else (guessing, plain)
        seconds = {side: side.run(make(number), num_rows) for side in sides}
        ratios.append(seconds[plain] / seconds[guessing])
    speculator = guessing.engine.runner.speculator  # type: ignore[attr-defined]
    facts = speculator.metrics()
    print(f"{name}, {num_rows} rows: drafted {facts['num_draft_tokens']}, kept {facts['num_accepted_tokens']},"
          f" {1e3 * facts['seconds_per_draft_token']:.2f} ms each", flush=True)  # fmt: skip
    title = f"{name}, {num_rows} row{'s' if num_rows > 1 else ''}: guessing"
    return Number(title, statistics.median(ratios), promises[num_rows], at_least=True, unit="x", rounds=tuple(ratios))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="tools.measure_guessing", description=__doc__.split("\n")[0])
    parser.add_argument("works", nargs="*", help=f"of {', '.join(WORKS)}; all without any")
    chosen = parser.parse_args(list(argv)).works or list(WORKS)
    if unknown := [name for name in chosen if name not in WORKS]:
        parser.error(f"there is no work {unknown[0]!r}; choose of {', '.join(WORKS)}")
    speculative.time = ProcessorClock  # type: ignore[assignment]
    model = ScriptedModel(load(build(default_folder(), "30m")).model)
    report = Report(numbers=[measure(model, name, rows) for name in chosen for rows in WORKS[name][1]])
    report.show(Console(width=None if sys.stdout.isatty() else 150))
    return 0 if all(number.is_met for number in report.numbers) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
