#!/usr/bin/env python3
"""Validates the rendered manifests on standard input against the schemas of Kubernetes and of known custom resources.

Usage: helm template ... | helm/validate.py     Needs kubernetes-validate.

Unknown and misplaced fields are errors. Custom resources have no published schema in that package: the one here names the fields that their
controllers require, and what the chart may set beside them.
"""
import sys

import jsonschema
import kubernetes_validate
import yaml

VERSION = "1.37.0"
TEXT = {"type": "string", "minLength": 1}
OPEN = {"type": "object"}
COUNT = {"type": "integer", "minimum": 0}


def closed(required, optional=None):
    return {"type": "object", "required": list(required), "properties": required | (optional or {}), "additionalProperties": False}


def items(schema):
    return {"type": "array", "minItems": 1, "items": schema}


CUSTOM = {
    "cert-manager.io/v1 Certificate": closed(
        {"secretName": TEXT, "dnsNames": items(TEXT), "issuerRef": closed({"name": TEXT}, {"kind": TEXT, "group": TEXT})},
        {"duration": TEXT, "renewBefore": TEXT, "privateKey": OPEN, "usages": items(TEXT)},
    ),
    "gateway.networking.k8s.io/v1 HTTPRoute": closed(
        {
            "parentRefs": items(closed({"name": TEXT}, {"namespace": TEXT, "sectionName": TEXT, "port": COUNT, "kind": TEXT, "group": TEXT})),
            "rules": items(closed({"backendRefs": items(closed({"name": TEXT, "port": COUNT}))}, {"matches": items(OPEN), "filters": items(OPEN), "timeouts": OPEN})),
        },
        {"hostnames": items(TEXT)},
    ),
    "keda.sh/v1alpha1 ScaledObject": closed(
        {"scaleTargetRef": closed({"name": TEXT}), "triggers": items(closed({"type": TEXT, "metadata": {"type": "object", "additionalProperties": TEXT}}, {"metricType": TEXT, "name": TEXT}))},
        {"minReplicaCount": COUNT, "maxReplicaCount": COUNT, "pollingInterval": COUNT, "fallback": closed({"failureThreshold": COUNT, "replicas": COUNT}), "advanced": OPEN},
    ),
    "monitoring.coreos.com/v1 PodMonitor": closed(
        {"selector": OPEN, "podMetricsEndpoints": items(closed({"port": TEXT}, {"path": TEXT, "interval": TEXT, "relabelings": items(OPEN), "scrapeTimeout": TEXT}))}, {"jobLabel": TEXT}
    ),
    "monitoring.coreos.com/v1 PrometheusRule": closed(
        {"groups": items(closed({"name": TEXT, "rules": items(closed({"alert": TEXT, "expr": TEXT}, {"for": TEXT, "labels": OPEN, "annotations": OPEN}))}))}
    ),
}


def validate(manifest):
    kind = f"{manifest['apiVersion']} {manifest['kind']}"
    if kind not in CUSTOM:
        return kubernetes_validate.validate(manifest, VERSION, strict=True)
    return jsonschema.validate(manifest, closed({"apiVersion": TEXT, "kind": TEXT, "metadata": closed({"name": TEXT}, {"labels": OPEN, "annotations": OPEN}), "spec": CUSTOM[kind]}))


def main():
    manifests = [manifest for manifest in yaml.safe_load_all(sys.stdin) if manifest]
    names = set()
    for manifest in manifests:
        name = f"{manifest['kind']} {manifest['metadata'].get('namespace', '')}/{manifest['metadata']['name']}"
        if name in names:
            sys.exit(f"{name} is there twice")
        names.add(name)
        try:
            validate(manifest)
        except (jsonschema.ValidationError, kubernetes_validate.ValidationError, kubernetes_validate.InvalidSchemaError) as error:
            sys.exit(f"{name}: {error}")


if __name__ == "__main__":
    main()
