// Tables that are updated in place: routes, endpoints, limits, shards, hot keys, certificates.

import { byId, make, setClass, setText, sync } from "./dom.js";
import { bytes, clock, day, duration, millis, number, percent } from "./format.js";

/// A column: its title, the text of a row, and where it differs its tone or the class of its cell.
const column = (title, text, { tone = () => "", cell = "" } = {}) => ({ title, text, tone, cell });

/// Writes the rows of a table. The first column names the row.
export function fill(id, columns, rows, { key, empty }) {
  const table = byId(id);
  if (!table.tBodies.length) table.append(head(columns), make("tbody"));
  const items = rows.length ? rows : [null];
  sync(table.tBodies[0], items, {
    key: row => row ? key(row) : "",
    create: row => row ? createRow(columns) : emptyRow(columns, empty),
    update: (node, row) => { if (row) updateRow(node, columns, row); },
  });
}

function head(columns) {
  const row = make("tr");
  row.append(...columns.map(({ title, cell }) => {
    const node = make("th", title, cell);
    node.scope = "col";
    return node;
  }));
  const part = make("thead");
  part.append(row);
  return part;
}

function emptyRow(columns, text) {
  const row = make("tr", "", "empty");
  const cell = make("td", text);
  cell.colSpan = columns.length;
  row.append(cell);
  return row;
}

function createRow(columns) {
  const row = make("tr");
  columns.forEach((_, index) => row.append(make(index ? "td" : "th")));
  row.cells[0].scope = "row";
  return row;
}

function updateRow(row, columns, item) {
  columns.forEach(({ text, tone, cell }, index) => {
    const node = row.cells[index];
    const value = text(item);
    setText(node, value);
    setClass(node, [cell, tone(item)].filter(Boolean).join(" "));
    if (index === 0) node.title = value;
  });
}

const badIf = test => ({ tone: row => test(row) ? "bad" : "" });
const warnIf = test => ({ tone: row => test(row) ? "warn" : "" });

const ROUTES = [
  column("Route", route => route.name),
  column("Upstream", route => [route.upstream ?? "answers itself", route.canary && `canary ${route.canary}`,
    route.mirror && `mirror ${route.mirror}`].filter(Boolean).join(", "), { cell: "text" }),
  column("Requests/s", route => number(route.requests_per_second)),
  column("5xx/s", route => number(route.errors_per_second), badIf(route => route.errors_per_second > 0)),
  column("4xx/s", route => number(route.client_errors_per_second), warnIf(route => route.client_errors_per_second > 0)),
  column("p50", route => millis(route.p50_ms)),
  column("p99", route => millis(route.p99_ms)),
  column("Hits", route => percent(route.hit_ratio)),
  column("Degraded/s", route => number(route.degraded_per_second), badIf(route => route.degraded_per_second > 0)),
  column("Breaker", route => route.breaker ?? "–",
    { tone: route => ({ open: "bad", closed: "" })[route.breaker ?? "closed"] ?? "warn", cell: "text" }),
];

export function showRoutes(state, matches) {
  setText(byId("routes-hidden"), state.routes_hidden ? `(${state.routes_hidden} with fewer requests are not shown)` : "");
  const rows = state.routes.filter(route => matches(route.name, route.upstream));
  fill("routes-table", ROUTES, rows, { key: route => route.name, empty: "No route." });
}

const connections = endpoint => Object.entries(endpoint.connections ?? {})
  .filter(([, count]) => count > 0).map(([protocol, count]) => `${count} × HTTP/${protocol}`).join(", ") || "–";
const isUp = endpoint => endpoint.state === "available" && !endpoint.reason;

const ENDPOINTS = [
  column("Endpoint", endpoint => endpoint.name),
  column("Upstream", endpoint => endpoint.upstream, { cell: "text" }),
  column("State", endpoint => endpoint.state,
    { tone: endpoint => isUp(endpoint) ? "good" : ["out", "unreachable"].includes(endpoint.state) ? "bad" : "warn", cell: "text" }),
  column("Reason", endpoint => endpoint.reason ?? "–", { cell: "text" }),
  column("Out until", endpoint => endpoint.seconds_left === null || endpoint.seconds_left === undefined
    ? endpoint.reason ? "its checks pass" : "–" : `${clock(endpoint.time + endpoint.seconds_left)} (${duration(endpoint.seconds_left)})`),
  column("Weight", endpoint => number(endpoint.weight)),
  column("In flight", endpoint => number(endpoint.in_flight)),
  column("Calls/s", endpoint => number(endpoint.calls_per_second)),
  column("Failed/s", endpoint => number(endpoint.failures_per_second), badIf(endpoint => endpoint.failures_per_second > 0)),
  column("Sent/s", endpoint => bytes(endpoint.bytes_sent_per_second)),
  column("Received/s", endpoint => bytes(endpoint.bytes_received_per_second)),
  column("p50", endpoint => millis(endpoint.latency_p50_ms)),
  column("p99", endpoint => millis(endpoint.latency_p99_ms)),
  column("Calls", endpoint => number(endpoint.calls)),
  column("Failed", endpoint => number(endpoint.failures), warnIf(endpoint => endpoint.failures > 0)),
  column("Retried", endpoint => number(endpoint.retries), warnIf(endpoint => endpoint.retries > 0)),
  column("Sent", endpoint => bytes(endpoint.bytes_sent)),
  column("Received", endpoint => bytes(endpoint.bytes_received)),
  column("Connections", connections, { cell: "text" }),
];

const CONCURRENCY = [
  column("Upstream with a concurrency limit", upstream => upstream.name),
  column("In flight", upstream => number(upstream.concurrency.in_flight)),
  column("Limit", upstream => number(upstream.concurrency.limit)),
  column("Waiting", upstream => number(upstream.concurrency.waiting), warnIf(upstream => upstream.concurrency.waiting > 0)),
  column("Rejected", upstream => number(upstream.concurrency.rejections), warnIf(upstream => upstream.concurrency.rejections > 0)),
];

export function showUpstreams(state, matches) {
  const hiddenEndpoints = state.upstreams.reduce((sum, upstream) => sum + (upstream.endpoints_hidden ?? 0), 0);
  setText(byId("endpoints-hidden"), [state.upstreams_hidden && `${state.upstreams_hidden} upstreams`,
    hiddenEndpoints && `${hiddenEndpoints} endpoints`].filter(Boolean).map(text => `(${text} are not shown)`).join(" "));
  const rows = state.upstreams.flatMap(upstream => upstream.endpoints
    .map(endpoint => ({ ...endpoint, upstream: upstream.name, time: state.time })));
  fill("endpoints-table", ENDPOINTS, rows.filter(row => matches(row.upstream, row.name)),
    { key: row => `${row.upstream} ${row.name}`, empty: "No endpoint is known." });
  const limited = state.upstreams.filter(upstream => upstream.concurrency && matches(upstream.name));
  byId("concurrency").hidden = !limited.length;
  fill("concurrency-table", CONCURRENCY, limited, { key: upstream => upstream.name, empty: "" });
}

const LIMITS = [
  column("Rule", rule => rule.name),
  column("Scope", rule => rule.scope, { cell: "text" }),
  column("Rate", rule => rule.rate),
  column("Burst", rule => number(rule.burst)),
  column("Mode", rule => rule.override ? `${rule.override.mode} (by hand, ${duration(rule.override.ends_in_seconds)} left)` : rule.mode,
    { cell: "text", tone: rule => rule.override ? "warn" : "" }),
  column("Applies to", rule => `${rule.override?.percent ?? rule.percent} %`),
  column("Passed/s", rule => number(rule.passed_per_second)),
  column("Denied/s", rule => number(rule.denied_per_second), warnIf(rule => rule.denied_per_second > 0)),
  column("Shadow denied/s", rule => number(rule.shadow_denied_per_second)),
  column("Counted", rule => rule.local_fallback === null ? "in this process"
    : rule.local_fallback ? "here: no shared bucket" : "by shared bucket",
    { cell: "text", tone: rule => rule.local_fallback ? "warn" : "" }),
];

const DENIALS = [
  column("Caller", denial => denial.callers.join(" ")),
  column("Rule", denial => denial.rule, { cell: "text" }),
  column("Denials", denial => number(denial.denials)),
  column("First", denial => `${duration(denial.since_seconds_ago)} ago`),
  column("Last", denial => `${duration(denial.seconds_ago)} ago`),
  column("Told to wait", denial => duration(denial.retry_after_seconds)),
];

export function showLimits({ limits }) {
  setText(byId("denials-hidden"), limits.denials_hidden ? `(${limits.denials_hidden} with fewer denials are not shown)` : "");
  fill("limits-table", LIMITS, limits.rules, { key: rule => rule.name, empty: "No limit is configured." });
  fill("denials-table", DENIALS, limits.denials,
    { key: denial => denial.callers.join(" ") + denial.rule, empty: "None." });
}

const shardState = shard => shard.state === "up" ? "up"
  : [shard.failing.length ? `down: ${shard.failing.join(", ")}` : "down", shard.subscribed ? "" : "no subscription"]
    .filter(Boolean).join(", ");
const ratio = shard => shard.hits + shard.misses ? shard.hits / (shard.hits + shard.misses) : null;

const SHARDS = [
  column("Shard", shard => shard.endpoint),
  column("Region", shard => shard.region, { cell: "text" }),
  column("State", shardState, { cell: "text", tone: shard => shard.state === "up" ? "good" : "bad" }),
  column("Fault", shard => shard.fault ?? "–", { cell: "text" }),
  column("Hits", shard => number(shard.hits)),
  column("Hit ratio", shard => percent(ratio(shard))),
];

const HOT = [
  column("Key", hot => hot.key),
  column("Requests/s", hot => number(hot.per_second)),
];

export function showCache({ shards, hot, cache }) {
  fill("shards-table", SHARDS, shards, { key: shard => `${shard.region} ${shard.endpoint}`, empty: "No remote cache: memory alone." });
  fill("hot-table", HOT, hot.keys, { key: row => row.key, empty: "None." });
  setText(byId("hot-rate"), `(above ${number(hot.threshold_per_second)} requests/s)`);
}

const CERTIFICATES = [
  column("File", certificate => certificate.file),
  column("Used by", certificate => certificate.listener, { cell: "text" }),
  column("Names", certificate => certificate.names.slice(0, 5).join(", ") +
    (certificate.names.length > 5 ? ` and ${certificate.names.length - 5} more` : ""), { cell: "text wide" }),
  column("Expires", certificate => certificate.expires_at === null ? "unknown" : day(certificate.expires_at)),
  column("Left", certificate => certificate.expires_at === null ? "–"
    : certificate.left <= 0 ? "expired" : duration(certificate.left),
    { tone: certificate => certificate.left <= 0 ? "bad" : certificate.left < 14 * 86400 ? "warn" : "" }),
];

export function showCertificates({ certificates, time }) {
  const rows = certificates.map(certificate => ({ ...certificate, left: certificate.expires_at - time }));
  fill("certificates-table", CERTIFICATES, rows, { key: row => `${row.listener} ${row.file}`, empty: "No listener has TLS." });
}

const EXPLANATION = [
  column("Rule", rule => rule.name),
  column("Result", rule => rule.reason, { cell: "text wide", tone: rule => rule.reason.startsWith("denies") ? "bad" : "" }),
  column("Rate", rule => rule.rate),
  column("Burst", rule => number(rule.burst)),
  column("Remaining", rule => number(rule.remaining)),
];

export function showExplanation(rules) {
  byId("explanation").hidden = false;
  fill("explain-table", EXPLANATION, rules, { key: rule => rule.name, empty: "No limit is configured." });
}
