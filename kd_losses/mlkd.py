"""MLKD: Multi-Level Logit Distillation (Jin, Wang, Lin, CVPR 2023, section 3),
https://openaccess.thecvf.com/content/CVPR2023/html/
Jin_Multi-Level_Logit_Distillation_CVPR_2023_paper.html
"""

import torch
from torch import Tensor, nn


class MLKD(nn.Module):
    """Predictions compared per sample, across the batch and across the classes, at several T.

        P       = softmax(out / T)                                                  (B, K)
        kd_b(T) = T^2 * KL(P_t,b || P_s,b)                      of each sample
        bc_b(T) = 1 / B * sum_i (P_t P_t^T - P_s P_s^T)_ib^2    of each sample
        cc_k(T) = 1 / K * sum_i (P_t^T P_t - P_s^T P_s)_ik^2    of each class
        m_b = [confidence of the teacher in sample b <= the batch's median]
        c_k = [its confidence in class k, summed over the batch, <= the classes' median]

    The confidences are those on the weak view at T = 1. _w and _s are the weakly and the strongly
    augmented view. The loss, summed over the temperatures T, is
        form="intended": mean_b m_b kd_b_w + sum_k c_k cc_k_w + sum_b m_b bc_b_w
                         + mean_b kd_b_s + sum_k cc_k_s + sum_b bc_b_s
        form="released": mean(m) * (mean_b kd_b_w + sum_b bc_b_w) + mean(c) * sum_k cc_k_w
                         + mean_b kd_b_s, but mean_b kd_b_w at two of the temperatures
    T: the temperatures, all above 0; base: one of them, the T of the plain distillation term (4, on
    ImageNet 1; the others are 2, 3, 5 and 6). The two temperatures are the lowest and the highest
    of the others.
    Differs from the paper: "released" is what the authors' code executes: its masks only scale,
    there are no relations on the strong view, and on that view the logits of the weak view are used
    at T = 2 and 6. "intended" is our reading of what the code was meant to do. cc grows with the
    batch, as in the authors' code.
    """

    def __init__(
        self,
        T: tuple[float, ...] = (2.0, 3.0, 4.0, 5.0, 6.0),
        base: float = 4.0,
        form: str = "released",
    ):
        super().__init__()
        if not T or min(T) <= 0 or len(set(T)) < len(T) or base not in T:
            raise ValueError(
                f"MLKD: expected different temperatures above 0, one of them {base}, got {T}"
            )
        if form not in ("released", "intended"):
            raise ValueError(f"expected form 'released' or 'intended', got {form!r}")
        rest = sorted(t for t in T if t != base)
        self.T, self.form, self.ends = tuple(T), form, {*rest[:1], *rest[-1:]}

    def forward(self, out_s_w: Tensor, out_s_s: Tensor, out_t_w: Tensor, out_t_s: Tensor) -> Tensor:
        """Logits (B, K): the student's on the weak and the strong view, the teacher's on the same.
        Returns a scalar. Raises ValueError if the shapes differ.
        """
        outs = out_s_w, out_s_s, out_t_w.detach(), out_t_s.detach()
        if len({x.shape for x in outs}) > 1:
            raise ValueError(
                f"MLKD: expected four logits of equal shape, got {[(*x.shape,) for x in outs]}"
            )
        with torch.autocast(out_s_w.device.type, enabled=False):
            outs = [_float32(x) for x in outs]
            p = outs[2].softmax(1)
            # between two middle values torch takes the lower: as many are at most that one
            m, c = ((x <= x.median()).to(p.dtype) for x in (p.amax(1), p.sum(0)))
            # log P at all n temperatures, (n, B, K) each
            z = torch.stack(outs)
            logs = torch.stack([z / T for T in self.T], dim=1).log_softmax(3)
            s_w, s_s, t_w, t_s = logs
            kd_w, kd_s = _kl(s_w, t_w), _kl(s_s, t_s)
            cc_w, bc_w = _relations(s_w, t_w)
            if self.form == "released":
                kd_w, kd_s = kd_w.mean(1), kd_s.mean(1)
                second = [w if T in self.ends else s for T, w, s in zip(self.T, kd_w, kd_s)]
                kd = m.mean() * kd_w + torch.stack(second)
                relations = m.mean() * bc_w.sum() + c.mean() * cc_w.sum()
            else:
                kd = (m * kd_w + kd_s).mean(1)
                cc_s, bc_s = _relations(s_s, t_s)
                relations = (m * bc_w + bc_s).sum() + (c * cc_w + cc_s).sum()
            return sum(T**2 * kd_T for T, kd_T in zip(self.T, kd)) + relations


def _kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    """KL(t || s) of each sample (n, B), from log-probabilities (n, B, K)."""
    return (log_t.exp() * (log_t - log_s)).sum(2)


def _relations(log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    """cc of each class (n, K) and bc of each sample (n, B), from log-probabilities (n, B, K)."""
    p_s, p_t = log_s.exp(), log_t.exp()
    bc = p_t @ p_t.mT - p_s @ p_s.mT
    # one temperature at a time: with many classes (K, K) is large
    cc = [(t.T @ t - s.T @ s).square().mean(0) for s, t in zip(p_s, p_t)]
    return torch.stack(cc), bc.square().mean(1)


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
