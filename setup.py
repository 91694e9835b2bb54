"""Build of prefkern: one package whose parts lie in three folders of the checkout."""

import re
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "prefkern" / "__init__.py").read_text(), re.MULTILINE)[1]
# Not linked with an OpenMP: the one that torch has loaded serves, so that both share their threads.
COMPILE = ["-O2", "-std=gnu++17", "-fopenmp", "-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-fno-trapping-math"]
COMPILE += ["-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # the last two: GCC 12's own headers

setup(
    name="prefkern",
    version=VERSION,
    description="Preference losses for language models without ever building the logits",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["preference optimization", "DPO", "RLHF", "Triton", "language models", "fused loss"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    # A top-level folder named `kernels` with an __init__.py would shadow the package of that name which
    # transformers imports; so the folders are plain and get their place under prefkern here.
    packages=["prefkern", "prefkern.losses", "prefkern.kernels", "prefkern.training"],
    package_dir={"prefkern": "prefkern", "prefkern.kernels": "kernels", "prefkern.training": "training"},
    package_data={"prefkern": ["py.typed"]},
    # For a CPU. No header of Python's is used; without a compiler that takes them, torch does the work.
    ext_modules=[
        Extension(
            f"prefkern.kernels._{name}",
            sources=[f"kernels/{source}.cpp" for source in sources],
            depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "kernels").glob("*.h"))],
            extra_compile_args=COMPILE,
            language="c++",
            optional=True,
        )
        for name, sources in {
            "row_softmax_cpu": ["row_softmax_cpu"],
            "product_cpu": ["product_cpu", "lm_head_cpu"],
        }.items()
    ],
    # Ranges are wide: the newest versions known to work together are in constraints.txt.
    install_requires=[
        "accelerate>=1.1",
        "datasets>=3",
        "matplotlib>=3.7",
        "peft>=0.17",
        "pyyaml>=6",
        "safetensors>=0.4.3",
        "tensorboard>=2.14",
        "tokenizers>=0.21",
        "torch>=2.8",
        "tqdm>=4.66",
        "transformers>=5",
        "triton>=3.4; platform_system == 'Linux'",  # elsewhere the eager and chunked bodies do the work
        "xxhash>=3",
    ],
    extras_require={
        # `kernels` is Hugging Face's: its name is that of our folder. trl is what the losses are compared with.
        "test": ["hypothesis>=6.100", "kernels", "pytest>=8.1", "trl>=1.16; python_version >= '3.11'"],
        # What the head is timed against; each is left out of the table where it is not installed.
        "bench": [
            "cut-cross-entropy>=25.1",
            "liger-kernel>=0.8; platform_system == 'Linux'",
            "pytest>=8.1",
            "pytest-benchmark>=4",
            "trl>=1.16; python_version >= '3.11'",
        ],
    },
    entry_points={"console_scripts": ["prefkern = prefkern.training.cli:main"]},
)
