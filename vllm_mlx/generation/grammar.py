"""Grammars: what a client asked the answer to look like, compiled for the engine. Worker threads; no MLX.

A `GrammarCompiler` belongs to one loaded model, over whose tokens its grammars are. What cannot be enforced on
the tokens is an InvalidRequest that names the keyword, and nothing is accepted to be ignored, but for two exceptions
that come with a note: a `format` that llguidance does not know (an annotation, says JSON Schema 2020-12), and the
parameters of tools that are not `strict`, which are enforced as far as they can be.

`json_schema.py` prepares schemas, `tool_grammar.py` and `tool_values.py` write the grammar of tool calls.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

from llguidance import LLMatcher, LLTokenizer, grammar_from

from vllm_mlx.engine.constraint import AfterReasoning, GrammarConstraint
from vllm_mlx.engine.markers import Marker
from vllm_mlx.engine.request import Constraint
from vllm_mlx.errors import InvalidRequest
from vllm_mlx.generation.checks import check_schema
from vllm_mlx.generation.json_schema import JSON_STYLE, first_line, prepared_schema, refusal, schema_source, unsupported
from vllm_mlx.generation.request import OutputFormat, Tool, ToolChoice
from vllm_mlx.generation.tool_grammar import CallGrammar, LarkWriter, SpecialTokens
from vllm_mlx.generation.tool_values import ArgumentWriter, Unwritable
from vllm_mlx.parsers.tool_parser import Envelope

_MAX_CHOICES = 10_000


@dataclass(frozen=True, slots=True)
class ReasoningTokens:
    """Where the reasoning stands in the tokens; `starts_open` when the prompt has opened it."""

    start: Marker
    end: Marker
    starts_open: bool = False


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """A grammar ready for use, and the source it was made of. `make` gives each sequence its own state.

    `notes` say what could not be enforced, for the diagnostics.
    """

    source: str
    prototype: LLMatcher
    vocab_size: int
    stop_token_ids: tuple[int, ...]
    notes: tuple[str, ...] = ()

    def make(self, reasoning: ReasoningTokens | None = None) -> Constraint:
        """A constraint at the grammar's start; with markers, one that waits until the reasoning has ended."""
        constraint = GrammarConstraint(
            self.prototype.deep_copy(), vocab_size=self.vocab_size, stop_token_ids=self.stop_token_ids
        )
        if reasoning is None:
            return constraint
        return AfterReasoning(
            constraint,
            vocab_size=self.vocab_size,
            start=reasoning.start,
            end=reasoning.end,
            starts_open=reasoning.starts_open,
            stop_token_ids=self.stop_token_ids,
        )

    def maker(self, reasoning: ReasoningTokens | None = None) -> Callable[[], Constraint]:
        """What `engine.Request.make_constraint` wants."""
        return lambda: self.make(reasoning)


class GrammarCompiler:
    """Compiles and remembers grammars over one tokenizer. Safe to call from several worker threads.

    `tokenizer_json` gives the text of a tokenizer.json; it is asked for at the first grammar, because reading a large
    vocabulary takes seconds (`prepare` does it ahead).
    """

    def __init__(
        self,
        tokenizer_json: Callable[[], str],
        *,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        cache_size: int = 256,
    ) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        self._cache_size = cache_size
        self._cache: OrderedDict[str, Future[CompiledGrammar]] = OrderedDict()
        self._lock = Lock()
        self._tokenizer_lock = Lock()
        self._tokenizer: LLTokenizer | None = None
        self._added_tokens: dict[str, int] = {}
        self.num_compilations = 0

    @classmethod
    def for_tokenizer(
        cls, tokenizer: Any, *, vocab_size: int, eos_token_ids: Iterable[int], cache_size: int = 256
    ) -> GrammarCompiler:
        """For a transformers fast tokenizer, added tokens included."""
        return cls(
            lambda: _fast_tokenizer_json(tokenizer),
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
            cache_size=cache_size,
        )

    def prepare(self) -> LLTokenizer:
        """The tokenizer as grammars see it, built once."""
        with self._tokenizer_lock:
            if self._tokenizer is None:
                try:
                    document = self._tokenizer_json()
                    added = json.loads(document).get("added_tokens", ())
                    known = [t for t in added if t["id"] < self._vocab_size]
                    if len(known) < len(added):  # tokens for which the model has no logits
                        document = json.dumps({**json.loads(document), "added_tokens": known})
                    self._added_tokens = {t["content"]: t["id"] for t in known}
                    self._tokenizer = LLTokenizer(
                        document, n_vocab=self._vocab_size, eos_token=list(self._eos_token_ids)
                    )
                except ValueError as error:
                    raise InvalidRequest(
                        f"This model's tokenizer cannot be used with grammars ({first_line(error)}); ask without "
                        "structured output.",
                        code="grammar_unavailable",
                    ) from error
            return self._tokenizer

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return self._eos_token_ids

    def request(
        self,
        output_format: OutputFormat | None,
        tools: Sequence[Tool] = (),
        choice: ToolChoice = ToolChoice(),
        *,
        is_parallel: bool = True,
        envelope: Envelope | None = None,
    ) -> CompiledGrammar | None:
        """The grammar of a whole request; None when its answer is free.

        A tool choice of `auto` constrains nothing unless a tool is strict or there is an output format: then the answer
        is text (or the document) or calls. Without an envelope calls cannot be told from text: `auto` then says
        nothing of calls, and the other choices are refused.
        """
        if choice.mode == "named":
            tools, is_parallel = [tool for tool in tools if tool.name == choice.name], False
        if not tools or choice.mode == "none":
            return self.output_format(output_format) if output_format is not None else None
        is_auto = choice.mode == "auto"
        if envelope is None:
            if not is_auto:
                raise InvalidRequest(
                    "This model's tool format cannot be forced; ask with tool_choice auto.", param="tool_choice"
                )
            return self.output_format(output_format) if output_format is not None else None
        if is_auto and output_format is None and not any(tool.strict for tool in tools):
            return None
        document = output_format if is_auto else None
        key = repr((document, [(t.name, t.strict, json.dumps(t.parameters, default=dict)) for t in tools]))
        key += repr((choice.mode, is_parallel, envelope))
        return self._cached(key, lambda: self._compile_tools(document, tools, is_auto, is_parallel, envelope))

    def output_format(self, wanted: OutputFormat) -> CompiledGrammar:
        """The grammar of an output format. InvalidRequest names its field and, for schemas, the keyword."""
        source, notes = output_source(wanted)
        compiled = self._cached(source, lambda: self._compile(source, wanted.param))
        return replace(compiled, notes=notes)

    def _cached(self, key: str, build: Callable[[], CompiledGrammar]) -> CompiledGrammar:
        """What `build` makes, once: others that ask meanwhile wait for it. Failures are not kept."""
        with self._lock:
            future = self._cache.get(key)
            is_ours = future is None
            if future is None:
                future = self._cache[key] = Future()
                while len(self._cache) > self._cache_size:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(key)
        if not is_ours:
            return future.result()
        try:
            compiled = build()
        except BaseException as error:  # raised again; whoever waits for the same grammar must hear of it too
            with self._lock:
                self._cache.pop(key, None)
            future.set_exception(error)
            raise
        future.set_result(compiled)
        return compiled

    def _compile(self, source: str, param: str, notes: tuple[str, ...] = ()) -> CompiledGrammar:
        matcher = self._matcher(source)
        if matcher.is_error():
            raise refusal(matcher.get_error(), source, param)
        return CompiledGrammar(source, matcher, self._vocab_size, self._eos_token_ids, notes)

    def _matcher(self, source: str) -> LLMatcher:
        tokenizer = self.prepare()
        with self._lock:
            self.num_compilations += 1
        return LLMatcher(tokenizer, source, log_level=0)

    def _compile_tools(
        self,
        document: OutputFormat | None,
        tools: Sequence[Tool],
        is_auto: bool,
        is_parallel: bool,
        envelope: Envelope,
    ) -> CompiledGrammar:
        if document is not None:
            self.output_format(document)  # refused, if at all, by its own field and not by that of the tools
        writer = LarkWriter(self._special_tokens())
        notes: list[str] = []
        writer.define("start", "")
        bodies = [self._arguments(writer, tool, i, envelope, notes) for i, tool in enumerate(tools)]
        calls = CallGrammar(writer, envelope, [tool.name for tool in tools], bodies)
        if not is_auto:
            lark = calls.required(is_parallel=is_parallel)
        elif document is None:
            lark = calls.automatic(is_parallel=is_parallel)
        else:
            lark = calls.or_document("@document", is_parallel=is_parallel)
        grammars = [{"lark_grammar": lark}]
        if document is not None:
            source, document_notes = output_source(document)
            notes += document_notes
            inner = json.loads(source)["grammars"][0] if source.startswith("{") else {"lark_grammar": source}
            grammars.append({**inner, "name": "document"})
        return self._compile(json.dumps({"grammars": grammars}), "tools", tuple(notes))

    def _arguments(self, writer: LarkWriter, tool: Tool, index: int, envelope: Envelope, notes: list[str]) -> str:
        """A Lark expression for one tool's arguments, refused by name where a strict tool asks for too much."""
        param = f"tools.{index}.function.parameters"
        schema, dropped = prepared_schema({"type": "object", "properties": {}, **tool.parameters}, param=param)
        style = {**JSON_STYLE, **({} if tool.strict else {"lenient": True})}
        error = self._matcher(schema_source(schema, style)).get_error()
        if error and tool.strict:
            raise refusal(error, schema_source(schema, style), param)
        if error:
            notes.append(f"the parameters of tool {tool.name!r} are not enforced: {first_line(error)}")
            schema = {"type": "object"}
        arguments = ArgumentWriter(writer, envelope, schema, is_strict=tool.strict, json_style=JSON_STYLE)
        try:
            expression = arguments.write()
        except Unwritable as unwritable:
            if tool.strict:
                raise unsupported([unwritable.keyword], schema, param) from None
            notes.append(f"the parameters of tool {tool.name!r} are not enforced: {unwritable.keyword!r}")
            expression = ArgumentWriter(
                writer, envelope, {"type": "object"}, is_strict=False, json_style=JSON_STYLE
            ).write()
        notes += [f"tool {tool.name!r}: {note}" for note in (*dropped, *arguments.notes)]
        return expression

    def _special_tokens(self) -> SpecialTokens:
        tokenizer = self.prepare()
        special = {text: i for text, i in self._added_tokens.items() if tokenizer.is_special_token(i)}
        return SpecialTokens(special, frozenset(self._eos_token_ids))


def output_source(wanted: OutputFormat) -> tuple[str, tuple[str, ...]]:
    """(serialised grammar, notes) of an output format."""
    param = wanted.param
    match wanted.kind:
        case "json_object":
            return schema_source({"type": "object"}), ()
        case "json_schema":
            schema, notes = prepared_schema(wanted.value, param=param)
            return schema_source(schema), notes
        case "choice":
            return LLMatcher.grammar_from_lark(choice_lark(wanted.value, param=param)), ()
    if not isinstance(wanted.value, str) or not wanted.value.strip():
        raise InvalidRequest(f"A {wanted.kind} grammar must be a text that is not empty.", param=param)
    check_schema(wanted.value, param)
    match wanted.kind:
        case "regex":
            return LLMatcher.grammar_from_regex(wanted.value), ()
        case "lark":
            return LLMatcher.grammar_from_lark(wanted.value), ()
        case "gbnf":
            try:
                return grammar_from("gbnf", wanted.value), ()
            except ValueError as error:
                raise InvalidRequest(f"The GBNF grammar cannot be read: {first_line(error)}", param=param) from error
    raise InvalidRequest(
        f"Unknown output format {wanted.kind!r}; known are json_object, json_schema, regex, choice, lark and gbnf.",
        param=param,
    )


def choice_lark(choices: Any, *, param: str) -> str:
    if not isinstance(choices, list | tuple) or not choices or not all(isinstance(c, str) for c in choices):
        raise InvalidRequest("A choice needs a list of at least one string.", param=param)
    if len(choices) > _MAX_CHOICES:
        raise InvalidRequest(f"A choice has at most {_MAX_CHOICES} strings, not {len(choices)}.", param=param)
    return "start: " + " | ".join(json.dumps(choice) for choice in choices)


def _fast_tokenizer_json(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError("it is not a fast tokenizer")
    document = json.loads(backend.to_str())
    document["truncation"] = document["padding"] = None
    return json.dumps(document)
