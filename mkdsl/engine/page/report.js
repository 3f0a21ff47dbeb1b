// What stands around the timeline: summary, tables, shared memory.

const s = data.summary;
const predicted = data.timelines[0], measured = data.timelines[1];
const fixed = (x, digits = 1) => x.toFixed(digits);
const kib = (bytes) => `${fixed(bytes / 1024).replace(".0", "")} KiB`;
const percent = (x) => `${Math.round(100 * x)} %`;
const signed = (x) => `${x < 0 ? "−" : "+"}${fixed(Math.abs(x))}`;
const size = (bytes) => (bytes >= 1e9 ? `${fixed(bytes / 1e9, 2)} GB` : `${fixed(bytes / 1e6)} MB`);
const phaseColour = (i) => `var(--p${i % COLOURS})`;
const chipOf = (colour) => el("i", { class: "chip", style: `background:${colour}` });
const named = (i) => el("span", { class: "name" }, chipOf(phaseColour(i)), phases[i].name);
const piece = (share, colour, title) => el("i", { style: `width:${100 * share}%;background:${colour}`, title });

// Header and tiles.

const padding = s.padded_batch === s.batch ? "" : ` (padded to ${s.padded_batch})`;
document.title = `${data.model} on ${s.target}: mkdsl explain`;
by("title").textContent = `${data.model} on ${s.target}`;
by("subtitle").textContent =
  `One decode step as one kernel: batch ${s.batch}${padding}, context ${s.context}, ${s.workers} SMs. ` +
  (measured ? `Predicted by the simulator and measured on ${data.device}.` : "All times are predicted by the simulator.");

const tile = (title, big, unit, bar, ...lines) =>
  el("div", { class: "tile" }, el("h3", {}, title), el("div", { class: "big" }, big, el("small", {}, ` ${unit}`)), ...(bar ? [el("div", { class: "bar" }, ...bar)] : []), ...lines.map((l) => el("p", {}, l)));

function timeTile() {
  const lines = [`${fixed(s.us / s.floor_us, 2)} × the floor of ${fixed(s.floor_us, 0)} µs, predicted`];
  if (!measured) return tile("Time of a step", fixed(s.us, 0), "µs", [piece(s.floor_us / s.us, "var(--bytes)", "the floor")], ...lines);
  lines.unshift(`predicted ${fixed(s.us, 0)} µs, ${signed(100 * (s.us / measured.us - 1))} %; stamps cost time themselves`);
  return tile("Time of a step, measured", fixed(measured.us, 0), "µs", [piece(s.floor_us / measured.us, "var(--bytes)", "the floor")], ...lines);
}

function boundTile() {
  const bounds = Object.entries(s.bounds), sum = bounds.reduce((total, [, [us]]) => total + us, 0);
  const [first] = [...bounds].sort((a, b) => b[1][0] - a[1][0]);
  const bar = bounds.map(([b, [us]]) => piece(us / sum, `var(--${b})`, b));
  return tile("What bounds it", first[0], `${percent(first[1][0] / sum)} of the time`, bar, ...bounds.map(([b, [us, of]]) => `${b}, ${percent(us / sum)}${of.length ? `: binds ${of.join(", ")}` : ""}`));
}

function memoryTile() {
  const ring = `${s.ring.stages} stages of ${kib(s.ring.bytes)}, ${s.ring.in_flight} in flight`;
  return tile("Shared memory of an SM", kib(s.smem_peak), `of ${kib(s.smem_limit)}`, [piece(Math.min(1, s.smem_peak / s.smem_limit), "var(--bytes)", "at the peak")], `peak in ${s.smem_peak_phase}${s.smem_peak > s.smem_limit ? ", more than there is" : ""}`, `ring: ${ring}`);
}

const bandwidth = `${fixed(s.bandwidth / 1e12, 2)} TB/s`;
const streams = tile("What a step streams", ...size(s.streamed).split(" "), [piece(1, "var(--bytes)", "")], `at ${bandwidth} that is the floor: ${fixed(s.floor_us, 0)} µs`, `weights, and a cache of ${s.context} positions`);
by("summary").append(timeTile(), boundTile(), memoryTile(), streams);

// Tables.

const number = (x, title = "") => el("td", { class: "number", ...(title && { title }) }, x);
const headings = (names) => el("tr", {}, ...names.map((n) => el("th", n.startsWith(">") ? { class: "number" } : {}, n.replace(">", ""))));

function fill(id, names, rows, groups = []) {
  by(id).append(el("thead", {}, ...groups, headings(names)), el("tbody", {}, ...rows.map((cells) => el("tr", {}, ...cells.map((c) => (c instanceof Node ? c : el("td", {}, c)))))));
}

const badge = (a) => el("span", { class: "badge", style: `color:var(--${a.bound})` }, el("b", {}, a.bound + (a.bound === "hand-off" ? ` ${fixed(a.explained["hand-off"])} µs` : "")));

/** A bar of a phase's part of a step: what its bytes or its compute explain, and what is left. */
function stepBar(a, most) {
  const parts = Object.entries(a.explained).filter(([, us]) => us > 0).map(([b, us]) => piece((a.runs * us) / most, `var(--${b})`, `${b}: ${fixed(a.runs * us)} µs of a step`));
  return el("td", {}, el("div", { class: "bar" }, ...parts));
}

function phaseTable() {
  const all = predicted.accounts, most = Math.max(...all.map((a) => a.runs * a.us)), sum = all.reduce((t, a) => t + a.runs * a.us, 0);
  const both = (i, of) => number(data.timelines.map((t) => fixed(of(t.accounts[i]))).join(" / "));
  const rows = all.map((a, i) => [
    el("td", {}, named(i)), stepBar(a, most), number(percent((a.runs * a.us) / sum)), el("td", {}, badge(a)), number(`${a.runs} ×`), number(fixed(a.streamed / 1e6)),
    both(i, (x) => x.us), number(fixed(a.bytes_us)), number(fixed(a.compute_us)), ...PARTS.map((p) => both(i, (x) => x.parts[p])),
  ]);
  const beside = measured ? ", predicted / measured" : "";
  const groups = [["", 5], ["one run: MB, then µs", 4], [`the median SM, µs`, 4]].map(([text, span]) => el("th", { colspan: span, ...(text && { class: "group" }) }, text));
  fill("phases", ["phase", "µs of a step", ">share", "bound by", ">runs", ">MB", `>µs${beside}`, ">bytes", ">compute", ...PARTS.map((p) => `>${p}`)], rows, [el("tr", {}, ...groups)]);
}

phaseTable();
by("bounds-legend").append(...["bytes", "compute", "hand-off"].map((b) => el("span", {}, chipOf(`var(--${b})`), b === "hand-off" ? "hand-off and short dependent steps: what neither explains" : b)));

const waitsFor = ([at, when]) => phases[at].name + { SAME: "", PREVIOUS: " (of the iteration before)", LAST: " (once)" }[when];
fill("plan", ["phase", "kind", ">items", ">SMs", "tiling", "waits for", "fence"], phases.map((p, i) => [
  el("td", {}, named(i)), p.kind, number(p.items.join(" + ")), number(p.workers), el("td", { class: "wrap" }, p.tiling), el("td", { class: "wrap" }, p.waits.map(waitsFor).join(", ") || "–"), p.fence ? "yes" : "–",
]));
fill("tensors", ["tensor", "hand-off", ">slots", ">splits", "type"], data.tensors.map(([name, handoff, slots, splits, type]) => [name, handoff, number(slots), number(splits), type]));
fill("second", ["phase or tensor", "instead", ">µs more", ""], data.second.map(([of, what, us, why]) => [of, el("td", { class: "wrap" }, what), number(signed(us).replace("+0.0", "0.0")), el("td", { class: "wrap faint" }, why)]));
by("second-section").hidden = !data.second.length;

// Shared memory.

function memoryChart() {
  const whole = data.memory.filter((e) => e[3] < 0), bytes = ([, each, depth]) => each * depth;
  const most = Math.max(s.smem_limit, s.smem_peak), chart = el("div", { class: "memory" });
  const part = (e, colour, text = "") => el("i", { style: `width:${(100 * bytes(e)) / most}%;background:${colour}`, "data-tip": `${e[0]}: ${e[2] > 1 ? `${e[2]} × ${kib(e[1])} = ` : ""}${kib(bytes(e))}` }, text);
  phases.forEach((_, i) => {
    const own = data.memory.filter((e) => e[3] === i), sum = [...whole, ...own].reduce((t, e) => t + bytes(e), 0);
    const parts = [...whole.map((e) => (e[0] === "ring" ? part(e, "var(--ring)", `ring ${kib(bytes(e))}`) : part(e, "var(--fixed)"))), ...own.map((e) => part(e, phaseColour(i)))];
    const track = el("div", { class: "track" }, ...parts, el("u", { style: `left:${(100 * s.smem_limit) / most}%` }));
    chart.append(named(i), track, el("span", { class: "amount" }, kib(sum), sum === s.smem_peak ? " peak" : ""));
  });
  const step = tick((most / 1024) / 8), marks = range(Math.floor(most / 1024 / step) + 1).map((n) => el("span", { style: `left:${(100 * n * step * 1024) / most}%` }, `${n * step}${n ? "" : " KiB"}`));
  chart.append(el("span"), el("div", { class: "axis" }, ...marks), el("span"));
  return chart;
}

by("memory").append(memoryChart());
by("memory-legend").append(
  el("span", {}, chipOf("var(--ring)"), "ring, through which everything streamed goes"), el("span", {}, chipOf("var(--fixed)"), "for the whole kernel: tables, statistics, barriers, reserve"),
  el("span", {}, chipOf("var(--p1)"), "the phase's own, in its colour"), el("span", {}, el("i", { class: "mark" }), `limit, ${kib(s.smem_limit)}`),
);
by("memory").addEventListener("pointermove", (e) => {
  by("tip").hidden = !e.target.dataset.tip;
  if (!e.target.dataset.tip) return;
  by("tip").replaceChildren(e.target.dataset.tip);
  placeTip(e);
});
by("memory").addEventListener("pointerleave", () => { by("tip").hidden = true; });
