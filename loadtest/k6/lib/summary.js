// The end of a run: a table of all thresholds on standard output, and a JSON summary in the file
// SUMMARY if that is set. An HTML report with charts over time is k6's own: K6_WEB_DASHBOARD=true
// K6_WEB_DASHBOARD_EXPORT=report.html.

import { form, text } from './settings.js';

// The value that a threshold such as `p(99)<500` is about.
function valueOf(metric, expression) {
  const name = /^[a-z]+(\([0-9.]+\))?/.exec(expression)[0];
  const value = metric.values[name];
  return value === undefined ? null : value;
}

function thresholdsOf(data) {
  return Object.entries(data.metrics).flatMap(([name, metric]) =>
    Object.entries(metric.thresholds || {}).map(([expression, { ok }]) => ({
      metric: name, expression, ok, value: valueOf(metric, expression),
    })));
}

function rounded(value) {
  return value === null ? '-' : String(Math.round(value * 10000) / 10000);
}

export function handleSummary(data) {
  const values = (name) => (data.metrics[name] || { values: {} }).values;
  const thresholds = thresholdsOf(data);
  const summary = {
    form,
    seconds: data.state.testRunDurationMs / 1000,
    requests: values('http_reqs').count || 0,
    p99_ms: values('response_ms')['p(99)'] || 0,
    errors: values('errors').passes || 0,
    dropped: values('dropped_iterations').count || 0,
    is_passed: thresholds.every((it) => it.ok),
    thresholds,
    metrics: data.metrics,
  };
  const rows = thresholds.map((it) => `${it.ok ? 'ok     ' : 'FAILED '} ${it.metric}: ${it.expression} (${rounded(it.value)})`);
  const files = { stdout: `${rows.join('\n')}\n` };
  if (text('SUMMARY', '') !== '') {
    files[text('SUMMARY')] = JSON.stringify(summary, null, 2);
  }
  return files;
}
