#!/bin/sh
# Makes the programs of Kubernetes in DIRECTORY: kube-apiserver, kube-controller-manager, kube-scheduler, and kubelet. No
# of packages ships them, so they are built from Debian's source package with Debian's Go: some 20 minutes on two cores,
# once; 35 MB to fetch, 400 MB to keep. Installs what it needs as root: etcd, what builds, what a real node has.
# Usage: build.sh DIRECTORY
set -eu
directory=$1
version=1.20.5+really1.20.2-1.1+deb12u1
plane="kube-apiserver kube-controller-manager kube-scheduler"
programs="$plane kubelet"

say() { printf '%s\n' "$*" >&2; }

missing=
command -v etcd >/dev/null 2>&1 || missing="$missing etcd-server"
command -v containerd >/dev/null 2>&1 || missing="$missing containerd"
command -v runc >/dev/null 2>&1 || missing="$missing runc"
command -v ip >/dev/null 2>&1 || missing="$missing iproute2"
[ -x /usr/lib/cni/ptp ] || missing="$missing containernetworking-plugins"
built=yes
for program in $programs; do [ -x "$directory/$program" ] || built=; done
if [ -z "$built" ]; then
  command -v go >/dev/null 2>&1 || missing="$missing golang-go"
  command -v rsync >/dev/null 2>&1 || missing="$missing rsync"
fi
if [ -n "$missing" ]; then
  [ "$(id -u)" = 0 ] || { say "ergon: error: type: sudo apt-get install$missing"; exit 2; }
  apt-get update -qq
  # shellcheck disable=SC2086  one word per package
  # No runlevel of servers: nothing of it is started as a service.
  RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi
[ -n "$built" ] && exit 0

work="$directory/work"
mkdir -p "$work/lists/partial" "$work/source"
cd "$work/source"
if [ ! -f fetched ]; then
  say "fetching Kubernetes' source package"
  # A list of sources of its own, so that the machine's stays as it is.
  echo 'deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm main' \
    > "$work/sources.list"
  apt="apt-get -qq -o Dir::Etc::sourcelist=$work/sources.list -o Dir::Etc::sourceparts=/dev/null
    -o Dir::State::lists=$work/lists -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o APT::Sandbox::User=root"
  $apt update
  $apt source --download-only "kubernetes=$version" >/dev/null
  touch fetched
fi
tree="$work/tree"
rm -rf "$tree"
mkdir -p "$tree"
tar -xzf kubernetes_*.orig.tar.gz -C "$tree" --strip-components 1
# Debian's patches are kubectl's alone.
cd "$tree"
mkdir -p .go/src/k8s.io
ln -s "$tree" .go/src/k8s.io/kubernetes
cat > kver <<VERSION
KUBE_GIT_COMMIT=unknown
KUBE_GIT_TREE_STATE=archive
KUBE_GIT_VERSION=v1.20.2
KUBE_GIT_MAJOR=1
KUBE_GIT_MINOR=20
VERSION
log="$directory/build.log"
: > "$log"
for group in "$plane" kubelet; do
  say "building $group (some 20 minutes for all, once)"
  what=
  for program in $group; do what="$what cmd/$program"; done
  GO111MODULE=off CGO_ENABLED=0 GOPATH="$tree/.go" GOCACHE="$work/cache" GOFLAGS= KUBE_GIT_VERSION_FILE="$tree/kver" \
    make WHAT="${what# }" GOLDFLAGS="-s -w" >> "$log" 2>&1 || {
    say "ergon: error: $group could not be built; the end of $log:"
    tail -n 20 "$log" >&2
    exit 1
  }
  for program in $group; do
    cp -L "_output/bin/$program" "$directory/$program.new"
    mv "$directory/$program.new" "$directory/$program"
  done
done
rm -rf "$work"
