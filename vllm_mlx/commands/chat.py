"""`vllm-mlx chat`: a conversation in the terminal. What begins with `/` is for the program, all else for the model."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from vllm_mlx.commands.run import FIELDS, sampling
from vllm_mlx.commands.talk import Numbers, Partner, find_partner, user_message
from vllm_mlx.commands.wrap import Wrapper
from vllm_mlx.errors import VllmMlxError

HELP = """\
[bold]/image FILE[/]      send a picture with the next message
[bold]/system TEXT[/]     set the system prompt (without TEXT: show it)
[bold]/set NAME VALUE[/]  temperature, top_p, max_tokens, frequency_penalty, seed (without VALUE: the model's own)
[bold]/think on|off[/]    reasoning before the answer
[bold]/retry[/]           answer the last message again
[bold]/undo[/]            take the last message and its answer back
[bold]/clear[/]           begin anew
[bold]/save FILE[/]       write the conversation as OpenAI messages (JSON)
[bold]/stats[/]           numbers of the last answer
[bold]/quit[/]            leave (or Ctrl-D); Ctrl-C ends an answer
A line that ends with \\ goes on in the next one."""


def run(parsed: argparse.Namespace) -> int:
    with suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input(), where the platform has it)
    return asyncio.run(_run(parsed))


async def _run(parsed: argparse.Namespace) -> int:
    key = parsed.api_key or os.environ.get("VLLM_MLX_CLIENT_API_KEY")
    options = sampling(parsed)  # a wrong flag is said before a model is loaded
    partner = await find_partner(parsed.model, parsed.server, key)
    console = Console(highlight=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # asyncio's own would let a prompt wait on
    try:
        await Chat(partner, console, system=parsed.system, options=options).talk(_ask)
    finally:
        await partner.close()
    return 0


async def _ask(prompt: str) -> str:
    """A line from the person, or EOFError. The loop waits meanwhile: nothing else runs on it, and Ctrl-C reaches us."""
    return input(prompt)


@contextmanager
def _interrupts(task: asyncio.Task[Any]) -> Iterator[None]:
    """Inside, Ctrl-C cancels `task`; outside it is Python's own KeyboardInterrupt."""
    loop = asyncio.get_running_loop()
    with suppress(NotImplementedError, RuntimeError, ValueError):  # not the main thread, or no such signals
        loop.add_signal_handler(signal.SIGINT, task.cancel)
    try:
        yield
    finally:
        with suppress(NotImplementedError, RuntimeError, ValueError):
            loop.remove_signal_handler(signal.SIGINT)


class Chat:
    """The conversation so far and what was set. `talk` goes on until the person leaves."""

    def __init__(self, partner: Partner, console: Console, *, system: str | None, options: dict[str, Any]) -> None:
        self._partner = partner
        self._console = console
        self._system = system
        self._options = dict(options)
        self._messages: list[dict[str, Any]] = []
        self._images: list[str] = []
        self._numbers: Numbers | None = None
        self._commands: dict[str, Callable[[str], Any]] = {
            "help": self._help, "image": self._image, "system": self._set_system, "set": self._set,
            "think": self._think, "retry": self._retry, "undo": self._undo, "clear": self._clear, "save": self._save,
            "stats": self._stats,
        }  # fmt: skip

    async def talk(self, ask: Callable[[str], Any]) -> None:
        self._console.print(f"[bold]{escape(self._partner.name)}[/]  [dim]/help lists the commands[/]")
        while True:
            try:
                line = (await ask("\n› ")).strip()
                while line.endswith("\\"):
                    line = f"{line[:-1]}\n{await ask('  ')}"
            except (EOFError, KeyboardInterrupt, asyncio.CancelledError):
                self._console.print()
                return
            if line in ("/quit", "/exit", "/q"):
                return
            try:
                if line.startswith("/"):
                    await self._command(line)
                elif line:
                    self._messages.append(user_message(line, self._images))
                    self._images = []
                    await self._answer()
            except VllmMlxError as error:
                self._console.print(f"[red]{escape(str(error))}[/]")

    async def _command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        command = self._commands.get(name)
        if command is None:
            self._console.print(f"[red]There is no /{escape(name)}; /help lists what there is.[/]")
            return
        result = command(rest.strip())
        if asyncio.iscoroutine(result):
            await result

    async def _answer(self) -> None:
        system = [{"role": "system", "content": self._system}] if self._system else []
        body = {**self._options, "messages": [*system, *self._messages]}
        task = asyncio.current_task()
        assert task is not None
        text, is_complete = "", False
        style: str | None = None
        wrapper = Wrapper(self._console.width)

        def show(words: str) -> None:
            self._console.print(words, style=style, end="", markup=False, soft_wrap=True)

        try:
            with _interrupts(task):
                async with aclosing(self._partner.answer(body)) as pieces:
                    async for piece in pieces:
                        if isinstance(piece, Numbers):
                            self._numbers, is_complete = piece, True
                            continue
                        if style and not piece.is_reasoning:
                            show(wrapper.feed("\n\n"))
                        style = "dim" if piece.is_reasoning else None
                        text += "" if piece.is_reasoning else piece.text
                        show(wrapper.feed(piece.text) if self._console.is_terminal else piece.text)
            show(wrapper.end())
        except asyncio.CancelledError:  # Ctrl-C: the answer ends, the conversation goes on
            task.uncancel()
            show(wrapper.end())
            self._numbers = None
            self._console.print(" [dim](stopped)[/]", end="")
        except VllmMlxError:
            if not text:
                self._messages.pop()  # the message can be sent again as it was
            raise
        finally:
            if text:
                self._messages.append({"role": "assistant", "content": text})
        self._console.print()
        if is_complete:
            self._console.print(f"[dim]{self._numbers}[/]")

    # ── commands ────────────────────────────────────────────────────────────────────────────────────────────────

    def _help(self, rest: str) -> None:
        self._console.print(HELP)

    def _image(self, rest: str) -> None:
        user_message("", [rest])  # it must be readable now, not when it is sent
        self._images.append(rest)
        self._console.print(f"[dim]{escape(rest)} goes with the next message[/]")

    def _set_system(self, rest: str) -> None:
        self._system = rest or self._system
        self._console.print(f"[dim]system: {escape(self._system or 'none')}[/]")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if name not in FIELDS:
            self._console.print(f"[red]/set takes one of {', '.join(FIELDS)}.[/]")
            return
        if not value.strip():
            self._options.pop(name, None)
        else:
            try:
                self._options[name] = int(value) if name in ("max_tokens", "seed") else float(value)
            except ValueError:
                self._console.print(f"[red]{name} takes a number.[/]")
                return
        self._console.print(f"[dim]{name}: {self._options.get(name, 'as the model has it')}[/]")

    def _think(self, rest: str) -> None:
        self._options["enable_thinking"] = rest != "off"
        self._console.print(f"[dim]thinking: {'on' if rest != 'off' else 'off'}[/]")

    async def _retry(self, rest: str) -> None:
        if self._messages and self._messages[-1]["role"] == "assistant":
            self._messages.pop()
        if self._messages:
            await self._answer()

    def _undo(self, rest: str) -> None:
        while self._messages and self._messages.pop()["role"] != "user":
            pass
        self._console.print(f"[dim]{len(self._messages)} messages are left[/]")

    def _clear(self, rest: str) -> None:
        self._messages.clear()
        self._images.clear()
        self._console.print("[dim]a new conversation[/]")

    def _save(self, rest: str) -> None:
        path = Path(rest or "conversation.json").expanduser()
        system = [{"role": "system", "content": self._system}] if self._system else []
        try:
            path.write_text(json.dumps([*system, *self._messages], ensure_ascii=False, indent=1), encoding="utf-8")
        except OSError as error:
            self._console.print(f"[red]{escape(str(path))} cannot be written ({error.strerror}).[/]")
            return
        self._console.print(f"[dim]written to {escape(str(path))}[/]")

    def _stats(self, rest: str) -> None:
        self._console.print(f"[dim]{self._numbers or 'There is no complete answer yet.'}[/]")
