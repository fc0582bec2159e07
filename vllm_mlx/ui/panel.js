// The settings: exactly the controls of the operator guide's section 8. An empty field leaves the value to the server.
import { $, h } from "./dom.js";

const FIELDS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, about: "How freely tokens are drawn; 0 takes the likeliest." },
  { name: "top_p", label: "Top p", min: 0.01, max: 1, step: 0.01, about: "Only the likeliest tokens that together reach this share." },
  { name: "max_tokens", label: "Max tokens", min: 1, max: 32768, step: 1, about: "Where an answer is cut off." },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, about: "Above 0 makes words less likely each time they were used." },
];
const LOCAL = [
  { name: "timeout", label: "Timeout", unit: "seconds", min: 1, max: 86400, step: 1, about: "How long this page waits for an answer." },
  { name: "max_messages", label: "Max messages", unit: "messages", min: 1, max: 1000, step: 1, about: "Send only the last ones. This page does it, not the server." },
];

/** Builds the form over `settings`; `changed` is called after each change. */
export function startPanel(settings, defaults, changed) {
  const form = $("fields");
  form.onsubmit = (event) => event.preventDefault();
  const draws = [];

  const system = h("textarea", { id: "system", rows: "4", placeholder: "None" });
  system.oninput = () => { settings.system = system.value; changed(); };
  draws.push(() => { system.value = settings.system; });
  form.append(h("div", { class: "field" }, h("label", { for: "system" }, "System prompt"), system));

  for (const field of FIELDS) form.append(sampling(field));
  const stream = h("input", { type: "checkbox", id: "stream", role: "switch" });
  stream.onchange = () => { settings.stream = stream.checked; changed(); };
  draws.push(() => { stream.checked = settings.stream; });
  form.append(h("div", { class: "field" }, h("label", { class: "check switch" }, h("span", {}, "Streaming"), stream), h("p", { class: "hint" }, "Show the answer while it is written.")));
  form.append(h("h3", {}, "In this page only"));
  for (const field of LOCAL) form.append(local(field));
  form.append(h("button", { type: "button", class: "plain", onclick: () => {
    Object.assign(settings, { ...defaults, tools: [...defaults.tools], model: settings.model, thinking: settings.thinking, json: settings.json, schema: settings.schema });
    draws.forEach((draw) => draw());
    changed();
  } }, "Back to the defaults"));
  draws.forEach((draw) => draw());

  function sampling(field) {
    const number = input(field, "number");
    const range = h("input", { type: "range", min: field.min, max: field.max, step: field.step, "aria-label": `${field.label}, slider`, tabindex: "-1" });
    const draw = () => {
      number.value = settings[field.name] ?? "";
      range.value = settings[field.name] ?? (field.name === "frequency_penalty" ? 0 : field.name === "max_tokens" ? field.min : 1);
      range.classList.toggle("unset", settings[field.name] === null);
    };
    number.oninput = () => { set(field, number, number); range.value = settings[field.name] ?? range.value; range.classList.toggle("unset", settings[field.name] === null); };
    range.oninput = () => { settings[field.name] = Number(range.value); draw(); changed(); };
    draws.push(draw);
    const isLong = field.max > 100;
    return h("div", { class: "field" }, h("div", { class: "row" }, h("label", { for: field.name }, field.label), h("span", { class: "spacer" }), number),
      isLong ? null : range, h("p", { class: "hint", id: `${field.name}-about` }, field.about));
  }

  function local(field) {
    const number = input(field, "number");
    number.oninput = () => set(field, number, number);
    draws.push(() => { number.value = settings[field.name] ?? ""; });
    return h("div", { class: "field" }, h("div", { class: "row" }, h("label", { for: field.name }, field.label), h("span", { class: "spacer" }), number),
      h("p", { class: "hint", id: `${field.name}-about` }, field.about));
  }

  function set(field, number, box) {
    const isValid = box.validity.valid;
    box.setAttribute("aria-invalid", !isValid);
    if (!isValid) return; // the last good value stays in force
    settings[field.name] = number.value === "" ? null : Number(number.value);
    changed();
  }
}

function input(field, type) {
  return h("input", { type, id: field.name, min: field.min, max: field.max, step: field.step < 1 ? "any" : 1, inputmode: "decimal", placeholder: field.unit ? "no limit" : "default", "aria-describedby": `${field.name}-about` });
}
