# syntax=docker/dockerfile:1
# Two stages: the first builds the wheel and a virtual environment from the locked requirements, the second holds only
# that environment. The image runs as a user without rights, in production mode, and expects its agents and its
# configuration to be mounted.

ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /build
COPY requirements.txt ./
RUN python -m venv /opt/gateway && /opt/gateway/bin/pip install --require-hashes -r requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip wheel --no-deps --wheel-dir /tmp/wheel . && /opt/gateway/bin/pip install --no-deps /tmp/wheel/*.whl \
    && /opt/gateway/bin/python -m compileall -q /opt/gateway/lib

FROM python:${PYTHON}-slim
ARG VERSION=0.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Agent Gateway" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version=${VERSION} \
    org.opencontainers.image.revision=${REVISION}
RUN useradd --system --uid 10001 --home-dir /srv --shell /usr/sbin/nologin gateway \
    && install -d -o gateway -g gateway /srv /srv/agents /srv/config /var/lib/gateway
COPY --from=build /opt/gateway /opt/gateway
# Everything is a setting (docs/references/settings.md): GATEWAY_WORKERS for more processes, GATEWAY_TRUSTED_PROXIES for
# a proxy in front, GATEWAY_SHUTDOWN_DRAIN_S for the time that live runs have at the end.
ENV PATH=/opt/gateway/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    GATEWAY_ENV=production \
    GATEWAY_HOST=0.0.0.0 \
    GATEWAY_PORT=8000 \
    GATEWAY_AGENT_DISCOVERY_PATH=/srv/agents \
    GATEWAY_STATE_DIR=/var/lib/gateway
WORKDIR /srv
USER gateway
VOLUME ["/var/lib/gateway"]
EXPOSE 8000
# The platform's grace period must be at least GATEWAY_SHUTDOWN_DRAIN_S and five seconds.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=6s --start-period=20s --retries=3 CMD ["gateway", "health"]
CMD ["gateway", "serve"]
