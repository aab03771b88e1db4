#!/bin/sh
# Builds the Debian package: deb.sh PROGRAM VERSION ARCH DOCUMENTS OUTPUT.deb
# DOCUMENTS has man/, completions/, LICENSE and THIRD-PARTY-LICENSES.txt, as dist.sh makes them.
# Two runs with the same input and SOURCE_DATE_EPOCH give the same bytes.
set -eu

program=$1 version=$2 arch=$3 documents=$4 output=$5
here=$(cd "$(dirname "$0")" && pwd)
docs=$here/../../docs
: "${SOURCE_DATE_EPOCH:?is the time of the files in the package}"
export SOURCE_DATE_EPOCH

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
umask 022
# mktemp makes a directory that only its owner may enter; it becomes `/` of the package.
chmod 755 "$root"

put() { # MODE SOURCE PATH
  install -D -m "$1" "$2" "$root$3"
}
put_gzip() { # SOURCE PATH
  mkdir -p "$root$(dirname "$2")"
  gzip -9n <"$1" >"$root$2.gz"
}

put 755 "$program" /usr/bin/tidegate
put 640 "$here/deb/tidegate.toml" /etc/tidegate/tidegate.toml
chmod 644 "$root/etc/tidegate/tidegate.toml"
put 644 "$here/deb/tidegate.logrotate" /etc/logrotate.d/tidegate
put 644 "$here/deb/tidegate.service" /usr/lib/systemd/system/tidegate.service
put 644 "$here/deb/tidegate.socket" /usr/lib/systemd/system/tidegate.socket
for page in "$documents"/man/*.1; do put_gzip "$page" "/usr/share/man/man1/$(basename "$page")"; done
put 644 "$documents/completions/tidegate.bash" /usr/share/bash-completion/completions/tidegate
put 644 "$documents/completions/_tidegate" /usr/share/zsh/vendor-completions/_tidegate
put 644 "$documents/completions/tidegate.fish" /usr/share/fish/vendor_completions.d/tidegate.fish
for page in operations configuration metrics; do put_gzip "$docs/$page.md" "/usr/share/doc/tidegate/$page.md"; done
put_gzip "$here/../../CHANGELOG.md" /usr/share/doc/tidegate/changelog
put 644 "$docs/tidegate.example.toml" /usr/share/doc/tidegate/examples/tidegate.example.toml
{
  echo 'Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/'
  echo 'Upstream-Name: tidegate'
  echo
  echo 'Files: *'
  echo 'Copyright: The Tidegate authors'
  echo 'License: Apache-2.0'
  echo ' On Debian systems, the text is in /usr/share/common-licenses/Apache-2.0.'
  echo ' The licences of the linked libraries are in THIRD-PARTY-LICENSES.txt.gz.'
} >"$root/usr/share/doc/tidegate/copyright"
put_gzip "$documents/THIRD-PARTY-LICENSES.txt" /usr/share/doc/tidegate/THIRD-PARTY-LICENSES.txt

mkdir "$root/DEBIAN"
# Installed-Size as dpkg-gencontrol counts it: what a directory takes differs between file systems.
size=$(find "$root/usr" "$root/etc" -printf '%y %s\n' | awk '{ sum += $1 == "f" ? int(($2 + 1023) / 1024) : 1 } END { print sum }')
sed -e "s/@VERSION@/$version/" -e "s/@ARCH@/$arch/" -e "s/@SIZE@/$size/" "$here/deb/control.in" >"$root/DEBIAN/control"
put 644 "$here/deb/conffiles" /DEBIAN/conffiles
for script in postinst prerm postrm; do put 755 "$here/deb/$script" "/DEBIAN/$script"; done
(cd "$root" && find usr etc -type f | LC_ALL=C sort | xargs md5sum) >"$root/DEBIAN/md5sums"
find "$root" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
dpkg-deb --root-owner-group -Zxz --build "$root" "$output" >/dev/null
