"""Grey images and networks that take one channel: they are given one."""

import numpy as np
import torch
from torch import nn

from dataset import PIECE, Files, Images, open_image
from utils import UserError

LOOKED_AT = 16  # images of those that are read from disk


def give_one_channel(net: nn.Module) -> nn.Module:
    """Let `net` see the first channel alone of the images, where its first convolution takes one.
    The others are equal to it in grey images; see `check_grey`. Returns `net`."""
    convs = (m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.modules.conv.LazyConv2d)))
    first = next(convs, None)
    if first is not None and first.in_channels == 1 == first.groups:
        net.first_channel = net.register_forward_pre_hook(_first_channel)
    return net


def _first_channel(net: nn.Module, args):
    return (args[0][:, :1], *args[1:]) if args else None


def channels_of(net: nn.Module) -> int:
    """How many channels the images have that `net` is made for."""
    return 1 if hasattr(net, "first_channel") else 3


def bare(net: nn.Module) -> nn.Module:
    """`net` as it was before `give_one_channel`: it takes images of `channels_of(net)`."""
    if hasattr(net, "first_channel"):
        net.first_channel.remove()
    return net


def check_grey(net: nn.Module, name: str, images: Images | Files) -> list[str]:
    """What to say of a network that takes one channel. Raises UserError where the images, of which
    some are looked at, have colours."""
    if channels_of(net) == 3:
        return []
    if not is_grey(images):
        raise UserError(
            f"{name} takes images of one channel, and these have colours: make them grey, or give "
            "a network that takes three channels"
        )
    return [f"{name} takes one channel: the images, which are grey, are given to it with one"]


def is_grey(images: Images | Files) -> bool:
    """Whether the three channels are equal: of all images that are in memory, of some files."""
    if isinstance(images, Images):
        return all(_equal_channels(part) for part in images.pixels.split(512 * PIECE))
    count = min(len(images), LOOKED_AT)
    paths = images.items[np.arange(count) * len(images) // count]
    pixels = (np.asarray(open_image(path.decode("utf-8", "surrogateescape"))) for path in paths)
    return all(_equal_channels(torch.from_numpy(x.copy())) for x in pixels)


def _equal_channels(pixels: torch.Tensor) -> bool:
    return bool((pixels == pixels[..., :1]).all())
