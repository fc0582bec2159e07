// The dashboard: one stream of events in, everything on the page out of it. It keeps no more than the plots' five minutes.
import { key, readEvents, request } from "./api.js";
import { count, duration } from "./chat.js";
import { $, h, iconButton, startTheme } from "./dom.js";
import { Plot } from "./plot.js";

const NUM_FINISHED = 8;
const NUM_LATELY = 3;
const NUM_PROBLEMS = 50;

const round = (value) => (value >= 100 ? count(Math.round(value)) : value >= 10 ? value.toFixed(0) : value.toFixed(1));
const seconds = (value) => duration(value * 1000);
const plots = {
  generated: new Plot("Generated tokens/s", [{ label: "tokens/s", kind: "line" }], round),
  read: new Plot("Prompt tokens/s", [{ label: "all", kind: "line" }, { label: "from cache", kind: "line" }], round),
  latency: new Plot("Latency", [{ label: "first token", kind: "dots" }, { label: "whole answer", kind: "dots" }], seconds),
};
let finished = [];
let problems = [];
let lately = []; // the last ticks; speeds are means over them, since an engine's steps are longer than some ticks
let facts = null;

// ── the stream ─────────────────────────────────────────────────────────────────────────────────────────────────────────

/** The event's own time is the server's, so that a clock that is off here shifts nothing. */
const handlers = {
  hello(event) {
    facts = event;
    finished = [];
    problems = [];
    take(event);
    drawFacts();
  },
  health(event) { facts = event; drawFacts(); },
  tick(event) {
    take(event);
    drawTick(event, lately[0]);
    lately = [...lately, event].slice(-NUM_LATELY);
  },
};

function take(event) {
  for (const one of event.finished) {
    finished.unshift(one);
    if (one.ttft_s !== undefined) plots.latency.add(0, one.ended, one.ttft_s);
    if (one.reason !== "unfinished") plots.latency.add(1, one.ended, one.total_s);
  }
  for (const one of event.problems) problems.unshift(one);
  finished = finished.slice(0, 200);
  problems = problems.slice(0, NUM_PROBLEMS);
  if (event.finished.length || event.event === "hello") drawFinished();
  if (event.problems.length || event.event === "hello") drawProblems();
}

let stream = null; // what reads now; its controller ends it

async function connect() {
  stream?.abort();
  const controller = stream = new AbortController();
  try {
    const response = await request("/v1/dashboard", { signal: controller.signal });
    $("keybox").hidden = true;
    lately = [];
    for await (const batch of readEvents(response.body)) for (const event of batch) handlers[event.event]?.(event);
    throw new Error("The stream ended.");
  } catch (error) {
    if (controller.signal.aborted) return;
    if (error.status === 401) { ask(key.get() ? error.message : ""); return; }
    say("bad", error.status ? error.message : "The server cannot be reached; trying again …");
    document.body.classList.add("stale");
    if (!document.hidden) setTimeout(() => { if (stream === controller) connect(); }, 2000);
  }
}

function say(state, text) {
  $("state").className = state;
  $("state-text").textContent = text;
}

function ask(why) {
  say("bad", "An API key is needed");
  if (why) $("key-why").textContent = why;
  $("keybox").hidden = false;
  $("key").focus();
}

$("keybox").onsubmit = (event) => {
  event.preventDefault();
  key.set($("key").value.trim(), $("key-keep").checked);
  $("key").value = "";
  connect();
};

// A tab that nobody looks at reads nothing: it costs the server nothing.
document.addEventListener("visibilitychange", () => (document.hidden ? stream?.abort() : connect()));

// ── every second ───────────────────────────────────────────────────────────────────────────────────────────────────────

function drawTick(tick, before) {
  document.body.classList.remove("stale");
  const isWell = tick.status === "running";
  say(isWell ? "good" : tick.status === "loading" ? "warn" : "bad", [tick.model ?? "no model", tick.status, `up ${uptime(tick.uptime_s)}`].join(" · "));
  const rate = before ? (name, part = tick, last = before) => Math.max(0, (part[name] - last[name]) / (tick.now - before.now)) : null;
  const generated = rate ? rate("total_completion_tokens") : 0, read = rate ? rate("total_prompt_tokens") : 0;
  if (rate) {
    plots.generated.add(0, tick.now, generated);
    plots.read.add(0, tick.now, read);
    plots.read.add(1, tick.now, rate("num_cached_tokens", tick.cache, before.cache));
  }
  for (const plot of Object.values(plots)) plot.draw(tick.now);
  const memory = tick.memory, cache = tick.cache;
  const share = cache.num_prompt_tokens ? cache.num_cached_tokens / cache.num_prompt_tokens : null;
  tiles([
    ["Generating", round(generated), "tokens/s"],
    ["Reading", round(read), "prompt tokens/s"],
    ["Requests", count(tick.num_running), tick.num_waiting ? `and ${tick.num_waiting} waiting` : "none waiting"],
    ["Batch", count(tick.batch_rows), `rows of at most ${rowLimit()}`],
    ["From cache", share === null ? "–" : `${Math.round(100 * share)} %`, "of all prompt tokens"],
    ["Memory", memory.utilization_pct == null ? "–" : `${Math.round(memory.utilization_pct)} %`, memory.pressure && memory.pressure !== "unknown" ? `pressure ${memory.pressure}` : "not measured yet"],
  ]);
  drawLive(tick.requests);
  drawMemory(memory);
  drawCache(tick);
}

const rowLimit = () => facts?.diagnostics.checks.runtime_mode?.metadata?.row_limit ?? facts?.capabilities.limits.max_num_seqs ?? "–";

function tiles(rows) {
  const box = $("tiles");
  if (!box.childElementCount) box.append(...rows.map(() => h("div", { class: "tile" }, h("span", { class: "label" }), h("span", { class: "value" }), h("span", { class: "more" }))));
  rows.forEach((row, i) => row.forEach((text, j) => { const el = box.children[i].children[j]; if (el.textContent !== text) el.textContent = text; }));
}

/** Rows are kept by id, so that a button stays under the pointer that is about to press it. */
function drawLive(requests) {
  const body = $("live").tBodies[0];
  const kept = new Map([...body.rows].map((row) => [row.dataset.id, row]));
  for (const one of requests) {
    let row = kept.get(one.request_id);
    kept.delete(one.request_id);
    if (!row) {
      row = h("tr", { "data-id": one.request_id }, ...Array.from({ length: 7 }, (_, i) => h("td", { class: i > 2 ? "n" : null })),
        h("td", {}, iconButton("close", `Cancel ${one.id}`, (event) => cancel(one.id, event.currentTarget))));
      row.cells[0].append(h("code", {}, short(one.id)), h("small", {}, [one.route, one.stream ? "stream" : "whole", one.session].filter(Boolean).join(" · ")));
      row.cells[1].append(h("span", { class: "phase" }));
      row.cells[2].append(h("div", { class: "track" }, h("span")), h("small"));
      body.append(row);
    }
    const [phase, at, say] = progress(one);
    row.cells[1].firstChild.className = `phase ${phase}`;
    row.cells[1].firstChild.textContent = phase === "waiting" && one.queue_position !== null ? `waiting (${one.queue_position + 1})` : phase;
    row.cells[2].firstChild.firstChild.style.width = `${Math.round(100 * at)}%`;
    row.cells[2].lastChild.textContent = say;
    row.cells[3].textContent = one.tokens_per_second ? round(one.tokens_per_second) : "";
    row.cells[4].textContent = one.ttft_s == null ? "" : seconds(one.ttft_s);
    row.cells[5].textContent = one.prompt_tokens && one.cached_tokens !== undefined ? `${Math.round((100 * one.cached_tokens) / one.prompt_tokens)} %` : "";
    row.cells[6].textContent = seconds(one.elapsed_s);
  }
  for (const row of kept.values()) row.remove();
  $("live-none").hidden = requests.length > 0;
}

function progress(one) {
  if (one.phase === "prefill") return ["prefill", one.computed_tokens / one.prompt_tokens, `${count(one.computed_tokens)} of ${count(one.prompt_tokens)} prompt tokens`];
  if (one.phase === "decode") return ["decode", one.progress ?? 0, `${count(one.completion_tokens)} tokens, at most ${count(one.max_tokens)}`];
  return [one.phase, 0, one.prompt_tokens ? `${count(one.prompt_tokens)} prompt tokens` : "building the prompt"];
}

async function cancel(id, button) {
  button.disabled = true;
  try {
    await request(`/v1/requests/${encodeURIComponent(id)}/cancel`, { method: "POST" });
    $("announce").textContent = `Cancelled ${id}.`;
  } catch (error) {
    if (error.status !== 404) { button.disabled = false; say("bad", `${short(id)} was not cancelled: ${error.message}`); }
  }
}

function drawMemory(memory) {
  const used = memory.utilization_pct;
  const box = $("memory");
  const level = { normal: "", elevated: "warn", critical: "bad" }[memory.pressure] ?? "";
  const rows = [
    ["Pressure", memory.pressure === "unknown" ? "not measured yet" : `${memory.pressure}, ${memory.trend}`],
    ["At the limit", { warn: "warn", "reduce-context": "lower the context of new requests", "reject-new": "refuse new requests" }[memory.action] ?? memory.action],
    ["Times over the warning, the limit", `${memory.times_elevated ?? 0}, ${memory.times_critical ?? 0}`],
    ["Weights", memory.weights_gb == null ? null : gib(memory.weights_gb * 2 ** 30)],
    [`On the device (${memory.backend})`, memory.active_gb == null ? null : `${gib(memory.active_gb * 2 ** 30)}, peak ${gib(memory.peak_gb * 2 ** 30)}`],
  ].filter(([, value]) => value !== null && value !== undefined);
  redraw(box, [
    used == null ? null : meter("Used", memory.process_bytes ? `${gib(memory.process_bytes)} of ${gib(memory.process_capacity_bytes)}` : `${used} %`, used / 100, level, [memory.warn_threshold_pct, memory.limit_threshold_pct]),
    list(rows),
  ]);
}

function drawCache(tick) {
  const { cache } = tick;
  const reasons = Object.entries(tick.miss_reasons);
  redraw($("cache"), [
    meter("Sequences that run", `${gib(cache.kv_bytes)} of ${gib(cache.kv_budget_bytes)}`, share(cache.kv_bytes, cache.kv_budget_bytes)),
    meter("Kept for later prompts", `${gib(cache.prefix_cache_bytes)} of ${gib(cache.prefix_cache_budget_bytes)}`, share(cache.prefix_cache_bytes, cache.prefix_cache_budget_bytes)),
    list([
      ["Requests that found a prefix", cache.hit_rate === null ? "–" : `${Math.round(100 * cache.hit_rate)} % (${count(cache.num_hits)} of ${count(cache.num_hits + cache.num_misses)})`],
      ["Prompt tokens not computed again", `${count(cache.num_cached_tokens)} of ${count(cache.num_prompt_tokens)}`],
      ["Evictions, preemptions", `${count(cache.num_evictions)}, ${count(tick.num_preemptions)}`],
      ...(cache.disk ? [["On disk, tokens read from there", cache.disk.fault ?? `${gib(cache.disk.bytes)}, ${count(cache.disk.num_restored_tokens)}`]] : []),
    ]),
    reasons.length ? h("h3", {}, "Where reuse ended") : null,
    reasons.length ? h("ul", { class: "reasons" }, ...reasons.map(([reason, times]) => h("li", {}, h("span", {}, reason), h("span", {}, count(times))))) : null,
  ]);
}

const share = (part, whole) => (whole ? part / whole : 0);

function meter(label, value, at, level = "", marks = []) {
  const bar = h("span");
  bar.style.width = `${Math.min(100, 100 * at)}%`;
  const track = h("div", { class: `track ${level}`, role: "meter", "aria-label": label, "aria-valuenow": Math.round(100 * at), "aria-valuemin": 0, "aria-valuemax": 100 }, bar, ...marks.filter((mark) => mark).map((mark) => {
    const line = h("i", { title: `${mark} %` });
    line.style.left = `${mark}%`;
    return line;
  }));
  return h("div", { class: "meter" }, h("div", { class: "row" }, h("span", {}, label), h("span", {}, value)), track);
}

const list = (rows) => h("dl", { class: "facts" }, ...rows.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, String(value))]));

/** Only when something changed, so that a selection or an open fold is not lost every second. */
function redraw(box, children) {
  const next = h("div", {}, ...children);
  if (box.innerText !== "" && box.dataset.drawn === next.textContent + widths(next)) return;
  box.dataset.drawn = next.textContent + widths(next);
  box.replaceChildren(...next.childNodes);
}

const widths = (el) => [...el.querySelectorAll(".track span")].map((bar) => bar.style.width).join();

// ── now and then ───────────────────────────────────────────────────────────────────────────────────────────────────────

function drawFinished() {
  $("finished").tBodies[0].replaceChildren(...finished.slice(0, NUM_FINISHED).map((one) => h("tr", {},
    h("td", {}, clock(one.ended)), h("td", { title: one.id }, h("code", {}, short(one.id)), h("small", {}, [one.route, one.session].filter(Boolean).join(" · "))),
    h("td", { title: one.error ?? one.miss_reason }, h("span", { class: `phase ${one.reason}` }, one.reason)),
    h("td", { class: "n" }, count(one.prompt_tokens)), h("td", { class: "n" }, one.prompt_tokens ? `${Math.round((100 * one.cached_tokens) / one.prompt_tokens)} %` : ""),
    h("td", { class: "n" }, count(one.completion_tokens)), h("td", { class: "n" }, one.queue_s === undefined ? "" : seconds(one.queue_s)),
    h("td", { class: "n" }, one.ttft_s === undefined ? "" : seconds(one.ttft_s)), h("td", { class: "n" }, one.tokens_per_second ? round(one.tokens_per_second) : ""), h("td", { class: "n" }, seconds(one.total_s)))));
  $("finished-none").hidden = finished.length > 0;
}

function drawProblems() {
  $("problems").replaceChildren(...problems.map((one) => h("li", {}, h("time", {}, clock(one.time)), h("span", { class: "source" }, one.source), h("span", { class: "message", title: one.request_id }, one.message))));
  $("problems-none").hidden = problems.length > 0;
}

function drawFacts() {
  const { capabilities: can, diagnostics, models } = facts;
  const open = new Set([...document.querySelectorAll("#checks details[open]")].map((el) => el.dataset.name));
  const rank = { fail: 0, warning: 1, unknown: 2, pass: 3 };
  $("checks").replaceChildren(...Object.entries(diagnostics.checks).sort(([, a], [, b]) => rank[a.status] - rank[b.status]).map(([name, check]) =>
    h("details", { class: "check", "data-name": name, open: open.has(name) }, h("summary", {}, h("span", { class: `dot ${check.status}`, role: "img", "aria-label": check.status }), h("span", {}, words(name)), h("span", {}, check.detail)),
      check.metadata ? list(flat(check.metadata)) : null)));
  const model = can.model_traits ?? {}, { limits } = can;
  redraw($("can"), [
    list([
      ["Model", can.model_name ?? "loading"],
      ["Kind", [model.model_type ?? model.architecture_type, model.quantization ?? model.dtype].filter(Boolean).join(", ") || "–"],
      ["Context", limits.effective_context_tokens ? `${count(limits.effective_context_tokens)} tokens` + (limits.max_context_tokens > limits.effective_context_tokens ? ` (the model: ${count(limits.max_context_tokens)})` : "") : "–"],
      ["Rows at once, requests that may wait", `${count(limits.max_num_seqs)}, ${count(limits.max_queue)}`],
      ["Time limit, body limit", `${count(limits.default_timeout_seconds)} s, ${gib(limits.max_body_bytes)}`],
      ["Reasoning, tool format", `${model.reasoning_mechanism ?? "none"}, ${model.tool_format ?? "none"}`],
      ["Key needed, requests a minute", `${can.auth.api_key_required ? "yes" : "no"}, ${can.rate_limit.requests_per_minute ?? "no limit"}`],
      ["Version", can.version],
    ]),
    h("h3", {}, "Takes"), cans(can.modalities),
    h("h3", {}, "Features"), cans(can.features),
    can.notes.length ? h("h3", {}, "Notes") : null,
    can.notes.length ? h("ul", { class: "reasons" }, ...can.notes.map((note) => h("li", {}, h("span", {}, note)))) : null,
  ]);
  $("models-card").hidden = !models?.length;
  $("models").tBodies[0].replaceChildren(...(models ?? []).map((one) => h("tr", {}, h("td", {}, one.id), h("td", { title: one.failure }, h("span", { class: "phase" }, one.state)), h("td", { class: "n" }, count(one.active)), h("td", { class: "n" }, count(one.waiting)), h("td", { class: "n" }, gib(one.bytes)))));
}

const cans = (map) => h("div", { class: "cans" }, ...Object.entries(map).filter(([, value]) => typeof value === "boolean").sort(([, a], [, b]) => b - a)
  .map(([name, value]) => h("span", { class: value ? null : "no", title: value ? "yes" : "no" }, words(name), value ? "" : h("span", { class: "offscreen" }, ": no"))));

const flat = (map) => Object.entries(map).filter(([, value]) => value !== null && (typeof value !== "object" || Object.keys(value).length))
  .map(([name, value]) => [words(name), typeof value === "object" ? JSON.stringify(value) : /_bytes$/.test(name) ? gib(value) : String(value)]);

// ── how things are written ─────────────────────────────────────────────────────────────────────────────────────────────

const words = (name) => name.replaceAll("_", " ");
const short = (id) => (id.length > 18 ? `${id.slice(0, 15)}…` : id);
const clock = (time) => new Date(time * 1000).toLocaleTimeString("en-GB");
const gib = (bytes) => (bytes == null ? "–" : bytes >= 2 ** 29 ? `${(bytes / 2 ** 30).toFixed(1)} GiB` : `${(bytes / 2 ** 20).toFixed(bytes >= 10 * 2 ** 20 ? 0 : 1)} MiB`);

function uptime(s) {
  if (s < 120) return `${Math.round(s)} s`;
  if (s < 7200) return `${Math.round(s / 60)} min`;
  return s < 172800 ? `${Math.round(s / 3600)} h` : `${Math.round(s / 86400)} days`;
}

startTheme($("theme"));
$("plots").append(...Object.values(plots).map((plot) => plot.el));
document.documentElement.dataset.ready = "true";
connect();
