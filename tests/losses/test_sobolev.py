import pytest
import torch
from torch import nn

from kd_losses.sobolev import Sobolev
from reference import TwoConv, agree, cases


@pytest.mark.parametrize("case", cases("sobolev"))
def test_reference(case):
    net_s, net_t = TwoConv.of(case, "net_s"), TwoConv.of(case, "net_t")
    img, target = case.leaf("in/img"), case["in/target"]
    out_s, out_t = net_s(img), net_t(img)
    loss = Sobolev()(out_s, out_t, img, target)
    agree(loss, case["loss"])
    params = {f"net_s.{name}": p for name, p in net_s.named_parameters()}
    expected = {"img": case["grad/img"], **case.group("grad_param/")}
    leaves = {"img": img, **params}
    # relu networks give biases no gradient; 1e-12 of the whole stands for zero there
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for (name, leaf), grad in zip(leaves.items(), grads):
        grad = torch.zeros_like(leaf) if grad is None else grad
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-13)
    assert max(g.abs().max() for g in expected.values()) > 1e-4


def naive(net_s, net_t, img, target):
    """Central differences in every pixel, normalised by sample."""
    total, eps = 0.0, 1e-5
    for b in range(len(img)):
        rows = []
        for net in (net_s, net_t):
            row = []
            for i in range(img[b].numel()):
                bump = torch.zeros_like(img[b]).flatten()
                bump[i] = eps
                bump = bump.view_as(img[b])
                with torch.no_grad():
                    up, down = (net((img[b] + s * bump)[None])[0, target[b]] for s in (1, -1))
                row.append((up - down).item() / (2 * eps))
            norm = sum(v * v for v in row) ** 0.5
            rows.append([v / norm for v in row])
        total += sum((a - b) ** 2 for a, b in zip(*rows))
    return total / img.numel()


def small(act="tanh"):
    return TwoConv(2, 3, 4, 3, act).double(), TwoConv(2, 4, 3, 3, act).double()


def test_naive():
    net_s, net_t = small()
    img, target = torch.randn(2, 2, 4, 3).double(), torch.tensor([0, 2])
    leaf = img.clone().requires_grad_()
    loss = Sobolev()(net_s(leaf), net_t(leaf), leaf, target)
    assert loss.item() == pytest.approx(naive(net_s, net_t, img, target), rel=1e-7)


def test_gradcheck():
    """The loss is a first derivative already: its gradient is a second one."""
    net_s, net_t = small()
    params = dict(net_s.named_parameters())
    img = torch.randn(2, 2, 3, 3).double().requires_grad_()
    target = torch.tensor([1, 0])

    def call(*values):
        out_s = torch.func.functional_call(net_s, dict(zip(params, values)), (img,))
        return Sobolev()(out_s, net_t(img), img, target)

    assert torch.autograd.gradcheck(call, tuple(params.values()))


def test_no_gradient_reaches_the_teacher():
    net_s, net_t = small()
    img = torch.randn(2, 2, 3, 3).double().requires_grad_()
    loss = Sobolev()(net_s(img), net_t(img), img, torch.tensor([1, 0]))
    grads = torch.autograd.grad(loss, list(net_t.parameters()), allow_unused=True)
    assert grads == (None,) * len(grads)


def test_a_dead_network_gives_a_finite_loss():
    net_s, net_t = small("relu")
    for p in net_s.parameters():
        nn.init.zeros_(p)
    img = torch.randn(2, 2, 3, 3).double().requires_grad_()
    loss = Sobolev()(net_s(img), net_t(img), img, torch.tensor([1, 0]))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net_s.parameters())


def test_bad_input():
    net_s, net_t = small()
    img = torch.randn(1, 2, 3, 3).double()
    with pytest.raises(ValueError, match="img"):
        Sobolev()(net_s(img), net_t(img), img, torch.tensor([0]))
