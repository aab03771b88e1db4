// Drain: a gateway gets SIGTERM under load. No request is lost: neither on kept connections, nor on
// new ones, nor slow ones that are in flight. A load balancer learns of the drain within LEARN
// seconds and then uses the successor.
//
// Needs: an address of the gateway that drains and one of its successor; behind a load balancer or
// a Kubernetes Service both are BASE_URL. Event: `drain` (send SIGTERM, or restart the deployment).
//
// Requests are POST: k6's HTTP client repeats a GET silently when a kept connection was closed,
// which would hide a loss.
//
//   TARGET     a path that is not cached and accepts POST; default /live/order
//   SLOW_PATH  likewise, slow; '-' for none; default /slow/order
//   NEXT_URL   the successor; default the first of PEER_URLS, else BASE_URL
//   RATE       requests per second, half of them on new connections; default 80 (short), 500 (long)
//   SECONDS    before the drain, and after it; default 4 (short), 30 (long)
//   LEARN      default 1 (short), 5 (long); below server.drain_idle
//   and BASE_URL, FORM, INSECURE, P99_MS of lib/settings.js

import { BASE_URL, byForm, list, number, text } from './lib/settings.js';
import { optionsOf, steady } from './lib/load.js';
import { post } from './lib/request.js';
import { need } from './lib/precondition.js';
import { record } from './lib/outcome.js';

export { announce } from './lib/events.js';
export { handleSummary } from './lib/summary.js';

const TARGET = text('TARGET', '/live/order');
const SLOW_PATH = text('SLOW_PATH', '/slow/order');
const NEXT_URL = text('NEXT_URL', list('PEER_URLS', BASE_URL)[0]);
const RATE = number('RATE', byForm(80, 500));
const SECONDS = number('SECONDS', byForm(4, 30));
const LEARN = number('LEARN', byForm(1, 5));
const FIRST = SECONDS + LEARN;

const phases = (name, rate, iterationSeconds) => ({
  [name]: steady({ exec: name, rate, seconds: FIRST, env: { BASE: BASE_URL }, iterationSeconds }),
  [`${name}_next`]: steady({ exec: name, rate, seconds: SECONDS, start: FIRST, env: { BASE: NEXT_URL }, iterationSeconds }),
});

export const options = optionsOf({
  scenarios: {
    ...phases('kept', RATE / 2),
    ...phases('fresh', RATE / 2),
    ...(SLOW_PATH === '-' ? {} : phases('slow', Math.max(1, Math.round(RATE / 10)), 4)),
  },
  thresholds: {
    'errors{scenario:kept}': ['rate==0'],
    'errors{scenario:fresh}': ['rate==0'],
    ...(SLOW_PATH === '-' ? {} : { 'errors{scenario:slow}': ['rate==0'] }),
  },
  p99: byForm(4000, 3000),
  plan: [[SECONDS, 'drain', 'send SIGTERM to the gateway, or restart the deployment']],
});

export function setup() {
  for (const base of [BASE_URL, NEXT_URL]) {
    const { status, error } = post(TARGET, { base });
    need(status !== 0, `no response from ${base} (${error}): start the gateway, or set BASE_URL and NEXT_URL`);
    need(status >= 200 && status < 300, `POST ${base}${TARGET} has status ${status}: set TARGET to a path that accepts POST`);
  }
}

function send(path, headers, name) {
  const response = post(path, { base: __ENV.BASE, headers, name });
  record(response, response.status >= 200 && response.status < 300, 'status 2xx');
}

export function kept() {
  send(TARGET, {}, 'kept');
}

// Over HTTP/1.1, the gateway closes the connection after the response, and the next request needs a
// new one.
export function fresh() {
  send(TARGET, { Connection: 'close' }, 'fresh');
}

export function slow() {
  send(SLOW_PATH, {}, 'slow');
}
