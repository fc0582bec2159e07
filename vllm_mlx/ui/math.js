// TeX formulas as MathML, which browsers draw themselves: text in, a tree {tag, attrs, children|text} out. No DOM.
// The common part of TeX; a command that is not known is shown as it was written.

const GREEK = "alpha α beta β gamma γ delta δ epsilon ϵ varepsilon ε zeta ζ eta η theta θ vartheta ϑ iota ι kappa κ lambda λ mu μ nu ν xi ξ pi π rho ρ sigma σ tau τ upsilon υ phi ϕ varphi φ chi χ psi ψ omega ω Gamma Γ Delta Δ Theta Θ Lambda Λ Xi Ξ Pi Π Sigma Σ Phi Φ Psi Ψ Omega Ω ell ℓ hbar ℏ infty ∞ partial ∂ nabla ∇ emptyset ∅ varnothing ∅ Re ℜ Im ℑ aleph ℵ top ⊤ bot ⊥ angle ∠ triangle △ prime ′";
const SIGNS = "times × cdot ⋅ div ÷ pm ± mp ∓ leq ≤ le ≤ geq ≥ ge ≥ neq ≠ ne ≠ approx ≈ equiv ≡ sim ∼ simeq ≃ cong ≅ propto ∝ ll ≪ gg ≫ in ∈ notin ∉ ni ∋ subset ⊂ subseteq ⊆ supset ⊃ supseteq ⊇ cup ∪ cap ∩ setminus ∖ to → rightarrow → leftarrow ← leftrightarrow ↔ Rightarrow ⇒ implies ⇒ Leftarrow ⇐ iff ⇔ Leftrightarrow ⇔ mapsto ↦ longrightarrow ⟶ uparrow ↑ downarrow ↓ forall ∀ exists ∃ neg ¬ lnot ¬ land ∧ wedge ∧ lor ∨ vee ∨ oplus ⊕ otimes ⊗ circ ∘ bullet ∙ star ⋆ ast ∗ ldots … dots … cdots ⋯ vdots ⋮ ddots ⋱ mid ∣ parallel ∥ perp ⟂ lbrace { rbrace } { { } } langle ⟨ rangle ⟩ lfloor ⌊ rfloor ⌋ lceil ⌈ rceil ⌉ vert | Vert ‖ | ‖ colon : therefore ∴ because ∵ % % & & # # $ $ _ _";
const BIG = "sum ∑ prod ∏ coprod ∐ int ∫ iint ∬ iiint ∭ oint ∮ bigcup ⋃ bigcap ⋂ bigoplus ⨁ bigotimes ⨂";
const FUNCTIONS = new Set("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp lim limsup liminf max min sup inf det dim ker gcd deg arg argmax argmin Pr hom mod".split(" "));
const LIMITED = new Set(["lim", "limsup", "liminf", "max", "min", "sup", "inf", "argmax", "argmin", "det", "gcd", "Pr"]);
const ACCENTS = { hat: "^", widehat: "^", bar: "¯", overline: "¯", vec: "→", dot: "˙", ddot: "¨", tilde: "~", widetilde: "~" };
const SPACES = { ",": "0.17em", ":": "0.22em", ";": "0.28em", "!": "-0.17em", " ": "0.3em", quad: "1em", qquad: "2em" };
const FENCES = { matrix: ["", ""], pmatrix: ["(", ")"], bmatrix: ["[", "]"], vmatrix: ["|", "|"], Bmatrix: ["{", "}"], cases: ["{", ""] };
const BOARD = { R: "ℝ", N: "ℕ", Z: "ℤ", Q: "ℚ", C: "ℂ", P: "ℙ", H: "ℍ", E: "𝔼", F: "𝔽", 1: "𝟙" };
const pairs = (text) => { const all = text.split(" "); return new Map(all.flatMap((n, i) => (i % 2 ? [] : [[n, all[i + 1]]]))); };
const greek = pairs(GREEK), signs = pairs(SIGNS), big = pairs(BIG);
const MAX_DEPTH = 60;

const node = (tag, children = [], attrs = {}) => ({ tag, attrs, children });
const leaf = (tag, text, attrs = {}) => ({ tag, attrs, text });
const row = (list) => (list.length === 1 ? list[0] : node("mrow", list));

export function parseMath(text, isDisplay = false) {
  const tokens = text.match(/\\(?:[a-zA-Z]+\*?|[\s\S])|[0-9]+(?:[.,][0-9]+)*|\s+|[\s\S]/gu) ?? [];
  const state = { tokens, at: 0, depth: 0, isDisplay };
  const body = [];
  while (state.at < tokens.length) { // a stray closing brace is shown rather than losing what follows it
    body.push(...readRow(state, () => false));
    if (state.at < tokens.length) body.push(leaf("mo", tokens[state.at++]));
  }
  return node("math", [node("mrow", body)], isDisplay ? { display: "block" } : {});
}

function readRow(s, isEnd) {
  const out = [];
  if ((s.depth += 1) > MAX_DEPTH) { s.depth -= 1; return [leaf("mtext", s.tokens.splice(s.at).join(""))]; }
  while (s.at < s.tokens.length) {
    const token = s.tokens[s.at];
    if (token === "}" || isEnd(token)) break;
    const atom = readScripted(s);
    if (atom) out.push(atom);
    // As TeX sets it: a thin space between a function and what it is applied to, none before brackets.
    if (atom?.isFunction && !/^([([{)\]}^_,;.]|\\(left|right|[,;:!]))?$/.test(nextToken(s))) out.push(leaf("mspace", "", { width: "0.17em" }));
  }
  s.depth -= 1;
  return out;
}

const nextToken = (s) => s.tokens.slice(s.at, s.at + 2).find((token) => token.trim()) ?? "";

const skipSpace = (s) => { while (/^\s/.test(s.tokens[s.at] ?? "")) s.at += 1; };

function readScripted(s) {
  let base = ["^", "_"].includes(s.tokens[s.at]) ? node("mrow") : readAtom(s);
  if (!base) return null;
  let sub = null, sup = null;
  for (;;) {
    const before = s.at;
    skipSpace(s);
    const token = s.tokens[s.at];
    if (token === "_" && !sub) { s.at += 1; sub = readArgument(s); }
    else if (token === "^" && !sup) { s.at += 1; sup = readArgument(s); }
    else if (token === "'" && (!sup || sup.isPrime)) {
      s.at += 1;
      sup = { ...leaf("mo", (sup?.text ?? "") + "′"), isPrime: true };
    } else { s.at = before; break; }
  }
  const isUnder = base.isLimited && s.isDisplay, { isFunction } = base;
  if (sub && sup) base = node(isUnder ? "munderover" : "msubsup", [base, sub, sup]);
  else if (sub) base = node(isUnder ? "munder" : "msub", [base, sub]);
  else if (sup) base = node(isUnder ? "mover" : "msup", [base, sup]);
  return isFunction ? { ...base, isFunction } : base;
}

function readArgument(s) {
  skipSpace(s);
  if (s.at >= s.tokens.length || s.tokens[s.at] === "}") return node("mrow");
  return readAtom(s) ?? node("mrow");
}

function readGroupText(s) {
  skipSpace(s);
  if (s.tokens[s.at] !== "{") return s.tokens[s.at++] ?? "";
  let level = 0, text = "";
  for (; s.at < s.tokens.length; s.at += 1) {
    const token = s.tokens[s.at];
    if (token === "{" && level++ === 0) continue;
    if (token === "}" && --level === 0) { s.at += 1; break; }
    text += token;
  }
  return text;
}

function readAtom(s) {
  const token = s.tokens[s.at++];
  if (/^\s/.test(token)) return null;
  if (token === "{") {
    const inner = readRow(s, () => false);
    if (s.tokens[s.at] === "}") s.at += 1;
    return row(inner);
  }
  if (token[0] === "\\" && token.length > 1) return readCommand(s, token.slice(1));
  if (/^\d/.test(token)) return leaf("mn", token);
  if (/^\p{L}/u.test(token)) return leaf("mi", token);
  if (token === "-") return leaf("mo", "−");
  if (token === "~") return leaf("mspace", "", { width: "0.3em" });
  if (token === "&") return null;
  return leaf("mo", token, /[()[\]|]/.test(token) ? { stretchy: "false" } : {});
}

function readCommand(s, name) {
  if (greek.has(name)) return leaf("mi", greek.get(name), /^[A-Z]/.test(name) ? { mathvariant: "normal" } : {});
  if (big.has(name)) return { ...leaf("mo", big.get(name)), isLimited: !name.includes("int") };
  if (signs.has(name)) return leaf("mo", signs.get(name));
  if (FUNCTIONS.has(name)) return { ...leaf("mi", name), isLimited: LIMITED.has(name), isFunction: true };
  if (name in SPACES) return leaf("mspace", "", { width: SPACES[name] });
  if (name in ACCENTS) return node("mover", [readArgument(s), leaf("mo", ACCENTS[name], { stretchy: /^(over|wide)/.test(name) ? "true" : "false" })], { accent: "true" });
  switch (name) {
    case "frac": case "dfrac": case "tfrac": case "cfrac": return node("mfrac", [readArgument(s), readArgument(s)]);
    case "binom": return node("mrow", [leaf("mo", "("), node("mfrac", [readArgument(s), readArgument(s)], { linethickness: "0" }), leaf("mo", ")")]);
    case "sqrt": return readRoot(s);
    case "text": case "textbf": case "textit": case "mbox": case "textrm": return leaf("mtext", readGroupText(s).replace(/^ | $/g, "\u00a0"));
    case "mathrm": case "operatorname": case "operatorname*": return leaf("mi", readGroupText(s), { mathvariant: "normal" });
    case "mathbb": return leaf("mi", readGroupText(s).replace(/[A-Z1]/g, (c) => BOARD[c] ?? c), { mathvariant: "normal" });
    case "mathbf": case "boldsymbol": case "bm": return node("mrow", [readArgument(s)], { class: "bold" });
    case "mathcal": case "mathit": case "mathsf": case "mathfrak": case "displaystyle": case "textstyle": case "limits": case "nolimits": case "boxed":
      return /^(dis|text|lim|nol)/.test(name) ? null : readArgument(s);
    case "underline": return node("munder", [readArgument(s), leaf("mo", "_")]);
    case "underbrace": return { ...node("munder", [readArgument(s), leaf("mo", "⏟")]), isLimited: true };
    case "overbrace": return { ...node("mover", [readArgument(s), leaf("mo", "⏞")]), isLimited: true };
    case "overset": case "stackrel": { const over = readArgument(s); return node("mover", [readArgument(s), over]); }
    case "underset": { const under = readArgument(s); return node("munder", [readArgument(s), under]); }
    case "left": return readFenced(s);
    case "right": case "big": case "Big": case "bigg": case "Bigg": case "bigl": case "bigr": return delimiter(s);
    case "pmod": return node("mrow", [leaf("mo", "("), leaf("mi", "mod"), leaf("mspace", "", { width: "0.3em" }), readArgument(s), leaf("mo", ")")]);
    case "begin": return readTable(s, readGroupText(s));
    case "end": readGroupText(s); return null;
    case "\\": return leaf("mspace", "", { linebreak: "newline", width: "1em" });
    case "tag": case "label": readGroupText(s); return null;
    default: return leaf("mtext", "\\" + name);
  }
}

function readRoot(s) {
  skipSpace(s);
  if (s.tokens[s.at] !== "[") return node("msqrt", [readArgument(s)]);
  s.at += 1;
  const degree = row(readRow(s, (token) => token === "]"));
  s.at += 1;
  return node("mroot", [readArgument(s), degree]);
}

function delimiter(s) {
  skipSpace(s);
  const token = s.tokens[s.at++] ?? "";
  const sign = token === "." ? "" : token[0] === "\\" ? signs.get(token.slice(1)) ?? token : token;
  return leaf("mo", sign, { stretchy: "true" });
}

function readFenced(s) {
  const open = delimiter(s);
  const inner = readRow(s, (token) => token === "\\right");
  if (s.tokens[s.at] === "\\right") { s.at += 1; return node("mrow", [open, ...inner, delimiter(s)]); }
  return node("mrow", [open, ...inner]);
}

function readTable(s, name) {
  const kind = name.replace("*", "");
  if (kind === "array") readGroupText(s);
  const rows = [[]];
  const isEnd = (token) => token === "&" || token === "\\\\" || token === "\\end";
  while (s.at < s.tokens.length) {
    const before = s.at;
    rows.at(-1).push(node("mtd", readRow(s, isEnd)));
    const token = s.tokens[s.at++];
    if (token === "\\\\") rows.push([]);
    else if (token === "\\end") { readGroupText(s); break; }
    else if (token !== "&" && s.at <= before + 1) break;
  }
  if (rows.at(-1).length === 1 && !rows.at(-1)[0].children.length) rows.pop();
  const [open, close] = FENCES[kind] ?? ["", ""];
  const table = node("mtable", rows.map((cells) => node("mtr", cells)), kind === "cases" ? { class: "cases" } : kind.startsWith("align") ? { class: "aligned" } : {});
  const fence = (sign) => (sign ? [leaf("mo", sign, { stretchy: "true", fence: "true" })] : []);
  return node("mrow", [...fence(open), table, ...fence(close)]);
}
