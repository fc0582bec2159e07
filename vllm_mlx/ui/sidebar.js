// The list of conversations: open, rename by double click, delete after asking, import and export.
import { $, h, iconButton, saveFile } from "./dom.js";
import { exportText, importText } from "./tree.js";

const DAY = 86400000;

export class Sidebar {
  /** `on` has open(conversation), renamed(conversation), deleted(conversation), imported(list), say(text), all(). */
  constructor(on) {
    this.on = on;
    $("export").onclick = async () => {
      const all = (await on.all()).filter((conversation) => conversation.first);
      if (!all.length) { on.say("There is no conversation to export yet."); return; }
      saveFile(`conversations-${new Date().toISOString().slice(0, 10)}.json`, exportText(all));
    };
    $("import").onclick = () => $("import-file").click();
    $("import-file").onchange = async (event) => {
      const [file] = event.target.files;
      event.target.value = "";
      if (!file) return;
      try { on.imported(importText(await file.text())); } catch (error) { on.say(`${file.name} cannot be imported. ${error.message}`); }
    };
  }

  draw(conversations, currentId) {
    const list = $("list");
    list.replaceChildren();
    let heading = "";
    for (const conversation of conversations) {
      const when = age(conversation.updated);
      if (when !== heading) { list.append(h("h3", {}, when)); heading = when; }
      list.append(this.#entry(conversation, conversation.id === currentId));
    }
    if (!conversations.length) list.append(h("p", { class: "hint" }, "Nothing here yet."));
  }

  #entry(conversation, isCurrent) {
    const name = h("button", { type: "button", class: "name", "aria-current": isCurrent ? "true" : null, title: "Double click renames", onclick: () => this.on.open(conversation), ondblclick: () => this.#rename(entry, conversation) }, conversation.title || "New conversation");
    const entry = h("div", { class: isCurrent ? "entry current" : "entry" }, name, iconButton("trash", `Delete ${conversation.title || "conversation"}`, async () => {
      if (await confirm(`Delete “${conversation.title || "this conversation"}”? It cannot be brought back.`)) this.on.deleted(conversation);
    }));
    name.onkeydown = (event) => {
      if (event.key === "F2") this.#rename(entry, conversation);
      if (event.key === "Delete") entry.lastChild.click();
    };
    return entry;
  }

  #rename(entry, conversation) {
    const box = h("input", { "aria-label": "Name of the conversation" });
    box.value = conversation.title;
    let isOver = false;
    const end = (isKept) => {
      if (isOver) return;
      isOver = true;
      if (isKept && box.value.trim()) conversation.title = box.value.trim();
      this.on.renamed(conversation);
    };
    box.onkeydown = (event) => { if (event.key === "Enter") end(true); if (event.key === "Escape") { event.stopPropagation(); end(false); } };
    box.onblur = () => end(true);
    entry.replaceChildren(box);
    box.select();
  }
}

/** A question before something is lost; the native dialog keeps the focus inside and gives it back. */
export function confirm(text) {
  const dialog = $("confirm");
  $("confirm-text").textContent = text;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => { dialog.onclose = () => resolve(dialog.returnValue === "yes"); });
}

function age(time) {
  const today = new Date().setHours(0, 0, 0, 0);
  return time >= today ? "Today" : time >= today - DAY ? "Yesterday" : time >= today - 7 * DAY ? "This week" : "Earlier";
}
