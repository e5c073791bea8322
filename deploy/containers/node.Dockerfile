# A node of a federation. It opens no port.
# Built from the repository's root, for arm64 and amd64: docker build -f deploy/containers/node.Dockerfile -t prfl-node .
FROM python:3.12-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml constraints-device.txt README.md LICENSE ./
COPY prfl prfl
COPY strategies strategies
COPY clients clients
COPY sim sim
COPY deploy deploy
# Neither Ray nor torch-pruning; flwr-datasets cuts a client's part out of a data set that all boards hold.
RUN pip install --no-cache-dir uv && uv venv /opt/prfl && \
    uv pip install --no-cache --python /opt/prfl/bin/python --constraint constraints-device.txt \
    $([ "$(uname -m)" = x86_64 ] && echo --torch-backend=cpu) . flwr-datasets

FROM python:3.12-slim-bookworm
RUN useradd --uid 10001 --create-home --home-dir /var/lib/prfl --shell /usr/sbin/nologin prfl && chmod 700 /var/lib/prfl
COPY --from=build /opt/prfl /opt/prfl
ENV PATH=/opt/prfl/bin:$PATH PRFL_HOME=/var/lib/prfl PYTHONUNBUFFERED=1
USER prfl
WORKDIR /var/lib/prfl
VOLUME /var/lib/prfl
ENTRYPOINT ["prfl"]
CMD ["deploy", "node", "--help"]
