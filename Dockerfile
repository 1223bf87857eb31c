# The image for Kubernetes (and for Slurm with a container plugin): make image, see docs/kubernetes.md.
# CUDA comes with PyTorch's own packages; of the host it needs the NVIDIA driver and container toolkit.
# A Debian or Ubuntu with Python 3.10 to 3.14, its venv module and headers (Triton compiles against them).
ARG BASE=docker.io/library/python:3.11-slim-bookworm

# The dependencies, where pip's leftovers and what is cut away below leave no layer behind.
FROM ${BASE} AS dependencies
# cuda or cpu; the address of another package index to take torch from (the default one has a CUDA build only).
ARG DEVICE=cuda
ARG TORCH_INDEX=
# Further packages or pip options, separated by spaces: boto3 for data and checkpoints in S3.
ARG EXTRAS=
COPY requirements /requirements
# Without the client of Kubernetes, which submits jobs, is large, and wants another python-dateutil than boto3.
RUN sed -i "/^kubernetes==/d" /requirements/launch.txt \
    && python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
        --requirement /requirements/base.txt --requirement /requirements/launch.txt \
    && /opt/venv/bin/pip install --no-cache-dir --no-deps --requirement "/requirements/$DEVICE.txt"
# EXTRAS is several words. What base.txt pins stays; of launch.txt boto3 moves python-dateutil.
# hadolint ignore=SC2086
RUN test -z "$EXTRAS" || /opt/venv/bin/pip install --no-cache-dir --constraint /requirements/base.txt $EXTRAS
# The tests that packages bring along; torch's are programs in C++.
RUN packages="$(echo /opt/venv/lib/python3.*/site-packages)" \
    && rm -rf "$packages"/torch/test "$packages"/torch/bin/*test* "$packages"/torch/bin/protoc* \
    && for name in matplotlib networkx numpy pyarrow scipy sympy; do \
        find "$packages/$name" -type d -name tests -prune -exec rm -rf {} +; done

FROM ${BASE}
# A C compiler for the CPU kernels and Triton's, made on first use; verbs, by which NCCL finds InfiniBand; tini, so that
# a command that does not handle SIGTERM ends by it as a container's first process too.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc ibverbs-providers libc6-dev libibverbs1 tini \
    && rm -rf /var/lib/apt/lists/*

# Nobody's in particular: OpenShift runs it as any user of group 0, who has to be able to write the home.
RUN useradd --uid 1000 --gid 0 --create-home --home-dir /home/fuxi --shell /bin/bash fuxi \
    && chmod 770 /home/fuxi
ENV PATH=/opt/venv/bin:$PATH

COPY --from=dependencies /opt/venv /opt/venv

# Last what changes most. Editable, so that a job of another commit lays its files over these (TorchX's workspace); the
# modes are the context's, whose owner may have closed it to others.
WORKDIR /app
COPY LICENSE README.md pyproject.toml setup.py ./
COPY configs configs
COPY data_pipelines data_pipelines
COPY fuxi_torchrec fuxi_torchrec
COPY launch launch
RUN chmod -R u+rwX,go+rX,go-w . \
    && pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && python -m compileall -q data_pipelines fuxi_torchrec launch

# A number: Kubernetes' runAsNonRoot does not know names. An arbitrary user has no entry in /etc/passwd that would tell
# the rest.
ENV HOME=/home/fuxi USER=fuxi
USER 1000:0
ENTRYPOINT ["tini", "--"]
# Jobs name their own command; without one: what there is.
CMD ["fuxi-torchrec", "--help"]
