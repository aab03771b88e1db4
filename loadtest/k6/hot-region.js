// Field case hot-region: one key of a region gets most of the load, and a Redis server of that
// region hangs. The hot key is served from memory, and neither other keys of the region nor other
// regions become slower than a deadline.
//
// Needs: a cacheable path; a request header that names the region (identity.region); two regions.
// The events `fault` and `repair` are the moments at which a shard of the first region hangs and
// works again.
//
//   TARGET         the path; default /cached/orders
//   REGION_HEADER  default x-region
//   REGIONS        the hot region and another one; default beijing,shanghai
//   HOT_RATE       requests per second for the hot key; default 120 (short), 2000 (long)
//   COLD_RATE      requests per second for other keys, of each region; default 25 (short), 200
//                  (long)
//   COLD_KEYS      default 300
//   SECONDS        of each of the phases before, during and after the fault; default 4 (short), 30
//                  (long)
//   and BASE_URL, FORM, INSECURE, P99_MS of lib/settings.js

import { Rate } from 'k6/metrics';
import { byForm, list, number, text } from './lib/settings.js';
import { optionsOf, steady } from './lib/load.js';
import { get, keyed } from './lib/request.js';
import { cacheStatus } from './lib/response.js';
import { need, needCache } from './lib/precondition.js';
import { record } from './lib/outcome.js';

export { announce } from './lib/events.js';
export { handleSummary } from './lib/summary.js';

const TARGET = text('TARGET', '/cached/orders');
const HEADER = text('REGION_HEADER', 'x-region');
const [HOT, OTHER] = list('REGIONS', 'beijing,shanghai');
const COLD_KEYS = number('COLD_KEYS', 300);
const PHASE = number('SECONDS', byForm(4, 30));
const COLD_RATE = number('COLD_RATE', byForm(25, 200));

const hotHits = new Rate('hot_hits');

const seconds = 3 * PHASE;

export const options = optionsOf({
  scenarios: {
    hot: steady({ exec: 'hot', rate: number('HOT_RATE', byForm(120, 2000)), seconds }),
    cold: steady({ exec: 'cold', rate: COLD_RATE, seconds }),
    other: steady({ exec: 'other', rate: COLD_RATE, seconds }),
  },
  thresholds: {
    hot_hits: ['rate>=0.99'],
    'response_ms{scenario:hot}': [`p(99)<${byForm(2000, 20)}`],
    'response_ms{scenario:other}': [`p(99)<${byForm(2000, 50)}`],
  },
  p99: byForm(3000, 100),
  plan: [
    [PHASE, 'fault', `make one Redis server of region ${HOT} hang`],
    [2 * PHASE - 1, 'look', 'see /api/v1/hot and tidegate_shard_breaker_open'],
    [2 * PHASE, 'repair', 'let the Redis server continue'],
  ],
});

function from(region) {
  return { headers: { [HEADER]: region } };
}

export function setup() {
  const hot = `${TARGET}/hot`;
  needCache(hot, 'TARGET', from(HOT));
  const { detail } = cacheStatus(get(hot, from(HOT)));
  const hint = 'set REGION_HEADER and REGIONS as in identity.region and redis.regions';
  need(detail.includes(`${HOT}:`), `a request with ${HEADER}: ${HOT} is not in region ${HOT} (detail "${detail}"): ${hint}`);
}

function ask(path, region) {
  const response = get(path, { ...from(region), name: region });
  record(response, response.status === 200, 'status 200');
  return response;
}

export function hot() {
  hotHits.add(cacheStatus(ask(`${TARGET}/hot`, HOT)).isHit);
}

function key() {
  return keyed(TARGET, Math.floor(Math.random() * COLD_KEYS));
}

export function cold() {
  ask(key(), HOT);
}

export function other() {
  ask(key(), OTHER);
}
