"""What a script needs around it: servers, actions while the load runs, facts outside k6."""

import pathlib
import re
import secrets

from .process import EnvironmentFault, free_ports
from .servers import GatewayServer, PlainOrigin, RedisServer, SwitchedOrigin

K6_DIRECTORY = pathlib.Path(__file__).resolve().parent.parent


class Environment:
    """The running servers of one case."""

    def __init__(self, programs, work):
        self.programs, self.work = programs, work
        self.gateways, self.redis, self.origins = [], [], []
        # Authenticates the entries of one run.
        self.secret = secrets.token_hex(16)

    def variables(self):
        """The variables of configuration files: ORIGIN, ORIGIN_2, REDIS, REDIS_2, and so on."""
        found = {"REDIS_SECRET": self.secret}
        for name, servers in (("ORIGIN", self.origins), ("REDIS", self.redis)):
            for number, server in enumerate(servers, 1):
                suffix = "" if number == 1 else f"_{number}"
                found[f"{name}{suffix}"] = getattr(server, "url", f"http://127.0.0.1:{server.port}")
        return found

    def start(self, case):
        names = [f"redis-{number}" for number in range(1, case.redis + 1)]
        self.redis = [RedisServer(self.work, name, port) for name, port in zip(names, free_ports(case.redis))]
        self.origins = [self.origin(case, number) for number in range(1, case.origins + 1)]
        for server in self.redis + self.origins:
            server.start()
        text = (K6_DIRECTORY / "config" / f"{case.name}.toml").read_text()
        ports = free_ports(2 * case.gateways)
        for number in range(case.gateways):
            pair = ports[2 * number:2 * number + 2]
            variables = {**self.variables(), **case.variables(self, number)}
            gateway = GatewayServer(self.programs.tidegate, self.work, f"gateway-{number + 1}", pair, variables)
            gateway.write_config(text)
            self.gateways.append(gateway)
            gateway.start(case.gateway_environment(self, number))

    def origin(self, case, number):
        name = f"origin-{number}"
        if case.is_plain:
            return PlainOrigin(self.programs.loadtest, self.work, name, free_ports(1)[0], case.origin_arguments)
        return SwitchedOrigin(self.work, name, free_ports(2), case.origin_arguments)

    def stop(self):
        """Ends all processes, each by its id, whatever state it is in."""
        for server in self.gateways + self.origins + self.redis:
            if server.process is not None:
                server.process.stop()

    def settings(self):
        """The variables of the script."""
        return {
            "BASE_URL": self.gateways[0].url, "ADMIN_URL": self.gateways[0].admin,
            "PEER_URLS": ",".join(gateway.url for gateway in self.gateways[1:]),
        }

    @property
    def gateway(self):
        return self.gateways[0]

    @property
    def first_origin(self):
        return self.origins[0]


class Facts:
    """Facts about an environment that k6 cannot see, and those that do not hold."""

    def __init__(self):
        self.lines, self.failures = [], []

    def check(self, text, is_true, seen=""):
        line = f"{text}{f' ({seen})' if seen != '' else ''}"
        self.lines.append(f"{'ok     ' if is_true else 'FAILED '} {line}")
        if not is_true:
            self.failures.append(line)

    def equal(self, text, seen, expected):
        self.check(text, seen == expected, f"{seen}, expected {expected}")

    def at_most(self, text, seen, bound):
        self.check(text, seen <= bound, f"{seen:g}, at most {bound:g}")

    def at_least(self, text, seen, bound):
        self.check(text, seen >= bound, f"{seen:g}, at least {bound:g}")


class Case:
    """One script. Subclasses say what differs."""

    # Numbers of servers.
    redis, gateways, origins = 0, 1, 1
    # Whether the origin is `loadtest origin`, or the one with faults.
    is_plain = False
    origin_arguments = ()
    # Changes of the configuration, pairs of old and new text, with which a threshold must fail.
    broken_edits = ()

    @property
    def name(self):
        return re.sub(r"(?<!^)([A-Z])", r"-\1", type(self).__name__).lower()

    def variables(self, _environment, _number):
        """More variables of the configuration of gateway `number`, from 0."""
        return {}

    def gateway_environment(self, _environment, _number):
        """More variables of the process of gateway `number`, from 0."""
        return {}

    def settings(self, _environment):
        """More variables of the script."""
        return {}

    def on_event(self, environment, name):
        """Acts on an event of the script."""
        action = getattr(self, f"on_{name.replace('-', '_')}", None)
        if action is not None:
            action(environment)

    def break_environment(self, environment):
        """With `--broken`, when the load begins: makes sure that a threshold must fail."""
        if not self.broken_edits:
            raise EnvironmentFault(f"{self.name} has no way to break its environment")
        environment.gateway.edit_config(self.broken_edits)
        environment.gateway.reload()

    def check_facts(self, environment, summary, facts):
        """Checks facts after the load."""


def count(summary, metric, key="count"):
    """A value of a metric in k6's summary; 0 without samples."""
    return summary["metrics"].get(metric, {"values": {}})["values"].get(key, 0)
