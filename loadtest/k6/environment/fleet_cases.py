"""Cases of several gateways: clocks that differ, purges."""

import os
import pathlib
import signal

from .case import Case, count
from .process import EnvironmentFault

HOUR = 3600
DRIFT = 1.2


def faketime_library():
    """The library that shifts the wall clock of a process, of the Debian package libfaketime."""
    places = [*pathlib.Path("/usr/lib").glob("**/faketime/libfaketime.so.1")]
    if not places:
        raise EnvironmentFault("libfaketime is missing (Debian: apt-get install faketime)")
    return str(places[0])


class ClockDrift(Case):
    """Two gateways; the clock of the second one is 1.2 s ahead, then an hour."""

    redis, gateways = 1, 2
    broken_edits = [('mode = "enforce"', 'mode = "shadow"')]

    def gateway_environment(self, environment, number):
        if number == 0:
            return {}
        self.offset = environment.work / "offset"
        self.set_offset(DRIFT)
        return {
            "LD_PRELOAD": faketime_library(), "FAKETIME_TIMESTAMP_FILE": str(self.offset), "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def set_offset(self, seconds):
        # Renamed into place: a partly written file has no valid offset.
        new = self.offset.with_suffix(".new")
        new.write_text(f"{seconds:+}")
        os.replace(new, self.offset)

    def on_jump(self, environment):
        self.drift = self.seen_offset(environment)
        self.set_offset(HOUR)

    def on_back(self, environment):
        self.jumped = self.seen_offset(environment)
        self.set_offset(DRIFT)

    def seen_offset(self, environment):
        return environment.gateways[1].metrics().sum("tidegate_clock_offset_seconds")

    def break_environment(self, environment):
        environment.gateways[1].edit_config(self.broken_edits)
        environment.gateways[1].reload()

    def check_facts(self, environment, summary, facts):
        right, drifted = (gateway.metrics() for gateway in environment.gateways)
        for when, seen, real in (("before", self.drift, DRIFT), ("during", self.jumped, HOUR)):
            is_close = abs(seen - real) < 1
            facts.check(f"offset of its clock that the drifted gateway measures {when} the jump", is_close, f"{seen:.2f} s")
        facts.check("clock_skewed is logged", "clock_skewed" in environment.gateways[1].events())
        facts.check("the right clock is not reported", "clock_skewed" not in environment.gateways[0].events())
        hits = sum(drifted.sum("tidegate_cache_results_total", cache=it) for it in ("hit", "remote"))
        facts.at_least("hits of the drifted gateway", hits, count(summary, "hits{scenario:drifted}", "passes"))
        facts.at_most("requests at the origin: each key once, and what the limit admits", environment.first_origin.requests(),
                      55 + count(summary, "admitted"))
        facts.equal("panics", right.sum("tidegate_task_panics_total") + drifted.sum("tidegate_task_panics_total"), 0)


class EventBus(Case):
    """Purges in a fleet of two."""

    # The second Redis server is used by a broken environment only.
    redis, gateways = 2, 2

    def break_environment(self, environment):
        # The peer has another Redis server, and learns of no purge.
        peer = environment.gateways[1]
        peer.process.stop()
        peer.edit_config([("${REDIS}", "${REDIS_2}")])
        peer.start()

    def on_away(self, environment):
        environment.gateways[1].process.signal(signal.SIGSTOP)

    def on_back(self, environment):
        environment.gateways[1].process.signal(signal.SIGCONT)

    def check_facts(self, environment, summary, facts):
        purges = count(summary, "acknowledged", "passes")
        for gateway in environment.gateways:
            metrics = gateway.metrics()
            facts.equal(f"purges of {gateway.node} that are not published", metrics.sum("tidegate_purges_pending"), 0)
        received = environment.gateways[1].metrics().sum("tidegate_bus_messages_total", kind="purge")
        facts.at_least("purges that the second gateway received over the bus", received, purges)
        logged = environment.gateway.events().count("purged")
        facts.at_least("purges in the log of the first gateway", logged, purges)


FLEET_CASES = [ClockDrift(), EventBus()]
