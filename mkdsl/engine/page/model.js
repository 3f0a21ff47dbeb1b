// What the page knows: steps, what every SM does in them, and the colours of it all. Times are nanoseconds.

const data = JSON.parse(document.getElementById("data").textContent);
const { phases, segments } = data;
const PARTS = ["wait", "read", "fold", "epilogue"];
const COLOURS = 10; // --p0 to --p9: of the phases in turn

const by = (id) => document.getElementById(id);
const range = (n) => [...Array(n).keys()];
const us = (ns, digits = 2) => `${(ns / 1000).toFixed(digits)}\u00a0µs`;

/** An element with attributes and children; text is only ever set as text. */
function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) name === "style" ? (made.style.cssText = value) : made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// Steps: executions of phases in program order.

const steps = segments.flatMap((s) => range(s.repeats).flatMap((iteration) => s.phases.map((phase) => ({ phase, iteration, repeats: s.repeats }))));
const stepOf = new Map(steps.map((s, at) => [`${s.phase} ${s.iteration}`, at]));
const label = ({ phase, iteration, repeats }) => phases[phase].name + (repeats > 1 ? ` ${iteration}` : "");

/** The steps whose last signal a step waits for. */
function awaited({ phase, iteration }) {
  const of = (before, when) => {
    if (when === "SAME") return iteration;
    if (when === "PREVIOUS") return iteration - 1;
    return iteration ? -1 : segments.find((s) => s.phases.includes(before)).repeats - 1;
  };
  return phases[phase].waits.map(([before, when]) => stepOf.get(`${before} ${of(before, when)}`)).filter((at) => at !== undefined);
}

/** {name, rows: by SM its spans {step, moments}, cohorts, ends: by step its last signal {ns, worker}, shift: that aligns it with the others}.
 * Undoes _cohorts of _page.py. */
function unpack({ name, cohorts }) {
  const ends = steps.map(() => ({ ns: -1, worker: -1 })), rows = [];
  const unpacked = cohorts.map(([workers, numbers]) => {
    const spans = [];
    let step = 0, now = 0;
    for (let at = 0; at < numbers.length; at += 6) {
      step += numbers[at];
      const moments = numbers.slice(at + 1, at + 6).map((took) => (now += took));
      spans.push({ step, moments });
      if (now > ends[step].ns) ends[step] = { ns: now, worker: workers[0] };
    }
    for (const worker of workers) rows[worker] = spans;
    return { workers, spans };
  });
  return { name, cohorts: unpacked, rows, ends, lane: laneOf(ends), shift: 0 };
}

/** By step [from, to]: from the last signal of all steps before to its own last. */
function laneOf(ends) {
  let before = 0;
  return ends.map(({ ns }) => {
    const from = before;
    before = Math.max(before, ns);
    return [from, before];
  });
}

const timelines = data.timelines.map(unpack);
const total = Math.max(...timelines.flatMap((t) => t.ends.map((e) => e.ns)));
const { workers } = data.summary;

// Colours, as the style sheet has them now.

const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
const css = (colour) => `rgb(${colour.map(Math.round).join(" ")})`;
const mix = (a, b, t) => a.map((x, i) => x * (1 - t) + b[i] * t);
const dark = (colour) => colour[0] * 0.3 + colour[1] * 0.59 + colour[2] * 0.11 < 110;
let theme;

function readTheme() {
  const style = getComputedStyle(document.documentElement), of = (name) => rgb(style.getPropertyValue(`--${name}`).trim());
  const [card, ink, soft, faint, line, accent] = ["card", "ink", "soft", "faint", "line", "accent"].map(of);
  const tints = (c) => [mix(c, card, 0.78), mix(c, card, 0.42), c, mix(c, dark(card) ? [255, 255, 255] : [0, 0, 0], 0.4)].map(css);
  const colours = phases.map((_, i) => of(`p${i % COLOURS}`));
  const text = colours.map((c) => (dark(c) ? "#ffffff" : "#101216"));
  theme = { card: css(card), ink: css(ink), soft: css(soft), faint: css(faint), line: css(line), accent: css(accent), tints: colours.map(tints), grey: tints(soft), text };
}
