"""CRLD: Cross-View Consistency Regularisation for Knowledge Distillation (Zhang, Liu, Cai, Ma,
ACM MM 2024), https://arxiv.org/abs/2412.16493
"""

import torch
from torch import Tensor, nn


class CRLD(nn.Module):
    """The soft-target loss within and across two views of an image, where the teacher is confident.

        k(s, t) = T^2 * KL(softmax(t / T) || softmax(s / T))                                (B,)
        within  = 1 / B * sum_b [max softmax(t_w) >= tau_w] * (k(s_w, t_w) + k(s_s, t_s))
        cross   = 1 / B * sum_b [max softmax(t_s) >= tau_s] * (k(s_s, t_w) + k(s_w, t_s))
        loss    = wv * within + cv * cross

    s_w, s_s, t_w, t_s: logits of student and teacher on the weakly and the strongly augmented view.
    wv, cv: weights (2 and 0.5); T: temperature, above 0 (4); tau_w, tau_s: minimum confidence of
    the teacher on the weak and on the strong view, at temperature 1 (0.9 and 0.2). If the teacher
    is not confident on any sample, the loss is 0.
    Differs from the paper: unknown. This is what a third-party port of the authors' code computes,
    with its masks, weights and thresholds.
    """

    def __init__(
        self,
        wv: float = 2.0,
        cv: float = 0.5,
        T: float = 4.0,
        tau_w: float = 0.9,
        tau_s: float = 0.2,
    ):
        super().__init__()
        if T <= 0:
            raise ValueError(f"expected T > 0, got {T}")
        if not (0 <= tau_w <= 1 and 0 <= tau_s <= 1):
            raise ValueError(f"expected tau_w and tau_s from 0 to 1, got {tau_w} and {tau_s}")
        self.wv, self.cv, self.T, self.tau_w, self.tau_s = wv, cv, T, tau_w, tau_s

    def forward(self, out_s_w: Tensor, out_s_s: Tensor, out_t_w: Tensor, out_t_s: Tensor) -> Tensor:
        """Logits (B, K): the student's on the weak and the strong view, the teacher's on the same.
        Returns a scalar. Raises ValueError if the shapes differ.
        """
        outs = out_s_w, out_s_s, out_t_w.detach(), out_t_s.detach()
        if len({x.shape for x in outs}) > 1:
            raise ValueError(
                f"CRLD: expected four logits of equal shape, got {[(*x.shape,) for x in outs]}"
            )
        with torch.autocast(out_s_w.device.type, enabled=False):
            outs = [_float32(x) for x in outs]
            sure_w, sure_s = (
                z.softmax(1).amax(1) >= tau for z, tau in zip(outs[2:], (self.tau_w, self.tau_s))
            )
            s_w, s_s, t_w, t_s = ((z / self.T).log_softmax(1) for z in outs)
            within = (_kl(s_w, t_w) + _kl(s_s, t_s)) * sure_w
            cross = (_kl(s_s, t_w) + _kl(s_w, t_s)) * sure_s
            return self.T**2 * (self.wv * within + self.cv * cross).mean()


def _kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    """KL(t || s) of each sample (B,), from log-probabilities."""
    return (log_t.exp() * (log_t - log_s)).sum(1)


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
