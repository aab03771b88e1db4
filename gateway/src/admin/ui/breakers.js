// The cards of circuit breakers, with their buttons.

import { byId, make, setClass, setText, sync } from "./dom.js";
import { duration, number } from "./format.js";
import { ask, fleetOutcome } from "./tools.js";
import { request } from "./stream.js";

const CARDS_MAX = 60;

const REASONS = {
  error_ratio: "too many failed calls",
  slow_ratio: "too many slow calls",
  probe_failed: "a probe failed",
  probe_slow: "a probe was slow",
};

/// The path of a breaker in the admin API. The breaker of a canary is reached by its upstream.
function pathOf(breaker, routes) {
  const route = routes.find(route => route.name === breaker.route);
  return breaker.route && route?.upstream === breaker.upstream
    ? `route/${encodeURIComponent(breaker.route)}` : `upstream/${encodeURIComponent(breaker.upstream)}`;
}

const nameOf = breaker => breaker.route ?? `all routes of ${breaker.upstream}`;
const tone = breaker => breaker.state === "open" ? "bad" : breaker.state === "closed" && !breaker.override ? "good" : "warn";

function describe(breaker) {
  if (breaker.override) return `set by hand, ${duration(breaker.override.ends_in_seconds)} left`;
  if (breaker.state === "closed") return `for ${duration(breaker.since_seconds)}`;
  const wait = breaker.state === "ramp" ? `${breaker.percent} % of the calls are admitted; ` : "";
  return `${wait}for ${duration(breaker.since_seconds)}, closes in ${duration(breaker.closes_in_seconds)} at the earliest`;
}

function cause(breaker) {
  if (!breaker.reason) return "";
  return `${REASONS[breaker.reason] ?? breaker.reason}: ${number(breaker.failed)} failed and ${number(breaker.slow)} slow of ` +
    `${number(breaker.calls)} calls`;
}

export function showBreakers({ breakers, breakers_hidden, routes }, matches) {
  setText(byId("breakers-hidden"), breakers_hidden ? `(${breakers_hidden} more)` : "");
  let shown = breakers.filter(breaker => matches(breaker.route ?? "", breaker.upstream));
  if (shown.length > CARDS_MAX) {
    const closed = shown.filter(breaker => tone(breaker) === "good");
    shown = [...shown.filter(breaker => tone(breaker) !== "good"), ...closed].slice(0, CARDS_MAX);
  }
  sync(byId("breaker-cards"), shown, {
    key: breaker => `${breaker.route ?? ""} ${breaker.upstream}`,
    create: breaker => createCard(breaker, pathOf(breaker, routes)),
    update: updateCard,
  });
}

function createCard(breaker, path) {
  const card = make("article", "", "card");
  const title = make("h3", nameOf(breaker));
  const state = make("p");
  const badge = make("span", "", "badge");
  state.append(badge, " ", make("span"));
  const buttons = make("p", "", "buttons");
  const button = (text, action) => {
    const node = make("button", text);
    node.type = "button";
    node.setAttribute("aria-label", `${text}, breaker of ${nameOf(breaker)}`);
    node.addEventListener("click", () => action(breaker, path));
    return node;
  };
  buttons.append(button("Open: reject all", open), button("Close: admit all", close), button("Automatic", clear));
  card.append(title, make("p", `to ${breaker.upstream}`, "dim"), state, make("p", "", "cause"), make("p", "", "dim"), buttons);
  return card;
}

function updateCard(card, breaker) {
  const [, , state, reason, rejected, buttons] = card.children;
  setClass(card, `card ${tone(breaker)}`);
  setText(state.children[0], breaker.mode === "enforce" ? breaker.state : `${breaker.state} (${breaker.mode})`);
  setClass(state.children[0], `badge ${tone(breaker)}`);
  setText(state.children[1], describe(breaker));
  setText(reason, cause(breaker));
  setText(rejected, breaker.rejections ? `${number(breaker.rejections)} calls rejected` : "no call rejected");
  buttons.children[2].disabled = !breaker.override;
}

const time = () => byId("breaker-time");

async function open(breaker, path) {
  const text = time().selectedOptions[0].textContent;
  const isSure = await ask(`Open the breaker of ${nameOf(breaker)}? All its calls are rejected for ${text}, at all gateways of the fleet.`, "Open");
  if (isSure) set("POST", path, `?state=open&for=${time().value}`);
}

async function close(breaker, path) {
  const text = time().selectedOptions[0].textContent;
  const isSure = await ask(`Close the breaker of ${nameOf(breaker)}? All its calls are admitted for ${text}, whatever they return, at all gateways of the fleet.`, "Close");
  if (isSure) set("POST", path, `?state=closed&for=${time().value}`);
}

const clear = (_, path) => set("DELETE", path, "");

async function set(method, path, query) {
  const result = byId("breaker-result");
  try {
    const { text, tone } = fleetOutcome(await request(method, `/api/v1/breakers/${path}${query}`));
    setClass(result, tone);
    setText(result, text);
  } catch {
    setClass(result, "bad");
    setText(result, "The gateway did not answer.");
  }
}
