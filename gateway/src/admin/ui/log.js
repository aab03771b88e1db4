// The latest lines of the process log.

import { byId, make } from "./dom.js";
import { clock } from "./format.js";

const LINES = 200;
const TONES = { error: "bad", warn: "warn" };

/// Adds lines above the others. `isFirst`: the lines are all that the gateway has.
export function addLines(lines, isFirst) {
  const list = byId("log-lines");
  if (isFirst) list.replaceChildren();
  lines.forEach(line => list.prepend(item(line)));
  while (list.children.length > LINES) list.lastElementChild.remove();
}

function item({ time, level, message, fields }) {
  const node = make("li");
  const isFact = ([name, value]) => name !== "event" && !(name === "suppressed" && value === 0);
  const facts = Object.entries(fields).filter(isFact).map(([name, value]) => `${name}=${value}`).join("  ");
  node.append(make("span", clock(time), "dim"), " ", make("span", level.toUpperCase(), TONES[level] ?? "dim"), " ",
    make("span", message), "  ", make("span", facts, "dim"));
  return node;
}
