"""LwM: Learning without Memorizing (Dhar, Singh, Peng, Wu, Chellappa, CVPR 2019, the attention
distillation loss), https://arxiv.org/abs/1811.08051
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LwM(nn.Module):
    """Mean absolute difference of the normalised attention maps of the target's class.

        g = d out[target] / d fm,   w_c = mean over H, W of g_c         (B, C, H, W), (B, C)
        cam = relu(sum_c w_c x_c)                                       (B, H, W)
        loss = mean over B, H, W of | cam_s / ||cam_s||_2 - cam_t / ||cam_t||_2 |

    The larger of two cams is average-pooled to the size of the smaller one, before the norms. cam:
    'gradient': x = g, as in KD-Zoo; 'activation': x = fm, Grad-CAM as in the paper. Differentiating
    the loss needs second derivatives of the student, none of the teacher.
    Differs from the paper: with cam='gradient' the value depends only on gradients. Then the layers
    before the map of a piecewise linear network are not trained, and a map that is pooled and
    classified next has a constant cam: use an earlier map. With batch norm in training mode, a
    sample's gradient also depends on the other samples. KD-Zoo's author says that this loss is
    unstable without others.
    """

    def __init__(self, cam: str = "gradient"):
        super().__init__()
        if cam not in ("gradient", "activation"):
            raise ValueError(f"expected cam gradient or activation, got {cam!r}")
        self.cam = cam

    def forward(
        self, out_s: Tensor, fm_s: Tensor, out_t: Tensor, fm_t: Tensor, target: Tensor
    ) -> Tensor:
        """out_s, out_t: logits (B, K), computed from fm_s (B, C_s, *, *) and fm_t (B, C_t, *, *),
        which require grad; target: int64 (B,). Returns a scalar.

        Raises ValueError if the batches differ or a graph is missing.
        """
        if not len(out_s) == len(out_t) == len(target) == len(fm_s) == len(fm_t):
            raise ValueError("LwM: expected maps, logits and targets of one batch")
        if not all(x.requires_grad for x in (out_s, fm_s, out_t, fm_t)):
            raise ValueError(
                "LwM needs gradients with respect to the maps: they must require "
                "grad, and the teacher must not run under no_grad"
            )
        with torch.autocast(out_s.device.type, enabled=False):
            size = tuple(min(a, b) for a, b in zip(fm_s.shape[2:], fm_t.shape[2:]))
            cam_s = self.attention(out_s, fm_s, target, size, create_graph=True)
            cam_t = self.attention(out_t, fm_t, target, size, create_graph=False).detach()
            return (cam_s - cam_t).abs().mean()

    def attention(
        self, out: Tensor, fm: Tensor, target: Tensor, size: tuple[int, int], create_graph: bool
    ) -> Tensor:
        """The normalised attention map (B, prod(size)) of the target's class."""
        logit = out.gather(1, target[:, None]).sum()
        # retain_graph: another loss may differentiate the same forward
        (grad,) = torch.autograd.grad(logit, fm, create_graph=create_graph, retain_graph=True)
        height_width = fm.shape[2:]
        grad, fm = _float32(grad).flatten(2), _float32(fm).flatten(2)
        # the normalised map does not depend on the gradient's scale; its square could underflow
        peak = grad.detach().abs().amax((1, 2), keepdim=True)
        grad = grad / torch.where(peak > 0, peak, 1)
        weight = grad.mean(2, keepdim=True)
        cam = (weight * (grad if self.cam == "gradient" else fm)).sum(1).relu()
        if height_width != size:
            cam = F.adaptive_avg_pool2d(cam.unflatten(1, height_width), size).flatten(1)
        return _unit(cam)


def _unit(x: Tensor) -> Tensor:
    """x with rows, along the last dimension, of L2 norm 1; one of norm up to 1e-12 stays."""
    norm = x.norm(dim=-1, keepdim=True)  # whose gradient at 0 torch takes as 0
    return x / torch.where(norm > 1e-12, norm, 1)


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
