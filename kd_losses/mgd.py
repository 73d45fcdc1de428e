"""MGD: Masked Generative Distillation (Yang, Li, Shao, Shi, Yuan, Yuan, ECCV 2022),
https://arxiv.org/abs/2205.01529
"""

import torch
from torch import Tensor, nn


class MGD(nn.Module):
    """Squared distance of the teacher's map to one generated from the student's masked map.

        m    = 1 where a uniform draw is at least lam, else 0      (B, t_dim, 1, 1), drawn each call
        x    = m * align(fm_s)          1x1 convolution with bias, only if the channels differ
        loss = 1 / B * sum over B, C, H, W of (W_2 relu(W_1 x) - fm_t)^2       3x3 convolutions

    s_dim, t_dim: channels of the student's and the teacher's map; lam: share of the channels that
    are masked, from 0 to below 1 (authors: 0.15). The loss is a sum over the map, so its weight is
    small (7e-5, on CIFAR 1.2e-3). The convolutions are trained with the student. The mask comes
    from torch's generator of the map's device.
    Differs from the authors' code: nothing for classification. For detection the authors mask whole
    positions.
    """

    def __init__(self, s_dim: int, t_dim: int, lam: float = 0.15):
        super().__init__()
        if not 0 <= lam < 1:
            raise ValueError(f"expected 0 <= lam < 1, got {lam}")
        self.s_dim, self.t_dim, self.lam = s_dim, t_dim, lam
        self.align = nn.Conv2d(s_dim, t_dim, 1) if s_dim != t_dim else nn.Identity()
        self.generation = nn.Sequential(
            nn.Conv2d(t_dim, t_dim, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(t_dim, t_dim, 3, padding=1),
        )

    def forward(self, fm_s: Tensor, fm_t: Tensor, rand: Tensor | None = None) -> Tensor:
        """fm_s (B, s_dim, H, W), fm_t (B, t_dim, H, W), the last maps; rand: the uniform draws
        (B, t_dim, 1, 1), or None for fresh ones. Returns a scalar.

        Raises ValueError if the shapes do not fit.
        """
        b, _, *size = fm_s.shape
        expected = [(b, self.s_dim, *size), (b, self.t_dim, *size)]
        if [(*fm_s.shape,), (*fm_t.shape,)] != expected:
            raise ValueError(
                f"MGD: expected feature maps of equal batch and spatial size with {self.s_dim} and "
                f"{self.t_dim} "
                f"channels, got {(*fm_s.shape,)} and {(*fm_t.shape,)}"
            )
        if rand is None:  # in float32 always, so that the mask does not hang on the precision
            rand = torch.rand(b, self.t_dim, 1, 1, device=fm_s.device, dtype=torch.float32)
        elif rand.shape != (b, self.t_dim, 1, 1):
            raise ValueError(f"MGD: expected rand {(b, self.t_dim, 1, 1)}, got {(*rand.shape,)}")
        x = self.align(_float32(fm_s))
        x = self.generation(x * (rand >= self.lam))
        with torch.autocast(x.device.type, enabled=False):
            x, fm_t = _float32(x), _float32(fm_t.detach())
            return (x - fm_t).square().sum() / b


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
