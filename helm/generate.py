#!/usr/bin/env python3
"""Writes the generated parts of the chart, or checks with --check that they are current.

Usage: helm/generate.py PATH-OF-TIDEGATE [--check]

- tidegate/README.md: the tables between its markers, from the comments of values.yaml.
- tidegate/values.schema.json: $defs.gateway, from `tidegate config schema`. The rest of the file is written by hand.
- tidegate/files: the alert rules and the dashboard of docs/monitoring.
"""
import copy
import json
import pathlib
import re
import subprocess
import sys

CHART = pathlib.Path(__file__).resolve().parent / "tidegate"
MONITORING = CHART.parent.parent / "docs" / "monitoring"

# Keys of `extra` and of sections without values of their own: path in the configuration, and the keys that have values.
SECTIONS = {
    "server": ("server", ["node", "drain_timeout"]),
    "limits_http": ("limits_http", []),
    "dns": ("dns", []),
    "pages": ("pages", []),
    "upstreams": ("upstreams", []),
    "routes": ("routes", []),
    "upstream": ("upstreams/NAME", ["endpoints", "balance", "timeout"]),
    "route": ("routes/NAME", ["name", "match", "upstream", "redirect", "respond", "limits", "cost", "cost_by_status", "cache"]),
    "cache": ("cache", ["memory", "hot_rate"]),
    "identity": ("identity", ["trusted_proxies", "device", "user", "tier", "region", "region_default"]),
    "jwt": ("identity/user/jwt", ["keys", "algorithms", "claim", "audience", "issuer", "leeway", "token"]),
    "redis": ("redis", ["regions", "deadline", "nodes", "compress_from", "hot_copies", "secret", "tls"]),
    "log": ("log", ["level", "access"]),
    "tracing": ("tracing", ["otlp", "ratio"]),
}
# Sections that the schema of the values repeats by hand, because it knows more about them: each key must be there.
BY_HAND = {"limits": "limits/NAME", "access": "access", "kubernetes": "kubernetes"}
# Only in builds with the feature of this name.
FEATURES = {"kubernetes"}


def section(schema, path):
    """The schema at a path such as upstreams/NAME: of a key that may be a value or a table, the table."""
    for step in path.split("/"):
        schema = next((form for form in schema.get("anyOf", []) if "properties" in form), schema)
        if step == "NAME":
            schema = schema["items"] if "items" in schema else schema["additionalProperties"]
        else:
            schema = schema["properties"][step]
    return next((form for form in schema.get("anyOf", []) if "properties" in form), schema)


def refine(schema):
    """Removes what only editors need."""
    if isinstance(schema, list):
        return [refine(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = dict(schema)
    if isinstance(schema.get("description"), str):
        del schema["description"]
        schema.pop("default", None)
    return {key: refine(value) if key != "enum" else value for key, value in schema.items()}


def names(schema):
    """The keys that a constraint names."""
    if isinstance(schema, list):
        return set().union(*map(names, schema))
    if isinstance(schema, dict):
        return set(schema) | names(list(schema.values()))
    return {schema}


def gateway_defs(tidegate):
    """The definitions of all entries of SECTIONS."""
    schema = json.loads(subprocess.run([tidegate, "config", "schema"], check=True, capture_output=True).stdout)
    defs = {}
    for name, (path, own) in SECTIONS.items():
        found = copy.deepcopy(section(schema, path))
        if own:
            for key in own:
                if key not in found["properties"]:
                    sys.exit(f"generate.py: the configuration has no {path}/{key}")
                found["properties"][key] = False
            # Other values set these keys.
            found.pop("required", None)
            found["allOf"] = [constraint for constraint in found.get("allOf", []) if not names(constraint) & set(own)]
            if not found["allOf"]:
                del found["allOf"]
        defs[name] = refine(found)
    values = json.loads((CHART / "values.schema.json").read_text())
    config = values["properties"]["config"]["properties"]
    for name, path in BY_HAND.items():
        if name in FEATURES and name not in schema["properties"]:
            continue
        by_hand = config[name].get("properties") or config[name]["additionalProperties"]["properties"]
        if difference := set(section(schema, path)["properties"]) ^ set(by_hand):
            sys.exit(f"generate.py: config.{name} in values.schema.json and {path} differ: {', '.join(sorted(difference))}")
    covered = {path.split("/")[0] for path, _ in SECTIONS.values()} | set(BY_HAND) | {"version", "listen", "admin", "tiers"}
    if missing := set(schema["properties"]) - covered:
        sys.exit(f"generate.py: sections without a value: {', '.join(sorted(missing))}")
    return defs


def documented_values(text):
    """Yields (section, path, default, description) for each value of values.yaml."""
    title, stack, comment = "", [], []
    lines = text.splitlines()
    for number, line in enumerate(lines):
        bare = line.strip()
        if bare.startswith("# @section -- "):
            title, comment = bare.removeprefix("# @section -- "), []
        elif bare.startswith("# -- "):
            comment = [bare.removeprefix("# -- ")]
        elif bare.startswith("#"):
            # Examples are indented.
            if comment and not bare.startswith("#  ") and bare != "#":
                comment.append(bare[1:].strip())
        elif match := re.match(r"( *)([A-Za-z_][A-Za-z0-9_]*):(.*)$", line):
            depth = len(match[1]) // 2
            stack = stack[:depth] + [match[2]]
            default = match[3].strip()
            block = []
            for after in lines[number + 1 :]:
                if not after.startswith(" " * (2 * depth + 2)):
                    break
                block.append(after[2 * depth + 2 :])
            is_list = block and block[0].startswith("- ")
            if comment or default or is_list:
                shown = default or " ".join(block if comment else [part for part in block if is_list])
                yield title, ".".join(stack), shown, " ".join(comment)
            comment = []


def readme(text):
    """The README with current tables."""
    begin, end = "<!-- values: generated by helm/generate.py from values.yaml -->\n", "<!-- end of values -->"
    before, rest = text.split(begin, 1)
    _, after = rest.split(end, 1)
    table, title, hidden = [], None, None
    for section_title, path, default, description in documented_values((CHART / "values.yaml").read_text()):
        if hidden and path.startswith(hidden + "."):
            continue
        hidden = path if description and not re.match(r"[\[{\"']|[^ ]*$", default) else None
        if section_title != title:
            title = section_title
            table += ["", f"### {title}", "", "| value | default | description |", "|---|---|---|"]
        description = description or KNOWN.get(path.split(".")[-1])
        if not description:
            sys.exit(f"generate.py: {path} in values.yaml has no comment that begins with `# --`")
        table.append("| `{}` | `{}` | {} |".format(path, *(text.replace("|", "\\|") for text in (default, description))))
    return before + begin + "\n".join(table[1:]) + "\n\n" + end + after


# Values whose names say it all.
KNOWN = {
    "annotations": "Annotations of the object.",
    "labels": "Labels of the object.",
    "tolerations": "As in a pod.",
    "affinity": "As in a pod.",
    "priorityClassName": "As in a pod.",
    "hostAliases": "As in a pod.",
}


def main():
    arguments = [argument for argument in sys.argv[1:] if argument != "--check"]
    if len(arguments) != 1:
        sys.exit(__doc__)
    schema_file = CHART / "values.schema.json"
    schema = json.loads(schema_file.read_text())
    schema["$defs"]["gateway"] = gateway_defs(arguments[0])
    wanted = {
        CHART / "README.md": readme((CHART / "README.md").read_text()),
        schema_file: json.dumps(schema, indent=2, ensure_ascii=False) + "\n",
    }
    for name in ["alerts.yaml", "grafana.json"]:
        wanted[CHART / "files" / name] = (MONITORING / name).read_text()
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        if stale:
            sys.exit(f"not current: {', '.join(path.name for path in stale)}; run helm/generate.py {arguments[0]}")
        return
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        path.write_text(wanted[path])
        print(f"wrote {path.relative_to(CHART.parent)}")


if __name__ == "__main__":
    main()
