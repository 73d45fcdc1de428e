import itertools
import math

import pytest
import torch

from kd_losses.pefd import PEFD
from reference import agree, agree_grads, cases

SCALES = [0.0, 1e-20, 1e-12, 1.0, 1e4]


def joined(arrays):
    """The three projectors' weights and biases as one layer's."""
    return {
        name: torch.cat([arrays[f"regress_s{k}.linear.{name}"] for k in (1, 2, 3)])
        for name in ("weight", "bias")
    }


@pytest.mark.parametrize("case", cases("pefd"))
def test_reference(case):
    feat_s, feat_t = case.leaf("in/feat_s"), case["in/feat_t"]
    pefd = PEFD(feat_s.shape[1], feat_t.shape[1], case.hyper["num_projectors"]).double()
    pefd.projectors.load_state_dict(joined(case.group("param/")))
    loss = pefd(feat_s, feat_t)
    agree(loss, case["loss"])
    agree(1 - loss, case["extra/cos"].mean())
    leaves = {"feat_s": feat_s, **dict(pefd.projectors.named_parameters())}
    expected = {"feat_s": case["grad/feat_s"], **joined(case.group("grad_param/"))}
    agree_grads(loss, leaves, expected)


def naive(pefd, feat_s, feat_t):
    """Sample by sample, projector by projector."""
    weight = pefd.projectors.weight.unflatten(0, (pefd.n, -1)).tolist()
    bias = pefd.projectors.bias.unflatten(0, (pefd.n, -1)).tolist()
    total = 0.0
    for x, t in zip(feat_s.tolist(), feat_t.tolist()):
        f = [0.0] * len(t)
        for k in range(pefd.n):
            for j in range(len(t)):
                z = sum(p * q for p, q in zip(weight[k][j], x)) + bias[k][j]
                f[j] += max(z, 0.0) / pefd.n
        dot = sum(p * q for p, q in zip(f, t))
        total += 1 - dot / math.sqrt(sum(p * p for p in f) * sum(q * q for q in t))
    return total / len(feat_s)


@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize("b, s, t", [(1, 3, 6), (4, 5, 5), (3, 6, 4)])
def test_naive(b, s, t, n):
    pefd = PEFD(s, t, n).double()
    with torch.no_grad():
        pefd.projectors.bias.fill_(0.5)  # no dead sample
    feat_s, feat_t = torch.randn(b, s).double(), torch.randn(b, t).double()
    expected = naive(pefd, feat_s, feat_t)
    assert pefd(feat_s, feat_t).item() == pytest.approx(expected, rel=1e-11)


def test_gradcheck():
    pefd = PEFD(3, 4, 2).double()
    feat_s, feat_t = torch.randn(3, 3).double(), torch.randn(3, 4).double()
    params = dict(pefd.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(pefd, dict(zip(params, values)), (x, feat_t))

    assert torch.autograd.gradcheck(call, (feat_s.requires_grad_(), *params.values()))


def test_teacher_is_constant():
    feat_s, feat_t = torch.randn(4, 3).requires_grad_(), torch.randn(4, 5).requires_grad_()
    PEFD(3, 5)(feat_s, feat_t).backward()
    assert feat_s.grad is not None and feat_t.grad is None


def test_start():
    """Every projector's weights are as wide as those of torch's layer of its own."""
    weights = PEFD(100, 50).projectors.weight.chunk(3)
    for weight in weights:
        assert weight.abs().max() <= 0.1
        torch.testing.assert_close(weight.std(), torch.tensor(0.1 / 3**0.5), rtol=0.03, atol=0)
    assert not torch.equal(*weights[:2])


@pytest.mark.parametrize("scale_s, scale_t", list(itertools.product(SCALES, repeat=2)))
@pytest.mark.parametrize("bias", [-1e9, 0.0, 1.0])
def test_degenerate(bias, scale_s, scale_t):
    pefd = PEFD(3, 4)
    torch.nn.init.constant_(pefd.projectors.bias, bias)
    feat_s, feat_t = (scale_s * torch.rand(3, 3)).requires_grad_(), scale_t * torch.rand(3, 4)
    loss = pefd(feat_s, feat_t)
    grads = torch.autograd.grad(loss, (feat_s, *pefd.parameters()))
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads)
    assert all(grad.abs().max() < 1e6 for grad in grads)
    if bias < 0 or scale_t == 0 or scale_s == bias == 0:
        assert loss.item() == 1


def test_one_zero_row():
    """Its cosine is 0; the others' are those of equal directions."""
    pefd = PEFD(2, 2)
    torch.nn.init.constant_(pefd.projectors.weight, 0.0)
    torch.nn.init.constant_(pefd.projectors.bias, 2.0)
    feat_t = torch.tensor([[0.0, 0.0], [3.0, 3.0], [3.0, 0.0], [-1.0, -1.0]])
    loss = pefd(torch.randn(4, 2), feat_t)
    assert loss.item() == pytest.approx((1 + 0 + 1 - math.sqrt(0.5) + 2) / 4)


def test_bad_input():
    feat_s, feat_t = torch.zeros(3, 2), torch.zeros(3, 4)
    with pytest.raises(ValueError, match="projector"):
        PEFD(2, 4, 0)
    for s, t in ((feat_s[:1], feat_t), (feat_s, feat_t[:, :1]), (feat_s[:, :1], feat_t)):
        with pytest.raises(ValueError, match="vectors"):
            PEFD(2, 4)(s, t)
