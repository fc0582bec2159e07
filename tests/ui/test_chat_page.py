"""The chat page as a person uses it, in a headless Chromium against the real application and a scripted model."""

from __future__ import annotations

import asyncio
import json
import struct
import zlib
from dataclasses import replace

import pytest

from tests.api.fakes import until
from tests.ui.conftest import seeing_model
from vllm_mlx.engine.step import EngineStatus, Progress
from vllm_mlx.errors import EngineError, InvalidRequest, Unavailable
from vllm_mlx.generation.request import MediaPart
from vllm_mlx.settings import Settings

pytestmark = pytest.mark.asyncio(loop_scope="session")


def expect(target):
    from playwright.async_api import expect as playwright_expect  # not installed everywhere

    playwright_expect.set_options(timeout=20_000)
    return playwright_expect(target)


def png(side: int = 8) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + b"\x20\x80\x60" * side for _ in range(side))
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


PICTURE = {"name": "tree.png", "mimeType": "image/png", "buffer": png()}


async def ask(page, text: str) -> None:
    await page.fill("#text", text)
    await page.press("#text", "Enter")


async def done(page, num_answers: int = 1) -> None:
    await expect(page.locator(".answer .numbers[aria-label]")).to_have_count(num_answers)


async def test_an_answer_is_drawn_as_markdown_with_code_math_and_its_numbers(site):
    page = await site.open()
    site.model.delay_s = 0.001
    await expect(page.locator("#model-name")).to_have_text("demo-vl")
    await expect(page.locator("#model-facts")).to_contain_text("text + image")
    await ask(page, "Explain binary search")
    await done(page)
    answer = page.locator(".answer")
    await expect(answer.locator("h4")).to_have_text("Binary search")
    await expect(answer.locator(".code figcaption")).to_contain_text("python")
    assert await answer.locator(".code .kw").count() > 5
    await expect(answer.locator("td.right").first).to_have_text("10")
    assert await answer.locator("math").count() == 2
    await expect(answer.locator("a[href]")).to_have_attribute("rel", "noopener noreferrer")
    await expect(answer.locator(".numbers")).to_contain_text("tokens/s")
    await expect(answer.locator(".numbers")).to_contain_text("first after")
    await expect(answer.locator(".numbers")).to_contain_text("0 % cached")
    await ask(page, "and again")
    await done(page, 2)
    await expect(answer.nth(1).locator(".numbers")).to_contain_text("67 % cached")
    assert [m.role for m in site.model.requests[1].messages] == ["user", "assistant", "user"]


async def test_code_is_copied(site):
    page = await site.open(permissions=["clipboard-read", "clipboard-write"])
    await ask(page, "Explain binary search")
    await done(page)
    await page.click("[aria-label='Copy code']")
    await expect(page.locator("[aria-label='Copied']")).to_be_visible()
    assert (await page.evaluate("navigator.clipboard.readText()")).startswith("def find(values")


async def test_reasoning_is_in_a_fold_with_its_time(site):
    page = await site.open()
    await page.click("#think")
    await ask(page, "hello")
    await done(page)
    assert site.model.requests[0].reasoning.enabled is True
    await expect(page.locator(".fold summary")).to_contain_text("Thought for")
    await expect(page.locator(".fold .prose")).to_be_hidden()
    await page.click(".fold summary")
    await expect(page.locator(".fold .prose")).to_have_text("The person asks something. I look at it from two sides.")
    await page.click("#think")
    await ask(page, "hello")
    await done(page, 2)
    assert site.model.requests[1].reasoning.enabled is False


async def test_a_tool_is_called_in_the_page_and_shown_as_a_card(site):
    page = await site.open()
    await page.click("#tools")
    await page.get_by_label("Calculator").check()
    await page.keyboard.press("Escape")
    await expect(page.locator("#tools-menu")).to_be_hidden()
    await ask(page, "What is the sum?")
    await done(page)
    card = page.locator(".call.done")
    await expect(card).to_contain_text("19 * 23")
    await expect(card).to_contain_text("437")
    await expect(page.locator(".answer .prose:visible")).to_contain_text("The tool says")
    await expect(page.locator(".numbers[aria-label]")).to_contain_text("2 requests")
    first, second = site.model.requests
    assert [tool.name for tool in first.tools] == ["calculate"]
    assert [m.role for m in second.messages] == ["user", "assistant", "tool"]
    assert json.loads(second.messages[-1].text) == {"expression": "19 * 23", "result": 437}


async def test_a_picture_is_attached_shown_and_sent(site):
    page = await site.open()
    await page.set_input_files("#files", [PICTURE, {**PICTURE, "name": "second.png"}])
    await expect(page.locator("#attached img")).to_have_count(2)
    await page.click("[aria-label='Remove second.png']")
    await expect(page.locator("#attached img")).to_have_count(1)
    await ask(page, "What is in the picture?")
    await done(page)
    await expect(page.locator(".user img")).to_have_attribute("alt", "Picture tree.png")
    await expect(page.locator(".answer")).to_contain_text("I see 1 picture.")
    parts = site.model.requests[0].messages[0].parts
    assert isinstance(parts[0], MediaPart) and parts[0].source.startswith("data:image/png;base64,")


async def test_a_picture_is_pasted_and_dropped(site):
    page = await site.open()
    # A file in a clipboard or under a pointer is made of a script only: the events are what the browser would send.
    make = """(kind) => {
      const data = new DataTransfer();
      data.items.add(new File([new Uint8Array([137, 80, 78, 71])], kind + ".png", { type: "image/png" }));
      const way = { bubbles: true, cancelable: true };
      const event = kind === "paste" ? new ClipboardEvent("paste", { clipboardData: data, ...way })
        : new DragEvent("drop", { dataTransfer: data, ...way });
      document.getElementById("text").dispatchEvent(event);
    }"""
    await page.evaluate(make, "paste")
    await expect(page.locator("#attached img")).to_have_count(1)
    await page.evaluate(make, "drop")
    await expect(page.locator("#attached img")).to_have_count(2)


async def test_json_follows_the_schema_in_the_box(site):
    page = await site.open()
    await page.click("#json")
    await page.fill("#schema", "{not json")
    await expect(page.locator("#schema-problem")).to_contain_text("This is not JSON")
    await ask(page, "Where?")
    await expect(page.locator("#notice")).to_contain_text("This is not JSON")
    await expect(page.locator("#text")).to_have_value("Where?")
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    await page.fill("#schema", json.dumps(schema))
    await page.press("#text", "Enter")
    await done(page)
    output = site.model.requests[0].output_format
    assert (output.kind, output.value) == ("json_schema", schema)
    await expect(page.locator(".code figcaption")).to_contain_text("json")


async def test_stop_keeps_what_was_written_and_ends_the_request(site):
    page = await site.open()
    site.model.delay_s = 0.005
    await ask(page, "a long one")
    await expect(page.locator(".answer .prose:visible")).to_contain_text("word3")
    await page.keyboard.press("Escape")
    await expect(page.locator(".answer .note")).to_have_text("Stopped.")
    await expect(page.locator("#stop")).to_be_hidden()
    await until(lambda: site.model.closed != [])
    await expect(page.locator(".answer .prose:visible")).to_contain_text("word3")


async def test_editing_makes_a_branch_and_both_can_be_seen(site):
    page = await site.open()
    await ask(page, "first")
    await done(page)
    await ask(page, "follow")
    await done(page, 2)
    await page.locator(".user").first.hover()
    await page.locator("[aria-label='Edit message']").first.click()
    await page.fill("[aria-label='Edit message']", "second")
    await page.keyboard.press("Enter")
    await expect(page.locator(".answer")).to_have_count(1)
    await done(page)
    await expect(page.locator(".answer")).to_contain_text("You said: second")
    await expect(page.locator(".user .branches")).to_contain_text("2 / 2")
    await page.click(".user [aria-label='Previous version']")
    await expect(page.locator(".answer").first).to_contain_text("You said: first")
    await expect(page.locator(".answer")).to_have_count(2)


async def test_an_answer_is_made_again_beside_the_old_one(site):
    page = await site.open()
    await ask(page, "hello")
    await done(page)
    await page.click("[aria-label='Answer again']")
    await expect(page.locator(".answer .branches")).to_contain_text("2 / 2")
    await done(page)
    assert [len(r.messages) for r in site.model.requests] == [1, 1]


async def test_the_arrow_key_edits_the_last_message(site):
    page = await site.open()
    await ask(page, "hello")
    await done(page)
    await page.press("#text", "ArrowUp")
    await expect(page.locator(".edit textarea")).to_be_focused()
    await expect(page.locator(".edit textarea")).to_have_value("hello")
    await page.keyboard.press("Escape")
    await expect(page.locator(".edit")).to_have_count(0)


async def test_conversations_outlive_a_reload_and_go_through_a_file(site, tmp_path):
    page = await site.open()
    await ask(page, "remember me")
    await done(page)
    await page.reload()
    await expect(page.locator(".answer")).to_contain_text("You said: remember me")
    await expect(page.locator(".entry.current")).to_contain_text("remember me")
    async with page.expect_download() as download:
        await page.click("#export")
    file = tmp_path / "out.json"
    await (await download.value).save_as(file)
    await page.locator(".entry").hover()
    await page.click("[aria-label='Delete remember me']")
    await page.click("#confirm [value=yes]")
    await expect(page.locator(".entry")).to_have_count(0)
    await expect(page.locator("#empty")).to_be_visible()
    await page.set_input_files("#import-file", file)
    await expect(page.locator(".answer")).to_contain_text("You said: remember me")
    wrong = {"name": "other.json", "mimeType": "application/json", "buffer": b'{"a": 1}'}
    await page.set_input_files("#import-file", wrong)
    await expect(page.locator("#notice")).to_contain_text("other.json cannot be imported")


async def test_a_reload_in_the_middle_of_an_answer_keeps_the_question(site):
    page = await site.open()
    site.model.gate.clear()
    await ask(page, "hold on")
    await until(lambda: len(site.model.running) == 1)
    await expect(page.locator(".entry.current")).to_contain_text("hold on")
    await page.reload()
    site.model.gate.set()
    await expect(page.locator(".user")).to_contain_text("hold on")
    await page.click("text=Try again")
    await done(page)
    await expect(page.locator(".answer")).to_contain_text("You said: hold on")


async def test_the_settings_are_those_of_the_guide_and_are_sent(site):
    page = await site.open()
    await page.click("#open-panel")
    labels = await page.locator("#fields label").all_text_contents()
    assert labels == ["System prompt", "Temperature", "Top p", "Max tokens", "Frequency penalty", "Streaming",
                      "Timeout", "Max messages"]
    await page.fill("#system", "Be brief.")
    for name, value in (("temperature", "0.3"), ("top_p", "0.9"), ("max_tokens", "77"), ("frequency_penalty", "0.5")):
        await page.fill(f"#{name}", value)
    await page.fill("#max_messages", "1")
    await page.fill("#temperature", "99")  # out of range: the last good value stays
    await expect(page.locator("#temperature")).to_have_attribute("aria-invalid", "true")
    await page.uncheck("#stream")
    await ask(page, "one")
    await done(page)
    await ask(page, "two")
    await done(page, 2)
    request = site.model.requests[1]
    assert [(m.role, m.text) for m in request.messages] == [("system", "Be brief."), ("user", "two")]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.frequency_penalty) == (0.3, 0.9, 0.5)
    assert request.max_tokens == 77
    await expect(page.locator(".answer").nth(1)).to_contain_text("You said: two")
    await page.click("text=Back to the defaults")
    await ask(page, "three")
    await done(page, 3)
    assert site.model.requests[2].sampling.temperature is None
    assert len(site.model.requests[2].messages) == 5


@pytest.mark.parametrize("site", [{"api_keys": {"default": "sesame"}}], indirect=True)
async def test_a_key_is_asked_for_where_one_is_needed_and_the_text_waits(site):
    page = await site.open()
    await expect(page.locator("#keybox")).to_be_visible()
    await page.fill("#text", "let me in")
    await page.fill("#key", "wrong")
    await page.keyboard.press("Enter")
    await expect(page.locator("#key-why")).to_contain_text("not valid")
    await expect(page.locator("#text")).to_have_value("let me in")
    await page.fill("#key", "sesame")
    await page.keyboard.press("Enter")
    await done(page)
    await expect(page.locator(".answer")).to_contain_text("You said: let me in")
    await expect(page.locator("#model-name")).to_have_text("demo-vl")


@pytest.mark.parametrize(("error", "sentence"), [
    (InvalidRequest("This prompt has 9000 tokens, but the context is 4096."), "9000 tokens"),
    (Unavailable("The memory is full.", retry_after_s=7), "It may be tried again in 7 s."),
])
async def test_a_refused_request_gives_the_text_back_and_says_why(site, error, sentence):
    page = await site.open()
    site.model.fails_next = error
    await page.set_input_files("#files", [PICTURE])
    await ask(page, "too much")
    await expect(page.locator("#notice")).to_contain_text(sentence)
    await expect(page.locator("#text")).to_have_value("too much")
    await expect(page.locator("#attached img")).to_have_count(1)
    await expect(page.locator(".turn")).to_have_count(0)
    await page.click("#notice >> text=Try again")
    await done(page)
    await expect(page.locator("#notice")).to_be_hidden()


async def test_a_failure_within_an_answer_keeps_what_came(site):
    page = await site.open()
    site.model.breaks_next = EngineError("The engine tripped.")
    await ask(page, "a long one")
    await expect(page.locator(".note.bad")).to_contain_text("incomplete. The engine tripped.")
    await expect(page.locator(".answer .prose:visible")).to_contain_text("word2")
    await page.click("text=Try again")
    await done(page)
    await expect(page.locator(".answer .prose:visible")).to_contain_text("word399")


async def test_a_server_that_is_gone_is_said_and_the_text_kept(site):
    page = await site.open()
    await page.route("**/v1/**", lambda route: route.abort())
    await ask(page, "anybody there?")
    await expect(page.locator("#notice")).to_contain_text("The server cannot be reached")
    await expect(page.locator("#text")).to_have_value("anybody there?")
    await expect(page.locator("#model")).to_have_attribute("data-state", "gone")
    await page.unroute("**/v1/**")
    await page.click("#notice >> text=Try again")
    await done(page)


async def test_the_page_s_own_time_limit_ends_an_answer(site):
    page = await site.open()
    await page.click("#open-panel")
    await page.fill("#timeout", "1")
    site.model.gate.clear()
    await ask(page, "slow")
    await expect(page.locator("#notice")).to_contain_text("within 1 s")
    await expect(page.locator("#text")).to_have_value("slow")


@pytest.mark.parametrize("site", [{"model": seeing_model(modalities=frozenset({"text"}))}], indirect=True)
async def test_a_model_without_vision_says_so_before_anything_is_sent(site):
    page = await site.open()
    await expect(page.locator("#attach")).to_have_class("quiet off")
    await page.fill("#text", "look")
    await page.click("#attach")
    await expect(page.locator("#notice")).to_contain_text("demo-vl reads text only")
    await page.set_input_files("#files", [PICTURE])
    await expect(page.locator("#attached")).to_be_hidden()
    await expect(page.locator("#text")).to_have_value("look")


@pytest.mark.parametrize("site", [{"settings": Settings().with_values(server__max_body_mb=0.001)}], indirect=True)
async def test_a_picture_that_is_too_big_is_said_with_both_sizes(site):
    page = await site.open()
    await expect(page.locator("#model")).to_have_attribute("data-state", "ready")
    await page.set_input_files("#files", [{**PICTURE, "buffer": png() + bytes(4000)}])
    await expect(page.locator("#notice")).to_contain_text("tree.png is too big")


@pytest.mark.parametrize("site", [{"model": seeing_model(tool_parser=None, reasoning_parser=None)}], indirect=True)
async def test_switches_of_what_the_model_cannot_do_are_absent(site):
    page = await site.open()
    await expect(page.locator("#model")).to_have_attribute("data-state", "ready")
    await expect(page.locator("#think")).to_be_hidden()
    await expect(page.locator("#tools")).to_be_hidden()


async def test_a_phone_shows_everything_without_sideways_scrolling(site):
    page = await site.open(size=(360, 740))
    await ask(page, "Explain binary search")
    await done(page)
    widths = "[document.documentElement.scrollWidth, document.getElementById('scroll').scrollWidth, innerWidth]"
    assert max(await page.evaluate(widths)) == 360
    await expect(page.locator("#sidebar")).not_to_be_in_viewport()
    await page.click("#open-sidebar")
    await expect(page.locator("#sidebar")).to_be_in_viewport()
    await page.click("#list .name")
    await expect(page.locator("#sidebar")).not_to_be_in_viewport()
    await page.click("#open-panel")
    await expect(page.locator("#system")).to_be_in_viewport()
    await page.keyboard.press("Escape")
    await expect(page.locator("#panel")).to_be_hidden()
    await page.click("#tools")
    box = await page.locator("#tools-menu").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360


async def test_colours_follow_the_system_and_the_button(site):
    background = "getComputedStyle(document.documentElement).backgroundColor"
    page = await site.open(color_scheme="dark")
    dark = await page.evaluate(background)
    await page.click("#theme")  # as the system → light
    light = await page.evaluate(background)
    assert dark != light
    await page.reload()
    assert await page.evaluate(background) == light
    await page.click("#theme")  # → dark
    assert await page.evaluate(background) == dark


async def test_every_control_has_a_name_and_the_page_is_usable_by_keyboard(site):
    page = await site.open()
    await expect(page.locator("#text")).to_be_focused()
    await ask(page, "hello")
    await done(page)
    unnamed = """[...document.querySelectorAll("button, input, textarea, a")].filter((el) => !(el.ariaLabel
      || el.textContent.trim() || el.labels?.length || el.type === "file")).map((el) => el.outerHTML)"""
    assert await page.evaluate(unnamed) == []
    await expect(page.locator("#announce")).to_have_text("The answer is complete.")
    await page.keyboard.press("Alt+n")
    await expect(page.locator("#empty")).to_be_visible()
    await expect(page.locator("#text")).to_be_focused()
    await page.locator("#scroll").focus()
    await page.keyboard.press("?")
    await expect(page.locator("#keys")).to_be_visible()


async def test_what_a_model_writes_never_becomes_markup(site):
    page = await site.open()
    evil = '<img src=x onerror=alert(1)> <script>alert(1)</script> [x](javascript:alert(1)) ![p](https://example.org/p.png)'
    await ask(page, evil)
    await done(page)
    answer = page.locator(".answer .prose:visible")
    await expect(answer).to_contain_text("<script>alert(1)</script>")
    assert await answer.locator("img, script").count() == 0
    assert await answer.locator("a").evaluate_all("links => links.map(a => a.protocol)") == ["https:"]


async def test_two_answers_never_run_at_once_in_a_page(site):
    page = await site.open()
    site.model.gate.clear()
    await ask(page, "one")
    await until(lambda: len(site.model.running) == 1)
    await ask(page, "two")
    await expect(page.locator("#text")).to_have_value("two")
    site.model.gate.set()
    await done(page)
    await asyncio.sleep(0)
    assert len(site.model.requests) == 1


async def test_what_a_long_wait_is_for_is_said(site):
    page = await site.open()
    site.model.gate.clear()
    await ask(page, "hello")
    await until(lambda: len(site.model.running) == 1)
    progress = Progress(next(iter(site.model.running)), "prefill", 8000, 2000, 0, 100)
    site.context.read_status = lambda: EngineStatus(num_running=1, requests=(progress,))
    await expect(page.locator(".waiting")).to_contain_text("Reading the prompt: 25 % of 8")
    progress = replace(progress, phase="waiting", queue_position=2)
    await expect(page.locator(".waiting")).to_contain_text("Waiting for 2 before it")
    site.model.gate.set()
    await done(page)
    await expect(page.locator(".waiting")).to_be_hidden()


async def test_of_several_models_one_is_picked(site):
    names = [{"id": name, "root": name} for name in ("demo-vl", "other")] + [{"id": "default", "root": "demo-vl"}]
    page = await site.open(routes={"**/v1/models": {"data": names}})
    await expect(page.locator("#pick option")).to_have_text(["demo-vl", "other"])
    await page.select_option("#pick", "other")
    async with page.expect_request("**/v1/chat/completions") as sent:
        await ask(page, "hello")
    assert (await sent.value).post_data_json["model"] == "other"
    await done(page)
    await page.reload()
    await expect(page.locator("#pick")).to_have_value("other")
