# The image for Kubernetes (and for Slurm with a container plugin), from this folder:
#     docker build --tag REGISTRY/fuxi-torchrec:0.1 . && docker push REGISTRY/fuxi-torchrec:0.1
# CUDA comes with PyTorch's own packages; of the host it needs the NVIDIA driver and container toolkit.
FROM python:3.11-slim-bookworm

# A C compiler for the CPU kernels and Triton's, made on first use; verbs, by which NCCL finds InfiniBand.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc ibverbs-providers libc6-dev libibverbs1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app

# The dependencies first: they change less often than the code.
COPY requirements requirements
RUN pip install --no-cache-dir --requirement requirements/base.txt --requirement requirements/launch.txt \
    && pip install --no-cache-dir --no-deps --requirement requirements/cuda.txt

COPY LICENSE README.md pyproject.toml setup.py ./
COPY configs configs
COPY data_pipelines data_pipelines
COPY fuxi_torchrec fuxi_torchrec
COPY launch launch
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable .

# Jobs name their own command; without one: what there is.
CMD ["fuxi-torchrec", "--help"]
