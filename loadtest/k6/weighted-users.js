// Field case weighted-users: a platinum user gets WEIGHT times the rate of a standard user, neither
// more nor less. In shadow mode the same limit denies no request and counts what it would deny.
//
// Needs: a path with a limit by user, and two users of different classes. The users are sent either
// as headers (the gateway must trust the address of k6: identity.trusted_proxies) or as tokens.
//
//   TARGET       the path; default /live/account
//   USER_HEADER, TIER_HEADER         default x-user-id, x-user-tier
//   STANDARD_TOKEN, PLATINUM_TOKEN   values of `Authorization: Bearer`, in place of the headers
//   QUOTA, BURST rate per second and burst of a standard user; default 10, 10
//   WEIGHT       weight of the platinum class; default 3.2
//   SECONDS      default 8 (short), 60 (long)
//   ADMIN_URL, ADMIN_TOKEN, LIMIT    with ADMIN_URL: the limit named LIMIT (default user) is then
//                                    put into shadow mode by an override, which is removed at the
//                                    end, and a second phase shows that no request is denied
//   and BASE_URL, FORM, INSECURE, P99_MS of lib/settings.js

import { Counter } from 'k6/metrics';
import { byForm, number, text } from './lib/settings.js';
import { optionsOf, steady } from './lib/load.js';
import { get } from './lib/request.js';
import { field } from './lib/response.js';
import { need, needQuota } from './lib/precondition.js';
import { ADMIN_URL, adminDelete, adminPost, needAdmin } from './lib/admin.js';
import { record } from './lib/outcome.js';

export { announce } from './lib/events.js';
export { handleSummary } from './lib/summary.js';

const TARGET = text('TARGET', '/live/account');
const QUOTA = number('QUOTA', 10);
const BURST = number('BURST', 10);
const WEIGHT = number('WEIGHT', 3.2);
const SECONDS = number('SECONDS', byForm(8, 60));
const LIMIT = text('LIMIT', 'user');
// The burst refills before the second phase.
const SHADOW_START = SECONDS + 2;
const SHADOW_SECONDS = byForm(3, 20);

const admitted = new Counter('admitted');
const denied = new Counter('denied');

// Requests that a quota admits in a phase. A late arrival may be admitted after its end: one second
// of the rate.
function bounds(weight, seconds) {
  const expected = weight * (QUOTA * seconds + BURST);
  return [`count>=${Math.floor(0.85 * expected)}`, `count<=${Math.ceil(expected + weight * QUOTA)}`];
}

const user = (exec, rate) => steady({ exec, rate: Math.ceil(rate), seconds: SECONDS });
const shadowPhase = ADMIN_URL === '' ? {} : {
  shadow: steady({ exec: 'standard', rate: 3 * QUOTA, seconds: SHADOW_SECONDS, start: SHADOW_START }),
  override: { executor: 'per-vu-iterations', exec: 'override', vus: 1, iterations: 1, startTime: `${SECONDS}s` },
};

export const options = optionsOf({
  scenarios: {
    // Both ask for more than they get; the third one, platinum too, for more than a standard user
    // gets.
    standard: user('standard', 4 * QUOTA),
    platinum: user('platinum', 1.5 * WEIGHT * QUOTA),
    modest: user('modest', Math.max(1, 0.6 * WEIGHT * QUOTA)),
    ...shadowPhase,
  },
  thresholds: {
    'admitted{scenario:standard}': bounds(1, SECONDS),
    'admitted{scenario:platinum}': bounds(WEIGHT, SECONDS),
    'denied{scenario:modest}': ['count==0'],
    ...(ADMIN_URL === '' ? {} : { 'denied{scenario:shadow}': ['count==0'], 'admitted{scenario:shadow}': ['count>0'] }),
  },
  p99: byForm(2000, 20),
});

function caller(name, tier, token) {
  if (token !== '') {
    return { Authorization: `Bearer ${token}` };
  }
  return { [text('USER_HEADER', 'x-user-id')]: name, [text('TIER_HEADER', 'x-user-tier')]: tier };
}

const STANDARD = caller('k6-standard', 'standard', text('STANDARD_TOKEN', ''));
const PLATINUM = caller('k6-platinum', 'platinum', text('PLATINUM_TOKEN', ''));
const MODEST = caller('k6-modest', 'platinum', '');

export function setup() {
  const one = needQuota(TARGET, 'TARGET', { headers: STANDARD });
  const other = needQuota(TARGET, 'TARGET', { headers: PLATINUM });
  need(other > one, `both users have the quota ${one}: the class is accepted from identity.trusted_proxies or a verified token only`);
  if (ADMIN_URL !== '') {
    needAdmin();
    adminDelete(`/api/v1/limits/${LIMIT}`);
  }
}

function ask(headers) {
  const response = get(TARGET, { headers });
  const isDenied = response.status === 429;
  record(response, isDenied ? field(response, 'Retry-After') !== '' : response.status === 200, 'status 200, or 429 with Retry-After');
  (isDenied ? denied : admitted).add(1);
}

export function standard() {
  ask(STANDARD);
}

export function platinum() {
  ask(PLATINUM);
}

// With tokens there is no third user.
export function modest() {
  if (text('PLATINUM_TOKEN', '') === '') {
    ask(MODEST);
  }
}

export function override() {
  adminPost(`/api/v1/limits/${LIMIT}?mode=shadow&for=${SHADOW_SECONDS + 10}s`);
}

export function teardown() {
  if (ADMIN_URL !== '') {
    adminDelete(`/api/v1/limits/${LIMIT}`);
  }
}
