"""Sobolev: Sobolev Training for Neural Networks (Czarnecki, Osindero, Jaderberg, Swirszcz, Pascanu,
NIPS 2017, section 2), https://arxiv.org/abs/1706.04859
"""

import torch
from torch import Tensor, nn


class Sobolev(nn.Module):
    """Mean squared difference of the normalised gradients of the target logit w.r.t. the image.

        g = d out[target] / d img,   n = g / ||g||_2            norm over each sample's pixels
        loss = mean over B, C, H, W of (n_s - n_t)^2

    Differentiating the loss needs second derivatives of the student, none of the teacher.
    Differs from the paper: as in KD-Zoo, only the target's logit, no random projections, and
    normalised gradients. KD-Zoo's author says that this loss is unstable without others. With batch
    norm in training mode, a sample's gradient also depends on the other samples.
    """

    def forward(self, out_s: Tensor, out_t: Tensor, img: Tensor, target: Tensor) -> Tensor:
        """out_s, out_t: logits (B, K), both computed from img (B, C, H, W), a leaf that requires
        grad; target: int64 (B,). Returns a scalar.

        Raises ValueError if img does not require grad or the teacher's graph is missing.
        """
        if not (img.requires_grad and out_s.requires_grad and out_t.requires_grad):
            raise ValueError(
                "Sobolev needs gradients with respect to img: it must require grad before both "
                "forward passes, and the teacher must not run under no_grad"
            )
        with torch.autocast(out_s.device.type, enabled=False):
            grad_s = self.gradient(out_s, img, target, create_graph=True)
            grad_t = self.gradient(out_t, img, target, create_graph=False)
            return (grad_s - grad_t).square().mean()

    @staticmethod
    def gradient(out: Tensor, img: Tensor, target: Tensor, create_graph: bool) -> Tensor:
        """The normalised gradient (B, C * H * W) of the target's logit in the image."""
        logit = out.gather(1, target[:, None]).sum()
        # retain_graph: another loss may differentiate the same forward
        (grad,) = torch.autograd.grad(logit, img, create_graph=create_graph, retain_graph=True)
        return _unit(_float32(grad).flatten(1))


def _unit(x: Tensor) -> Tensor:
    """x with rows, along the last dimension, of L2 norm 1; one of norm up to 1e-12 stays."""
    norm = x.norm(dim=-1, keepdim=True)  # whose gradient at 0 torch takes as 0
    return x / torch.where(norm > 1e-12, norm, 1)


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
