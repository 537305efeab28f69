// Plots over time, as SVG. A plot is drawn again when its size changes.

const SVG = "http://www.w3.org/2000/svg";
const LEFT = 52;
const LABEL_GAP = 8;
const RIGHT = 8;
const TOP = 8;
const BOTTOM = 20;

function shape(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  return made;
}

/** Return a round number that is at least `value`, and divides well by 4. */
function ceiling(value, base) {
  if (value <= 0) return 1;
  const power = base ** Math.floor(Math.log(value) / Math.log(base));
  const steps = base === 1024
    ? [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    : [1, 2, 4, 8, 10];
  return steps.map((step) => step * power).find((edge) => edge >= value) ?? value;
}

/**
 * A plot in a figure.
 * `series`: [{label, valueOf(point)}]; a value that is null is a gap. `max`: the upper end; null
 * chooses it. `format`: text of a value.
 */
export class Plot {
  constructor(figure, { series, format, max = null, base = 10, describe }) {
    Object.assign(this, { figure, series, format, max, base, describe, points: [] });
    this.svg = shape("svg", { role: "img", "aria-label": "No data yet" });
    this.tip = document.createElement("div");
    this.tip.className = "tip";
    this.tip.hidden = true;
    figure.append(this.svg, this.tip);
    if (series.length > 1) figure.querySelector("figcaption").append(this.#legend());
    new ResizeObserver(() => this.#draw()).observe(this.svg);
    this.svg.addEventListener("pointermove", (event) => this.#point(event));
    this.svg.addEventListener("pointerleave", () => this.#leave());
  }

  /** Show these points: [{at: time as text, …}], the oldest one first. */
  show(points) {
    this.points = points.map((point) => ({ ...point, x: Date.parse(point.at) }));
    this.svg.setAttribute("aria-label", points.length ? this.describe(points) : "No data yet");
    this.#draw();
  }

  #legend() {
    const legend = document.createElement("span");
    legend.className = "legend";
    this.series.forEach((one, index) => {
      const item = document.createElement("span");
      const mark = document.createElement("i");
      mark.className = `f${index}`;
      item.append(mark, one.label);
      legend.append(item);
    });
    return legend;
  }

  #draw() {
    const { width, height } = this.svg.getBoundingClientRect();
    this.svg.replaceChildren();
    this.#leave();
    if (width < 80) return;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const values = this.points.flatMap((point) => this.series.map((one) => one.valueOf(point) ?? 0));
    const top = this.max ?? ceiling(Math.max(0, ...values), this.base);
    const from = this.points[0]?.x ?? 0;
    const until = this.points.at(-1)?.x ?? 1;
    const inner = { height: height - TOP - BOTTOM };
    this.yOf = (value) => TOP + (1 - value / top) * inner.height;
    const left = this.#drawLabels(top);
    inner.width = width - left - RIGHT;
    this.xOf = (x) => left + ((x - from) / Math.max(1, until - from)) * inner.width;
    this.#drawAxes(top, from, until, left, width, height);
    if (!this.points.length) return;
    this.series.forEach((one, index) => this.#drawSeries(one, index));
  }

  /** Draw the labels of values. Returns where the plot begins: none of them is cut. */
  #drawLabels(top) {
    const labels = [0, top / 2, top].map((value) => {
      const label = shape("text", { y: this.yOf(value) + 4, "text-anchor": "end", class: "axis" });
      label.textContent = this.format(value);
      this.svg.append(label);
      return label;
    });
    const widest = Math.max(...labels.map((label) => label.getComputedTextLength()));
    const left = Math.max(LEFT, Math.ceil(widest) + LABEL_GAP);
    for (const label of labels) label.setAttribute("x", String(left - LABEL_GAP));
    return left;
  }

  #drawAxes(top, from, until, left, width, height) {
    for (let step = 0; step <= 4; step += 1) {
      const y = this.yOf((top * step) / 4);
      this.svg.append(shape("line", { x1: left, x2: width - RIGHT, y1: y, y2: y, class: "grid-line" }));
    }
    if (!this.points.length) {
      const label = shape("text", { x: width / 2, y: height / 2, "text-anchor": "middle", class: "axis" });
      label.textContent = "No data yet";
      this.svg.append(label);
      return;
    }
    const count = Math.max(2, Math.min(6, Math.floor(width / 110)));
    for (let step = 0; step <= count; step += 1) {
      const x = from + ((until - from) * step) / count;
      const anchor = step === 0 ? "start" : step === count ? "end" : "middle";
      const label = shape("text", { x: this.xOf(x), y: height - 4, "text-anchor": anchor, class: "axis" });
      label.textContent = timeLabel(x, until - from);
      this.svg.append(label);
    }
  }

  #drawSeries(one, index) {
    let run = [];
    const runs = [];
    for (const point of [...this.points, null]) {
      const value = point && one.valueOf(point);
      if (value === null || value === undefined) {
        if (run.length) runs.push(run);
        run = [];
      } else {
        run.push([this.xOf(point.x), this.yOf(value)]);
      }
    }
    const base = this.yOf(0);
    for (const places of runs) {
      const line = places.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L");
      const [first, last] = [places[0][0], places.at(-1)[0]];
      this.svg.append(
        shape("path", { d: `M${line}L${last} ${base}L${first} ${base}Z`, class: `area f${index}` }),
        shape("path", { d: places.length > 1 ? `M${line}` : `M${line}h.1`, class: `line s${index}` }),
      );
    }
  }

  #point(event) {
    if (!this.points.length) return;
    const box = this.svg.getBoundingClientRect();
    const x = event.clientX - box.left;
    const nearest = this.points.reduce((best, point) =>
      Math.abs(this.xOf(point.x) - x) < Math.abs(this.xOf(best.x) - x) ? point : best);
    const place = this.xOf(nearest.x);
    this.cursor?.remove();
    this.cursor = shape("line", { x1: place, x2: place, y1: TOP, y2: box.height - BOTTOM, class: "cursor" });
    this.svg.append(this.cursor);
    const values = this.series.map((one) => {
      const value = one.valueOf(nearest);
      return `${one.label} ${value === null || value === undefined ? "–" : this.format(value)}`;
    });
    this.tip.textContent = `${timeLabel(nearest.x, 0)} · ${values.join(" · ")}`;
    this.tip.hidden = false;
    const half = this.tip.offsetWidth / 2;
    const left = box.left - this.figure.getBoundingClientRect().left + place;
    this.tip.style.left = `${Math.min(Math.max(left, half + 4), this.figure.clientWidth - half - 4)}px`;
    this.tip.style.top = `${box.top - this.figure.getBoundingClientRect().top + 14}px`;
  }

  #leave() {
    this.tip.hidden = true;
    this.cursor?.remove();
  }
}

function timeLabel(x, range) {
  const date = new Date(x);
  if (range > 2 * 86400e3) return date.toLocaleDateString("en-GB", { day: "numeric", month: "short" });
  return date.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
}
