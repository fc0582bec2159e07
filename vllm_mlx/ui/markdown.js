// Markdown as data: text in, plain objects out. No DOM here, so that it runs in tests without a browser.
// Every block carries its offsets, and quotes, items and rows carry their own text, which is parsed when it is drawn:
// of an answer that grows only what changed is parsed and drawn again (see render.js).
// Model output is untrusted: there is no raw HTML, and links are kept only with a harmless scheme.

const FENCE = /^( {0,3})(`{3,}|~{3,})[ \t]*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;
const TABLE_RULE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const MAX_DEPTH = 12;

/** The blocks of `text`, each with `start` and `end` offsets. `depth` is how deep in quotes and lists it stands. */
export function parseBlocks(text, depth = 0) {
  const lines = text.split("\n");
  const offsets = [];
  let at = 0;
  for (const line of lines) { offsets.push(at); at += line.length + 1; }
  offsets.push(text.length);
  const blocks = [];
  let i = 0;
  while (i < lines.length) {
    if (!lines[i].trim()) { i += 1; continue; }
    const first = i;
    const [block, next] = readBlock(lines, i, depth);
    i = next;
    block.start = offsets[first];
    block.end = Math.min(offsets[i] ?? text.length, text.length);
    blocks.push(block);
  }
  return blocks;
}

function readBlock(lines, i, depth) {
  const line = lines[i];
  let match = FENCE.exec(line);
  if (match) return readFence(lines, i, match);
  if (/^ {0,3}(\$\$|\\\[)/.test(line)) {
    const found = readMath(lines, i);
    if (found) return found;
  }
  match = HEADING.exec(line);
  if (match) return [{ type: "heading", level: match[1].length, inline: parseInline(match[2] ?? "") }, i + 1];
  if (RULE.test(line)) return [{ type: "rule" }, i + 1];
  if (depth < MAX_DEPTH) {
    if (QUOTE.test(line)) return readQuote(lines, i);
    if (ITEM.test(line)) return readList(lines, i);
  }
  if (line.includes("|") && i + 1 < lines.length && TABLE_RULE.test(lines[i + 1]) && lines[i + 1].includes("-")) {
    const head = cells(line);
    if (head.length === cells(lines[i + 1]).length) return readTable(lines, i, head);
  }
  return readParagraph(lines, i);
}

function readFence(lines, i, [, indent, fence, info]) {
  const close = new RegExp(`^ {0,3}\\${fence[0]}{${fence.length},}[ \\t]*$`);
  const strip = new RegExp(`^ {0,${indent.length}}`);
  const code = [];
  let at = i + 1;
  let isClosed = false;
  for (; at < lines.length; at += 1) {
    if (close.test(lines[at])) { isClosed = true; at += 1; break; }
    code.push(indent ? lines[at].replace(strip, "") : lines[at]);
  }
  return [{ type: "code", lang: info.toLowerCase(), text: code.join("\n"), isClosed }, at];
}

function readMath(lines, i) {
  const opening = lines[i].trim();
  const close = opening.startsWith("$$") ? "$$" : "\\]";
  let rest = opening.slice(2);
  const body = [];
  for (let at = i; at < lines.length; at += 1) {
    if (at > i) rest = lines[at];
    const end = rest.indexOf(close);
    if (end >= 0) {
      if (rest.slice(end + 2).trim()) return null;
      body.push(rest.slice(0, end));
      return [{ type: "math", text: body.join("\n").trim() }, at + 1];
    }
    body.push(rest);
  }
  return null;
}

function readQuote(lines, i) {
  const inner = [];
  let at = i;
  for (; at < lines.length && QUOTE.test(lines[at]); at += 1) inner.push(lines[at].replace(QUOTE, ""));
  return [{ type: "quote", text: inner.join("\n") }, at];
}

function readList(lines, i) {
  const marker = ITEM.exec(lines[i])[2];
  const isOrdered = /\d/.test(marker);
  const kind = marker.at(-1);
  const items = [];
  let isLoose = false;
  let at = i;
  while (at < lines.length) {
    const match = ITEM.exec(lines[at]);
    if (!match || match[2].at(-1) !== kind || (RULE.test(lines[at]) && !isOrdered)) break;
    const indent = match[0].length + (lines[at].length === match[0].length ? 1 : 0);
    const own = [lines[at].slice(match[0].length)];
    at += 1;
    while (at < lines.length) {
      const line = lines[at];
      if (!line.trim()) {
        const next = lines.slice(at + 1, at + 3).find((l) => l.trim());
        if (next !== undefined && leading(next) >= Math.min(indent, 2) && leading(next) > match[1].length) {
          own.push(""); at += 1; continue;
        }
        break;
      }
      if (leading(line) > match[1].length + 1) own.push(line.slice(Math.min(leading(line), indent)));
      else if (ITEM.test(line) || FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || RULE.test(line)) break;
      else if (own.at(-1).trim()) own.push(line.trimStart());
      else break;
      at += 1;
    }
    let text = own.join("\n");
    const task = /^\[([ xX])\][ \t]+/.exec(text);
    if (task) text = text.slice(task[0].length);
    items.push({ task: task ? task[1] !== " " : null, text });
    let blank = at;
    while (blank < lines.length && !lines[blank].trim()) blank += 1;
    const next = blank < lines.length ? ITEM.exec(lines[blank]) : null;
    if (blank > at && next && next[2].at(-1) === kind) { isLoose = true; at = blank; }
  }
  return [{ type: "list", isOrdered, first: isOrdered ? parseInt(marker, 10) : 1, isLoose, items }, at];
}

const leading = (line) => line.length - line.trimStart().length;

/** The texts of a table row's cells. */
export function cells(line) {
  const row = line.trim().replace(/^\|/, "").replace(/(^|[^\\])\|$/, "$1");
  return row.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function readTable(lines, i, head) {
  const align = cells(lines[i + 1]).map((rule) =>
    rule.endsWith(":") ? (rule.startsWith(":") ? "center" : "right") : "left");
  let at = i + 2;
  while (at < lines.length && lines[at].trim() && lines[at].includes("|")) at += 1;
  return [{ type: "table", align, head, rows: lines.slice(i + 2, at) }, at];
}

function readParagraph(lines, i) {
  let at = i + 1;
  while (at < lines.length) {
    const line = lines[at];
    const item = ITEM.exec(line);
    // As in CommonMark, only a list that starts at 1 interrupts a sentence: "in\n1999. It" is none.
    const interrupts = item && (!/\d/.test(item[2]) || parseInt(item[2], 10) === 1) && line.length > item[0].length;
    if (!line.trim() || FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || interrupts
      || /^ {0,3}(\$\$|\\\[)/.test(line)) break;
    at += 1;
  }
  return [{ type: "paragraph", inline: parseInline(lines.slice(i, at).map((l) => l.trimStart()).join("\n")) }, at];
}

const SPECIAL = /[\\`*_~[!$<\n]|https?:\/\//g;

/** Inline nodes: {type: "text", text} and text, code, strong, em, del, link, math, break. */
export function parseInline(text, depth = 0, inLink = false) {
  const nodes = [];
  const hopeless = new Set(); // delimiters known to have no closing partner ahead
  let plain = "";
  let at = 0;
  const push = (node) => { if (plain) { nodes.push({ type: "text", text: plain }); plain = ""; } nodes.push(node); };
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const match = SPECIAL.exec(text);
    if (!match) { plain += text.slice(at); break; }
    plain += text.slice(at, match.index);
    at = match.index;
    const found = depth < MAX_DEPTH ? readInline(text, at, match[0], depth, hopeless, inLink) : null;
    if (!found) { plain += match[0]; at += match[0].length; }
    else if (typeof found[0] === "string") { plain += found[0]; at = found[1]; }
    else {
      if (found[0].type === "break") plain = plain.replace(/ +$/, "");
      push(found[0]);
      at = found[1];
    }
  }
  if (plain) nodes.push({ type: "text", text: plain });
  return nodes;
}

function readInline(text, at, sign, depth, hopeless, inLink) {
  switch (sign) {
    case "\\": return readEscape(text, at);
    case "`": return readCode(text, at);
    case "\n": return / {2,}$/.test(text.slice(Math.max(0, at - 8), at)) ? [{ type: "break" }, at + 1] : null;
    case "$": return readDollar(text, at, hopeless);
    case "[": return inLink ? null : readLink(text, at, depth);
    // Images of elsewhere are never fetched: a picture's address could carry away what was said. They become links.
    case "!": return text[at + 1] === "[" && !inLink ? readLink(text, at + 1, depth) : null;
    case "<": {
      const auto = /^<(https?:\/\/[^\s<>]+|mailto:[^\s<>]+)>/.exec(text.slice(at, at + 2000));
      return auto && safeUrl(auto[1])
        ? [{ type: "link", url: safeUrl(auto[1]), inline: [{ type: "text", text: auto[1] }] }, at + auto[0].length] : null;
    }
    case "*": case "_": case "~": return readEmphasis(text, at, sign, depth, hopeless, inLink);
    default: {
      if (inLink) return null;
      const url = /^https?:\/\/[^\s<>"'`|*]*/.exec(text.slice(at, at + 2000))[0].replace(/[.,;:!?)\]}]+$/, "");
      const safe = url.length > 8 && safeUrl(url);
      return safe ? [{ type: "link", url: safe, inline: [{ type: "text", text: url }] }, at + url.length] : null;
    }
  }
}

function readEscape(text, at) {
  const next = text[at + 1];
  if (next === "(" ) {
    const end = text.indexOf("\\)", at + 2);
    if (end > 0) return [{ type: "math", text: text.slice(at + 2, end).trim() }, end + 2];
  }
  if (next === "[") {
    const end = text.indexOf("\\]", at + 2);
    if (end > 0) return [{ type: "math", text: text.slice(at + 2, end).trim(), isDisplay: true }, end + 2];
  }
  if (next === "\n") return [{ type: "break" }, at + 2];
  return next && /[!-/:-@[-`{-~]/.test(next) ? [next, at + 2] : null;
}

function readCode(text, at) {
  const ticks = /^`+/.exec(text.slice(at, at + 64))[0];
  let end = at + ticks.length;
  while ((end = text.indexOf(ticks, end)) >= 0) {
    if (text[end + ticks.length] !== "`" && text[end - 1] !== "`") {
      let code = text.slice(at + ticks.length, end).replaceAll("\n", " ");
      if (/^ .* $/.test(code) && code.trim()) code = code.slice(1, -1);
      return [{ type: "code", text: code }, end + ticks.length];
    }
    while (text[end] === "`") end += 1;
  }
  return [ticks, at + ticks.length];
}

/** `$x$` as pandoc reads it: no blank inside the signs, no digit behind, so that "$5 and $6" stays money. */
function readDollar(text, at, hopeless) {
  const isDouble = text[at + 1] === "$";
  const sign = isDouble ? "$$" : "$";
  const from = at + sign.length;
  if (hopeless.has(sign) || (!isDouble && /\s|^$/.test(text[from] ?? ""))) return null;
  for (let end = text.indexOf(sign, from); end >= 0; end = text.indexOf(sign, end + 1)) {
    if (text[end - 1] === "\\" || end === from) continue;
    if (!isDouble && (/\s/.test(text[end - 1]) || /\d/.test(text[end + 1] ?? ""))) continue;
    const body = text.slice(from, end);
    if (!isDouble && body.includes("\n\n")) break;
    return [{ type: "math", text: body.trim(), isDisplay: isDouble }, end + sign.length];
  }
  hopeless.add(sign);
  return null;
}

function readEmphasis(text, at, sign, depth, hopeless, inLink) {
  let run = 1;
  while (text[at + run] === sign && run < 3) run += 1;
  if (sign === "~" && run < 2) return null;
  const before = text[at - 1] ?? " ";
  const lengths = sign === "~" ? [2] : run === 3 ? [3, 2, 1] : run === 2 ? [2] : [1];
  for (const length of lengths) {
    const delimiter = sign.repeat(length);
    const from = at + length;
    if (hopeless.has(delimiter) || !text[from] || /\s/.test(text[from])) continue;
    if (sign === "_" && /[\p{L}\p{N}]/u.test(before)) continue;
    const end = closing(text, from, sign, length);
    if (end < 0) { hopeless.add(delimiter); continue; }
    const inner = parseInline(text.slice(from, end), depth + 1, inLink);
    const node = length === 3 ? { type: "strong", inline: [{ type: "em", inline: inner }] }
      : { type: sign === "~" ? "del" : length === 2 ? "strong" : "em", inline: inner };
    return [node, end + length];
  }
  return [sign.repeat(run), at + run];
}

function closing(text, from, sign, length) {
  const delimiter = sign.repeat(length);
  let at = from;
  while ((at = text.indexOf(delimiter, at)) >= 0) {
    let run = length;
    while (text[at + run] === sign) run += 1;
    const after = text[at + run] ?? " ";
    const isCloser = !/\s/.test(text[at - 1]) && text[at - 1] !== "\\" && at > from
      && (sign !== "_" || !/[\p{L}\p{N}]/u.test(after));
    if (isCloser && (run === length || run === 3 || (length === 1 && run % 2 === 1))) return at + (run > length ? run - length : 0);
    at += run;
  }
  return -1;
}

function readLink(text, at, depth) {
  let level = 0;
  let end = at;
  const limit = Math.min(text.length, at + 2000);
  for (; end < limit; end += 1) {
    if (text[end] === "\\") end += 1;
    else if (text[end] === "[") level += 1;
    else if (text[end] === "]" && (level -= 1) === 0) break;
  }
  if (text[end] !== "]" || text[end + 1] !== "(") return null;
  const target = /^\(\s*<?((?:[^\s()<>]|\([^\s()]*\))*)>?(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/.exec(text.slice(end + 1, end + 3000));
  if (!target) return null;
  const inline = parseInline(text.slice(at + 1, end), depth + 1, true);
  const url = safeUrl(target[1]);
  const after = end + 1 + target[0].length;
  return [url ? { type: "link", url, inline } : { type: "span", inline }, after];
}

/** The address when it is one a person may be sent to, else null: no javascript:, data:, file: or relative ones. */
export function safeUrl(url) {
  try {
    const parsed = new URL(url);
    return ["http:", "https:", "mailto:"].includes(parsed.protocol) ? parsed.href : null;
  } catch {
    return null;
  }
}
