// Markdown as DOM nodes, made one by one: text of a model never becomes HTML.
// An answer grows, so everything here is a view with `update`: what is drawn and has not changed is left alone, and a
// frame costs about the same at the end of a long answer, list, table or listing as at its beginning.
import { copyButton, h } from "./dom.js";
import { highlightChunk } from "./highlight.js";
import { cells, parseBlocks, parseInline } from "./markdown.js";
import { parseMath } from "./math.js";

const MATHML = "http://www.w3.org/1998/Math/MathML";

function mathNode(tree) {
  const el = document.createElementNS(MATHML, tree.tag);
  for (const [name, value] of Object.entries(tree.attrs)) el.setAttribute(name, value);
  if (tree.text !== undefined) el.textContent = tree.text;
  else el.append(...tree.children.map(mathNode));
  return el;
}

/** A formula; a wide one scrolls by itself instead of widening the page. */
const displayMath = (text) => h("div", { class: "formula", tabindex: "0", role: "group", "aria-label": "Formula" }, mathNode(parseMath(text, true)));

function inlineNode(n) {
  switch (n.type) {
    case "text": return document.createTextNode(n.text);
    case "code": return h("code", {}, n.text);
    case "math": return n.isDisplay ? displayMath(n.text) : mathNode(parseMath(n.text));
    case "break": return h("br");
    case "link": return h("a", { href: n.url, target: "_blank", rel: "noopener noreferrer" }, ...n.inline.map(inlineNode));
    default: return h(n.type, {}, ...n.inline.map(inlineNode));
  }
}

/** Text with emphasis, code, links: a paragraph, a heading, a cell. */
class InlineView {
  #drawn = [];

  constructor(tag, b, attrs = {}) {
    this.el = h(tag, attrs);
    this.update(b);
  }

  update({ inline }) {
    const drawn = this.#drawn, { childNodes } = this.el;
    let same = 0;
    while (same < inline.length && same < drawn.length && isSame(inline[same], drawn[same])) same += 1;
    this.#drawn = inline;
    // Mostly the last text has become longer.
    const [now, before] = [inline[same], drawn[same]];
    if (now?.type === "text" && before?.type === "text" && now.text.startsWith(before.text)) {
      childNodes[same].appendData(now.text.slice(before.text.length));
      same += 1;
    }
    while (childNodes.length > same) this.el.lastChild.remove();
    this.el.append(...inline.slice(same).map(inlineNode));
  }
}

const isSame = (a, b) => a.type === b.type && a.text === b.text && a.url === b.url && a.inline?.length === b.inline?.length
  && (a.inline ?? []).every((one, i) => isSame(one, b.inline[i]));

/** What is one thing and is drawn anew when it changes: a rule, a formula. */
class WholeView {
  constructor(b) { this.el = b.type === "rule" ? h("hr") : displayMath(b.text); this.text = b.text; }
  canBe(b) { return b.text === this.text; }
  update() {}
}

class QuoteView {
  constructor(b, depth) {
    this.el = h("blockquote");
    this.inner = new MarkdownView(this.el, depth + 1);
    this.update(b);
  }

  update(b) { this.inner.update(b.text); }
}

class ListView {
  #items = [];

  constructor(b, depth) {
    this.depth = depth;
    this.isOrdered = b.isOrdered;
    this.first = b.first;
    this.el = h(b.isOrdered ? "ol" : "ul", { start: b.isOrdered && b.first });
    this.update(b);
  }

  canBe(b) { return b.isOrdered === this.isOrdered && b.first === this.first; }

  update(b) {
    this.el.classList.toggle("loose", b.isLoose);
    grow(this.#items, b.items, this.el, (item) => new ItemView(item, this.depth));
  }
}

class ItemView {
  constructor(item, depth) {
    this.task = item.task;
    const inner = item.task === null ? h("li") : h("div");
    this.el = item.task === null ? inner : h("li", { class: "task" }, h("span", { role: "img", "aria-label": item.task ? "done" : "open" }, item.task ? "☑" : "☐"), inner);
    this.inner = new MarkdownView(inner, depth + 1);
    this.update(item);
  }

  canBe(item) { return item.task === this.task; }

  update({ text }) {
    if (text === this.text) return;
    this.text = text;
    this.inner.update(text);
  }
}

class TableView {
  #rows = [];

  constructor(b) {
    this.head = JSON.stringify([b.head, b.align]);
    this.align = b.align;
    this.body = h("tbody");
    this.el = h("div", { class: "wide", tabindex: "0", role: "group", "aria-label": "Table" }, h("table", {},
      h("thead", {}, h("tr", {}, ...b.head.map((text, i) => this.#cell("th", text, i)))), this.body));
    this.update(b);
  }

  canBe(b) { return JSON.stringify([b.head, b.align]) === this.head; }

  #cell(tag, text, column) { return new InlineView(tag, { inline: parseInline(text) }, { class: this.align[column] }).el; }

  update(b) {
    grow(this.#rows, b.rows, this.body, (line) => {
      const texts = cells(line);
      const el = h("tr", {}, ...this.align.map((_, i) => this.#cell("td", texts[i] ?? "", i)));
      return { el, canBe: (other) => other === line, update() {} };
    });
  }
}

/** Code in pieces of some lines: only the last piece is coloured again, and only what changed in it is made again. */
class CodeView {
  #start = 0; // of the last piece
  #drawn = [];

  constructor(b) {
    this.lang = b.lang;
    this.code = h("code");
    this.el = h("figure", { class: "code" },
      h("figcaption", {}, h("span", {}, b.lang || "text"), copyButton("Copy code", () => this.text)),
      h("pre", { tabindex: "0" }, this.code));
    this.text = "";
    this.update(b);
  }

  canBe(b) { return b.lang === this.lang; }

  update({ text }) {
    if (text === this.text) return;
    if (!text.startsWith(this.text.slice(0, this.#start))) { this.code.replaceChildren(); this.#start = 0; }
    this.text = text;
    if (!this.code.lastChild) this.#open();
    for (;;) {
      const [parts, end] = highlightChunk(text, this.lang, this.#start);
      this.#draw(parts);
      if (end >= text.length) return;
      this.#start = end;
      this.#open();
    }
  }

  #open() {
    this.code.append(h("span", { class: "lines" }));
    this.#drawn = [];
  }

  #draw(parts) {
    const el = this.code.lastChild;
    let same = 0;
    while (same < parts.length && same < this.#drawn.length && parts[same][0] === this.#drawn[same][0] && parts[same][1] === this.#drawn[same][1]) same += 1;
    while (el.childNodes.length > same) el.lastChild.remove();
    el.append(...parts.slice(same).map(([kind, text]) => (kind ? h("span", { class: kind }, text) : text)));
    this.#drawn = parts;
  }
}

/** Make `views` show `things`, within `el`: a view is kept as long as it can be the thing in its place. */
function grow(views, things, el, make) {
  things.forEach((thing, i) => {
    const view = views[i];
    if (view && (view.canBe?.(thing) ?? true)) { view.update(thing); return; }
    views[i] = make(thing);
    if (view) view.el.replaceWith(views[i].el);
    else el.append(views[i].el);
  });
  for (const view of views.splice(things.length)) view.el.remove();
}

function viewOf(b, depth) {
  const view = (() => {
    switch (b.type) {
      case "heading": return new InlineView(`h${Math.min(6, b.level + 2)}`, b);
      case "rule": case "math": return new WholeView(b);
      case "quote": return new QuoteView(b, depth);
      case "list": return new ListView(b, depth);
      case "table": return new TableView(b);
      case "code": return new CodeView(b);
      default: return new InlineView("p", b);
    }
  })();
  const canBe = view.canBe?.bind(view) ?? (() => true);
  view.canBe = (other) => other.type === b.type && other.level === b.level && canBe(other);
  return view;
}

/** A text that grows: only its last blocks are parsed again. */
export class MarkdownView {
  #done = ""; // the beginning whose blocks are complete
  #open = []; // the views of the blocks after it

  constructor(el, depth = 0) {
    this.el = el;
    this.depth = depth;
  }

  update(text) {
    if (!text.startsWith(this.#done)) {
      this.el.replaceChildren();
      this.#done = "";
      this.#open = [];
    }
    const rest = text.slice(this.#done.length);
    const blocks = parseBlocks(rest, this.depth);
    grow(this.#open, blocks, this.el, (b) => viewOf(b, this.depth));
    // A block that begins in the last line may turn out to be the end of the one before: "#", then "#1 of them".
    const lastLine = rest.lastIndexOf("\n") + 1;
    const open = Math.max(0, blocks.findLastIndex((b) => b.start < lastLine));
    if (!open) return;
    this.#done = text.slice(0, this.#done.length + blocks[open].start);
    this.#open.splice(0, open);
  }
}

/** The whole of a text. */
export function renderOnce(text) {
  const el = h("div", { class: "prose" });
  new MarkdownView(el).update(text);
  return el;
}
