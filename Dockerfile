# Two images of one source: `api` (also upkeep and the one-shot tasks) has no torch, `worker` has it.
#   docker build --target api .
#   docker build --target worker .
FROM python:3.11.13-slim-bookworm AS dependencies
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/difffit
ENV PATH=/opt/difffit/bin:$PATH
WORKDIR /build
# The packages that pyproject names and nothing of ours: this layer changes when they do.
COPY pyproject.toml README.md ./
RUN pip install .

FROM dependencies AS worker-dependencies
# Empty takes the default build of torch, which runs on a GPU and on a CPU alike; a URL of another
# package index (PyTorch has one for CPUs alone) gives a smaller image.
ARG TORCH_INDEX_URL=
# hadolint ignore=DL3013  # pyproject.toml holds the versions
RUN pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} '.[worker]'

FROM python:3.11.13-slim-bookworm AS runtime
ENV PATH=/opt/difffit/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    DIFFFIT_DATA_DIR=/data
RUN useradd --uid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin difffit \
    && install --directory --owner difffit --group difffit /data
WORKDIR /app
COPY api api
COPY client client
COPY core core
COPY migrations migrations
COPY models models
COPY worker worker
USER 10001
VOLUME /data

FROM runtime AS api
COPY --from=dependencies /opt/difffit /opt/difffit
EXPOSE 8321
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8321/healthz', timeout=4)"]
CMD ["python", "-m", "api", "--host", "0.0.0.0", "--port", "8321"]

FROM runtime AS worker
COPY --from=worker-dependencies /opt/difffit /opt/difffit
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "-c", "from core.settings import get_settings as s; from core.db.session import Database as D; D(s().database).ping()"]
CMD ["celery", "-A", "worker.app", "worker", "-Q", "train,sample", "-n", "device@%h", "--concurrency", "1"]
