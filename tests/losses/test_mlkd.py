import math

import pytest
import torch

from kd_losses.mlkd import MLKD
from reference import agree, agree_grads, cases

VIEWS = ("out_s_weak", "out_s_strong", "out_t_weak", "out_t_strong")


@pytest.mark.parametrize("form", ["released", "intended"])
@pytest.mark.parametrize("case", cases("mlkd"))
def test_reference(case, form):
    prefix = "" if form == "released" else "intended/"
    leaves = {name: case.leaf(f"in/{name}") for name in VIEWS[:2]}
    outs = *leaves.values(), *(case[f"in/{name}"] for name in VIEWS[2:])
    mlkd = MLKD(base=case.hyper["T"], form=form)
    loss = case.hyper["kd_weight"] * mlkd(*outs)
    agree(loss, case[f"{prefix}loss"])
    agree_grads(loss, leaves, case.group(f"{prefix}grad/"))


@pytest.mark.parametrize("case", cases("mlkd"))
def test_reference_of_each_temperature(case):
    outs = [case[f"in/{name}"] for name in VIEWS]
    m, c = (case[f"extra/{name}"].double().mean() for name in ("mask", "class_mask"))
    for T in (2, 3, 4, 5, 6):
        term = {
            name: case[f"extra/terms/{name}_T{T}"]
            for name in ("kd_weak", "cc_weak", "bc_weak", "kd_strong")
        }
        weak = m * (term["kd_weak"] + term["bc_weak"]) + c * term["cc_weak"]
        agree(MLKD((T,), T)(*outs), weak + term["kd_strong"])
        # a base of no weight, so to speak: of the other temperature the weak view is taken twice
        both = MLKD((T, 100.0), 100.0)(*outs) - MLKD((100.0,), 100.0)(*outs)
        agree(both, weak + term["kd_weak"])


def softmax(z, T):
    return [math.exp(value / T) / sum(math.exp(v / T) for v in z) for value in z]


def median(values):
    n, values = len(values), sorted(values)
    return (values[(n - 1) // 2] + values[n // 2]) / 2


def naive(outs, temperatures, base, form):
    """The definition, entry by entry."""
    s_w, s_s, t_w, t_s = (out.tolist() for out in outs)
    B, K = outs[0].shape
    p = [softmax(z, 1) for z in t_w]
    sure, summed = [max(row) for row in p], [sum(row[k] for row in p) for k in range(K)]
    m = [float(value <= median(sure)) for value in sure]
    c = [float(value <= median(summed)) for value in summed]
    others = sorted(set(temperatures) - {base})
    total = 0.0
    for T in temperatures:
        kd, bc, cc = {}, {}, {}
        for view, s, t in (("w", s_w, t_w), ("s", s_s, t_s)):
            P, Q = [softmax(z, T) for z in s], [softmax(z, T) for z in t]
            kd[view] = [
                T**2 * sum(q * math.log(q / r) for r, q in zip(*pair)) for pair in zip(P, Q)
            ]

            def gram(X, a, b):
                return sum(X[a][k] * X[b][k] for k in range(K))

            def gram_of_classes(X, a, b):
                return sum(X[i][a] * X[i][b] for i in range(B))

            bc[view] = [
                sum((gram(Q, i, b) - gram(P, i, b)) ** 2 for i in range(B)) / B for b in range(B)
            ]
            cc[view] = [
                sum((gram_of_classes(Q, i, k) - gram_of_classes(P, i, k)) ** 2 for i in range(K))
                / K
                for k in range(K)
            ]
        if form == "intended":
            total += sum(x * y for x, y in zip(m, kd["w"])) / B + sum(kd["s"]) / B
            total += sum(x * y for x, y in zip(m, bc["w"])) + sum(bc["s"])
            total += sum(x * y for x, y in zip(c, cc["w"])) + sum(cc["s"])
        else:
            again = "w" if others and T in (others[0], others[-1]) else "s"
            total += sum(m) / B * (sum(kd["w"]) / B + sum(bc["w"]))
            total += sum(c) / K * sum(cc["w"]) + sum(kd[again]) / B
    return total


@pytest.mark.parametrize("form", ["released", "intended"])
@pytest.mark.parametrize("T, base", [((2, 3, 4, 5, 6), 4), ((6, 1, 3, 5, 2), 1), ((1.5,), 1.5)])
@pytest.mark.parametrize("b, k", [(1, 3), (4, 6), (5, 2), (7, 3)])
def test_naive(b, k, T, base, form):
    outs = [2 * torch.randn(b, k).double() for _ in range(4)]
    value = MLKD(T, base, form)(*outs).item()
    assert value == pytest.approx(naive(outs, T, base, form), rel=1e-10)


@pytest.mark.parametrize("form", ["released", "intended"])
def test_gradcheck(form):
    outs = [torch.randn(4, 3).double() for _ in range(4)]
    mlkd = MLKD(form=form)

    def call(s_w, s_s):
        return mlkd(s_w, s_s, *outs[2:])

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in outs[:2]])


@pytest.mark.parametrize("form", ["released", "intended"])
def test_teacher_is_constant(form):
    outs = [torch.randn(3, 4).requires_grad_() for _ in range(4)]
    MLKD(form=form)(*outs).backward()
    assert [x.grad is not None for x in outs] == [True, True, False, False]


@pytest.mark.parametrize("form", ["released", "intended"])
def test_ties_are_all_kept(form):
    """Equal samples and classes: as many are at most the median as there are."""
    outs = [torch.randn(1, 4).double().expand(5, 4) for _ in range(2)] + [torch.zeros(5, 4)] * 2
    expected = naive([x.double() for x in outs], (2, 4), 4, form)
    value = MLKD((2, 4), 4, form)(*outs[:2], *(x.double() for x in outs[2:])).item()
    assert value == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("form", ["released", "intended"])
def test_equal_views_and_networks(form):
    out = torch.randn(5, 4).requires_grad_()
    for x in (out, 1e4 * out, 0 * out):
        loss = MLKD(form=form)(x, x, x, x)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, out)[0].abs().max() < 1e-1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_saturated_logits(dtype):
    peak = 200 * torch.eye(4).to(dtype)
    s_w, s_s = peak[[0, 1]].requires_grad_(), peak[[1, 1]].requires_grad_()
    loss = MLKD((1.0,), 1.0, "intended")(s_w, s_s, peak[[0, 2]], peak[[0, 1]])
    grads = torch.autograd.grad(loss, (s_w, s_s))
    # all samples and the classes 1 and 3 are at most the median, kd is 0 or 200. Weak view: bc 0
    # (the samples differ for both networks), cc 1 / 4 of class 1 against 2; strong view: bc twice
    # the 1 off the diagonal over 2, cc ((1 - 0)^2 + (1 - 2)^2) / 4
    assert loss.item() == pytest.approx(100 + 100 + 0.25 + 1 + 0.5, rel=1e-6)
    assert all(grad.isfinite().all() and grad.abs().max() < 10 for grad in grads)


def test_bad_input():
    out = torch.zeros(3, 4)
    for T, base in (((0.0, 4.0), 4.0), ((2.0, 3.0), 4.0), ((4.0, 4.0), 4.0), ((), 4.0)):
        with pytest.raises(ValueError, match="temperatures"):
            MLKD(T, base)
    with pytest.raises(ValueError, match="form"):
        MLKD(form="paper")
    for i in range(4):  # not a silent broadcast
        outs = [out] * 4
        outs[i] = out[:1]
        with pytest.raises(ValueError, match="shape"):
            MLKD()(*outs)
