// The question before a change, and the boxes for purges and for limits.

import { byId, make, setClass, setText, sync } from "./dom.js";
import { request } from "./stream.js";
import { showExplanation } from "./tables.js";

/// Asks before a change; resolves to whether the answer is yes.
export function ask(question, action) {
  const dialog = byId("confirm");
  setText(byId("confirm-text"), question);
  setText(byId("confirm-yes"), action);
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise(resolve => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

export function startTools() {
  byId("confirm-yes").addEventListener("click", () => byId("confirm").close("yes"));
  byId("confirm-no").addEventListener("click", () => byId("confirm").close("no"));
  byId("purge").addEventListener("submit", event => run(event, "purge-result", purge));
  byId("explain").addEventListener("submit", event => run(event, "explain-result", explain));
  byId("override").addEventListener("submit", event => run(event, "override-result", override));
  byId("override-clear").addEventListener("click", event => run(event, "override-result", clearOverride));
  byId("purge-kind").addEventListener("change", () => {
    byId("purge-value").disabled = byId("purge-kind").value === "all";
  });
}

async function run(event, id, action) {
  event.preventDefault();
  const result = byId(id);
  let outcome;
  try {
    outcome = await action();
  } catch {
    outcome = { text: "The gateway did not answer.", tone: "bad" };
  }
  setText(result, outcome.text);
  setClass(result, outcome.tone);
}

async function purge() {
  const kind = byId("purge-kind").value;
  const value = byId("purge-value").value.trim();
  if (kind !== "all" && !value) return { text: "Give a URL or a tag.", tone: "bad" };
  const query = new URLSearchParams(kind === "all" ? { all: "true" } : { [kind]: value });
  if (byId("purge-soft").checked) query.set("soft", "true");
  if (kind === "all" && !(await ask("Purge everything? The origin gets all requests until the cache is filled again.", "Purge"))) {
    return { text: "Not purged.", tone: "" };
  }
  const { ok, status, json, text } = await request("POST", `/api/v1/purge?${query}`);
  if (!ok) return { text, tone: "bad" };
  const missing = [...json.unacknowledged_nodes, ...json.unreachable_servers];
  return status === 200
    ? { text: `Purged on ${json.acknowledged_nodes.join(", ")}.`, tone: "good" }
    : { text: `Purged; not acknowledged yet by ${missing.join(", ")}.`, tone: "warn" };
}

async function explain() {
  const fields = { ip: "explain-ip", user: "explain-user", principal: "explain-principal", user_class: "explain-class", device: "explain-device" };
  const query = new URLSearchParams();
  for (const [name, id] of Object.entries(fields)) if (byId(id).value.trim()) query.set(name, byId(id).value.trim());
  const { ok, json, text } = await request("GET", `/api/v1/limits/explain?${query}`);
  if (!ok) return { text, tone: "bad" };
  showExplanation(json.rules);
  return { text: `User class ${json.user_class ?? "none"}, access ${json.access}.`, tone: "" };
}

/// Offers the rules that can be overridden.
export function showOverrideRules({ limits }) {
  sync(byId("override-rule"), limits.rules, {
    key: rule => rule.name,
    create: rule => {
      const option = make("option", rule.name);
      option.value = rule.name;
      return option;
    },
    update: () => {},
  });
}

const overridePath = () => `/api/v1/limits/${encodeURIComponent(byId("override-rule").value)}`;

async function override() {
  const rule = byId("override-rule").value;
  const [mode, percent, time] = ["mode", "percent", "time"].map(name => byId(`override-${name}`).value);
  const until = byId("override-time").selectedOptions[0].textContent;
  const question = `Set the limit ${rule} to ${mode} for ${percent} % of the callers, on all nodes, for ${until}?`;
  if (!(await ask(question, "Override"))) return { text: "Not changed.", tone: "" };
  const query = new URLSearchParams({ mode, percent, for: time });
  return fleetOutcome(await request("POST", `${overridePath()}?${query}`));
}

async function clearOverride() {
  return fleetOutcome(await request("DELETE", overridePath()));
}

/// What a change says that is passed on to the fleet.
export function fleetOutcome({ ok, status, text }) {
  if (!ok) return { text, tone: "bad" };
  return status === 200 ? { text: "Done.", tone: "good" }
    : { text: "Done here; other nodes have not acknowledged it yet.", tone: "warn" };
}
