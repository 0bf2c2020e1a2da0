# An image that runs fastperc: docs/install.md shows how to build and to run it.
#   on NVIDIA GPUs:   docker build -t fastperc:cuda --build-arg BASE=nvidia/cuda:13.0.0-base-ubuntu24.04 .
#   on a CPU:         docker build -t fastperc --build-arg TORCH_INDEX=URL .
# URL is the address after --index-url that https://pytorch.org/get-started/locally/ shows for "CPU".

# Both stages need Ubuntu's Python, so they must be of the same Ubuntu. A BUILD_BASE with nvcc, such as
# nvidia/cuda:13.0.0-devel-ubuntu24.04, builds the CUDA kernels too; Triton's need no nvcc.
ARG BASE=ubuntu:24.04
ARG BUILD_BASE=${BASE}

FROM ${BUILD_BASE} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# TORCH_INDEX is PyTorch's index of wheels; without it pip installs the build for CUDA. EXTRAS are those of pyproject.toml.
ARG TORCH_INDEX
ARG EXTRAS=video,onnx,heif
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# hadolint ignore=DL3008
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/fastperc \
 && /opt/fastperc/bin/pip install "torch>=2.11" ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"}
WORKDIR /source
COPY CMakeLists.txt LICENSE README.md pyproject.toml setup.py ./
COPY csrc csrc
COPY kernels kernels
COPY fastperc fastperc
RUN /opt/fastperc/bin/pip wheel --no-deps --wheel-dir /wheels . \
 && wheel=$(echo /wheels/*.whl) \
 && /opt/fastperc/bin/pip install "fastperc[${EXTRAS}] @ file://${wheel}"

FROM ${BASE}
COPY --from=build /opt/fastperc /opt/fastperc
# Triton, which PyTorch's builds for CUDA bring, compiles its launchers with a C compiler when it first runs a kernel.
# hadolint ignore=DL3008,SC2086
RUN compiler=$([ ! -d /opt/fastperc/lib/python3.12/site-packages/triton ] || echo gcc libc6-dev python3-dev) \
 && apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends libgomp1 python3 ${compiler} \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1001 fastperc \
 && mkdir -m 1777 /cache /data
# What `fastperc tune` measures, the weights of VGG and Triton's kernels go to /cache, whoever runs the container.
ENV PATH=/opt/fastperc/bin:$PATH HOME=/cache XDG_CACHE_HOME=/cache \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1001
WORKDIR /data
ENTRYPOINT ["fastperc"]
CMD ["--help"]
