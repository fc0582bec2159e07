// The chat page's centre: which conversation is open, what runs, and how the parts hear of it.
import { ApiError, key, readEvents, request } from "./api.js";
import { count, DEFAULTS, Fold, requestBody, sumStats } from "./chat.js";
import { Composer } from "./composer.js";
import { $, h, startTheme } from "./dom.js";
import { AnswerView, userView } from "./messages.js";
import { renderOnce } from "./render.js";
import { startPanel } from "./panel.js";
import { Sidebar } from "./sidebar.js";
import { readSettings, Store, writeSettings } from "./store.js";
import { definitions, runTool } from "./tools.js";
import { add, answerTurn, newConversation, newStep, path, remove, select, siblings, userTurn } from "./tree.js";

const MAX_ROUNDS = 8; // of tool calls in one answer
const UNFINISHED = "unfinished"; // where an answer waits for the page to come back
const IDEAS = ["What can you do?", "What is the time in Tokyo?", "Reply with pong", "Write a short story about a lighthouse"];

const settings = readSettings(DEFAULTS);
const store = new Store();
let conversations = [];
let current = newConversation();
let server = null; // what /v1/capabilities said
let running = null; // {controller, conversation, turn}
let isLeaving = false; // the browser breaks off what runs; what was stored says so when the page is opened again
let answerView = null;
let drawn = new Map(); // turn id: the turn, its view, and between which versions it stands

const changed = () => writeSettings(settings);
const composer = new Composer(settings, { send, stop, changed });
const turnEvents = { select: (turn) => { if (running) return; select(current, turn.id); save(); draw(); }, edit, again };
const sidebar = new Sidebar({
  open: (conversation) => { show(conversation); narrow(false); },
  renamed: async (conversation) => { await store.put(conversation); drawList(); },
  deleted: async (conversation) => {
    if (running && conversation === current) stop();
    await store.delete(conversation.id);
    conversations = conversations.filter((one) => one !== conversation);
    if (conversation === current) show(newConversation());
    drawList();
  },
  imported: async (list) => {
    for (const conversation of list) await store.put(conversation);
    conversations = await store.all();
    if (list.length) show(conversations.find((one) => one.id === list[0].id));
    composer.say("");
    announce(`${list.length} conversations imported.`);
  },
  say: (text) => composer.say(text),
  all: () => store.all(),
});

// ── asking and answering ───────────────────────────────────────────────────────────────────────────────────────────────

async function send(text, images) {
  composer.say("");
  const conversation = current;
  const parent = path(conversation).at(-1)?.id ?? null;
  const asked = add(conversation, userTurn(text, images.map(({ url, name }) => ({ url, name }))), parent);
  composer.clear();
  await answer(asked, () => { // nothing came: what was written goes back to where it was written
    remove(conversation, asked.id);
    composer.restoreIfEmpty(text, images);
  });
}

async function edit(turn, text) {
  if (running) return;
  const conversation = current;
  const asked = add(conversation, userTurn(text, turn.images), turn.parent);
  await answer(asked, () => {
    remove(conversation, asked.id);
    select(conversation, turn.id);
    composer.restoreIfEmpty(text, turn.images);
  });
}

async function again(turn) {
  if (running) return;
  const conversation = current;
  await answer(conversation.turns[turn.parent], () => select(conversation, turn.id));
}

/** Answer a question; `undo` is called when the request failed before anything came. */
async function answer(asked, undo) {
  const conversation = current;
  const turn = add(conversation, { ...answerTurn(), isJson: settings.json }, asked.id);
  if (!conversations.includes(conversation)) conversations.unshift(conversation);
  const controller = new AbortController();
  const limit = setTimeout(() => controller.abort("timeout"), (settings.timeout ?? 2 ** 31 / 1001) * 1000);
  running = { controller, conversation, turn };
  composer.setBusy(true);
  composer.say("");
  announce("The model is answering.");
  draw({ toEnd: true });
  save(conversation);
  const view = answerView;
  const numbers = [];
  let failure = null;
  try {
    for (let round = 0; round < MAX_ROUNDS; round += 1) {
      const step = newStep();
      const turns = path(conversation);
      const body = requestBody(turns, settings, settings.json ? [] : definitions(settings.tools), server?.features);
      turn.steps.push(step);
      const fold = new Fold(step, performance.now());
      try {
        await (settings.stream ? stream(body, fold, view, controller.signal) : whole(body, fold, controller.signal));
      } finally {
        numbers.push(fold.stats());
        turn.note = fold.detail;
      }
      if (!fold.finish) throw new ApiError("The connection broke off before the answer was complete.");
      step.calls = step.calls.filter(Boolean);
      if (!step.calls.length || step.calls.some((call) => !call.name)) break;
      for (const call of step.calls) call.result = runTool(call.name, call.arguments);
      view.update();
      if (round === MAX_ROUNDS - 1) turn.note = `Stopped after ${MAX_ROUNDS} rounds of tool calls.`;
    }
    await new Promise((resolve) => setTimeout(resolve)); // the end of a long answer is two short tasks, too
    turn.state = "done";
  } catch (error) {
    if (controller.signal.aborted && controller.signal.reason !== "timeout") turn.state = "stopped";
    else {
      failure = controller.signal.aborted ? new ApiError(`No complete answer within ${settings.timeout} s, the limit set in this page's settings.`) : error;
      turn.state = "incomplete";
    }
  }
  if (isLeaving) return;
  clearTimeout(limit);
  turn.steps = written(turn.steps);
  turn.stats = sumStats(numbers);
  running = null;
  composer.setBusy(false);
  if (!turn.steps.length && (failure || turn.state === "stopped")) {
    remove(conversation, turn.id);
    undo();
  } else if (failure) turn.note = `This answer is incomplete. ${failure.message}`;
  else if (turn.state === "stopped") turn.note = "Stopped.";
  if (failure) fail(failure, !turn.steps.length);
  if (conversation === current) {
    if (conversation.turns[turn.id]) { view.finish(); follow.keep(); } else draw();
  }
  if (Object.keys(conversation.turns).length) await save(conversation);
  else {
    conversations = conversations.filter((one) => one !== conversation);
    await store.delete(conversation.id);
  }
  drawList();
  announce(failure ? "The answer failed." : turn.state === "stopped" ? "Stopped." : "The answer is complete.");
}

async function stream(body, fold, view, signal) {
  const response = await request("/v1/chat/completions", { method: "POST", body, signal });
  const pen = new Pen(() => { view.update(); view.progress(fold, performance.now()); follow.keep(); });
  const waiting = setInterval(() => (fold.first === null ? tellWait(response.headers.get("x-request-id"), fold, view) : clearInterval(waiting)), 1000);
  try {
    for await (const batch of readEvents(response.body)) {
      const now = performance.now();
      for (const chunk of batch) fold.chunk(chunk, now);
      pen.ask();
    }
  } catch (error) {
    throw error instanceof TypeError && !signal.aborted ? new ApiError("The connection to the server was lost.") : error;
  } finally {
    clearInterval(waiting);
    pen.stop();
  }
}

/** What happens before the first token, which can take long: the queue, or a long prompt. */
async function tellWait(id, fold, view) {
  const { data } = await request("/v1/requests").then((response) => response.json()).catch(() => ({ data: [] }));
  const own = data.find((one) => one.x_request_id === id);
  if (fold.first !== null) return;
  const since = `${Math.round((performance.now() - fold.started) / 1000)} s`;
  if (own?.phase === "waiting") view.say(`Waiting for ${own.queue_position ? `${own.queue_position} before it` : "a free place"}, ${since}`);
  else if (own?.phase === "prefill") view.say(`Reading the prompt: ${Math.round((100 * own.computed_tokens) / own.prompt_tokens)} % of ${count(own.prompt_tokens)} tokens, ${since}`);
  else view.say(since);
}

async function whole(body, fold, signal) {
  const response = await request("/v1/chat/completions", { method: "POST", body, signal });
  fold.whole(await response.json(), performance.now());
}

/** Draws about once a frame, and spends at most a third of the time on it: long answers must not stall the page. It draws
 *  between the browser's frames and not in them, so that its work and the browser's painting are two short tasks. */
class Pen {
  #timer = 0;
  #next = 0; // when it may draw again

  constructor(draw) { this.draw = draw; }

  ask() {
    this.#timer ||= setTimeout(() => {
      const start = performance.now();
      this.#timer = 0;
      this.draw();
      const end = performance.now();
      this.#next = Math.max(start + 16, end + 2 * (end - start));
    }, this.#next - performance.now());
  }

  stop() {
    clearTimeout(this.#timer);
    this.draw();
  }
}

function stop() { running?.controller.abort(); }

function fail(error, isRetyped) {
  if (error.status === 401) { askKey(error.message); return; }
  if (error.status === 0) connect();
  const wait = error.retryAfter ? ` It may be tried again in ${error.retryAfter} s.` : "";
  composer.say(error.message + wait, isRetyped ? ["Try again", () => $("composer").requestSubmit()] : null);
}

// ── the server ─────────────────────────────────────────────────────────────────────────────────────────────────────────

let polling = 0;

async function connect() {
  clearTimeout(polling);
  try {
    const answered = await (await request("/v1/capabilities")).json();
    const { data } = answered.model_loaded ? await (await request("/v1/models")).json() : { data: [] };
    server = chosen(answered, data.filter((one) => one.id === one.root && !one.task).map((one) => one.id));
    composer.setServer(server);
    $("keybox").hidden = true;
    $("key-button").hidden = !answered.auth.api_key_required;
    const facts = answered.model_traits ?? {};
    const kinds = ["image", "video", "audio_input"].filter((kind) => answered.modalities[kind]).map((kind) => (kind === "audio_input" ? "audio" : kind));
    if (server !== answered) { setModel("ready", server.model_name, ""); drawEmpty(); return; }
    setModel(answered.model_loaded ? "ready" : "loading", answered.model_loaded ? answered.model_name : "The model is loading …",
      answered.model_loaded ? [kinds.length ? `text + ${kinds.join(" + ")}` : "text", facts.quantization, answered.limits.effective_context_tokens && `${Math.round(answered.limits.effective_context_tokens / 1024)}k context`].filter(Boolean).join(" · ") : "");
    if (answered.model_loaded) drawEmpty(); else polling = setTimeout(connect, 1500);
  } catch (error) {
    if (error.status === 401) { setModel("locked", "An API key is needed", ""); $("empty-about").textContent = "This server needs a key first."; $("key-button").hidden = false; askKey(key.get() ? error.message : ""); return; }
    setModel("gone", error.status ? error.message : "The server cannot be reached", "");
    polling = setTimeout(connect, document.hidden ? 15000 : 3000);
  }
}

/** Where there are several models a person picks one. What another than the first can do is not told: all is offered. */
function chosen(answered, ids) {
  const pick = $("pick");
  pick.hidden = ids.length < 2;
  $("model-name").hidden = ids.length >= 2;
  if (ids.length < 2 || !ids.includes(settings.model)) settings.model = "default";
  if (ids.length < 2) return answered;
  pick.replaceChildren(...ids.map((id) => h("option", {}, id)));
  pick.value = settings.model === "default" ? answered.model_name : settings.model;
  pick.onchange = () => { settings.model = pick.value; changed(); connect(); };
  if (pick.value === answered.model_name) return answered;
  const all = (map) => Object.fromEntries(Object.keys(map).map((name) => [name, true]));
  return { ...answered, model_name: pick.value, modalities: all(answered.modalities), features: all(answered.features) };
}

function setModel(state, name, facts) {
  $("model").dataset.state = state;
  $("model-name").textContent = name;
  $("model-facts").textContent = facts;
}

function askKey(why) {
  $("key-why").textContent = why || "This server answers only callers with a key.";
  $("keybox").hidden = false;
  $("key").focus();
}

$("keybox").onsubmit = async (event) => {
  event.preventDefault();
  key.set($("key").value.trim(), $("key-keep").checked);
  $("key").value = "";
  $("keybox").hidden = true;
  await connect();
  if ($("keybox").hidden && !composer.isEmpty) $("composer").requestSubmit();
  else if ($("keybox").hidden) composer.text.focus();
};
$("key-button").onclick = () => { if ($("keybox").hidden) askKey("Another key takes the place of the one in use; an empty one forgets it."); else $("keybox").hidden = true; };

// ── what is shown ──────────────────────────────────────────────────────────────────────────────────────────────────────

/** Keeps the end of the conversation in sight, until a person scrolls away from it. */
const follow = {
  isOn: true,
  top: 0,
  height: 0,
  keep() { if (this.isOn) $("scroll").scrollTop = $("scroll").scrollHeight; },
  watch() {
    const box = $("scroll");
    box.addEventListener("scroll", () => {
      // Only scrolling up leaves the end; text that grows or is laid out anew moves it away as well.
      if (box.scrollHeight - box.scrollTop - box.clientHeight < 60) this.isOn = true;
      else if (box.scrollTop < this.top && box.scrollHeight === this.height) this.isOn = false;
      [this.top, this.height] = [box.scrollTop, box.scrollHeight];
      $("latest").hidden = this.isOn;
    }, { passive: true });
    $("latest").onclick = () => { this.isOn = true; this.keep(); };
    const observer = new ResizeObserver(() => this.keep());
    observer.observe(box);
    observer.observe($("log"));
  },
};

/** Shows the path. Turns that were there stay as they are (long ones take long to draw, folds stay open); only their
 *  arrows between versions may be new. */
function draw({ toEnd = false } = {}) {
  const turns = path(current);
  const before = drawn;
  drawn = new Map(turns.map((turn) => {
    const versions = siblings(current, turn).map((one) => one.id).join();
    const known = before.get(turn.id);
    if (known?.turn === turn && known.versions === versions && turn.state !== "running") return [turn.id, known];
    if (turn.role === "user") return [turn.id, { turn, versions, el: userView(current, turn, turnEvents) }];
    const view = known?.turn === turn ? known.view : new AnswerView(current, turn, turnEvents);
    if (known?.turn === turn && turn.state !== "running") view.finish();
    return [turn.id, { turn, versions, view, el: view.el }];
  }));
  answerView = drawn.get(running?.turn.id)?.view ?? null;
  const elements = [...drawn.values()].map((one) => one.el);
  const log = $("log");
  const same = elements.findIndex((el, i) => el !== log.children[i]);
  while (log.children.length > (same < 0 ? elements.length : same)) log.lastChild.remove();
  if (same >= 0) log.append(...elements.slice(same));
  $("empty").hidden = turns.length > 0;
  document.title = current.title ? `${current.title} · vllm-mlx` : "vllm-mlx";
  if (toEnd) follow.isOn = true;
  follow.keep();
  localStorage.setItem("open", current.id);
  drawList();
}

function drawList() { sidebar.draw(conversations.filter((one) => one.first), current.id); }

function drawEmpty() {
  const image = server?.modalities?.image;
  $("empty-about").textContent = server?.model_name ? `${server.model_name} is ready${image ? ", and can look at pictures: paste or drop one" : ""}.` : "";
  $("ideas").replaceChildren(...IDEAS.map((text) => h("button", { type: "button", class: "idea", onclick: () => {
    if (/time/.test(text) && !settings.tools.includes("get_time") && server?.features.tool_calling) { settings.tools = [...settings.tools, "get_time"]; changed(); composer.draw(); }
    composer.restore(text, composer.images);
    $("composer").requestSubmit();
  } }, text)));
}

function show(conversation) {
  if (running) stop();
  current = conversation;
  draw({ toEnd: true });
  if (matchMedia("(hover: hover)").matches) composer.text.focus();
}

async function save(conversation = current) {
  conversation.updated = Date.now();
  try { await store.put(conversation); } catch (error) { composer.say(`This conversation cannot be kept in the browser: ${error.message}`); }
  conversations.sort((a, b) => b.updated - a.updated);
}

/** What ran when the page was left is over; what had been written by then is kept. */
function endUnfinished(all) {
  const [conversationId, turnId, steps] = JSON.parse(localStorage.getItem(UNFINISHED) ?? "[]");
  localStorage.removeItem(UNFINISHED);
  for (const conversation of all) {
    for (const turn of Object.values(conversation.turns).filter((one) => one.state === "running")) {
      Object.assign(turn, { state: "incomplete", note: "This answer is incomplete: the page was closed." });
      if (conversation.id === conversationId && turn.id === turnId) turn.steps = written(steps);
      store.put(conversation);
    }
  }
}

const written = (steps) => steps.filter((step) => step.text || step.reasoning || step.calls.length);

function announce(text) { $("announce").textContent = text; }

// ── panels and keys ────────────────────────────────────────────────────────────────────────────────────────────────────

const isNarrow = () => matchMedia("(max-width: 900px)").matches;

function narrow(isOpen) {
  if (!isNarrow()) return;
  document.body.classList.toggle("sidebar-open", isOpen);
  $("scrim").hidden = !isOpen;
}

function panel(isOpen) {
  $("panel").hidden = !isOpen;
  $("open-panel").setAttribute("aria-expanded", isOpen);
  if (isOpen) $("system").focus(); else $("open-panel").focus();
}

$("open-sidebar").onclick = () => (isNarrow() ? narrow(true) : document.body.classList.toggle("no-sidebar"));
$("close-sidebar").onclick = $("scrim").onclick = () => { narrow(false); $("open-sidebar").focus(); };
$("open-panel").onclick = () => panel($("panel").hidden);
$("close-panel").onclick = () => panel(false);
$("open-keys").onclick = () => $("keys").showModal();
$("new").onclick = () => { show(newConversation()); narrow(false); };

addEventListener("keydown", (event) => {
  const isTyping = event.target.matches("input, textarea, select, [contenteditable]");
  if (event.key === "Escape") {
    if (running) stop();
    else if (!$("keybox").hidden) $("keybox").hidden = true;
    else if (!$("panel").hidden) panel(false);
    else if (document.body.classList.contains("sidebar-open")) narrow(false);
  } else if (event.altKey && event.code === "KeyN") { event.preventDefault(); $("new").click(); }
  else if (event.altKey && event.code === "Comma") { event.preventDefault(); panel($("panel").hidden); }
  else if (event.key === "ArrowUp" && event.target === composer.text && composer.isEmpty && !running) {
    const last = [...document.querySelectorAll(".turn.user")].at(-1);
    if (last) { event.preventDefault(); last.querySelector("[aria-label='Edit message']").click(); }
  } else if (!isTyping && event.key === "/") { event.preventDefault(); composer.text.focus(); }
  else if (!isTyping && event.key === "?") $("keys").showModal();
});
addEventListener("beforeunload", () => { isLeaving = true; });
// The browser's database may be too slow for a page that goes; this is written at once, and read when the page comes back.
addEventListener("pagehide", () => {
  if (!running) return;
  try { localStorage.setItem(UNFINISHED, JSON.stringify([running.conversation.id, running.turn.id, running.turn.steps])); } catch { /* too long: only the question is kept */ }
});

// ── start ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

startTheme($("theme"));
startPanel(settings, DEFAULTS, changed);
follow.watch();
await store.start();
if (!store.isKept) $("kept").textContent = "This browser keeps no conversations here (a private window?); export what you need.";
conversations = await store.all();
endUnfinished(conversations);
current = conversations.find((one) => one.id === localStorage.getItem("open")) ?? current;
draw({ toEnd: true });
connect();
composer.text.focus();
// What browsers prepare at the first use of a function or a pattern is not to be prepared within the first answer.
setTimeout(() => renderOnce("*a* `b` [c](https://example.org) $d$\n\n- e\n\n| f |\n|---|\n| g |\n\n```py\nh = f(1)  # i\n```"), 50);
document.documentElement.dataset.ready = "true";
