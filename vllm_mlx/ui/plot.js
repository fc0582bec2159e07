// A small plot over the last minutes on a canvas: lines or dots, a quiet grid, and the value under the pointer.
import { h } from "./dom.js";

const SPANS_S = [60, 120, 300]; // a plot that has just begun shows a minute, later five
const MAX_S = SPANS_S.at(-1);

export class Plot {
  /** `series` is [{label, kind: "line" | "dots"}], at most two; `format` makes a number readable. */
  constructor(title, series, format) {
    this.series = series.map((one) => ({ ...one, points: [] }));
    this.format = format;
    this.title = title;
    this.canvas = h("canvas", { role: "img", "aria-label": title });
    this.readout = h("span", { class: "legend" }, ...series.map((one, i) => h("span", { class: i ? "second" : null }, h("i"), one.label)));
    this.el = h("figure", { class: "plot" }, h("figcaption", {}, h("span", {}, title), this.readout), this.canvas);
    this.pointer = null;
    this.canvas.onpointermove = (event) => { this.pointer = event.offsetX; this.draw(this.now); };
    this.canvas.onpointerleave = () => { this.pointer = null; this.draw(this.now); };
    new ResizeObserver(() => this.draw(this.now)).observe(this.canvas);
  }

  add(i, time, value) { this.series[i].points.push([time, value]); }

  /** Draw as of `now` (seconds); points older than the window are forgotten. */
  draw(now) {
    if (now === undefined) return;
    this.now = now;
    for (const one of this.series) while (one.points.length && one.points[0][0] < now - MAX_S - 5) one.points.shift();
    const { canvas } = this;
    const ratio = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
    if (!width) return;
    if (canvas.width !== Math.round(width * ratio)) canvas.width = Math.round(width * ratio);
    if (canvas.height !== Math.round(height * ratio)) canvas.height = Math.round(height * ratio);
    const c = canvas.getContext("2d");
    const style = getComputedStyle(canvas);
    const colour = (name) => resolve(canvas, name);
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    c.clearRect(0, 0, width, height);
    const top = 18, bottom = height - 18, left = 0, right = width - 1;
    const oldest = Math.min(now, ...this.series.map((one) => one.points[0]?.[0] ?? now));
    const span = SPANS_S.find((seconds) => now - oldest <= seconds) ?? MAX_S;
    const peak = ceiling(Math.max(...this.series.flatMap((one) => one.points.map(([, value]) => value)), 0));
    const x = (time) => right - ((now - time) / span) * (right - left);
    const y = (value) => bottom - (value / peak) * (bottom - top);
    c.font = `11px ${style.fontFamily}`;
    c.lineWidth = 1;
    c.strokeStyle = colour("--line");
    c.fillStyle = colour("--soft");
    c.textBaseline = "bottom";
    for (const share of [0, 0.5, 1]) {
      const at = Math.round(y(peak * share)) + 0.5;
      c.beginPath(); c.moveTo(left, at); c.lineTo(right, at); c.stroke();
    }
    c.textBaseline = "alphabetic";
    for (const [ago, label, align] of [[span, `${span / 60} min ago`, "left"], [0, "now", "right"]]) {
      c.textAlign = align;
      c.fillText(label, x(now - ago), height - 3);
    }
    c.textAlign = "left";
    this.series.forEach((one, i) => (one.kind === "dots" ? dots : line)(c, one.points, x, y, bottom, colour(i ? "--code-number" : "--accent")));
    // The scale goes on top, with a halo: lines may pass behind it.
    c.textBaseline = "bottom";
    c.lineWidth = 3;
    c.strokeStyle = colour("--raised");
    c.fillStyle = colour("--soft");
    for (const share of [0.5, 1]) {
      c.strokeText(this.format(peak * share), left, y(peak * share) - 1);
      c.fillText(this.format(peak * share), left, y(peak * share) - 1);
    }
    c.lineWidth = 1;
    this.#point(c, x, y, top, bottom, colour);
  }

  #point(c, x, y, top, bottom, colour) {
    const newest = this.series.map((one) => one.points.at(-1)?.[1]);
    this.canvas.setAttribute("aria-label", `${this.title}: ${this.series.map((one, i) => `${one.label} ${newest[i] === undefined ? "unknown" : this.format(newest[i])}`).join(", ")}`);
    const at = this.pointer;
    [...this.readout.children].forEach((el, i) => {
      const near = at === null ? null : nearest(this.series[i].points, x, at);
      el.lastChild.textContent = near ? `${this.series[i].label} ${this.format(near[1])}` : this.series[i].label;
      if (!near) return;
      c.strokeStyle = colour("--strong-line");
      c.beginPath(); c.moveTo(x(near[0]), top); c.lineTo(x(near[0]), bottom); c.stroke();
      c.fillStyle = colour(i ? "--code-number" : "--accent");
      c.beginPath(); c.arc(x(near[0]), y(near[1]), 3.5, 0, 7); c.fill();
    });
  }
}

function line(c, points, x, y, bottom, colour) {
  if (points.length < 2) return;
  c.beginPath();
  points.forEach(([time, value], i) => (i ? c.lineTo(x(time), y(value)) : c.moveTo(x(time), y(value))));
  c.strokeStyle = colour;
  c.lineWidth = 1.75;
  c.lineJoin = "round";
  c.stroke();
  c.lineTo(x(points.at(-1)[0]), bottom);
  c.lineTo(x(points[0][0]), bottom);
  c.globalAlpha = 0.1;
  c.fillStyle = colour;
  c.fill();
  c.globalAlpha = 1;
  c.lineWidth = 1;
}

function dots(c, points, x, y, bottom, colour) {
  c.fillStyle = colour;
  c.globalAlpha = 0.75;
  for (const [time, value] of points) { c.beginPath(); c.arc(x(time), y(value), 2.5, 0, 7); c.fill(); }
  c.globalAlpha = 1;
}

function nearest(points, x, at) {
  let best = null;
  for (const point of points) if (!best || Math.abs(x(point[0]) - at) < Math.abs(x(best[0]) - at)) best = point;
  return best && Math.abs(x(best[0]) - at) < 24 ? best : null;
}

/** The next round number: 1, 2 or 5 times a power of ten. */
export function ceiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((round) => round >= value * 1.02) ?? 10 * power;
}

/** A custom property as a colour the canvas understands: light-dark() is resolved by the browser on a real property. */
function resolve(canvas, name) {
  canvas.style.color = `var(${name})`;
  return getComputedStyle(canvas).color;
}
