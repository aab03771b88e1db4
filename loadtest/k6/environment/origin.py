"""An origin whose faults can be switched while it runs. One process, HTTP/1.1, keep-alive.

The first segment of the path selects the response:

    /cached/...   cacheable for an hour           /slow/...     not cacheable, after --slow-ms
    /brief/...    cacheable for a second          /lagging/...  cacheable for an hour, after --slow-ms
    /tagged/TAG/  as cached, with Surrogate-Key   /failing/...  status 500
    all others    not cacheable

`X-Version` counts the requests for a path. Any method is answered alike. A second address has the control:
`GET /state` returns the counts as JSON, `PUT /fault?delay_ms=N&status=N` delays all responses, or gives them a status.
"""

import argparse
import asyncio
import collections
import json
import signal
import time
import urllib.parse

HEAD_BYTES_MAX = 64 << 10
CACHE_CONTROL = {
    "cached": "max-age=3600", "lagging": "max-age=3600", "tagged": "max-age=3600", "brief": "max-age=1",
}


class OriginState:
    """Counts of an origin, and its fault."""

    def __init__(self, arguments):
        self.slow = arguments.slow_ms / 1000
        self.base_delay = arguments.delay_ms / 1000
        self.padding = "x" * arguments.body_bytes
        self.delay = 0.0
        self.status = 0
        self.requests = collections.Counter()
        self.versions = collections.Counter()
        self.in_progress = 0
        self.aborted_after_ms = []

    def as_json(self):
        aborted = sorted(self.aborted_after_ms)
        return json.dumps({
            "requests": dict(self.requests), "total": sum(self.requests.values()), "paths": len(self.versions),
            "in_progress": self.in_progress, "aborted": len(aborted),
            "aborted_after_ms_median": aborted[len(aborted) // 2] if aborted else None,
        })


class OriginConnection(asyncio.Protocol):
    """One connection: requests are served in order."""

    def __init__(self, state):
        self.state = state
        self.inbox = b""
        self.task = None
        self.began = None

    def connection_made(self, transport):
        self.transport = transport

    def connection_lost(self, _error):
        if self.began is not None:
            self.state.aborted_after_ms.append(round((time.monotonic() - self.began) * 1000))
        if self.task is not None:
            self.task.cancel()

    def data_received(self, data):
        self.inbox += data
        if self.task is None:
            self.task = asyncio.get_running_loop().create_task(self.serve())

    def take_request(self):
        """Method and target of the next request, or None if it is incomplete."""
        end = self.inbox.find(b"\r\n\r\n")
        if end < 0:
            if len(self.inbox) > HEAD_BYTES_MAX:
                self.transport.close()
            return None
        lines = self.inbox[:end].decode("latin-1").split("\r\n")
        fields = dict(line.lower().split(":", 1) for line in lines[1:] if ":" in line)
        length = end + 4 + int(fields.get("content-length", "0"))
        if len(self.inbox) < length:
            return None
        self.inbox = self.inbox[length:]
        method, target, _ = lines[0].split(" ", 2)
        return method, target

    async def serve(self):
        try:
            while (request := self.take_request()) is not None:
                await self.respond(*request)
        except (ValueError, UnicodeError):
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            self.transport.close()
        finally:
            self.task = None

    async def respond(self, method, target):
        self.began = time.monotonic()
        self.state.in_progress += 1
        try:
            await self.respond_after_delay(method, target)
        finally:
            self.state.in_progress -= 1
        self.began = None

    async def respond_after_delay(self, method, target):
        state = self.state
        path = target.split("?", 1)[0]
        segments = path.split("/")
        kind = segments[1] if len(segments) > 1 else ""
        state.requests[kind] += 1
        state.versions[target] += 1
        version = state.versions[target]
        delay = state.base_delay + state.delay + (state.slow if kind in ("slow", "lagging") else 0)
        if delay > 0:
            await asyncio.sleep(delay)
        status = state.status or (500 if kind == "failing" else 200)
        body = f"{target} version {version}\n{state.padding}".encode()
        caching = "no-store" if status >= 500 or method not in ("GET", "HEAD") else CACHE_CONTROL.get(kind, "no-store")
        head = [
            f"HTTP/1.1 {status} {'OK' if status == 200 else 'Fault'}", "Content-Type: text/plain",
            f"Content-Length: {len(body)}", f"Cache-Control: {caching}", f"X-Version: {version}",
        ]
        if kind == "tagged" and len(segments) > 2:
            head.append(f"Surrogate-Key: {segments[2]}")
        self.transport.write("\r\n".join(head).encode() + b"\r\n\r\n" + (b"" if method == "HEAD" else body))


class ControlConnection(OriginConnection):
    """The control of an origin, on an address of its own."""

    async def respond(self, method, target):
        path, _, query = target.partition("?")
        if method == "PUT" and path == "/fault":
            values = urllib.parse.parse_qs(query)
            self.state.delay = float(values.get("delay_ms", ["0"])[0]) / 1000
            self.state.status = int(values.get("status", ["0"])[0])
        body = self.state.as_json().encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.transport.write(head.encode() + body)


def address(text):
    host, _, port = text.rpartition(":")
    return host, int(port)


async def serve(arguments):
    loop = asyncio.get_running_loop()
    state = OriginState(arguments)
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, asyncio.current_task().cancel)
    servers = [
        await loop.create_server(lambda: OriginConnection(state), *address(arguments.listen), backlog=4096),
        await loop.create_server(lambda: ControlConnection(state), *address(arguments.control)),
    ]
    try:
        await asyncio.gather(*(server.serve_forever() for server in servers))
    except asyncio.CancelledError:
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--listen", required=True, metavar="ADDRESS:PORT")
    parser.add_argument("--control", required=True, metavar="ADDRESS:PORT")
    parser.add_argument("--slow-ms", type=int, default=1500, help="time of a slow response")
    parser.add_argument("--delay-ms", type=int, default=0, help="time of every response")
    parser.add_argument("--body-bytes", type=int, default=512)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
