#!/bin/sh
# Makes a working machine out of a bare one: system packages, virtual environment, locked dependencies.
# Usage: deploy/setup.sh VENV_DIRECTORY. TORCH_INDEX may name the package index that serves PyTorch's CPU builds;
# without it pip's own configuration decides, and may take a build with CUDA of several gigabytes.
set -eu
venv=$1
root=$(cd "$(dirname "$0")/.." && pwd)
lock="$root/requirements.lock"

say() { printf '%s\n' "$*" >&2; }

missing=
command -v bwrap >/dev/null 2>&1 || missing="$missing bubblewrap"
# The tools of sandboxed environments run on the system's own Python and awk.
[ -x /usr/bin/python3 ] || missing="$missing python3-minimal"
[ -x /usr/bin/git ] || missing="$missing git"
[ -x /usr/bin/awk ] || missing="$missing mawk"
[ -x /usr/bin/setpriv ] || missing="$missing util-linux"
ldconfig -p | grep -q libnuma.so.1 || missing="$missing libnuma1"
ldconfig -p | grep -q libgomp.so.1 || missing="$missing libgomp1"
ldconfig -p | grep -q libtcmalloc_minimal.so.4 || missing="$missing libtcmalloc-minimal4"
python3 -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
# For the environments `browser` and `miniwob` alone, so nothing else waits for it: Chromium without a user interface.
browser=
command -v chromium-headless-shell >/dev/null 2>&1 || command -v chromium >/dev/null 2>&1 ||
  browser=chromium-headless-shell
if [ -n "$missing$browser" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  say "installing system packages:$missing $browser"
  apt-get update -qq || [ -z "$missing" ]
  # shellcheck disable=SC2086  one word per package
  install() { DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $* >/dev/null; }
  [ -z "$missing" ] || install $missing
  [ -z "$browser" ] || install $browser || say "the environments browser and miniwob will not run without $browser"
elif [ -n "$missing" ]; then
  say "ergon setup: error: system packages are missing; type: sudo apt-get install$missing $browser"
  exit 2
elif [ -n "$browser" ]; then
  say "for the environments browser and miniwob type: sudo apt-get install $browser"
fi

python=python3
command -v python3.11 >/dev/null 2>&1 && python=python3.11
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
  say "ergon setup: error: Python 3.11 is needed (the lock is made for it), found $("$python" --version)"
  exit 2
}

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check"
say "installing locked Python packages into $venv (a few minutes the first time)"
$pip install -q "$(grep '^pip==' "$lock")" "$(grep '^setuptools==' "$lock")" "$(grep '^wheel==' "$lock")"
# torch on its own and first: the CPU build must be there before anything asks for torch.
$pip install -q ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --no-deps "$(grep '^torch==' "$lock")"
# --no-deps: the lock is complete. Leaving pip to resolve would bring in torchvision and friends, which do not import
# beside a CPU build of torch, and a C++ inference engine that one package wants and nothing here uses.
$pip install -q --no-deps --no-build-isolation -r "$lock"
"$root/deploy/monitoring/tools.sh" "$venv/bin" ||
  say "ergon setup: no Prometheus: runs do without, but make monitor and the tests of monitoring will fail"
# Compiles the inner loops of deltas, too; setuptools warns that where they are declared is new.
PYTHONWARNINGS=ignore $pip install -q --no-deps --no-build-isolation -e "$root"
# The packages that the environment `repo` puts bugs into. Everything else works without them, and `repo` fetches what is
# missing when it is used first.
"$venv/bin/python" -c "from envs.repo.sources import main; main()" || say "ergon setup: the environment \`repo\` is not ready; see above"
