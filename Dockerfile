# docker build -t muse-lightning .                                        for CPUs
# docker build -t muse-lightning:gpu --build-arg TORCH_VARIANT=cu130 .    for NVIDIA GPUs (CUDA comes with the wheels)
# docker run --rm --user "$(id -u)" -v "$PWD:/workspace" muse-lightning fit --config recipe:demo
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS build
ARG TORCH_VARIANT=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv /opt/muse
WORKDIR /src
# Torch in a layer of its own: the largest and the one that changes least.
COPY constraints.txt ./
RUN /opt/muse/bin/pip install --constraint constraints.txt --extra-index-url "${TORCH_INDEX}/${TORCH_VARIANT}" torch
COPY LICENSE README.md pyproject.toml ./
COPY kernels kernels
COPY muse_lightning muse_lightning
COPY recipes recipes
# litdata asks for torchvision but needs it for images only, and beside a torch of another build `import lightning` breaks.
RUN /opt/muse/bin/pip install --constraint constraints.txt . \
    && /opt/muse/bin/pip uninstall --yes torchvision
# Without a GPU no Triton kernel runs: 0.7 GB less.
RUN if [ "${TORCH_VARIANT}" = cpu ]; then /opt/muse/bin/pip uninstall --yes triton; fi

FROM ${BASE_IMAGE}
ARG TORCH_VARIANT=cpu
LABEL org.opencontainers.image.title="muse-lightning" \
      org.opencontainers.image.description="Pretraining on long contexts with Multipole Semantic Attention" \
      org.opencontainers.image.licenses="Apache-2.0" \
      muse.torch-variant="${TORCH_VARIANT}"
# Triton compiles its launcher at run time: a C compiler and Python.h, which a base with a distribution's Python lacks.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && header="$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
    && if [ ! -f "${header}" ]; then apt-get install --yes --no-install-recommends python3-dev; fi \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/muse /opt/muse
# Any user id works, also one without an entry in /etc/passwd and with a read-only root: what is written goes to /tmp
# and to the working directory.
ENV PATH=/opt/muse/bin:$PATH \
    USER=muse \
    HOME=/tmp \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor \
    TRITON_CACHE_DIR=/tmp/triton \
    PYTHONUNBUFFERED=1
RUN mkdir /workspace && chmod 1777 /workspace
WORKDIR /workspace
USER 10001:10001
ENTRYPOINT ["muse"]
CMD ["--help"]
