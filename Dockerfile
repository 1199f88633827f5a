# fedex_scale with its pinned packages, and the compiler with which DeepSpeed makes its ops.
#
#   docker build -t fedex_scale .
#   docker run --gpus all --shm-size 8g -v "$PWD/runs:/srv/runs" fedex_scale run --config quickstart
FROM python:3.11-slim-bookworm

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libaio-dev make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/fedex_scale
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt '.[gguf]'

# Runs and what the hub sends are written here; nothing needs to be root.
RUN useradd --uid 1000 --create-home user && mkdir -p /srv && chown user /srv
USER 1000
WORKDIR /srv
ENTRYPOINT ["fedex-scale"]
CMD ["--help"]
