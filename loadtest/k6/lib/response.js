// Fields of responses.

// k6 returns names in Go's canonical form, in which `RateLimit` is `Ratelimit`; over HTTP/2 they
// are lower case.
export function field(response, name) {
  const key = Object.keys(response.headers).find((it) => it.toLowerCase() === name.toLowerCase());
  return key === undefined ? '' : response.headers[key];
}

// `Cache-Status` (RFC 9211) of the cache nearest to the client, which is the last one of the list.
// `isHit`: served from the cache; `isForwarded`: this request was sent to the origin;
// `isCollapsed`: it joined another one's.
export function cacheStatus(response) {
  const members = field(response, 'Cache-Status').split(/,(?=(?:[^"]*"[^"]*")*[^"]*$)/);
  const parameters = members[members.length - 1].split(';').slice(1).map((it) => it.trim());
  const has = (name) => parameters.some((it) => it === name || it === `${name}=?1`);
  const value = (name) => (parameters.find((it) => it.startsWith(`${name}=`)) || '').slice(name.length + 1);
  const isCollapsed = has('collapsed');
  return {
    isPresent: field(response, 'Cache-Status') !== '',
    isHit: has('hit'),
    isCollapsed,
    isForwarded: value('fwd') !== '' && !isCollapsed,
    ttl: Number(value('ttl')),
    detail: value('detail').replace(/"/g, ''),
  };
}
