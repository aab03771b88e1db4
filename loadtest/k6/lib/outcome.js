// What is judged about each response: whether it is as expected (`errors`), and its time
// (`response_ms`). Both have the tags of the scenario and those that the caller adds.

import http from 'k6/http';
import { Rate, Trend } from 'k6/metrics';

const errors = new Rate('errors');
const responseTime = new Trend('response_ms', true);

// `http_req_failed` counts requests without a response only: which statuses are expected is the
// script's to say.
http.setResponseCallback(http.expectedStatuses({ min: 100, max: 599 }));

// The first error of each virtual user is logged; all are counted.
let isLogged = false;

// Counts one response. `isExpected` false: an error, described by `expectation`.
export function record(response, isExpected, expectation, tags = {}) {
  errors.add(!isExpected, tags);
  responseTime.add(response.timings.duration, tags);
  if (!isExpected && !isLogged) {
    isLogged = true;
    const got = response.status === 0 ? `no response (${response.error})` : `status ${response.status}`;
    console.warn(`error: ${response.request.method} ${response.request.url}: ${got}; expected: ${expectation}`);
  }
  return isExpected;
}

// A response whose time is not judged, such as one that the client gave up.
export function recordError(isError, description, tags = {}) {
  errors.add(isError, tags);
  if (isError && !isLogged) {
    isLogged = true;
    console.warn(`error: ${description}`);
  }
}
