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
RUN useradd --system --uid 10001 --home-dir /srv --shell /usr/sbin/nologin gateway \
    && install -d -o gateway -g gateway /srv /srv/agents /srv/config /var/lib/gateway
COPY --from=build /opt/gateway /opt/gateway
ENV PATH=/opt/gateway/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    GATEWAY_ENV=production \
    GATEWAY_AGENT_DISCOVERY_PATH=/srv/agents \
    GATEWAY_STATE_DIR=/var/lib/gateway
WORKDIR /srv
USER gateway
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=2); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
# The proxy in front, if any, is not trusted to say who called: no forwarded header is believed.
CMD ["uvicorn", "api.main:app", "--host", "0.0.0.0", "--port", "8000", "--loop", "uvloop", "--http", "httptools", \
     "--no-access-log", "--no-proxy-headers", "--no-server-header", "--timeout-graceful-shutdown", "30"]
