"""httpx with h2 as a client of HTTP/2. Prints one line for each failure, and "ok"."""

import asyncio
import sys

import httpx


async def main(base):
    failures = []
    large = b"x" * 300_000

    async def check(client, method, path, body, expected):
        try:
            response = await client.request(method, base + path, content=body)
        except httpx.HTTPError as error:
            failures.append(f"{method} {path}: {error!r}")
            return
        if (response.status_code, response.http_version, response.content) != (200, "HTTP/2", expected):
            failures.append(f"{method} {path}: {response.status_code} {response.http_version} {len(response.content)}")

    limits = httpx.Limits(max_connections=2)
    async with httpx.AsyncClient(http1=False, http2=True, verify=False, limits=limits, timeout=30) as client:
        checks = []
        for number in range(40):
            checks.append(check(client, "GET", f"/stored/{number % 5}", None, b"stored"))
            checks.append(check(client, "GET", "/large", None, large))
            body = large[: 1000 * number]
            checks.append(check(client, "POST", "/up", body, b"%d bytes" % len(body)))
        await asyncio.gather(*checks)
    print("\n".join(failures) if failures else "ok")


asyncio.run(main(sys.argv[1]))
