// A slow upstream, to breaker, to recovery: the upstream becomes slow, the breaker opens and
// clients get the degrade page at once instead of waiting; when the upstream is fast again, the
// breaker closes.
//
// Needs: a path that is not cached, whose upstream has a breaker (breaker.slow below SLOW_MS), and a
// limit of connections per address above 12.5 times RATE.
// Events: `fault`, `repair`.
//
//   TARGET     the path; default /live/page
//   RATE       requests per second; default 60 (short), 500 (long)
//   SECONDS    of the slowness; default 5 (short), 30 (long)
//   RECOVERY   seconds from the repair to the last phase: the breaker closes in them; default 8
//              (short), 30 (long)
//   SLOW_MS    what counts as a slow response; default 1000
//   and BASE_URL, FORM, INSECURE, P99_MS of lib/settings.js

import { Rate } from 'k6/metrics';
import { byForm, number, text } from './lib/settings.js';
import { optionsOf, steady } from './lib/load.js';
import { get } from './lib/request.js';
import { field } from './lib/response.js';
import { needPath } from './lib/precondition.js';
import { record } from './lib/outcome.js';

export { announce } from './lib/events.js';
export { handleSummary } from './lib/summary.js';

const TARGET = text('TARGET', '/live/page');
const RATE = number('RATE', byForm(60, 500));
const SLOW = number('SECONDS', byForm(5, 30));
const RECOVERY = number('RECOVERY', byForm(8, 30));
const SLOW_MS = number('SLOW_MS', 1000);
const BEFORE = 3;
// The breaker needs calls that are slow before it opens.
const SETTLE = 2;
const REPAIR = BEFORE + SLOW;

const failFast = new Rate('fail_fast');

// A call takes as long as the upstream until the breaker opens.
const phase = (exec, start, seconds) => steady({ exec, rate: RATE, seconds, start, iterationSeconds: 2.5 });

export const options = optionsOf({
  scenarios: {
    // Calls in flight at the fault belong to the next phase.
    before: phase('fast', 0, BEFORE - 0.5),
    opening: phase('slow', BEFORE, SETTLE),
    slow: phase('slow', BEFORE + SETTLE, SLOW - SETTLE),
    recovering: phase('slow', REPAIR, RECOVERY),
    after: phase('fast', REPAIR + RECOVERY, 3),
  },
  thresholds: {
    // The others are probes of the half-open breaker, and calls that were made before it opened.
    'fail_fast{scenario:slow}': ['rate>=0.8'],
    'response_ms{scenario:slow}': [`p(90)<${SLOW_MS}`],
    'errors{scenario:before}': ['rate==0'],
    'errors{scenario:after}': ['rate==0'],
  },
  // A probe takes as long as the upstream.
  p99: byForm(5000, 3000),
  plan: [[BEFORE, 'fault', 'make the upstream slow'], [REPAIR, 'repair', 'make the upstream fast again']],
});

export function setup() {
  needPath(TARGET);
}

export function fast() {
  const response = get(TARGET);
  record(response, response.status === 200, 'status 200');
}

export function slow() {
  const response = get(TARGET);
  const isPage = response.status === 503 && field(response, 'Retry-After') !== '';
  failFast.add(isPage && response.timings.duration < SLOW_MS);
  record(response, isPage || response.status === 200, 'status 200, or 503 with Retry-After');
}
