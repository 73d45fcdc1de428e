"""DIST: Knowledge Distillation from A Stronger Teacher (Huang, You, Wang, Qian, Xu, NeurIPS 2022),
https://arxiv.org/abs/2205.10536
"""

import torch
from torch import Tensor, nn


class DIST(nn.Module):
    """Pearson's correlation of the predictions, within each sample and within each class.

        p = softmax(out / T)                                (B, K)
        rho(a, b) = <a', b'> / (||a'|| ||b'|| + 1e-8)       a' = a - mean(a)
        inter = 1 - mean over the rows of rho(p_s, p_t)     a sample's classes
        intra = 1 - mean over the columns of rho(p_s, p_t)  a class's samples
        loss = T^2 * (beta * inter + gamma * intra)

    beta, gamma: weights (authors' code: 1 and 1, with a weight of 2 on the loss); T: temperature,
    above 0 (4 on CIFAR-100, 1 on ImageNet). The 1e-8 matters: a class with small probabilities in
    all samples has a rho near 0, whatever the student predicts. With two classes a row's rho is +1
    or -1, and so is a column's with two samples: almost no gradient is left.
    Differs from the authors' code, which also has the 1e-8: the student's ||a'|| is at least ||a (1
    - a)|| / 10000. This bounds the gradient of a nearly constant row.
    """

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, T: float = 4.0):
        super().__init__()
        if not T > 0:
            raise ValueError(f"expected T > 0, got {T}")
        self.beta, self.gamma, self.T = beta, gamma, T

    def forward(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        """out_s, out_t: logits (B, K). Returns a scalar.

        Raises ValueError if the shapes do not fit, for fewer than two classes, and unless gamma
        is 0 for a single sample.
        """
        if out_s.shape != out_t.shape or out_s.dim() != 2:
            raise ValueError(
                "DIST: expected logits of equal shape (B, K), got "
                f"{(*out_s.shape,)} and {(*out_t.shape,)}"
            )
        if out_s.shape[1] < 2:
            raise ValueError("DIST: expected at least two classes")
        if out_s.shape[0] < 2 and self.gamma:
            raise ValueError("DIST: expected at least two samples: it correlates them")
        with torch.autocast(out_s.device.type, enabled=False):
            p_s, p_t = ((_float32(x) / self.T).softmax(1) for x in (out_s, out_t.detach()))
            inter, intra = (1 - _pearson(p_s, p_t, dim).mean() for dim in (1, 0))
            return self.T**2 * (self.beta * inter + self.gamma * intra)


def _pearson(a: Tensor, b: Tensor, dim: int) -> Tensor:
    # a (1 - a) is what the softmax passes on: saturated probabilities may well lie close together
    least = 1e-4 * (a * (1 - a)).detach().norm(dim=dim)
    a, b = (x - x.mean(dim, keepdim=True) for x in (a, b))
    norm = torch.maximum(a.norm(dim=dim), least) * b.norm(dim=dim)
    return (a * b).sum(dim) / (norm + 1e-8)


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
