// Turns as they are seen: questions, answers with reasoning folds, tool cards, numbers, and the buttons under them.
import { answerText, siblings } from "./tree.js";
import { count, duration, statsLine } from "./chat.js";
import { copyButton, h, icon, iconButton } from "./dom.js";
import { MarkdownView } from "./render.js";
import { TOOLS } from "./tools.js";

/** `on` has select(turn), edit(turn, text), again(turn). */
function branches(conversation, turn, on) {
  const all = siblings(conversation, turn);
  if (all.length < 2) return null;
  const at = all.findIndex((one) => one.id === turn.id);
  const go = (step, name, label) => iconButton(name, label, () => on.select(all[at + step]), { disabled: !all[at + step] });
  return h("span", { class: "branches", role: "group", "aria-label": "Versions" },
    go(-1, "left", "Previous version"), h("span", {}, `${at + 1} / ${all.length}`), go(1, "right", "Next version"));
}

export function userView(conversation, turn, on) {
  const bubble = h("div", { class: "bubble" });
  const pictures = turn.images.map((image, i) => h("a", { href: image.url, download: image.name || "picture", "aria-label": `Save picture ${i + 1}` },
    h("img", { src: image.url, alt: image.name ? `Picture ${image.name}` : `Picture ${i + 1}` })));
  if (pictures.length) bubble.append(h("div", { class: "pictures" }, ...pictures));
  if (turn.text) bubble.append(h("div", { class: "asked" }, turn.text));
  const tools = h("div", { class: "actions" }, branches(conversation, turn, on),
    copyButton("Copy message", () => turn.text), iconButton("pen", "Edit message", () => edit()));
  const el = h("article", { class: "turn user", "aria-label": "You said", "data-turn": turn.id }, bubble, tools);

  function edit() {
    const box = h("textarea", { "aria-label": "Edit message", rows: "1" });
    box.value = turn.text;
    const close = () => form.replaceWith(bubble, tools);
    const form = h("form", { class: "edit", onsubmit: (event) => { event.preventDefault(); if (box.value.trim() || turn.images.length) { close(); on.edit(turn, box.value); } } },
      box, h("p", { class: "hint" }, "The answer so far stays; this becomes another version."),
      h("div", { class: "row end" }, h("button", { type: "button", class: "plain", onclick: close }, "Cancel"), h("button", { class: "primary" }, "Send")));
    box.onkeydown = (event) => {
      if (event.key === "Escape") { event.stopPropagation(); close(); }
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); form.requestSubmit(); }
    };
    bubble.replaceWith(form);
    tools.remove();
    box.style.height = `${Math.min(400, box.scrollHeight + 2)}px`;
    box.focus();
  }
  return el;
}

/** One step of an answer: a fold of reasoning, text, tool calls. Grows with `update`. */
class StepView {
  constructor(step, isJson) {
    this.step = step;
    this.isJson = isJson;
    this.thought = h("div", { class: "prose" });
    this.summary = h("span");
    this.fold = h("details", { class: "fold" }, h("summary", {}, icon("right"), this.summary), this.thought);
    this.text = h("div", { class: "prose" });
    this.calls = h("div", { class: "calls" });
    this.nodes = [this.fold, this.text, this.calls];
    this.thoughtView = new MarkdownView(this.thought);
    this.textView = new MarkdownView(this.text);
    this.shown = { reasoning: null, text: null };
    this.fold.ontoggle = () => this.#drawThought();
  }

  update(isRunning) {
    const { step } = this;
    this.fold.hidden = !step.reasoning;
    if (step.reasoning) {
      const isOver = !isRunning || step.text || step.calls.length;
      this.fold.classList.toggle("busy", !isOver);
      this.summary.textContent = isOver ? `Thought for ${duration(step.reasoningMs)}` : `Thinking for ${duration(step.reasoningMs)}`;
      this.#drawThought();
    }
    if (step.text !== this.shown.text) {
      this.shown.text = step.text;
      this.textView.update(this.isJson && step.text ? "```json\n" + step.text : step.text);
    }
    this.text.hidden = !step.text;
    const done = JSON.stringify(step.calls);
    if (done !== this.drawnCalls) {
      this.drawnCalls = done;
      this.calls.replaceChildren(...step.calls.filter(Boolean).map(callCard));
    }
    this.calls.hidden = !step.calls.length;
  }

  /** What is folded away is not drawn before somebody looks. */
  #drawThought() {
    if (!this.fold.open || this.shown.reasoning === this.step.reasoning) return;
    this.shown.reasoning = this.step.reasoning;
    this.thoughtView.update(this.step.reasoning);
  }
}

function callCard(call) {
  const tool = Object.hasOwn(TOOLS, call.name) ? TOOLS[call.name] : null;
  const isFailed = call.result !== undefined && /^\{"error"/.test(call.result);
  const state = call.result === undefined ? "called" : isFailed ? "failed" : "done";
  return h("section", { class: `call ${state}`, "aria-label": `Tool call ${call.name}, ${state}` },
    h("header", {}, icon(call.name === "get_time" ? "clock" : "tool"), h("strong", {}, tool?.label ?? call.name), h("code", {}, call.name), h("span", { class: "state" }, state)),
    h("dl", {}, ...Object.entries(pairs(call.arguments)).flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, plain(value))])),
    call.result === undefined ? null : h("div", { class: "result" }, h("span", { class: "label" }, "Result"), h("dl", {},
      ...Object.entries(pairs(call.result, "result")).flatMap(([name, value]) => [h("dt", {}, name.replaceAll("_", " ")), h("dd", {}, plain(value))]))));
}

const plain = (value) => (typeof value === "string" ? value : JSON.stringify(value));

/** What a tool was given or gave, as names and values; what has no name gets `name`. */
function pairs(text, name = "") {
  try {
    const value = JSON.parse(text || "{}");
    return value && typeof value === "object" ? value : { [name]: value };
  } catch {
    return { [name]: text }; // a sentence, or still being written
  }
}

/** An answer. `update` draws what has changed; `finish` puts the numbers and buttons under it. */
export class AnswerView {
  constructor(conversation, turn, on) {
    this.conversation = conversation;
    this.turn = turn;
    this.on = on;
    this.steps = [];
    this.body = h("div", { class: "body" });
    this.waiting = h("p", { class: "waiting", role: "status" }, h("span", { class: "dots", "aria-hidden": "true" }, h("i"), h("i"), h("i")), h("span", {}));
    this.footer = h("footer", {});
    this.el = h("article", { class: "turn answer", "aria-label": "The model said", "data-turn": turn.id }, this.body, this.waiting, this.footer);
    this.waiting.hidden = true;
    if (turn.state === "running") this.waiting.hidden = false;
    this.update();
    if (turn.state !== "running") this.finish();
  }

  /** What happens before there is anything to read. */
  say(text) { this.waiting.lastChild.textContent = text; }

  update() {
    const { turn } = this;
    while (this.steps.length < turn.steps.length) {
      const view = new StepView(turn.steps[this.steps.length], turn.isJson);
      this.steps.push(view);
      this.body.append(...view.nodes);
    }
    const isRunning = turn.state === "running";
    this.steps.forEach((view, i) => view.update(isRunning && i === this.steps.length - 1));
    const last = turn.steps.at(-1);
    this.waiting.hidden = !isRunning || Boolean(last && (last.text || last.reasoning || last.calls.length));
  }

  finish() {
    const { turn, conversation, on } = this;
    this.update();
    this.footer.replaceChildren();
    if (turn.note) this.footer.append(h("p", { class: turn.state === "incomplete" ? "note bad" : "note", role: turn.state === "incomplete" ? "alert" : null }, turn.state === "incomplete" ? icon("warn") : null, h("span", {}, turn.note),
      turn.state === "incomplete" ? h("button", { type: "button", class: "plain", onclick: () => on.again(turn) }, "Try again") : null));
    const numbers = statsLine(turn.stats).map(([text, title]) => h("span", { title }, text));
    this.footer.append(h("div", { class: "actions" },
      copyButton("Copy answer", () => answerText(turn)), iconButton("redo", "Answer again", () => on.again(turn)), branches(conversation, turn, on),
      numbers.length ? h("span", { class: "numbers", "aria-label": "Numbers of this answer" }, ...numbers) : null));
  }

  /** While it runs: how many pieces came, and how fast. */
  progress(fold, now) {
    if (fold.first === null || fold.numDeltas < 5) return;
    const rate = (fold.numDeltas - 1) / ((now - fold.first) / 1000);
    this.footer.replaceChildren(h("div", { class: "actions" }, h("span", { class: "numbers", "aria-hidden": "true" }, h("span", {}, `${count(fold.numDeltas)} tokens`), h("span", {}, `${count(Math.round(rate))} tokens/s`))));
  }
}
