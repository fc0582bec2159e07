// The chat page: one conversation with the served model. Talks to /v1/chat/completions only.
import { MarkdownView, h } from "./render.js";

const $ = (id) => document.getElementById(id);
const messages = [];
let running = null;
let key = "";

function say(text) { $("notice").textContent = text; }

async function send() {
  const typed = $("text").value;
  if (!typed.trim() || running) return;
  say("");
  running = new AbortController();
  $("stop").hidden = false;
  const asked = h("article", { class: "user", "aria-label": "You" }, typed);
  const body = h("div"), thought = h("div"), fold = h("details", { class: "fold" }, h("summary", {}, "Reasoning"), thought);
  const stats = h("footer"), answer = h("article", { "aria-label": "Model" }, fold, body, stats);
  fold.hidden = true;
  $("log").append(asked, answer);
  $("text").value = "";
  const view = new MarkdownView(body);
  const state = { content: "", reasoning: "", usage: null, first: 0, start: performance.now(), frame: 0 };
  const draw = () => {
    state.frame = 0;
    const isAtEnd = innerHeight + scrollY >= document.body.scrollHeight - 80;
    fold.hidden = !state.reasoning;
    thought.textContent = state.reasoning;
    view.update(state.content);
    if (isAtEnd) answer.scrollIntoView({ block: "end" });
  };
  let failure = null;
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", signal: running.signal,
      headers: { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) },
      body: JSON.stringify({ model: "default", stream: true, stream_options: { include_usage: true },
        enable_thinking: $("think").checked, messages: [...messages, { role: "user", content: typed }] }),
    });
    if (!response.ok) {
      if (response.status === 401) $("keybox").hidden = false;
      throw new Error((await response.json().catch(() => null))?.error?.message ?? `The server answered ${response.status}.`);
    }
    await read(response.body, (event) => {
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices?.[0]?.delta ?? {};
      if (!state.first && (delta.content || delta.reasoning_content)) state.first = performance.now();
      state.reasoning += delta.reasoning_content ?? "";
      state.content += delta.content ?? "";
      state.usage = event.usage ?? state.usage;
      state.frame ||= requestAnimationFrame(draw);
    });
  } catch (error) {
    if (error.name !== "AbortError") failure = error instanceof TypeError ? "The server cannot be reached." : error.message;
  }
  cancelAnimationFrame(state.frame);
  draw();
  running = null;
  $("stop").hidden = true;
  if (failure) say(failure);
  if (failure && !state.content) { // nothing came: what was typed goes back to where it was typed
    asked.remove(); answer.remove();
    $("text").value ||= typed;
    return;
  }
  if (!state.content) return; // stopped before anything came: nothing to go on from
  messages.push({ role: "user", content: typed }, { role: "assistant", content: state.content });
  if (failure) stats.textContent = "incomplete";
  const u = state.usage, seconds = (performance.now() - state.first) / 1000;
  if (u) stats.textContent = `${u.prompt_tokens} + ${u.completion_tokens} tokens · ${(u.completion_tokens / seconds).toFixed(1)}/s · first after ${Math.round(state.first - state.start)} ms · ${Math.round(100 * u.prompt_tokens_details.cached_tokens / u.prompt_tokens)} % cached`;
}

async function read(stream, handle) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: {")) handle(JSON.parse(line.slice(6)));
  }
}

$("form").onsubmit = (event) => { event.preventDefault(); send(); };
$("stop").onclick = () => running?.abort();
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
};
$("keybox").onsubmit = (event) => { event.preventDefault(); key = $("key").value.trim(); $("keybox").hidden = true; send(); };
