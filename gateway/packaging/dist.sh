#!/bin/sh
# Builds a release: dist.sh DIRECTORY
#   tidegate-VERSION-ARCH-linux.tar.gz   static program, man pages, completions, licences, example configuration
#   tidegate-VERSION-ARCH-linux.debug    its debug information, for gdb and addr2line
#   tidegate_VERSION_ARCH.deb            Debian package with systemd units
#   tidegate-VERSION-ARCH-linux.oci.tar  container image, for `docker load` and `ctr images import`
#   tidegate-VERSION-ARCH.cdx.json       SBOM (CycloneDX)
#   SHA256SUMS
# For x86-64, and for arm64 where its toolchain is installed. CARGO is the cargo to use, PROFILE its profile, by default
# `release`; CARGO_FLAGS are added to the build, such as `--config profile.release.lto=false` for a quick one. SOURCE_DATE_EPOCH, by default the time of the last
# commit, is the time of every file: the same sources and the same compiler give the same bytes, in whatever directory;
# reproduce.sh shows it.
set -eu
umask 022

here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
out=$1
cargo=${CARGO:-cargo}
profile=${PROFILE:-release}
target_dir=$(realpath -m "${CARGO_TARGET_DIR:-target}")
export CARGO_TARGET_DIR="$target_dir" CARGO="$cargo"
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
if [ -z "${SOURCE_DATE_EPOCH:-}" ]; then
  SOURCE_DATE_EPOCH=$(git log -1 --format=%ct 2>/dev/null || stat -c %Y CHANGELOG.md)
fi
export SOURCE_DATE_EPOCH LC_ALL=C TZ=UTC
mkdir -p "$out"
rm -f "$out"/tidegate* "$out"/SHA256SUMS
out=$(cd "$out" && pwd)

sources=$(ls -d "${CARGO_HOME:-$HOME/.cargo}"/registry/src/* 2>/dev/null | head -1)

# Paths of this machine do not belong into the program.
build() { # TRIPLE
  # shellcheck disable=SC2086
  RUSTFLAGS="-C target-feature=+crt-static --remap-path-prefix=$PWD=/src --remap-path-prefix=${sources:-/none}=/crates --remap-path-prefix=$target_dir=/target" \
    CFLAGS="-ffile-prefix-map=$PWD=/src -ffile-prefix-map=${sources:-/none}=/crates -ffile-prefix-map=$target_dir=/target" \
    "$cargo" build --locked --profile "$profile" --package gateway --features kubernetes --bin tidegate --target "$1" ${CARGO_FLAGS:-}
}

# What the program itself prints needs a program that runs here.
documents() { # PROGRAM DIRECTORY TRIPLE
  mkdir -p "$2/man" "$2/completions"
  "$1" man >"$2/man/tidegate.1"
  for command in demo run check config purge top key password completions man; do
    "$1" man "$command" >"$2/man/tidegate-$command.1"
  done
  "$1" completions bash >"$2/completions/tidegate.bash"
  "$1" completions zsh >"$2/completions/_tidegate"
  "$1" completions fish >"$2/completions/tidegate.fish"
  cp LICENSE docs/tidegate.example.toml "$2"
  python3 "$here/sbom.py" licences "$3" >"$2/THIRD-PARTY-LICENSES.txt"
}

pack() { # TRIPLE ARCH DEB_ARCH STRIP_PREFIX
  name=tidegate-$version-$2-linux
  stage=$work/$name
  mkdir -p "$stage"
  program=$target_dir/$1/$profile/tidegate
  "$4objcopy" --only-keep-debug "$program" "$out/$name.debug"
  "$4strip" --strip-all -o "$stage/tidegate" "$program"
  (cd "$out" && "$4objcopy" --add-gnu-debuglink="$name.debug" "$stage/tidegate")
  cp -R "$work/documents/." "$stage"
  chmod -R u=rwX,go=rX "$stage"
  find "$stage" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
  tar -C "$work" --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$SOURCE_DATE_EPOCH" -cf - "$name" |
    gzip -9n >"$out/$name.tar.gz"
  "$here/deb.sh" "$stage/tidegate" "$version" "$3" "$work/documents" "$out/tidegate_${version}_$3.deb"
  python3 "$here/image.py" write "$stage/tidegate" "$version" "$3" "$out/$name.oci.tar"
  python3 "$here/sbom.py" sbom "$1" >"$out/tidegate-$version-$2.cdx.json"
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
build x86_64-unknown-linux-gnu
documents "$target_dir/x86_64-unknown-linux-gnu/$profile/tidegate" "$work/documents" x86_64-unknown-linux-gnu
pack x86_64-unknown-linux-gnu x86_64 amd64 ''

libdir=$(${RUSTC:-rustc} --print target-libdir --target aarch64-unknown-linux-gnu 2>/dev/null || echo /nonexistent)
if command -v aarch64-linux-gnu-gcc >/dev/null && [ -d "$libdir" ]; then
  export CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc CXX_aarch64_unknown_linux_gnu=aarch64-linux-gnu-g++
  export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
  build aarch64-unknown-linux-gnu
  pack aarch64-unknown-linux-gnu aarch64 arm64 aarch64-linux-gnu-
else
  echo '=================================================================================' >&2
  echo 'SKIPPED: no arm64 release. It needs `rustup target add aarch64-unknown-linux-gnu`' >&2
  echo 'and the packages gcc-aarch64-linux-gnu, g++-aarch64-linux-gnu, libc6-dev-arm64-cross.' >&2
  echo '=================================================================================' >&2
fi

(cd "$out" && sha256sum tidegate* >SHA256SUMS)
ls -l "$out"
