"""Package metadata. The README says how to install; `make smoke` and `make test` do it by themselves."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "fuxi_torchrec/__init__.py").read_text()).group(1)
README = ROOT / "README.md"

setup(
    name="fuxi-torchrec",
    version=VERSION,
    description="FuXi-β generative recommenders on sharded embedding tables (TorchRec), from laptop to cluster",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["fuxi_torchrec*", "data_pipelines*", "launch*"]),
    package_data={"fuxi_torchrec.ops.native": ["*.c", "*.h"]},
    entry_points={
        "console_scripts": ["fuxi-torchrec = fuxi_torchrec.cli:main"],
        # Not torchx.components: that would take TorchX's own components away. They are run from their file.
        "torchx.cli.cmds": [
            "run = launch.torchx_run:Run",
            "list = launch.torchx_run:Listing",
            *(f"{name.lower()} = launch.torchx_run:{name}" for name in ("Status", "Cancel", "Delete", "Log")),
        ],
        # In the place of TorchX's own of those names.
        "torchx.schedulers": [
            "kubernetes = launch.kubernetes.scheduler:create_scheduler",
            "slurm = launch.slurm:create_scheduler",
        ],
    },
    # No torch, torchrec or fbgemm here: a CPU and a GPU need different builds, and the CPU's cannot be written as a
    # requirement (see requirements/cpu.txt). fuxi_torchrec.versions checks at start-up what is installed.
    install_requires=[
        "numpy>=1.26",
        "pyarrow>=17",
        "duckdb>=1.1",
        "iopath>=0.1.10",
        "jsonargparse>=4.49,<5",
        "docstring-parser>=0.16",
        "PyYAML>=6",
        "rich>=13",
        "tensorboard>=2.16",
    ],
    extras_require={
        "cuda": ["torch==2.13.0", "torchrec==1.8.0", "fbgemm-gpu==1.8.0"],
        "dev": ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.12", "import-linter>=2.3", "mypy>=1.18",
                "types-PyYAML"],
        # The stable torchx 0.7.0 (2024) does not fit today's Slurm.
        "launch": ["torchx-nightly[kubernetes]==2026.10.26", "scipy>=1.13", "matplotlib>=3.9"],
    },
)
