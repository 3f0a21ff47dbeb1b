// What a pointer finds in the timeline, its legend, and what starts it all.

// The box beside the pointer.

function showTip(shown, event) {
  const tip = by("tip");
  tip.replaceChildren(...tipContent(shown.timeline, shown.hovered));
  placeTip(event);
}

function placeTip(event) {
  const tip = by("tip");
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${event.clientX + 16 + width > innerWidth ? Math.max(4, event.clientX - width - 16) : event.clientX + 16}px`;
  tip.style.top = `${Math.max(4, Math.min(event.clientY + 16, innerHeight - height - 8))}px`;
}

function tipContent(timeline, { span, worker }) {
  const step = steps[span.step], { moments } = span, tints = theme.tints[step.phase];
  const loop = step.repeats > 1 ? `, iteration ${step.iteration} of ${step.repeats}` : "";
  const chip = (colour) => el("i", { class: "chip", style: `background:${colour}` });
  const row = (i) => el("tr", {}, el("td", {}, el("span", { class: "name" }, chip(tints[i]), PARTS[i])), el("td", { class: "number" }, us(moments[i + 1] - moments[i])));
  const waits = awaited(step).map((at) => waitText(timeline.ends[at], steps[at], moments[1]));
  return [
    el("div", { class: "name title" }, chip(tints[2]), phases[step.phase].name + loop),
    el("div", {}, `SM ${worker}: starts at ${us(moments[0])}, lasts ${us(moments[4] - moments[0])}`),
    el("table", {}, ...range(4).map(row)),
    ...(waits.length ? waits : ["waits for nobody"]).map((text) => el("p", {}, text)),
    ...others(timeline, span, worker),
  ];
}

const waitText = ({ ns, worker }, before, known) => `waits for ${label(before)}: its last signal comes at ${us(ns)}, from SM ${worker}; known here ${us(known - ns)} later`;

/** The same span in the other timelines. */
function others(timeline, { step }, worker) {
  const alike = timelines.filter((t) => t !== timeline).map((t) => [t.name, (t.rows[worker] || []).find((s) => s.step === step)]);
  return alike.filter(([, s]) => s).map(([name, { moments }]) => el("p", {}, `${name}: starts at ${us(moments[0])}, lasts ${us(moments[4] - moments[0])}`));
}

// Start.

function legend() {
  const chip = (colour, text) => el("span", {}, el("i", { class: "chip", style: `background:${colour}` }), text);
  const of = phases.map((p, i) => chip(`var(--p${i % COLOURS})`, p.name));
  const parts = PARTS.map((name, i) => chip(theme.grey[i], { wait: "wait for the hand-off", read: "read", fold: "fold", epilogue: "epilogue" }[name]));
  by("legend").replaceChildren(...of, el("span", { class: "gap" }), ...parts, el("span", {}, el("i", { class: "mark" }), "last signal: a hand-off begins"));
}

const rowHeight = Math.min(14, Math.max(2, Math.floor(TALLEST / timelines.length / workers)));
const views = timelines.map((t) => new View(t, rowHeight));

function restyle() {
  readTheme();
  legend();
  draw();
}

overview.listen();
by("whole").addEventListener("click", showWhole);
by("iteration").addEventListener("click", showIteration);
by("in").addEventListener("click", () => zoom(1 / 2));
by("out").addEventListener("click", () => zoom(2));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", restyle);
new ResizeObserver(draw).observe(by("views"));
restyle();
showIteration();
