"""A gRPC server with one method of each kind, for gateway/tests/grpc.rs. Messages are plain bytes."""

import os
import sys
import threading
import time
from concurrent import futures

import grpc

cancelled = threading.Event()


def unary(request, context):
    metadata = dict(context.invocation_metadata())
    if "x-status" in metadata:
        context.abort(grpc.StatusCode(next(c.value for c in grpc.StatusCode if c.name == metadata["x-status"])), "asked for")
    context.send_initial_metadata((("x-initial", metadata.get("x-a", "")), ("x-bin-bin", b"\x00\xff")))
    left = context.time_remaining()
    context.set_trailing_metadata((("x-trailing", "%d" % len(request)), ("x-left", "%.1f" % (left if left and left < 1e6 else -1))))
    return request


def client_stream(requests, context):
    return b"%d" % sum(len(request) for request in requests)


def server_stream(request, context):
    count, pause = request.split()
    for number in range(int(count)):
        yield b"%d" % number
        time.sleep(float(pause))


def bidi(requests, context):
    for request in requests:
        yield b"re:" + request


def leave(requests, context):
    for request in requests:
        if request == b"leave":
            os._exit(1)
        yield request


def slow(request, context):
    context.add_callback(lambda: None if context.is_active() else cancelled.set())
    for _ in range(200):
        time.sleep(0.05)
        if not context.is_active():
            cancelled.set()
            return b""
    return b"late"


def was_cancelled(request, context):
    return b"yes" if cancelled.wait(10) else b"no"


def crash(request, context):
    raise RuntimeError("asked for")


def main():
    kinds = grpc.unary_unary_rpc_method_handler
    methods = {
        "Unary": kinds(unary),
        "ClientStream": grpc.stream_unary_rpc_method_handler(client_stream),
        "ServerStream": grpc.unary_stream_rpc_method_handler(server_stream),
        "Bidi": grpc.stream_stream_rpc_method_handler(bidi),
        "Leave": grpc.stream_stream_rpc_method_handler(leave),
        "Slow": kinds(slow),
        "WasCancelled": kinds(was_cancelled),
        "Crash": kinds(crash),
    }
    size = [("grpc.max_receive_message_length", 32 << 20), ("grpc.max_send_message_length", 32 << 20)]
    server = grpc.server(futures.ThreadPoolExecutor(64), options=size)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("tidegate.Test", methods),))
    plain = server.add_insecure_port("127.0.0.1:0")
    with open(sys.argv[1], "rb") as key, open(sys.argv[2], "rb") as chain:
        secure = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key.read(), chain.read())]))
    server.start()
    print(plain, secure, flush=True)
    server.wait_for_termination()


main()
