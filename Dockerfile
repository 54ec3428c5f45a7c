# The training image for NVIDIA GPUs. One image is worker, DLRover master and prepare job.
#
#   docker build -t elastic-gpt:0.1.0 .
#
# docker/cpu.Dockerfile is the same without CUDA; tests/examples/test_dockerfiles.py holds the two together.
# The base is plain Python, not nvidia/cuda: torch's wheels bring their own CUDA and NCCL (most of the image's size), and
# the driver comes from the node. 3.11 is the Python that the tests run on.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS dependencies
# Build with --build-arg PIP_EXTRA_INDEX_URL=… to take packages from one more index; pip reads it from the environment.
ARG PIP_EXTRA_INDEX_URL=
WORKDIR /src
COPY pyproject.toml constraints.txt ./
# The package is installed empty and taken out again, so that this layer of gigabytes depends on the two files above
# alone: a change of the code rebuilds, pushes and pulls a few hundred kilobytes.
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
# tini: PID 1 that passes SIGTERM on (a preempted node saves its state in the grace time) and reaps orphans.
# g++: torch.compile builds with it at run time, Triton the launchers of its kernels, Inductor what stays on the CPU.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends tini g++ \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 elastic \
 && useradd --uid 10001 --gid 10001 --create-home elastic \
 && install --directory --owner elastic --group elastic /workspace
COPY --from=dependencies /opt/venv /opt/venv
RUN --mount=type=bind,from=package,source=/wheels,target=/wheels \
    /opt/venv/bin/pip install --no-cache-dir --no-deps /wheels/*.whl
# What nvidia/cuda images set: without it the container runtime shows the container no GPU.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1
# A number, not a name, so that Kubernetes can check runAsNonRoot.
USER 10001:10001
WORKDIR /workspace
# The whole entrypoint. A pod gives `args`, never `command`, which would replace tini.
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["elastic-gpt", "--help"]
