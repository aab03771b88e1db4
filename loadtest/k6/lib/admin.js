// The admin address of the gateway.
//
//   ADMIN_URL    its URL, such as http://127.0.0.1:9900
//   ADMIN_TOKEN  its token, if it has one

import http from 'k6/http';
import { text, url } from './settings.js';
import { need } from './precondition.js';

export const ADMIN_URL = url('ADMIN_URL', '');

function parameters() {
  const token = text('ADMIN_TOKEN', '');
  const headers = token === '' ? {} : { Authorization: `Bearer ${token}` };
  return { headers, responseType: 'text', timeout: '15s', tags: { name: 'admin' } };
}

export function needAdmin() {
  need(ADMIN_URL !== '', 'ADMIN_URL is not set: the script needs the admin address, such as http://127.0.0.1:9900');
  const response = adminGet('/api/v1/status');
  need(response.status !== 401, `${ADMIN_URL} wants a token: set ADMIN_TOKEN`);
  const got = `GET ${ADMIN_URL}/api/v1/status has status ${response.status} ${response.error}`;
  need(response.status === 200, `${got}: set ADMIN_URL to admin.address of the gateway`);
  return response.json();
}

export function adminGet(path) {
  return http.get(`${ADMIN_URL}${path}`, parameters());
}

export function adminPost(path) {
  return http.post(`${ADMIN_URL}${path}`, null, parameters());
}

export function adminDelete(path) {
  return http.del(`${ADMIN_URL}${path}`, null, parameters());
}

// The value of a metric without labels; NaN if it has no sample.
export function metric(page, name) {
  const found = new RegExp(`^${name} ([^ \\n]+)`, 'm').exec(page);
  return found === null ? NaN : Number(found[1]);
}

// What a process holds: memory, descriptors and tasks.
export function holdings() {
  const page = adminGet('/metrics').body || '';
  const tasks = adminGet('/api/v1/tasks');
  return {
    memory: metric(page, 'process_resident_memory_bytes'),
    descriptors: metric(page, 'process_open_fds'),
    tasks: tasks.status === 200 ? tasks.json('count') : NaN,
  };
}
