"""Grey images and networks that take one channel: they are given one."""

import numpy as np
import torch
from torch import nn

from dataset import PIECE, Files, Images, open_image
from utils import UserError

LOOKED_AT = 16  # images of those that are read from disk


def first_convolution(net: nn.Module) -> tuple[str, nn.Conv2d | None]:
    """The path of the first convolution, and itself."""
    convs = ((path, m) for path, m in net.named_modules() if isinstance(m, nn.Conv2d))
    return next(convs, ("", None))


def give_one_channel(net: nn.Module) -> nn.Module:
    """Let `net` see the first channel alone of the images, where its first convolution takes one.
    The others are equal to it in grey images; see `check_grey`. Returns `net`."""
    _, first = first_convolution(net)
    if first is not None and first.in_channels == 1 == first.groups and channels_of(net) == 3:
        net.first_channel = net.register_forward_pre_hook(_first_channel)
    return net


def make_one_channel(net: nn.Module, name: str) -> nn.Module:
    """Let the first convolution of `net` take one channel instead of three: its weights are summed,
    which makes the same of grey images. Returns `net`. Raises UserError if it has none that
    takes three."""
    path, first = first_convolution(net)
    if first is not None and first.in_channels == 3 and first.groups == 1:
        weight = first.weight.detach().sum(1, keepdim=True)
        first.weight = nn.Parameter(weight, requires_grad=first.weight.requires_grad)
        first.in_channels = 1
    give_one_channel(net)
    if channels_of(net) == 3:
        raise UserError(f"--channels 1: {name} does not start with a convolution of three channels")
    return net


def one_channel_in(state: dict[str, torch.Tensor], net: nn.Module) -> bool:
    """Whether weights are those of `net` with one channel instead of three."""
    path, first = first_convolution(net)
    if first is None or first.in_channels != 3 or first.groups != 1:
        return False
    key, shape = f"{path}.weight", (len(first.weight), 1, *first.kernel_size)
    return any(f".{k}".endswith(f".{key}") and x.shape == shape for k, x in state.items())


def check_channels(net: nn.Module, name: str, wanted: int | None) -> None:
    """Raises UserError if --channels says otherwise than the network."""
    if wanted not in (None, channels_of(net)):
        raise UserError(f"--channels {wanted}: {name} takes {channels_of(net)}")


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
    """What to say of a network that takes one channel. Raises UserError if the images, of which
    some are looked at, have colours."""
    if channels_of(net) == 3:
        return []
    if not is_grey(images):
        raise UserError(
            f"{name} takes images of one channel, but these have colours; convert them to grey, or "
            "give "
            "a network that takes three channels"
        )
    return [f"{name} takes one channel: the grey images are loaded with one channel"]


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
