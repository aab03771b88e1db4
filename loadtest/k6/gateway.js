// What a user of the gateway relies on, against `tidegate demo`: hits come from the cache, one device stays within its limit, and a broken
// upstream becomes a page. Any threshold that fails makes k6 exit with 99. Base URL: TARGET, default http://127.0.0.1:8080. Takes 25 s at most.

import http from 'k6/http';
import { check, sleep } from 'k6';
import { Rate } from 'k6/metrics';

const TARGET = (__ENV.TARGET || 'http://127.0.0.1:8080').replace(/\/+$/, '');

// The route of /flaky rests its upstream for 3 s once its breaker opens; what comes after is a ramp.
const BROKEN_SECONDS = 4;
const MENDED_SECONDS = 9;

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
    // Four times what the limit of 5/s lets through.
    limit: {
      executor: 'constant-arrival-rate', exec: 'limit', startTime: '6s', rate: 20, duration: '5s',
      preAllocatedVUs: 4, gracefulStop: '1s',
    },
    degrade: {
      executor: 'per-vu-iterations', exec: 'degrade', startTime: '11s', vus: 1, iterations: 1,
      maxDuration: `${BROKEN_SECONDS + MENDED_SECONDS + 1}s`, gracefulStop: '1s',
    },
  },
  thresholds: {
    // A count beside each rate: a scenario that sent nothing has not passed.
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
  const answer = http.post(`${TARGET}${path}`);
  if (answer.status < 200 || answer.status > 299) {
    throw new Error(`POST ${path} at ${TARGET}: ${answer.status} ${answer.error}`);
  }
}

export function setup() {
  const answer = http.get(`${TARGET}/fast`);
  if (answer.status !== 200) {
    throw new Error(`GET /fast at ${TARGET}: ${answer.status} ${answer.error}`);
  }
  post('/demo/mend');
}

export function teardown() {
  post('/demo/mend');
}

export function hit() {
  const answer = http.get(`${TARGET}/fast`, expect(200));
  cacheHits.add(isHit(answer.headers['Cache-Status']));
}

// RFC 9211: a list of caches, the nearest to the origin first; `hit` is a parameter of the one that answered.
function isHit(status) {
  const nearest = (status || '').split(',').pop();
  return nearest.split(';').slice(1).some((parameter) => /^\s*hit\s*(=\s*\?1\s*)?$/.test(parameter));
}

export function limit() {
  const answer = http.get(`${TARGET}/limited`, {
    headers: { 'x-device-id': 'k6' },
    ...expect(200, 429),
  });
  limited.add(answer.status === 429);
  if (answer.status === 429) {
    limitedHeaders.add(/^[0-9]+$/.test(answer.headers['Retry-After'] || '') && has(answer, 'RateLimit'));
  }
}

// k6 gives header names in Go's canonical form, in which `RateLimit` is `Ratelimit`.
function has(answer, name) {
  return Object.keys(answer.headers).some((key) => key.toLowerCase() === name.toLowerCase());
}

export function degrade() {
  post('/demo/break');
  // Until the breaker has seen its minimum of calls, the origin's own 500 may pass.
  for (const end = Date.now() + BROKEN_SECONDS * 1000, forms = ['text/html', 'application/json']; Date.now() < end; forms.reverse()) {
    const answer = flaky(forms[0], 200, 500, 503);
    degraded.add(answer.status === 503);
    if (answer.status === 503) {
      degradedHeaders.add(has(answer, 'Retry-After') && /\bno-store\b/.test(answer.headers['Cache-Control'] || ''));
      const type = answer.headers['Content-Type'] || '';
      check(answer, {
        'the page is in the form asked for': () => type.startsWith(forms[0] === 'text/html' ? 'text/html' : 'application/problem+json'),
      });
    }
    sleep(0.05);
  }

  post('/demo/mend');
  let status = 0;
  for (const end = Date.now() + MENDED_SECONDS * 1000; status !== 200 && Date.now() < end; sleep(0.2)) {
    status = flaky('text/html', 200, 500, 503).status;
  }
  recovered.add(status === 200);
}

function flaky(accept, ...statuses) {
  const answer = http.get(`${TARGET}/flaky`, { headers: { accept }, ...expect(...statuses) });
  badGateway.add(answer.status === 502);
  return answer;
}
