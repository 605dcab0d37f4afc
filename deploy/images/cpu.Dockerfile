# Actor and learner without a GPU, from the lock as it stands: what `make setup` installs on a laptop. Build in the
# repository's root; TORCH_INDEX is the package index that serves PyTorch's CPU builds:
#   docker build -f deploy/images/cpu.Dockerfile --build-arg TORCH_INDEX=URL -t ergon-cpu:0.1.0 .
FROM python:3.11-slim-bookworm
# g++ and gcc stay: vLLM and DeepSpeed may compile where they run. Debian's stable release is what pins its packages.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
      bubblewrap g++ gcc libc6-dev libgomp1 libnuma1 libtcmalloc-minimal4 mawk python3-minimal util-linux \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
ARG TORCH_INDEX
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN : "${TORCH_INDEX:?give the index of PyTorch CPU builds as a build argument}" \
 && python -m venv /opt/ergon \
 && pip="/opt/ergon/bin/python -m pip --no-cache-dir" \
 && $pip install "$(grep '^pip==' requirements.lock)" "$(grep '^setuptools==' requirements.lock)" "$(grep '^wheel==' requirements.lock)" \
 && $pip install --no-deps --index-url "$TORCH_INDEX" "$(grep '^torch==' requirements.lock)" \
 && $pip install --no-deps --no-build-isolation -r requirements.lock \
 && $pip install --no-deps --no-build-isolation . \
 && /opt/ergon/bin/python -I -c "from broker.protocol.delta_loops import compiled as c; assert c" \
 && rm -rf /src/*
ENV PATH=/opt/ergon/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /tmp
USER 10001:10001
CMD ["python", "-m", "actors", "--help"]
