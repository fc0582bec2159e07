// A conversation as a tree of turns: asking again or editing makes a sibling, and one path through the tree is shown.
// Plain data and pure functions, no DOM; what is stored, exported and imported is exactly this.

export const FORMAT = "vllm-mlx-conversations";

export function makeId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation(now = Date.now()) {
  return { id: makeId(), title: "", created: now, updated: now, turns: {}, first: null };
}

export function userTurn(text, images = []) {
  return { id: makeId(), role: "user", parent: null, next: null, text, images };
}

/** An answer: `steps` alternate text and tool calls; `state` is running, done, stopped or incomplete. */
export function answerTurn() {
  return { id: makeId(), role: "assistant", parent: null, next: null, steps: [], state: "running", stats: null, note: "" };
}

export function newStep() {
  return { reasoning: "", reasoningMs: 0, text: "", calls: [] };
}

/** Add a turn under `parent` (null: at the beginning) and show it. */
export function add(conversation, turn, parent) {
  turn.parent = parent;
  conversation.turns[turn.id] = turn;
  select(conversation, turn.id);
  if (!conversation.title && turn.role === "user") conversation.title = titleOf(turn.text);
  return turn;
}

/** Show this turn among its siblings. */
export function select(conversation, id) {
  const turn = conversation.turns[id];
  if (turn.parent === null) conversation.first = id;
  else conversation.turns[turn.parent].next = id;
}

/** The turns that are shown, first to last. */
export function path(conversation) {
  const shown = [];
  for (let id = conversation.first; id && conversation.turns[id]; id = conversation.turns[id].next) shown.push(conversation.turns[id]);
  return shown;
}

/** All turns beside this one, itself included, in the order they were made. */
export function siblings(conversation, turn) {
  return Object.values(conversation.turns).filter((other) => other.parent === turn.parent);
}

/** Take a turn and all under it away; a sibling takes its place, if there is one. */
export function remove(conversation, id) {
  const turn = conversation.turns[id];
  const others = siblings(conversation, turn).filter((other) => other.id !== id);
  const drop = (one) => {
    delete conversation.turns[one];
    for (const child of Object.values(conversation.turns)) if (child.parent === one) drop(child.id);
  };
  drop(id);
  const next = others.at(-1)?.id ?? null;
  if (turn.parent === null) conversation.first = next;
  else conversation.turns[turn.parent].next = next;
}

export function answerText(turn) {
  return turn.steps.map((step) => step.text).filter(Boolean).join("\n\n");
}

function titleOf(text) {
  const line = text.trim().split("\n")[0].replace(/[#*`_>]/g, "").trim();
  return line.length > 60 ? line.slice(0, 57).trimEnd() + "…" : line || "Picture";
}

export function exportText(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, exported: new Date().toISOString(), conversations }, null, 1);
}

/** Conversations of an exported file. Foreign or broken ones are an Error with a sentence; ids are made anew. */
export function importText(text) {
  let data;
  try { data = JSON.parse(text); } catch { throw new Error("This file is not JSON."); }
  if (data?.format !== FORMAT || !Array.isArray(data.conversations)) throw new Error("This file holds no conversations of this page.");
  return data.conversations.map((given) => {
    const conversation = { ...newConversation(), title: String(given.title ?? ""), created: Number(given.created) || Date.now(), updated: Number(given.updated) || Date.now() };
    const turns = Object.entries(given.turns ?? {});
    for (const [id, turn] of turns) conversation.turns[id] = cleanTurn(id, turn, given.turns);
    conversation.first = conversation.turns[given.first] ? given.first : null;
    return conversation;
  });
}

/** Only what this page knows, in the types it expects: an imported file may come from anywhere. */
function cleanTurn(id, turn, all) {
  const known = (other) => (typeof other === "string" && Object.hasOwn(all, other) ? other : null);
  const base = { id, parent: known(turn.parent), next: known(turn.next) };
  if (turn.role === "user") {
    const images = (Array.isArray(turn.images) ? turn.images : []).filter((image) => /^data:image\//.test(image?.url ?? ""));
    return { ...base, role: "user", text: String(turn.text ?? ""), images: images.map(({ url, name }) => ({ url, name: String(name ?? "") })) };
  }
  const steps = (Array.isArray(turn.steps) ? turn.steps : []).map((step) => ({
    reasoning: String(step.reasoning ?? ""), reasoningMs: Number(step.reasoningMs) || 0, text: String(step.text ?? ""),
    calls: (Array.isArray(step.calls) ? step.calls : []).map((call) => ({
      id: String(call.id ?? ""), name: String(call.name ?? ""), arguments: String(call.arguments ?? ""),
      result: call.result === undefined ? undefined : String(call.result) })),
  }));
  const stats = turn.stats && typeof turn.stats === "object" ? turn.stats : null;
  return { ...base, role: "assistant", steps, state: ["done", "stopped"].includes(turn.state) ? turn.state : "incomplete", stats, note: String(turn.note ?? ""), isJson: Boolean(turn.isJson) };
}
