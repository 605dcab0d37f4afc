#!/bin/sh
# Prometheus, promtool, Alertmanager and amtool out of Debian's packages, into DIRECTORY: only the programs, so that no
# daemon is enabled on this machine and nobody need be root. 30 MB to fetch, 140 MB on disk. Debian's Alertmanager reads
# its templates from /usr/share/prometheus/alertmanager; where they are not, they are put into DIRECTORY/../share.
# Usage: deploy/monitoring/tools.sh DIRECTORY. Programs that the machine has already are taken as they are.
set -eu
directory=$1

say() { printf '%s\n' "$*" >&2; }

missing=
for program in prometheus promtool alertmanager amtool; do
  [ -x "$directory/$program" ] && continue
  found=$(command -v "$program" || command -v "prometheus-$program" || true)
  if [ -n "$found" ]; then ln -s "$found" "$directory/$program"; else missing="$missing $program"; fi
done
templates=share/prometheus/alertmanager
if [ ! -e "/usr/$templates/email.tmpl" ] && [ ! -e "$directory/../$templates/email.tmpl" ]; then missing="$missing templates"; fi
[ -n "$missing" ] || exit 0
if ! command -v apt-get >/dev/null 2>&1 || ! command -v dpkg-deb >/dev/null 2>&1; then
  say "ergon setup: error:$missing are missing; install Prometheus and Alertmanager, or put them into $directory"
  exit 2
fi
say "fetching Prometheus and Alertmanager (30 MB) for the monitoring of runs"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
fetch() { apt-get download -qq -o APT::Sandbox::User=root prometheus prometheus-alertmanager; }
# Lists that are older than the archive name files that are gone; only root can fetch new ones.
fetch || { [ "$(id -u)" = 0 ] && apt-get update -qq && fetch; } || {
  say "ergon setup: error: the packages prometheus and prometheus-alertmanager cannot be fetched; type: sudo apt-get update"
  exit 2
}
for package in ./*.deb; do dpkg-deb -x "$package" unpacked; done
cd - >/dev/null
for program in $missing; do
  if [ "$program" = templates ]; then
    mkdir -p "$directory/../$templates"
    mv "$work/unpacked/usr/$templates"/*.tmpl "$directory/../$templates"
    continue
  fi
  [ "$program" = alertmanager ] && packed=prometheus-alertmanager || packed=$program
  mv "$work/unpacked/usr/bin/$packed" "$directory/$program"
done
