// Soak: a mixture of everything for a long time. Nothing fails, and memory, descriptors and tasks
// stay level.
//
// Needs: ADMIN_URL; a cacheable path, one whose responses expire soon, one that is not cached, a
// slow one, a limited one.
//
//   CACHED_PATH, BRIEF_PATH, LIVE_PATH, SLOW_PATH, LIMITED_PATH
//              default /cached/page, /brief/page, /live/page, /slow/page, /limited/page
//   KEYS       cache keys; default 500
//   RATE       requests per second; default 120 (short), 500 (long)
//   SECONDS    default 15 (short), 3600 (long)
//   SAMPLE     seconds between two samples of what the process holds; default 1 (short), 10 (long)
//   WARMUP     seconds until the first sample that counts; default 5 (short), 300 (long)
//   MEMORY, DESCRIPTORS, TASKS  bounds of the growth since then; default 0.5 (short) or 0.2 (long)
//                               of the memory, 150 and 150 (k6 opens connections as it needs them)
//   and BASE_URL, FORM, INSECURE, P99_MS of lib/settings.js; ADMIN_URL, ADMIN_TOKEN of lib/admin.js

import { Counter, Trend } from 'k6/metrics';
import { byForm, number, text } from './lib/settings.js';
import { optionsOf, steady } from './lib/load.js';
import { get, keyed, post } from './lib/request.js';
import { needCache, needPath } from './lib/precondition.js';
import { holdings, needAdmin } from './lib/admin.js';
import { record, recordError } from './lib/outcome.js';

export { announce } from './lib/events.js';
export { handleSummary } from './lib/summary.js';

const CACHED_PATH = text('CACHED_PATH', '/cached/page');
const BRIEF_PATH = text('BRIEF_PATH', '/brief/page');
const LIVE_PATH = text('LIVE_PATH', '/live/page');
const SLOW_PATH = text('SLOW_PATH', '/slow/page');
const LIMITED_PATH = text('LIMITED_PATH', '/limited/page');
const KEYS = number('KEYS', 500);
const SECONDS = number('SECONDS', byForm(15, 3600));
const SAMPLE = number('SAMPLE', byForm(1, 10));
const WARMUP = number('WARMUP', byForm(5, 300));

const memory = new Trend('memory_growth');
const descriptors = new Trend('descriptors_growth');
const tasks = new Trend('tasks_growth');
const samples = new Counter('samples');

const GROWTH_OF_CONNECTIONS = 150;

export const options = optionsOf({
  scenarios: {
    mixture: steady({ exec: 'mixture', rate: number('RATE', byForm(120, 500)), seconds: SECONDS }),
    watch: {
      executor: 'constant-arrival-rate', exec: 'watch', rate: 1, timeUnit: `${SAMPLE}s`, startTime: `${WARMUP}s`,
      duration: `${SECONDS - WARMUP}s`, preAllocatedVUs: 1, maxVUs: 1,
    },
  },
  thresholds: {
    memory_growth: [`max<=${number('MEMORY', byForm(0.5, 0.2))}`],
    descriptors_growth: [`max<=${number('DESCRIPTORS', GROWTH_OF_CONNECTIONS)}`],
    tasks_growth: [`max<=${number('TASKS', GROWTH_OF_CONNECTIONS)}`],
    samples: ['count>=3'],
  },
  p99: byForm(2500, 2000),
});

// Kinds of requests with their share in percent.
const KINDS = [
  [60, () => expect(get(keyed(CACHED_PATH, Math.floor(Math.random() * KEYS)), { name: 'cached' }), [200])],
  [15, () => expect(get(keyed(BRIEF_PATH, Math.floor(Math.random() * 10)), { name: 'brief' }), [200])],
  [10, () => expect(get(LIVE_PATH, { name: 'live' }), [200])],
  [5, () => expect(post(LIVE_PATH, { name: 'post' }), [200, 201, 204])],
  [5, () => expect(get(LIMITED_PATH, { name: 'limited' }), [200, 429])],
  [3, () => expect(get(SLOW_PATH, { name: 'slow' }), [200])],
  [2, () => giveUp()],
];

function expect(response, statuses) {
  record(response, statuses.includes(response.status), `status ${statuses.join(' or ')}`);
}

function giveUp() {
  const { status } = get(SLOW_PATH, { name: 'given up', timeout: '200ms' });
  recordError(status !== 0 && status !== 200, `GET ${SLOW_PATH}: status ${status}`);
}

export function setup() {
  needAdmin();
  needCache(CACHED_PATH, 'CACHED_PATH');
  for (const [path, setting] of [[BRIEF_PATH, 'BRIEF_PATH'], [LIVE_PATH, 'LIVE_PATH'], [SLOW_PATH, 'SLOW_PATH'], [LIMITED_PATH, 'LIMITED_PATH']]) {
    needPath(path, setting);
  }
}

export function mixture() {
  let share = Math.random() * 100;
  const [, ask] = KINDS.find(([percent]) => (share -= percent) < 0) || KINDS[0];
  ask();
}

// The first sample of the only virtual user of this scenario.
let first;

export function watch() {
  const now = holdings();
  first = first || now;
  memory.add(now.memory / first.memory - 1);
  descriptors.add(now.descriptors - first.descriptors);
  tasks.add(now.tasks - first.tasks);
  samples.add(1);
}
