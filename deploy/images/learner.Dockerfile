# The learner on NVIDIA GPUs: DeepSpeed and PyTorch with CUDA's libraries. On a CPU: cpu.Dockerfile. Build in the
# repository's root:
#   docker build -f deploy/images/learner.Dockerfile -t ergon-learner:0.1.0 .
FROM python:3.11-slim-bookworm
# gcc stays: Triton compiles its launchers where they run. Debian's stable release is what pins its packages.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev libgomp1 libnuma1 \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# DeepSpeed looks for torch while it is installed, so torch comes first and is seen.
RUN python -m venv /opt/ergon \
 && /opt/ergon/bin/python -m pip install --no-cache-dir --constraint requirements.lock setuptools wheel torch \
 && DS_BUILD_OPS=0 /opt/ergon/bin/python -m pip install --no-cache-dir --no-build-isolation \
      --constraint requirements.lock ".[learner,model,report,tensorboard,wandb]" \
 && /opt/ergon/bin/python -I -c "from broker.protocol.delta_loops import compiled as c; assert c" \
 && rm -rf /src/*
ENV PATH=/opt/ergon/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /tmp
USER 10001:10001
CMD ["python", "-m", "learner", "--help"]
