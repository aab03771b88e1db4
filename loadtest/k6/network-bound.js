// Field case network-bound: storms of new connections. Each is accepted and served, also when many
// arrive at once, and requests on kept connections are unaffected.
//
// Needs: a path of the gateway that is served quickly, best from the cache; a limit of connections
// above the burst (limits_http.connections_per_ip), and net.core.somaxconn above it.
//
//   TARGET      the path; default /cached/page
//   CONNECT_RATE  new connections per second; default 100 (short), 1000 (long)
//   BURST_RATE  new connections per second in the burst of a second; default 400 (short), 4000
//               (long)
//   KEPT_RATE   requests per second on kept connections; default 60 (short), 500 (long)
//   KEPT        requests on each kept connection; default 10
//   SECONDS     default 8 (short), 60 (long)
//   CONNECT_MS  bound of the 99th percentile of connecting, TLS included; default 2000 (short), 100
//               (long)
//   and BASE_URL, FORM, INSECURE, P99_MS of lib/settings.js

import { sleep } from 'k6';
import { Rate, Trend } from 'k6/metrics';
import { byForm, number, text } from './lib/settings.js';
import { optionsOf, ramp, steady } from './lib/load.js';
import { get } from './lib/request.js';
import { needPath } from './lib/precondition.js';
import { record } from './lib/outcome.js';

export { announce } from './lib/events.js';
export { handleSummary } from './lib/summary.js';

const TARGET = text('TARGET', '/cached/page');
const SECONDS = number('SECONDS', byForm(8, 60));
const RATE = number('CONNECT_RATE', byForm(100, 1000));
const BURST = number('BURST_RATE', byForm(400, 4000));

const KEPT = number('KEPT', 10);

const connectTime = new Trend('connect_ms', true);
const isNew = new Rate('new_connections');

export const options = optionsOf({
  scenarios: {
    fresh: steady({ exec: 'fresh', rate: RATE, seconds: SECONDS }),
    burst: ramp({ exec: 'fresh', from: 0, stages: [[BURST, 0.2], [BURST, 1], [0, 0.2]], start: SECONDS / 2, iterationSeconds: 0.5 }),
    kept: steady({ exec: 'kept', rate: Math.ceil(number('KEPT_RATE', byForm(60, 500)) / KEPT), seconds: SECONDS, iterationSeconds: 3 }),
  },
  thresholds: {
    connect_ms: [`p(99)<${number('CONNECT_MS', byForm(2000, 100))}`],
    'new_connections{scenario:fresh}': ['rate==1'],
    'new_connections{scenario:kept}': [`rate<=${1.1 / KEPT}`],
    'response_ms{scenario:kept}': [`p(99)<${byForm(2000, 50)}`],
  },
  p99: byForm(3000, 100),
  // An iteration begins without connections.
  more: { noVUConnectionReuse: true },
});

export function setup() {
  needPath(TARGET);
}

export function fresh() {
  const response = get(TARGET, { name: 'fresh' });
  record(response, response.status === 200, 'status 200 on a new connection');
  connectTime.add(response.timings.connecting + response.timings.tls_handshaking);
  isNew.add(response.timings.connecting > 0);
}

export function kept() {
  for (let count = 0; count < KEPT; count += 1) {
    const response = get(TARGET, { name: 'kept' });
    record(response, response.status === 200, 'status 200 on a kept connection');
    isNew.add(response.timings.connecting > 0);
    sleep(0.1);
  }
}
