#!/bin/bash
# Checks a release: check.sh DIRECTORY (as dist.sh has written it)
# Runs the program of each artefact. With root and debootstrap, the package is installed, upgraded and purged in a Debian
# of its own (kept in ~/.cache/tidegate/debian); otherwise it is unpacked, and the check says what it has not seen.
set -euo pipefail

dist=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/../../Cargo.toml" | head -1)
work=$(mktemp -d)
started=()
finish() {
  for pid in "${started[@]}"; do kill -9 "$pid" 2>/dev/null || true; done
  rm -rf "$work"
}
trap finish EXIT
fail() {
  echo "FAILED: $*" >&2
  exit 1
}
skipped() { echo "SKIPPED: $*" >&2; }
step() { echo "-- $*"; }
# Waits for a condition, at most 10 s.
until_true() {
  for _ in $(seq 100); do
    if "$@" >/dev/null 2>&1; then return 0; fi
    sleep 0.1
  done
  fail "it did not happen: $*"
}

step "checksums"
(cd "$dist" && sha256sum --quiet --check SHA256SUMS)
listed=$(awk '{ print $2 }' "$dist/SHA256SUMS" | sort)
[ "$listed" = "$(cd "$dist" && ls | grep -v SHA256SUMS | sort)" ] || fail "SHA256SUMS lists other files"

step "SBOM"
for bom in "$dist"/*.cdx.json; do python3 "$here/sbom.py" check "$bom"; done

step "archive"
tar -C "$work" -xzf "$dist/tidegate-$version-x86_64-linux.tar.gz"
tree=$work/tidegate-$version-x86_64-linux
for file in tidegate LICENSE THIRD-PARTY-LICENSES.txt tidegate.example.toml man/tidegate.1 man/tidegate-run.1 \
  completions/tidegate.bash completions/_tidegate completions/tidegate.fish; do
  [ -s "$tree/$file" ] || fail "$file is missing or empty"
done
for library in tokio rustls aws-lc-sys zstd-sys; do
  grep -q "^$library " "$tree/THIRD-PARTY-LICENSES.txt" || fail "no licence of $library"
done
if readelf -d "$tree/tidegate" | grep -q NEEDED; then fail "the program is linked dynamically"; fi
if readelf -lW "$tree/tidegate" | grep -q INTERP; then fail "the program needs an interpreter"; fi
if readelf -SW "$tree/tidegate" | grep -qE '\.(symtab|debug_info)'; then fail "the program is not stripped"; fi
readelf -SW "$dist/tidegate-$version-x86_64-linux.debug" | grep -q '\.debug_line' || fail "no debug information"
"$tree/tidegate" --version | grep -q "^tidegate $version" || fail "another version"
# A page of the manual has a name and a synopsis.
for page in "$tree"/man/*.1; do grep -q '^.SH SYNOPSIS' "$page" || fail "$page"; done
bash -n "$tree/completions/tidegate.bash"
if grep -aq -e "$HOME/.cargo" -e "$here" "$tree/tidegate"; then fail "the program has paths of this machine"; fi

# The packages again, from the program of the archive, by a user whose umask and temporary directory are others.
step "reproducible packages"
mkdir "$work/again" "$work/temporary"
(
  umask 077
  export TMPDIR=$work/temporary SOURCE_DATE_EPOCH
  SOURCE_DATE_EPOCH=$(stat -c %Y "$tree/tidegate")
  "$here/deb.sh" "$tree/tidegate" "$version" amd64 "$tree" "$work/again/tidegate_${version}_amd64.deb"
  python3 "$here/image.py" write "$tree/tidegate" "$version" amd64 "$work/again/tidegate-$version-x86_64-linux.oci.tar"
)
for file in "$work"/again/*; do cmp "$file" "$dist/${file##*/}" || fail "${file##*/} differs when it is built again"; done

step "image"
mkdir "$work/image"
OUT=$work/image python3 "$here/image.py" check "$dist/tidegate-$version-x86_64-linux.oci.tar"
cmp "$work/image/tidegate" "$tree/tidegate"
# As a runtime starts it: nothing but the files of the image, without root.
cat >"$work/minimal.toml" <<'CONFIG'
version = 1
[[listen]]
address = "127.0.0.1:18081"
[admin]
address = "127.0.0.1:19901"
[[routes]]
name = "all"
match = { path = "/*" }
respond = { status = 200, body = "from the image\n", content_type = "text/plain" }
CONFIG
if [ "$(id -u)" = 0 ]; then
  mkdir -p "$work/image/etc/tidegate"
  cp "$work/minimal.toml" "$work/image/etc/tidegate/tidegate.toml"
  chmod 755 "$work" "$work/image"
  chroot --userspec=65532:65532 "$work/image" /tidegate run --config /etc/tidegate/tidegate.toml >"$work/image.log" 2>&1 &
  started+=($!)
  until_true curl -sf http://127.0.0.1:18081/
  [ "$(curl -s http://127.0.0.1:18081/)" = "from the image" ] || fail "the image answers something else"
  kill -INT "${started[-1]}"
  wait "${started[-1]}" || fail "the image: $(cat "$work/image.log")"
else
  skipped "the image was not started: chroot needs root"
fi

step "units"
deb=$dist/tidegate_${version}_amd64.deb
dpkg-deb -x "$deb" "$work/deb"
dpkg-deb -e "$deb" "$work/control"
if command -v systemd-analyze >/dev/null; then
  units=$work/deb/usr/lib/systemd/system
  # The program is at its path only where the package is installed.
  mkdir "$work/units"
  sed "s|/usr/bin/tidegate|$work/deb/usr/bin/tidegate|; /^Documentation=/d" "$units/tidegate.service" >"$work/units/tidegate.service"
  cp "$units/tidegate.socket" "$work/units"
  verified=$(systemd-analyze verify --man=no "$work/units/tidegate.service" "$work/units/tidegate.socket" 2>&1 | grep -F "$work/units" || true)
  [ -z "$verified" ] || fail "$verified"
  exposure=$(systemd-analyze security --offline=yes --threshold=20 "$work/units/tidegate.service" 2>&1 | tail -1) || fail "$exposure"
  echo "$exposure"
else
  skipped "the units were not verified: systemd-analyze is not installed"
fi

step "package"
for script in postinst prerm postrm; do sh -n "$work/control/$script"; done
while read -r conffile; do [ -f "$work/deb$conffile" ] || fail "no $conffile"; done <"$work/control/conffiles"
(cd "$work/deb" && md5sum --quiet --check "$work/control/md5sums")
"$work/deb/usr/bin/tidegate" check --deny-warnings "$work/deb/etc/tidegate/tidegate.toml"
"$work/deb/usr/bin/tidegate" check "$work/deb/usr/share/doc/tidegate/examples/tidegate.example.toml"

# A Debian without a running systemd: the unit's command is started by hand, with a manager that listens.
if [ "$(id -u)" != 0 ] || ! command -v debootstrap >/dev/null; then
  skipped "the package was not installed: that needs root and debootstrap"
  exit 0
fi
base=$HOME/.cache/tidegate/debian
if [ ! -e "$base/usr/bin/dpkg" ]; then
  rm -rf "$base" "$base.new"
  mkdir -p "$(dirname "$base")"
  if ! debootstrap --variant=minbase --include=init-system-helpers bookworm "$base.new" ${DEBIAN_MIRROR:-} >"$work/debootstrap.log" 2>&1; then
    rm -rf "$base.new"
    skipped "the package was not installed: debootstrap failed: $(tail -1 "$work/debootstrap.log")"
    exit 0
  fi
  mv "$base.new" "$base"
fi
root=$work/debian
cp -a "$base" "$root"
cp "$deb" "$root/tmp/tidegate.deb"
run() { chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive "$@"; }
mount -t proc proc "$root/proc"
# shellcheck disable=SC2317
unmount() {
  umount "$root/proc" || umount -l "$root/proc"
  finish
}
trap unmount EXIT

step "install"
run dpkg -i /tmp/tidegate.deb >"$work/install.log" 2>&1 || fail "$(cat "$work/install.log")"
run getent passwd tidegate >/dev/null || fail "no user tidegate"
[ "$(stat -c '%a' "$root/etc/tidegate")" = 750 ] || fail "the configuration is open to all"
[ -L "$root/etc/systemd/system/multi-user.target.wants/tidegate.service" ] || fail "the service is not enabled"
[ ! -e "$root/etc/systemd/system/sockets.target.wants/tidegate.socket" ] || fail "the socket is enabled"

step "run the command of the unit, upgrade it, stop it"
sed -i 's/127.0.0.1:8080/127.0.0.1:18082/' "$root/etc/tidegate/tidegate.toml"
printf '\n[admin]\naddress = "127.0.0.1:19902"\n' >>"$root/etc/tidegate/tidegate.toml"
run install -d -o tidegate -g tidegate -m 700 /run/tidegate
command=$(sed -n 's/^ExecStart=//p' "$root/usr/lib/systemd/system/tidegate.service")
python3 - "$root/run/notify" "$work/notified" <<'PYTHON' &
import os, socket, sys
manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
manager.bind(sys.argv[1])
os.chmod(sys.argv[1], 0o666)
with open(sys.argv[2], "w") as out:
    while True:
        out.write(manager.recv(4096).decode().replace("\n", " ") + "\n")
        out.flush()
PYTHON
started+=($!)
until_true test -S "$root/run/notify"
# shellcheck disable=SC2086
chroot --userspec=tidegate:tidegate "$root" /usr/bin/env -i PATH=/usr/bin NOTIFY_SOCKET=/run/notify $command >"$work/service.log" 2>&1 &
started+=($!)
service=${started[-1]}
until_true grep -q '^READY=1' "$work/notified"
[ "$(curl -s http://127.0.0.1:18082/)" = "Tidegate runs. Its configuration is /etc/tidegate/tidegate.toml." ] || fail "it answers something else"
[ "$(stat -c '%a' "$root/run/tidegate/upgrade.sock")" = 600 ] || fail "the upgrade socket is open to all"
# What `postinst` does to a running service.
kill -USR2 "$service"
until_true grep -q '^MAINPID=' "$work/notified"
successor=$(sed -n 's/^MAINPID=\([0-9]*\).*/\1/p' "$work/notified")
started+=("$successor")
until_true grep -q '"event":"took_over"' "$work/service.log"
wait "$service" || fail "the replaced process: $(cat "$work/service.log")"
[ "$(curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:18082/)" = 200 ] || fail "the successor does not answer"
kill -INT "$successor"
until_true grep -q '^STOPPING=1' "$work/notified"
until_true test ! -e "/proc/$successor"

step "upgrade, remove, purge"
echo '# changed by hand' >>"$root/etc/tidegate/tidegate.toml"
run dpkg -i /tmp/tidegate.deb >"$work/install.log" 2>&1 || fail "$(cat "$work/install.log")"
grep -q 'changed by hand' "$root/etc/tidegate/tidegate.toml" || fail "an upgrade has replaced the configuration"
run dpkg --remove tidegate >"$work/install.log" 2>&1 || fail "$(cat "$work/install.log")"
[ -e "$root/etc/tidegate/tidegate.toml" ] && [ ! -e "$root/usr/bin/tidegate" ] || fail "remove"
run dpkg -i /tmp/tidegate.deb >"$work/install.log" 2>&1 || fail "$(cat "$work/install.log")"
run dpkg --purge tidegate >"$work/install.log" 2>&1 || fail "$(cat "$work/install.log")"
left=$(find "$root/etc" "$root/usr" "$root/var/lib/systemd" "$root/var/lib/tidegate" "$root/var/log/tidegate" -name '*tidegate*' 2>/dev/null || true)
[ -z "$left" ] || fail "a purge leaves $left"
run dpkg --audit
echo 'all checks of the release passed'
