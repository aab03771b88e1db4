// The head of the page: the state of the process, and the list of what is wrong.

import { byId, make, setClass, setText, sync } from "./dom.js";
import { bytes, clock, duration, number } from "./format.js";

export function showOverview(state) {
  const commit = state.commit === "unknown" ? "" : ` (${state.commit})`;
  setText(byId("node"), `${state.node} ${state.version}${commit}, up ${duration(state.uptime_seconds)}`);
  const problems = problemsOf(state);
  setState(state.draining ? "draining" : problems.length ? `degraded: ${problems.length}` : "all is well",
    state.draining || problems.length ? "bad" : "good");
  document.title = problems.length ? `(${problems.length}) Tidegate ${state.node}` : `Tidegate ${state.node}`;
  setText(byId("window"), `(numbers: the last ${number(state.window_seconds)} s)`);
  setText(byId("memory"), `(${number(state.cache.entries)} responses in ${bytes(state.cache.bytes)} of ${bytes(state.cache.bytes_max)} memory)`);
  byId("problems").hidden = !problems.length;
  sync(byId("problem-list"), problems, {
    key: problem => problem,
    create: () => make("li"),
    update: (node, problem) => setText(node, problem),
  });
  showReload(state.reload);
}

export function setState(text, tone) {
  const badge = byId("state").firstElementChild;
  setText(badge, text);
  setClass(badge, `badge ${tone}`);
}

function problemsOf(state) {
  const problems = state.degraded.map(describe(state));
  if (state.draining) problems.unshift("The gateway drains: it accepts no more connections.");
  if (state.reload.last?.result === "refused") {
    const fault = state.reload.last.faults.find(fault => fault.severity === "error");
    problems.push(`The changed configuration is refused: ${fault ? faultText(fault) : "see below"}`);
  }
  state.certificates.filter(certificate => certificate.expires_at !== null && certificate.expires_at <= state.time)
    .forEach(certificate => problems.push(`The certificate ${certificate.file} has expired.`));
  state.upstreams.filter(upstream => upstream.panic)
    .forEach(upstream => problems.push(`Too many endpoints of ${upstream.name} are out: all of them are used.`));
  if (state.connections >= state.connections_max) problems.push("No more connections are accepted: their limit is reached.");
  return problems;
}

/// A name such as `endpoint shop 127.0.0.1:80` with the reason, where the state has one.
const describe = state => name => {
  const [kind, ...rest] = name.split(" ");
  if (kind === "endpoint") {
    const endpoint = state.upstreams.find(upstream => upstream.name === rest[0])?.endpoints.find(one => one.name === rest[1]);
    return `Endpoint ${rest[1]} of ${rest[0]} is out${endpoint?.reason ? `: ${endpoint.reason}` : ""}.`;
  }
  if (kind === "shard") return `Shard ${rest[1]} of region ${rest[0]} is down: its keys come from memory and the origin.`;
  if (kind === "lookup") {
    const lookup = state.upstreams.find(upstream => upstream.name === rest[0])?.names.find(one => one.name === rest[1]);
    const reason = lookup?.error ? `: ${lookup.error}` : "";
    return `The addresses of ${rest[1]} (upstream ${rest[0]}) cannot be looked up; the last known ones are used${reason}.`;
  }
  const text = rest.join(" ");
  if (kind === "certificate") {
    const refused = state.refused_certificates.find(refused => refused.file === text);
    return `The changed certificate ${text} is refused; the former one stays in use${refused ? `: ${refused.error}` : ""}.`;
  }
  return kind === "breaker" ? `The breaker of ${text.replace(/^of /, "")} is open: calls are rejected.` : name;
};

const faultText = fault => fault.line ? `line ${fault.line}, column ${fault.column}: ${fault.message}` : fault.message;

function showReload({ generation, loaded, refused, last }) {
  const counts = `Configuration ${generation} is in use; ${number(loaded)} reloads, ${number(refused)} refused.`;
  const node = byId("reload");
  if (!last) {
    setText(node, `${counts} The file has not changed since the start.`);
  } else {
    const what = last.result === "refused" ? "was refused: the old configuration stays in use" : "took effect";
    setText(node, `${counts} The last reload, at ${clock(last.time)} by ${last.trigger === "file" ? "a changed file" : "a signal"}, ${what}.`);
  }
  setClass(node, last?.result === "refused" ? "bad" : "");
  const faults = (last?.faults ?? []).map(fault => ({ ...fault, text: `${fault.severity}: ${faultText(fault)}${fault.hint ? ` (${fault.hint})` : ""}` }));
  const restarts = (last?.needs_restart ?? []).map(setting => ({ severity: "warning", text: `${setting} takes effect after a restart` }));
  sync(byId("faults"), [...faults, ...restarts], {
    key: fault => fault.text,
    create: () => make("li"),
    update: (item, fault) => {
      setText(item, fault.text);
      setClass(item, fault.severity === "error" ? "bad" : "warn");
    },
  });
}
