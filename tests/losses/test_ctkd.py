import math

import pytest
import torch

from kd_losses.ctkd import CTKD
from reference import agree, agree_grads, cases


def build(case):
    hyper = case.hyper
    names = ("t_start", "t_end", "decay_max", "decay_min")
    return CTKD(**{k: hyper[k] for k in names}, loops=hyper["decay_loops"]).double()


@pytest.mark.parametrize("case", cases("ctkd"))
def test_reference(case):
    ctkd, out_s, out_t = build(case), case.leaf("in/out_s"), case["in/out_t"]
    agree(ctkd.T[None], case["extra/T"])
    loss = ctkd(out_s, out_t, case.hyper["epoch"])
    agree(loss, case["loss"])
    agree_grads(loss, {"out_s": out_s}, {"out_s": case["grad/out_s"]})
    loss = ctkd(out_s, out_t, case.hyper["epoch"])
    (grad,) = torch.autograd.grad(loss, ctkd.theta)
    agree(grad[None], case["grad_param/global_T"])
    agree(grad[None], case["extra/lambda"] * case["extra/dloss_dtheta_true"])
    schedule = case["extra/lambda_schedule"]
    for as_epoch in (float, torch.tensor, lambda e: torch.tensor(e, dtype=torch.float64)):
        values = torch.tensor([float(ctkd.decay(as_epoch(e))) for e in range(len(schedule))])
        torch.testing.assert_close(values.double(), schedule, rtol=0, atol=1e-7)


@pytest.mark.parametrize("case", cases("ctkd"))
def test_reference_of_a_training(case):
    """The temperature alone learns, over the whole curriculum."""
    ctkd, hyper = build(case), case.hyper
    names = ("lr", "momentum", "weight_decay")
    optimizer = torch.optim.SGD(ctkd.parameters(), **{k: hyper[k] for k in names})
    found = {"T": [], "theta": [], "loss": []}
    for epoch in range(1, hyper["epochs"] + 1):
        for _ in range(hyper["steps_per_epoch"]):
            optimizer.zero_grad()
            loss = ctkd(case["in/out_s"], case["in/out_t"], epoch)
            (hyper["kd_weight"] * loss).backward()
            optimizer.step()
        for name, value in (("T", ctkd.T), ("theta", ctkd.theta), ("loss", loss)):
            found[name].append(value.item())
    for name, values in found.items():
        agree(torch.tensor(values, dtype=torch.float64), case[f"extra/traj_{name}"])


def naive(out_s, out_t, theta, t_start, t_end):
    """Sample by sample and class by class."""
    T, total = t_start + t_end / (1 + math.exp(-theta)), 0.0
    for z_s, z_t in zip(out_s.tolist(), out_t.tolist()):
        p_s, p_t = (
            [math.exp(value / T) / sum(math.exp(v / T) for v in z) for value in z]
            for z in (z_s, z_t)
        )
        total += T**2 * sum(t * math.log(t / s) for s, t in zip(p_s, p_t))
    return total / len(out_s)


@pytest.mark.parametrize("t_start, t_end, theta", [(1.0, 20.0, 1.0), (0.5, 3.0, -2.0)])
@pytest.mark.parametrize("b, k", [(1, 3), (4, 5), (3, 2)])
def test_naive(b, k, t_start, t_end, theta):
    out_s, out_t = 3 * torch.randn(b, k).double(), 3 * torch.randn(b, k).double()
    ctkd = CTKD(t_start, t_end)
    with torch.no_grad():
        ctkd.theta.fill_(theta)  # float32 next to logits of float64
    value = ctkd(out_s, out_t, 3)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(naive(out_s, out_t, theta, t_start, t_end), rel=1e-9)


@pytest.mark.parametrize("epoch, factor", [(1, -0.0244717), (2.5, -0.1464466), (10, -1), (99, -1)])
def test_gradcheck(epoch, factor):
    """Of the logits, and of theta the multiple that the epoch says."""
    ctkd, out_t = CTKD().double(), torch.randn(3, 4).double()
    out_s = torch.randn(3, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ctkd(x, out_t, epoch), out_s)
    (grad,) = torch.autograd.grad(ctkd(out_s, out_t, epoch), ctkd.theta)
    values = []
    for step in (1e-5, -1e-5):
        theta = {"theta": ctkd.theta.detach() + step}
        values.append(torch.func.functional_call(ctkd, theta, (out_s, out_t, epoch)).item())
    assert grad.item() == pytest.approx(factor * (values[0] - values[1]) / 2e-5, rel=1e-5)


def test_the_temperature_goes_up_the_loss():
    ctkd, out_s, out_t = CTKD().double(), torch.randn(4, 5).double(), torch.randn(4, 5).double()
    before = ctkd(out_s, out_t, 10)
    before.backward()
    with torch.no_grad():
        ctkd.theta -= 0.1 * ctkd.theta.grad
    assert ctkd(out_s, out_t, 10) > before


def test_teacher_is_constant():
    out_s, out_t = (torch.randn(3, 4).requires_grad_() for _ in range(2))
    CTKD()(out_s, out_t, 1).backward()
    assert out_s.grad is not None and out_t.grad is None


def test_temperature_is_saved():
    ctkd, again = CTKD(), CTKD()
    with torch.no_grad():
        ctkd.theta.fill_(-0.5)
    again.load_state_dict(ctkd.state_dict())
    assert again.T == ctkd.T != CTKD().T


def test_equal_logits():
    ctkd, out = CTKD(), torch.randn(5, 4).requires_grad_()
    for x in (out, 1e4 * out, 0 * out):
        loss = ctkd(x, x, 20)
        grads = torch.autograd.grad(loss, (out, ctkd.theta))
        assert loss.item() == pytest.approx(0, abs=1e-4)
        assert all(grad.abs().max() < 1e-2 for grad in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_saturated_logits(dtype):
    ctkd = CTKD(t_start=1.0, t_end=1e-9)
    out_s = (200 * torch.eye(4)).to(dtype).requires_grad_()
    out_t = (200 * torch.eye(4)[[0, 0, 3, 2]]).to(dtype)
    loss = ctkd(out_s, out_t, 10)
    grads = torch.autograd.grad(loss, (out_s, ctkd.theta))
    assert loss.item() == pytest.approx(150, rel=1e-6)  # one of four samples agrees
    assert all(grad.isfinite().all() and grad.abs().max() < 10 for grad in grads)


def test_bad_input():
    for bad in (dict(t_start=0.0), dict(t_end=-1.0), dict(loops=0.0)):
        with pytest.raises(ValueError, match=rf"\b{[*bad][0]}\b"):
            CTKD(**bad)
    with pytest.raises(ValueError, match="shape"):  # not a silent broadcast
        CTKD()(torch.zeros(3, 4), torch.zeros(1, 4), 1)
