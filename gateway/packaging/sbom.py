#!/usr/bin/env python3
"""Writes the SBOM (CycloneDX 1.5, JSON) or the licences of what the program `tidegate` links.

    sbom.py sbom TARGET      the components, with licence, checksum, package URL and dependencies
    sbom.py licences TARGET  the licence texts of all components, for the reader
    sbom.py check FILE       exit status 1 unless FILE is complete and agrees with Cargo.lock

The components are those that `cargo metadata` resolves for TARGET without dev-dependencies, with the features of the release.
CARGO is the cargo to use.
The output depends on the sources alone: SOURCE_DATE_EPOCH is the time in it.
"""
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time
import tomllib
import uuid

ROOT = pathlib.Path(__file__).resolve().parents[2]
# As dist.sh builds the program.
FEATURES = "gateway/kubernetes"
LICENCE_FILES = ("licen[sc]e*", "LICEN[SC]E*", "COPYING*", "COPYRIGHT*", "NOTICE*")


def metadata(target):
    cargo = os.environ.get("CARGO") or "cargo"
    command = [cargo, "metadata", "--locked", "--format-version=1", "--features", FEATURES, "--filter-platform", target]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)


def linked(data):
    """The packages that the program needs, by id, with their dependencies."""
    nodes = {node["id"]: node for node in data["resolve"]["nodes"]}
    packages = {package["id"]: package for package in data["packages"]}
    root = next(package["id"] for package in data["packages"] if package["name"] == "gateway")

    def needed(node):
        kinds = [None, "build"]
        return sorted(dep["pkg"] for dep in node["deps"] if any(kind["kind"] in kinds for kind in dep["dep_kinds"]))

    found, waiting = {}, [root]
    while waiting:
        package = waiting.pop()
        if package not in found:
            found[package] = needed(nodes[package])
            waiting.extend(found[package])
    return root, {package: (packages[package], depends) for package, depends in found.items()}


def checksums():
    lock = tomllib.loads((ROOT / "Cargo.lock").read_text())
    return {(package["name"], package["version"]): package.get("checksum") for package in lock["package"]}


def purl(package):
    return f"pkg:cargo/{package['name']}@{package['version']}"


def component(package, sums):
    entry = {
        "type": "library",
        "bom-ref": purl(package),
        "name": package["name"],
        "version": package["version"],
        "purl": purl(package),
    }
    # SPDX expressions; old crates write `/` for OR.
    if package["license"]:
        entry["licenses"] = [{"expression": package["license"].replace("/", " OR ")}]
    checksum = sums.get((package["name"], package["version"]))
    if checksum:
        entry["hashes"] = [{"alg": "SHA-256", "content": checksum}]
    if package["repository"]:
        entry["externalReferences"] = [{"type": "vcs", "url": package["repository"]}]
    return entry


def sbom(target):
    root, packages = linked(metadata(target))
    sums = checksums()
    ordered = sorted(packages.values(), key=lambda item: (item[0]["name"], item[0]["version"]))
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH", "0"))
    program = component(packages[root][0], sums) | {"type": "application", "name": "tidegate"}
    digest = hashlib.sha256((ROOT / "Cargo.lock").read_bytes() + target.encode()).hexdigest()
    dependencies = [
        {"ref": purl(package), "dependsOn": sorted({purl(packages[dependency][0]) for dependency in depends})}
        for package, depends in ordered
    ]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, digest)}",
        "version": 1,
        "metadata": {
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch)),
            "component": program,
            "properties": [{"name": "cargo:target", "value": target}],
        },
        "components": [component(package, sums) for package, _ in ordered if package["id"] != root],
        "dependencies": dependencies,
    }


def licence_texts(package):
    directory = pathlib.Path(package["manifest_path"]).parent
    files = {path for pattern in LICENCE_FILES for path in directory.glob(pattern) if path.is_file()}
    return [(path.name, path.read_text(errors="replace").strip()) for path in sorted(files)]


def licences(target):
    root, packages = linked(metadata(target))
    texts, lines = {}, []
    for package, _ in sorted(packages.values(), key=lambda item: (item[0]["name"], item[0]["version"])):
        own = pathlib.Path(package["manifest_path"]).is_relative_to(ROOT)
        if own:
            continue
        lines.append(f"{package['name']} {package['version']}: {package['license'] or 'see its text'}")
        for name, text in licence_texts(package):
            texts.setdefault(text, []).append(f"{package['name']} {package['version']} ({name})")
    out = ["tidegate links these libraries:", "", *lines]
    # A text that many share stands here once.
    for text, users in sorted(texts.items(), key=lambda item: item[1]):
        out += ["", "=" * 100, "Of " + ", ".join(users) + ":", "", text]
    return "\n".join(out) + "\n"


def check(path):
    bom = json.loads(pathlib.Path(path).read_text())
    faults = []
    if (bom.get("bomFormat"), bom.get("specVersion")) != ("CycloneDX", "1.5"):
        faults.append("it is not CycloneDX 1.5")
    uuid.UUID(bom["serialNumber"].removeprefix("urn:uuid:"))
    time.strptime(bom["metadata"]["timestamp"], "%Y-%m-%dT%H:%M:%SZ")
    components = bom["components"]
    refs = [entry["bom-ref"] for entry in components] + [bom["metadata"]["component"]["bom-ref"]]
    if len(set(refs)) != len(refs):
        faults.append("a component is listed twice")
    locked = checksums()
    for entry in components:
        name = f"{entry['name']} {entry['version']}"
        key = (entry["name"], entry["version"])
        if key not in locked:
            faults.append(f"{name} is not in Cargo.lock")
        elif locked[key] != (entry.get("hashes") or [{}])[0].get("content"):
            faults.append(f"{name} has another checksum than Cargo.lock")
        if not entry.get("licenses") or "/" in entry["licenses"][0]["expression"]:
            faults.append(f"{name} has no licence expression")
    by_ref = {entry["ref"]: entry["dependsOn"] for entry in bom["dependencies"]}
    if sorted(by_ref) != sorted(refs):
        faults.append("the dependencies do not name every component once")
    reached, waiting = set(), [bom["metadata"]["component"]["bom-ref"]]
    while waiting:
        ref = waiting.pop()
        if ref not in reached:
            reached.add(ref)
            waiting.extend(by_ref.get(ref, []))
    if reached != set(refs):
        faults.append(f"not reached from the program, or unknown: {sorted(reached ^ set(refs))}")
    for name in ("tokio", "rustls", "aws-lc-sys", "kube-client"):
        if not any(entry["name"] == name for entry in components):
            faults.append(f"{name} is missing, which the program links")
    for fault in faults:
        print(f"{path}: {fault}", file=sys.stderr)
    print(f"{path}: {len(components)} components, {len(faults)} faults")
    return 1 if faults else 0


def main():
    match sys.argv[1:]:
        case ["sbom", target]:
            json.dump(sbom(target), sys.stdout, indent=1)
            print()
        case ["licences", target]:
            sys.stdout.write(licences(target))
        case ["check", path]:
            sys.exit(check(path))
        case _:
            sys.exit(__doc__)


main()
