"""The servers of an environment: gateways, Redis servers, origins, all on loopback."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

from .metrics import Metrics
from .process import ChildProcess, EnvironmentFault, accepts

HERE = pathlib.Path(__file__).resolve().parent
# Longest wait for a response of an admin or control address.
ADMIN_SECONDS = 10


def fetch(url, method="GET"):
    """Status and body; an error status is no failure."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=ADMIN_SECONDS) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


class GatewayServer:
    """A real `tidegate run`, whose configuration `tidegate check` has accepted."""

    def __init__(self, tidegate, work, node, ports, environment):
        self.tidegate, self.work, self.node = tidegate, work, node
        self.port, self.admin_port = ports
        self.url, self.admin = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.admin_port}"
        self.config = work / f"{node}.toml"
        self.environment = {
            **environment, "NODE": node, "LISTEN": f"127.0.0.1:{self.port}", "ADMIN": f"127.0.0.1:{self.admin_port}",
            "WORK": str(work),
        }
        self.process = None

    def write_config(self, text):
        # Replaced as a whole, so that a gateway that watches the file never reads half of it.
        new = self.config.with_suffix(".new")
        new.write_text(text)
        os.replace(new, self.config)

    def edit_config(self, edits):
        """Replaces each text of `edits`, pairs of old and new; each old one must be there."""
        text = self.config.read_text()
        for old, new in edits:
            if old not in text:
                raise EnvironmentFault(f"{self.config.name} does not contain {old!r}")
            text = text.replace(old, new)
        self.write_config(text)

    def check(self):
        done = subprocess.run(
            [self.tidegate, "check", "--deny-warnings", self.config], env={**os.environ, **self.environment},
            capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise EnvironmentFault(f"tidegate check refuses {self.config.name}:\n{done.stdout}{done.stderr}")

    def start(self, more_environment=None):
        self.check()
        command = [self.tidegate, "run", "--config", str(self.config)]
        environment = {**self.environment, **(more_environment or {})}
        self.process = ChildProcess(self.node, command, self.work / f"{self.node}.log", environment, signal.SIGINT)
        self.process.wait_ready(self.is_ready)

    def is_ready(self):
        try:
            return fetch(f"{self.admin}/ready")[0] == 200
        except OSError:
            return False

    def reload(self):
        self.process.signal(signal.SIGHUP)

    def metrics(self):
        return Metrics(fetch(f"{self.admin}/metrics")[1])

    def api(self, path, method="GET"):
        status, body = fetch(f"{self.admin}/api/v1/{path}", method)
        if status not in (200, 202):
            raise EnvironmentFault(f"{method} /api/v1/{path}: status {status}: {body}")
        return json.loads(body)

    def events(self):
        """Names of the events in the log, in order."""
        names = []
        for line in (self.work / f"{self.node}.log").read_text(errors="replace").splitlines():
            try:
                names.append(json.loads(line).get("event"))
            except (ValueError, AttributeError):
                continue
        return names


class RedisServer:
    """A real `redis-server` without persistence."""

    def __init__(self, work, name, port):
        self.work, self.name, self.port = work, name, port
        self.url = f"redis://127.0.0.1:{port}"
        self.process = None

    def start(self):
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
                   "--dir", str(self.work)]
        self.process = ChildProcess(self.name, command, self.work / f"{self.name}.log", stop_signal=signal.SIGKILL)
        self.process.wait_ready(lambda: accepts(self.port))

    def command(self, *words):
        """The first line of the reply to a command."""
        with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
            connection.sendall((" ".join(words) + "\r\n").encode())
            return connection.makefile("r").readline().strip()


class PlainOrigin:
    """`loadtest origin`: the fast one, or with `workers` and `service_ms` one with a knee."""

    def __init__(self, loadtest, work, name, port, arguments=()):
        self.name, self.port, self.log = name, port, work / f"{name}.log"
        self.command = [loadtest, "origin", "--listen", f"127.0.0.1:{port}", *arguments]
        self.process = None

    def start(self):
        self.process = ChildProcess(self.name, self.command, self.log, stop_signal=signal.SIGKILL)
        self.process.wait_ready(lambda: accepts(self.port))

    def requests(self):
        return int(fetch(f"http://127.0.0.1:{self.port}/count")[1])


class SwitchedOrigin:
    """`origin.py`: the origin with faults."""

    def __init__(self, work, name, ports, arguments=()):
        self.name, self.log = name, work / f"{name}.log"
        self.port, self.control_port = ports
        self.command = [
            sys.executable, str(HERE / "origin.py"), "--listen", f"127.0.0.1:{self.port}",
            "--control", f"127.0.0.1:{self.control_port}", *arguments]
        self.process = None

    def start(self):
        self.process = ChildProcess(self.name, self.command, self.log, stop_signal=signal.SIGKILL)
        self.process.wait_ready(lambda: accepts(self.port) and accepts(self.control_port))

    def state(self):
        return json.loads(fetch(f"http://127.0.0.1:{self.control_port}/state")[1])

    def fault(self, delay_ms=0, status=0):
        fetch(f"http://127.0.0.1:{self.control_port}/fault?delay_ms={delay_ms}&status={status}", "PUT")

    def requests(self):
        return self.state()["total"]
