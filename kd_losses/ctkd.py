"""CTKD: Curriculum Temperature for Knowledge Distillation (Li, Li, Yang, Zhao, Song, Luo, Li, Yang,
AAAI 2023, section 3), https://arxiv.org/abs/2211.16231
"""

import math

import torch
from torch import Tensor, nn


class CTKD(nn.Module):
    """The soft-target loss with a temperature that is trained to increase it, more in each epoch.

        T      = t_start + t_end * sigmoid(theta)           theta: learned, 1 at the start
        loss   = T^2 / B * sum_b KL(softmax(out_t / T) || softmax(out_s / T))
        lambda = decay_min + (decay_max - decay_min) * (1 + cos(pi * min(epoch, loops) / loops)) / 2

    Gradients flow through every T in the loss. The gradient of theta is multiplied by lambda, which
    is negative: theta increases the loss, and the student decreases it. t_start, t_end: T lies
    between t_start and t_start + t_end, both above 0 (paper: 1 and 20, hence 15.6 at the start);
    loops: epochs until lambda is decay_min (10, on ImageNet 5); decay_max, decay_min: lambda at
    epoch 0 and at the end (0 and -1).
    Differs from the paper: nothing; its second variant, a temperature for each sample, is
    left out.
    """

    def __init__(
        self,
        t_start: float = 1.0,
        t_end: float = 20.0,
        loops: float = 10.0,
        decay_max: float = 0.0,
        decay_min: float = -1.0,
    ):
        super().__init__()
        if not (t_start > 0 and t_end > 0 and loops > 0):
            raise ValueError(
                f"expected t_start, t_end and loops > 0, got {t_start}, {t_end} and {loops}"
            )
        self.t_start, self.t_end, self.loops = t_start, t_end, loops
        self.decay_max, self.decay_min = decay_max, decay_min
        self.theta = nn.Parameter(torch.tensor(1.0))

    @property
    def T(self) -> Tensor:
        """The temperature, a scalar."""
        return self.temperature(self.theta)

    def temperature(self, theta: Tensor) -> Tensor:
        return self.t_start + self.t_end * theta.sigmoid()

    def decay(self, epoch: float | Tensor) -> float | Tensor:
        """lambda of an epoch, counted from 1; a tensor's value is not read back."""
        if isinstance(epoch, Tensor):
            wave = torch.cos(math.pi * (epoch / self.loops).clamp(max=1))
        else:
            wave = math.cos(math.pi * min(epoch / self.loops, 1))
        return self.decay_min + (self.decay_max - self.decay_min) * (1 + wave) / 2

    def forward(self, out_s: Tensor, out_t: Tensor, epoch: float | Tensor) -> Tensor:
        """out_s, out_t: logits (B, K); epoch: a number or a scalar tensor, from 1. Returns a
        scalar.

        Raises ValueError if the shapes differ.
        """
        if out_s.shape != out_t.shape:
            raise ValueError(
                f"CTKD: expected logits of equal shape, got {(*out_s.shape,)} and {(*out_t.shape,)}"
            )
        with torch.autocast(out_s.device.type, enabled=False):
            out_s, out_t = _float32(out_s), _float32(out_t.detach())
            # the value of theta, lambda times its gradient
            fixed = self.theta.detach()
            theta = fixed + self.decay(epoch) * (self.theta - fixed)
            T = self.temperature(theta.to(out_s.dtype))
            log_s, log_t = (out_s / T).log_softmax(1), (out_t / T).log_softmax(1)
            return T**2 * (log_t.exp() * (log_t - log_s)).sum(1).mean()


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
