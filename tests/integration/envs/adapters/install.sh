#!/bin/sh
# Installs other people's environments. Usage: install.sh PYTHON DIRECTORY. Does nothing where it has them already.
set -eu
python=$1
directory=$2
here=$(cd "$(dirname "$0")" && pwd)
wanted=$(sha256sum "$here/requirements.txt")
[ "$(cat "$directory/.installed" 2>/dev/null)" = "$wanted" ] && exit 0
rm -rf "$directory"
"$python" -m venv "$directory"
"$directory/bin/python" -m pip --disable-pip-version-check install -q -r "$here/requirements.txt"
printf '%s' "$wanted" > "$directory/.installed"
