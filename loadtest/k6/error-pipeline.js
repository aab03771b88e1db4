// Field case error-pipeline: every failure is classified once, and the response, the metric, the
// log line and the request id tell the same.
//
// Needs: a path for each kind of failure; those of the defaults need
// loadtest/k6/config/error-pipeline.toml. On another gateway, leave out kinds with KINDS.
//
//   KINDS      kinds of failure to cause, separated by commas; default
//              no_route,limited,forbidden,connect,timeout,origin
//   <KIND>_PATH  the path that causes it, such as TIMEOUT_PATH; default /errors/<kind>
//   OK_PATH    a path without failure; default /live/ok
//   RATE       requests per second for each kind; default 10 (short), 50 (long)
//   SECONDS    default 8 (short), 60 (long)
//   and BASE_URL, FORM, INSECURE, P99_MS of lib/settings.js

import exec from 'k6/execution';
import { Counter } from 'k6/metrics';
import { byForm, list, number, text } from './lib/settings.js';
import { optionsOf, steady } from './lib/load.js';
import { get } from './lib/request.js';
import { field } from './lib/response.js';
import { need, needPath } from './lib/precondition.js';
import { record } from './lib/outcome.js';

export { announce } from './lib/events.js';
export { handleSummary } from './lib/summary.js';

// Status, and whether the response is the gateway's own: it then names the request id, and is never
// stored.
const EXPECTED = {
  no_route: [404, true],
  limited: [429, true],
  forbidden: [403, true],
  connect: [503, true],
  timeout: [503, true],
  origin: [500, false],
};

const KINDS = list('KINDS', Object.keys(EXPECTED).join(','));
const PATHS = Object.fromEntries(KINDS.map((kind) => [kind, text(`${kind.toUpperCase()}_PATH`, `/errors/${kind}`)]));
const OK_PATH = text('OK_PATH', '/live/ok');

const responses = new Counter('responses');

for (const kind of KINDS) {
  if (EXPECTED[kind] === undefined) {
    throw new Error(`KINDS: no kind ${kind}; there are: ${Object.keys(EXPECTED).join(', ')}`);
  }
}

const rate = number('RATE', byForm(10, 50)) * (KINDS.length + 1);

export const options = optionsOf({
  scenarios: { mixed: steady({ exec: 'mixed', rate, seconds: number('SECONDS', byForm(8, 60)), iterationSeconds: 1 }) },
  thresholds: Object.fromEntries([...KINDS, 'ok'].map((kind) => [`responses{kind:${kind}}`, ['count>0']])),
  p99: byForm(2000, 500),
});

export function setup() {
  needPath(OK_PATH, 'OK_PATH');
  for (const kind of KINDS) {
    // The first request of a limit may pass.
    get(PATHS[kind]);
    const { status } = get(PATHS[kind]);
    const [expected] = EXPECTED[kind];
    const hint = `set ${kind.toUpperCase()}_PATH to a path with the failure ${kind}, or leave ${kind} out of KINDS`;
    need(status === expected, `GET ${PATHS[kind]} has status ${status}, not ${expected}: ${hint}`);
  }
}

function isAsExpected(response, status, isOwn) {
  const id = field(response, 'X-Request-Id');
  if (response.status !== status || id === '') {
    return false;
  }
  if (!isOwn) {
    return true;
  }
  const type = field(response, 'Content-Type');
  return type.startsWith('application/problem+json') && JSON.parse(response.body).status === status;
}

export function mixed() {
  const kinds = [...KINDS, 'ok'];
  const kind = kinds[exec.scenario.iterationInTest % kinds.length];
  const [status, isOwn] = kind === 'ok' ? [200, false] : EXPECTED[kind];
  const response = get(kind === 'ok' ? OK_PATH : PATHS[kind], { headers: { accept: 'application/json' }, body: 'text', name: kind });
  const description = `status ${status} with X-Request-Id${isOwn ? ' and a problem document' : ''}`;
  record(response, isAsExpected(response, status, isOwn), description, { kind });
  if (response.status === status) {
    responses.add(1, { kind });
  }
}
