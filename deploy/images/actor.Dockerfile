# An actor on NVIDIA GPUs: vLLM, whose packages bring CUDA's libraries with them, and what sandboxes need. The driver is the
# node's. On a CPU: cpu.Dockerfile. Build in the repository's root:
#   docker build -f deploy/images/actor.Dockerfile -t ergon-actor:0.1.0 .
FROM python:3.11-slim-bookworm
# gcc stays: Triton compiles its launchers where they run. The rest is for sandboxes, which run on the system's Python.
# Debian's stable release is what pins its packages.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
      bubblewrap gcc libc6-dev libgomp1 libnuma1 libtcmalloc-minimal4 mawk python3-minimal util-linux \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN python -m venv /opt/ergon \
 && /opt/ergon/bin/python -m pip install --no-cache-dir --constraint requirements.lock ".[actor,model,kubernetes]" \
 && /opt/ergon/bin/python -I -c "from broker.protocol.delta_loops import compiled as c; assert c" \
 && rm -rf /src/*
ENV PATH=/opt/ergon/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /tmp
USER 10001:10001
CMD ["python", "-m", "actors", "--help"]
