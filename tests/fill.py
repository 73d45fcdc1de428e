"""Weights and images from nothing but names and shapes, so that expected outputs need no stored
weights.

tests/data/networks.json was made by filling every state-dict entry of the public networks with
`fill(key, shape)`, running `image()` through them in float64 and eval mode, and recording what came
out.
"""

import zlib

import numpy as np
import torch


def fill(key, shape):
    """The values of the state-dict entry `key`."""
    n = int(np.prod(shape)) if len(shape) else 1
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    phase = (zlib.crc32(key.encode()) % 1000) / 1000.0
    w = np.sin(12.9898 * np.arange(1, n + 1) + 78.233 * phase) * 4375.8545
    w = 2.0 * (w - np.floor(w)) - 1.0
    if key.endswith("running_var"):
        w = 1.0 + 0.5 * w * w
    elif key.endswith("running_mean"):
        w = 0.1 * w
    elif len(shape) == 1 and key.endswith("weight"):
        w = 1.0 + 0.1 * w
    elif len(shape) == 1:
        w = 0.1 * w
    else:
        w = w * np.sqrt(2.0 / np.prod(shape[1:]))
    return w.reshape(shape)


def fill_network(net):
    """`net` in float64 and eval mode, every entry of its state dict filled."""
    net = net.double().eval()
    state = {k: torch.as_tensor(fill(k, tuple(v.shape))) for k, v in net.state_dict().items()}
    net.load_state_dict(state)
    return net


def image(batch=2, size=32):
    """The float64 (batch, 3, size, size) input that belongs to the recorded outputs."""
    n = batch * 3 * size * size
    return torch.from_numpy(np.sin(0.013 * np.arange(n) ** 1.1).reshape(batch, 3, size, size))
