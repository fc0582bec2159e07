// From a conversation to the body of a request, and from the answer's chunks back into a turn. Pure, no DOM.

/** What a person can set: the operator guide's section 8, thinking, a JSON schema, the tools to try; of several models, one. */
export const DEFAULTS = {
  model: "default", system: "", temperature: null, top_p: null, max_tokens: null, frequency_penalty: null, stream: true, timeout: 300,
  max_messages: null, thinking: false, tools: [], json: false, schema: "",
};

/** OpenAI messages of the turns on the path; `max_messages` keeps the last ones up to the last question, and begins at a
 *  question. What the answer to it has done already (calls of tools) always goes along. */
export function toMessages(turns, settings) {
  const end = turns.findLastIndex((turn) => turn.role === "user") + 1;
  let kept = settings.max_messages ? turns.slice(Math.max(0, end - settings.max_messages)) : turns;
  while (kept.length && kept[0].role !== "user") kept = kept.slice(1);
  const messages = kept.flatMap((turn) => (turn.role === "user" ? [fromUser(turn)] : fromAnswer(turn)));
  return settings.system.trim() ? [{ role: "system", content: settings.system }, ...messages] : messages;
}

function fromUser(turn) {
  if (!turn.images.length) return { role: "user", content: turn.text };
  const parts = turn.images.map((image) => ({ type: "image_url", image_url: { url: image.url } }));
  if (turn.text.trim()) parts.push({ type: "text", text: turn.text });
  return { role: "user", content: parts };
}

function fromAnswer(turn) {
  return turn.steps.flatMap((step) => {
    if (!step.text && !step.calls.length) return [];
    const message = { role: "assistant", content: step.text };
    if (step.reasoning) message.reasoning_content = step.reasoning;
    if (step.calls.length) {
      message.tool_calls = step.calls.map((call) => ({ id: call.id, type: "function", function: { name: call.name, arguments: call.arguments || "{}" } }));
    }
    const results = step.calls.filter((call) => call.result !== undefined)
      .map((call) => ({ role: "tool", tool_call_id: call.id, content: call.result }));
    return [message, ...results];
  });
}

export function requestBody(turns, settings, toolDefinitions, features = {}) {
  const body = { model: settings.model, messages: toMessages(turns, settings), stream: settings.stream, include_diagnostics: true };
  if (settings.stream) body.stream_options = { include_usage: true };
  for (const name of ["temperature", "top_p", "max_tokens", "frequency_penalty"]) if (settings[name] !== null) body[name] = settings[name];
  if (features.reasoning !== false) body.enable_thinking = settings.thinking;
  if (toolDefinitions.length) body.tools = toolDefinitions;
  if (settings.json) {
    const schema = settings.schema.trim() ? JSON.parse(settings.schema) : null;
    body.response_format = schema ? { type: "json_schema", json_schema: { name: "answer", schema, strict: true } } : { type: "json_object" };
  }
  return body;
}

/** Why a schema cannot be used, as a sentence; "" when it can, or when the box is empty (any JSON object). */
export function schemaProblem(text) {
  if (!text.trim()) return "";
  try {
    const schema = JSON.parse(text);
    return schema && typeof schema === "object" && !Array.isArray(schema) ? "" : "A schema is a JSON object.";
  } catch (error) {
    return `This is not JSON: ${error.message}.`;
  }
}

/** Folds what one request says into a step, and measures it. Times are milliseconds of one clock. */
export class Fold {
  constructor(step, started) {
    this.step = step;
    this.started = started;
    this.first = null;
    this.last = null;
    this.thoughtFrom = null;
    this.numDeltas = 0;
    this.usage = null;
    this.finish = null;
    this.detail = "";
    this.diagnostics = null;
  }

  /** One chunk of a stream. An error inside of it is thrown, with the server's sentence. */
  chunk(chunk, now) {
    if (chunk.error) throw new Error(chunk.error.message ?? "The server failed while it answered.");
    this.usage = chunk.usage ?? this.usage;
    this.diagnostics = chunk.diagnostics ?? this.diagnostics;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    this.#take(choice.delta ?? {}, now);
    this.#end(choice);
  }

  /** A whole answer. */
  whole(answer, now) {
    this.usage = answer.usage;
    this.diagnostics = answer.diagnostics ?? null;
    const choice = answer.choices[0];
    this.#take({ ...choice.message, tool_calls: choice.message.tool_calls?.map((call, index) => ({ ...call, index })) }, now);
    this.#end(choice);
    this.first = null; // nothing was seen before the end
  }

  #take(delta, now) {
    const { step } = this;
    if (delta.reasoning_content) {
      this.thoughtFrom ??= this.first === null ? this.started : now;
      step.reasoning += delta.reasoning_content;
      step.reasoningMs = now - this.thoughtFrom;
    }
    if (delta.content) step.text += delta.content;
    for (const part of delta.tool_calls ?? []) {
      const call = (step.calls[part.index ?? 0] ??= { id: "", name: "", arguments: "", result: undefined });
      if (part.id) call.id = part.id;
      if (part.function?.name) call.name = part.function.name;
      call.arguments += part.function?.arguments ?? "";
    }
    if (delta.reasoning_content || delta.content || delta.tool_calls?.length) {
      this.first ??= now;
      this.last = now;
      this.numDeltas += 1;
    }
  }

  #end(choice) {
    this.finish = choice.finish_reason ?? this.finish;
    const reason = choice.stop_reason;
    if (reason === "repetition_detected") this.detail = "Ended by the server: the answer had begun to repeat itself.";
    else if (reason === "cancelled") this.detail = "Ended from elsewhere (the dashboard, or another client).";
    else if (choice.finish_reason === "length") this.detail = "Cut off at the limit of tokens (max tokens, in the settings).";
  }

  stats() {
    const timings = this.diagnostics?.timings_ms ?? {};
    const completion = this.usage?.completion_tokens ?? null;
    const decodeMs = this.first !== null && this.last > this.first ? this.last - this.first : timings.decode ?? null;
    return {
      prompt: this.usage?.prompt_tokens ?? null,
      cached: this.usage?.prompt_tokens_details?.cached_tokens ?? null,
      completion,
      pieces: this.numDeltas,
      reasoning: this.usage?.completion_tokens_details?.reasoning_tokens ?? 0,
      ttftMs: this.first !== null ? this.first - this.started : timings.time_to_first_token ?? null,
      decodeMs,
      missReason: this.diagnostics?.cache?.miss_reason ?? null,
      queueMs: timings.queue ?? null,
    };
  }
}

/** An answer's numbers over its requests (one, and one more for each round of tool calls). */
export function sumStats(all) {
  if (!all.length) return null;
  const sum = (name) => all.reduce((total, one) => total + (one[name] ?? 0), 0);
  return { ...all.at(-1), prompt: all.at(-1).prompt, promptSum: sum("prompt"), cached: sum("cached"), completion: sum("completion"), pieces: sum("pieces"), reasoning: sum("reasoning"), ttftMs: all[0].ttftMs, decodeMs: sum("decodeMs"), requests: all.length, isKnown: all.every((one) => one.completion !== null) };
}

/** The line under an answer, as [text, title] pairs. */
export function statsLine(stats) {
  if (!stats?.isKnown) return stats?.pieces ? brokenOff(stats) : [];
  const rate = stats.decodeMs > 0 && stats.completion > stats.requests ? (stats.completion - stats.requests) / (stats.decodeMs / 1000) : null;
  const parts = [
    [`${count(stats.prompt)} → ${count(stats.completion)} tokens`, `${stats.prompt} prompt tokens, ${stats.completion} answer tokens` + (stats.reasoning ? `, ${stats.reasoning} of them reasoning` : "")],
  ];
  if (rate) parts.push([`${perSecond(rate)} tokens/s`, "Tokens a second after the first one, as they arrived in this page"]);
  if (stats.ttftMs !== null) parts.push([`first after ${duration(stats.ttftMs)}`, "Time to the first token, as seen by this page" + (stats.queueMs > 5 ? `; ${duration(stats.queueMs)} of it in the queue` : "")]);
  if (stats.promptSum) parts.push([`${Math.round((100 * stats.cached) / stats.promptSum)} % cached`, `${stats.cached} of ${stats.promptSum} prompt tokens came from the prefix cache` + (stats.missReason ? ` (${stats.missReason})` : "")]);
  if (stats.requests > 1) parts.push([`${stats.requests} requests`, "One for each round of tool calls, and the last"]);
  return parts;
}

/** The server's numbers come at the end of an answer: of one that was stopped there is what this page saw. */
function brokenOff(stats) {
  const parts = [[`${count(stats.pieces)} tokens`, "Counted as they arrived in this page"]];
  if (stats.decodeMs > 0 && stats.pieces > 1) parts.push([`${perSecond((stats.pieces - 1) / (stats.decodeMs / 1000))} tokens/s`, "As they arrived in this page"]);
  if (stats.ttftMs !== null) parts.push([`first after ${duration(stats.ttftMs)}`, "Time to the first token, as seen by this page"]);
  return parts;
}

const perSecond = (rate) => (rate < 10 ? rate.toFixed(1) : count(Math.round(rate)));

/** A number with narrow blanks between its thousands. (Not by toLocaleString: what that loads first takes 10 ms.) */
export function count(number) {
  const [whole, part] = String(number ?? 0).split(".");
  return whole.replace(/\B(?=(?:\d{3})+$)/g, "\u202f") + (part ? `.${part}` : "");
}

export function duration(ms) {
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 60000) return `${(ms / 1000).toFixed(ms < 10000 ? 1 : 0)} s`;
  return `${Math.floor(ms / 60000)} min ${Math.round((ms % 60000) / 1000)} s`;
}
