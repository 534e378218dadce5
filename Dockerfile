# docker build -t muse-lightning .                                          for NVIDIA GPUs; CUDA comes with the wheels
# docker build -t muse-lightning:cpu --build-arg TORCH_VARIANT=cpu .        without
# docker run --gpus all --user "$(id -u)" -v "$PWD/runs:/runs" muse-lightning fit --config recipe:demo
# What is where, and why: docs/docker.md. tools/image_check.sh builds it, runs it, and compares two builds.

# The locks are for Python 3.11, this base's own. Another base has Python 3.11 too, or brings apt.
# With its registry: not every builder assumes one.
ARG BASE_IMAGE=docker.io/library/debian:bookworm-20260824-slim@sha256:88200866dfff7ea7f5cbcb6ec7c8a701889efe6fe859fe64d6990e4b07ea4171

FROM ${BASE_IMAGE} AS python
# gcc, g++ and Python.h: Triton compiles its launcher, torch.compile its code for processors, both at run time. Modules of
# Python are compiled once, here, for a root that cannot be written to; whether they are up to date is not asked again.
# No link-time optimisation, no static Python: nothing asks for them.
# hadolint ignore=DL3008
RUN if ! command -v python3 > /dev/null; then set -- python3 libpython3-dev; fi \
    && apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends ca-certificates g++ libc6-dev "$@" \
    && test -f "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
    && python3 -m compileall -q -f --invalidation-mode unchecked-hash "$(python3 -c 'import os; print(os.path.dirname(os.__file__))')" \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/debconf/*-old /var/cache/ldconfig/aux-cache \
       /var/lib/dpkg/*-old /var/log/apt /var/log/dpkg.log /var/log/alternatives.log \
       /usr/lib/gcc/*/*/lto1 /usr/bin/*lto-dump* /usr/lib/python3*/config-*/*.a

FROM python AS pip
# Modules that pip imports would be compiled with the time in them.
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_PROGRESS_BAR=off PIP_ROOT_USER_ACTION=ignore \
    PYTHONDONTWRITEBYTECODE=1
# hadolint ignore=DL3008
RUN if ! python3 -c 'import ensurepip' 2> /dev/null; then \
        apt-get update && apt-get install --yes --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*; \
    fi
WORKDIR /src

FROM pip AS dependencies
ARG TORCH_VARIANT=cu130
ARG TORCH_INDEX=https://download.pytorch.org/whl/${TORCH_VARIANT}
# Of hf, pypi, tables (pyproject.toml), with spaces between them.
ARG EXTRAS="pypi tables"
COPY requirements requirements
# By hash: it does not matter which index a file comes from. The lock is all that is needed, and has no torchvision, which
# litdata asks for and needs for images only. Of torch's own tests the larger part is left out, 100 MB, and the rest stays
# uncompiled: some are for later Pythons.
RUN python3 -m venv /opt/muse \
    && set -- && for lock in "${TORCH_VARIANT}" ${EXTRAS}; do set -- "$@" --requirement "requirements/${lock}.txt"; done \
    && /opt/muse/bin/pip install --no-compile --no-deps --require-hashes --only-binary :all: --extra-index-url "${TORCH_INDEX}" "$@" \
    && /opt/muse/bin/pip uninstall --yes pip \
    && rm -rf /opt/muse/lib/python3*/site-packages/torch/test /opt/muse/lib/python3*/site-packages/torch/bin/*[tT]est* \
    && /opt/muse/bin/python -m compileall -q -f --invalidation-mode unchecked-hash -x /torch/testing/ /opt/muse/lib

FROM pip AS project
COPY requirements/build.txt requirements/build.txt
RUN python3 -m venv /build \
    && /build/bin/pip install --no-deps --require-hashes --only-binary :all: --requirement requirements/build.txt
COPY LICENSE README.md pyproject.toml ./
COPY kernels kernels
COPY muse_lightning muse_lightning
COPY recipes recipes
RUN /build/bin/python -m hatchling build --target wheel \
    && python3 -m venv /opt/muse \
    && /opt/muse/bin/pip install --no-compile --no-deps --no-index --prefix /project dist/*.whl \
    && python3 -m compileall -q -f --invalidation-mode unchecked-hash -s /project -p /opt/muse /project/lib

FROM python
ARG TORCH_VARIANT=cu130
ARG VERSION=""
ARG REVISION=""
LABEL org.opencontainers.image.title="muse-lightning" \
      org.opencontainers.image.description="Pretraining on long contexts with Multipole Semantic Attention" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      muse.torch-variant="${TORCH_VARIANT}"
# From /, the recipes' relative runs/ and data/ are the volumes. Any user may write there, also one without a name.
RUN mkdir -m 1777 /data /runs
COPY --from=dependencies /opt/muse /opt/muse
COPY --from=project /project /opt/muse
# All that is written beside runs and data: on the volume of the runs, so that a restart compiles nothing again.
# getpass.getuser() asks for USER where the user id has no name.
ENV PATH=/opt/muse/bin:$PATH \
    USER=muse \
    HOME=/runs \
    TMPDIR=/runs \
    TRITON_CACHE_DIR=/runs/.cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/runs/.cache/torchinductor \
    HF_HOME=/data/.cache/huggingface \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
VOLUME ["/data", "/runs"]
WORKDIR /
USER 10001:10001
ENTRYPOINT ["muse"]
CMD ["--help"]
