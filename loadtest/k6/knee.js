// Field case knee: twice the load that the upstream can serve. The gateway limits the calls in
// progress, so that the upstream keeps its throughput and those who are served are served soon; the
// others get 503 at once.
//
// Needs: a path that is not cached, whose upstream has `concurrency`; its capacity in requests per
// second.
//
//   TARGET     the path; default /work
//   CAPACITY   requests per second that the upstream can serve; default 200
//   SECONDS    of each of the steps at 0.7 times, once and twice the capacity; default 4 (short),
//              30 (long)
//   LEARN      seconds at twice the capacity before the step at the capacity, in which served
//              responses are not counted: a new limit is above what the upstream needs until it has
//              held calls back for some windows; default 3 (short), 10 (long)
//   SERVED_MS  bound of the 99th percentile of served responses; default 2000 (short), 1000 (long)
//   and BASE_URL, FORM, INSECURE of lib/settings.js

import { Counter, Trend } from 'k6/metrics';
import { byForm, number, text } from './lib/settings.js';
import { optionsOf, steady } from './lib/load.js';
import { get } from './lib/request.js';
import { needPath } from './lib/precondition.js';
import { record } from './lib/outcome.js';

export { announce } from './lib/events.js';
export { handleSummary } from './lib/summary.js';

const TARGET = text('TARGET', '/work');
const CAPACITY = number('CAPACITY', 200);
const STEP = number('SECONDS', byForm(4, 30));
const LEARN = number('LEARN', byForm(3, 10));
const SERVED_MS = number('SERVED_MS', byForm(2000, 1000));
// The share of the capacity that must be served at twice the load.
const GOODPUT = byForm(0.6, 0.9);

const served = new Counter('served');
const servedTime = new Trend('served_ms', true);

// Each virtual user has a connection: all steps together stay below the default of
// `limits_http.connections_per_ip`.
const step = (start, factor, seconds = STEP, iterationSeconds = 1) => steady({
  exec: 'work', rate: Math.round(factor * CAPACITY), seconds, start, iterationSeconds,
});
const LEARNT = STEP + 1 + LEARN + 1;

export const options = optionsOf({
  scenarios: {
    below: step(0, 0.7),
    learn: step(STEP + 1, 2, LEARN, 0.5),
    knee: step(LEARNT, 1),
    twice: step(LEARNT + STEP + 1, 2),
  },
  thresholds: {
    'served{scenario:below}': [`count>=${Math.floor(0.9 * 0.7 * CAPACITY * STEP)}`],
    'served{scenario:knee}': [`count>=${Math.floor(GOODPUT * CAPACITY * STEP)}`],
    'served{scenario:twice}': [`count>=${Math.floor(GOODPUT * CAPACITY * STEP)}`],
    'served_ms{scenario:twice}': [`p(99)<${SERVED_MS}`],
  },
  p99: SERVED_MS,
});

export function setup() {
  needPath(TARGET);
}

export function work() {
  const response = get(TARGET);
  record(response, response.status === 200 || response.status === 503, 'status 200 or 503');
  if (response.status === 200) {
    served.add(1);
    servedTime.add(response.timings.duration);
  }
}
