#!/bin/sh
# Prints the lock of a virtual environment: every package pinned, without those that do not import beside a CPU build
# of torch or that nothing here uses.
set -eu
echo "# Every Python package of a CPU machine, pinned; complete, to be installed with --no-deps (deploy/setup.sh)."
echo "# Made by: make lock"
"$1/bin/python" -m pip freeze --all --exclude-editable |
  grep -viE '^(triton|torchvision|torchaudio|torchcodec|llama-cpp-python|llama_cpp_python|ergon)\b' | sed 's/+cpu//'
