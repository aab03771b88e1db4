// The last fifteen minutes as small charts: one card for each value.

import { byId, make, setClass, setText } from "./dom.js";
import { millis, number, percent } from "./format.js";

const POINTS = 180;
const HEIGHT = 40;
const SVG = "http://www.w3.org/2000/svg";

/// Key of the value in a point of the history, and in the state; `isTrouble` marks bad values.
const CHARTS = [
  { name: "Requests/s", key: "requests_per_second", now: state => state.totals.requests_per_second, format: number },
  { name: "5xx/s", key: "errors_per_second", now: state => state.totals.errors_per_second, format: number, isTrouble: true },
  { name: "Degraded/s", key: "degraded_per_second", now: state => state.totals.degraded_per_second, format: number, isTrouble: true },
  { name: "Denied by limits/s", key: "denied_per_second", now: state => state.totals.denied_per_second, format: number },
  { name: "Median", key: "p50_ms", now: state => state.totals.p50_ms, format: millis },
  { name: "p99", key: "p99_ms", now: state => state.totals.p99_ms, format: millis },
  { name: "Cache hits", key: "hit_ratio", now: state => state.totals.hit_ratio, format: percent, top: 1 },
  { name: "Connections", key: "connections", now: state => state.connections, format: number },
  { name: "Requests in flight", key: "requests_in_flight", now: state => state.requests_in_flight, format: number },
];

const points = [];
const cards = new Map();

/// Adds points; a new stream begins with all of them.
export function addPoints(more) {
  const last = points.at(-1)?.time ?? 0;
  points.push(...more.filter(point => point.time > last));
  points.splice(0, Math.max(0, points.length - POINTS));
  CHARTS.forEach(draw);
}

export function showValues(state) {
  CHARTS.forEach(chart => {
    const value = chart.now(state);
    const { card, text } = cardOf(chart);
    setText(text, chart.format(value));
    setClass(text, chart.isTrouble && value > 0 ? "value bad" : "value");
    setClass(card, chart.isTrouble && value > 0 ? "card chart trouble" : "card chart");
  });
}

function cardOf(chart) {
  if (!cards.has(chart.key)) cards.set(chart.key, createCard(chart));
  return cards.get(chart.key);
}

function createCard(chart) {
  const card = make("div", "", "card chart");
  const text = make("p", "–", "value");
  const range = make("p", "", "range");
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${POINTS} ${HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${chart.name}: no points yet`);
  const base = document.createElementNS(SVG, "line");
  for (const [name, value] of [["x1", 0], ["x2", POINTS], ["y1", HEIGHT - 0.5], ["y2", HEIGHT - 0.5]]) base.setAttribute(name, value);
  const path = document.createElementNS(SVG, "path");
  svg.append(base, path);
  card.append(make("p", chart.name, "name"), text, svg, range);
  byId("charts").append(card);
  return { card, text, range, svg, path };
}

function draw(chart) {
  const { range, svg, path } = cardOf(chart);
  const values = points.map(point => point[chart.key] ?? null);
  const known = values.filter(value => value !== null);
  const highest = known.length ? Math.max(...known) : 0;
  const top = chart.top ?? (highest || 1);
  path.setAttribute("d", line(values, top));
  setText(range, known.length ? `highest ${chart.format(highest)}` : "no points yet");
  const now = known.length ? chart.format(known.at(-1)) : "–";
  svg.setAttribute("aria-label", `${chart.name} in the last fifteen minutes: now ${now}, highest ${chart.format(highest)}`);
}

/// The path of the values, the newest at the right. A missing value interrupts it.
function line(values, top) {
  const first = POINTS - values.length;
  let path = "";
  values.forEach((value, index) => {
    if (value === null) return;
    const isStart = index === 0 || values[index - 1] === null;
    const y = HEIGHT - 1.5 - (Math.min(value, top) / top) * (HEIGHT - 4);
    // A single point is drawn as a short line.
    path += `${isStart ? `M${first + index} ${y.toFixed(1)}h0.5` : `L${first + index + 0.5} ${y.toFixed(1)}`}`;
  });
  return path;
}
