# syntax=docker/dockerfile:1
# Two stages. The second one has Python and the virtual environment that the first one built.

FROM python:3.11-slim-bookworm AS build
WORKDIR /src
RUN python -m venv /opt/oci-mirror
COPY tools/constraints.txt tools/constraints.txt
COPY pyproject.toml README.md LICENSE ./
COPY mirror mirror
# The versions that the tests ran with.
RUN /opt/oci-mirror/bin/pip install --no-cache-dir --disable-pip-version-check \
    --constraint tools/constraints.txt .

FROM python:3.11-slim-bookworm
LABEL org.opencontainers.image.title="oci-mirror" \
      org.opencontainers.image.description="A pull-through mirror for container registries" \
      org.opencontainers.image.licenses="Apache-2.0"
# A numeric user, so that Kubernetes can check that it is not root.
RUN groupadd --gid 10001 oci-mirror \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin oci-mirror \
    && install -d -o 10001 -g 10001 -m 0750 /data
COPY --from=build /opt/oci-mirror /opt/oci-mirror
COPY config/mirror.yaml /etc/oci-mirror/mirror.yaml
# The environment wins over the file. So the address and the directory hold for any mounted file, and
# commands in the container need no --config.
ENV PATH=/opt/oci-mirror/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    OCI_MIRROR_CONFIG=/etc/oci-mirror/mirror.yaml \
    OCI_MIRROR_LISTEN=0.0.0.0:5100 \
    OCI_MIRROR_DATA_DIR=/data
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 5100
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s --retries=3 \
    CMD ["oci-mirror", "healthcheck", "--config", "/etc/oci-mirror/mirror.yaml"]
ENTRYPOINT ["oci-mirror"]
CMD ["serve", "--config", "/etc/oci-mirror/mirror.yaml"]
