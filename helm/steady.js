// A steady rate of requests for helm/test-kubernetes.sh: an open model, so that a slow gateway does not lower the rate.
// Environment: BASE_URL, RATE (requests/s), SECONDS; SLOW=1 asks for a page that takes 1.5 s.
// POST: Go's client, which k6 uses, sends a GET again when a kept connection closes, and a lost request would not be seen.
import http from 'k6/http';

const seconds = Number(__ENV.SECONDS);

export const options = {
  scenarios: {
    steady: {
      executor: 'constant-arrival-rate',
      rate: Number(__ENV.RATE),
      timeUnit: '1s',
      duration: `${seconds}s`,
      preAllocatedVUs: 50,
      maxVUs: 400,
      gracefulStop: '10s',
    },
  },
  summaryTrendStats: ['p(50)', 'p(99)', 'max'],
};

export default function () {
  const params = { timeout: '10s', redirects: 0 };
  const response = __ENV.SLOW
    ? http.get(`${__ENV.BASE_URL}/slow`, params)
    : http.post(`${__ENV.BASE_URL}/demo/mend`, 'x', params);
  if (response.status !== 200) {
    console.error(`${new Date().toISOString()} status ${response.status} ${response.error}`);
  }
}

export function handleSummary(data) {
  const { http_reqs, http_req_failed, http_req_duration, dropped_iterations } = data.metrics;
  const figures = {
    requests: http_reqs.values.count,
    failed: http_req_failed.values.passes,
    dropped: dropped_iterations ? dropped_iterations.values.count : 0,
    p50: http_req_duration.values['p(50)'],
    p99: http_req_duration.values['p(99)'],
  };
  return { stdout: `${JSON.stringify(figures)}\n` };
}
