// Field case degrade: the origin is down. Stored responses are served stale, others are a degrade
// page in the form that the client accepts; when the origin is back, so are its responses.
//
// Needs: a cacheable path whose responses expire soon and may be stale (stale_if_error), a path
// that is not cached; both without other traffic. Events: `fault`, `repair`. The last rung of this
// case, accepted writes (202), is not part of the script: the gateway does not have it yet.
//
//   STALE_PATH  cacheable; default /brief/page
//   LIVE_PATH   not cached; default /live/page
//   RATE        requests per second of each; default 30 (short), 200 (long)
//   SECONDS     of the outage; default 5 (short), 30 (long)
//   RECOVERY    seconds from the repair to the last phase: the breaker closes in them; default 8
//               (short), 30 (long)
//   and BASE_URL, FORM, INSECURE, P99_MS of lib/settings.js

import exec from 'k6/execution';
import { Rate } from 'k6/metrics';
import { byForm, number, text } from './lib/settings.js';
import { optionsOf, steady } from './lib/load.js';
import { get, keyed } from './lib/request.js';
import { field } from './lib/response.js';
import { needCache, needPath } from './lib/precondition.js';
import { record } from './lib/outcome.js';

export { announce } from './lib/events.js';
export { handleSummary } from './lib/summary.js';

const STALE_PATH = text('STALE_PATH', '/brief/page');
const LIVE_PATH = text('LIVE_PATH', '/live/page');
const RATE = number('RATE', byForm(30, 200));
const OUTAGE = number('SECONDS', byForm(5, 30));
const RECOVERY = number('RECOVERY', byForm(8, 30));
const KEYS = 20;
const BEFORE = 3;
// The environment needs a moment to act at an event.
const SETTLE = 1;
const REPAIR = BEFORE + OUTAGE;

const stale = new Rate('served_stale');
const pages = new Rate('served_pages');

const both = (phase, start, seconds) => ({
  [`stale${phase}`]: steady({ exec: `stale${phase}`, rate: RATE, seconds, start }),
  [`live${phase}`]: steady({ exec: `live${phase}`, rate: RATE, seconds, start }),
});

export const options = optionsOf({
  scenarios: {
    ...both('Before', 0, BEFORE - SETTLE / 2),
    ...both('Down', BEFORE + SETTLE, OUTAGE - SETTLE),
    // The breaker probes the origin with these.
    recovering: steady({ exec: 'recovering', rate: RATE, seconds: RECOVERY - SETTLE, start: REPAIR + SETTLE }),
    ...both('After', REPAIR + RECOVERY, 3),
  },
  thresholds: {
    served_stale: ['rate==1'],
    served_pages: ['rate==1'],
    'errors{scenario:liveAfter}': ['rate==0'],
    'response_ms{scenario:staleDown}': [`p(99)<${byForm(3000, 100)}`],
  },
  p99: byForm(3000, 100),
  plan: [[BEFORE, 'fault', 'stop the origin'], [REPAIR, 'repair', 'start the origin again']],
});

export function setup() {
  needPath(LIVE_PATH, 'LIVE_PATH');
  for (let key = 0; key < KEYS; key += 1) {
    needCache(keyed(STALE_PATH, key), 'STALE_PATH');
  }
}

function askStale() {
  return get(keyed(STALE_PATH, exec.scenario.iterationInTest % KEYS));
}

function works(response) {
  record(response, response.status === 200, 'status 200');
}

// Without the origin: the stored response, past its freshness.
export function staleDown() {
  const response = askStale();
  stale.add(response.status === 200);
  record(response, response.status === 200, 'the stored response');
}

// Without the origin and without a stored response: a page in the form that the client accepts.
export function liveDown() {
  const isBrowser = exec.scenario.iterationInTest % 2 === 0;
  const response = get(LIVE_PATH, { headers: { accept: isBrowser ? 'text/html' : 'application/json' } });
  const isPage = response.status === 503 && /^[0-9]+$/.test(field(response, 'Retry-After'))
    && /\bno-store\b/.test(field(response, 'Cache-Control'))
    && field(response, 'Content-Type').startsWith(isBrowser ? 'text/html' : 'application/problem+json');
  pages.add(isPage);
  record(response, isPage, 'the degrade page: status 503, Retry-After, no-store, in the accepted form');
}

export function staleBefore() {
  works(askStale());
}

export function liveBefore() {
  works(get(LIVE_PATH));
}

export function recovering() {
  const response = get(LIVE_PATH);
  record(response, response.status === 200 || response.status === 503, 'status 200 or 503');
}

export { staleBefore as staleAfter, liveBefore as liveAfter };
