// The box where messages are written: text, pictures, switches, and what went wrong, said right there.
import { $, h, iconButton } from "./dom.js";
import { schemaProblem } from "./chat.js";
import { TOOLS } from "./tools.js";

const MAX_PICTURES = 20;

export class Composer {
  /** `on` has send(text, images), stop(), changed(). `settings` is the page's one settings object. */
  constructor(settings, on) {
    this.settings = settings;
    this.on = on;
    this.images = [];
    this.server = null; // what /v1/capabilities said
    this.text = $("text");
    $("composer").onsubmit = (event) => { event.preventDefault(); this.#submit(); };
    $("stop").onclick = () => on.stop();
    this.text.oninput = () => this.#grow();
    this.text.onkeydown = (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); this.#submit(); }
    };
    this.#pictures();
    this.#switches();
    this.draw();
  }

  get isEmpty() { return !this.text.value.trim() && !this.images.length; }

  #submit() {
    if (this.isEmpty || this.isBusy) return;
    const problem = this.settings.json ? schemaProblem(this.settings.schema) : "";
    if (problem) { this.say(problem); $("schema").focus(); return; }
    if (this.images.length && this.server && !this.server.modalities.image) { this.say(this.#noVision()); return; }
    this.on.send(this.text.value, this.images);
  }

  /** Empty the box, once its content stands in the conversation. */
  clear() { this.restore("", []); }

  /** Put text and pictures back, so that nothing typed is lost. What was typed meanwhile wins. */
  restore(text, images) {
    this.text.value = text;
    this.images = images;
    this.#grow();
    this.draw();
  }

  restoreIfEmpty(text, images) { if (this.isEmpty) this.restore(text, images); }

  setBusy(isBusy) {
    this.isBusy = isBusy;
    $("stop").hidden = !isBusy;
    $("send").hidden = isBusy;
  }

  /** Say something where the person is looking; "" takes it away. `action` is [label, function]. */
  say(text, action = null) {
    const box = $("notice");
    box.hidden = !text;
    box.replaceChildren();
    if (!text) return;
    box.append(h("span", {}, text));
    if (action) box.append(h("button", { type: "button", class: "plain", onclick: action[1] }, action[0]));
    box.append(iconButton("close", "Dismiss", () => this.say("")));
  }

  setServer(server) {
    this.server = server;
    this.draw();
  }

  draw() {
    const { settings, server } = this;
    const can = server?.features ?? {};
    const hasVision = !server?.model_loaded || server.modalities.image;
    $("attach").classList.toggle("off", !hasVision);
    $("attach").title = hasVision ? "Attach pictures" : this.#noVision();
    $("think").hidden = Boolean(server) && !can.reasoning;
    $("think").setAttribute("aria-pressed", settings.thinking);
    $("tools").parentElement.hidden = Boolean(server) && !can.tool_calling;
    $("tools").classList.toggle("on", settings.tools.length > 0);
    $("tools-label").textContent = settings.tools.length ? settings.tools.map((name) => TOOLS[name].label).join(", ") : "Tools";
    $("json").hidden = Boolean(server) && !can.structured_output;
    $("json").setAttribute("aria-pressed", settings.json);
    $("schema-box").hidden = !settings.json;
    $("send").disabled = this.isEmpty;
    const box = $("attached");
    box.hidden = !this.images.length;
    box.replaceChildren(...this.images.map((image, i) => h("figure", {}, h("img", { src: image.url, alt: image.name || `Picture ${i + 1}` }),
      iconButton("close", `Remove ${image.name || `picture ${i + 1}`}`, () => { this.images = this.images.filter((one) => one !== image); this.draw(); }))));
  }

  #grow() {
    $("send").disabled = this.isEmpty;
    this.text.style.height = "auto";
    this.text.style.height = `${Math.min(this.text.scrollHeight, Math.max(120, innerHeight * 0.4))}px`;
  }

  #noVision() { return `${this.server.model_name} reads text only; pictures need a model with vision.`; }

  // ── pictures: pasted, dropped, chosen ──────────────────────────────────────────────────────────────────────────────

  #pictures() {
    $("attach").onclick = () => (this.server?.model_loaded && !this.server.modalities.image ? this.say(this.#noVision()) : $("files").click());
    $("files").onchange = (event) => { this.#take([...event.target.files]); event.target.value = ""; };
    this.text.onpaste = (event) => {
      const files = [...event.clipboardData.files];
      if (files.length) { event.preventDefault(); this.#take(files); }
    };
    let depth = 0;
    const isFiles = (event) => event.dataTransfer?.types.includes("Files");
    addEventListener("dragenter", (event) => { if (isFiles(event)) { depth += 1; $("drop").hidden = false; } });
    addEventListener("dragleave", (event) => { if (isFiles(event) && (depth -= 1) <= 0) $("drop").hidden = true; });
    addEventListener("dragover", (event) => { if (isFiles(event)) event.preventDefault(); });
    addEventListener("drop", (event) => {
      if (!isFiles(event)) return;
      event.preventDefault();
      depth = 0;
      $("drop").hidden = true;
      this.#take([...event.dataTransfer.files]);
    });
  }

  async #take(files) {
    if (this.server?.model_loaded && !this.server.modalities.image) { this.say(this.#noVision()); return; }
    this.say("");
    for (const file of files) {
      if (!file.type.startsWith("image/")) { this.say(`${file.name} is no picture.`); continue; }
      if (this.images.length >= MAX_PICTURES) { this.say(`At most ${MAX_PICTURES} pictures go into one message.`); break; }
      const limit = this.server?.limits.max_body_bytes ?? Infinity;
      const size = 1.37 * (file.size + this.images.reduce((sum, image) => sum + image.size, 0)); // as base64 in JSON
      if (size > limit) { this.say(`${file.name} is too big: it has ${mib(file.size)}, and this server takes at most ${mib(limit)} a request.`); continue; }
      this.images = [...this.images, { url: await dataUrl(file), name: file.name, size: file.size }];
    }
    this.draw();
    this.text.focus();
  }

  // ── switches ───────────────────────────────────────────────────────────────────────────────────────────────────────

  #switches() {
    const { settings } = this;
    const change = () => { this.draw(); this.on.changed(); };
    $("think").onclick = () => { settings.thinking = !settings.thinking; change(); };
    $("json").onclick = () => { settings.json = !settings.json; change(); if (settings.json) $("schema").focus(); };
    $("schema").value = settings.schema;
    $("schema").oninput = () => {
      settings.schema = $("schema").value;
      const problem = schemaProblem(settings.schema);
      $("schema-problem").textContent = problem;
      $("schema-problem").hidden = !problem;
      this.on.changed();
    };
    const menu = $("tools-menu");
    menu.append(h("p", { class: "hint" }, "Run in this page; the model decides when to use them."), ...Object.entries(TOOLS).map(([name, tool]) => {
      const box = h("input", { type: "checkbox", checked: settings.tools.includes(name), onchange: () => {
        settings.tools = Object.keys(TOOLS).filter((one) => (one === name ? box.checked : settings.tools.includes(one)));
        change();
      } });
      return h("label", { class: "check" }, box, h("span", {}, h("strong", {}, tool.label), h("small", {}, tool.description)));
    }));
    const open = (isOpen) => { menu.hidden = !isOpen; $("tools").setAttribute("aria-expanded", isOpen); };
    $("tools").onclick = () => { open(menu.hidden); if (!menu.hidden) menu.querySelector("input").focus(); };
    addEventListener("pointerdown", (event) => { if (!menu.hidden && !event.target.closest(".menu-place")) open(false); });
    menu.parentElement.onkeydown = (event) => {
      if (event.key === "Escape" && !menu.hidden) { event.stopPropagation(); open(false); $("tools").focus(); }
    };
  }
}

const mib = (bytes) => `${(bytes / 2 ** 20).toFixed(bytes < 10 * 2 ** 20 ? 1 : 0)} MiB`;

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
