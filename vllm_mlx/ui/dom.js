// Making and finding nodes. Text given here stays text: nothing in these pages becomes HTML.

export const $ = (id) => document.getElementById(id);

/** An element with attributes (`on…` are listeners, null and false are left out) and children. */
export function h(tag, attrs = {}, ...children) {
  const el = document.createElement(tag);
  for (const [name, value] of Object.entries(attrs)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) el.addEventListener(name.slice(2), value);
    else el.setAttribute(name, value === true ? "" : value);
  }
  el.append(...children.filter((child) => child !== null && child !== undefined));
  return el;
}

const SVG = "http://www.w3.org/2000/svg";

/** The drawings become part of the page: one that is first needed when the server is gone must be there. */
fetch("/ui/icons.svg").then((response) => response.text()).then((text) => {
  const sprite = document.importNode(new DOMParser().parseFromString(text, "image/svg+xml").documentElement, true);
  sprite.setAttribute("hidden", "");
  document.body.append(sprite);
});

/** A drawing of the page's sprite, hidden from screen readers: the button around it has the words. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

export function iconButton(name, label, onclick, attrs = {}) {
  return h("button", { type: "button", class: "quiet", "aria-label": label, title: label, onclick, ...attrs }, icon(name));
}

/** Browsers give the clipboard to secure pages only; a server on the local network is none, so there is an older way. */
export async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = h("textarea", { class: "offscreen" });
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

export function copyButton(label, read) {
  const button = iconButton("copy", label, async () => {
    await copyText(read());
    button.replaceChildren(icon("check"));
    button.setAttribute("aria-label", "Copied");
    setTimeout(() => { button.replaceChildren(icon("copy")); button.setAttribute("aria-label", label); }, 1500);
  });
  return button;
}

export function saveFile(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const link = h("a", { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

/** Light, dark, or what the system says. Kept in the browser. */
export function startTheme(button) {
  const order = ["auto", "light", "dark"];
  const labels = { auto: "Colours: as the system", light: "Colours: light", dark: "Colours: dark" };
  const icons = { auto: "auto", light: "sun", dark: "moon" };
  let theme = order.includes(localStorage.getItem("theme")) ? localStorage.getItem("theme") : "auto";
  const show = () => {
    document.documentElement.dataset.theme = theme;
    button.replaceChildren(icon(icons[theme]));
    button.title = labels[theme];
    button.setAttribute("aria-label", labels[theme]);
  };
  button.onclick = () => {
    theme = order[(order.indexOf(theme) + 1) % order.length];
    localStorage.setItem("theme", theme);
    show();
  };
  show();
}
