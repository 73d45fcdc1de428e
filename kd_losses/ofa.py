"""OFA: One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation
(Hao, Guo, Han, Tang, Hu, Wang, Xu, NeurIPS 2023, section 3), https://arxiv.org/abs/2310.19444
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class OFA(nn.Module):
    """The teacher's logits are the target of the student's logits and of a head on each stage.

        loss = sum_i ofa_loss(head_i(stages_s_i), eps_i) + ofa_loss(out_s, eps_last)  see `ofa_loss`

    head_i: separable convolutions, each halving the map, until it is as small as the deepest one
    (none there: a linear layer in their place), then the mean over the map and a linear layer. The
    channels double from block to block; the last one's are those of the student's deepest map or
    t_dim, whichever is more. The heads are trained with the student. shapes_s: (C, H, W) of the
    student's maps, from shallow to deep; t_dim: the width of the teacher's pooled feature;
    num_class: K; eps: of every term, or one for each stage and one for out_s (paper's code: 1 on
    CIFAR-100, 1.5 on ImageNet with ResNet-18); T: temperature (1).
    Differs from the paper: heads only for convolutional students. The mean over the deepest map is
    computed before its 1x1 convolution, which gives the same result.
    """

    def __init__(
        self,
        shapes_s: Sequence[tuple[int, int, int]],
        t_dim: int,
        num_class: int,
        eps: float | Sequence[float] = 1.0,
        T: float = 1.0,
    ):
        super().__init__()
        self.channels, self.num_class, self.T = [c for c, _, _ in shapes_s], num_class, T
        one = not isinstance(eps, Sequence)
        self.eps = (eps,) * (len(shapes_s) + 1) if one else tuple(eps)
        if not shapes_s or len(self.eps) != len(shapes_s) + 1:
            raise ValueError(
                f"OFA: expected at least one stage and an eps for each and one more, got "
                f"{len(shapes_s)} and {len(self.eps)}"
            )
        if T <= 0 or min(self.eps) <= 0:
            raise ValueError(f"expected T > 0 and eps > 0, got {T} and {eps}")
        width, deepest = max(self.channels[-1], t_dim), max(shapes_s[-1][1:])
        self.blocks = [max(0, math.ceil(math.log2(max(size) / deepest))) for _, *size in shapes_s]
        self.heads = nn.ModuleList(
            _head(c, n, width, num_class) for c, n in zip(self.channels, self.blocks)
        )

    def forward(
        self, stages_s: Sequence[Tensor], out_s: Tensor, out_t: Tensor, target: Tensor
    ) -> Tensor:
        """stages_s: the student's maps (B, C, H, W), from shallow to deep; out_s, out_t: logits
        (B, K); target: int64 (B,). Returns a scalar.

        Raises ValueError if the shapes are not the expected ones, and in training mode for a
        batch of one whose map a block makes 1x1.
        """
        # before anything runs: a batch norm that has moved cannot be taken back
        shapes = [(*fm.shape,) for fm in stages_s]
        if [s[:-2] for s in shapes] != [(*target.shape, c) for c in self.channels]:
            raise ValueError(
                f"OFA: expected maps of {self.channels} channels and one batch, got {shapes} and "
                f"targets {(*target.shape,)}"
            )
        for x in (out_s, out_t):
            if x.shape != (*target.shape, self.num_class):
                raise ValueError(
                    f"OFA: expected logits {(*target.shape, self.num_class)}, got {(*x.shape,)}"
                )
        single = any(n and max(s[2:]) <= 2**n for s, n in zip(shapes, self.blocks))
        if self.training and len(target) == 1 and single:
            raise ValueError(
                "OFA: expected at least two samples in training mode: with one, the batch norm of "
                "a 1x1 map has nothing to average over"
            )
        # bfloat16 makes the backward of a strided depthwise convolution 15 times slower on CPUs
        with torch.autocast("cpu", enabled=False):
            outs = [head(_float32(fm)) for head, fm in zip(self.heads, stages_s)]
        terms = zip([*outs, out_s], self.eps)
        p_t, y = _expected(out_t, target, self.T)
        return torch.stack([_cross_entropy(z, p_t, y, eps, self.T) for z, eps in terms]).sum()


def ofa_loss(
    out_s: Tensor, out_t: Tensor, target: Tensor, eps: float = 1.0, T: float = 1.0
) -> Tensor:
    """Cross-entropy with the teacher's probabilities, the target's raised above the others'.

        loss = -1 / B * sum_b sum_k ((p_t,k + y_k)^eps - y_k) * log p_s,k

    p = softmax(out / T); y: 1 at the target, else 0. eps: 1 for plain cross-entropy, in
    which the target plays no part; above 1 it raises the target's weight and lowers the others'.
    out_s, out_t: logits (B, K); target: int64 (B,). Returns a scalar. Raises ValueError if the
    shapes do not fit.
    """
    if out_s.shape != out_t.shape or target.shape != out_s.shape[:1]:
        raise ValueError(
            "ofa_loss: expected logits of equal shape (B, K) and targets (B,), got "
            f"{(*out_s.shape,)}, {(*out_t.shape,)} and {(*target.shape,)}"
        )
    return _cross_entropy(out_s, *_expected(out_t, target, T), eps, T)


def _expected(out_t: Tensor, target: Tensor, T: float) -> tuple[Tensor, Tensor]:
    """The teacher's probabilities and y, both (B, K)."""
    with torch.autocast(out_t.device.type, enabled=False):
        p_t = (_float32(out_t.detach()) / T).softmax(1)
        return p_t, torch.zeros_like(p_t).scatter(1, target[:, None], 1.0)


def _cross_entropy(out_s: Tensor, p_t: Tensor, y: Tensor, eps: float, T: float) -> Tensor:
    with torch.autocast(out_s.device.type, enabled=False):
        log_p_s = (_float32(out_s) / T).log_softmax(1)
        return -(((p_t + y) ** eps - y) * log_p_s).sum(1).mean()


def _head(channels: int, blocks: int, width: int, num_class: int) -> nn.Sequential:
    """From a map (B, channels, H, W) to logits (B, num_class)."""
    pool, linear = [nn.AdaptiveAvgPool2d(1)], [nn.Flatten(), nn.Linear(width, num_class)]
    if not blocks:
        return nn.Sequential(*pool, nn.Conv2d(channels, width, 1), *linear)
    widths = [*(channels * 2**i for i in range(blocks)), width]
    return nn.Sequential(*map(_sep_conv, widths, widths[1:]), *pool, *linear)


def _sep_conv(c_in: int, c_out: int) -> nn.Sequential:
    """Two separable 3x3 convolutions, the first halving the map."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_in, 3, stride=2, padding=1, groups=c_in, bias=False),
        nn.Conv2d(c_in, c_in, 1, bias=False),
        nn.BatchNorm2d(c_in),
        nn.ReLU(),
        nn.Conv2d(c_in, c_in, 3, padding=1, groups=c_in, bias=False),
        nn.Conv2d(c_in, c_out, 1, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU(),
    )


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
