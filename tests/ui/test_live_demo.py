"""Both pages against the program as it is started, with the built-in model: everything that a person does with them.

Where it matters what the model says, the question is one that it must know, or the answer's shape is forced.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re

import httpx
import pytest

from tests.ui.acts import PICTURE, ask, assert_nothing_scrolls_sideways, done, expect, png, words

pytestmark = pytest.mark.asyncio(loop_scope="session")

STORY = "Write a short story about a lighthouse"
BACKGROUND = "getComputedStyle(document.documentElement).backgroundColor"


# ── chat ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_question_is_answered_with_its_numbers_and_the_next_finds_its_prompt_in_the_cache(demo):
    page = await demo.open()
    await expect(page.locator("#model-name")).to_have_text("demo")
    await expect(page.locator("#model-facts")).to_contain_text("text + image")
    await ask(page, "What can you do?")
    await done(page)
    await expect(words(page)).not_to_be_empty()
    numbers = page.locator(".numbers[aria-label]")
    await expect(numbers).to_contain_text("tokens/s")
    await expect(numbers).to_contain_text("first after")
    await ask(page, "Reply with pong")
    await done(page, 2)
    await expect(words(page).last).to_contain_text("pong")
    await expect(numbers.nth(1)).to_contain_text(re.compile(r"[1-9]\d? % cached"))


async def test_a_picture_is_seen(demo):
    page = await demo.open()
    await page.set_input_files("#files", [PICTURE, {**PICTURE, "name": "second.png"}])
    await expect(page.locator("#attached img")).to_have_count(2)
    await page.click("[aria-label='Remove second.png']")
    await expect(page.locator("#attached img")).to_have_count(1)
    await ask(page, "What is in the picture?")
    await done(page)
    await expect(page.locator(".user img")).to_have_attribute("alt", "Picture red.png")
    await expect(words(page)).to_contain_text("red")


async def test_reasoning_is_in_a_fold_with_its_time_and_only_when_switched_on(demo):
    page = await demo.open()
    await page.click("#think")
    await ask(page, "What is 2 + 3?")
    await done(page)
    await expect(words(page)).to_contain_text("5")
    await expect(page.locator(".fold summary")).to_contain_text("Thought for")
    await expect(page.locator(".fold .prose")).to_be_hidden()
    await page.click(".fold summary")
    await expect(page.locator(".fold .prose")).to_contain_text("2 + 3")
    await page.click("#think")
    await ask(page, "What is 2 + 3?")
    await done(page, 2)
    await expect(page.locator(".fold:visible")).to_have_count(1)
    await expect(page.locator(".fold[open]")).to_have_count(1)  # what somebody opened stays open


async def test_the_model_calls_the_clock_and_the_calculator_and_answers_from_what_they_say(demo):
    page = await demo.open()
    await page.click("#tools")
    await page.get_by_label("Clock").check()
    await page.get_by_label("Calculator").check()
    await page.keyboard.press("Escape")
    await expect(page.locator("#tools-menu")).to_be_hidden()
    await ask(page, "What is the time in Tokyo?")
    await done(page)
    card = page.locator(".call.done")
    await expect(card).to_contain_text("get_time")
    await expect(card).to_contain_text("Asia/Tokyo")
    await expect(words(page).last).not_to_be_empty()
    await expect(page.locator(".numbers[aria-label]")).to_contain_text("2 requests")
    await ask(page, "What is 19 * 23?")
    await done(page, 2)
    await expect(card.nth(1)).to_contain_text("19 * 23")
    await expect(card.nth(1)).to_contain_text("437")


async def test_an_answer_fits_the_schema_in_the_box_and_what_is_no_schema_is_said(demo):
    page = await demo.open()
    await page.click("#json")
    await page.fill("#schema", "{not json")
    await expect(page.locator("#schema-problem")).to_contain_text("This is not JSON")
    await ask(page, "Is it?")
    await expect(page.locator("#notice")).to_contain_text("This is not JSON")
    await expect(page.locator("#text")).to_have_value("Is it?")
    boolean = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    await page.fill("#schema", json.dumps({**boolean, "additionalProperties": False}))
    await page.press("#text", "Enter")
    await done(page)
    await expect(page.locator(".code figcaption")).to_contain_text("json")
    assert json.loads(await page.locator(".answer .code code").text_content()) in ({"ok": True}, {"ok": False})


async def test_stop_keeps_what_was_written_and_frees_the_server_and_the_rest_can_be_asked_again(demo):
    page = await demo.open()
    await ask(page, STORY)
    await expect(words(page)).to_contain_text("lighthouse")
    await page.keyboard.press("Escape")
    await expect(page.locator(".answer .note")).to_have_text("Stopped.")
    await expect(page.locator("#stop")).to_be_hidden()
    await expect(words(page)).to_contain_text("lighthouse")
    await expect(page.locator(".numbers[aria-label]")).to_contain_text("tokens/s")
    await until_idle(demo.address)
    await page.click("[aria-label='Answer again']")
    await expect(page.locator(".note")).to_have_count(0)
    await expect(words(page)).to_contain_text("lighthouse")
    await page.click("#stop")
    await expect(page.locator(".answer .branches")).to_contain_text("2 / 2")


async def test_editing_makes_a_branch_and_both_can_be_seen(demo):
    page = await demo.open()
    await ask(page, "My name is Ada.")
    await done(page)
    await ask(page, "What is my name?")
    await done(page, 2)
    await page.press("#text", "ArrowUp")
    await expect(page.locator(".edit textarea")).to_have_value("What is my name?")
    await page.keyboard.press("Escape")
    await expect(page.locator(".edit")).to_have_count(0)
    await page.locator(".user").first.hover()
    await page.locator("[aria-label='Edit message']").first.click()
    await page.fill("[aria-label='Edit message']", "Reply with pong")
    await page.keyboard.press("Enter")
    await expect(page.locator(".answer")).to_have_count(1)
    await done(page)
    await expect(words(page)).to_contain_text("pong")
    await expect(page.locator(".user .branches")).to_contain_text("2 / 2")
    await page.click(".user [aria-label='Previous version']")
    await expect(page.locator(".answer")).to_have_count(2)
    await expect(words(page).first).to_contain_text("Ada")


# ── what is kept ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_conversations_outlive_a_reload_and_go_through_a_file(demo, tmp_path):
    page = await demo.open()
    await ask(page, "Reply with pong")
    await done(page)
    await page.reload()
    await expect(words(page)).to_contain_text("pong")
    await expect(page.locator(".numbers[aria-label]")).to_contain_text("tokens")
    await expect(page.locator(".entry.current")).to_contain_text("Reply with pong")
    async with page.expect_download() as download:
        await page.click("#export")
    file = tmp_path / "out.json"
    await (await download.value).save_as(file)
    await page.locator(".entry").hover()
    await page.click("[aria-label='Delete Reply with pong']")
    await page.click("#confirm [value=yes]")
    await expect(page.locator(".entry")).to_have_count(0)
    await expect(page.locator("#empty")).to_be_visible()
    await page.set_input_files("#import-file", file)
    await expect(words(page)).to_contain_text("pong")
    wrong = {"name": "other.json", "mimeType": "application/json", "buffer": b'{"a": 1}'}
    await page.set_input_files("#import-file", wrong)
    await expect(page.locator("#notice")).to_contain_text("other.json cannot be imported")


async def test_a_reload_in_the_middle_of_an_answer_keeps_what_was_written_and_ends_the_request(demo):
    from playwright.async_api import TimeoutError as NotInTime  # not installed everywhere

    page = await demo.open()
    await ask(page, STORY)
    await expect(words(page)).to_contain_text("lighthouse")
    await page.reload()
    await expect(page.locator(".user")).to_contain_text(STORY)
    await expect(words(page)).to_contain_text("lighthouse")
    await expect(page.locator(".note.bad")).to_contain_text("incomplete: the page was closed")
    await until_idle(demo.address)
    await page.reload()
    await expect(words(page)).to_contain_text("lighthouse")
    await page.click("text=Try again")
    await expect(page.locator(".note.bad")).to_have_count(0)
    await expect(words(page)).to_contain_text("lighthouse")
    with contextlib.suppress(NotInTime):  # on a busy machine the answer may be over by now
        await page.click("#stop", timeout=2000)
    await expect(page.locator(".answer .branches")).to_contain_text("2 / 2")


# ── key, errors ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_key_is_asked_for_where_one_is_needed_and_the_text_waits(locked):
    page = await locked.open()
    await expect(page.locator("#keybox")).to_be_visible()
    await page.fill("#text", "Reply with pong")
    await page.fill("#key", "wrong")
    await page.keyboard.press("Enter")
    await expect(page.locator("#key-why")).to_contain_text("not valid")
    await expect(page.locator("#text")).to_have_value("Reply with pong")
    await page.fill("#key", "sesame")
    await page.keyboard.press("Enter")
    await done(page)
    await expect(words(page)).to_contain_text("pong")
    await expect(page.locator("#model-name")).to_have_text("demo")
    await page.goto(f"{locked.address}/dashboard")  # the tab's key is the dashboard's too
    await expect(page.locator("#state-text")).to_contain_text("demo")

    stranger = await locked.open("/dashboard")
    await stranger.fill("#key", "wrong")
    await stranger.keyboard.press("Enter")
    await expect(stranger.locator("#key-why")).to_contain_text("not valid")
    await stranger.fill("#key", "sesame")
    await stranger.keyboard.press("Enter")
    await expect(stranger.locator("#state-text")).to_contain_text("demo")


async def test_what_is_too_big_is_said_where_one_looks_and_nothing_is_lost(locked):
    page = await locked.open()
    await page.fill("#key", "sesame")
    await page.keyboard.press("Enter")
    await expect(page.locator("#model")).to_have_attribute("data-state", "ready")
    await page.set_input_files("#files", [{**PICTURE, "buffer": png() + bytes(60_000)}])
    await expect(page.locator("#notice")).to_contain_text("red.png is too big")
    await page.set_input_files("#files", [PICTURE])
    await expect(page.locator("#attached img")).to_have_count(1)
    for text, sentence in (("hello " * 7000, "context length"), ("hello " * 9500, "larger than 0.05 MiB")):
        await ask(page, text)
        await expect(page.locator("#notice")).to_contain_text(sentence)
        await expect(page.locator("#text")).to_have_value(text)
        await expect(page.locator("#attached img")).to_have_count(1)
        await expect(page.locator(".turn")).to_have_count(0)
    await page.fill("#text", "What is in the picture?")
    await page.click("#notice >> text=Try again")
    await done(page)
    await expect(page.locator("#notice")).to_be_hidden()


async def test_a_server_that_dies_in_an_answer_is_said_and_found_again_when_it_is_back(locked, locked_server):
    page, board = await locked.open(), await locked.open("/dashboard")
    for one in (page, board):
        await one.fill("#key", "sesame")
        await one.keyboard.press("Enter")
    await expect(board.locator("#state")).to_have_class("good")
    await ask(page, STORY)
    await expect(words(page)).to_contain_text("lighthouse")
    locked_server.kill()
    await expect(page.locator(".note.bad")).to_contain_text("This answer is incomplete. The connection to the server")
    await expect(words(page)).to_contain_text("lighthouse")
    await expect(page.locator("#model")).to_have_attribute("data-state", "gone")
    await expect(board.locator("#state-text")).to_contain_text("cannot be reached")
    await ask(page, "Reply with pong")
    await expect(page.locator("#notice")).to_contain_text("The server cannot be reached")
    await expect(page.locator("#text")).to_have_value("Reply with pong")
    drawn = "[...document.querySelectorAll('button use')].filter(u => u.checkVisibility()).map(u => u.getBBox().width)"
    assert all(await page.evaluate(drawn))  # also the drawings that were not needed before
    locked_server.start_again()
    await locked_server.until_ready()
    await expect(page.locator("#model")).to_have_attribute("data-state", "ready")
    await page.click("#notice >> text=Try again")
    await done(page, 2)
    await expect(words(page).last).to_contain_text("pong")
    await expect(board.locator("#state")).to_have_class("good")


# ── dashboard, phone, dark ───────────────────────────────────────────────────────────────────────────────────────────


async def test_the_dashboard_shows_a_request_at_work_cancels_it_and_tells_what_went_wrong(demo):
    page = await demo.open("/dashboard")
    await expect(page.locator("#live-none")).to_be_visible()
    message = {"role": "user", "content": STORY}
    async with httpx.AsyncClient(base_url=demo.address, timeout=60) as client:
        long = {"model": "demo", "messages": [message], "max_tokens": 5000, "ignore_eos": True}
        asked = asyncio.create_task(client.post("/v1/chat/completions", json=long))
        row = page.locator("#live tbody tr")
        await expect(row).to_contain_text("at most 5")
        await expect(row.locator(".phase")).to_have_text("decode")
        await row.locator("[aria-label^=Cancel]").click()
        choice = (await asked).json()["choices"][0]
        assert choice["stop_reason"] == "cancelled" and choice["message"]["content"]
        wrong = await client.post("/v1/chat/completions", json={"messages": [message], "temperature": -1})
        assert wrong.status_code == 400
    await expect(row).to_have_count(0)
    await expect(page.locator("#finished tbody tr").first).to_contain_text("cancelled")
    await expect(page.locator("#problems li").first).to_contain_text("temperature")
    plot = page.locator("#plots canvas").first
    await expect(plot).to_have_attribute("aria-label", "Generated tokens/s: tokens/s 0.0")
    await expect(page.locator("#memory")).to_contain_text("At the limit")
    await expect(page.locator("#cache")).to_contain_text("Requests that found a prefix")
    await expect(page.locator("#checks details").first).to_be_visible()
    await expect(page.locator("#can")).to_contain_text("demo")


async def test_a_phone_shows_both_pages_without_sideways_scrolling(demo):
    page = await demo.open(size=(360, 740))
    await ask(page, "What can you do?")
    await done(page)
    await assert_nothing_scrolls_sideways(page, 360)
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
    await page.goto(f"{demo.address}/dashboard")
    await expect(page.locator("#can")).to_contain_text("demo")
    await assert_nothing_scrolls_sideways(page, 360)


async def test_colours_follow_the_system_and_the_button_on_both_pages(demo):
    page = await demo.open(color_scheme="dark")
    dark = await page.evaluate(BACKGROUND)
    await page.click("#theme")  # as the system → light
    light = await page.evaluate(BACKGROUND)
    assert dark != light
    await page.reload()
    assert await page.evaluate(BACKGROUND) == light
    await page.goto(f"{demo.address}/dashboard")
    assert await page.evaluate(BACKGROUND) == light
    await page.click("#theme")  # → dark
    assert await page.evaluate(BACKGROUND) == dark


async def until_idle(address: str) -> None:
    async with httpx.AsyncClient(base_url=address) as client, asyncio.timeout(30):
        while (await client.get("/v1/requests")).json()["data"]:
            await asyncio.sleep(0.02)
