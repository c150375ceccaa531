"""Package metadata; settings of the build and of the tools stand in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "torch>=2.11",
    "torchvision>=0.26",
    "omegaconf>=2.3",
    "pyyaml>=6.0",
    "fvcore>=0.1.5.post20221221",
    "iopath>=0.1.10",
    "submitit>=1.5",
    "numpy>=2.0",
    "scikit-learn>=1.5",
    "scipy>=1.11",
    "pillow>=10.3",
    "pandas>=2.2",
    "safetensors>=0.4.5",
    "tifffile>=2024.8",
    "tqdm>=4.66",
    "matplotlib>=3.9",
]
EXTRAS = {
    "test": [
        "pytest>=8.2",
        "pytest-xdist>=3.6",
        "ruff>=0.8",
        "timm>=1.0.20",
        "transformers>=5.0",
        "lightly>=1.5.13",
        "onnx>=1.17",
        "onnxruntime>=1.19",
        "imagecodecs>=2024.6.1",
        "mrcfile>=1.5",
        "h5py>=3.11",
        "zarr>=3.0",
    ],
    "tiff": ["imagecodecs>=2024.6.1"],
    "mrc": ["mrcfile>=1.5"],
    "hdf5": ["h5py>=3.11"],
    "zarr": ["zarr>=3.0"],
    "xformers": ["xformers>=0.0.32; sys_platform == 'linux'"],
    "tensorboard": ["tensorboard>=2.17"],
    "wandb": ["wandb>=0.18"],
    "onnx": ["onnx>=1.17", "onnxruntime>=1.19"],
}
PROGRAMS = [
    "dinov2-train = dinov2.train.train:main",
    "dinov2-eval-attention-maps = dinov2.eval.attention_maps:main",
    "dinov2-eval-bbbc021 = dinov2.eval.bbbc021:main",
    "dinov2-eval-features = dinov2.eval.features:main",
    "dinov2-eval-health = dinov2.eval.health:main",
    "dinov2-eval-knn = dinov2.eval.knn:main",
    "dinov2-eval-knn-curve = dinov2.eval.knn_curve:main",
    "dinov2-eval-linear = dinov2.eval.linear:main",
    "dinov2-eval-log-regression = dinov2.eval.log_regression:main",
    "dinov2-eval-pca-maps = dinov2.eval.pca_maps:main",
    "dinov2-eval-protocols = dinov2.eval.protocols:main",
    "dinov2-eval-retrieval = dinov2.eval.retrieval:main",
    "dinov2-eval-tsne = dinov2.eval.tsne:main",
    "dinov2-checkpoint = dinov2.run.checkpoint:main",
    "dinov2-inspect-weights = dinov2.run.inspect_weights:main",
    "dinov2-estimate = dinov2.run.estimate:main",
    "dinov2-export = dinov2.run.export:main",
    "dinov2-check-data = dinov2.run.check_data:main",
    "dinov2-preview = dinov2.run.preview:main",
    "dinov2-status = dinov2.run.status:main",
    "dinov2-submit = dinov2.run.submit:main",
]
DATASETS = [
    "BBBC021 = data_adapters.bbbc021:BBBC021",
    "Digits = data_adapters.digits:Digits",
    "EMFolder = data_adapters.em_folder:EMFolder",
    "GroupedJSON = data_adapters.grouped_json:GroupedJSON",
    "Histology = data_adapters.histology:Histology",
    "ImageFolder = data_adapters.image_folder:ImageFolder",
    "ImageNet = dinov2.data.datasets.image_net:ImageNet",
    "ImageNet100 = data_adapters.image_net_100:ImageNet100",
    "ImageNet22k = dinov2.data.datasets.image_net_22k:ImageNet22k",
    "Imagenette = data_adapters.imagenette:Imagenette",
]

readme = Path(__file__).with_name("README.md")

setup(
    name="dinov2-adapt",
    version="0.1.0",
    description="Continue the self-supervised training of DINOv2 on your own images, and measure what it brought",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["dinov2", "dinov2.*", "data_adapters", "data_adapters.*"]),
    python_requires=">=3.11",
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": PROGRAMS, "dinov2.datasets": DATASETS},
)
