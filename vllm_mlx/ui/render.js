// Markdown trees as DOM nodes, built one by one: text of a model never becomes HTML.
import { highlight } from "./highlight.js";
import { parseBlocks } from "./markdown.js";
import { parseMath } from "./math.js";

export function h(tag, attrs = {}, ...children) {
  const el = document.createElement(tag);
  for (const [name, value] of Object.entries(attrs)) el.setAttribute(name, value);
  el.append(...children);
  return el;
}

function mathNode(tree) {
  const el = document.createElementNS("http://www.w3.org/1998/Math/MathML", tree.tag);
  for (const [name, value] of Object.entries(tree.attrs)) el.setAttribute(name, value);
  if (tree.text !== undefined) el.textContent = tree.text;
  else el.append(...tree.children.map(mathNode));
  return el;
}

const inline = (nodes) => nodes.map((n) => {
  switch (n.type) {
    case "text": return n.text;
    case "code": return h("code", {}, n.text);
    case "math": return mathNode(parseMath(n.text, n.isDisplay));
    case "break": return h("br");
    case "link": return h("a", { href: n.url, target: "_blank", rel: "noopener noreferrer" }, ...inline(n.inline));
    default: return h(n.type, {}, ...inline(n.inline));
  }
});

function block(b) {
  switch (b.type) {
    case "heading": return h(`h${Math.min(6, b.level + 1)}`, {}, ...inline(b.inline));
    case "rule": return h("hr");
    case "math": return mathNode(parseMath(b.text, true));
    case "quote": return h("blockquote", {}, ...b.blocks.map(block));
    case "list": return h(b.isOrdered ? "ol" : "ul", b.isOrdered ? { start: b.first } : {}, ...b.items.map((i) =>
      h("li", {}, i.task === null ? "" : i.task ? "☑ " : "☐ ", ...i.blocks.map(block))));
    case "table": return h("table", {}, h("tr", {}, ...b.head.map((c) => h("th", {}, ...inline(c)))),
      ...b.rows.map((r) => h("tr", {}, ...r.map((c) => h("td", {}, ...inline(c))))));
    case "code": {
      const copy = h("button", { type: "button", class: "copy" }, "Copy");
      copy.onclick = () => navigator.clipboard.writeText(b.text).then(() => { copy.textContent = "Copied"; });
      return h("div", { class: "code" }, copy, h("pre", { tabindex: "0" }, h("code", {},
        ...highlight(b.text, b.lang).map(([kind, text]) => (kind ? h("span", { class: kind }, text) : text)))));
    }
    default: return h("p", {}, ...inline(b.inline));
  }
}

/** Grows with a stream: only from the last but one block on is anything parsed or drawn again. */
export class MarkdownView {
  constructor(el) { this.el = el; this.done = 0; this.kept = 0; }
  update(text) {
    const blocks = parseBlocks(text.slice(this.done));
    while (this.el.childNodes.length > this.kept) this.el.lastChild.remove();
    this.el.append(...blocks.map(block));
    if (blocks.length > 1) { this.kept += blocks.length - 1; this.done += blocks.at(-1).start; }
  }
}
