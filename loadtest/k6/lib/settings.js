// Settings of a script from the environment (`k6 run -e NAME=VALUE`), checked when the script is
// loaded.
//
//   BASE_URL   URL of the gateway, http or https; default http://127.0.0.1:8080
//   FORM       `short` (seconds, low rates, generous latencies) or `long`; default long
//   INSECURE   1: certificates are not verified
//   P99_MS     bound of the 99th percentile of response times, in place of the script's own

const FORMS = ['short', 'long'];

export function text(name, fallback) {
  return __ENV[name] || fallback;
}

export function number(name, fallback) {
  const value = __ENV[name] ? Number(__ENV[name]) : fallback;
  if (!Number.isFinite(value) || value < 0) {
    throw new Error(`${name}=${__ENV[name]}: not a number from 0`);
  }
  return value;
}

// Items separated by commas.
export function list(name, fallback) {
  return text(name, fallback).split(',').map((item) => item.trim()).filter((item) => item !== '');
}

// A URL without its final slash; '' if there is none.
export function url(name, fallback) {
  const value = text(name, fallback).replace(/\/+$/, '');
  if (value !== '' && !/^https?:\/\/[^/?#]+/.test(value)) {
    throw new Error(`${name}=${value}: not a URL such as https://gateway.example`);
  }
  return value;
}

export const form = text('FORM', 'long');
if (!FORMS.includes(form)) {
  throw new Error(`FORM=${form}: use ${FORMS.join(' or ')}`);
}

export const BASE_URL = url('BASE_URL', 'http://127.0.0.1:8080');

export function byForm(short, long) {
  return form === 'short' ? short : long;
}
