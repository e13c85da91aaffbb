// The plots of the TTT layers and the table of their newest numbers.

import { History, LAST, thinned } from "./history.js";
import { draw } from "./plot.js";

const COLOURS = 6; // --layer-0 to --layer-5 in style.css
const FIELDS = ["loss_base", "loss_before", "displacement"];
const MOST_SHOWN = 3; // layers whose lines are shown at first
const STEP = 5; // pixels between two points of a line
const NEWEST = 2; // seconds that the table is the mean of

const find = (id) => document.getElementById(id);

export class Plots {
  constructor() {
    this.layers = [];
    this.clear();
    for (const choice of document.querySelectorAll("[name=shown]")) choice.onchange = () => this.plan();
    new ResizeObserver(() => this.plan()).observe(find("plots"));
    matchMedia("(prefers-color-scheme: dark)").onchange = () => this.plan();
  }

  /** Begins anew; `layers`: the numbers of the TTT layers. */
  begin(layers) {
    this.layers = layers;
    find("layers").tBodies[0].replaceChildren(...layers.map((layer, i) => this.tableRow(layer, i)));
    this.clear();
  }

  clear() {
    this.history = new History();
    this.show(false);
  }

  show(there) {
    for (const id of ["legend", "loss-plot", "displacement-plot", "layers"]) find(id).hidden = !there;
    find("empty").hidden = there;
  }

  tableRow(layer, i) {
    const row = document.createElement("tr");
    const head = document.createElement("th");
    const label = document.createElement("label");
    const tick = document.createElement("input");
    const swatch = document.createElement("i");
    head.scope = "row";
    tick.type = "checkbox";
    tick.checked = i < MOST_SHOWN;
    tick.onchange = () => this.plan();
    swatch.className = `swatch layer-${i % COLOURS}`;
    tick.setAttribute("aria-label", `show layer ${layer}`);
    label.append(tick, swatch, layer);
    head.append(label);
    row.append(head, ...Array.from({ length: 4 }, () => document.createElement("td")));
    return row;
  }

  /** Takes the server's measurement at `time` (s): a list of {layer, loss_base, loss_before, displacement}. */
  add(time, measured) {
    if (!this.layers.length) return;
    const byLayer = new Map(measured.map((one) => [one.layer, one]));
    this.history.add(time, this.layers.flatMap((layer) => FIELDS.map((field) => byLayer.get(layer)?.[field] ?? NaN)));
    this.show(true);
    this.plan();
  }

  mark(label) {
    this.history.mark(label);
    this.plan();
  }

  /** Draws at the browser's next frame. */
  plan() {
    this.planned ??= requestAnimationFrame(() => {
      this.planned = null;
      this.draw();
    });
  }

  draw() {
    const { recent, whole, marks } = this.history;
    if (!recent.length) return;
    const all = document.querySelector("[name=shown]:checked").value === "whole";
    const end = recent.at(-1).time;
    const range = all ? [0, Math.max(end, 1)] : [Math.max(0, end - LAST), Math.max(end, LAST)];
    const steps = Math.ceil(find("loss-plot").clientWidth / STEP);
    const points = thinned(all ? whole : recent, ...range, steps);
    const body = find("layers").tBodies[0];
    const shown = this.layers.map((_, i) => i).filter((i) => body.rows[i].querySelector("input").checked);
    const style = getComputedStyle(document.documentElement);
    const colour = (i) => style.getPropertyValue(`--layer-${i % COLOURS}`);
    const line = (i, field, dashed, unit = 1) => ({
      points: points.map(({ time, row }) => [time, row[FIELDS.length * i + field] * unit]),
      colour: colour(i),
      dashed,
    });
    const band = (i) => ({
      points: points.map(({ time, row }) => [time, row[FIELDS.length * i], row[FIELDS.length * i + 1]]),
      colour: colour(i),
    });
    draw(find("loss-plot"), {
      lines: shown.flatMap((i) => [line(i, 0, true), line(i, 1, false)]),
      bands: shown.map(band),
      marks,
      range,
      label: "inner loss ℓ",
      named: true,
    });
    draw(find("displacement-plot"), {
      lines: shown.map((i) => line(i, 2, false, 100)),
      marks,
      range,
      zero: true,
      label: "displacement (% of W₀)",
    });
    this.fill(body);
  }

  fill(body) {
    const mean = this.history.mean(NEWEST);
    this.layers.forEach((_, i) => {
      const [base, before, displacement] = mean.slice(FIELDS.length * i);
      const cells = body.rows[i].querySelectorAll("td");
      [base, before, base - before].forEach((value, j) => (cells[j].textContent = short(value)));
      cells[3].textContent = `${short(100 * displacement)} %`;
    });
  }
}

/** Three significant digits. */
function short(value) {
  return Number.isFinite(value) ? value.toPrecision(3).replace("-", "−") : "–";
}
