# The training image without CUDA, a few gigabytes smaller: for laptops, kind, minikube and CPU nodes.
#
#   docker build -t elastic-gpt:0.1.0-cpu -f docker/cpu.Dockerfile .
#
# It differs from ../Dockerfile, where the reasons stand, in three places: the index that torch comes from; no compiler
# (--compile is for GPUs here); no NVIDIA variables. tests/examples/test_dockerfiles.py holds the rest together.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS dependencies
# torch's CPU wheels are called 2.x.y+cpu, which pip ranks above PyPI's plain 2.x.y, and no CUDA package is pulled in.
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY pyproject.toml constraints.txt ./
RUN touch README.md LICENSE \
 && python3 -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir -c constraints.txt '.[train]' \
 && /opt/venv/bin/pip uninstall --yes elastic-gpt

FROM dependencies AS package
COPY README.md LICENSE ./
COPY prepare prepare
COPY model_zoo model_zoo
COPY elastic_gpt elastic_gpt
RUN /opt/venv/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="elastic-gpt" \
      org.opencontainers.image.description="GPT training on nodes that come and go" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN apt-get update \
 && apt-get install --yes --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 elastic \
 && useradd --uid 10001 --gid 10001 --create-home elastic \
 && install --directory --owner elastic --group elastic /workspace
COPY --from=dependencies /opt/venv /opt/venv
RUN --mount=type=bind,from=package,source=/wheels,target=/wheels \
    /opt/venv/bin/pip install --no-cache-dir --no-deps /wheels/*.whl
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /workspace
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["elastic-gpt", "--help"]
