"""AB: Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons
(Heo, Lee, Yun, Choi, AAAI 2019, the alternative loss with a margin),
https://arxiv.org/abs/1811.03233
"""

import torch
from torch import Tensor, nn


class AB(nn.Module):
    """Squared hinge that puts each neuron of the student on the teacher's side of its boundary.

        sign = +1 where fm_t > 0 (active), -1 where fm_t <= 0 (inactive)
        loss = mean over B, C, H, W of relu(margin - sign * fm_s)^2

    margin: how far beyond the boundary a neuron is pushed, at least 0 (KD-Zoo uses 2, the CRD
    benchmark 1).
    Differs from the paper: a mean instead of the sum, as in KD-Zoo. The connector is not in this
    file: apply it to the student's map first. The CRD benchmark's loss is 0.003 * C * H * W times
    this loss, before the weight of the stage.
    """

    def __init__(self, margin: float = 2.0):
        super().__init__()
        if not margin >= 0:
            raise ValueError(f"expected margin >= 0, got {margin}")
        self.margin = margin

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        """fm_s, fm_t: (B, C, H, W) before the activation, or any one shape. Returns a scalar.

        Raises ValueError if the shapes differ.
        """
        if fm_s.shape != fm_t.shape:
            raise ValueError(
                f"AB: expected equal shapes, got {(*fm_s.shape,)} and {(*fm_t.shape,)}"
            )
        with torch.autocast(fm_s.device.type, enabled=False):
            sign = torch.where(fm_t.detach() > 0, 1.0, -1.0)
            return (self.margin - sign * _float32(fm_s)).relu().square().mean()


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
