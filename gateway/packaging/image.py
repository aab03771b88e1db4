#!/usr/bin/env python3
"""Writes a container image from a static program, without a daemon.

    image.py write PROGRAM VERSION ARCH FILE   ARCH: amd64 or arm64
    image.py check FILE                        every digest, and the configuration; extracts to $OUT if set

FILE is an OCI layout in a tar archive with the `manifest.json` of `docker save`: `docker load`, `podman load`,
`ctr images import` and `skopeo copy oci-archive:` read it. It has what gateway/Dockerfile builds: the program, the CA
certificates of this machine if there are any, and no user database. The bytes depend on the input and SOURCE_DATE_EPOCH alone.
"""
import gzip
import hashlib
import io
import json
import os
import pathlib
import sys
import tarfile
import time

CERTIFICATES = pathlib.Path("/etc/ssl/certs/ca-certificates.crt")
EPOCH = int(os.environ.get("SOURCE_DATE_EPOCH", "0"))
OCI = "application/vnd.oci.image"


def digest(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def archive(files):
    """A tar archive of (name, bytes or None for a directory, mode)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data, mode in files:
            info = tarfile.TarInfo(name)
            info.mode, info.mtime = mode, EPOCH
            if data is None:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def layer(program):
    files = []
    if CERTIFICATES.exists():
        files = [("etc", None, 0o755), ("etc/ssl", None, 0o755), ("etc/ssl/certs", None, 0o755)]
        files.append(("etc/ssl/certs/ca-certificates.crt", CERTIFICATES.read_bytes(), 0o644))
    else:
        print("image.py: no CA certificates on this machine: `redis.tls.ca` and `tls.ca` have to be set", file=sys.stderr)
    return archive([*files, ("tidegate", pathlib.Path(program).read_bytes(), 0o755)])


def write(program, version, arch, path):
    raw = layer(program)
    packed = gzip.compress(raw, 9, mtime=0)
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(EPOCH))
    config = {
        "architecture": arch,
        "os": "linux",
        "created": created,
        "config": {
            "User": "65532:65532",
            "ExposedPorts": {"8080/tcp": {}, "8443/tcp": {}, "9900/tcp": {}},
            "Entrypoint": ["/tidegate"],
            "Cmd": ["run", "--config", "/etc/tidegate/tidegate.toml"],
            "StopSignal": "SIGTERM",
            "Labels": {"org.opencontainers.image.title": "tidegate", "org.opencontainers.image.version": version},
        },
        "rootfs": {"type": "layers", "diff_ids": [digest(raw)]},
        "history": [{"created": created, "created_by": "gateway/packaging/image.py"}],
    }
    config = json.dumps(config).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{OCI}.manifest.v1+json",
        "config": {"mediaType": f"{OCI}.config.v1+json", "digest": digest(config), "size": len(config)},
        "layers": [{"mediaType": f"{OCI}.layer.v1.tar+gzip", "digest": digest(packed), "size": len(packed)}],
    }
    manifest = json.dumps(manifest).encode()
    name = f"docker.io/library/tidegate:{version}"
    index = {
        "schemaVersion": 2,
        "mediaType": f"{OCI}.index.v1+json",
        "manifests": [
            {
                "mediaType": f"{OCI}.manifest.v1+json",
                "digest": digest(manifest),
                "size": len(manifest),
                "platform": {"architecture": arch, "os": "linux"},
                "annotations": {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": version},
            }
        ],
    }

    def blob(data):
        return "blobs/sha256/" + digest(data).removeprefix("sha256:")

    docker = [{"Config": blob(config), "RepoTags": [f"tidegate:{version}"], "Layers": [blob(packed)]}]
    files = [
        ("oci-layout", b'{"imageLayoutVersion":"1.0.0"}', 0o644),
        ("index.json", json.dumps(index).encode(), 0o644),
        ("manifest.json", json.dumps(docker).encode(), 0o644),
        ("blobs", None, 0o755),
        ("blobs/sha256", None, 0o755),
        *[(blob(data), data, 0o644) for data in (config, manifest, packed)],
    ]
    pathlib.Path(path).write_bytes(archive(files))


def check(path):
    with tarfile.open(path) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}

    def read(descriptor):
        data = files["blobs/sha256/" + descriptor["digest"].removeprefix("sha256:")]
        assert (digest(data), len(data)) == (descriptor["digest"], descriptor["size"]), descriptor
        return data

    assert json.loads(files["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}
    (entry,) = json.loads(files["index.json"])["manifests"]
    manifest = json.loads(read(entry))
    config = json.loads(read(manifest["config"]))
    (packed,) = [read(descriptor) for descriptor in manifest["layers"]]
    raw = gzip.decompress(packed)
    assert config["rootfs"]["diff_ids"] == [digest(raw)]
    assert entry["platform"]["architecture"] == config["architecture"]
    assert config["config"]["User"] == "65532:65532" and config["config"]["Entrypoint"] == ["/tidegate"]
    (docker,) = json.loads(files["manifest.json"])
    assert json.loads(files[docker["Config"]]) == config and [files[name] for name in docker["Layers"]] == [packed]
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        members = {member.name: member for member in tar}
        assert members["tidegate"].mode == 0o755 and all(member.uid == 0 for member in members.values())
        if os.environ.get("OUT"):
            tar.extractall(os.environ["OUT"], filter="tar")
    print(f"{path}: {config['architecture']}, {len(packed) / 2**20:.1f} MiB")


def main():
    match sys.argv[1:]:
        case ["write", program, version, ("amd64" | "arm64") as arch, path]:
            write(program, version, arch, path)
        case ["check", path]:
            check(path)
        case _:
            sys.exit(__doc__)


main()
