// Requests to the gateway and its URLs.

import http from 'k6/http';
import { BASE_URL } from './settings.js';

// Longer than any response that a script expects.
const TIMEOUT = '15s';

// `path` with a parameter, so that one route has many cache keys.
export function keyed(path, key) {
  return `${path}${path.includes('?') ? '&' : '?'}k=${key}`;
}

// GET of a path of the gateway, or of `base`. Redirects are not followed. The tag `name` keeps the
// number of time series small, whatever the number of URLs.
export function get(path, { base = BASE_URL, name = path.split('?')[0], ...more } = {}) {
  return http.get(`${base}${path}`, params({ base, name, ...more }));
}

// POST of a short text. Unlike GET, it is not sent again by k6's HTTP client when a kept connection
// was closed.
export function post(path, { base = BASE_URL, name = path.split('?')[0], ...more } = {}) {
  return http.post(`${base}${path}`, 'k6', params({ base, name, ...more }));
}

export function params({ base = BASE_URL, headers = {}, name, timeout = TIMEOUT, body = 'none' }) {
  // All gateways of a fleet are asked for the same host, which is a part of the cache key.
  const host = base === BASE_URL ? {} : { Host: BASE_URL.replace(/^https?:\/\//, '') };
  return { headers: { ...host, ...headers }, timeout, redirects: 0, responseType: body, tags: { name } };
}
