"""What the built-in model cannot be asked to show in the chat page: Markdown of every kind, failures, waits."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.api.fakes import until
from tests.ui.acts import PICTURE, ask, assert_nothing_scrolls_sideways, done, expect
from tests.ui.conftest import seeing_model
from vllm_mlx.engine.step import EngineStatus, Progress
from vllm_mlx.errors import EngineError, Unavailable

pytestmark = pytest.mark.asyncio(loop_scope="session")

EVERY_KIND = """\
# One
a **bold** `code` $x^2$ and
#2 of *them*
***bold and em*** <https://a.example/>

- a
- b
1. c
   ```js
   f(`x
   y`)
   ```
2. d

   more

> q
> > deeper
> - [ ] open
> - [x] done
lazy

| a | b |
|--:|---|
| 1 | `x|y`
| 2 | **z** |
not a row
---
$$
\\frac{1}{2}
$$
```py
s = \'\'\'a
b\'\'\'  # c
```
end
"""
LISTING = "".join(f"line {i}\n" * (1 + i % 3) for i in range(40))


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
    await page.set_viewport_size({"width": 360, "height": 740})
    await assert_nothing_scrolls_sideways(page, 360)


async def test_an_answer_that_grows_looks_at_each_moment_as_if_it_were_drawn_at_once(site):
    page = await site.open()
    text = f"{EVERY_KIND}\n\n~~~\n{LISTING}"
    differs = """async ([text, from]) => {
      const { MarkdownView } = await import("/ui/render.js");
      const draw = (...texts) => {
        const el = document.createElement("div"), view = new MarkdownView(el);
        for (const one of texts) view.update(one);
        return [el, view];
      };
      const [grown, view] = draw();
      for (let end = 1; end <= text.length; end += end < from ? 1 : 97) {
        view.update(text.slice(0, end));
        const [whole] = draw(text.slice(0, end));
        grown.normalize();
        if (grown.innerHTML !== whole.innerHTML) return [text.slice(0, end), grown.innerHTML, whole.innerHTML];
      }
      view.update(text);
      document.getElementById("log").append(grown);
      getSelection().selectAllChildren(grown.querySelector(":scope > figure:last-child pre"));
      return String(getSelection());
    }"""
    copied = await page.evaluate(differs, [text, len(EVERY_KIND)])  # as somebody would by hand
    assert copied == LISTING.rstrip()


async def test_code_is_copied(site):
    page = await site.open(permissions=["clipboard-read", "clipboard-write"])
    await ask(page, "Explain binary search")
    await done(page)
    await page.click("[aria-label='Copy code']")
    await expect(page.locator("[aria-label='Copied']")).to_be_visible()
    assert (await page.evaluate("navigator.clipboard.readText()")).startswith("def find(values")


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


async def test_a_server_that_has_no_room_is_said_and_the_text_given_back(site):
    page = await site.open()
    site.model.fails_next = Unavailable("The memory is full.", retry_after_s=7)
    await page.set_input_files("#files", [PICTURE])
    await ask(page, "too much")
    await expect(page.locator("#notice")).to_contain_text("The memory is full. It may be tried again in 7 s.")
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


@pytest.mark.parametrize("site", [{"model": seeing_model(tool_parser=None, reasoning_parser=None)}], indirect=True)
async def test_switches_of_what_the_model_cannot_do_are_absent(site):
    page = await site.open()
    await expect(page.locator("#model")).to_have_attribute("data-state", "ready")
    await expect(page.locator("#think")).to_be_hidden()
    await expect(page.locator("#tools")).to_be_hidden()


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
