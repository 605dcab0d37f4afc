# What untrusted tools run in where a sandbox is a pod: a small system and nothing of Ergon. Build in the repository's root:
#   docker build -f deploy/images/sandbox.Dockerfile -t ergon-sandbox:0.1.0 .
FROM debian:bookworm-slim
# Debian's stable release is what pins its packages.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends mawk procps python3 \
 && rm -rf /var/lib/apt/lists/* \
 && find / -xdev -perm /6000 -type f -exec chmod a-s {} + \
# The session's own Python: everybody may run it and nobody may read it, so that what runs beside it cannot read its memory.
 && install -D -m 0111 "$(readlink -f /usr/bin/python3)" /usr/libexec/ergon/python \
 && ln -s /workspace /app \
 && ln -s /tmp/logs /logs
WORKDIR /workspace
USER 65532:65532
CMD ["sleep", "infinity"]
