"""State dicts of other libraries, as stored tensors and back."""

import torch

from dinov2.hub.stored_tensor import StoredTensor


def stored(state):
    """Wrap the tensors of a state dict."""
    return {name: StoredTensor.of(tensor) for name, tensor in state.items()}


def read(state):
    """Read all tensors, each checked against its plan."""
    tensors = {name: tensor.read().contiguous() for name, tensor in state.items()}
    for name, tensor in tensors.items():
        assert (tensor.shape, tensor.dtype) == (state[name].shape, state[name].dtype), name
    return tensors


def unread(shapes):
    """Make a state dict of shapes whose values must not be asked for."""

    def refuse():
        raise AssertionError("only the plan is wanted")

    return {name: StoredTensor(torch.Size(shape), torch.float32, refuse) for name, shape in shapes.items()}


def shapes_of(state):
    """Return name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def randomise(model, scale=0.2):
    """Give every parameter values that matter, LayerScale and tokens too."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()
