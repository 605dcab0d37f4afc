#!/bin/sh
# Builds the images without CUDA and without an engine (broker and sandbox of deploy/images) with buildah and without a
# registry: the bases that their FROM names are one that is made here, of Debian's packages, under these names. Installs
# buildah and debootstrap as root; everything of buildah's is in DIRECTORY. Writes there, of each image, NAME.json (what it
# is) and NAME.tar (a Docker archive), and broker.cdx.json, its bill of materials. PYTHON is one of tests/cluster/tools.sh.
# Usage: tests/cluster/images.sh DIRECTORY PYTHON
set -eu
directory=$1
python=$2
root=$(cd "$(dirname "$0")/../.." && pwd)
base=docker.io/library/python:3.11-slim-bookworm
debian=docker.io/library/debian:bookworm-slim

say() { printf '%s\n' "$*" >&2; }

missing=
for program in buildah debootstrap; do command -v "$program" >/dev/null 2>&1 || missing="$missing $program"; done
if [ -n "$missing" ]; then
  [ "$(id -u)" = 0 ] || { say "ergon: error: type: sudo apt-get install$missing"; exit 2; }
  apt-get update -qq
  # shellcheck disable=SC2086  one word per package
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi
mkdir -p "$directory"
# vfs and chroot need neither overlay mounts nor a runtime, which a machine that is a container itself may not give.
tool="buildah --root $directory/storage --runroot $directory/run --storage-driver vfs"
export BUILDAH_ISOLATION=chroot

if ! $tool inspect --type image "$base" >/dev/null 2>&1; then
  say "making the base image of Debian's packages"
  rm -rf "$directory/base"
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-dev,python3-pip,python3-venv bookworm "$directory/base" \
    http://deb.debian.org/debian > "$directory/base.log" 2>&1 || { tail -n 20 "$directory/base.log" >&2; exit 1; }
  # As in the image of that name: the newest Python is `python`, in /usr/local, and has its headers.
  ln -sf /usr/bin/python3 "$directory/base/usr/local/bin/python"
  rm -rf "$directory/base/var/cache/apt/archives" "$directory/base/var/lib/apt/lists"
  mkdir -p "$directory/base/var/lib/apt/lists/partial" "$directory/base/var/cache/apt/archives/partial"
  container=$($tool from scratch)
  $tool copy -q "$container" "$directory/base" / >/dev/null
  $tool commit -q "$container" "$base" >/dev/null
  $tool tag "$base" "$debian"
  $tool rm "$container" >/dev/null
  rm -rf "$directory/base"
fi
for name in broker sandbox; do
  say "building ergon-$name"
  # The certificates that this machine trusts, for a package index behind an authority of its own.
  $tool bud -q --layers --pull-never --network host --volume /etc/ssl/certs:/etc/ssl/certs:ro \
    -t "localhost/ergon-$name:test" -f "$root/deploy/images/$name.Dockerfile" "$root" > "$directory/build.log" 2>&1 || {
    tail -n 20 "$directory/build.log" >&2
    exit 1
  }
  $tool inspect --type image "localhost/ergon-$name:test" > "$directory/$name.json"
  rm -f "$directory/$name.tar"
  $tool push -q "localhost/ergon-$name:test" "docker-archive:$directory/$name.tar:localhost/ergon-$name:test"
done
container=$($tool from --pull-never localhost/ergon-broker:test)
inside="$tool run --network host $container --"
$inside python -m pip --disable-pip-version-check list --format json > "$directory/pip.json"
# shellcheck disable=SC2016  dpkg fills these in
$inside dpkg-query -W -f '${Package}\t${Version}\t${Architecture}\n' > "$directory/dpkg.tsv"
$tool rm "$container" >/dev/null
"$python" "$root/tests/cluster/sbom.py" ergon-broker "$(sed -n 's/^version = "\(.*\)"/\1/p' "$root/pyproject.toml")" \
  "$directory/pip.json" "$directory/dpkg.tsv" > "$directory/broker.cdx.json"
