#!/bin/sh
# Builds the release of the current commit a second time, in a clone at another path with another target directory, and
# compares it with DIRECTORY, as dist.sh has written it: reproduce.sh DIRECTORY
# Exit status 1 if a file differs. CARGO, PROFILE and CARGO_FLAGS as for dist.sh; KEEP=1 keeps the second build.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
dist=$(cd "$1" && pwd)
work=$(mktemp -d "${TMPDIR:-/var/tmp}/tidegate-reproduce-XXXXXX")
trap '[ -n "${KEEP:-}" ] || rm -rf "$work"' EXIT
[ -z "$(git -C "$here" status --porcelain)" ] || echo 'reproduce.sh: there are changes that are not in the commit' >&2
git clone --quiet "$(git -C "$here" rev-parse --show-toplevel)" "$work/clone"
git -C "$work/clone" checkout --quiet --detach "$(git -C "$here" rev-parse HEAD)"
CARGO_TARGET_DIR=$work/build "$work/clone/gateway/packaging/dist.sh" "$work/dist" >"$work/output" 2>&1 || { cat "$work/output" >&2; exit 1; }
failed=0
for file in "$dist"/* "$work"/dist/*; do
  name=${file##*/}
  cmp -s "$dist/$name" "$work/dist/$name" || { echo "differs  $name"; failed=1; }
done
[ "$failed" = 0 ] || exit 1
echo "equal    $(ls "$dist" | wc -l) files, second build in $work"
