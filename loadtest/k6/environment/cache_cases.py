"""Cases of the cache: warm hits, a storm of misses, a hot region, the loss of a shard."""

import signal

from .case import Case, count
from .process import wait_until


class WarmHits(Case):
    """Hits from memory."""

    is_plain = True
    # Expired after a second instead of a day: a part of the requests goes to the origin.
    broken_edits = [('mode = "standard"', 'mode = "standard", ttl = { "200" = "1s" }')]

    def check_facts(self, environment, summary, facts):
        facts.at_most("requests at the origin: one for each key", environment.first_origin.requests(), 110)
        hits = environment.gateway.metrics().sum("tidegate_cache_results_total", cache="hit")
        facts.at_least("hits counted by the gateway", hits, count(summary, "hits", "passes"))


class MissStorm(Case):
    """Many concurrent requests for keys that nobody has asked for."""

    origin_arguments = ("--delay-ms", "100")
    broken_edits = [('mode = "standard"', 'mode = "off"')]

    def check_facts(self, environment, summary, facts):
        state = environment.first_origin.state()
        # One more for the precondition.
        facts.at_most("requests at the origin, of as many keys", state["total"], state["paths"])
        facts.at_least("keys", state["paths"], count(summary, "bursts"))
        joined = environment.gateway.metrics().sum("tidegate_cache_results_total", cache="collapsed")
        facts.at_least("requests that joined the fetch of another one", joined, count(summary, "bursts"))


class HotRegion(Case):
    """A hot key in a region, one of whose shards hangs."""

    redis = 3
    is_plain = True
    broken_edits = [('mode = "standard"', 'mode = "standard", ttl = { "200" = "0s" }')]

    def on_fault(self, environment):
        environment.redis[0].process.signal(signal.SIGSTOP)

    def on_look(self, environment):
        self.hot = environment.gateway.api("hot")["keys"]
        self.open = environment.gateway.metrics().sum("tidegate_shard_breaker_open", region="beijing", operation="read")

    def on_repair(self, environment):
        environment.redis[0].process.signal(signal.SIGCONT)

    def check_facts(self, environment, summary, facts):
        hot = [it["key"] for it in self.hot]
        facts.check("the hot key is reported by /api/v1/hot", any("/hot" in it for it in hot), hot)
        metrics = environment.gateway.metrics()
        facts.at_least("breakers of the hung shard that are open", self.open, 1)
        reads = [metrics.sum("tidegate_shard_reads_total", region="shanghai", result=it) for it in ("hit", "miss")]
        all_reads = metrics.sum("tidegate_shard_reads_total", region="shanghai")
        # On a busy machine, some reads exceed their deadline.
        facts.at_most("faults of reads of the other region", all_reads - sum(reads), 0.1 * all_reads)
        facts.at_most("requests at the origin", environment.first_origin.requests(), 0.3 * summary["requests"])


class ShardLoss(Case):
    """A Redis server of a region is killed and comes back empty."""

    redis = 2
    is_plain = True
    origin_arguments = ("--body-bytes", "4096")

    def on_fault(self, environment):
        environment.redis[0].process.kill()

    def on_repair(self, environment):
        environment.redis[0].start()

    def break_environment(self, environment):
        environment.first_origin.process.kill()

    def on_look(self, environment):
        self.open = environment.gateway.metrics().sum("tidegate_shard_breaker_open", endpoint=self.endpoint(environment, 0))

    def endpoint(self, environment, number):
        return f"127.0.0.1:{environment.redis[number].port}"

    def check_facts(self, environment, summary, facts):
        def open_breakers():
            return environment.gateway.metrics().sum("tidegate_shard_breaker_open")

        # A breaker opens again for longer if the server is not back at its probe.
        wait_until(lambda: open_breakers() == 0, 15, "the breakers of all shards are closed again")
        metrics = environment.gateway.metrics()
        lost, kept = self.endpoint(environment, 0), self.endpoint(environment, 1)

        def faults(endpoint):
            name = "tidegate_shard_reads_total"
            good = sum(metrics.sum(name, endpoint=endpoint, result=it) for it in ("hit", "miss", "expired", "purged"))
            return metrics.sum(name, endpoint=endpoint) - good

        facts.at_least("open breakers of the lost shard", self.open, 1)
        # On a busy machine, some reads exceed their deadline.
        facts.at_least("faults of reads of the lost shard", faults(lost), 10)
        facts.at_most("faults of reads of the other shard", faults(kept), 0.6 * faults(lost))
        facts.check("the shard is logged as up", "shard_up" in environment.gateway.events())
        # Each of the 600 keys once at first; then those that are neither in memory nor at a shard.
        bound = 600 + 0.5 * (summary["requests"] - 600)
        facts.at_most("requests at the origin", environment.first_origin.requests(), bound)
        facts.check("hits of the remote cache", metrics.sum("tidegate_cache_results_total", cache="remote") > 0)


CACHE_CASES = [WarmHits(), MissStorm(), HotRegion(), ShardLoss()]
