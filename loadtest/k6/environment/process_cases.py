"""Cases of the process: connections, drain, reload, leaks, a soak."""

import http.client
import pathlib
import shutil
import signal
import subprocess
import time

from .case import Case, count
from .process import EnvironmentFault, wait_until

# What the gateway requests; the kernel caps it.
BACKLOG = 65_535


def listen_backlogs(port):
    """The backlog of each listening socket of a port, or None without `ss`."""
    ss = shutil.which("ss")
    if ss is None:
        return None
    done = subprocess.run([ss, "-ltnH", f"sport = :{port}"], capture_output=True, text=True, check=True)
    return [int(line.split()[2]) for line in done.stdout.splitlines()]


def keep_alive(gateway):
    """A connection that has served a request and is idle."""
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=10)
    connection.request("POST", "/live/idle", "before")
    connection.getresponse().read()
    return connection


class NetworkBound(Case):
    """Storms of new connections."""

    is_plain = True
    broken_edits = [("connections_per_ip = 10000", "connections_per_ip = 5")]

    def check_facts(self, environment, summary, facts):
        gateway = environment.gateway
        backlogs = listen_backlogs(gateway.port)
        if backlogs is None:
            facts.check("the backlog is not checked: `ss` is not installed (Debian: iproute2)", True)
        else:
            cap = int(pathlib.Path("/proc/sys/net/core/somaxconn").read_text())
            facts.check("each listening socket has the largest backlog that the kernel allows",
                        backlogs and all(it == min(BACKLOG, cap) for it in backlogs), f"{backlogs}, somaxconn {cap}")
            is_logged = "backlog_capped" in gateway.events()
            facts.equal("backlog_capped is logged if the kernel's limit is lower", is_logged, cap < BACKLOG)
        metrics = gateway.metrics()
        accepted = metrics.sum("tidegate_connections_accepted_total")
        facts.at_least("connections accepted", accepted, count(summary, "new_connections", "passes"))
        facts.equal("connections refused", metrics.sum("tidegate_connections_refused_total"), 0)
        wait_until(lambda: gateway.metrics().sum("tidegate_connections") == 0, 10, "all connections are closed")


class Drain(Case):
    """SIGTERM under load; a second gateway takes over."""

    gateways = 2

    def on_drain(self, environment):
        self.began = time.monotonic()
        idle = keep_alive(environment.gateway)
        environment.gateway.process.signal(signal.SIGKILL if self.is_broken else signal.SIGTERM)
        if not self.is_broken:
            self.ready = self.readiness(environment)
            # A connection that was idle at the signal: its client does not know, and its next
            # request is served.
            idle.auto_open = False
            idle.request("POST", "/live/idle", "after")
            response = idle.getresponse()
            self.idle = (response.status, response.getheader("connection"))
        idle.close()

    # With `--broken`: the process is killed instead of drained.
    is_broken = False

    def break_environment(self, environment):
        self.is_broken = True

    @staticmethod
    def readiness(environment):
        """Whether /ready says within a second that the gateway drains."""
        try:
            wait_until(lambda: not environment.gateway.is_ready(), 1, "not ready")
            return False
        except EnvironmentFault:
            return True

    def check_facts(self, environment, summary, facts):
        if self.is_broken:
            return
        status = environment.gateway.process.wait(20)
        seconds = time.monotonic() - self.began
        facts.check("/ready says within a second that the gateway drains", self.ready is False)
        facts.equal("response on a connection that was idle at the signal", self.idle, (200, "close"))
        facts.equal("exit status of the drained process", status, 0)
        facts.at_most("seconds from SIGTERM to the check of the end", seconds, 30)
        events = environment.gateway.events()
        facts.equal("last event in its log", events[-1], "stopped")
        facts.check("no connection was closed at drain_timeout", "drain_timed_out" not in events)


class Reload(Case):
    """Three changes of the file, one of them an error."""

    is_plain = False

    def on_reload(self, environment):
        self.connections = self.accepted(environment)
        edits = [('x-config = "1"', 'x-config = "2"')]
        environment.gateway.edit_config(edits)

    def on_broken(self, environment):
        environment.gateway.edit_config([('cache = { mode = "off" }', 'cache = { mode = "of" }')])

    def on_again(self, environment):
        gateway = environment.gateway
        self.refused = gateway.metrics().sum("tidegate_config_last_reload_successful")
        edits = [('cache = { mode = "of" }', 'cache = { mode = "off" }'), ('x-config = "2"', 'x-config = "3"')]
        gateway.edit_config(edits)
        gateway.reload()

    def break_environment(self, environment):
        # The first change leads to an endpoint where nothing listens.
        environment.gateway.edit_config([('"${ORIGIN}"', '"http://127.0.0.1:9"')])

    @staticmethod
    def accepted(environment):
        return environment.gateway.metrics().sum("tidegate_connections_accepted_total")

    def check_facts(self, environment, summary, facts):
        metrics, events = environment.gateway.metrics(), environment.gateway.events()
        facts.equal("tidegate_config_last_reload_successful after the file with an error", self.refused, 0)
        facts.equal("the same at the end", metrics.sum("tidegate_config_last_reload_successful"), 1)
        facts.at_least("reloads that were logged", events.count("reloaded"), 2)
        facts.at_least("refused reloads that were logged", events.count("reload_refused"), 1)
        facts.check("and the error itself", "config_error" in events)
        # k6 opens a connection when all others are busy; a reload closes none.
        grown = self.accepted(environment) - self.connections
        facts.at_most("connections accepted since the first reload", grown, 60)
        facts.equal("responses that were not completed", metrics.sum("tidegate_responses_aborted_total"), 0)


class Leaks(Case):
    """A churn, and what is left of it."""

    def break_environment(self, environment):
        # Connections that stay open, as if the gateway had leaked them.
        self.held = [keep_alive(environment.gateway) for _ in range(30)]

    def check_facts(self, environment, summary, facts):
        metrics = environment.gateway.metrics()
        facts.equal("connections", metrics.sum("tidegate_connections"), 0)
        facts.equal("requests in flight", metrics.sum("tidegate_requests_in_flight"), 0)
        kinds = environment.gateway.api("tasks")["kinds"]
        left = {kind: kinds.get(kind, 0) for kind in ("connection", "stream", "fill", "detached_fetch")}
        facts.equal("tasks that belong to a request or a connection", sum(left.values()), 0)
        facts.equal("panics of tasks", metrics.sum("tidegate_task_panics_total"), 0)
        facts.equal("services that started again", metrics.sum("tidegate_task_restarts_total"), 0)
        state = environment.first_origin.state()
        facts.at_least("requests whose connection the origin saw closed", state["aborted"], 1)
        facts.equal("requests in progress at the origin", state["in_progress"], 0)


class Soak(Case):
    """Everything for a long time."""

    redis = 1

    def break_environment(self, environment):
        environment.first_origin.process.kill()

    def check_facts(self, environment, summary, facts):
        metrics = environment.gateway.metrics()
        facts.equal("panics of tasks", metrics.sum("tidegate_task_panics_total"), 0)
        facts.equal("panics of requests", metrics.sum("tidegate_failures_total", kind="panic"), 0)
        # Without those to the admin address, and those that k6 ended before their head was sent.
        served = metrics.sum("tidegate_requests_total")
        facts.at_least("requests counted by the gateway", served, 0.9 * summary["requests"])
        facts.equal("faults of reads of Redis", self.faults(metrics), 0)

    @staticmethod
    def faults(metrics):
        name = "tidegate_shard_reads_total"
        return metrics.sum(name) - sum(metrics.sum(name, result=it) for it in ("hit", "miss", "expired", "purged", "timeout"))


PROCESS_CASES = [NetworkBound(), Leaks(), Drain(), Reload(), Soak()]
