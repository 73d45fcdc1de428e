import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_losses.bss import BSS, BSSAttacker, select
from reference import TwoConv, agree, agree_grads, cases


def attacker(case, **kwargs):
    names = ("step_alpha", "num_steps", "eps")
    return BSSAttacker(**{**{k: case.hyper[k] for k in names}, **kwargs})


@pytest.mark.parametrize("case", cases("bss"))
def test_reference(case):
    net_s, net_t, img = (
        TwoConv.of(case, "net_s"),
        TwoConv.of(case, "net_t"),
        case["out/attacked_img"],
    )
    params = {f"net_s.{name}": p for name, p in net_s.named_parameters()}
    out_s, out_t = net_s(img), net_t(img)
    loss = BSS(case.hyper["T"])(out_s, out_t)
    agree(loss, case["loss"])
    leaves = {"attacked_out_s": out_s, **params}
    expected = {"attacked_out_s": case["grad/attacked_out_s"], **case.group("grad_param/")}
    agree_grads(loss, leaves, expected)


@pytest.mark.parametrize("case", cases("bss"))
def test_reference_attack(case):
    net_t = TwoConv.of(case, "net_t")
    inputs = case["in/img"], case["in/target"], case["in/attack_class"]
    first = attacker(case, num_steps=1).attack(net_t, *inputs)
    agree(first, case["out/attacked_img_after_1_step"], 1e-8)
    net_t.calls = 0
    agree(attacker(case).attack(net_t, *inputs), case["out/attacked_img"], 1e-8)
    assert net_t.calls == case["out/teacher_forward_calls"]
    assert (first[-1] == inputs[0][-1]).all()  # wrong from the start


def softmax(row):
    peak = max(row)
    total = sum(math.exp(v - peak) for v in row)
    return [math.exp(v - peak) / total for v in row]


@pytest.mark.parametrize("T", [1.0, 3.0])
@pytest.mark.parametrize("weight", [None, [1.0, 0.5, 0.0, 2.0], [False, True, True, False]])
def test_naive(T, weight):
    out_s, out_t = torch.randn(4, 5).double(), torch.randn(4, 5).double()
    divergences = []
    for s, t in zip(out_s.tolist(), out_t.tolist()):
        p_s, p_t = softmax([v / T for v in s]), softmax([v / T for v in t])
        divergences.append(sum(q * math.log(q / p) for p, q in zip(p_s, p_t)))
    w = weight or [1.0] * 4
    expected = sum(a * b for a, b in zip(w, divergences)) / sum(w)
    value = BSS(T)(out_s, out_t, None if weight is None else torch.tensor(weight))
    assert value.item() == pytest.approx(expected, rel=1e-12)


def naive_attack(w, x, y, a, step_alpha, num_steps, eps, bound):
    """One image under the linear network x w^T, its gradient by hand."""
    for _ in range(num_steps):
        z = [sum(p * q for p, q in zip(row, x)) for row in w]
        if max(range(len(z)), key=z.__getitem__) != y:
            break
        p = softmax(z)
        mean = [sum(p[k] * w[k][i] for k in range(len(w))) for i in range(len(x))]
        g = [p[a] * (w[a][i] - m) - p[y] * (w[y][i] - m) for i, m in enumerate(mean)]
        norm = math.sqrt(sum(v * v for v in g))
        x = [v + step_alpha * (p[y] - p[a] + eps) * d / norm for v, d in zip(x, g)]
        x = [min(bound, max(-bound, v)) for v in x]
    return x


@pytest.mark.parametrize("step_alpha, num_steps, bound", [(0.3, 10, 2.5), (0.1, 3, 0.8)])
def test_naive_attack(step_alpha, num_steps, bound):
    w, img = torch.randn(4, 6).double(), torch.randn(12, 3, 2, 1).double().clamp(-bound, bound)
    target = (img.flatten(1) @ w.T).argmax(1)
    target[0] = (target[0] + 1) % 4
    attack_class = (target + torch.randint(1, 4, (12,))) % 4
    attack = BSSAttacker(step_alpha, num_steps, 1e-4, bound).attack
    attacked = attack(lambda x: x.flatten(1) @ w.T, img, target, attack_class)
    for b in range(12):
        args = target[b].item(), attack_class[b].item(), step_alpha, num_steps, 1e-4, bound
        expected = naive_attack(w.tolist(), img[b].flatten().tolist(), *args)
        assert attacked[b].flatten().tolist() == pytest.approx(expected, rel=1e-9)
    moved = (attacked != img).flatten(1).any(1)
    assert not moved[0] and moved[1:].all()


def test_gradcheck():
    out_s, out_t = torch.randn(3, 4).double().requires_grad_(), torch.randn(3, 4).double()
    for weight in (None, torch.tensor([0.5, 0.0, 1.0])):
        assert torch.autograd.gradcheck(lambda x: BSS()(x, out_t, weight), out_s)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_degenerate_loss(dtype):
    wide = torch.zeros(4, 5)
    wide[range(4), range(4)] = 200.0
    for out_t in (wide, wide.flip(1), -wide):
        for weight in (None, torch.zeros(4), torch.tensor([False] * 4)):
            out_s = wide.to(dtype).requires_grad_()
            loss = BSS(1.0)(out_s, out_t.to(dtype), weight)
            (grad,) = torch.autograd.grad(loss, out_s)
            assert loss.isfinite() and grad.isfinite().all()
            assert loss.dtype == torch.promote_types(dtype, torch.float32)
            if weight is not None:
                assert loss == 0 and (grad == 0).all()
    assert BSS()(wide[:1], wide[:1]) == 0


def small(dtype=torch.float32):
    net = TwoConv(2, 4, 4, 3, "tanh").to(dtype)
    img = torch.randn(6, 2, 5, 5).to(dtype)
    target = net(img).argmax(1)
    return net, img, target, (target + 1) % 3


def test_attack_under_no_grad_and_autocast():
    net, img, target, attack_class = small()
    expected = BSSAttacker().attack(net, img, target, attack_class)
    img.requires_grad_()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        attacked = BSSAttacker().attack(
            net, img.contiguous(memory_format=torch.channels_last), target, attack_class
        )
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(attacked, expected, rtol=1e-4, atol=1e-4)
    assert attacked.dtype == torch.float32 and not attacked.requires_grad
    assert img.grad is None and all(p.grad is None for p in net.parameters())
    half = BSSAttacker().attack(net, img.bfloat16(), target, attack_class)
    assert half.dtype == torch.float32


def test_attack_reaches_the_boundary():
    net, img, target, attack_class = small()
    net.fc.weight.data.mul_(20)
    target = net(img).argmax(1)
    attack_class = net(img).scatter(1, target[:, None], -torch.inf).argmax(1)
    p = [net(x).softmax(1) for x in (img, BSSAttacker().attack(net, img, target, attack_class))]
    gap = [(q.gather(1, target[:, None]) - q.gather(1, attack_class[:, None])) for q in p]
    assert (gap[1] < gap[0]).all()


def test_attack_of_a_flat_network_stands_still():
    """The gradient in the image vanishes: 0 / 0 in the public code."""
    net, img, target, _ = small()
    nn.init.zeros_(net.conv1.weight)
    nn.init.zeros_(net.conv1.bias)
    net.fc.bias.data.copy_(torch.tensor([1.0, 0.0, 0.0]))
    zeros = torch.zeros_like(target)
    attacked = BSSAttacker().attack(net, img * 0.1, zeros, zeros + 1)
    torch.testing.assert_close(attacked, img * 0.1, rtol=0, atol=0)


def test_attack_of_a_confident_network_moves():
    """Logits 60 apart: the square of the gradient is 0 in float32."""
    weight = torch.tensor([[60.0, 0.0], [0.0, 1.0]])
    img, zeros = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([0])
    attacked = BSSAttacker(num_steps=1).attack(
        lambda x: x.flatten(1) @ weight.T, img, zeros, zeros + 1
    )
    assert attacked.isfinite().all()
    assert (attacked - img).norm().item() == pytest.approx(0.3, rel=1e-3)


def test_attack_of_no_valid_image():
    net, img, target, attack_class = small()
    valid = torch.tensor([True, False] * 3)
    attack = BSSAttacker().attack
    attacked = attack(net, img, target, attack_class, valid)
    assert ((attacked != img).flatten(1).any(1) == valid).all()
    torch.testing.assert_close(attacked[valid], attack(net, img, target, attack_class)[valid])
    calls = net.calls
    assert (attack(net, img, target, attack_class, valid & False) == img).all()
    assert net.calls == calls + 1


def naive_select(out_s, out_t, target, attack_size):
    """The samples that both get right, by falling distance, sample by sample."""
    found = []
    for b, y in enumerate(target.tolist()):
        p_s, p_t = softmax(out_s[b].tolist()), softmax(out_t[b].tolist())
        if all(max(range(len(p)), key=p.__getitem__) == y for p in (p_s, p_t)):
            gap = sum((p - q) ** 2 for k, (p, q) in enumerate(zip(p_s, p_t)) if k != y)
            found.append((gap, b))
    return [b for _, b in sorted(found, reverse=True)][:attack_size]


@pytest.mark.parametrize("attack_size", [1, 5, 32, 100])
def test_select(attack_size):
    target = torch.randint(4, (40,))
    shift = 2 * F.one_hot(target, 4)
    out_s, out_t = (torch.randn(40, 4).double() + shift for _ in range(2))
    index, attack_class, valid = select(out_s, out_t, target, attack_size)
    expected = naive_select(out_s, out_t, target, attack_size)
    assert 0 < len(expected) < 40
    assert index.shape == attack_class.shape == valid.shape == (min(attack_size, 40),)
    assert index[valid].tolist() == expected
    assert (attack_class != out_t[index].argmax(1)).all()


def test_attack_class_is_drawn_in_proportion():
    out_t = torch.tensor([[3.0, 0.0, -1.0, 1.0]]).expand(20000, -1)
    target = torch.zeros(20000, dtype=torch.int64)
    _, attack_class, valid = select(out_t, out_t, target, 20000)
    assert valid.all()
    p = [0.0] + softmax(out_t[0, 1:].tolist())
    for count, expected in zip(torch.bincount(attack_class, minlength=4).tolist(), p):
        # five standard deviations
        assert abs(count - 20000 * expected) <= 5 * math.sqrt(20000 * expected * (1 - expected))


def test_attack_class_of_a_confident_teacher_is_the_second_best():
    """The other classes' probabilities are 0 in float32."""
    out_t = torch.tensor([[500.0, 0.0, 200.0, 100.0]]).expand(50, -1)
    _, attack_class, _ = select(out_t, out_t, torch.zeros(50, dtype=torch.int64), 50)
    assert (attack_class == 2).all()
    impossible = torch.tensor([[0.0] + [-torch.inf] * 3])
    _, attack_class, _ = select(impossible, impossible, torch.tensor([0]), 1)
    assert attack_class != 0


def test_select_follows_its_generator():
    out_t = torch.randn(30, 8)
    target = out_t.argmax(1)
    drawn = [select(out_t, out_t, target, 30, torch.Generator().manual_seed(3)) for _ in range(2)]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=0)


def test_a_batch_without_base_samples():
    out_s, out_t, target = torch.randn(4, 3), torch.randn(4, 3), torch.randint(3, (4,))
    target = torch.where(out_t.argmax(1) == target, (target + 1) % 3, target)
    index, attack_class, valid = select(out_s, out_t, target, 2)
    assert index.shape == attack_class.shape == (2,) and not valid.any()
    out_s = out_s[index].requires_grad_()
    loss = BSS()(out_s, out_t[index], valid)
    assert loss == 0 and (torch.autograd.grad(loss, out_s)[0] == 0).all()


def test_bad_input():
    with pytest.raises(ValueError, match=r"\bT\b"):
        BSS(0)
    with pytest.raises(ValueError, match="shape"):
        BSS()(torch.zeros(2, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="weight"):
        BSS()(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 1))
    with pytest.raises(ValueError, match="num_steps"):
        BSSAttacker(num_steps=0)
    net, img, target, attack_class = small()
    with pytest.raises(ValueError, match="attack class"):
        BSSAttacker().attack(net, img, target, attack_class[:1])
    with pytest.raises(ValueError, match="batch"):
        select(torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="classes"):
        select(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))
