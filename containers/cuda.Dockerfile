# docker build -f containers/cuda.Dockerfile -t widemargin:cuda .
# docker run --rm --gpus all --ipc=host -v "$PWD:/work" widemargin:cuda train my.yaml
# For several GPUs: --entrypoint accelerate, as in docs/scale-out.md.
#
# The devel image has nvcc, which flash-attn needs where no wheel of it fits, and the C compiler that
# Triton needs at run time. FLASH_ATTN=0 leaves flash-attn out and saves the build, which can take an hour.
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

ARG FLASH_ATTN=1
ARG MAX_JOBS=4
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 PATH=/opt/venv/bin:$PATH
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv git \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY kernels kernels
COPY trainer trainer
COPY integrations integrations
COPY configs configs
RUN pip install --constraint constraints.txt '.[deepspeed,qlora]'
# hadolint ignore=DL3013
RUN if [ "$FLASH_ATTN" = 1 ]; then \
      pip install packaging ninja \
      && MAX_JOBS="$MAX_JOBS" pip install --no-build-isolation 'flash-attn>=2.8'; \
    fi \
    && useradd --create-home user

USER user
WORKDIR /work
ENTRYPOINT ["widemargin"]
CMD ["doctor"]
