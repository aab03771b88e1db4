#!/usr/bin/env python3
"""Prints values of the chart that render a given tidegate.toml, as JSON, which is YAML too.

Usage: helm/from_toml.py tidegate.toml >values.json; helm install gate helm/tidegate -f values.json

Listen addresses become the chart's ports. Files and secrets are not taken over: certificates, JWK sets and the keys of Redis and callers are
Secrets named `tidegate`; pages belong into config.files. Needs Python 3.11.
"""
import json
import re
import sys
import tomllib

SECRET = "tidegate"
SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}


def take(table, *keys):
    """Removes keys from a table and returns those that it has."""
    return {key: table.pop(key) for key in keys if key in table}


def identity(table, values):
    user, tier = table.pop("user", ""), table.pop("tier", "")
    values["config"] |= take(table, "trusted_proxies")
    own = take(table, "device", "region", "region_default")
    if isinstance(user, dict):
        jwt = user["jwt"]
        keys = jwt.pop("keys")
        source = {"url": keys} if keys.startswith("https://") else {"secretName": SECRET}
        own["jwt"] = source | take(jwt, "algorithms", "claim", "audience", "issuer", "leeway", "token") | {"extra": jwt}
    elif user:
        own["user"] = user
    if isinstance(tier, dict):
        own["jwt"]["tierClaim"] = tier["jwt_claim"]
    elif tier:
        own["tier"] = tier
    if table.pop("secret", ""):
        own["secretName"] = SECRET
    values["config"]["identity"] = own | {"extra": table}


def redis(table):
    own = take(table, "regions", "deadline", "nodes", "compress_from", "hot_copies")
    if table.pop("secret", ""):
        own["secretName"] = SECRET
    if tls := table.pop("tls", None):
        own["tls"] = {"secretName": SECRET} | ({"certKey": "tls.crt", "keyKey": "tls.key"} if "cert" in tls else {})
        own["tls"] |= {} if "ca" in tls else {"caKey": ""}
    return own | {"extra": table}


def listeners(tables, values):
    values["config"]["proxy_protocol"] = tables[0].get("proxy_protocol", "off") if tables else "off"
    values["config"]["http2"] = tables[0].get("http2") if tables else None
    for tls in [table["tls"] for table in tables if "tls" in table][:1]:
        values["tls"] = {"secretName": SECRET, "minVersion": tls.get("min_version", "1.2")}
        if "client_ca" in tls:
            client = {"secretName": SECRET, "auth": tls.get("client_auth", "required")}
            values["tls"]["clientCA"] = client | ({"crlKey": "crl.pem"} if "client_crl" in tls else {})


def values_of(document):
    values = {"config": take(document, "upstreams", "routes", "pages", "tiers", "access", "limits", "limits_http", "dns", "kubernetes")}
    config = values["config"]
    server = document.get("server", {})
    amount, unit = re.fullmatch(r"([0-9]+)(ms|s|m|h)", server.pop("drain_timeout", "30s")).groups()
    server.pop("node", None)
    config |= {"drainSeconds": max(1, round(int(amount) * SECONDS[unit])), "server": server}
    listeners(document.get("listen", []), values)
    identity(document.get("identity", {}), values)
    if "redis" in document:
        config["redis"] = redis(document["redis"])
    cache, log, tracing = (document.get(name, {}) for name in ("cache", "log", "tracing"))
    config["cache"] = take(cache, "memory", "hot_rate") | {"extra": cache}
    config["log"] = take(log, "level", "access") | {"extra": log}
    if tracing.get("otlp"):
        config["tracing"] = {"ratio": 1} | take(tracing, "otlp", "ratio") | {"extra": tracing}
    return values


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with open(sys.argv[1], "rb") as file:
        print(json.dumps(values_of(tomllib.load(file)), indent=2, ensure_ascii=False))
