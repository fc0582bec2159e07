// Markdown trees as DOM nodes, built one by one: text of a model never becomes HTML.
import { copyButton, h } from "./dom.js";
import { highlight } from "./highlight.js";
import { parseBlocks } from "./markdown.js";
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

const inline = (nodes) => nodes.map((n) => {
  switch (n.type) {
    case "text": return n.text;
    case "code": return h("code", {}, n.text);
    case "math": return n.isDisplay ? displayMath(n.text) : mathNode(parseMath(n.text));
    case "break": return h("br");
    case "link": return h("a", { href: n.url, target: "_blank", rel: "noopener noreferrer" }, ...inline(n.inline));
    default: return h(n.type, {}, ...inline(n.inline));
  }
});

function block(b) {
  switch (b.type) {
    case "heading": return h(`h${Math.min(6, b.level + 2)}`, {}, ...inline(b.inline));
    case "rule": return h("hr");
    case "math": return displayMath(b.text);
    case "quote": return h("blockquote", {}, ...b.blocks.map(block));
    case "list": return h(b.isOrdered ? "ol" : "ul", { class: b.isLoose && "loose", start: b.isOrdered && b.first }, ...b.items.map(item));
    case "table": return table(b);
    case "code": return new CodeView(b).el;
    default: return h("p", {}, ...inline(b.inline));
  }
}

function item({ task, blocks }) {
  const inner = blocks.flatMap((b) => (b.type === "paragraph" && blocks.length === 1 ? inline(b.inline) : [block(b)]));
  if (task === null) return h("li", {}, ...inner);
  return h("li", { class: "task" }, h("span", { role: "img", "aria-label": task ? "done" : "open" }, task ? "☑" : "☐"), " ", ...inner);
}

function table(b) {
  const cell = (tag, column, nodes) => h(tag, { class: b.align[column] }, ...inline(nodes));
  return h("div", { class: "wide", tabindex: "0", role: "group", "aria-label": "Table" }, h("table", {},
    h("thead", {}, h("tr", {}, ...b.head.map((c, i) => cell("th", i, c)))),
    h("tbody", {}, ...b.rows.map((row) => h("tr", {}, ...row.map((c, i) => cell("td", i, c)))))));
}

/** A code block that can grow: only the coloured pieces that changed are made again. */
class CodeView {
  constructor(b) {
    this.code = h("code");
    this.parts = [];
    this.lang = b.lang;
    this.el = h("figure", { class: "code" },
      h("figcaption", {}, h("span", {}, b.lang || "text"), copyButton("Copy code", () => this.text)),
      h("pre", { tabindex: "0" }, this.code));
    this.update(b);
  }

  update(b) {
    this.text = b.text;
    const parts = highlight(b.text, b.lang);
    let same = 0;
    while (same < parts.length && same < this.parts.length && parts[same][0] === this.parts[same][0] && parts[same][1] === this.parts[same][1]) same += 1;
    while (this.code.childNodes.length > same) this.code.lastChild.remove();
    this.code.append(...parts.slice(same).map(([kind, text]) => (kind ? h("span", { class: kind }, text) : text)));
    this.parts = parts;
  }
}

/** Grows with a stream: only from the last block on is anything parsed or drawn again. */
export class MarkdownView {
  #done = 0;
  #kept = 0;
  #code = null; // the view of the last block while it is an open code block
  #codeAt = -1;

  constructor(el) { this.el = el; }

  update(text) {
    const blocks = parseBlocks(text.slice(this.#done));
    const last = blocks.at(-1);
    if (blocks.length === 1 && this.#code && last.type === "code" && last.lang === this.#code.lang && this.#codeAt === this.#done + last.start) {
      this.#code.update(last);
      return;
    }
    while (this.el.childNodes.length > this.#kept) this.el.lastChild.remove();
    this.#code = null;
    this.el.append(...blocks.map((b, i) => {
      if (b.type !== "code" || i < blocks.length - 1) return block(b);
      this.#code = new CodeView(b);
      this.#codeAt = this.#done + b.start;
      return this.#code.el;
    }));
    if (blocks.length > 1) { this.#kept += blocks.length - 1; this.#done += last.start; }
  }
}

/** The whole of a text, once. */
export function renderMarkdown(text) {
  const el = h("div", { class: "prose" });
  new MarkdownView(el).update(text);
  return el;
}
