// The tools a person can switch on to try tool calling. They run here, in the page, and touch nothing outside of it.

export const TOOLS = {
  get_time: {
    label: "Clock",
    description: "Get the current date and time, in a city or time zone.",
    parameters: { type: "object", properties: { city: { type: "string", description: "A city or an IANA time zone, for example Rome or Asia/Tokyo." } }, required: ["city"] },
    run: ({ city, timezone }) => clock(city ?? timezone),
  },
  calculate: {
    label: "Calculator",
    description: "Compute an arithmetic expression.",
    parameters: { type: "object", properties: { expression: { type: "string", description: "For example (2 + 3) * 4 ^ 2 or sqrt(2)." } }, required: ["expression"] },
    run: ({ expression }) => calculate(expression),
  },
};

export function definitions(names) {
  return names.filter((name) => TOOLS[name]).map((name) => ({
    type: "function",
    function: { name, description: TOOLS[name].description, parameters: TOOLS[name].parameters },
  }));
}

/** The result as the model reads it: a sentence, or JSON. What goes wrong is a result too, so that the model can say so. */
export function runTool(name, argumentsText) {
  try {
    const tool = Object.hasOwn(TOOLS, name) ? TOOLS[name] : null;
    if (!tool) throw new Error(`There is no tool named ${name} here.`);
    const given = JSON.parse(argumentsText || "{}");
    if (given === null || typeof given !== "object" || Array.isArray(given)) throw new Error("The arguments are not an object.");
    const result = tool.run(given);
    return typeof result === "string" ? result : JSON.stringify(result);
  } catch (error) {
    return JSON.stringify({ error: error.message });
  }
}

function clock(place) {
  const now = new Date();
  const zone = place ? zoneOf(String(place)) : Intl.DateTimeFormat().resolvedOptions().timeZone;
  if (!zone) throw new Error(`No time zone is known for ${place}.`);
  const as = (style) => new Intl.DateTimeFormat("en-GB", { ...style, timeZone: zone }).format(now);
  return `${as({ timeStyle: "short" })} on ${as({ dateStyle: "full" })} (${zone})`;
}

function zoneOf(place) {
  const wanted = place.trim().toLowerCase().replace(/\s+/g, "_");
  const zones = Intl.supportedValuesOf("timeZone");
  const found = zones.find((zone) => zone.toLowerCase() === wanted) ?? zones.find((zone) => zone.toLowerCase().endsWith("/" + wanted));
  if (found) return found;
  try { return new Intl.DateTimeFormat("en", { timeZone: place }).resolvedOptions().timeZone; } catch { return null; }
}

const NAMES = { pi: Math.PI, e: Math.E, tau: 2 * Math.PI };
const CALLS = { sqrt: Math.sqrt, abs: Math.abs, sin: Math.sin, cos: Math.cos, tan: Math.tan, ln: Math.log, log: Math.log10, exp: Math.exp, round: Math.round, floor: Math.floor, ceil: Math.ceil };

/** Sums by recursive descent: + - * / % ^ ** ( ) names and calls. Never `eval`: the text is a model's. */
export function calculate(text) {
  if (typeof text !== "string" || !text.trim()) throw new Error("There is no expression.");
  if (text.length > 500) throw new Error("The expression is longer than 500 signs.");
  const clean = text.replaceAll("×", "*").replaceAll("÷", "/").replaceAll("−", "-").replace(/(\d),(?=\d{3}\b)/g, "$1");
  const tokens = clean.match(/\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+|[a-zA-Z]+|\*\*|[-+*/%^()]|\S/g) ?? [];
  let at = 0;
  const sum = () => {
    let value = product();
    while (tokens[at] === "+" || tokens[at] === "-") value = tokens[at++] === "+" ? value + product() : value - product();
    return value;
  };
  const product = () => {
    let value = sign();
    for (;;) {
      if (tokens[at] === "*") { at += 1; value *= sign(); }
      else if (tokens[at] === "/") { at += 1; value /= sign(); }
      else if (tokens[at] === "%") { at += 1; value %= sign(); }
      else return value;
    }
  };
  const sign = () => (tokens[at] === "-" ? (at += 1, -sign()) : tokens[at] === "+" ? (at += 1, sign()) : power());
  const power = () => {
    const base = atom();
    if (tokens[at] !== "^" && tokens[at] !== "**") return base;
    at += 1;
    return base ** sign();
  };
  const atom = () => {
    const token = tokens[at++];
    if (token === undefined) throw new Error("The expression ends too early.");
    if (/^[\d.]/.test(token)) return Number(token);
    const name = token.toLowerCase();
    if (token === "(" || Object.hasOwn(CALLS, name)) {
      if (token !== "(" && tokens[at++] !== "(") throw new Error(`${token} needs brackets.`);
      const value = sum();
      if (tokens[at++] !== ")") throw new Error("A closing bracket is missing.");
      return token === "(" ? value : CALLS[name](value);
    }
    if (Object.hasOwn(NAMES, name)) return NAMES[name];
    throw new Error(`"${token}" is not understood.`);
  };
  const value = sum();
  if (at < tokens.length) throw new Error(`"${tokens[at]}" is not understood.`);
  if (!Number.isFinite(value)) throw new Error("The result is not a number.");
  return Number(value.toPrecision(12));
}
