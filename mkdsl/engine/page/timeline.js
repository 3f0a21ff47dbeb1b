// The timeline: every SM's phases by time, drawn on canvases, all of which show the same part of the step.

const TALLEST = 560; // pixels of all rows of all timelines together
const GUTTER = 46, AXIS = 20, LANE = 20, GAP = 4; // pixels: SM numbers to the left, above the rows times and phases
const CLOSEST = 400; // nanoseconds that a view shows at least
const ROOMY = 22; // pixels of a step from which on last signals are drawn

// What is shown of all timelines.

const view = { from: 0, to: total };
let scheduled = false;

function show(from, to) {
  const span = Math.min(total, Math.max(CLOSEST, to - from));
  view.from = Math.min(Math.max(0, from), total - span);
  view.to = view.from + span;
  if (!scheduled) requestAnimationFrame(draw);
  scheduled = true;
}

const zoom = (factor, about = (view.from + view.to) / 2) => show(about - (about - view.from) * factor, about + (view.to - about) * factor);
const pan = (ns) => show(view.from + ns, view.to + ns);

/** One iteration of the longest loop, from its middle, with some of its neighbours; in all timelines it begins at the same place. */
function showIteration() {
  const loop = segments.reduce((a, b) => (b.repeats > a.repeats ? b : a)), steps = loop.phases.map((phase) => stepOf.get(`${phase} ${loop.repeats >> 1}`));
  const begins = ({ lane }) => Math.min(...steps.map((at) => lane[at][0])), ends = ({ lane }) => Math.max(...steps.map((at) => lane[at][1]));
  const from = begins(timelines[0]), span = Math.max(...timelines.map((t) => ends(t) - begins(t)));
  for (const t of timelines) t.shift = begins(t) - from;
  show(from - 0.12 * span, from + 1.12 * span);
}

function showWhole() {
  for (const t of timelines) t.shift = 0;
  show(0, total);
}

function draw() {
  scheduled = false;
  for (const v of views) v.paint();
  overview.paint();
}

/** A canvas's context in CSS pixels, and its size. */
function prepared(canvas) {
  const ratio = window.devicePixelRatio || 1, { clientWidth: width, clientHeight: height } = canvas;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return { context, width, height, ratio };
}

const sans = (size, weight = 400) => `${weight} ${size}px ${getComputedStyle(document.body).fontFamily}`;

/** A timeline's steps on one line, with their names if it is part of a view. */
function paintLane(context, { lane }, x, top, height, shown) {
  context.font = sans(11, 600);
  context.textBaseline = "middle";
  lane.forEach(([from, to], at) => {
    if (shown && (to <= shown.from || from >= shown.to)) return;
    const left = x(from), width = x(to) - left, visible = Math.max(left, GUTTER), { phase } = steps[at];
    context.fillStyle = theme.tints[phase][2];
    context.fillRect(left, top, Math.max(width - (width > 4 ? 1 : 0), 0.5), height);
    const fits = (text) => context.measureText(text).width + 8 < left + width - visible;
    const name = shown && [label(steps[at]), phases[phase].name].find(fits);
    if (!name) return;
    context.fillStyle = theme.text[phase];
    context.fillText(name, visible + 4, top + height / 2 + 0.5);
  });
}

/** Distance of an axis's marks: 1, 2 or 5 times a power of ten, at least `least`. */
function tick(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return [1, 2, 5, 10].map((n) => n * power).find((n) => n >= least);
}

class View {
  constructor(timeline, rowHeight) {
    Object.assign(this, { timeline, rowHeight, hovered: null });
    this.base = document.createElement("canvas");
    this.canvas = el("canvas", { class: "view", tabindex: "0", role: "img", "aria-label": `Timeline, ${timeline.name}: ${workers} SMs by time` });
    this.canvas.style.height = `${AXIS + LANE + GAP + workers * rowHeight + 2}px`;
    const title = el("p", { class: "view-title" }, timeline.name === "measured" ? `Measured by the kernel's own stamps${data.device ? `, ${data.device}` : ""}` : "Predicted");
    by("views").append(...(timelines.length > 1 ? [title] : []), this.canvas);
    this.listen();
  }

  get top() { return AXIS + LANE + GAP; }
  get scale() { return (this.canvas.clientWidth - GUTTER) / (view.to - view.from); }
  get from() { return view.from + this.timeline.shift; }
  get to() { return view.to + this.timeline.shift; }
  x(ns) { return GUTTER + (ns - this.from) * this.scale; }
  ns(x) { return this.from + (x - GUTTER) / this.scale; }
  y(worker) { return this.top + worker * this.rowHeight; }

  paint() {
    const { context, width, height, ratio } = prepared(this.canvas);
    Object.assign(this, { context, width, height, ratio });
    const x = (ns) => this.x(ns);
    context.save();
    context.beginPath();
    context.rect(GUTTER, 0, width, height);
    context.clip();
    this.paintRows();
    paintLane(context, this.timeline, x, AXIS, LANE, this);
    this.paintSignals();
    context.restore();
    this.paintAxis();
    this.base.width = this.canvas.width;
    this.base.height = this.canvas.height;
    this.base.getContext("2d").drawImage(this.canvas, 0, 0);
    this.paintHovered();
  }

  /** SMs of a cohort look alike: each is drawn once, one pixel high, and copied into its rows. */
  paintRows() {
    const strip = document.createElement("canvas");
    strip.width = this.canvas.width;
    strip.height = 1;
    const pen = strip.getContext("2d");
    this.context.imageSmoothingEnabled = false;
    const gap = this.rowHeight > 3 ? 1 / this.ratio : 0;
    for (const cohort of this.timeline.cohorts) {
      pen.clearRect(0, 0, strip.width, 1);
      for (const span of cohort.spans) this.paintSpan(pen, span);
      for (const worker of cohort.workers) this.context.drawImage(strip, 0, 0, strip.width, 1, 0, this.y(worker), this.width, this.rowHeight - gap);
    }
  }

  paintSpan(pen, { step, moments }) {
    if (moments[4] <= this.from || moments[0] >= this.to) return;
    const edges = moments.map((ns) => this.x(ns) * this.ratio), tints = theme.tints[steps[step].phase];
    const parts = edges[4] - edges[0] < 1.5 ? [[2, edges[0], edges[4]]] : range(4).map((i) => [i, edges[i], edges[i + 1]]);
    for (const [i, from, to] of parts) {
      pen.fillStyle = tints[i];
      pen.fillRect(from, 0, to - from, 1);
    }
  }

  /** A line where the last SM has signalled a step: here its hand-off begins. */
  paintSignals() {
    if ((this.scale * total) / steps.length < ROOMY) return;
    this.context.fillStyle = theme.ink;
    for (const { ns } of this.timeline.ends) {
      if (ns > this.from && ns < this.to) this.context.fillRect(this.x(ns) - 0.6, AXIS, 1.2, this.height - AXIS);
    }
  }

  paintAxis() {
    const c = this.context, distance = tick(90 / this.scale), digits = Math.max(0, Math.ceil(3 - Math.log10(distance)));
    c.font = sans(11.5);
    c.textBaseline = "middle";
    for (let ns = Math.max(0, Math.ceil(this.from / distance)) * distance; ns <= this.to; ns += distance) {
      const x = this.x(ns), half = 24;
      c.fillStyle = theme.line;
      c.fillRect(x, AXIS - 5, 1, 5);
      c.fillStyle = theme.soft;
      c.textAlign = x < GUTTER + half ? "left" : "center";
      if (x < this.width - half) c.fillText(us(ns, digits), x, 8);
    }
    c.textAlign = "right";
    const every = tick(16 / this.rowHeight) < 8 ? 8 : 16;
    for (let worker = 0; worker < workers; worker += every) {
      c.fillStyle = theme.faint;
      c.fillText(worker ? worker : "SM 0", GUTTER - 7, this.y(worker) + Math.max(this.rowHeight / 2, 4));
    }
    c.textAlign = "left";
  }

  /** The span under the pointer, and a line to it from the last signal of each step it waits for. */
  paintHovered() {
    const c = this.context;
    c.save();
    c.setTransform(1, 0, 0, 1, 0, 0);
    c.clearRect(0, 0, this.base.width, this.base.height);
    c.drawImage(this.base, 0, 0);
    c.restore();
    if (!this.hovered) return;
    const { span, worker } = this.hovered, [from, known, , , to] = span.moments.map((ns) => this.x(ns));
    c.save();
    c.beginPath();
    c.rect(GUTTER - 2, AXIS, this.width, this.height);
    c.clip();
    for (const at of awaited(steps[span.step])) this.paintHandOff(this.timeline.ends[at], known, worker);
    for (const [colour, wide] of [[theme.card, 4.5], [theme.ink, 1.8]]) {
      c.strokeStyle = colour;
      c.lineWidth = wide;
      c.strokeRect(from - 0.5, this.y(worker) - 1.5, Math.max(to - from, 1) + 1, this.rowHeight + 2.5);
    }
    c.restore();
  }

  paintHandOff({ ns, worker }, known, to) {
    const c = this.context, middle = this.rowHeight / 2;
    for (const [colour, wide] of [[theme.card, 5], [theme.ink, 1.8]]) {
      c.strokeStyle = c.fillStyle = colour;
      c.lineWidth = wide;
      c.beginPath();
      c.moveTo(this.x(ns), this.y(worker) + middle);
      c.lineTo(known, this.y(to) + middle);
      c.stroke();
      c.beginPath();
      c.arc(this.x(ns), this.y(worker) + middle, 1.6 + wide / 2, 0, 7);
      c.fill();
    }
  }

  /** What lies at a place of the canvas: {span, worker} or null. */
  find(x, y) {
    const worker = Math.floor((y - this.top) / this.rowHeight), ns = this.ns(x);
    if (x < GUTTER || worker < 0 || worker >= workers) return null;
    const span = (this.timeline.rows[worker] || []).find(({ moments }) => moments[0] <= ns && ns < moments[4]);
    return span ? { span, worker } : null;
  }

  hover(event) {
    const box = this.canvas.getBoundingClientRect();
    this.hovered = event && this.find(event.clientX - box.left, event.clientY - box.top);
    this.paintHovered();
    if (this.hovered) showTip(this, event);
    else by("tip").hidden = true;
  }

  listen() {
    const { canvas } = this;
    let last = null;
    canvas.addEventListener("pointerdown", (e) => { last = e.clientX; canvas.setPointerCapture(e.pointerId); this.hover(e); });
    canvas.addEventListener("pointermove", (e) => {
      if (last === null) return this.hover(e);
      canvas.classList.add("moving");
      pan((last - e.clientX) / this.scale);
      last = e.clientX;
      this.hover(null);
    });
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { last = null; canvas.classList.remove("moving"); });
    canvas.addEventListener("pointerleave", () => this.hover(null));
    canvas.addEventListener("dblclick", (e) => zoom(e.shiftKey ? 3 : 1 / 3, this.ns(e.offsetX) - this.timeline.shift));
    canvas.addEventListener("wheel", (e) => this.wheel(e), { passive: false });
    canvas.addEventListener("keydown", (e) => this.key(e));
  }

  wheel(event) {
    const sideways = Math.abs(event.deltaX) > Math.abs(event.deltaY);
    if (!event.ctrlKey && !event.metaKey && !sideways) return; // the page scrolls
    event.preventDefault();
    if (sideways) pan(event.deltaX / this.scale);
    else zoom(Math.exp(Math.max(-1, Math.min(1, event.deltaY / 240))), this.ns(event.offsetX) - this.timeline.shift);
  }

  key(event) {
    const step = (view.to - view.from) / 8;
    const act = { "+": () => zoom(1 / 1.5), "=": () => zoom(1 / 1.5), "-": () => zoom(1.5), ArrowLeft: () => pan(-step), ArrowRight: () => pan(step), 0: showWhole }[event.key];
    if (!act || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    act();
  }
}

/** The whole step on one line a timeline, and what the views show of it. */
const overview = {
  canvas: by("overview"),
  paint() {
    const { context: c, width, height } = prepared(this.canvas), x = (ns) => GUTTER + (ns / total) * (width - GUTTER), each = height / timelines.length;
    timelines.forEach((t, i) => {
      paintLane(c, t, x, i * each + 2, each - 4, null);
      this.paintWindow(c, x(view.from + t.shift), x(view.to + t.shift), i * each, each, width);
    });
    c.fillStyle = theme.faint;
    c.font = sans(11.5);
    c.textAlign = "right";
    c.textBaseline = "middle";
    c.fillText("step", GUTTER - 7, height / 2);
  },
  paintWindow(c, from, to, top, height, width) {
    c.globalAlpha = 0.65;
    c.fillStyle = theme.card;
    c.fillRect(GUTTER, top, from - GUTTER, height);
    c.fillRect(to, top, width - to, height);
    c.globalAlpha = 1;
    c.strokeStyle = theme.ink;
    c.lineWidth = 1.5;
    c.strokeRect(from + 0.75, top + 0.75, Math.max(to - from - 1.5, 2), height - 1.5);
  },
  listen() {
    const centre = (e) => {
      const ns = ((e.offsetX - GUTTER) / (this.canvas.clientWidth - GUTTER)) * total, half = (view.to - view.from) / 2;
      show(ns - half, ns + half);
    };
    this.canvas.addEventListener("pointerdown", (e) => { this.canvas.setPointerCapture(e.pointerId); centre(e); });
    this.canvas.addEventListener("pointermove", (e) => { if (e.buttons) centre(e); });
  },
};
