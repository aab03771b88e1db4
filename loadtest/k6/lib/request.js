// Requests to the gateway and its URLs.

import http from 'k6/http';
import { BASE_URL } from './settings.js';

// Longer than any response that a script expects.
const TIMEOUT = '15s';

// `path` with a parameter, so that one route has many cache keys.
export function keyed(path, key) {
  return `${path}${path.includes('?') ? '&' : '?'}k=${key}`;
}

// GET of a path of the gateway, or of `base`. Redirects are not followed. The tag `name` keeps the number of time series
// small, whatever the number of URLs.
export function get(path, { base = BASE_URL, headers = {}, name = path.split('?')[0], timeout = TIMEOUT, body = 'none' } = {}) {
  return http.get(`${base}${path}`, params({ headers, name, timeout, body }));
}

// POST of a short text. Unlike GET, it is not sent again by k6's HTTP client when a kept connection was closed.
export function post(path, { base = BASE_URL, headers = {}, name = path.split('?')[0], timeout = TIMEOUT, body = 'none' } = {}) {
  return http.post(`${base}${path}`, 'k6', params({ headers, name, timeout, body }));
}

export function params({ headers = {}, name, timeout = TIMEOUT, body = 'none' }) {
  return { headers, timeout, redirects: 0, responseType: body, tags: { name } };
}
