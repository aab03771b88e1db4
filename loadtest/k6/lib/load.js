// Scenarios of the open model (arrivals do not wait for responses), and the options that all
// scripts share.

import { byForm, number, text } from './settings.js';
import { events } from './events.js';

// Arrivals that may be dropped because all virtual users are busy: a machine that is busy with
// other work drops some.
const DROPPED_SHARE = byForm(0.1, 0.001);
// Longest mean time of an iteration for which virtual users are prepared.
const ITERATION_SECONDS = byForm(1, 0.25);
const VUS_MAX = 2000;

function virtualUsers(rate, seconds) {
  return Math.min(VUS_MAX, Math.max(10, Math.ceil(rate * (seconds || ITERATION_SECONDS))));
}

// `rate` iterations per second of function `exec` for `seconds`, beginning at second `start`.
// `iterationSeconds`: mean time of one iteration, if it is long.
export function steady({ exec, rate, seconds, start = 0, iterationSeconds, tags, env }) {
  const users = virtualUsers(rate, iterationSeconds);
  return {
    executor: 'constant-arrival-rate', exec, rate, timeUnit: '1s', duration: `${seconds}s`, startTime: `${start}s`,
    preAllocatedVUs: users, maxVUs: users, gracefulStop: '10s', tags, env,
  };
}

// Rates that change: `stages` are pairs of rate and seconds.
export function ramp({ exec, from, stages, start = 0, iterationSeconds, tags, env }) {
  const users = virtualUsers(Math.max(from, ...stages.map(([rate]) => rate)), iterationSeconds);
  return {
    executor: 'ramping-arrival-rate', exec, startRate: from, timeUnit: '1s', startTime: `${start}s`,
    stages: stages.map(([target, seconds]) => ({ target, duration: `${seconds}s` })),
    preAllocatedVUs: users, maxVUs: users, gracefulStop: '10s', tags, env,
  };
}

function seconds(duration) {
  return Number(duration.replace(/s$/, ''));
}

// Iterations that arrive in a scenario.
export function arrivals(scenario) {
  if (scenario.executor === 'constant-arrival-rate') {
    return scenario.rate * seconds(scenario.duration);
  }
  let rate = scenario.startRate;
  let total = 0;
  for (const stage of scenario.stages || []) {
    total += ((rate + stage.target) / 2) * seconds(stage.duration);
    rate = stage.target;
  }
  return total;
}

// Options of a script: its scenarios and thresholds, with those that every script has. `p99` is the
// bound of `response_ms` in milliseconds, `errors` the share of unexpected responses. `plan`:
// events of the run (events.js).
export function optionsOf({ scenarios, thresholds, p99, errors = 0, plan = [], more = {} }) {
  const total = Object.values(scenarios).reduce((sum, scenario) => sum + arrivals(scenario), 0);
  return {
    scenarios: { events: events([[0, 'begin', 'the load begins'], ...plan]), ...scenarios },
    thresholds: {
      errors: [`rate<=${errors}`],
      response_ms: [`p(99)<${number('P99_MS', p99)}`],
      dropped_iterations: [`count<=${Math.ceil(total * DROPPED_SHARE)}`],
      ...thresholds,
    },
    discardResponseBodies: true,
    insecureSkipTLSVerify: text('INSECURE', '') === '1',
    summaryTrendStats: ['avg', 'min', 'med', 'max', 'p(90)', 'p(95)', 'p(99)', 'count'],
    setupTimeout: '60s',
    ...more,
  };
}
