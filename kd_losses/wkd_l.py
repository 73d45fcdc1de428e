"""WKD-L: Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation
(Lv, Yang, Li, NeurIPS 2024, section 2, discrete Wasserstein distance of the logits),
https://arxiv.org/abs/2412.08139
"""

import torch
from torch import Tensor, nn


class WKDL(nn.Module):
    """Transport cost between the student's and the teacher's class probabilities.

        a, b   = softmax of the student's and the teacher's K - 1 other logits / T
        C      = max(cost, 0) + 1e-8,   G = exp(-C / eps)       without the target's row and column
        u      = 1 / (K - 1), then `iters` times:   v = b / (G^T u + 1e-8),  u = a / (G v + 1e-8)
        flow   = sum_ij u_i G_ij v_j C_ij                       entropic transport, by Sinkhorn
        target = -softmax(out_t)_y * log softmax(out_s)_y
        loss   = mean_b target + weight * decay * mean_b flow

    cost: (K, K), the cost of moving from class to class, for example from `cka_cost`; T:
    temperature, above 0 (paper's code on CIFAR-100: 8, on ImageNet 2); weight: 600 and 30; eps:
    smoothing of the flow (0.05); iters: Sinkhorn iterations (10). Because of the smoothing, the
    flow of two equal networks is not 0. With two classes it is a constant.
    Differs from the paper: no known difference from the authors' code. Their weight falls to 0
    along a cosine (on CIFAR-100 from epoch 150 of 240 on): pass that factor as `decay`.
    """

    def __init__(
        self,
        cost: Tensor,
        T: float = 8.0,
        weight: float = 600.0,
        eps: float = 0.05,
        iters: int = 10,
    ):
        super().__init__()
        if not (T > 0 and eps > 0 and iters >= 1):
            raise ValueError(f"expected T > 0, eps > 0 and iters >= 1, got {T}, {eps} and {iters}")
        if cost.dim() != 2 or cost.shape[0] != cost.shape[1] or not cost.is_floating_point():
            raise ValueError(
                f"WKDL: expected a cost matrix (K, K) of floats, got {(*cost.shape,)} of "
                f"{cost.dtype}"
            )
        if len(cost) < 2:
            raise ValueError("WKDL: expected at least two classes")
        self.T, self.weight, self.eps, self.iters = T, weight, eps, iters
        self.register_buffer("cost", cost.detach().clone())

    def forward(
        self, out_s: Tensor, out_t: Tensor, target: Tensor, decay: float | Tensor = 1.0
    ) -> Tensor:
        """out_s, out_t: logits (B, K); target: int64 (B,); decay: a number or a scalar tensor.
        Returns a scalar. Raises ValueError if the shapes do not fit.
        """
        shape = target.shape[:1] + self.cost.shape[:1]
        if target.dim() != 1 or out_s.shape != shape or out_t.shape != shape:
            raise ValueError(
                f"WKDL: expected logits of equal shape (B, {len(self.cost)}) and targets (B,), got "
                f"{(*out_s.shape,)}, {(*out_t.shape,)} and {(*target.shape,)}"
            )
        with torch.autocast(out_s.device.type, enabled=False):
            out_s, out_t = _float32(out_s), _float32(out_t.detach())
            y = target[:, None]
            own = torch.zeros_like(out_s, dtype=torch.bool).scatter(1, y, True)
            log_p, p = out_s.log_softmax(1).gather(1, y), out_t.softmax(1).gather(1, y)
            a, b = ((z / self.T).masked_fill(own, -torch.inf).softmax(1) for z in (out_s, out_t))
            flow = self.transport(a, b, own)
            return self.weight * decay * flow.mean() - (p * log_p).mean()

    def transport(self, a: Tensor, b: Tensor, own: Tensor) -> Tensor:
        """The cost (B,) of carrying a over to b, (B, K) both; own: the classes (B, K) left out,
        where a and b are 0."""
        cost = self.cost.to(a.dtype).relu() + 1e-8
        kernel = (-cost / self.eps).exp()
        # where a, b and the first u are 0, u and v stay 0: the target's row and column take no
        # part, and one kernel is used for all samples
        u = torch.full_like(a, 1 / (len(cost) - 1)).masked_fill(own, 0)
        for _ in range(self.iters):
            v = b / (u @ kernel + 1e-8)
            u = a / (v @ kernel.T + 1e-8)
        return (u @ (kernel * cost) * v).sum(1)


@torch.no_grad()
def cka_cost(class_features: Tensor, sharpen: float = 1.0) -> Tensor:
    """How different the classes are to a network: the cost matrix (K, K) for `WKDL`.

        D_ij = 1 - |X_i^T X_j|^2 / (|X_i^T X_i| |X_j^T X_j|)    X_i (N, D) centred, Frobenius norms
        cost = 1 - exp(-sharpen * D), or D where sharpen is 0

    class_features: (K, N, D), N features of each class; the n-th of one is paired with the n-th of
    the other, so the matrix depends on their order. A class whose features are all the same has
    distance 1 to the others, each class 0 to itself.
    The authors take every position of the teacher's last map over the training set; their matrices
    of CIFAR-100 have D from 0.48 to 0.88 off the diagonal.
    Raises ValueError for other shapes, fewer than two features a class and a negative sharpen.
    """
    if class_features.dim() != 3 or class_features.shape[1] < 2:
        raise ValueError(
            f"cka_cost: expected (K, N, D) with at least two features a class, got "
            f"{(*class_features.shape,)}"
        )
    if sharpen < 0:
        raise ValueError(f"expected sharpen >= 0, got {sharpen}")
    with torch.autocast(class_features.device.type, enabled=False):
        x = _float32(class_features)
        x = x - x.mean(1, keepdim=True)
        x /= _or_one(x.abs().amax((1, 2), keepdim=True))  # fourth powers are taken below
        distance = x.new_zeros(len(x), len(x))
        own = _or_one(torch.stack([(c.T @ c).norm() for c in x]))
        for i in range(len(x) - 1):  # the (K, K, D, D) products at once would not fit
            across = (x[i].T @ x[i + 1 :]).square().sum((1, 2))
            distance[i, i + 1 :] = (1 - across / (own[i] * own[i + 1 :])).clamp(min=0)
        distance = distance + distance.T
        return -torch.expm1(-sharpen * distance) if sharpen else distance


def _or_one(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 1)


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
