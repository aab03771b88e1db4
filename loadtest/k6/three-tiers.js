// Field case three-tiers: limits by device, node and cluster decide together. Polite devices are
// never denied while one device exceeds its limit; a crowd of polite devices is held to the limit
// of the node, and of the fleet.
//
// Needs: a path with a limit by device (a header that names the device), one with a limit by node,
// one with a cluster limit. RateLimit headers are not needed. The accepted writes of this case (202
// and replay) are not part of the script: the gateway does not have them yet.
//
//   DEVICE_PATH, NODE_PATH, CLUSTER_PATH     default /live/device, /live/node, /live/cluster
//   DEVICE_HEADER                            default x-device-id
//   DEVICE_RATE, DEVICE_BURST                default 10, 10
//   NODE_RATE, NODE_BURST                    of one gateway; default 60, 60
//   CLUSTER_RATE, CLUSTER_BURST              default 80, 80
//   PEER_URLS  further gateways of the fleet, separated by commas; default none
//   SECONDS    of each of the three phases; default 5 (short), 30 (long)
//   and BASE_URL, FORM, INSECURE, P99_MS of lib/settings.js

import exec from 'k6/execution';
import { Counter } from 'k6/metrics';
import { BASE_URL, byForm, list, number, text } from './lib/settings.js';
import { optionsOf, steady } from './lib/load.js';
import { get } from './lib/request.js';
import { field } from './lib/response.js';
import { needPath } from './lib/precondition.js';
import { record } from './lib/outcome.js';

export { announce } from './lib/events.js';
export { handleSummary } from './lib/summary.js';

const DEVICE_PATH = text('DEVICE_PATH', '/live/device');
const NODE_PATH = text('NODE_PATH', '/live/node');
const CLUSTER_PATH = text('CLUSTER_PATH', '/live/cluster');
const DEVICE_HEADER = text('DEVICE_HEADER', 'x-device-id');
const FLEET = [BASE_URL, ...list('PEER_URLS', '')];
const SECONDS = number('SECONDS', byForm(5, 30));
const POLITE_DEVICES = 5;
// Load of the crowds, as a multiple of the limit.
const EXCESS = byForm(2, 3);

const quota = (scope, rate) => ({ rate: number(`${scope}_RATE`, rate), burst: number(`${scope}_BURST`, rate) });
const DEVICE = quota('DEVICE', 10);
const NODE = quota('NODE', 60);
const CLUSTER = quota('CLUSTER', 80);

const admitted = new Counter('admitted');
const denied = new Counter('denied');

// At most rate * t + burst, where a late arrival may be admitted a second after the end of the
// phase.
function bounds({ rate, burst }, least) {
  return [`count>=${Math.floor(least * rate * SECONDS)}`, `count<=${Math.ceil(rate * (SECONDS + 1) + burst)}`];
}

export const options = optionsOf({
  scenarios: {
    polite: steady({ exec: 'polite', rate: Math.max(1, Math.floor(0.5 * POLITE_DEVICES * DEVICE.rate)), seconds: SECONDS }),
    abusive: steady({ exec: 'abusive', rate: 4 * DEVICE.rate, seconds: SECONDS }),
    node: steady({ exec: 'node', rate: EXCESS * NODE.rate, seconds: SECONDS, start: SECONDS }),
    cluster: steady({ exec: 'cluster', rate: EXCESS * CLUSTER.rate, seconds: SECONDS, start: 2 * SECONDS }),
  },
  thresholds: {
    'denied{scenario:polite}': ['count==0'],
    'admitted{scenario:abusive}': bounds(DEVICE, 0.9),
    'admitted{scenario:node}': bounds(NODE, 0.9),
    // A lease begins empty, and a part of it is held by each node.
    'admitted{scenario:cluster}': bounds(CLUSTER, 0.6),
  },
  p99: byForm(2000, 20),
});

export function setup() {
  needPath(DEVICE_PATH, 'DEVICE_PATH');
  needPath(NODE_PATH, 'NODE_PATH');
  for (const base of FLEET) {
    needPath(CLUSTER_PATH, 'CLUSTER_PATH', { base });
  }
}

function ask(path, device, base = BASE_URL) {
  const response = get(path, { base, headers: { [DEVICE_HEADER]: device } });
  const isDenied = response.status === 429;
  record(response, isDenied ? field(response, 'Retry-After') !== '' : response.status === 200, 'status 200, or 429 with Retry-After');
  (isDenied ? denied : admitted).add(1);
}

export function polite() {
  ask(DEVICE_PATH, `polite-${exec.scenario.iterationInTest % POLITE_DEVICES}`);
}

export function abusive() {
  ask(DEVICE_PATH, 'abusive');
}

export function node() {
  ask(NODE_PATH, `crowd-${exec.scenario.iterationInTest}`);
}

export function cluster() {
  ask(CLUSTER_PATH, `crowd-${exec.scenario.iterationInTest}`, FLEET[exec.scenario.iterationInTest % FLEET.length]);
}
