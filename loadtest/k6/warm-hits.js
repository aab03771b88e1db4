// Warm hits: responses come from the cache, and the origin is not asked.
//
// Needs: a path whose response is cacheable.
//
//   TARGET     the path; default /cached/page
//   KEYS       cache keys: the parameter k of the query is 0 to KEYS - 1; default 100
//   RATE       requests per second; default 200 (short), 2000 (long)
//   SECONDS    default 8 (short), 60 (long)
//   and BASE_URL, FORM, INSECURE, P99_MS of lib/settings.js

import { Rate } from 'k6/metrics';
import { byForm, number, text } from './lib/settings.js';
import { optionsOf, steady } from './lib/load.js';
import { get, keyed } from './lib/request.js';
import { cacheStatus } from './lib/response.js';
import { needCache } from './lib/precondition.js';
import { record } from './lib/outcome.js';

export { announce } from './lib/events.js';
export { handleSummary } from './lib/summary.js';

const TARGET = text('TARGET', '/cached/page');
const KEYS = number('KEYS', 100);

const hits = new Rate('hits');

export const options = optionsOf({
  scenarios: {
    hits: steady({ exec: 'hit', rate: number('RATE', byForm(200, 2000)), seconds: number('SECONDS', byForm(8, 60)) }),
  },
  thresholds: { hits: [`rate>=${byForm(0.99, 0.999)}`] },
  p99: byForm(2000, 20),
});

export function setup() {
  for (let key = 0; key < KEYS; key += 1) {
    needCache(keyed(TARGET, key));
  }
}

export function hit() {
  const response = get(keyed(TARGET, Math.floor(Math.random() * KEYS)));
  record(response, response.status === 200, 'status 200');
  hits.add(cacheStatus(response).isHit);
}
