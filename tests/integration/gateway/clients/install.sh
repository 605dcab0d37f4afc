#!/bin/sh
# Installs other people's clients of the gateway. Usage: install.sh PYTHON DIRECTORY, which the sandbox's user must be
# able to enter. Does nothing where the directory has them already.
set -eu
python=$1
directory=$2
here=$(cd "$(dirname "$0")" && pwd)
command -v npm >/dev/null 2>&1 || {
  printf 'make test-gateway-clients: error: npm is missing; type: apt-get install nodejs npm\n' >&2
  exit 2
}
wanted=$(cat "$here/package.json" "$here/requirements.txt" | sha256sum)
[ "$(cat "$directory/.installed" 2>/dev/null)" = "$wanted" ] && exit 0
rm -rf "$directory"
mkdir -p "$directory"
cp "$here/package.json" "$directory/"
npm install --prefix "$directory" --no-audit --no-fund --no-package-lock --silent
"$python" -m pip --disable-pip-version-check install -q --no-deps --target "$directory/python" -r "$here/requirements.txt"
printf '%s' "$wanted" > "$directory/.installed"
