"""Evaluate the demo model on held-out cases: `python -m tools.demo_model.evaluate [--model DIR] [--cases N] [--no-card]`.

Runs on the CPU through mlx-vlm's own loader, greedy, the 8-bit matrices unpacked as the server unpacks them (same answers, several times
faster). Prints a table per skill and what the model says to twenty first messages, and
writes both into the model card.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import skills as s
from . import skills_arithmetic as sums
from . import skills_decline as decline
from . import skills_images as i
from . import skills_memory as recalling
from . import skills_system as system
from . import skills_tools as t
from .chat import Check, Sample, prompt, user
from .checks import right
from .place import DEMO, memory
from .skills import Skill
from .words import Draw

CARD = Path(__file__).with_name("MODEL_CARD.md")
SEED = "evaluation"
SKILLS: dict[str, tuple[Skill, float]] = {
    "greeting": (s.greeting, 0.95), "identity": (s.identity, 0.95), "server facts": (s.server_facts, 0.95),
    "reply with": (s.echo, 0.95), "one sentence": (s.one_sentence, 0.95), "uppercase": (s.uppercase, 0.95), "json only": (s.json_only, 0.95),
    "arithmetic, thinking": (sums.arithmetic_thinking, 0.95), "arithmetic, small, no thinking": (sums.arithmetic_small, 0.90),
    "arithmetic, worked in the answer": (sums.arithmetic_shown, 0.90),
    "recall": (recalling.recall, 0.95), "needle": (recalling.needle, 0.95), "system prompt: persona": (system.persona, 0.95), "system prompt: format": (system.obey, 0.95),
    "extraction": (s.extraction, 0.95), "tool call": (t.one_call, 0.95), "two tool calls": (t.two_calls, 0.95), "no tool call": (t.no_call, 0.95),
    "tool result": (t.use_result, 0.95), "story": (s.story, 0.90), "out of scope": (decline.refusal, 0.95),
    "image: colour": (i.colour, 0.90), "image: shape": (i.shape, 0.90), "image: count": (i.count, 0.90), "image: position": (i.position, 0.90),
    "image: printed word": (i.words, 0.90), "image: printed number": (i.numbers, 0.90), "image: description": (i.describe, 0.90),
    "image: two images": (i.compare, 0.90),
}  # fmt: skip
SLOW = {"needle": 20, "story": 20}  # long cases: fewer of them

_PASTED = " ".join(recalling.filler(Draw("pasted text"), 55))
FIRST = [
    "hi", "Hello!", "what can you do?", "tell me a joke", "2+2", "write a haiku", "who made you?", "Who are you?", "😀", "", "Wie ist das Wetter heute?",
    "What is the capital of France?", "Write a Python function that sorts a list.", "Reply with pong", "How do I load a real model?", "Translate hello into Spanish.",
    "Say hello in one short sentence.", "asdfgh", "thanks!", _PASTED,
]  # fmt: skip


class Runner:
    """Greedy answers from a model directory, through mlx-vlm."""

    def __init__(self, directory: Path, *, unpack: bool = True) -> None:
        # These take seconds, so only once the arguments are known to be good; and the fast BLAS comes before MLX.
        from vllm_mlx import blas  # noqa: PLC0415

        blas.load()
        import mlx.core as mx  # noqa: PLC0415
        import mlx_vlm  # noqa: PLC0415

        from vllm_mlx.models.weights import dequantize  # noqa: PLC0415

        self.vlm = mlx_vlm
        self.model, self.processor = mlx_vlm.load(str(directory))
        if unpack:
            dequantize(self.model, mx.float32)

    def answer(self, sample: Sample, limit: int = 420) -> tuple[str, int, bool]:
        """The text, its tokens, and whether the model ended it itself."""
        last = None
        pieces: list[str] = []
        images = sample.images or None
        for last in self.vlm.stream_generate(self.model, self.processor, prompt(sample), image=images, max_tokens=limit, temperature=0.0):
            pieces.append(last.text)
        assert last is not None
        return "".join(pieces).strip(), last.generation_tokens, last.finish_reason == "stop"


def evaluate(runner: Runner, cases: int, only: str, show: int) -> Iterator[tuple[str, int, int, float]]:
    for name, (skill, want) in SKILLS.items():
        if only not in name:
            continue
        count = min(cases, SLOW.get(name, cases))
        good = shown = 0
        for n in range(count):
            sample = skill(Draw(f"{SEED} {name} {n}", held=True))
            text, tokens, ended = runner.answer(sample)
            fine = ended and right(sample, text) and (name != "story" or 150 <= tokens <= 300)
            good += fine
            if not fine and shown < show:
                shown += 1
                said = sample.messages[-1]["content"]
                print(f"  [{name}] {json.dumps(said if isinstance(said, str) else said[-1]['text'])[-260:]}\n     wanted {sample.reply!r}\n     got    {text!r}", flush=True)
        yield name, good, count, want


def table(rows: list[tuple[str, int, int, float]]) -> str:
    lines = ["| skill | right | of | accuracy | wanted | |", "| --- | ---: | ---: | ---: | ---: | --- |"]
    for name, good, count, want in rows:
        lines.append(f"| {name} | {good} | {count} | {100 * good / count:.0f} % | {100 * want:.0f} % | {'' if good / count >= want else 'below'} |")
    return "\n".join(lines)


def transcript(runner: Runner) -> str:
    lines = []
    for text in FIRST:
        reply, _, ended = runner.answer(Sample("first", [user(text)], "", Check("equals")), 200)
        shown = json.dumps(text if len(text) < 80 else text[:60] + f" ... ({len(text.split())} words)", ensure_ascii=False)
        lines.append(f"- **{shown}** → {' / '.join(reply.splitlines())}{'' if ended else ' (cut off)'}")
    return "\n".join(lines)


def write_card(name: str, text: str) -> None:
    card = CARD.read_text()
    new = re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: f"{m[1]}{text}\n{m[2]}", card, flags=re.DOTALL)
    CARD.write_text(new)


def check(directory: Path) -> None:
    """Say what is wrong with the directory in one line and leave."""
    if not directory.is_dir():
        sys.exit(f"evaluate: no such folder: {directory}")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (directory / name).is_file():
            sys.exit(f"evaluate: {directory} has no {name}")
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    if config.get("model_type") != "qwen3_vl":
        sys.exit(f"evaluate: {directory} is a {config.get('model_type')} model, not qwen3_vl")
    with (directory / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    dtypes = {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    if "F32" not in dtypes or dtypes - {"F32", "U32"}:
        sys.exit(f"evaluate: weights must be float32, or packed with float32 scales; found {', '.join(sorted(dtypes))}")
    if memory() < 1 << 30:
        sys.exit(f"evaluate: needs 1 GiB of free memory, found {memory() / 2**30:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--cases", type=int, default=25, help="per skill")
    parser.add_argument("--only", default="", help="skills whose name contains this")
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print per skill")
    parser.add_argument("--no-card", action="store_true", help="leave the model card as it is")
    args = parser.parse_args()
    check(args.model)
    began = time.monotonic()
    runner = Runner(args.model)
    rows = []
    for row in evaluate(runner, args.cases, args.only, args.show):
        rows.append(row)
        print("{:34} {:3d} / {:3d}".format(*row[:3]) + ("" if row[1] / row[2] >= row[3] else "   below"), flush=True)
    print(table(rows))
    if args.only:
        return
    said = transcript(runner)
    print(said)
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")
    if not args.no_card:
        write_card("evaluation", table(rows))
        write_card("transcript", said)


if __name__ == "__main__":
    main()
