// Field case event-bus: a purge that all gateways of a fleet have acknowledged applies on all of
// them; one for a single gateway applies there only; and a gateway that was away applies the purges
// that it missed when it is back.
//
// Needs: ADMIN_URL; PEER_URLS, at least one further gateway with the same Redis; a cacheable path
// whose responses have a surrogate key in the path and a version in a response field that grows
// with each request at the origin. Events: `away` (the first peer is stopped, so that it is not
// reached), `back`.
//
//   TAGGED_PATH    prefix of the path; TAG/page is added; default /tagged/
//   VERSION_HEADER default x-version
//   READ_RATE      requests per second, over all gateways; default 60 (short), 500 (long)
//   PURGE_RATE     purges per second; default 3 (short), 5 (long)
//   SECONDS        of purges; default 7 (short), 60 (long)
//   PURGE_MS       bound of the 99th percentile of a purge, to the acknowledgement of all; default
//                  2000 (short), 200 (long)
//   and BASE_URL, FORM, INSECURE, P99_MS of lib/settings.js; ADMIN_URL, ADMIN_TOKEN of lib/admin.js

import exec from 'k6/execution';
import { sleep } from 'k6';
import { Counter, Rate, Trend } from 'k6/metrics';
import { BASE_URL, byForm, list, number, text } from './lib/settings.js';
import { optionsOf, steady } from './lib/load.js';
import { get } from './lib/request.js';
import { field } from './lib/response.js';
import { need, needCache } from './lib/precondition.js';
import { adminPost, needAdmin } from './lib/admin.js';
import { record, recordError } from './lib/outcome.js';

export { announce } from './lib/events.js';
export { handleSummary } from './lib/summary.js';

const PREFIX = text('TAGGED_PATH', '/tagged/');
const VERSION = text('VERSION_HEADER', 'x-version');
const PEERS = list('PEER_URLS', '');
const FLEET = [BASE_URL, ...PEERS];
const SECONDS = number('SECONDS', byForm(7, 60));
const READ_KEYS = 20;
// After `away`: purges, which the stopped gateway cannot acknowledge; a purge waits 3 s for it.
const AWAY = SECONDS + 2;
const PURGE_AWAY = AWAY + 1;
const BACK = PURGE_AWAY + 5;
const CHECK = BACK + 2;

const purgeTime = new Trend('purge_ms', true);
const oldVersions = new Counter('old_versions');
const acknowledged = new Rate('acknowledged');
const unacknowledged = new Rate('unacknowledged_while_away');
const unicast = new Rate('unicast_is_local');
const caughtUp = new Rate('caught_up');

const once = (name, start) => ({ executor: 'per-vu-iterations', exec: name, vus: 1, iterations: 1, startTime: `${start}s`, maxDuration: '20s' });

export const options = optionsOf({
  scenarios: {
    reads: steady({ exec: 'read', rate: number('READ_RATE', byForm(60, 500)), seconds: SECONDS }),
    purges: steady({ exec: 'purge', rate: number('PURGE_RATE', byForm(3, 5)), seconds: SECONDS, iterationSeconds: 4 }),
    single: once('purgeOne', SECONDS),
    away: once('purgeAway', PURGE_AWAY),
    back: once('checkBack', CHECK),
  },
  thresholds: {
    old_versions: ['count==0'],
    acknowledged: ['rate==1'],
    unicast_is_local: ['rate==1'],
    unacknowledged_while_away: ['rate==1'],
    caught_up: ['rate==1'],
    purge_ms: [`p(99)<${number('PURGE_MS', byForm(2000, 200))}`],
  },
  p99: byForm(3000, 50),
  plan: [[AWAY, 'away', 'stop the process of the first peer (SIGSTOP)'], [BACK, 'back', 'let it continue (SIGCONT)']],
});

export function setup() {
  const { node } = needAdmin();
  need(PEERS.length > 0, 'PEER_URLS is not set: the script needs a second gateway with the same Redis');
  for (const base of FLEET) {
    needCache(`${PREFIX}first/page`, 'TAGGED_PATH', { base });
  }
  need(field(get(`${PREFIX}first/page`), VERSION) !== '', `responses have no field ${VERSION}: set VERSION_HEADER`);
  return { node, run: Date.now() };
}

function version(base, tag) {
  const response = get(`${PREFIX}${tag}/page`, { base, name: 'tagged' });
  record(response, response.status === 200, 'status 200');
  return Number(field(response, VERSION));
}

function highest(tag) {
  return Math.max(...FLEET.map((base) => version(base, tag)));
}

export function read() {
  const number = exec.scenario.iterationInTest;
  version(FLEET[number % FLEET.length], `read-${number % READ_KEYS}`);
}

// Purges a tag that all gateways have in memory, and reads it from each of them again.
export function purge({ run }) {
  const tag = `k6-${run}-${exec.scenario.iterationInTest}`;
  const before = highest(tag);
  const response = adminPost(`/api/v1/purge?tag=${tag}`);
  acknowledged.add(response.status === 200);
  recordError(response.status !== 200, `purge: status ${response.status}: ${response.body}`);
  purgeTime.add(response.timings.duration);
  for (const base of FLEET) {
    oldVersions.add(version(base, tag) > before ? 0 : 1);
  }
}

// Purges one gateway only: the others keep their copies.
export function purgeOne({ node, run }) {
  const tag = `k6-${run}-single`;
  highest(tag);
  const copies = PEERS.map((base) => version(base, tag));
  const response = adminPost(`/api/v1/purge?tag=${tag}&node=${node}`);
  recordError(response.status !== 200, `purge of one node: status ${response.status}: ${response.body}`);
  PEERS.forEach((base, at) => unicast.add(version(base, tag) === copies[at]));
  // All gateways have a copy of the tag that is purged while one is away.
  highest(awayTag(run));
}

function awayTag(run) {
  return `k6-${run}-away`;
}

// A gateway is away: the purge says which one has not acknowledged it.
export function purgeAway({ run }) {
  const response = adminPost(`/api/v1/purge?tag=${awayTag(run)}`);
  unacknowledged.add(response.status === 202 && response.json('unacknowledged_nodes').length > 0);
}

export function checkBack({ run }) {
  // The version of the gateway that was reached all the time is one that was fetched after the
  // purge.
  const fresh = version(BASE_URL, awayTag(run));
  sleep(0.5);
  for (const base of PEERS) {
    caughtUp.add(version(base, awayTag(run)) >= fresh && fresh > 1);
  }
}
