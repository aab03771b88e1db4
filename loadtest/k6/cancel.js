// Field case cancel: clients that give up end the work behind them, unless others wait for the same
// response. Other requests are unaffected.
//
// Needs: a path that is not cached and slow, a cacheable path that is slow, and a fast one.
//
//   SLOW_PATH  slower than GIVE_UP_MS, not cached; default /slow/report
//   FILL_PATH  as slow, cacheable whatever its query; default /lagging/report
//   FAST_PATH  default /live/page
//   GIVE_UP_MS default 300
//   RATE       requests per second of each kind; default 15 (short), 100 (long)
//   SECONDS    default 8 (short), 60 (long)
//   and BASE_URL, FORM, INSECURE, P99_MS of lib/settings.js

import http from 'k6/http';
import exec from 'k6/execution';
import { Counter, Rate } from 'k6/metrics';
import { BASE_URL, byForm, number, text } from './lib/settings.js';
import { optionsOf, steady } from './lib/load.js';
import { get, keyed, params } from './lib/request.js';
import { need, needPath } from './lib/precondition.js';
import { record, recordError } from './lib/outcome.js';

export { announce } from './lib/events.js';
export { handleSummary } from './lib/summary.js';

const SLOW_PATH = text('SLOW_PATH', '/slow/report');
const FILL_PATH = text('FILL_PATH', '/lagging/report');
const FAST_PATH = text('FAST_PATH', '/live/page');
const GIVE_UP_MS = number('GIVE_UP_MS', 300);
const RATE = number('RATE', byForm(15, 100));
const SECONDS = number('SECONDS', byForm(8, 60));
// k6's code of a request that its own timeout ended.
const TIMED_OUT = 1050;

const gaveUp = new Rate('gave_up');
const givenUp = new Counter('given_up');
const served = new Rate('patient_served');

const kind = (name, rate, iterationSeconds) => steady({ exec: name, rate, seconds: SECONDS, iterationSeconds });

export const options = optionsOf({
  scenarios: {
    impatient: kind('impatient', RATE, 1), pair: kind('pair', Math.max(1, Math.round(RATE / 3)), 4), fast: kind('fast', 2 * RATE),
  },
  thresholds: {
    gave_up: ['rate>=0.99'],
    patient_served: ['rate==1'],
    'response_ms{scenario:fast}': [`p(99)<${byForm(2000, 50)}`],
  },
  p99: byForm(4000, 2500),
  more: { batch: 2, batchPerHost: 2 },
});

export function setup() {
  for (const [path, setting] of [[SLOW_PATH, 'SLOW_PATH'], [keyed(FILL_PATH, Date.now()), 'FILL_PATH']]) {
    const { timings } = needPath(path, setting);
    const least = 2 * GIVE_UP_MS;
    const took = Math.round(timings.duration);
    need(took > least, `GET ${path} took ${took} ms: set ${setting} to a path slower than ${least} ms, or lower GIVE_UP_MS`);
  }
  needPath(FAST_PATH, 'FAST_PATH');
  return { run: Date.now() };
}

export function impatient() {
  const response = get(SLOW_PATH, { timeout: `${GIVE_UP_MS}ms` });
  const hasGivenUp = response.error_code === TIMED_OUT;
  gaveUp.add(hasGivenUp);
  givenUp.add(hasGivenUp ? 1 : 0);
  recordError(response.status !== 0 && response.status !== 200, `GET ${SLOW_PATH}: status ${response.status}`);
}

// Two requests for the same new key: one gives up, the other one waits.
export function pair({ run }) {
  const url = `${BASE_URL}${keyed(FILL_PATH, `${run}-${exec.scenario.iterationInTest}`)}`;
  const asks = (timeout) => ({ method: 'GET', url, params: params({ name: FILL_PATH, timeout }) });
  const [, patient] = http.batch([asks(`${GIVE_UP_MS}ms`), asks('15s')]);
  served.add(patient.status === 200);
  record(patient, patient.status === 200, 'status 200 for the client that waits');
}

export function fast() {
  const response = get(FAST_PATH);
  record(response, response.status === 200, 'status 200');
}
