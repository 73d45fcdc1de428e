"""SDD: Scale Decoupled Distillation (Wei, Luo, Luo, CVPR 2024), https://arxiv.org/abs/2403.13512"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SDD(nn.Module):
    """A logit loss on every region of the last map, with more weight on contradicting regions.

        z_n  = W v_n + b                v_n: the map's mean over region n, of all the N regions
        w_n  = w_comp where the teacher is right on one of region n and the whole map alone, or 1
        loss = 1 / (N * B) * sum over n, B of w_n * inner(z_n of student, z_n of teacher, target)

    inner: (out_s, out_t, target) -> one loss per row, as `kl` (the default) and `dkd` in this file;
    scales: the map is cut into 1x1, 2x2, ... regions (authors: (1, 2, 4) or (1, 2)), the first of
    them the whole; w_comp: weight of the complementary regions (2). It replaces the loss on the
    networks' logits, which are those of the whole map if a linear classifier follows average
    pooling. The authors' code increases the weight of the `dkd` variant over 20 epochs (not in this
    file).
    Differs from the authors' code: each region is pooled from the map itself, not from a 4x4 grid.
    If 4 does not divide the side, the mean over such a grid is not the network's feature. A NaN
    stays a NaN.
    """

    def __init__(
        self,
        inner: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        scales: tuple[int, ...] = (1, 2, 4),
        w_comp: float = 2.0,
    ):
        super().__init__()
        if not scales or scales[0] != 1 or min(scales) < 1:
            raise ValueError(f"expected scales >= 1 (1: the whole map), got {scales}")
        self.inner = kl if inner is None else inner
        self.scales, self.w_comp = tuple(scales), w_comp

    def forward(
        self,
        fm_s: Tensor,
        classifier_s: nn.Module,
        fm_t: Tensor,
        classifier_t: nn.Module,
        target: Tensor,
    ) -> Tensor:
        """fm_s (B, C_s, H, W), fm_t (B, C_t, H', W'): the last maps; classifier_s, classifier_t: of
        the networks, with a weight (K, C) and a bias (K,) or None, the student's gets gradients;
        target: int64 (B,). Returns a scalar.

        Raises ValueError if the shapes do not fit or inner does not return one loss a row.
        """
        if len(fm_s) != len(fm_t) or target.shape != fm_s.shape[:1]:
            raise ValueError(
                f"SDD: expected maps and targets of one batch, got {(*fm_s.shape,)}, "
                f"{(*fm_t.shape,)} "
                f"and {(*target.shape,)}"
            )
        with torch.autocast(fm_s.device.type, enabled=False):
            out_s = self.local(fm_s, classifier_s)
            out_t = self.local(fm_t.detach(), classifier_t).detach()
            if out_s.shape != out_t.shape:
                raise ValueError(
                    f"SDD: expected equal numbers of classes, got {out_s.shape[2]} and "
                    f"{out_t.shape[2]}"
                )
            right = out_t.argmax(2) == target[:, None]
            rows = target[:, None].expand(right.shape).flatten()
            losses = self.inner(out_s.flatten(0, 1), out_t.flatten(0, 1), rows)
            if losses.shape != rows.shape:
                raise ValueError(
                    f"SDD: expected inner to return one loss for each of {len(rows)} rows, got "
                    f"{(*losses.shape,)}"
                )
            agrees = (right == right[:, :1]).flatten()
            return torch.where(agrees, losses, self.w_comp * losses).mean()

    def local(self, fm: Tensor, classifier: nn.Module) -> Tensor:
        """The logits (B, N, K) of all the regions, by scales, each row by row."""
        weight, bias = classifier.weight, classifier.bias
        if weight.ndim != 2 or fm.ndim != 4 or fm.shape[1] != weight.shape[1]:
            raise ValueError(
                "SDD: expected a map (B, C, H, W) and a linear classifier (K, C) on its channels, "
                f"got {(*fm.shape,)} and {(*weight.shape,)}"
            )
        fm = _float32(fm)
        weight, bias = weight.to(fm.dtype), None if bias is None else bias.to(fm.dtype)
        v = torch.cat([F.adaptive_avg_pool2d(fm, n).flatten(2) for n in self.scales], dim=2)
        # not the module's own forward, whose hooks would take this for the network's logits
        return F.linear(v.transpose(1, 2), weight, bias)


def kl(out_s: Tensor, out_t: Tensor, target: Tensor | None = None, T: float = 4.0) -> Tensor:
    """T^2 KL(softmax(out_t / T) || softmax(out_s / T)) of each row (B,); the target is not read."""
    log_p_s, log_p_t = (F.log_softmax(out / T, dim=1) for out in (out_s, out_t))
    return T**2 * (log_p_t.exp() * (log_p_t - log_p_s)).sum(1)


def dkd(
    out_s: Tensor,
    out_t: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    T: float = 4.0,
) -> Tensor:
    """T^2 (alpha * TCKD + beta * NCKD) of each row (B,): the divergence of the target against the
    rest, and that of the rest among themselves."""
    index = target[:, None]
    own = torch.zeros_like(out_s, dtype=torch.bool).scatter(1, index, True)
    z_s, z_t = out_s / T, out_t / T
    rest_s, rest_t = (z.masked_fill(own, -torch.inf) for z in (z_s, z_t))
    total_s, total_t = (rest.logsumexp(1, keepdim=True) for rest in (rest_s, rest_t))
    # log p_y = logsigmoid(margin), log(1 - p_y) = logsigmoid(-margin): neither underflows
    margin_s = (z_s.gather(1, index) - total_s)[:, 0]
    margin_t = (z_t.gather(1, index) - total_t)[:, 0]
    tckd = sum(
        (sign * margin_t).sigmoid()
        * (F.logsigmoid(sign * margin_t) - F.logsigmoid(sign * margin_s))
        for sign in (1, -1)
    )
    nckd = (rest_t.softmax(1) * (z_t - total_t - z_s + total_s)).sum(1)
    return T**2 * (alpha * tckd + beta * nckd)


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
