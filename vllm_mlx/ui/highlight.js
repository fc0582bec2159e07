// Colours for code: text and a language name in, [class, text] pairs out whose texts join to the input. No DOM.
// One scanner with a few facts a language; it aims at comments, strings, numbers, keywords and calls, not at grammars.
// It stops at the beginning of some line that lies outside of every token: code that grows is scanned again only from there.

const words = (text) => new Set(text.split(" "));
const C_LIKE = { line: "//", block: ["/*", "*/"], quotes: "\"'" };

const LANGUAGES = {
  python: { line: "#", quotes: "\"'", triple: true, words: words("and as assert async await break case class continue def del elif else except finally for from global if import in is lambda match nonlocal not or pass raise return try while with yield None True False self") },
  javascript: { ...C_LIKE, quotes: "\"'`", words: words("async await break case catch class const continue debugger default delete do else export extends finally for from function if import in instanceof let new of return static super switch this throw try typeof var void while yield null undefined true false interface type enum implements readonly declare as number string boolean any") },
  json: { quotes: "\"", words: words("true false null") },
  bash: { line: "#", quotes: "\"'", words: words("if then else elif fi for in do done while until case esac function return export local echo cd set unset exit source sudo read shift trap") },
  c: { ...C_LIKE, hash: true, words: words("auto bool break case catch char class const constexpr continue default delete do double else enum extern false float for friend goto if inline int long namespace new nullptr NULL operator private protected public return short signed sizeof static struct switch template this throw true try typedef typename union unsigned using virtual void volatile while") },
  rust: { ...C_LIKE, quotes: "\"", words: words("as async await break const continue crate dyn else enum extern false fn for if impl in let loop match mod move mut pub ref return self Self static struct super trait true type unsafe use where while String Vec Option Result Some None Ok Err i32 i64 u8 u32 u64 usize f32 f64 bool str") },
  go: { ...C_LIKE, quotes: "\"'`", words: words("break case chan const continue default defer else fallthrough for func go goto if import interface map package range return select struct switch type var nil true false string int int64 float64 bool error byte rune any") },
  java: { ...C_LIKE, words: words("abstract boolean break byte case catch char class const continue default do double else enum extends final finally float for if implements import instanceof int interface internal long new null override package private protected public record return short static super switch this throw throws try var val fun void volatile when while true false string using namespace async await") },
  swift: { ...C_LIKE, quotes: "\"", words: words("actor as async await break case catch class continue default defer do else enum extension false for func guard if import in init inout is let nil private protocol public return self static struct super switch throw throws true try var where while Int String Double Bool Array") },
  sql: { line: "--", block: ["/*", "*/"], quotes: "'\"", fold: true, words: words("select from where and or not in is null as join left right inner outer on group by order having limit offset insert into values update set delete create table drop alter index primary key foreign references distinct union all case when then else end exists between like with int integer text varchar count sum avg min max") },
  ruby: { line: "#", quotes: "\"'", words: words("alias and begin break case class def do else elsif end ensure false for if in module next nil not or puts redo require rescue retry return self super then true undef unless until when while yield") },
  yaml: { line: "#", quotes: "\"'", key: /^[ \t-]*[\w./-]+(?=\s*:)/, words: words("true false null yes no") },
  toml: { line: "#", quotes: "\"'", key: /^[ \t]*[\w.-]+(?=\s*=)/, words: words("true false") },
  css: { block: ["/*", "*/"], quotes: "\"'", key: /^[ \t]*[\w-]+(?=\s*:)/, words: words("important auto none inherit initial flex grid block inline absolute relative fixed sticky") },
  html: { block: ["<!--", "-->"], quotes: "\"'", markup: true, words: words("") },
  diff: { diff: true, words: words("") },
};
const ALIASES = {
  py: "python", python3: "python", js: "javascript", ts: "javascript", typescript: "javascript", jsx: "javascript",
  tsx: "javascript", mjs: "javascript", sh: "bash", shell: "bash", zsh: "bash", console: "bash", cpp: "c", "c++": "c", h: "c",
  cc: "c", rs: "rust", golang: "go", kotlin: "java", kt: "java", cs: "java", csharp: "java", scala: "java", rb: "ruby",
  yml: "yaml", ini: "toml", xml: "html", svg: "html", scss: "css", jsonc: "json", json5: "json", patch: "diff",
};

const CHUNK_LINES = 32;

/** The whole text's pairs. */
export function highlight(text, name) {
  const all = [];
  for (let at = 0; at < text.length;) {
    const [parts, end] = highlightChunk(text, name, at);
    all.push(...parts);
    at = end;
  }
  return all;
}

/** The pairs of some whole lines from `start` on (which is 0 or an earlier `end`), and where they end. What stands before
 *  an `end` that is not the text's keeps its colours, however the text goes on. */
export function highlightChunk(text, name, start = 0) {
  const lang = LANGUAGES[ALIASES[name] ?? name];
  if (!lang || lang.diff) return plainChunk(text, start, Boolean(lang));
  const out = [];
  const push = (kind, part) => {
    if (!part) return;
    if (out.length && out.at(-1)[0] === kind) out.at(-1)[1] += part;
    else out.push([kind, part]);
  };
  let at = start, numLines = 0;
  while (at < text.length) {
    const from = at;
    const char = text[at];
    if (at > start && text[at - 1] === "\n" && (numLines += 1) >= CHUNK_LINES) return [out, at];
    if (lang.key && (at === 0 || text[at - 1] === "\n")) {
      const eol = text.indexOf("\n", at);
      const key = lang.key.exec(text.slice(at, eol < 0 ? text.length : eol));
      if (key) { push("key", key[0]); at += key[0].length; continue; }
    }
    if (lang.block && text.startsWith(lang.block[0], at)) {
      const end = text.indexOf(lang.block[1], at + lang.block[0].length);
      at = end < 0 ? text.length : end + lang.block[1].length;
      push("com", text.slice(from, at));
    } else if ((lang.line && text.startsWith(lang.line, at) && (lang.line !== "#" || !/[\w$]/.test(text[at - 1] ?? " ")))
      || (lang.hash && char === "#")) {
      const end = text.indexOf("\n", at);
      at = end < 0 ? text.length : end;
      push(char === "#" && lang.hash ? "kw" : "com", text.slice(from, at));
    } else if (lang.quotes?.includes(char)) {
      at = endOfString(text, at, char, lang);
      const part = text.slice(from, at);
      push(/^\s*:/.test(text.slice(at, at + 20)) && lang === LANGUAGES.json ? "key" : "str", part);
    } else if (lang.markup && char === "<" && /[a-zA-Z/!]/.test(text[at + 1] ?? "")) {
      const tag = /^<[/!]?[\w:-]*/.exec(text.slice(at, at + 80))[0];
      push("kw", tag); at += tag.length;
    } else if (/[0-9]/.test(char)) {
      const number = /^(0[xXbBoO][\da-fA-F_]+|[\d_]+(\.\d[\d_]*)?([eE][+-]?\d+)?)\w*/.exec(text.slice(at, at + 80))[0];
      push("num", number); at += number.length;
    } else if (/[\p{L}_$@]/u.test(char)) {
      const word = /^[@$]?[\p{L}\p{N}_$]*/u.exec(text.slice(at, at + 200))[0] || char;
      const known = lang.words.has(lang.fold ? word.toLowerCase() : word);
      push(known ? "kw" : char === "@" ? "kw" : text[at + word.length] === "(" ? "fn" : "", word);
      at += word.length;
    } else { push("", char); at += 1; }
  }
  return [out, at];
}

function plainChunk(text, start, isDiff) {
  let end = start;
  for (let i = 0; i < CHUNK_LINES && end < text.length; i += 1) end = text.indexOf("\n", end) + 1 || text.length;
  const part = text.slice(start, end);
  if (!isDiff) return [[["", part]], end];
  return [part.split(/(?<=\n)/).map((line) => [{ "+": "add", "-": "cut", "@": "kw" }[line[0]] ?? "", line]), end];
}

function endOfString(text, at, quote, lang) {
  const triple = quote.repeat(3);
  if (lang.triple && text.startsWith(triple, at)) {
    const end = text.indexOf(triple, at + 3);
    return end < 0 ? text.length : end + 3;
  }
  for (let i = at + 1; i < text.length; i += 1) {
    if (text[i] === "\\") i += 1;
    else if (text[i] === quote) return i + 1;
    else if (text[i] === "\n" && quote !== "`") return i;
  }
  return text.length;
}
