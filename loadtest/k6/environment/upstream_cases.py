"""Cases of the upstream: down, slow, overloaded, one endpoint that hangs, clients that give up."""

import signal
import time

from .case import Case, count


def breaker_events(environment):
    return [it for it in environment.gateway.events() if it and it.startswith("breaker_")]


def check_breaker(environment, facts):
    """The breaker has opened, was half-open, and is closed."""
    seen = breaker_events(environment)
    for name in ("breaker_opened", "breaker_half_open", "breaker_closed"):
        facts.check(f"{name} is logged", name in seen, f"{seen.count(name)} times")
    facts.equal("state of breakers at the end", environment.gateway.metrics().sum("tidegate_breaker_state"), 0)


class Degrade(Case):
    """The origin is down for a while."""

    broken_edits = [('stale_if_error = "10m"', 'stale_if_error = "0s"')]

    def on_fault(self, environment):
        environment.first_origin.process.kill()

    def on_repair(self, environment):
        environment.first_origin.start()

    def check_facts(self, environment, summary, facts):
        metrics = environment.gateway.metrics()
        check_breaker(environment, facts)
        # k6 counts from a second after the fault on; the gateway from the fault on.
        degraded = metrics.sum("tidegate_route_degraded_total", route="live")
        facts.at_least("degrade pages counted by the gateway", degraded, count(summary, "served_pages", "passes"))
        stale = metrics.sum("tidegate_route_cache_results_total", route="stale", cache="stale")
        facts.at_least("stale responses counted by the gateway", stale, 1)


class SlowUpstream(Case):
    """The origin is slow for a while."""

    broken_edits = [('mode = "enforce"', 'mode = "off"')]

    def on_fault(self, environment):
        environment.first_origin.fault(delay_ms=1500)
        self.before = environment.first_origin.requests()

    def on_repair(self, environment):
        self.calls = environment.first_origin.requests() - self.before
        environment.first_origin.fault()

    def check_facts(self, environment, summary, facts):
        check_breaker(environment, facts)
        rejections = environment.gateway.metrics().sum("tidegate_breaker_rejections_total", mode="enforce")
        facts.at_least("calls that the breaker rejected", rejections, count(summary, "fail_fast", "passes"))
        facts.at_most("requests at the slow origin: probes only", self.calls, rejections)


class Knee(Case):
    """An origin with a knee at 200 requests per second."""

    is_plain = True
    origin_arguments = ("--workers", "4", "--service-ms", "20")
    broken_edits = [('concurrency = { min = 2, max = 256, wait = "200ms" }\n', "")]

    def check_facts(self, environment, summary, facts):
        metrics = environment.gateway.metrics()
        rejected = metrics.sum("tidegate_upstream_concurrency_rejections_total")
        facts.at_least("calls that the concurrency limit rejected", rejected, 1)
        limit = metrics.sum("tidegate_upstream_concurrency_limit")
        facts.check("the limit is between its bounds", 2 <= limit <= 256, f"{limit:g}")
        facts.equal("calls in progress at the end", metrics.sum("tidegate_upstream_concurrency_in_flight"), 0)


class WorkerPool(Case):
    """One of three endpoints hangs."""

    origins = 3
    broken_edits = [("after = 3", "after = 0")]

    def on_fault(self, environment):
        environment.origins[1].process.signal(signal.SIGSTOP)

    def on_repair(self, environment):
        environment.origins[1].process.signal(signal.SIGCONT)
        self.calls = environment.origins[1].requests()

    def check_facts(self, environment, summary, facts):
        metrics = environment.gateway.metrics()
        facts.at_least("ejections", metrics.sum("tidegate_upstream_ejections_total"), 1)
        facts.equal("endpoints that are available at the end", metrics.sum("tidegate_upstream_endpoints", state="available"), 3)
        calls = environment.origins[1].requests() - self.calls
        facts.at_least("requests at the endpoint after its repair", calls, 10)
        timeouts = metrics.sum("tidegate_timeouts_total", clock="upstream_head")
        facts.at_least("timeouts, which the gateway blames on the upstream", timeouts, 3)


class Cancel(Case):
    """Clients that give up."""

    def break_environment(self, environment):
        environment.first_origin.process.kill()

    def check_facts(self, environment, summary, facts):
        given_up = count(summary, "given_up")
        time.sleep(2)
        metrics = environment.gateway.metrics()
        closed = metrics.sum("tidegate_responses_aborted_total", reason="client_closed")
        facts.at_least("responses that the gateway ended because their client had gone", closed, given_up)
        state = environment.first_origin.state()
        facts.at_least("requests whose connection the origin saw closed", state["aborted"], 0.95 * given_up)
        # k6 gives up after 300 ms, the response would take 1500.
        facts.at_most("milliseconds at the origin until the end of a cancelled request, median",
                      state["aborted_after_ms_median"] or 0, 700)
        facts.equal("requests in progress at the origin 2 s after the load", state["in_progress"], 0)
        facts.equal("requests in flight in the gateway", metrics.sum("tidegate_requests_in_flight"), 0)


UPSTREAM_CASES = [Degrade(), SlowUpstream(), Knee(), WorkerPool(), Cancel()]
