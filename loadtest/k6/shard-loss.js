// Loss of a shard: a Redis server of a region is lost and comes back empty. No request fails; its
// keys are misses meanwhile, and are stored again afterwards.
//
// Needs: a cacheable path, more keys than fit into the memory of the gateway (else Redis is not
// read), and a region with several Redis servers. Events: `fault`, `repair`.
//
//   TARGET     the path; default /cached/item
//   KEYS       default 600
//   RATE       requests per second; default 100 (short), 1500 (long)
//   SECONDS    of each of the phases before, during and after the loss; default 4 (short), 30
//              (long)
//   and BASE_URL, FORM, INSECURE, P99_MS of lib/settings.js

import http from 'k6/http';
import { Rate } from 'k6/metrics';
import { BASE_URL, byForm, number, text } from './lib/settings.js';
import { optionsOf, steady } from './lib/load.js';
import { get, keyed, params } from './lib/request.js';
import { cacheStatus } from './lib/response.js';
import { needCache } from './lib/precondition.js';
import { record } from './lib/outcome.js';

export { announce } from './lib/events.js';
export { handleSummary } from './lib/summary.js';

const TARGET = text('TARGET', '/cached/item');
const KEYS = number('KEYS', 600);
const PHASE = number('SECONDS', byForm(4, 30));
const RATE = number('RATE', byForm(100, 1500));

const hits = new Rate('hits');

const phase = (number) => steady({ exec: 'read', rate: RATE, seconds: PHASE, start: number * PHASE });

export const options = optionsOf({
  scenarios: { before: phase(0), lost: phase(1), after: phase(2) },
  thresholds: {
    'errors{scenario:lost}': ['rate==0'],
    'hits{scenario:before}': [`rate>=${byForm(0.8, 0.95)}`],
    // Half of the keys are lost; those in memory and those stored again are hits.
    'hits{scenario:lost}': [`rate>=${byForm(0.25, 0.3)}`],
    'hits{scenario:after}': [`rate>=${byForm(0.35, 0.5)}`],
    'response_ms{scenario:lost}': [`p(99)<${byForm(3000, 100)}`],
  },
  p99: byForm(3000, 100),
  plan: [
    [PHASE, 'fault', 'stop one Redis server of the region'],
    [2 * PHASE - 1, 'look', 'see tidegate_shard_breaker_open'],
    [2 * PHASE, 'repair', 'start the Redis server again'],
  ],
  more: { batch: 20, batchPerHost: 20 },
});

export function setup() {
  needCache(keyed(TARGET, 0));
  for (let first = 0; first < KEYS; first += 20) {
    const keys = Array.from({ length: Math.min(20, KEYS - first) }, (_, at) => first + at);
    http.batch(keys.map((key) => ['GET', `${BASE_URL}${keyed(TARGET, key)}`, null, params({ name: TARGET })]));
  }
}

export function read() {
  const response = get(keyed(TARGET, Math.floor(Math.random() * KEYS)));
  record(response, response.status === 200, 'status 200');
  hits.add(cacheStatus(response).isHit);
}
