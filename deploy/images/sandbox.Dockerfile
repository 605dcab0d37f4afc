# What untrusted tools run in where a sandbox is a pod: a small system and nothing of Ergon. Build in the repository's root:
#   docker build -f deploy/images/sandbox.Dockerfile -t ergon-sandbox:0.1.0 .
FROM debian:bookworm-slim
# Debian's stable release is what pins its packages.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends mawk procps python3-minimal \
 && rm -rf /var/lib/apt/lists/* \
 && find / -xdev -perm /6000 -type f -exec chmod a-s {} +
WORKDIR /work
USER 65532:65532
CMD ["sleep", "infinity"]
