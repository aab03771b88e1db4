// Field case worker-pool: one of several endpoints hangs. It is ejected after its timeouts, so that
// it costs a small share of the requests and not its third of them; when it works again, it is used
// again.
//
// Needs: a path that is not cached, whose upstream has at least three endpoints and a `timeout` of
// at most a second. Events: `fault`, `repair`.
//
//   TARGET     the path; default /live/work
//   RATE       requests per second; default 60 (short), 500 (long)
//   SECONDS    of the hang; default 6 (short), 60 (long)
//   FAILED     bound of the share of failed requests from 3 s after the hang on; default 0.08
//              (short), 0.02 (long)
//   RECOVERY   seconds from the repair to the last phase, longer than an ejection; default 6
//              (short), 60 (long)
//   and BASE_URL, FORM, INSECURE, P99_MS of lib/settings.js

import { Rate } from 'k6/metrics';
import { byForm, number, text } from './lib/settings.js';
import { optionsOf, steady } from './lib/load.js';
import { get } from './lib/request.js';
import { needPath } from './lib/precondition.js';
import { record } from './lib/outcome.js';

export { announce } from './lib/events.js';
export { handleSummary } from './lib/summary.js';

const TARGET = text('TARGET', '/live/work');
const RATE = number('RATE', byForm(60, 500));
const HANG = number('SECONDS', byForm(6, 60));
const RECOVERY = number('RECOVERY', byForm(6, 60));
const BEFORE = 3;
// Requests in flight at the fault belong to the next phase.
const MARGIN = 0.5;
const SETTLE = 3;
const REPAIR = BEFORE + HANG;

const failed = new Rate('failed');

const phase = (exec, start, seconds) => steady({ exec, rate: RATE, seconds, start, iterationSeconds: 1 });

export const options = optionsOf({
  scenarios: {
    before: phase('works', 0, BEFORE - MARGIN),
    hang: phase('hangs', BEFORE, HANG + RECOVERY),
    after: phase('works', REPAIR + RECOVERY, 3),
  },
  thresholds: {
    'failed{phase:ejected}': [`rate<=${number('FAILED', byForm(0.08, 0.02))}`],
    'errors{scenario:after}': ['rate==0'],
  },
  p99: byForm(3000, 1500),
  plan: [[BEFORE, 'fault', 'make one endpoint hang'], [REPAIR, 'repair', 'let the endpoint continue']],
});

export function setup() {
  needPath(TARGET);
  return { began: Date.now() };
}

export function works() {
  const response = get(TARGET);
  record(response, response.status === 200, 'status 200');
}

export function hangs({ began }) {
  const second = (Date.now() - began) / 1000;
  const phase = second < BEFORE + SETTLE ? 'hang' : second < REPAIR ? 'ejected' : 'repaired';
  const response = get(TARGET);
  failed.add(response.status !== 200, { phase });
  record(response, response.status === 200 || response.status === 503, 'status 200 or 503');
}
