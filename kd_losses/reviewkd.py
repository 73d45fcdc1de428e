"""ReviewKD: Distilling Knowledge via Knowledge Review (Chen, Liu, Zhao, Jia, CVPR 2021, section 3),
https://arxiv.org/abs/2104.09044
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class ReviewKD(nn.Module):
    """Distance of the teacher's maps to the student's, fused level by level from the deepest up.

        f_i  = ABF_i(fm_s_i, f_{i+1})                       attention-based fusion, see `ABF`
        loss = hcl([conv_i(f_i)], fms_t)                    hierarchical context loss, see `hcl`

    in_channels, out_channels: lists, of the student's and the teacher's maps from shallow to deep,
    the pooled feature last; mid_channel: of every fused map, None for min(512, in_channels[-1]), as
    in the authors' code. The fusion learns with the student; `abfs` starts at the deepest level.
    Differs from the paper: no difference is known. On CIFAR the authors' code multiplies the loss
    by min(epoch / 20, 1), which is the caller's.
    """

    def __init__(
        self, in_channels: list[int], out_channels: list[int], mid_channel: int | None = None
    ):
        super().__init__()
        if len(in_channels) != len(out_channels) or not in_channels:
            raise ValueError(
                f"ReviewKD wants as many widths of the student as of the teacher, not "
                f"{len(in_channels)} and {len(out_channels)}"
            )
        self.in_channels, self.out_channels = list(in_channels), list(out_channels)
        if mid_channel is None:
            mid_channel = min(512, in_channels[-1])
        if mid_channel < 1:
            raise ValueError(f"mid_channel must be at least 1, not {mid_channel}")
        deepest = len(in_channels) - 1
        self.abfs = nn.ModuleList(
            ABF(in_channels[i], mid_channel, out_channels[i], fuse=i < deepest)
            for i in range(deepest, -1, -1)
        )

    def forward(self, fms_s: list[Tensor], fms_t: list[Tensor]) -> Tensor:
        """fms_s, fms_t: maps (B, C, H, W) from shallow to deep, then the pooled feature, (B, C) or
        (B, C, 1, 1); the teacher's maps are those before the activation. The networks' sizes may
        differ. Returns a scalar.

        Raises ValueError where number, batch or channels are not the expected ones, and in training
        mode for a batch of one with a 1x1 map, as the pooled feature is.
        """
        fms_s, fms_t = [_as_map(x) for x in fms_s], [_as_map(x) for x in fms_t]
        self._check(fms_s, fms_t)
        losses, fused = [], None
        for abf, fm_s, fm_t in zip(self.abfs, fms_s[::-1], fms_t[::-1]):
            # autocast takes maps as they are
            if not torch.is_autocast_enabled(fm_s.device.type):
                fm_s = fm_s.to(torch.promote_types(fm_s.dtype, torch.float32))
            fused = abf.fuse(fm_s, fused, fm_t.shape[2:])
            conv, norm = abf.conv2
            losses.append(
                AtOnce.apply(
                    lambda x: hcl([norm(x)], [fm_t]),  # noqa: B023, it is called right here
                    conv(fused),
                    *norm.parameters(),
                )
            )
        return torch.stack(losses).sum()

    def _check(self, fms_s: list[Tensor], fms_t: list[Tensor]) -> None:
        # before anything runs: a batch norm that has moved cannot be taken back
        for name, fms, channels in (
            ("student", fms_s, self.in_channels),
            ("teacher", fms_t, self.out_channels),
        ):
            if [x.shape[1] for x in fms] != channels:
                raise ValueError(
                    f"ReviewKD was built for {name} channels {channels}, not "
                    f"{[x.shape[1] for x in fms]}"
                )
        batches = {x.shape[0] for x in fms_s + fms_t}
        if len(batches) > 1:
            raise ValueError(f"ReviewKD wants one batch, not {sorted(batches)}")
        single = any(x.shape[0] * x.shape[2:].numel() == 1 for x in fms_s + fms_t)
        if self.training and single:
            raise ValueError(
                "ReviewKD needs at least two samples in training mode: with one, the batch norm of "
                "a 1x1 map has nothing to average over"
            )


class ABF(nn.Module):
    """Attention-based fusion of a student's map with what was fused at the deeper levels.

        x     = BN(W_1 fm_s)                                1x1 convolution to mid_channel
        a     = sigmoid(W_a [x; y] + b_a)                   two maps; y = fused_deeper at x's size
        fused = a_0 * x + a_1 * y                           or x alone at the deepest level
        out   = BN(W_2 fused)                               3x3 convolution, at the teacher's size

    fuse: False at the deepest level, which has no attention.
    """

    def __init__(self, in_channels: int, mid_channel: int, out_channels: int, fuse: bool):
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_channels, mid_channel, 1, bias=False), nn.BatchNorm2d(mid_channel)
        )
        self.conv2 = nn.Sequential(
            nn.Conv2d(mid_channel, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.att_conv = None
        if fuse:
            self.att_conv = nn.Sequential(nn.Conv2d(2 * mid_channel, 2, 1), nn.Sigmoid())
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_uniform_(conv[0].weight, a=1)

    def forward(
        self, fm_s: Tensor, fused_deeper: Tensor | None, size: torch.Size
    ) -> tuple[Tensor, Tensor]:
        """fm_s (B, in_channels, H_s, W_s), fused_deeper (B, mid_channel, *, *) or None at the
        deepest; size: (H_t, W_t). Returns out (B, out_channels, H_t, W_t) and fused
        (B, mid_channel, H_t, W_t).
        """
        fused = self.fuse(fm_s, fused_deeper, size)
        return self.conv2(fused), fused

    def fuse(self, fm_s: Tensor, fused_deeper: Tensor | None, size: torch.Size) -> Tensor:
        """`fused` alone, which is all that the next level wants."""
        conv, norm = self.conv1
        raw = conv(fm_s)
        if self.att_conv is None:
            return _resize(norm(raw), size)
        if norm.training:
            norm.num_batches_tracked += 1
        running = norm.running_mean, norm.running_var
        # not norm(raw): the statistics that make x of raw again are wanted
        x, mean, scale = torch.native_batch_norm(
            raw, norm.weight, norm.bias, *running, norm.training, norm.momentum, norm.eps
        )
        if norm.training:
            running = mean, scale.square().reciprocal() - norm.eps
        again = raw.detach(), *(z.detach() for z in (*running, norm.weight, norm.bias)), norm.eps
        conv = self.att_conv[0]
        return _resize(Fuse.apply(x, fused_deeper, conv.weight, conv.bias, *again), size)


class Fuse(torch.autograd.Function):
    """x, y -> a_0 * x + a_1 * resize(y) with a = sigmoid(W_a [x; resize(y)] + b_a).

    x (B, C, H, W), y (B, C, *, *), weight (2, 2 C, 1, 1), bias (2,). What x was before batch norm,
    `raw`, and its statistics give x again in the backward: the graph keeps raw anyway, and no
    second map of that size. It has no second derivative.
    """

    @staticmethod
    def forward(ctx, x, y, weight, bias, raw, mean, var, scale, shift, eps) -> Tensor:
        # W_a [x; y] without the copy of both maps, and y's part at y's own size: a 1x1
        # convolution and the nearest neighbours' values commute
        weight_x, weight_y = weight.chunk(2, dim=1)
        own = F.conv2d(x, weight_x, bias)
        a = (own + _resize(F.conv2d(y, weight_y), own.shape[2:])).sigmoid_()
        ctx.save_for_backward(y, weight, a, raw, mean, var, scale, shift)
        ctx.eps = eps
        # a product with every second number of `a` as it lies takes up to six times as long
        a_0, a_1 = (z.contiguous() for z in a.split(1, dim=1))
        return (x * a_0).addcmul_(_resize(y, x.shape[2:]), a_1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        y, weight, a, raw, *norm = ctx.saved_tensors
        weight_x, weight_y = weight.to(grad.dtype).chunk(2, dim=1)
        grad_x, grad_y, slope = torch.empty_like(raw), torch.empty_like(y), torch.empty_like(a)

        def part(raw, y, a, grad, grad_x, grad_y, slope) -> list[Tensor]:
            """Fill the last three; the gradients of weight_x and bias."""
            a_0, a_1 = (z.contiguous() for z in a.split(1, dim=1))
            dot_y = (grad * _resize(y, raw.shape[2:])).sum(1, keepdim=True)
            grad_y.copy_(_shrink(grad * a_1, y))
            x = F.batch_norm(raw, *norm, eps=ctx.eps)
            dots = torch.cat([(grad * x).sum(1, keepdim=True), dot_y], dim=1)
            torch.mul(dots, a * (1 - a), out=slope)
            along, *rest = _conv_backward(slope, x, weight_x)
            torch.addcmul(along, grad, a_0, out=grad_x)
            return rest

        # by quarters of the batch: no more whole maps beside these
        maps = raw, y, a, grad, grad_x, grad_y, slope
        grads = [part(*some) for some in zip(*(z.chunk(4) for z in maps))]
        along, grad_weight_y, _ = _conv_backward(_shrink(slope, y), y, weight_y)
        grad_weight_x, grad_bias = (sum(t) for t in zip(*grads))
        grad_weight = torch.cat([grad_weight_x, grad_weight_y], dim=1).to(weight.dtype)
        return grad_x, grad_y.add_(along), grad_weight, grad_bias.to(weight.dtype), *[None] * 6


class AtOnce(torch.autograd.Function):
    """call, x, *parameters -> call(x), a scalar, with its gradients taken in the forward: they
    are all that the graph keeps. It has no second derivative.
    """

    @staticmethod
    def forward(ctx, call, x: Tensor, *parameters: Tensor) -> Tensor:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(), *parameters]
            loss = call(leaves[0])
            wanted = [z for z in leaves if z.requires_grad]
            grads = iter(torch.autograd.grad(loss, wanted))
        ctx.save_for_backward(*(next(grads) if z.requires_grad else None for z in leaves))
        return loss.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        return None, *(z if z is None else grad.to(z.dtype) * z for z in ctx.saved_tensors)


def hcl(fms_s: list[Tensor], fms_t: list[Tensor]) -> Tensor:
    """Hierarchical context loss: mean squared differences at full size and after pooling.

        loss = sum over the levels of  sum_j 2^-j mean (pool_j(fm_s) - pool_j(fm_t))^2 / sum_j 2^-j

    pool_0 keeps the size; the next ones average to 4x4, 2x2 and 1x1, those below the height.

    fms_s, fms_t: maps (B, C, H, W) from shallow to deep, the pooled feature last, (B, C) or
    (B, C, 1, 1). Returns a scalar. Raises ValueError where number or shapes differ.
    """
    fms_s, fms_t = [_as_map(x) for x in fms_s], [_as_map(x.detach()) for x in fms_t]
    shapes_s, shapes_t = [(*x.shape,) for x in fms_s], [(*x.shape,) for x in fms_t]
    if shapes_s != shapes_t or not fms_s:
        raise ValueError(f"hcl wants maps of equal shapes, not {shapes_s} and {shapes_t}")
    with torch.autocast(fms_s[0].device.type, enabled=False):
        losses = []
        for fm_s, fm_t in zip(fms_s, fms_t):
            fm_s, fm_t = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (fm_s, fm_t))
            # pooling is linear: one difference serves all sizes, and where the windows are equal
            # each size the next
            diff, equal = fm_s - fm_t, fm_s.shape[2] % 4 == fm_s.shape[3] % 4 == 0
            loss, weight, total = F.mse_loss(fm_s, fm_t), 1.0, 1.0
            for size in (4, 2, 1):
                if size < fm_s.shape[2]:
                    weight /= 2
                    total += weight
                    pooled = F.adaptive_avg_pool2d(diff, size)
                    loss = loss + weight * pooled.square().mean()
                    diff = pooled if equal else diff
            losses.append(loss / total)
        return torch.stack(losses).sum()


def _as_map(x: Tensor) -> Tensor:
    return x[:, :, None, None] if x.dim() == 2 else x


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, size=size, mode="nearest")


def _shrink(grad: Tensor, like: Tensor) -> Tensor:
    """The backward of `_resize` from the size of `like`."""
    size, own = grad.shape[2:], like.shape[2:]
    if size == own:
        return grad
    return torch.ops.aten.upsample_nearest2d_backward(grad, size, (*grad.shape[:2], *own))


def _conv_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a 1x1 convolution in its input, weight and bias."""
    rest = [len(weight)], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True] * 3
    return torch.ops.aten.convolution_backward(grad, x, weight, *rest)
