import asyncio
import base64
import io
import random
from contextlib import aclosing

import pytest
from PIL import Image

from tests.fakes import ByteTokenizer, FakeEngine, FakeExpander, fake_profile, fake_service
from vllm_mlx.engine.markers import SpelledMarker
from vllm_mlx.engine.step import FinishReason
from vllm_mlx.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineError,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from vllm_mlx.generation.admission import Admission, Pressure
from vllm_mlx.generation.events import (
    Accepted,
    Finished,
    KeepAlive,
    LogprobsDelta,
    TextDelta,
    ToolCallStarted,
    collect,
)
from vllm_mlx.generation.media import MediaLoader
from vllm_mlx.generation.request import (
    ChatMessage,
    GenerationRequest,
    MediaPart,
    ReasoningOptions,
    SamplingOverrides,
    TextPart,
    Tool,
    ToolChoice,
)
from vllm_mlx.generation.sources import MediaSources
from vllm_mlx.settings import LimitSettings, ParsingSettings, SamplingSettings, Settings

NAMES = iter(range(10**9))


def ask(text="Hi", **fields):
    fields.setdefault("messages", (ChatMessage("user", (TextPart(text),)),))
    return GenerationRequest(id=f"r{next(NAMES)}", **fields)


def complete(prompt="Hi", **fields):
    return GenerationRequest(id=f"r{next(NAMES)}", prompt=prompt, **fields)


async def events_of(service, request):
    async with aclosing(service.generate(request)) as events:
        return [event async for event in events]


WEATHER = Tool("weather", "Says the weather.", {"type": "object", "properties": {"city": {"type": "string"}}})
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'


# ── the shape of a stream ───────────────────────────────────────────────────────────────────────────────────────────


async def test_accepted_comes_first_and_finished_last_and_once():
    events = await events_of(fake_service(FakeEngine(reply="Hello, you.")), ask())
    assert isinstance(events[0], Accepted) and isinstance(events[-1], Finished)
    assert sum(isinstance(e, Finished) for e in events) == 1
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == "Hello, you."


async def test_usage_counts_the_end_of_turn_token_and_the_text_leaves_it_out():
    engine = FakeEngine(reply="abc", num_cached_tokens=5)
    message = await collect(fake_service(engine).generate(ask()))
    assert message.text == "abc"
    assert message.finished.reason == "stop"
    assert message.finished.usage.num_completion_tokens == 4
    assert message.finished.usage.num_prompt_tokens == len(engine.requests[0].prompt)
    assert message.finished.usage.num_cached_tokens == 5


async def test_max_tokens_ends_with_length():
    message = await collect(fake_service(FakeEngine(reply="abcdef")).generate(ask(max_tokens=3)))
    assert (message.text, message.finished.reason) == ("abc", "length")


async def test_tokens_that_have_piled_up_become_one_delta():
    engine = FakeEngine(reply="0123456789", gate=asyncio.Event())
    events = fake_service(engine).generate(ask())
    async with aclosing(events):
        assert isinstance(await anext(events), Accepted)
        engine.gate.set()
        for _ in range(200):  # nobody reads meanwhile
            await asyncio.sleep(0)
        rest = [e async for e in events]
    assert [e.text for e in rest if isinstance(e, TextDelta)] == ["0123456789"]


async def test_a_character_split_between_tokens_is_shown_whole():
    events = await events_of(fake_service(FakeEngine(reply="né 🚀")), ask())
    texts = [e.text for e in events if isinstance(e, TextDelta)]
    assert "".join(texts) == "né 🚀"
    assert not any("�" in t for t in texts)


async def test_completions_are_not_parsed():
    message = await collect(fake_service(FakeEngine(reply=f"<think>x</think>{CALL}")).generate(complete()))
    assert message.text == f"<think>x</think>{CALL}"
    assert not message.tool_calls and not message.reasoning


# ── ends ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tokens_per_event", [1, 3, 100])
async def test_a_stop_string_ends_the_answer_is_not_shown_and_cancels(tokens_per_event):
    engine = FakeEngine(reply="one END two END", tokens_per_event=tokens_per_event)
    message = await collect(fake_service(engine).generate(ask(stop=(" END",))))
    assert message.text == "one"
    assert (message.finished.reason, message.finished.stop_sequence) == ("stop", " END")
    assert message.finished.usage.num_completion_tokens == len("one END")
    assert tokens_per_event == 100 or engine.cancelled


async def test_include_stop_shows_the_stop_string():
    message = await collect(fake_service(FakeEngine(reply="one END")).generate(ask(stop=("END",), include_stop=True)))
    assert message.text == "one END"


async def test_cached_tokens_are_true_after_a_stop_string_too():
    engine = FakeEngine(reply="one END two", num_cached_tokens=7, delay_s=0.001)
    message = await collect(fake_service(engine).generate(ask(stop=("END",))))
    assert message.finished.usage.num_cached_tokens == 7


async def test_a_named_stop_token_is_the_stop_sequence():
    engine = FakeEngine(reply="abc", ends_with=FinishReason.STOP)
    end = engine.tokenizer.id_of("<|im_end|>")
    message = await collect(fake_service(engine).generate(ask(stop_token_ids=(end,))))
    assert message.finished.stop_sequence == "<|im_end|>"
    message = await collect(fake_service(engine).generate(ask()))
    assert message.finished.stop_sequence is None


@pytest.mark.parametrize(
    ("reason", "wanted"),
    [
        (FinishReason.REPETITION, "repetition"),
        (FinishReason.CANCELLED, "cancelled"),
        (FinishReason.DEADLINE, "deadline"),
        (FinishReason.LENGTH, "length"),
    ],
)
async def test_the_engines_reason_is_told(reason, wanted):
    message = await collect(fake_service(FakeEngine(ends_with=reason, detail="why")).generate(ask()))
    assert message.finished.reason == wanted


async def test_an_engine_failure_ends_the_stream_with_its_sentence():
    message = await collect(
        fake_service(FakeEngine(reply="abcdef", fails_with="The step failed.", fails_after=3)).generate(ask())
    )
    assert message.text == "abc"
    assert (message.finished.reason, message.finished.error) == ("error", "The step failed.")


async def test_a_refusal_by_the_engine_is_raised_before_accepted():
    service = fake_service(FakeEngine(raises=EngineError("no")))
    with pytest.raises(EngineError):
        await events_of(service, ask())
    assert service.num_live == 0


async def test_an_ill_engine_is_unavailable():
    with pytest.raises(Unavailable, match="told to be ill"):
        await events_of(fake_service(FakeEngine(is_healthy=False)), ask())


async def test_the_deadline_holds_for_streams_and_the_request_may_only_shorten_it():
    settings = Settings(limits=LimitSettings(timeout_s=0.8))
    engine = FakeEngine(reply="x" * 10_000, delay_s=0.005)
    message = await collect(fake_service(engine, settings=settings).generate(ask(timeout_s=100.0)))
    assert message.finished.reason == "deadline"
    assert "0.8 seconds" in message.finished.error
    message = await collect(fake_service(engine).generate(ask(timeout_s=0.8)))
    assert message.finished.reason == "deadline"


async def test_a_deadline_that_passes_before_the_engine_is_raised():
    service = fake_service(settings=Settings(limits=LimitSettings(timeout_s=1e-9)))
    with pytest.raises(DeadlineExceeded):
        await events_of(service, ask())


async def test_a_hanging_engine_does_not_hold_a_request_past_its_deadline(monkeypatch):
    monkeypatch.setattr("vllm_mlx.generation.service.DEADLINE_GRACE_S", 0.02)
    engine = FakeEngine(gate=asyncio.Event())
    service = fake_service(engine)
    message = await collect(service.generate(ask(timeout_s=0.8)))
    assert message.finished.reason == "deadline"
    assert engine.num_live == 0 and service.num_live == 0


async def test_keep_alives_tell_where_the_request_stands():
    engine = FakeEngine(reply="hi", prefill_s=0.1)
    events = await events_of(fake_service(engine, keep_alive_s=0.02), ask("a long prompt"))
    alive = [e for e in events if isinstance(e, KeepAlive)]
    assert alive and alive[0].phase == "prefill"
    assert alive[0].num_computed_tokens == alive[0].num_prompt_tokens // 2


# ── cancelling ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_closing_the_iterator_cancels_and_returns_the_permit():
    engine = FakeEngine(reply="x" * 1000, delay_s=0.001)
    admission = Admission(max_running=1, max_queue=0)
    service = fake_service(engine, admission=admission)
    events = service.generate(ask())
    assert isinstance(await anext(events), Accepted)
    await anext(events)
    assert admission.num_held == 1
    await events.aclose()
    assert admission.num_held == 0 and engine.num_live == 0
    assert engine.cancelled == [engine.requests[0].id]


async def test_cancel_by_id_ends_with_what_was_said():
    engine = FakeEngine(reply="x" * 1000, delay_s=0.001)
    service = fake_service(engine)
    request = ask()
    events = []
    async for event in service.generate(request):
        events.append(event)
        if isinstance(event, TextDelta):
            assert service.cancel(request.id)
    assert events[-1].reason == "cancelled"
    assert not service.cancel(request.id)


async def test_permits_return_to_baseline_after_random_closes_and_errors():
    rng = random.Random(7)
    engine = FakeEngine(reply=lambda r: "y" * rng.randrange(40))
    admission = Admission(max_running=6, max_queue=6)
    service = fake_service(engine, admission=admission)
    bad = [{"messages": ()}, {"sampling": SamplingOverrides(top_p=7)}, {"max_tokens": 10**6}, {"stop": ("y" * 9,)}]

    async def client():
        fields = rng.choice([{}, {}, *bad])
        leave_after = rng.randrange(12)
        try:
            async with aclosing(service.generate(ask(**fields))) as events:
                async for i, event in _enumerate(events):
                    if i == leave_after and not isinstance(event, Finished):
                        return
        except (InvalidRequest, Overloaded):
            pass

    for _ in range(12):
        tasks = [asyncio.create_task(client()) for _ in range(10)]
        await asyncio.sleep(0.002)
        for task in rng.sample(tasks, 3):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert admission.num_held == 0
    assert engine.num_live == 0
    assert service.num_live == 0


async def _enumerate(events):
    i = 0
    async for event in events:
        yield i, event
        i += 1


# ── admission ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_no_permit_means_overloaded_at_once():
    engine = FakeEngine(gate=asyncio.Event())
    service = fake_service(engine, max_running=1, max_queue=0)
    first = service.generate(ask())
    await anext(first)
    with pytest.raises(Overloaded) as caught:
        await events_of(service, ask())
    assert caught.value.retry_after_s >= 1
    await first.aclose()
    engine.gate.set()
    assert (await collect(service.generate(ask()))).finished.reason == "stop"


async def test_memory_pressure_refuses_or_shrinks_the_context():
    pressure = Pressure(rejects_new=True, reason="memory is at 91 %")
    service = fake_service(admission=Admission(max_running=1, max_queue=1, pressure=lambda: pressure))
    with pytest.raises(Unavailable, match="91 %") as refused:
        await events_of(service, ask())
    assert refused.value.retry_after_s
    pressure = Pressure(context_tokens=20, reason="memory is at 86 %")
    with pytest.raises(ContextLengthExceeded, match="86 %"):
        await events_of(service, ask("long " * 50))


async def test_draining_admits_nothing_and_waits_for_what_runs():
    admission = Admission(max_running=2, max_queue=0)
    engine = FakeEngine(gate=asyncio.Event())
    service = fake_service(engine, admission=admission)
    running = asyncio.create_task(collect(service.generate(ask())))
    while not engine.num_live:
        await asyncio.sleep(0)
    admission.start_drain()
    with pytest.raises(Unavailable, match="shutting down"):
        await events_of(service, ask())
    assert not await admission.drained(0.01)
    engine.gate.set()
    assert await admission.drained(5)
    assert (await running).finished.reason == "stop"


# ── reasoning and tools ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tokens_per_event", [1, 7, 1000])
async def test_reasoning_is_separated_and_counted_without_its_markers(tokens_per_event):
    engine = FakeEngine(reply="<think>abc</think>yes", tokens_per_event=tokens_per_event)
    message = await collect(fake_service(engine).generate(ask()))
    assert (message.reasoning, message.text) == ("abc", "yes")
    assert message.finished.usage.num_reasoning_tokens == 3


async def test_a_prompt_that_opens_the_reasoning_is_seen():
    engine = FakeEngine(reply="abc</think>yes")
    message = await collect(fake_service(engine).generate(ask(template_kwargs={"open_thinking": True})))
    assert (message.reasoning, message.text) == ("abc", "yes")
    assert message.finished.usage.num_reasoning_tokens == 3


async def test_continuing_a_message_that_is_still_reasoning_stays_in_it():
    engine = FakeEngine(reply=" more</think>yes")
    messages = (ChatMessage("user", (TextPart("Hi"),)), ChatMessage("assistant", (TextPart("<think>some"),)))
    message = await collect(fake_service(engine).generate(ask(messages=messages, continue_final_message=True)))
    assert (message.reasoning.strip(), message.text) == ("more", "yes")


async def test_harmony_channels_are_told_apart_and_their_markers_do_not_count():
    class Harmony(ByteTokenizer):
        special = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")

        def __init__(self):
            super().__init__(extra=self.special)

    parsing = ParsingSettings(reasoning_parser="harmony", tool_call_parser="harmony", max_thinking_tokens=9)
    reply = "<|channel|>analysis<|message|>abc<|end|><|start|>assistant<|channel|>final<|message|>yes"
    engine = FakeEngine(Harmony(), reply=reply)
    message = await collect(fake_service(engine, settings=Settings(parsing=parsing)).generate(ask()))
    assert (message.reasoning, message.text) == ("abc", "yes")
    assert not engine.requests[0].thinking.starts_open
    reply = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{}<|call|>"
    engine = FakeEngine(Harmony(), reply=reply)
    service = fake_service(engine, settings=Settings(parsing=parsing))
    message = await collect(service.generate(ask(tools=(WEATHER,))))
    assert [(c.name, c.arguments) for c in message.tool_calls] == [("weather", "{}")]
    assert message.finished.reason == "tool_calls"


async def test_enable_thinking_reaches_the_template_and_a_closed_prompt_is_not_reasoning():
    engine = FakeEngine(reply="yes")
    message = await collect(fake_service(engine).generate(ask(reasoning=ReasoningOptions(enabled=False))))
    assert (message.reasoning, message.text) == ("", "yes")
    prompt = engine.tokenizer.decode(engine.requests[0].prompt.token_ids)
    assert prompt.endswith("<think>\n\n</think>\n\n")


async def test_markers_of_plain_words_are_looked_for_in_the_bytes_of_tokens():
    parsing = ParsingSettings(reasoning_parser="granite", tool_call_parser="none", max_thinking_tokens=5)
    thought = "Here is my thought process: hm Here is my response:"
    engine = FakeEngine(reply=thought + " yes")
    service = fake_service(engine, settings=Settings(parsing=parsing))
    message = await collect(service.generate(ask()))
    budget = engine.requests[0].thinking
    assert isinstance(budget.end, SpelledMarker) and budget.end.text == b"Here is my response:"
    assert budget.end.bytes_of(65) == b"A" and budget.end.rests[-2] == (ord(":"),)
    assert (message.reasoning, message.text) == ("hm", "yes")
    assert message.finished.usage.num_reasoning_tokens == len(" hm ")


async def test_the_thinking_budget_is_the_smaller_of_request_and_flag():
    parsing = ParsingSettings(reasoning_parser="qwen3", tool_call_parser="hermes", max_thinking_tokens=50)
    engine = FakeEngine()
    service = fake_service(engine, settings=Settings(parsing=parsing))
    await events_of(service, ask(reasoning=ReasoningOptions(max_tokens=20)))
    await events_of(service, ask(reasoning=ReasoningOptions(max_tokens=90)))
    budget = engine.requests[0].thinking
    assert (budget.max_tokens, engine.requests[1].thinking.max_tokens) == (20, 50)
    assert budget.end == (engine.tokenizer.id_of("</think>"),)
    assert engine.tokenizer.decode(budget.forced_ids) == "\n</think>\n\n"


@pytest.mark.parametrize("tokens_per_event", [1, 5, 1000])
async def test_a_tool_call_is_streamed_and_names_the_finish_reason(tokens_per_event):
    engine = FakeEngine(reply=f"Let me see.\n{CALL}", tokens_per_event=tokens_per_event)
    message = await collect(fake_service(engine).generate(ask(tools=(WEATHER,))))
    assert message.text.strip() == "Let me see."
    assert [(c.name, c.arguments) for c in message.tool_calls] == [("weather", '{"city": "Bonn"}')]
    assert message.finished.reason == "tool_calls"


async def test_without_tools_and_with_tool_choice_none_calls_are_text():
    engine = FakeEngine(reply=CALL)
    for fields in ({}, {"tools": (WEATHER,), "tool_choice": ToolChoice("none")}):
        message = await collect(fake_service(engine).generate(ask(**fields)))
        assert not message.tool_calls and message.text == CALL
        assert message.finished.reason == "stop"
    assert "weather" not in engine.tokenizer.decode(engine.requests[1].prompt.token_ids)


async def test_one_call_is_enough_when_parallel_calls_are_off():
    engine = FakeEngine(reply=f"{CALL}\n{CALL}", tokens_per_event=9)
    message = await collect(fake_service(engine).generate(ask(tools=(WEATHER,), parallel_tool_calls=False)))
    assert len(message.tool_calls) == 1
    assert message.finished.reason == "tool_calls"
    engine = FakeEngine(reply=f"{CALL}\n{CALL}")
    assert len((await collect(fake_service(engine).generate(ask(tools=(WEATHER,))))).tool_calls) == 2


async def test_a_call_cut_off_by_the_limit_ends_with_length():
    engine = FakeEngine(reply=CALL)
    events = await events_of(fake_service(engine), ask(tools=(WEATHER,), max_tokens=len(CALL) // 2))
    assert any(isinstance(e, ToolCallStarted) for e in events)
    assert events[-1].reason == "length"


# ── pictures ────────────────────────────────────────────────────────────────────────────────────────────────────────


def picture(colour, source=None):
    out = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(out, "PNG")
    source = source or "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
    return MediaPart("image", source, f"messages.0.content.{colour}")


def seeing_service(engine):
    return fake_service(
        engine,
        profile=fake_profile(engine.tokenizer, modalities=frozenset({"text", "image"})),
        media=MediaLoader(MediaSources()),
        expander=FakeExpander(engine.tokenizer),
    )


async def test_pictures_reach_the_engine_as_spans_with_their_content_in_the_key():
    engine = FakeEngine()
    parts = (TextPart("Look: "), picture("red"), TextPart(" and "), picture("blue"), picture("red"))
    request = ask(messages=(ChatMessage("user", parts),))
    message = await collect(seeing_service(engine).generate(request))
    prompt = engine.requests[0].prompt
    keys = [prompt.cache_key[s.start : s.end] for s in prompt.media]
    assert len(keys) == 3 and keys[0] == keys[2] != keys[1]
    assert message.finished.diagnostics["visual_inputs"] == 3
    assert message.finished.diagnostics["visual_token_estimate"] == 12
    assert message.finished.diagnostics["visual_phase"] == "stable"
    assert await seeing_service(engine).count_prompt_tokens(request) == message.finished.usage.num_prompt_tokens


async def test_a_bad_picture_is_refused_by_its_part_and_the_next_request_is_served():
    engine = FakeEngine()
    service = seeing_service(engine)
    for source in ("data:image/png;base64,AAAA", "http://127.0.0.1/x.png", "/etc/hostname", "nonsense"):
        with pytest.raises(InvalidRequest) as caught:
            await events_of(service, ask(messages=(ChatMessage("user", (picture("red", source),)),)))
        assert caught.value.param == "messages.0.content.red"
    assert service.num_live == 0
    message = await collect(service.generate(ask(messages=(ChatMessage("user", (picture("red"),)),))))
    assert message.finished.reason == "stop"


async def test_a_text_model_says_that_it_takes_no_pictures():
    with pytest.raises(InvalidRequest, match="takes text, no image"):
        await events_of(fake_service(), ask(messages=(ChatMessage("user", (picture("red"),)),)))


# ── logprobs ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tokens_per_event", [1, 4, 1000])
async def test_logprobs_join_to_the_text_and_come_before_it(tokens_per_event):
    engine = FakeEngine(reply="né 🚀 ok", tokens_per_event=tokens_per_event)
    request = ask(sampling=SamplingOverrides(num_logprobs=2))
    events = await events_of(fake_service(engine), request)
    seen = b""
    said = ""
    for event in events:
        if isinstance(event, LogprobsDelta):
            seen += b"".join(e.token_bytes for e in event.entries)
            assert all(len(e.top) == 2 for e in event.entries)
        if isinstance(event, TextDelta):
            said += event.text
            assert seen.decode() == said
    assert said == "né 🚀 ok"


async def test_logprobs_stop_where_the_text_stops():
    engine = FakeEngine(reply="one END two", tokens_per_event=100)
    request = ask(stop=(" END",), sampling=SamplingOverrides(num_logprobs=0))
    message = await collect(fake_service(engine).generate(request))
    assert b"".join(e.token_bytes for e in message.logprobs) == b"one"


# ── what a client can get wrong ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": ()}, "messages"),
        ({"messages": (ChatMessage("robot", (TextPart("x"),)),)}, "messages.0.role"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"timeout_s": -1.0}, "timeout"),
        ({"stop": ("",)}, "stop.0"),
        ({"stop_token_ids": (10**6,)}, "stop_token_ids.0"),
        ({"sampling": SamplingOverrides(temperature=-1)}, "temperature"),
        ({"tools": (WEATHER, WEATHER)}, "tools.1.function.name"),
        ({"tools": (Tool(""),)}, "tools.0.function.name"),
        ({"tools": (Tool("f", parameters={"type": "array"}),)}, "tools.0.function.parameters"),
        ({"tool_choice": ToolChoice("required")}, "tool_choice"),
        ({"tools": (WEATHER,), "tool_choice": ToolChoice("named", "other")}, "tool_choice"),
        ({"messages": (ChatMessage("tool", (TextPart("x"),), tool_call_id="nobody"),)}, "messages.0.tool_call_id"),
        ({"template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
        ({"reasoning": ReasoningOptions(effort="huge")}, "reasoning_effort"),
        ({"reasoning": ReasoningOptions(max_tokens=-1)}, "max_thinking_tokens"),
    ],
)
async def test_what_is_wrong_is_named(fields, param):
    service = fake_service()
    with pytest.raises(InvalidRequest) as caught:
        await events_of(service, ask(**fields))
    assert caught.value.param == param
    assert service.num_live == 0


async def test_an_overlong_prompt_says_both_counts():
    service = fake_service(profile=fake_profile(context_tokens=50))
    with pytest.raises(ContextLengthExceeded) as caught:
        await events_of(service, ask("x" * 100))
    assert caught.value.context_tokens == 50
    assert caught.value.num_prompt_tokens > 100


async def test_max_tokens_must_fit_beside_the_prompt_unless_it_may_be_clamped():
    engine = FakeEngine(reply="x" * 500)
    service = fake_service(engine, profile=fake_profile(context_tokens=100))
    with pytest.raises(ContextLengthExceeded):
        await events_of(service, ask(max_tokens=90))
    await events_of(service, ask(max_tokens=90, clamp_max_tokens=True))
    await events_of(service, ask())
    for request in engine.requests:
        assert request.max_tokens == 100 - len(request.prompt)


async def test_the_servers_limits_on_tokens_hold():
    limits = LimitSettings(max_tokens=7, max_request_tokens=9)
    engine = FakeEngine(reply="x" * 50)
    service = fake_service(engine, settings=Settings(limits=limits))
    with pytest.raises(InvalidRequest, match="at most 9"):
        await events_of(service, ask(max_tokens=10))
    message = await collect(service.generate(ask()))
    assert message.finished.usage.num_completion_tokens == 7


async def test_two_requests_with_one_id_do_not_run_together():
    engine = FakeEngine(gate=asyncio.Event())
    service = fake_service(engine)
    request = ask()
    first = service.generate(request)
    await anext(first)
    with pytest.raises(InvalidRequest, match="is being served"):
        await events_of(service, request)
    await first.aclose()


# ── diagnostics, tokens ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_diagnostics_say_what_was_used_and_where_it_came_from():
    engine = FakeEngine(num_cached_tokens=3)
    settings = Settings(
        sampling=SamplingSettings(default_top_p=0.5), limits=LimitSettings(effective_context_tokens=1000)
    )
    message = await collect(fake_service(engine, settings=settings).generate(ask()))
    shown = message.finished.diagnostics
    assert shown["effective_context_tokens"] == 1000
    assert shown["effective_context_source"] == "operator_override"
    assert shown["sampling"]["top_p"] == {"value": 0.5, "source": "flag"}
    assert shown["cache"]["cached_tokens"] == 3
    assert shown["timings_ms"]["total"] >= shown["timings_ms"]["decode"] >= 0
    assert shown["runtime"]["max_batch_rows"] == 1


async def test_counting_tokens_gives_what_a_generation_reports():
    service = fake_service(profile=fake_profile(context_tokens=400))
    request = ask(tools=(WEATHER,))
    message = await collect(service.generate(request))
    assert await service.count_prompt_tokens(request) == message.finished.usage.num_prompt_tokens
    assert await service.count_prompt_tokens(ask("x" * 5000)) > 5000


async def test_tokenize_and_detokenize():
    service = fake_service()
    ids = await service.tokenize_prompt(complete("né"))
    assert ids == tuple("né".encode())
    assert await service.tokenize_prompt(complete("")) == ()
    assert await service.detokenize(ids) == "né"
    assert service.token_text(65) == "A"
