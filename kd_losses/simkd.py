"""SimKD: Knowledge Distillation with the Reused Teacher Classifier (Chen, Mei, Zhang, Wang, Feng,
Chen, CVPR 2022, section 3), https://arxiv.org/abs/2203.14001
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SimKD(nn.Module):
    """Distance of the student's projected map to the teacher's; both use the teacher's classifier.

        P    = 1x1 convolution to t_dim // factor, 3x3 of that width, 1x1 to t_dim; BN and ReLU
               after each, no bias
        loss = mean over B, t_dim, H, W of (P(fm_s) - fm_t)^2       the larger map pooled first
        predict = classifier(mean over H, W of P(fm_s))

    s_dim, t_dim: channels of the student's and the teacher's last map; factor: by which P is
    narrower inside (2; the authors also show 4 and 8); t_size: side of the teacher's map, or (H,
    W), to which `predict` pools a larger one of the student; None if the student's is not
    larger. P is trained with the student. `spec` holds these numbers, from which the module can be
    built again. The trained network is the student without its classifier, P, and the teacher's
    classifier: `predict` gives its logits. There is no cross-entropy, so labels are not needed.
    Differs from the paper: no known difference; maps need not be square.
    """

    def __init__(
        self,
        s_dim: int,
        t_dim: int,
        factor: int = 2,
        t_size: int | tuple[int, int] | None = None,
    ):
        super().__init__()
        if not 1 <= factor <= t_dim:
            raise ValueError(f"expected factor from 1 to t_dim {t_dim}, got {factor}")
        self.t_size = (t_size, t_size) if isinstance(t_size, int) else t_size
        self.spec = (s_dim, t_dim, factor, *(self.t_size or ()))
        layers, mid = [], t_dim // factor
        for c_in, c_out, kernel in ((s_dim, mid, 1), (mid, mid, 3), (mid, t_dim, 1)):
            conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(c_out), nn.ReLU()]
        self.projector = nn.Sequential(*layers)

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        """fm_s (B, s_dim, H_s, W_s), fm_t (B, t_dim, H_t, W_t). Returns a scalar.

        Raises ValueError if batch or channels are not the expected ones, fm_t has not t_size,
        and in training mode where a channel holds a single value.
        """
        t_dim, size_t = self.projector[-2].num_features, fm_t.shape[2:]
        if fm_t.dim() != 4 or fm_t.shape[:2] != (len(fm_s), t_dim):
            raise ValueError(
                f"SimKD: expected a teacher's map ({len(fm_s)}, {t_dim}, H, W), got "
                f"{(*fm_t.shape,)}"
            )
        if self.t_size not in (None, size_t):
            raise ValueError(f"SimKD: expected a teacher's map of {self.t_size}, got {(*size_t,)}")
        projected = self.project(fm_s, size_t)
        with torch.autocast(fm_s.device.type, enabled=False):
            projected, fm_t = _float32(projected), _float32(fm_t.detach())
            return F.mse_loss(projected, _shrink(fm_t, projected.shape[2:]))

    def predict(self, fm_s: Tensor, classifier: nn.Module) -> Tensor:
        """fm_s (B, s_dim, H, W); classifier: the teacher's last layer. Returns logits (B, K)."""
        projected = self.project(fm_s, self.t_size or fm_s.shape[2:])
        with torch.autocast(fm_s.device.type, enabled=False):
            x = _float32(projected)
            return classifier(x.mean((2, 3)))

    def project(self, fm_s: Tensor, size: tuple[int, int]) -> Tensor:
        """The student's map, pooled to `size` where it is larger, in the teacher's channels."""
        s_dim = self.projector[0].in_channels
        if fm_s.dim() != 4 or fm_s.shape[1] != s_dim:
            raise ValueError(
                f"SimKD: expected a student's map (B, {s_dim}, H, W), got {(*fm_s.shape,)}"
            )
        fm_s = _shrink(_float32(fm_s), size)
        if self.training and fm_s.numel() == s_dim:
            raise ValueError("SimKD: expected at least two samples or pixels for its batch norms")
        return self.projector(fm_s)


def _shrink(fm: Tensor, size: tuple[int, int]) -> Tensor:
    """`fm` averaged down to `size` on each side on which it is larger."""
    size = tuple(min(pair) for pair in zip(fm.shape[2:], size))
    return fm if fm.shape[2:] == size else F.adaptive_avg_pool2d(fm, size)


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
