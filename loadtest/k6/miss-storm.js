// A storm of misses: many concurrent requests for a key that is not in the cache make one request
// to the origin. The others join its fetch.
//
// Needs: a path whose response is cacheable, whatever its query. The response is best served by a
// slow origin: with a fast one, late requests of a burst are hits.
//
//   TARGET     the path; default /cached/storm
//   BURST      concurrent requests for each new key; default 20
//   RATE       new keys per second; default 6 (short), 20 (long)
//   SECONDS    default 8 (short), 60 (long)
//   and BASE_URL, FORM, INSECURE, P99_MS of lib/settings.js
//
// Every burst opens up to BURST connections: see limits_http.connections_per_ip of the gateway.

import http from 'k6/http';
import exec from 'k6/execution';
import { Counter, Rate, Trend } from 'k6/metrics';
import { BASE_URL, byForm, number, text } from './lib/settings.js';
import { optionsOf, steady } from './lib/load.js';
import { keyed, params } from './lib/request.js';
import { cacheStatus } from './lib/response.js';
import { needCacheStatus } from './lib/precondition.js';
import { record } from './lib/outcome.js';

export { announce } from './lib/events.js';
export { handleSummary } from './lib/summary.js';

const TARGET = text('TARGET', '/cached/storm');
const BURST = number('BURST', 20);

const bursts = new Counter('bursts');
// Requests of a burst that were forwarded to the origin.
const fetches = new Trend('fetches_per_burst');
const forwarded = new Rate('forwarded');

export const options = optionsOf({
  scenarios: {
    storm: steady({
      exec: 'storm', rate: number('RATE', byForm(6, 20)), seconds: number('SECONDS', byForm(8, 60)), iterationSeconds: 2,
    }),
  },
  // Two requests that arrive at two threads in the same moment may both be forwarded.
  thresholds: { fetches_per_burst: ['avg<=1.05', 'max<=2'], forwarded: [`rate<=${1.05 / BURST}`] },
  p99: byForm(3000, 500),
  more: { batch: BURST, batchPerHost: BURST },
});

export function setup() {
  const run = `${Date.now()}`;
  needCacheStatus(keyed(TARGET, `${run}-first`));
  return { run };
}

export function storm({ run }) {
  const url = `${BASE_URL}${keyed(TARGET, `${run}-${exec.scenario.iterationInTest}`)}`;
  const request = { method: 'GET', url, params: params({ name: TARGET }) };
  const responses = http.batch(Array(BURST).fill(request));
  let count = 0;
  for (const response of responses) {
    record(response, response.status === 200, 'status 200');
    const { isForwarded } = cacheStatus(response);
    forwarded.add(isForwarded);
    count += isForwarded ? 1 : 0;
  }
  fetches.add(count);
  bursts.add(1);
}
