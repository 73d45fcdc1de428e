import pytest
import torch
from torch import nn

from kd_losses.lwm import LwM
from reference import TwoConv, agree, cases


class Net(TwoConv):
    """Its map next to the logits."""

    def forward(self, img):
        fm = self.bottom(img)
        return self.top(fm), fm


@pytest.mark.parametrize("case", cases("lwm"))
def test_reference(case):
    net_s, net_t = Net.of(case, "net_s"), Net.of(case, "net_t")
    img, target = case.leaf("in/img"), case["in/target"]
    loss = LwM()(*net_s(img), *net_t(img.detach().requires_grad_()), target)
    agree(loss, case["loss"])
    leaves = {"img": img, **{f"net_s.{name}": p for name, p in net_s.named_parameters()}}
    expected = {"img": case["grad/img"], **case.group("grad_param/")}
    assert leaves.keys() == expected.keys()
    # relu networks give biases no gradient; 1e-12 of the whole stands for zero there
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for (name, leaf), grad in zip(leaves.items(), grads):
        grad = torch.zeros_like(leaf) if grad is None else grad
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-13)
    assert max(g.abs().max() for g in expected.values()) > 1e-4


def small(act="tanh"):
    return Net(2, 3, 4, 3, act).double(), Net(2, 4, 3, 3, act).double()


def naive(nets, img, target, cam):
    """Grad-CAM of central differences, entry by entry."""
    total, eps = 0.0, 1e-5
    for b in range(len(img)):
        rows = []
        for net in nets:
            with torch.no_grad():
                fm = net.bottom(img[b : b + 1])
                grad = torch.zeros_like(fm)
                for at in torch.cartesian_prod(*map(torch.arange, fm.shape)).tolist():
                    bump = torch.zeros_like(fm)
                    bump[tuple(at)] = eps
                    up, down = (net.top(fm + s * bump)[0, target[b]].item() for s in (1, -1))
                    grad[tuple(at)] = (up - down) / (2 * eps)
            x = (grad if cam == "gradient" else fm)[0].tolist()
            weight = [sum(map(sum, channel)) / fm[0, 0].numel() for channel in grad[0].tolist()]
            row = [
                max(0.0, sum(w * channel[i][j] for w, channel in zip(weight, x)))
                for i in range(fm.shape[2])
                for j in range(fm.shape[3])
            ]
            norm = sum(v * v for v in row) ** 0.5
            rows.append([v / norm if norm else v for v in row])
        total += sum(abs(a - b) for a, b in zip(*rows)) / len(rows[0])
    return total / len(img)


@pytest.mark.parametrize("cam", ["gradient", "activation"])
@pytest.mark.parametrize("shape", [(2, 2, 4, 3), (3, 2, 3, 3)])
def test_naive(cam, shape):
    nets = small()
    img, target = torch.randn(shape).double(), torch.randint(3, shape[:1])
    loss = LwM(cam)(*nets[0](img), *nets[1](img), target)
    assert loss.item() > 1e-3
    assert loss.item() == pytest.approx(naive(nets, img, target, cam), rel=1e-6)


def attention(net, img, target, cam):
    """Grad-CAM before its norm, (B, H, W)."""
    fm = net.bottom(img).detach().requires_grad_()
    logit = net.top(fm)[torch.arange(len(img)), target].sum()
    (grad,) = torch.autograd.grad(logit, fm)
    x = grad if cam == "gradient" else fm
    return (grad.mean((2, 3), keepdim=True) * x).sum(1).relu().detach()


@pytest.mark.parametrize("cam", ["gradient", "activation"])
def test_the_larger_attention_is_averaged(cam):
    """2x3 entries of the finer network's map stand next to one of the other's, whichever it is."""
    fine, coarse = small()
    img, target = torch.randn(2, 2, 4, 6).double(), torch.tensor([2, 0])
    img_coarse = img[..., :2, :2]
    rows = [
        attention(fine, img, target, cam).reshape(2, 2, 2, 2, 3).mean((2, 4)).flatten(1),
        attention(coarse, img_coarse, target, cam).flatten(1),
    ]
    a, b = (row / row.norm(dim=1, keepdim=True) for row in rows)
    expected = (a - b).abs().mean()
    assert expected > 1e-3 and expected.isfinite()
    for one, two in (((fine, img), (coarse, img_coarse)), ((coarse, img_coarse), (fine, img))):
        loss = LwM(cam)(*one[0](one[1]), *two[0](two[1]), target)
        torch.testing.assert_close(loss, expected)
        assert torch.autograd.grad(loss, one[0].fc.weight)[0].abs().max() > 0


@pytest.mark.parametrize("cam", ["gradient", "activation"])
def test_gradcheck(cam):
    """The loss holds a first derivative already: its gradient is a second one."""
    net_s, net_t = small()
    params = dict(net_s.named_parameters())
    img, target = torch.randn(2, 2, 3, 4).double().requires_grad_(), torch.tensor([1, 0])
    of_t = net_t(img.detach().clone())

    def call(img, *values):
        out_s, fm_s = torch.func.functional_call(net_s, dict(zip(params, values)), (img,))
        return LwM(cam)(out_s, fm_s, *of_t, target)

    assert torch.autograd.gradcheck(call, (img, *params.values()))


@pytest.mark.parametrize("cam", ["gradient", "activation"])
def test_no_gradient_reaches_the_teacher(cam):
    net_s, net_t = small()
    img = torch.randn(2, 2, 3, 3).double()
    loss = LwM(cam)(*net_s(img), *net_t(img), torch.tensor([1, 0]))
    grads = torch.autograd.grad(loss, list(net_t.parameters()), allow_unused=True)
    assert grads == (None,) * len(grads)


def dead(net):
    for p in net.parameters():
        nn.init.zeros_(p)


def tiny(net):
    net.fc.weight.data.mul_(1e-25)  # the square of the gradient is 0 in float32


def saturated(net):
    net.fc.weight.data.mul_(1e4)


@pytest.mark.parametrize("cam", ["gradient", "activation"])
@pytest.mark.parametrize("spoil", [dead, tiny, saturated])
@pytest.mark.parametrize("size", [1, 4])
def test_degenerate_input(cam, spoil, size):
    for both in (False, True):
        net_s, net_t = (net.float() for net in small("relu"))
        spoil(net_s)
        net_t = net_s if both else net_t
        img = torch.randn(1, 2, size, size)
        loss = LwM(cam)(*net_s(img), *net_t(img), torch.tensor([1]))
        assert loss.isfinite() and (loss == 0 or not both)
        grads = torch.autograd.grad(loss, list(net_s.parameters()), allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in grads)


def test_scale_of_the_logits_does_not_matter():
    net_s, net_t = (net.float() for net in small())
    img, target = torch.randn(2, 2, 4, 4), torch.tensor([0, 2])
    value = LwM()(*net_s(img), *net_t(img), target)
    tiny(net_s)
    torch.testing.assert_close(LwM()(*net_s(img), *net_t(img), target), value)


@pytest.mark.parametrize("cam", ["gradient", "activation"])
def test_half_types_and_autocast(cam):
    net_s, net_t = small()
    img, target = torch.randn(3, 2, 6, 6).double(), torch.tensor([0, 2, 1])
    expected = LwM(cam)(*net_s(img), *net_t(img), target)
    net_s, net_t, img = net_s.float(), net_t.float(), img.float()
    img = img.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        loss = LwM(cam)(*net_s(img), *net_t(img), target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=5e-2)


def test_bad_input():
    with pytest.raises(ValueError, match="cam"):
        LwM("gradcam")
    net_s, net_t = small()
    img, target = torch.randn(2, 2, 3, 3).double(), torch.tensor([0, 1])
    with torch.no_grad():
        without = net_t(img)
    with pytest.raises(ValueError, match="no_grad"):
        LwM()(*net_s(img), *without, target)
    with pytest.raises(ValueError, match="batch"):
        LwM()(*net_s(img), *net_t(img[:1]), target)
    with pytest.raises(ValueError, match="batch"):  # gather would take fewer targets
        LwM()(*net_s(img), *net_t(img), target[:1])
