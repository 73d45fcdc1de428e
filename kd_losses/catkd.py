"""CAT-KD: Class Attention Transfer Based Knowledge Distillation (Guo, Yan, Li, Lin, CVPR 2023),
https://arxiv.org/abs/2304.12777
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CATKD(nn.Module):
    """Mean squared distance between the pooled class activation maps of the two networks.

        cam  = W fm                     (B, K, H, W): the classifier as a 1x1 convolution, no bias
        a    = average pooling of cam to r x r, the CAM of the loss
        a    = a / max(||a||_2, 1e-4)   if normalised: norm over each class's r * r positions
        loss = mean over B, K, r, r of (a_s - a_t)^2

    resolution: r (authors: 2, for some pairs 4); normalize: whether each CAM is scaled to length 1
    (authors: for pairs of different architecture only; without it the loss grows with the square of
    the logits, so the authors' weights go from 0.7 to 600); binarize: cam_t becomes 1 where it
    exceeds the mean of its class's absolute values, 0 elsewhere, before the pooling; top: None, or
    the number of classes to compare (the teacher's highest scores).
    Differs from the authors' code: the smallest norm is 1e-4 instead of 1e-12, which has a gradient
    of 8e9 at a CAM of zeros; `top` is exact also with ties; the networks keep the bias of the
    classifier.
    """

    def __init__(
        self,
        resolution: int = 2,
        normalize: bool = False,
        binarize: bool = False,
        top: int | None = None,
    ):
        super().__init__()
        if resolution < 1 or (top is not None and top < 1):
            raise ValueError(f"expected resolution >= 1 and top >= 1, got {resolution} and {top}")
        self.resolution, self.normalize = resolution, normalize
        self.binarize, self.top = binarize, top

    def forward(self, fm_s: Tensor, weight_s: Tensor, fm_t: Tensor, weight_t: Tensor) -> Tensor:
        """fm_s (B, C_s, H, W), weight_s (K, C_s), fm_t (B, C_t, H', W'), weight_t (K, C_t): last
        maps and classifiers' weights; the student's weight gets a gradient. Returns a scalar.

        Raises ValueError if batch, classes or channels do not fit.
        """
        for fm, weight in ((fm_s, weight_s), (fm_t, weight_t)):
            if fm.ndim != 4 or weight.ndim != 2 or fm.shape[1] != weight.shape[1]:
                raise ValueError(
                    "CATKD: expected a map (B, C, H, W) and the weight (K, C) of a linear "
                    f"classifier on its channels, got {(*fm.shape,)} and {(*weight.shape,)}"
                )
        if len(fm_s) != len(fm_t) or len(weight_s) != len(weight_t):
            raise ValueError(
                f"CATKD: expected equal batch sizes and numbers of classes, got {len(fm_s)} and "
                f"{len(fm_t)} "
                f"samples, {len(weight_s)} and {len(weight_t)} classes"
            )
        if self.top is not None and self.top > len(weight_t):
            raise ValueError(f"expected top <= {len(weight_t)} classes, got {self.top}")
        with torch.autocast(fm_s.device.type, enabled=False):
            fm_s, fm_t = _float32(fm_s), _float32(fm_t.detach())
            weight_s, weight_t = weight_s.to(fm_s.dtype), weight_t.detach().to(fm_t.dtype)
            # the classifier and the pooling are linear and commute: pool the fewer numbers
            a_s = _cam(self._pool(fm_s), weight_s)
            if self.binarize:
                cam_t = _cam(fm_t, weight_t)
                above = cam_t > cam_t.abs().mean((2, 3), keepdim=True)
                a_t = self._pool(above.to(cam_t.dtype))
            else:
                a_t = _cam(self._pool(fm_t), weight_t)
            if self.top is not None:
                score = fm_t.mean((2, 3)) @ weight_t.T
                index = score.topk(self.top, dim=1).indices[:, :, None, None]
                index = index.expand(-1, -1, *a_t.shape[2:])
                a_s, a_t = a_s.gather(1, index), a_t.gather(1, index)
            if self.normalize:
                # of eps at least, so that zeros stay and the gradient in tiny CAMs is in range
                a_s, a_t = (F.normalize(a.flatten(2), dim=2, eps=1e-4) for a in (a_s, a_t))
            return (a_s - a_t).square().mean()

    def _pool(self, fm: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(fm, self.resolution)


def _cam(fm: Tensor, weight: Tensor) -> Tensor:
    return (weight @ fm.flatten(2)).unflatten(2, fm.shape[2:])


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
