// Checks of `setup()`: what a script needs of the gateway. A missing precondition ends the run
// before any load, with a message that says what to change; k6 exits with 108.

import exec from 'k6/execution';
import { BASE_URL } from './settings.js';
import { get } from './request.js';
import { cacheStatus, field } from './response.js';

export function need(isMet, message) {
  if (!isMet) {
    exec.test.abort(`precondition: ${message}`);
  }
}

// The response to `path`, which must have status 200.
export function needPath(path, setting = 'TARGET', parameters = {}) {
  const response = get(path, parameters);
  const base = parameters.base || BASE_URL;
  need(response.status !== 0, `no response from ${base} (${response.error}): start the gateway, or set BASE_URL`);
  const hint = response.status >= 500 ? 'is its origin running?' : `set ${setting} to a path that exists`;
  need(response.status === 200, `GET ${base}${path} has status ${response.status}, not 200: ${hint}`);
  return response;
}

// `path` must be stored by a cache that sends `Cache-Status`.
export function needCache(path, setting = 'TARGET', parameters = {}) {
  needCacheStatus(path, setting, parameters);
  let status = cacheStatus(needPath(path, setting, parameters));
  for (let tries = 0; !status.isHit && tries < 3; tries += 1) {
    status = cacheStatus(needPath(path, setting, parameters));
  }
  need(status.isHit, `GET ${path} is not served from the cache (detail "${status.detail}"): set ${setting} to a path whose response is cacheable`);
}

export function needCacheStatus(path, setting = 'TARGET', parameters = {}) {
  const { isPresent } = cacheStatus(needPath(path, setting, parameters));
  need(isPresent, `GET ${path} has no Cache-Status field: BASE_URL is not a caching gateway, or a proxy in front of it removes the field`);
}

// The quota that `RateLimit-Policy` tells about a request with `headers`.
export function needQuota(path, setting = 'TARGET', parameters = {}) {
  const response = get(path, parameters);
  need(response.status !== 0, `no response from ${BASE_URL} (${response.error}): start the gateway, or set BASE_URL`);
  const quota = /;\s*q=(\d+)/.exec(field(response, 'RateLimit-Policy'));
  const hint = `set ${setting} to a path with a limit (and limits.NAME.headers to "all" or "policy")`;
  need(quota !== null, `GET ${path} has no RateLimit-Policy field: ${hint}`);
  return Number(quota[1]);
}
