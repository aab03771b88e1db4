// Field case clock-drift: two gateways whose wall clocks differ by 1.2 s share a cache, and then
// one clock jumps by an hour. Neither does the cache expire, nor does a limit open.
//
// Needs: a cacheable path; a path with a limit whose quota is known; a second gateway with the same
// Redis. Events: `jump`, `back`.
//
//   TARGET       the cacheable path; default /cached/order
//   LIMITED_PATH default /live/limited
//   QUOTA, BURST of the limit, per second; default 10, 10
//   DRIFTED_URL  the gateway whose clock is wrong; default the first of PEER_URLS, else BASE_URL
//   RATE         requests per second at each gateway; default 40 (short), 300 (long)
//   SECONDS      of each of the phases before the jump, during it and after it; default 4 (short),
//                30 (long)
//   and BASE_URL, FORM, INSECURE, P99_MS of lib/settings.js

import { Counter, Rate } from 'k6/metrics';
import { BASE_URL, byForm, list, number, text } from './lib/settings.js';
import { optionsOf, steady } from './lib/load.js';
import { get, keyed } from './lib/request.js';
import { cacheStatus, field } from './lib/response.js';
import { needCache, needPath } from './lib/precondition.js';
import { record } from './lib/outcome.js';

export { announce } from './lib/events.js';
export { handleSummary } from './lib/summary.js';

const TARGET = text('TARGET', '/cached/order');
const LIMITED_PATH = text('LIMITED_PATH', '/live/limited');
const QUOTA = number('QUOTA', 10);
const BURST = number('BURST', 10);
const DRIFTED_URL = text('DRIFTED_URL', list('PEER_URLS', BASE_URL)[0]);
const RATE = number('RATE', byForm(40, 300));
const PHASE = number('SECONDS', byForm(4, 30));
const KEYS = 50;
const SECONDS = 3 * PHASE;
// More than any entry is old, less than the jump of an hour. The tolerance of the case is 1.5 s.
const AGE_MAX = SECONDS + 30;

const hits = new Rate('hits');
const wrongAges = new Counter('wrong_ages');
const admitted = new Counter('admitted');

const all = (exec, rate) => steady({ exec, rate, seconds: SECONDS });

export const options = optionsOf({
  scenarios: { right: all('right', RATE), drifted: all('drifted', RATE), limited: all('limited', 3 * QUOTA) },
  thresholds: {
    'hits{scenario:right}': ['rate>=0.98'],
    'hits{scenario:drifted}': ['rate>=0.98'],
    wrong_ages: ['count==0'],
    admitted: [`count>=${Math.floor(0.85 * QUOTA * SECONDS)}`, `count<=${Math.ceil(QUOTA * (SECONDS + 1) + BURST)}`],
  },
  p99: byForm(2000, 50),
  plan: [
    [PHASE, 'jump', 'set the wall clock of the drifted gateway an hour forward'],
    [2 * PHASE, 'back', 'set it back'],
  ],
});

export function setup() {
  for (let key = 0; key < KEYS; key += 1) {
    needCache(keyed(TARGET, key));
  }
  needPath(TARGET, 'DRIFTED_URL', { base: DRIFTED_URL });
}

function read(base) {
  const response = get(keyed(TARGET, Math.floor(Math.random() * KEYS)), { base, name: base });
  record(response, response.status === 200, 'status 200');
  hits.add(cacheStatus(response).isHit);
  const age = Number(field(response, 'Age') || 0);
  wrongAges.add(age >= 0 && age <= AGE_MAX ? 0 : 1);
}

export function right() {
  read(BASE_URL);
}

export function drifted() {
  read(DRIFTED_URL);
}

export function limited() {
  const response = get(LIMITED_PATH, { base: DRIFTED_URL });
  record(response, response.status === 200 || response.status === 429, 'status 200 or 429');
  admitted.add(response.status === 200 ? 1 : 0);
}
