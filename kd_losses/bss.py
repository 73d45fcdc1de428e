"""BSS: Knowledge Distillation with Adversarial Samples Supporting Decision Boundary
(Heo, Lee, Yun, Choi, AAAI 2019), https://arxiv.org/abs/1805.05532
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BSS(nn.Module):
    """Divergence from the teacher's prediction to the student's near the decision boundary.

        loss = 1 / B * sum_b KL(softmax(out_t / T) || softmax(out_s / T))     of attacked images

    `select` picks the images of a batch to attack, `BSSAttacker` moves them to the boundary.
    T: temperature, above 0 (KD-Zoo uses 3, without a factor T^2).
    Differs from the paper: without the divergence on clean images, as in KD-Zoo. KD-Zoo uses this
    loss from epoch 11 on, and its weight falls linearly to 0 at 80 % of the training.
    """

    def __init__(self, T: float = 3.0):
        super().__init__()
        if T <= 0:
            raise ValueError(f"expected T > 0, got {T}")
        self.T = T

    def forward(
        self, attacked_out_s: Tensor, attacked_out_t: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """attacked_out_s, attacked_out_t: logits (B, K) of the attacked images; weight: (B,), bool
        or at least 0, for a weighted mean, which is 0 where all weights are. Returns a scalar.

        Raises ValueError if the shapes differ.
        """
        if attacked_out_s.shape != attacked_out_t.shape:
            raise ValueError(
                f"BSS: expected equal shapes, got {(*attacked_out_s.shape,)} and "
                f"{(*attacked_out_t.shape,)}"
            )
        if weight is not None and weight.shape != attacked_out_s.shape[:1]:
            raise ValueError(f"BSS: expected one weight per sample, got {(*weight.shape,)}")
        with torch.autocast(attacked_out_s.device.type, enabled=False):
            log_p_s, log_p_t = (
                F.log_softmax(_float32(x) / self.T, dim=1)
                for x in (attacked_out_s, attacked_out_t.detach())
            )
            loss = F.kl_div(log_p_s, log_p_t, reduction="none", log_target=True).sum(1)
            if weight is None:
                return loss.mean()
            weight = weight.detach().to(loss.dtype)
            total = weight.sum()
            return (weight * loss).sum() / torch.where(total > 0, total, 1)


class BSSAttacker:
    """Moves images over the boundary between two classes of a network, by gradient steps.

        p = softmax(model(x)),   d = p[attack_class] - p[target],   g = gradient of d in x
        x <- clip(x + step_alpha * (eps - d) * g / ||g||_2, -bound, bound)

    An image does not move any more when the network no longer predicts its target. step_alpha: 0.3;
    num_steps: maximum number of steps (10); eps: distance beyond the boundary (1e-4); bound:
    largest absolute value of the normalised image (2.5). All as in KD-Zoo.
    """

    def __init__(
        self,
        step_alpha: float = 0.3,
        num_steps: int = 10,
        eps: float = 1e-4,
        bound: float = 2.5,
    ):
        if step_alpha <= 0 or num_steps < 1 or eps < 0 or bound <= 0:
            raise ValueError("expected step_alpha, num_steps and bound > 0, and eps >= 0")
        self.step_alpha, self.num_steps, self.eps, self.bound = step_alpha, num_steps, eps, bound

    def attack(
        self,
        model: Callable[[Tensor], Tensor],
        img: Tensor,
        target: Tensor,
        attack_class: Tensor,
        valid: Tensor | None = None,
    ) -> Tensor:
        """model: gives logits (B, K), and should be in eval mode; img: (B, ...); target,
        attack_class: int64 (B,); valid: bool (B,), the others stand still. Returns the attacked
        images, detached.

        Works in float32 (float64 at float64 images) without autocast, also under no_grad, and waits
        for the device once a step. Raises ValueError if the batches differ.
        """
        if not len(img) == len(target) == len(attack_class):
            raise ValueError("BSS: expected one target and one attack class per image")
        x = _float32(img.detach())
        moving = torch.ones_like(target, dtype=torch.bool) if valid is None else valid
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            for _ in range(self.num_steps):
                x.requires_grad_()
                out = model(x)
                moving = moving & (out.argmax(1) == target)
                if not moving.any():
                    break
                p = out.softmax(1)
                d = p.gather(1, attack_class[:, None]) - p.gather(1, target[:, None])
                (grad,) = torch.autograd.grad(d.sum(), x)
                step = self.step_alpha * (self.eps - d.detach()) * _direction(grad.flatten(1))
                x = x.detach()
                moved = (x + step.reshape(x.shape)).clamp(-self.bound, self.bound)
                x = torch.where(moving.reshape(-1, *[1] * (x.dim() - 1)), moved, x)
        return x.detach()


@torch.no_grad()
def select(
    out_s: Tensor,
    out_t: Tensor,
    target: Tensor,
    attack_size: int = 32,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The samples of a batch to attack, and the classes to move them to.

    Only samples that both networks get right qualify, first those with the largest
    sum over k != target of (p_t - p_s)^2. The attack class is drawn in proportion to the teacher's
    probability among the classes other than its top one.

    out_s, out_t: logits (B, K); target: int64 (B,); attack_size: at most so many samples (KD-Zoo
    has 32); generator: of the device, for the draw. Returns index, attack_class, valid, all (n,)
    with n = min(attack_size, B): places in the batch, classes, and whether the sample qualifies.

    Raises ValueError if the shapes do not fit or there are fewer than two classes.
    """
    if out_s.shape != out_t.shape or len(target) != len(out_t):
        raise ValueError(
            f"select: expected equal batch sizes, got {(*out_s.shape,)}, {(*out_t.shape,)}, "
            f"{(*target.shape,)}"
        )
    if out_t.shape[1] < 2 or attack_size < 1:
        raise ValueError("select: expected at least two classes and an attack_size of at least 1")
    with torch.autocast(out_t.device.type, enabled=False):
        out_s, out_t = _float32(out_s), _float32(out_t)
        top = out_t.argmax(1)
        right = (top == target) & (out_s.argmax(1) == target)
        gap = (out_t.softmax(1) - out_s.softmax(1)).square()
        gap = gap.scatter(1, target[:, None], 0).sum(1)
        index = torch.where(right, gap, -1).topk(min(attack_size, len(target))).indices
        # the largest of log-probability plus Gumbel noise is a draw in proportion to probability,
        # also where all but the top one's round to 0: the second best then wins by its logit
        log_p = out_t[index].log_softmax(1).clamp_min(torch.finfo(out_t.dtype).min)
        gumbel = -torch.empty_like(log_p).exponential_(generator=generator).log()
        attack_class = (log_p + gumbel).scatter(1, top[index][:, None], -torch.inf).argmax(1)
    return index, attack_class, right[index]


def _direction(grad: Tensor) -> Tensor:
    """Rows (B, D) of norm 1; a zero row stays as it is."""
    # the square of a confident network's gradient underflows
    peak = grad.abs().amax(1, keepdim=True)
    grad = grad / torch.where(peak > 0, peak, 1)
    return _unit(grad)


def _unit(x: Tensor) -> Tensor:
    """x with rows, along the last dimension, of L2 norm 1; one of norm up to 1e-12 stays."""
    norm = x.norm(dim=-1, keepdim=True)  # whose gradient at 0 torch takes as 0
    return x / torch.where(norm > 1e-12, norm, 1)


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
