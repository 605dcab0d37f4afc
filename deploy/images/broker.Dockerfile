# Broker, relays, keys and the chart's own pods: no torch, 330 MB beside the base. Build in the repository's root:
#   docker build -f deploy/images/broker.Dockerfile -t ergon-broker:0.1.0 .
FROM python:3.11-slim-bookworm AS build
# The compiler of the deltas' inner loops. Debian's stable release is what pins its packages.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN python -m venv /opt/ergon \
 && /opt/ergon/bin/python -m pip install --no-cache-dir --constraint requirements.lock ".[kubernetes]" \
 && /opt/ergon/bin/python -I -c "from broker.protocol.delta_loops import compiled as c; assert c"

FROM python:3.11-slim-bookworm
COPY --from=build /opt/ergon /opt/ergon
ENV PATH=/opt/ergon/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /tmp
USER 10001:10001
CMD ["python", "-m", "broker", "--help"]
