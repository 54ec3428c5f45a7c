# The training image. One image is worker, DLRover master, prepare job, prompt pod and server; a pod says which with its `args`.
#
#   docker build -t elastic-gpt:0.1.0 .
#   docker build -t elastic-gpt:0.1.0-cpu --build-arg VARIANT=cpu .
#
# The base is plain Python, not nvidia/cuda: torch's wheels bring their own CUDA and NCCL (most of the image's size), and
# the driver comes from the node. 3.11 is the Python that the tests run on. The tag moves with Debian's security updates;
# to pin it for good: --build-arg PYTHON_IMAGE=python@sha256:…, as told by
#   docker buildx imagetools inspect python:3.11-slim-bookworm
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
# cuda; or cpu: for laptops, kind, minikube and CPU nodes; or one that https://download.pytorch.org/whl/ has: cu126 for
# drivers that are too old for torch's newest CUDA.
ARG VARIANT=cuda

FROM ${PYTHON_IMAGE} AS dependencies
ARG VARIANT
# Of pyproject.toml. A word more for each thing more that `prepare` or a checkpoint is to read.
ARG EXTRAS=train,serve,s3
# Another torch than constraints.txt has; the tests have run with that one alone.
ARG TORCH_VERSION=
# A mirror, and one more index. pip reads them from the environment. For a VARIANT other than cuda the second is PyTorch's own
# unless it is given. They stay in this stage: the image's history does not tell them.
ARG PIP_INDEX_URL=
ARG PIP_EXTRA_INDEX_URL=
WORKDIR /src
COPY pyproject.toml constraints.txt docker/cuda-constraints.txt docker/install.sh ./
RUN sh install.sh /opt/venv

# The code is a layer of its own: a change of it rebuilds, pushes and pulls a few hundred kilobytes, not gigabytes.
FROM dependencies AS package
COPY README.md LICENSE ./
COPY prepare prepare
COPY model_zoo model_zoo
COPY elastic_gpt elastic_gpt
RUN python3 -m pip --python /opt/venv/bin/python3 install --no-cache-dir --no-deps --prefix /package .

FROM ${PYTHON_IMAGE}
ARG VARIANT
# tini: PID 1 that passes SIGTERM on (a preempted node saves its state in the grace time) and reaps orphans.
# g++: torch.compile builds with it at run time, Triton the launchers of its kernels, Inductor what stays on the CPU.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends tini $(test "$VARIANT" = cpu || echo g++) \
 && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/* \
 && groupadd --gid 10001 elastic \
 && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home elastic \
 && install --directory --owner elastic --group elastic /workspace
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=package /package /opt/venv
# Nothing but /tmp, /dev/shm and /workspace is ever written to, so the root file system can be read-only: HOME takes what
# libraries keep in ~/.cache and ~/.triton, and USER names those folders also for a user id that the image does not know.
# NVIDIA_VISIBLE_DEVICES is left to Kubernetes (docker run --gpus sets it, too): `all` would show every GPU of a node to the
# prepare job and the prompt.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    USER=elastic \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
LABEL org.opencontainers.image.title="elastic-gpt" \
      org.opencontainers.image.description="GPT training on nodes that come and go" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
# A number, not a name, so that Kubernetes can check runAsNonRoot.
USER 10001:10001
WORKDIR /workspace
# The whole entrypoint. A pod gives `args`, never `command`, which would replace tini.
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["elastic-gpt", "--help"]
# No HEALTHCHECK: Kubernetes ignores it, and a training process has no better sign of life than the next step. A worker that
# ends is replaced by its exit code, and one that hangs is given up by its peers after elastic.timeout_seconds.
