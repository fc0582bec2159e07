"""Claims about `run` and `chat`: pipes, pictures, commands, and what is said when nobody answers."""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import signal
import threading
from contextlib import contextmanager

import pytest
from PIL import Image
from rich.console import Console

from tests.api.fakes import FakeGeneration, live_server, make_context, says, thinks
from vllm_mlx.cli import build_parser
from vllm_mlx.commands import chat, run, talk
from vllm_mlx.commands.words import SHELLS
from vllm_mlx.errors import InvalidRequest
from vllm_mlx.generation.request import MediaPart
from vllm_mlx.options import UsageError


def pixel(format: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, format)
    return file.getvalue()


PIXEL = pixel("PNG")


@contextmanager
def served(service: FakeGeneration, **fields):
    """A server on a thread of its own, as `run` and `chat` have an event loop of theirs."""
    ready, over, address = threading.Event(), threading.Event(), []

    async def main():
        async with live_server(make_context(service, **fields)) as url:
            address.append(url)
            ready.set()
            while not over.is_set():
                await asyncio.sleep(0.01)

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert ready.wait(20)
    yield address[0]
    over.set()
    thread.join(20)


def parse(*words: str) -> argparse.Namespace:
    return build_parser().parse_args(words)


def test_run_answers_on_standard_output_with_what_was_piped_in(capsys, monkeypatch):
    service = FakeGeneration(lambda request: thinks("hm", "forty-two"))
    monkeypatch.setattr("sys.stdin", io.StringIO("6 * 7\n"))
    with served(service) as url:
        flags = ("--system", "Be brief.", "--temperature", "0.5", "--think", "--stats")
        assert run.run(parse("run", "Compute:", "--server", url, *flags)) == 0
    out, err = capsys.readouterr()
    assert out == "forty-two\n"
    assert "test/model" in err and "11 + 7 tokens" in err
    [request] = service.requests
    assert [(m.role, m.text) for m in request.messages] == [("system", "Be brief."), ("user", "Compute:\n\n6 * 7")]
    assert request.sampling.temperature == 0.5 and request.reasoning.enabled is True


def test_run_sends_pictures_and_a_schema(tmp_path, monkeypatch):
    service = FakeGeneration(lambda request: says("{}"))
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    picture, schema = tmp_path / "a.png", tmp_path / "s.json"
    picture.write_bytes(PIXEL)
    schema.write_text('{"type": "object"}')
    with served(service) as url:
        run.run(parse("run", "What?", "--server", url, "--image", str(picture), "--json-schema", str(schema)))
    [request] = service.requests
    assert isinstance(request.messages[0].parts[0], MediaPart)
    assert request.messages[0].parts[0].source == f"data:image/png;base64,{base64.b64encode(PIXEL).decode()}"
    assert (request.output_format.kind, request.output_format.value) == ("json_schema", {"type": "object"})


def test_a_picture_is_what_its_bytes_say(tmp_path):
    picture = tmp_path / "photo.png"
    picture.write_bytes(pixel("JPEG"))
    assert talk.image_part(str(picture))["image_url"]["url"].startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize(("content", "reason"), [
    (b"hello\n", "The data are not an image that is known here; images are PNG, JPEG, WebP, GIF, BMP and TIFF."),
    (b"", "The image is empty (0 bytes)."),
    (PIXEL[:40], "The PNG image is damaged or truncated."),
])
def test_the_error_names_the_file_that_is_no_picture(content, reason, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(PIXEL)
    bad.write_bytes(content)
    with pytest.raises(talk.TalkError) as refused:
        run.run(parse("run", "What?", "--server", "http://127.0.0.1:9", "--image", str(good), "--image", str(bad)))
    assert str(refused.value) == f"{bad}: {reason}"


def test_run_without_a_prompt_says_so(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(UsageError, match="no prompt"):
        run.run(parse("run"))


@pytest.mark.parametrize("command", [run.run, chat.run])
@pytest.mark.parametrize(("flag", "value", "sentence"), [
    ("--temperature", "101", "--temperature 101.0: input should be less than or equal to 100."),
    ("--temperature", "nan", "--temperature nan: input should be a finite number."),
    ("--top-p", "9", "--top-p 9.0: input should be less than or equal to 1."),
    ("--max-tokens", "0", "--max-tokens 0: input should be greater than or equal to 1."),
    ("--frequency-penalty", "-3", "--frequency-penalty -3.0: input should be greater than or equal to -2."),
])
def test_what_the_server_would_refuse_is_refused_before_anybody_is_asked(command, flag, value, sentence, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    words = ("run", "hi") if command is run.run else ("chat",)
    with pytest.raises(UsageError) as refused:
        command(parse(*words, "--server", "http://127.0.0.1:9", f"{flag}={value}"))
    assert str(refused.value) == sentence


@pytest.mark.parametrize(("words", "sentence"), [
    (("--server", "http://127.0.0.1:9"), "No server answers"),
    (("--server", "URL", "--image", "/nowhere.png"), "picture /nowhere.png cannot be read"),
    (("--server", "URL", "--api-key", "wrong"), "not valid"),
    (("--server", "URL", "--api-key", "sesame"), "Too long for this model."),
])
def test_what_goes_wrong_is_one_sentence(words, sentence, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    service = FakeGeneration(refusal=InvalidRequest("Too long for this model."))
    with served(service, api_keys={"default": "sesame"}) as url, pytest.raises(talk.VllmMlxError, match=sentence):
        run.run(parse("run", "hi", *(url if word == "URL" else word for word in words)))


def test_an_answer_that_breaks_off_is_an_error(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    service = FakeGeneration(lambda request: [*says("a")[:1], RuntimeError("boom")])
    with served(service) as url, pytest.raises(talk.TalkError):
        run.run(parse("run", "hi", "--server", url))


class Scripted:
    """A partner that answers by counting, and keeps what it was asked."""

    name = "scripted"

    def __init__(self):
        self.bodies = []

    async def answer(self, body):
        self.bodies.append(json.loads(json.dumps(body)))
        if body["messages"][-1]["content"] == "fail":
            raise talk.TalkError("It fails.")
        yield talk.Piece("thought", is_reasoning=True)
        yield talk.Piece(f"answer {len(self.bodies)}")
        yield talk.Numbers(10, 5, 5, 0.1, 0.5)

    async def close(self):
        pass


async def converse(*lines: str, partner=None, **options):
    """What a person would see after typing these lines."""
    out = io.StringIO()
    partner = partner or Scripted()
    left = list(lines)

    async def ask(prompt):
        if not left:
            raise EOFError
        return left.pop(0)

    console = Console(file=out, highlight=False, width=200)
    await chat.Chat(partner, console, system=None, options=options).talk(ask)
    return partner.bodies, out.getvalue()


async def test_a_conversation_goes_on_and_shows_its_numbers():
    bodies, text = await converse("one", "two", temperature=0.3)
    assert [m["content"] for m in bodies[1]["messages"]] == ["one", "answer 1", "two"]
    assert bodies[0]["temperature"] == 0.3
    assert "10 + 5 tokens · 10.0 tokens/s · first after 100 ms · 50 % cached" in text


async def test_a_line_that_ends_with_a_backslash_goes_on():
    bodies, _ = await converse("one\\", "two")
    assert bodies[0]["messages"][0]["content"] == "one\ntwo"


async def test_commands_change_what_is_sent(tmp_path):
    picture, saved = tmp_path / "a.png", tmp_path / "c.json"
    picture.write_bytes(PIXEL)
    bodies, text = await converse(
        "/system Be brief.", "/set temperature 0.7", "/set max_tokens 9", "/set max_tokens", "/think on",
        f"/image {picture}", "look", "/retry", f"/save {saved}", "/undo", "/clear", "again", "/stats", "/help",
    )  # fmt: skip
    first, second, third = bodies
    assert first["messages"][0] == {"role": "system", "content": "Be brief."}
    assert first["messages"][1]["content"][0]["type"] == "image_url"
    assert (first["temperature"], first["enable_thinking"], "max_tokens" in first) == (0.7, True, False)
    assert second["messages"] == first["messages"]
    assert [m["content"] for m in third["messages"]] == ["Be brief.", "again"]
    assert [m["role"] for m in json.loads(saved.read_text())] == ["system", "user", "assistant"]
    assert "/image FILE" in text


@pytest.mark.parametrize(("line", "sentence"), [
    ("/nonsense", "There is no /nonsense"),
    ("/set mood good", "/set takes one of"),
    ("/set temperature warm", "temperature takes a number"),
    ("/image /nowhere.png", "cannot be read"),
    ("fail", "It fails."),
])
async def test_what_cannot_be_done_is_said_and_the_conversation_goes_on(line, sentence):
    bodies, text = await converse(line, "still here?")
    assert sentence in text
    assert [m["content"] for m in bodies[-1]["messages"]] == ["still here?"]


async def test_an_interrupt_ends_the_answer_and_the_conversation_goes_on():
    class Endless(Scripted):
        async def answer(self, body):
            self.bodies.append(body)
            yield talk.Piece("begun")
            if len(self.bodies) == 1:
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(60)
            yield talk.Numbers(1, 1, 0, 0.1, 0.2)

    bodies, text = await converse("one", "two", partner=Endless())
    assert "begun (stopped)" in text
    assert [m["content"] for m in bodies[1]["messages"]] == ["one", "begun", "two"]


def test_shells_are_those_with_a_script():
    assert set(SHELLS) == {"bash", "zsh", "fish"}
