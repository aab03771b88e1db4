// Checks the main features against `tidegate demo`: hits come from the cache, a device is limited,
// and a failing upstream is replaced by a degrade page. A failed threshold makes k6 exit with 99.
// Base URL: TARGET, default http://127.0.0.1:8080. Takes at most 25 s.

import http from 'k6/http';
import { check, sleep } from 'k6';
import { Rate } from 'k6/metrics';

const TARGET = (__ENV.TARGET || 'http://127.0.0.1:8080').replace(/\/+$/, '');

// The breaker of /flaky stays open for 3 s and then ramps up.
const BROKEN_SECONDS = 4;
const RECOVERY_SECONDS = 9;

const cacheHits = new Rate('cache_hits');
const limited = new Rate('limited');
const limitedHeaders = new Rate('limited_headers');
const degraded = new Rate('degraded');
const degradedHeaders = new Rate('degraded_headers');
const badGateway = new Rate('bad_gateway');
const recovered = new Rate('recovered');

export const options = {
  discardResponseBodies: true,
  scenarios: {
    hit: { executor: 'constant-vus', exec: 'hit', vus: 16, duration: '6s', gracefulStop: '1s' },
    // Twenty times the limit of 1/s, which has a burst of 5.
    limit: {
      executor: 'constant-arrival-rate', exec: 'limit', startTime: '6s', rate: 20, duration: '5s',
      preAllocatedVUs: 4, gracefulStop: '1s',
    },
    degrade: {
      executor: 'per-vu-iterations', exec: 'degrade', startTime: '11s', vus: 1, iterations: 1,
      maxDuration: `${BROKEN_SECONDS + RECOVERY_SECONDS + 1}s`, gracefulStop: '1s',
    },
  },
  thresholds: {
    // Each rate has a minimum count, so that a scenario without requests fails.
    'http_reqs{scenario:hit}': ['count>100'],
    'http_req_failed{scenario:hit}': ['rate==0'],
    cache_hits: ['rate>0.95'],
    'http_reqs{scenario:limit}': ['count>50'],
    'http_req_failed{scenario:limit}': ['rate==0'],
    limited: ['rate>0', 'rate<1'],
    limited_headers: ['rate==1'],
    'http_reqs{scenario:degrade}': ['count>20'],
    'http_req_failed{scenario:degrade}': ['rate==0'],
    degraded: ['rate>0'],
    degraded_headers: ['rate==1'],
    bad_gateway: ['rate==0'],
    recovered: ['rate==1'],
    checks: ['rate==1'],
  },
};

const expect = (...statuses) => ({ responseCallback: http.expectedStatuses(...statuses) });

function post(path) {
  const response = http.post(`${TARGET}${path}`);
  if (response.status < 200 || response.status > 299) {
    throw new Error(`POST ${path} at ${TARGET}: ${response.status} ${response.error}`);
  }
}

export function setup() {
  const response = http.get(`${TARGET}/fast`);
  if (response.status !== 200) {
    throw new Error(`GET /fast at ${TARGET}: ${response.status} ${response.error}`);
  }
  post('/demo/mend');
}

export function teardown() {
  post('/demo/mend');
}

export function hit() {
  const response = http.get(`${TARGET}/fast`, expect(200));
  cacheHits.add(isHit(response.headers['Cache-Status']));
}

// RFC 9211: a list of caches, the nearest to the origin first; `hit` is a parameter of the cache
// that responded.
function isHit(status) {
  const nearest = (status || '').split(',').pop();
  return nearest.split(';').slice(1).some((parameter) => /^\s*hit\s*(=\s*\?1\s*)?$/.test(parameter));
}

export function limit() {
  const response = http.get(`${TARGET}/limited`, {
    headers: { 'x-device-id': 'k6' },
    ...expect(200, 429),
  });
  limited.add(response.status === 429);
  if (response.status === 429) {
    limitedHeaders.add(/^[0-9]+$/.test(response.headers['Retry-After'] || '') && has(response, 'RateLimit'));
  }
}

// k6 returns header names in Go's canonical form, in which `RateLimit` is `Ratelimit`.
function has(response, name) {
  return Object.keys(response.headers).some((key) => key.toLowerCase() === name.toLowerCase());
}

export function degrade() {
  post('/demo/break');
  // Until the breaker has counted its minimum of calls, the origin's 500 is forwarded.
  for (const end = Date.now() + BROKEN_SECONDS * 1000, types = ['text/html', 'application/json']; Date.now() < end; types.reverse()) {
    const response = flaky(types[0], 200, 500, 503);
    degraded.add(response.status === 503);
    if (response.status === 503) {
      degradedHeaders.add(has(response, 'Retry-After') && /\bno-store\b/.test(response.headers['Cache-Control'] || ''));
      const contentType = response.headers['Content-Type'] || '';
      check(response, {
        'the page has the requested content type': () => contentType.startsWith(types[0] === 'text/html' ? 'text/html' : 'application/problem+json'),
      });
    }
    sleep(0.05);
  }

  post('/demo/mend');
  let status = 0;
  for (const end = Date.now() + RECOVERY_SECONDS * 1000; status !== 200 && Date.now() < end; sleep(0.2)) {
    status = flaky('text/html', 200, 500, 503).status;
  }
  recovered.add(status === 200);
}

function flaky(accept, ...statuses) {
  const response = http.get(`${TARGET}/flaky`, { headers: { accept }, ...expect(...statuses) });
  badGateway.add(response.status === 502);
  return response;
}
