# The server of a federation: SuperLink and SuperExec on the container's loopback, and the gate on port 9443.
# Built from the repository's root, for amd64 and arm64: docker build -f deploy/containers/server.Dockerfile -t prfl-server .
FROM python:3.12-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml constraints-device.txt README.md LICENSE ./
COPY prfl prfl
COPY strategies strategies
COPY clients clients
COPY sim sim
COPY deploy deploy
# uv knows where PyTorch's builds without CUDA are; on arm64 the usual ones of this version have none.
RUN pip install --no-cache-dir uv && uv venv /opt/prfl && \
    uv pip install --no-cache --python /opt/prfl/bin/python --constraint constraints-device.txt \
    $([ "$(uname -m)" = x86_64 ] && echo --torch-backend=cpu) . torch-pruning

FROM python:3.12-slim-bookworm
RUN useradd --uid 10001 --create-home --home-dir /var/lib/prfl --shell /usr/sbin/nologin prfl && chmod 700 /var/lib/prfl
COPY --from=build /opt/prfl /opt/prfl
ENV PATH=/opt/prfl/bin:$PATH PRFL_HOME=/var/lib/prfl PYTHONUNBUFFERED=1
USER prfl
WORKDIR /var/lib/prfl
VOLUME /var/lib/prfl
EXPOSE 9443
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s CMD ["python", "-c", "\
import ssl, urllib.request as web; \
web.urlopen('https://localhost:9443/health', context=ssl.create_default_context(cafile='ca.crt'), timeout=5)"]
ENTRYPOINT ["prfl"]
CMD ["deploy", "server"]
