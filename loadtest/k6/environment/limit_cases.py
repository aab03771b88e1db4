"""Cases of limits and of errors: weights, three scopes, one classification of each failure."""

import collections
import json

from .case import Case, count


class WeightedUsers(Case):
    """Users by class, then in shadow mode."""

    broken_edits = [("platinum = 3.2", "platinum = 2.0")]

    def check_facts(self, environment, summary, facts):
        metrics = environment.gateway.metrics()
        name = "tidegate_limit_evaluations_total"
        denied = metrics.sum(name, rule="user", mode="enforced", decision="denied")
        facts.equal("denials counted by the gateway", denied, count(summary, "denied"))
        shadowed = metrics.sum(name, rule="user", mode="shadow", decision="denied")
        facts.at_least("requests that shadow mode would have denied", shadowed, 1)
        admitted = count(summary, "admitted{scenario:platinum}") / max(1, count(summary, "admitted{scenario:standard}"))
        facts.check("platinum users were admitted 3.2 times as often", 2.6 <= admitted <= 3.8, f"{admitted:.2f}")


class ThreeTiers(Case):
    """Limits by device, node and cluster."""

    redis, gateways = 1, 2
    broken_edits = [('rate = "80/s"', 'rate = "800/s"'), ('rate = "60/s"', 'rate = "600/s"')]

    def break_environment(self, environment):
        for gateway in environment.gateways:
            gateway.edit_config(self.broken_edits)
            gateway.reload()

    def check_facts(self, environment, summary, facts):
        pages = [gateway.metrics() for gateway in environment.gateways]
        denied = 0
        for rule in ("device", "node", "cluster"):
            seen = sum(page.sum("tidegate_limit_evaluations_total", rule=rule, decision="denied") for page in pages)
            facts.at_least(f"denials of the limit {rule}", seen, 1)
            denied += seen
        facts.equal("denials counted by the gateways", denied, count(summary, "denied"))
        bucket = environment.redis[0].command("EXISTS", "tg:lease:{cluster}")
        facts.equal("the bucket of the cluster limit is in Redis", bucket, ":1")
        facts.equal("gateways on a local share", sum(page.sum("tidegate_limit_local_fallback") for page in pages), 0)
        # Four requests of the precondition are admitted as well.
        admitted = count(summary, "admitted") + 4
        facts.at_most("requests at the origin: the admitted ones", environment.first_origin.requests(), admitted)


class ErrorPipeline(Case):
    """One classification of each failure for response, metric and log."""

    # How the access log and the metric name each kind; None: the response passes unchanged and is
    # no failure of the gateway.
    NAMES = {"no_route": "no_route", "limited": "limited", "forbidden": "forbidden", "connect": "connect", "timeout": "timeout",
             "origin": None}

    def break_environment(self, environment):
        environment.first_origin.process.kill()

    def check_facts(self, environment, summary, facts):
        metrics = environment.gateway.metrics()
        # Lines are written in batches; the gateway writes all when it ends.
        environment.gateway.process.stop()
        lines = [json.loads(line) for line in (environment.work / "access.log").read_text().splitlines()]
        logged = collections.Counter(line.get("failure") for line in lines)
        for kind, name in self.NAMES.items():
            # Two requests of the precondition; the first one of a limit passes.
            expected = count(summary, f"responses{{kind:{kind}}}") + (1 if kind == "limited" else 2)
            if name is None:
                facts.equal(f"log lines of {kind}, status 500", sum(it["status"] == 500 for it in lines), expected)
                continue
            facts.equal(f"tidegate_failures_total of {name}", metrics.sum("tidegate_failures_total", kind=name), expected)
            facts.equal(f"log lines with failure {name}", logged[name], expected)
        blames = {line["failure"]: line.get("blame") for line in lines if line.get("failure")}
        blamed = (blames.get("connect"), blames.get("timeout"))
        facts.equal("blame for connect and timeout", blamed, ("upstream", "upstream"))
        ids = [line.get("request_id") for line in lines]
        facts.equal("different request ids in the log", len(set(ids)), len(lines))


LIMIT_CASES = [ThreeTiers(), WeightedUsers(), ErrorPipeline()]
