// The dashboard: follows the stream of the gateway and shows each event.

import { showBreakers } from "./breakers.js";
import { addPoints, showValues } from "./charts.js";
import { byId, setText } from "./dom.js";
import { clock } from "./format.js";
import { addLines } from "./log.js";
import { setState, showOverview } from "./overview.js";
import { follow } from "./stream.js";
import { showCache, showCertificates, showLimits, showRoutes, showUpstreams } from "./tables.js";
import { showOverrideRules, startTools } from "./tools.js";

const RETRY_MIN = 500;
const RETRY_MAX = 5000;
/// A page that nobody sees gives its place to others after this time.
const HIDDEN_MAX = 60000;

let state = null;
let retry = RETRY_MIN;
let isNewStream = true;
let stop = new AbortController();

function matches(...names) {
  const wanted = byId("filter").value.trim().toLowerCase();
  return !wanted || names.some(name => name?.toLowerCase().includes(wanted));
}

function show() {
  showOverview(state);
  showValues(state);
  showRoutes(state, matches);
  showUpstreams(state, matches);
  showBreakers(state, matches);
  showLimits(state);
  showOverrideRules(state);
  showCache(state);
  showCertificates(state);
}

const events = {
  state(data) {
    state = data;
    byId("panels").hidden = false;
    byId("panels").classList.remove("stale");
    byId("login").hidden = true;
    setText(byId("live"), `live, ${clock(data.time)}`);
    show();
    retry = RETRY_MIN;
  },
  history: addPoints,
  log(lines) {
    addLines(lines, isNewStream);
    isNewStream = false;
  },
};

function lost(text) {
  setState(text, "bad");
  byId("panels").classList.add("stale");
  setText(byId("live"), state ? `last seen at ${clock(state.time)}` : "");
}

const handlers = {
  event: (name, data) => events[name]?.(data),
  lost: () => lost("the gateway does not answer"),
  refused(status, text) {
    if (status === 401) {
      byId("login").hidden = false;
      setText(byId("login-fault"), sessionStorage.getItem("token") ? "This token is not accepted." : "");
      sessionStorage.removeItem("token");
      byId("panels").hidden = true;
      setState("token required", "warn");
    } else {
      lost(text || `refused with ${status}`);
    }
  },
};

async function run() {
  for (;;) {
    const isOpenable = !document.hidden && byId("login").hidden;
    if (isOpenable) {
      isNewStream = true;
      await follow(handlers, stop.signal);
      retry = Math.min(2 * retry, RETRY_MAX);
    }
    await new Promise(resolve => setTimeout(resolve, isOpenable ? retry : 200));
  }
}

let hiddenTimer = 0;
document.addEventListener("visibilitychange", () => {
  clearTimeout(hiddenTimer);
  if (!document.hidden) return;
  hiddenTimer = setTimeout(() => {
    stop.abort();
    stop = new AbortController();
  }, HIDDEN_MAX);
});

byId("filter").addEventListener("input", () => { if (state) show(); });
byId("login").addEventListener("submit", event => {
  event.preventDefault();
  sessionStorage.setItem("token", byId("token").value);
  byId("token").value = "";
  byId("login").hidden = true;
});
startTools();
run();
