"""Processes that a run has started. Each ends with the run, by its id, also after Ctrl-C."""

import os
import random
import signal
import socket
import subprocess
import time


class EnvironmentFault(Exception):
    """The environment cannot be used; the message says what to do."""


# Below the ports that the kernel gives to outgoing connections, which could take one meanwhile.
PORTS = range(15_000, 32_000)


def free_ports(count):
    """Free loopback ports, all different."""
    found = []
    for port in random.sample(PORTS, len(PORTS)):
        if len(found) == count:
            break
        try:
            socket.create_server(("127.0.0.1", port)).close()
            found.append(port)
        except OSError:
            continue
    return found


def wait_until(is_done, seconds, what):
    """Polls `is_done` for at most `seconds`."""
    end = time.monotonic() + seconds
    while not is_done():
        if time.monotonic() > end:
            raise EnvironmentFault(f"{what}: not within {seconds} s")
        time.sleep(0.05)


def accepts(port):
    """Whether a process listens on a loopback port."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    except OSError:
        return False


class ChildProcess:
    """A started process with its log file. `stop_signal` ends it in an orderly way."""

    def __init__(self, name, command, log, environment=None, stop_signal=signal.SIGTERM):
        self.name = name
        self.stop_signal = stop_signal
        self.log = log
        with open(log, "ab") as output:
            # A session of its own: Ctrl-C reaches the runner alone, which then ends its processes
            # in order.
            self.popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                env={**os.environ, **(environment or {})})

    @property
    def pid(self):
        return self.popen.pid

    def is_running(self):
        return self.popen.poll() is None

    def signal(self, number):
        if self.is_running():
            self.popen.send_signal(number)

    def wait(self, seconds):
        """The exit status, or None if it still runs."""
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self):
        self.signal(signal.SIGKILL)
        self.wait(10)

    def stop(self, seconds=5):
        # A stopped process does not see other signals before it continues.
        self.signal(signal.SIGCONT)
        self.signal(self.stop_signal)
        if self.wait(seconds) is None:
            self.kill()

    def wait_ready(self, is_ready, seconds=30):
        def is_done():
            if not self.is_running():
                with open(self.log, "rb") as log:
                    tail = log.read()[-2000:].decode(errors="replace")
                raise EnvironmentFault(f"{self.name} has ended with {self.popen.returncode}:\n{tail}")
            return is_ready()
        wait_until(is_done, seconds, f"{self.name} is ready")
