"""How one answer will be read and shaped: its parser, its grammar, its cap on reasoning. Worker threads.

The three must agree about where the reasoning stands: the parser separates it, the grammar begins behind it, the cap
ends it. So they are decided in one place, from the rendered prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm_mlx.engine.markers import Marker, SpelledMarker
from vllm_mlx.engine.request import Constraint, ThinkingBudget
from vllm_mlx.errors import InvalidRequest
from vllm_mlx.generation.detokenizer import TokenTable
from vllm_mlx.generation.engine_port import Tokenizer
from vllm_mlx.generation.grammar import CompiledGrammar, GrammarCompiler, ReasoningTokens
from vllm_mlx.generation.output import OutputAssembler, ReasoningCounter
from vllm_mlx.generation.prompt import PromptBuilder, visible_tools
from vllm_mlx.generation.request import GenerationRequest
from vllm_mlx.generation.stops import StopMatcher
from vllm_mlx.parsers import pipeline
from vllm_mlx.parsers.pipeline import OutputParser
from vllm_mlx.parsers.schema import ToolSpec

if TYPE_CHECKING:
    from vllm_mlx.settings import ParsingSettings


@dataclass(frozen=True)
class Reading:
    """The assembler is for one generation and has state; the rest goes into the engine's request."""

    assembler: OutputAssembler
    make_constraint: Callable[[], Constraint] | None
    thinking: ThinkingBudget | None


class AnswerReader:
    """Prepares the reading of one model's answers. Thread-safe."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        table: TokenTable,
        builder: PromptBuilder,
        parsing: ParsingSettings,
        grammar: GrammarCompiler | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._table = table
        self._builder = builder
        self._parsing = parsing
        self._grammar = grammar
        self._markers: dict[str, Marker] = {}

    def read(self, request: GenerationRequest, prompt_text: str) -> Reading:
        """May take as long as compiling a grammar does. InvalidRequest for a shape that cannot be forced."""
        starts_open = self._starts_open(request, prompt_text)
        parser = self._parser(request, starts_open)
        tokens = self._reasoning_tokens(parser, starts_open)
        grammar = self._compile(request, parser)
        assembler = OutputAssembler(
            self._table,
            skip=self._skipped_ids(request, parser),
            stops=StopMatcher(request.stop, include_stop=request.include_stop) if request.stop else None,
            parser=parser,
            reasoning=self._counter(parser, tokens),
            wants_logprobs=request.sampling.num_logprobs is not None,
            allows_parallel_calls=request.parallel_tool_calls,
        )
        before_call = ""
        if grammar is not None and request.output_format is None and parser is not None and parser.envelope:
            before_call = parser.envelope.reasoning_end
        budget = self._thinking_budget(request, parser, tokens, before_call)
        make_constraint = None
        if grammar is not None:
            assembler.notes.extend(grammar.notes)
            waits = tokens is not None and self._may_reason(request, parser, prompt_text, starts_open)
            if tokens is not None and before_call:
                tokens = replace(tokens, end=self._marker(before_call))
            make_constraint = grammar.maker(tokens if waits else None)
        return Reading(assembler, make_constraint, budget)

    # ── the parser ──────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def reasoning_format(self) -> str | None:
        return named_format(self._parsing.reasoning_parser)

    def _is_parsed(self, request: GenerationRequest) -> bool:
        return request.parse_output and request.prompt is None

    def _starts_open(self, request: GenerationRequest, prompt_text: str) -> bool:
        """The answer begins inside reasoning: the template has opened it, or the message to be continued has."""
        if not self._is_parsed(request) or self.reasoning_format is None:
            return False
        if pipeline.prompt_opens_reasoning(self.reasoning_format, prompt_text):
            return True
        if not request.continue_final_message:
            return False
        started = pipeline.build(reasoning_format=self.reasoning_format)
        started.feed(request.messages[-1].text)
        markers = started.reasoning_markers
        return started.is_reasoning_open and markers is not None and markers.start in request.messages[-1].text

    def _parser(self, request: GenerationRequest, starts_open: bool) -> OutputParser | None:
        if not self._is_parsed(request):
            return None
        tools = visible_tools(request)
        return pipeline.build(
            tool_format=self._tool_format(request) if tools else None,
            reasoning_format=self.reasoning_format,
            tools=[ToolSpec(t.name, t.parameters) for t in tools],
            starts_open=starts_open,
        )

    def _tool_format(self, request: GenerationRequest) -> str | None:
        if not self._parsing.enable_auto_tool_choice and request.tool_choice.mode == "auto":
            return None
        if not self._builder.template.traits.takes_tools:
            return self._builder.template.described_format  # the template knows no tools, so ours described them
        return named_format(self._parsing.tool_call_parser)

    def _skipped_ids(self, request: GenerationRequest, parser: OutputParser | None) -> frozenset[int]:
        """Special tokens that are no text; those which the parser's markers are made of must stay."""
        if not request.skip_special_tokens:
            return frozenset()
        special = self._table.special_ids
        if parser is None or not parser.needs_special_tokens:
            return special
        return frozenset(i for i in special if not parser.keeps(self._table.token_text(i)))

    # ── reasoning ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _reasoning_tokens(self, parser: OutputParser | None, starts_open: bool) -> ReasoningTokens | None:
        markers = parser.reasoning_markers if parser is not None else None
        if markers is None:
            return None
        return ReasoningTokens(self._marker(markers.start), self._marker(markers.end), starts_open=starts_open)

    def _may_reason(
        self, request: GenerationRequest, parser: OutputParser | None, prompt_text: str, starts_open: bool
    ) -> bool:
        """Whether reasoning may come before what a grammar describes."""
        if starts_open:
            return True
        markers = parser.reasoning_markers if parser is not None else None
        if markers is not None and prompt_text.rstrip().endswith(markers.end.strip()):
            return False  # the template has closed it already
        return self._builder.template_variables(request).get("enable_thinking") is not False

    def _counter(self, parser: OutputParser | None, tokens: ReasoningTokens | None) -> ReasoningCounter | None:
        markers = parser.reasoning_markers if parser is not None else None
        if tokens is None or markers is None:
            return None
        return ReasoningCounter(tokens.start, self._marker(markers.thought_end), starts_open=tokens.starts_open)

    def _thinking_budget(
        self,
        request: GenerationRequest,
        parser: OutputParser | None,
        tokens: ReasoningTokens | None,
        before_call: str,
    ) -> ThinkingBudget | None:
        """`before_call`: what a grammar of calls begins behind, where that is not what it is for answers."""
        asked = [n for n in (request.reasoning.max_tokens, self._parsing.max_thinking_tokens) if n is not None]
        markers = parser.reasoning_markers if parser is not None else None
        if tokens is None or markers is None or not asked:
            return None
        return ThinkingBudget(
            max_tokens=min(asked),
            start=tokens.start,
            end=self._marker(markers.thought_end),
            forced_ids=self._encode(before_call or markers.forced_end),
            starts_open=tokens.starts_open,
        )

    def _marker(self, text: str) -> Marker:
        """A text as tokens know it: by ids where added tokens bound it, which nothing merges with; else by bytes."""
        if text not in self._markers:
            ids = self._encode(text)
            added = self._tokenizer.added_tokens_decoder
            if not ids or (ids[0] in added and ids[-1] in added):
                self._markers[text] = ids
            else:
                spelled = text.encode()
                ends = {len(text[:k].encode()): text[k:] for k in range(len(text) + 1)}
                rests = tuple(self._encode(ends.get(k, "")) for k in range(len(spelled) + 1))
                self._markers[text] = SpelledMarker(spelled, ids, self._table.token_bytes, rests)
        return self._markers[text]

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False)) if text else ()

    # ── the grammar ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _compile(self, request: GenerationRequest, parser: OutputParser | None) -> CompiledGrammar | None:
        tools = visible_tools(request)
        is_forced = request.tool_choice.mode in ("required", "named") or any(tool.strict for tool in tools)
        if request.output_format is None and not is_forced:
            return None
        if self._grammar is None:
            raise InvalidRequest(
                "This server cannot force the shape of an answer.",
                param=request.output_format.param if request.output_format is not None else "tool_choice",
            )
        return self._grammar.request(
            request.output_format,
            tools,
            request.tool_choice,
            is_parallel=request.parallel_tool_calls,
            envelope=parser.envelope if parser is not None else None,
        )


def named_format(format_name: str) -> str | None:
    """A parser setting, None for `none`."""
    return None if format_name.lower() in ("none", "off", "") else format_name
