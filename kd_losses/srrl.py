"""SRRL: Knowledge Distillation via Softmax Regression Representation Learning (Yang, Martinez,
Bulat, Tzimiropoulos, ICLR 2021, section 3), https://openreview.net/forum?id=ZzwDy_wiWv
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


class SRRL(nn.Module):
    """The student's features are matched to the teacher's, and to the logits of its classifier.

        v = mean over H, W of relu(BN(W fm_s))              form "map": W is a 1x1 convolution
        v = relu(BN(W feat_s))                              form "pooled"
        loss = mean over B, D of (v - feat_t)^2
               + weight * mean over B, K of (classifier(v) - out_t)^2

    s_dim, t_dim: channels of the student's and the teacher's last map; weight: of the second term
    (authors: 1; cls_KD: 5); form: "map" as in the authors' code, or "pooled" as in SimKD's code, a
    different loss: batch norm and ReLU come after the pooling. W and BN are trained with the
    student.
    Differs from the paper: as in the authors' code, logits are compared by their squared distance,
    and the features have weight 1.
    """

    def __init__(self, s_dim: int, t_dim: int, weight: float = 1.0, form: str = "map"):
        super().__init__()
        if form not in ("map", "pooled"):
            raise ValueError(f'SRRL: expected form "map" or "pooled", got {form!r}')
        if weight < 0:
            raise ValueError(f"expected weight >= 0, got {weight}")
        self.weight, self.form = weight, form
        self.projector = nn.Sequential(
            nn.Conv2d(s_dim, t_dim, 1, bias=False), nn.BatchNorm2d(t_dim), nn.ReLU()
        )
        if form == "map":  # SimKD keeps torch's own
            nn.init.kaiming_normal_(self.projector[0].weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_s: Tensor, feat_t: Tensor, out_t: Tensor, classifier: nn.Module) -> Tensor:
        """x_s: fm_s (B, s_dim, H, W) or feat_s (B, s_dim), by the form; feat_t (B, t_dim): the mean
        of the teacher's map; out_t: its logits (B, K); classifier: its last layer, from (B, t_dim)
        to (B, K): it stays as it is, and the gradient passes through it. Returns a scalar.

        Raises ValueError if the shapes do not fit, and in training mode where a channel holds a
        single value.
        """
        s_dim, t_dim = self.projector[0].in_channels, self.projector[0].out_channels
        dims = 4 if self.form == "map" else 2
        if (x_s.dim(), *x_s.shape[1:2]) != (dims, s_dim) or feat_t.shape != (len(x_s), t_dim):
            raise ValueError(
                f"SRRL: expected {'a map' if dims == 4 else 'vectors'} of {s_dim} channels and the "
                f"teacher's vectors of {t_dim}, got {(*x_s.shape,)} and {(*feat_t.shape,)}"
            )
        if self.training and x_s.numel() == s_dim:
            raise ValueError("SRRL: expected at least two samples or pixels for its batch norm")
        x_s = _float32(x_s)
        projected = self.projector(x_s if dims == 4 else x_s[:, :, None, None])
        with torch.autocast(x_s.device.type, enabled=False):
            projected, feat_t, out_t = (
                _float32(x) for x in (projected, feat_t.detach(), out_t.detach())
            )
            v = projected.mean((2, 3))
            # its weights as constants of this precision, whoever's and whatever they are
            weights = {k: x.detach().to(v.dtype) for k, x in classifier.named_parameters()}
            out = functional_call(classifier, weights, (v,))
            if out.shape != out_t.shape:
                raise ValueError(
                    f"SRRL: expected logits {(*out.shape,)} of the classifier, got "
                    f"{(*out_t.shape,)}"
                )
            return F.mse_loss(v, feat_t) + self.weight * F.mse_loss(out, out_t)


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
