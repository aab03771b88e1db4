"""Calls a gRPC server through the gateway, for gateway/tests/grpc.rs: one line per passed check."""

import sys
import threading
import time

import grpc

target, ca, checks = sys.argv[1], sys.argv[2], sys.argv[3:]
options = [
    ("grpc.ssl_target_name_override", "gateway.test"),
    ("grpc.max_receive_message_length", 32 << 20),
    ("grpc.max_send_message_length", 32 << 20),
    ("grpc.enable_retries", 0),
]
if ca == "-":
    channel = grpc.insecure_channel(target, options[1:])
else:
    with open(ca, "rb") as roots:
        channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(roots.read()), options)
S = grpc.StatusCode


def path(name):
    return "/tidegate.Test/" + name


def expect(actual, wanted):
    if actual != wanted:
        raise AssertionError("%r, wanted %r" % (actual, wanted))


def failure(name, wanted, request=b"x", **keywords):
    try:
        channel.unary_unary(path(name))(request, **{"timeout": 20, **keywords})
    except grpc.RpcError as error:
        expect(error.code(), wanted)
        return error
    raise AssertionError("no failure of " + name)


def unary():
    for length in (0, 1, 100, 70_000, 3_000_000):
        body = b"x" * length
        response, call = channel.unary_unary(path("Unary")).with_call(body, timeout=20, metadata=(("x-a", "7"),))
        expect(response, body)
        initial, trailing = dict(call.initial_metadata()), dict(call.trailing_metadata())
        expect((initial["x-initial"], initial["x-bin-bin"], trailing["x-trailing"]), ("7", b"\x00\xff", str(length)))
        expect(call.code(), S.OK)


def streams():
    count = channel.stream_unary(path("ClientStream"))(iter([b"x" * 10_000] * 300), timeout=20)
    expect(count, b"3000000")
    expect(channel.stream_unary(path("ClientStream"))(iter([]), timeout=20), b"0")
    received = list(channel.unary_stream(path("ServerStream"))(b"1000 0", timeout=20))
    expect(received, [b"%d" % number for number in range(1000)])


def messages_pass_at_once():
    began, times = time.monotonic(), []
    for _ in channel.unary_stream(path("ServerStream"))(b"4 0.3", timeout=20):
        times.append(time.monotonic() - began)
    if times[0] > 0.25 or times[3] < 0.9:
        raise AssertionError("messages wait for each other: %r" % times)


def bidi():
    sent, may_send = [b"a", b"bb", b"ccc"], threading.Semaphore(1)

    def requests():
        for request in sent:
            may_send.acquire()
            yield request

    # Each request is sent only after the response to the one before.
    received = []
    for response in channel.stream_stream(path("Bidi"))(requests(), timeout=20):
        received.append(response)
        may_send.release()
    expect(received, [b"re:" + request for request in sent])


def statuses():
    for status in ("NOT_FOUND", "ABORTED", "UNAVAILABLE", "INTERNAL"):
        error = failure("Unary", S[status], metadata=(("x-status", status),))
        expect(error.details(), "asked for")
    failure("Crash", S.UNKNOWN)
    failure("Missing", S.UNIMPLEMENTED)


def deadline():
    began = time.monotonic()
    failure("Slow", S.DEADLINE_EXCEEDED, timeout=0.5)
    if time.monotonic() - began > 2:
        raise AssertionError("late")
    expect(channel.unary_unary(path("WasCancelled"))(b"", timeout=20), b"yes")
    _, call = channel.unary_unary(path("Unary")).with_call(b"", timeout=5)
    left = float(dict(call.trailing_metadata())["x-left"])
    if not 3.5 < left <= 5:
        raise AssertionError("the server sees a deadline of %r" % left)


def cancellation():
    call = channel.unary_unary(path("Slow")).future(b"", timeout=20)
    time.sleep(0.3)
    call.cancel()
    expect(channel.unary_unary(path("WasCancelled"))(b"", timeout=20), b"yes")


def concurrent():
    calls = [channel.unary_stream(path("ServerStream"))(b"20 0.01", timeout=20) for _ in range(50)]
    for call in calls:
        expect(len(list(call)), 20)


def gateway_deadline():
    error = failure("Slow", S.DEADLINE_EXCEEDED)
    expect(error.details(), "timeout")


def gateway_total():
    # The server knows the deadline too, and may be the first to say so.
    failure("Slow", S.DEADLINE_EXCEEDED)


def limited_after_one():
    channel.unary_unary(path("Unary"))(b"x", timeout=20)
    error = failure("Unary", S.RESOURCE_EXHAUSTED)
    expect(error.details(), "limited")


def unauthenticated():
    failure("Unary", S.UNAUTHENTICATED)


def failure_inside(name, wanted, detail, requests=(b"a", b"b")):
    # One message arrives, then the second one is sent, then the failure arrives.
    may_send, received = threading.Semaphore(1), []

    def messages():
        for request in requests:
            may_send.acquire()
            yield request

    try:
        for response in channel.stream_stream(path(name))(messages(), timeout=20):
            received.append(response)
            may_send.release()
    except grpc.RpcError as error:
        # A reset has no details of the gateway.
        expect((received, error.code(), detail and error.details()), ([b"a"], wanted, detail))
        return
    raise AssertionError("no failure of " + name)


def server_leaves():
    failure_inside("Leave", S.UNAVAILABLE, "upstream", (b"a", b"leave"))


def broken_streams():
    failure_inside("Cut", S.UNAVAILABLE, "upstream")
    failure_inside("Silent", S.DEADLINE_EXCEEDED, "timeout")
    for code, wanted in ((0, S.INTERNAL), (1, S.INTERNAL), (2, S.INTERNAL), (7, S.UNAVAILABLE)):
        failure_inside("Reset%d" % code, wanted, "upstream")
    for code, wanted in ((8, S.CANCELLED), (11, S.RESOURCE_EXHAUSTED), (12, S.PERMISSION_DENIED)):
        failure_inside("Reset%d" % code, wanted, "upstream")


def total_inside():
    failure_inside("Silent", S.DEADLINE_EXCEEDED, "total_timeout")


def announced_length():
    # Trailers cannot follow a body that is shorter than its length: the stream is reset.
    failure_inside("Length", S.INTERNAL, None)


def unavailable():
    failure("Unary", S.UNAVAILABLE)


def unimplemented():
    failure("Unary", S.UNIMPLEMENTED)


def too_large():
    failure("Unary", S.RESOURCE_EXHAUSTED, request=b"x" * 2_000_000)


for check in checks:
    try:
        globals()[check]()
    except Exception as error:
        print("%s failed: %s" % (check, error), flush=True)
        sys.exit(1)
    print("ok " + check, flush=True)
