// Reload: the configuration changes under load, several times, once to a file with an error. No
// request is lost, no connection is closed, and the new configuration applies; the broken file
// changes nothing.
//
// Needs: a path. To see that a configuration applies, a response field whose value differs from one
// to the next. Events: `reload`, `broken`, `again`.
//
//   TARGET        the path; default /cached/page
//   CONFIG_HEADER the response field; '-' for none; default x-config
//   CONFIGS       its values: at first, after `reload` and `broken`, and after `again`; default
//                 1,2,3
//   RATE          requests per second; default 120 (short), 1000 (long)
//   SECONDS       of each of the four phases; default 3 (short), 15 (long)
//   and BASE_URL, FORM, INSECURE, P99_MS of lib/settings.js

import { Rate } from 'k6/metrics';
import { byForm, list, number, text } from './lib/settings.js';
import { optionsOf, steady } from './lib/load.js';
import { post } from './lib/request.js';
import { field } from './lib/response.js';
import { need } from './lib/precondition.js';
import { record } from './lib/outcome.js';

export { announce } from './lib/events.js';
export { handleSummary } from './lib/summary.js';

const TARGET = text('TARGET', '/cached/page');
const HEADER = text('CONFIG_HEADER', 'x-config');
const CONFIGS = list('CONFIGS', '1,2,3');
const RATE = number('RATE', byForm(120, 1000));
const PHASE = number('SECONDS', byForm(3, 15));
// The new configuration applies within this time.
const SETTLE = 1.5;

// Responses of a phase that have the expected configuration, from SETTLE seconds after its
// beginning on.
const applied = new Rate('applied');

const EXPECTED = [CONFIGS[0], CONFIGS[1], CONFIGS[1], CONFIGS[2]];

export const options = optionsOf({
  scenarios: { posts: steady({ exec: 'send', rate: RATE, seconds: 4 * PHASE }) },
  thresholds: {
    'errors{scenario:posts}': ['rate==0'],
    ...(HEADER === '-' ? {} : Object.fromEntries([0, 1, 2, 3].map((phase) => [`applied{phase:${phase}}`, ['rate==1']]))),
  },
  p99: byForm(3000, 50),
  plan: [
    [PHASE, 'reload', `change the configuration, to ${CONFIGS[1]}, by its file alone`],
    [2 * PHASE, 'broken', 'change it to a file with an error'],
    [3 * PHASE, 'again', `change it to ${CONFIGS[2]}, and send SIGHUP`],
  ],
});

export function setup() {
  const { status, error, headers } = post(TARGET);
  need(status !== 0, `no response (${error}): start the gateway, or set BASE_URL`);
  need(status < 500, `POST ${TARGET} has status ${status}: set TARGET`);
  const isTold = HEADER === '-' || field({ headers }, HEADER) === CONFIGS[0];
  need(isTold, `the response has no field ${HEADER}: ${CONFIGS[0]}: set CONFIG_HEADER and CONFIGS, or CONFIG_HEADER=-`);
  return { began: Date.now(), status };
}

// POST, because k6's HTTP client repeats a GET silently when a kept connection was closed.
export function send({ began, status }) {
  const second = (Date.now() - began) / 1000;
  const response = post(TARGET);
  record(response, response.status === status, `status ${status}`);
  const phase = Math.floor(second / PHASE);
  if (HEADER !== '-' && phase < 4 && second - phase * PHASE > SETTLE && second < (phase + 1) * PHASE - 0.2) {
    applied.add(field(response, HEADER) === EXPECTED[phase], { phase: String(phase) });
  }
}
