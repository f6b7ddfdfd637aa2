# An image with CUDA, this package, and what training and evaluation need:
#   docker build -t tiedlora .
#   docker run --rm --gpus all --ipc host -v "$PWD":/work tiedlora run --model MODEL --train_file data.jsonl
# torch's wheels bring CUDA's libraries, so the base image need not have a compiler for CUDA.
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-base-ubuntu24.04
FROM ${CUDA_IMAGE}

# Triton builds a small launcher with gcc and Python's headers. ssh and pdsh start ranks on other hosts.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3 python3-dev python3-venv openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/tiedlora/bin:$PATH
RUN python3 -m venv /opt/tiedlora

COPY pyproject.toml README.md LICENSE /src/
COPY ds_configs /src/ds_configs
COPY launch /src/launch
COPY megatron_tiedlora /src/megatron_tiedlora
RUN pip install --no-cache-dir "/src[train,eval,check]" \
    && rm -rf /src

WORKDIR /work
ENTRYPOINT ["tiedlora"]
CMD ["--help"]
