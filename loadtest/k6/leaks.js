// Field case leaks: after a churn of new connections, aborted requests and failed ones, the process
// holds no more tasks, descriptors and memory than before.
//
// Needs: ADMIN_URL; a fast path and a slow one that are not cached. No other traffic.
//
//   FAST_PATH  default /live/page
//   SLOW_PATH  slower than 200 ms; default /slow/report
//   FAIL_PATH  a path whose origin fails; default /failing/page
//   RATE       requests per second of each kind; default 25 (short), 200 (long)
//   SECONDS    of the churn; default 8 (short), 300 (long)
//   QUIET      seconds from the end of the churn to the comparison, longer than idle upstream
//              connections are kept (4 s); default 6 (short), 30 (long)
//   TASKS, DESCRIPTORS, MEMORY  bounds of the growth; default 5, 10, 0.5 (short) or 0.3 (long) of
//                               the memory before
//   and BASE_URL, FORM, INSECURE, P99_MS of lib/settings.js; ADMIN_URL, ADMIN_TOKEN of lib/admin.js

import { sleep } from 'k6';
import { Trend } from 'k6/metrics';
import { byForm, number, text } from './lib/settings.js';
import { optionsOf, steady } from './lib/load.js';
import { get } from './lib/request.js';
import { need, needPath } from './lib/precondition.js';
import { holdings, needAdmin } from './lib/admin.js';
import { record, recordError } from './lib/outcome.js';

export { announce } from './lib/events.js';
export { handleSummary } from './lib/summary.js';

const FAST_PATH = text('FAST_PATH', '/live/page');
const SLOW_PATH = text('SLOW_PATH', '/slow/report');
const FAIL_PATH = text('FAIL_PATH', '/failing/page');
const RATE = number('RATE', byForm(25, 200));
const SECONDS = number('SECONDS', byForm(8, 300));
const QUIET = number('QUIET', byForm(6, 30));
const GIVE_UP = '200ms';

const tasks = new Trend('tasks_growth');
const descriptors = new Trend('descriptors_growth');
const memory = new Trend('memory_growth');

const kind = (exec, iterationSeconds) => steady({ exec, rate: RATE, seconds: SECONDS, iterationSeconds });

export const options = optionsOf({
  scenarios: { fresh: kind('fresh'), aborted: kind('aborted', 1), failed: kind('failed') },
  thresholds: {
    tasks_growth: [`max<=${number('TASKS', 5)}`],
    descriptors_growth: [`max<=${number('DESCRIPTORS', 10)}`],
    memory_growth: [`max<=${number('MEMORY', byForm(0.5, 0.3))}`],
  },
  p99: byForm(3000, 100),
  // A kept connection of k6 would be a task of the gateway at the end.
  more: { teardownTimeout: `${QUIET + 60}s`, noConnectionReuse: true },
});

export function setup() {
  needAdmin();
  needPath(FAST_PATH, 'FAST_PATH');
  const { timings } = needPath(SLOW_PATH, 'SLOW_PATH');
  need(timings.duration > 400, `GET ${SLOW_PATH} took ${Math.round(timings.duration)} ms: set SLOW_PATH to a slower path`);
  // Buffers and tables that the first requests allocate are not growth.
  for (let count = 0; count < 50; count += 1) {
    fresh();
    failed();
  }
  sleep(QUIET);
  return holdings();
}

export function fresh() {
  const response = get(FAST_PATH);
  record(response, response.status === 200, 'status 200');
}

export function aborted() {
  const response = get(SLOW_PATH, { timeout: GIVE_UP });
  recordError(response.status !== 0, `GET ${SLOW_PATH}: status ${response.status} although the client gave up`);
}

export function failed() {
  const response = get(FAIL_PATH);
  record(response, response.status >= 500, 'status 5xx');
}

export function teardown(before) {
  sleep(QUIET);
  const after = holdings();
  tasks.add(after.tasks - before.tasks);
  descriptors.add(after.descriptors - before.descriptors);
  memory.add(after.memory / before.memory - 1);
}
