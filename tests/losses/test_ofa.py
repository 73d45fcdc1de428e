import math

import pytest
import torch

from kd_losses.ofa import OFA, ofa_loss
from reference import agree, agree_grads, cases


def ours(case, group):
    """The authors' parameters of that group by our names: the deepest stage, 4, pools first."""
    stages, found = case.hyper["stages"], {}
    for key, value in case.group(group).items():
        _, stage, rest = key.split(".", 2)
        if stage == "4":
            rest = {"0": "1", "3": "3"}[rest[0]] + rest[1:]
        else:
            rest = rest.replace("0.op.", "0.")
        found[f"heads.{stages.index(int(stage))}.{rest}"] = value
    return found


def build(case):
    stages = [case[f"in/fs{i}"].shape[1:] for i in case.hyper["stages"]]
    t_dim, num_class = case.hyper["feature_dim_t"], case["in/out_t"].shape[1]
    ofa = OFA(stages, t_dim, num_class, case.hyper["eps"], case.hyper["T"]).double()
    ofa.load_state_dict(ours(case, "param/"))
    return ofa


@pytest.mark.parametrize("case", cases("ofa"))
def test_reference(case):
    ofa, names = build(case), [f"fs{i}" for i in case.hyper["stages"]]
    leaves = {name: case.leaf(f"in/{name}") for name in [*names, "out_s"]}
    stages_s = [leaves[name] for name in names]
    loss = ofa(stages_s, leaves["out_s"], case["in/out_t"], case["in/target"])
    agree(loss, case["loss"])
    leaves |= dict(ofa.named_parameters())
    agree_grads(loss, leaves, {**case.group("grad/"), **ours(case, "grad_param/")})


@pytest.mark.parametrize("case", cases("ofa"))
def test_reference_of_the_terms(case):
    ofa, target, out_t = build(case), case["in/target"], case["in/out_t"]
    eps, T = case.hyper["eps"], case.hyper["T"]
    for stage, head, e in zip(case.hyper["stages"], ofa.heads, eps):
        out = head(case[f"in/fs{stage}"])
        agree(ofa_loss(out, out_t, target, e, T), case[f"extra/stage{stage}"])
    agree(ofa_loss(case["in/out_s"], out_t, target, eps[-1], T), case["extra/logits"])


def naive(out_s, out_t, target, eps, T):
    """Sample by sample and class by class."""
    total = 0.0
    for z_s, z_t, y in zip(out_s.tolist(), out_t.tolist(), target.tolist()):
        p_s, p_t = (
            [math.exp(v / T) / sum(math.exp(w / T) for w in z) for v in z] for z in (z_s, z_t)
        )
        for k, (s, t) in enumerate(zip(p_s, p_t)):
            total -= ((t + 1) ** eps - 1 if k == y else t**eps) * math.log(s)
    return total / len(out_s)


@pytest.mark.parametrize("eps, T", [(1.0, 1.0), (1.5, 4.0), (0.5, 2.0)])
@pytest.mark.parametrize("b, k", [(1, 3), (4, 5), (3, 2)])
def test_naive(b, k, eps, T):
    out_s, out_t = torch.randn(b, k).double(), torch.randn(b, k).double()
    target = torch.randint(k, (b,))
    value = ofa_loss(out_s, out_t, target, eps, T).item()
    assert value == pytest.approx(naive(out_s, out_t, target, eps, T), rel=1e-11)


def test_sum_over_the_stages():
    """One eps for all is the same eps for each; every term has its own T and eps."""
    shapes = [(4, 8, 8), (6, 4, 4), (8, 2, 2)]
    stages_s = [torch.randn(3, *shape).double() for shape in shapes]
    out_s, out_t = torch.randn(3, 5).double(), torch.randn(3, 5).double()
    target = torch.tensor([0, 4, 4])
    for eps in (1.5, (1.0, 1.2, 1.4, 1.6)):
        ofa = OFA(shapes, 10, 5, eps, T=2.0).double().eval()
        outs = [*(head(fm) for head, fm in zip(ofa.heads, stages_s)), out_s]
        each = [eps] * 4 if isinstance(eps, float) else eps
        expected = sum(naive(z, out_t, target, e, 2.0) for z, e in zip(outs, each))
        assert ofa(stages_s, out_s, out_t, target).item() == pytest.approx(expected, rel=1e-11)


def test_heads_fit_the_maps():
    """As many halvings as reach the deepest map's size, whatever the number of stages."""
    shapes = [(4, 16, 16), (6, 8, 8), (6, 7, 5), (8, 4, 4), (10, 4, 3)]
    ofa = OFA(shapes, 7, 3)
    assert ofa.blocks == [2, 1, 1, 0, 0]
    for (c, h, w), head, n in zip(shapes, ofa.heads, ofa.blocks):
        fm = torch.randn(2, c, h, w)
        for i in range(n):
            fm = head[i](fm)
            assert fm.shape[1] == (10 if i == n - 1 else 2 * c)  # 10: more than the teacher's 7
        assert max(fm.shape[2:]) == (4 if n else max(h, w))
    assert OFA(shapes, 12, 3).heads[0][-1].in_features == 12
    assert OFA([(4, 2, 2), (6, 2, 2)], 7, 3).blocks == [0, 0]


def test_gradcheck():
    ofa = OFA([(2, 3, 3), (3, 2, 2)], 4, 3, eps=1.5, T=2.0).double().eval()
    stages_s = [torch.randn(2, 2, 3, 3).double(), torch.randn(2, 3, 2, 2).double()]
    out_s, out_t = torch.randn(2, 3).double(), torch.randn(2, 3).double()
    inputs = [x.requires_grad_() for x in (*stages_s, out_s)]
    params = dict(ofa.named_parameters())

    def call(fm_1, fm_2, out, *values):
        arguments = ([fm_1, fm_2], out, out_t, torch.tensor([0, 2]))
        return torch.func.functional_call(ofa, dict(zip(params, values)), arguments)

    assert torch.autograd.gradcheck(call, (*inputs, *params.values()))


def test_teacher_is_constant():
    out_s, out_t = (torch.randn(3, 4).requires_grad_() for _ in range(2))
    fm = torch.randn(3, 2, 2, 2, requires_grad=True)
    OFA([(2, 2, 2)], 4, 4)([fm], out_s, out_t, torch.tensor([0, 3, 3])).backward()
    assert out_s.grad is not None and fm.grad is not None and out_t.grad is None


def test_eval_moves_nothing():
    ofa = OFA([(2, 4, 4), (3, 2, 2)], 4, 4).eval()
    before = {k: v.clone() for k, v in ofa.state_dict().items()}
    inputs = (
        [torch.randn(3, 2, 4, 4), torch.randn(3, 3, 2, 2)],
        torch.randn(3, 4),
        torch.randn(3, 4),
    )
    ofa(*inputs, torch.zeros(3).long())
    torch.testing.assert_close(ofa.state_dict(), before, rtol=0, atol=0)
    ofa.train()(*inputs, torch.zeros(3).long())
    assert ofa.state_dict()["heads.0.0.2.num_batches_tracked"] == 1


def test_cross_entropy_at_eps_1():
    """The label plays no part there; the teacher's entropy stays where the networks are equal."""
    out = torch.randn(5, 4).double()
    for target in (torch.zeros(5, dtype=torch.int64), torch.arange(5) % 4):
        torch.testing.assert_close(
            ofa_loss(out, out, target), torch.distributions.Categorical(logits=out).entropy().mean()
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_saturated_logits(dtype):
    peak = torch.eye(4) * 200
    out_s, out_t = peak[[0, 1, 3]].to(dtype).requires_grad_(), peak[[0, 2, 0]].to(dtype)
    loss = ofa_loss(out_s, out_t, torch.tensor([0, 0, 3]), eps=1.5)
    (grad,) = torch.autograd.grad(loss, out_s)
    # all agree; the teacher sees another class than the student, and than the label, twice
    assert loss.item() == pytest.approx((0 + 200 + 200) / 3, rel=1e-6)
    assert grad.isfinite().all() and grad.abs().max() < 10


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4, 1e-12, 1e-20])
def test_degenerate_maps(scale):
    ofa = OFA([(2, 4, 4), (3, 2, 2)], 4, 4)
    stages_s = [scale * torch.randn(3, 2, 4, 4), scale * torch.randn(3, 3, 2, 2)]
    stages_s = [x.contiguous(memory_format=torch.channels_last).requires_grad_() for x in stages_s]
    out_s, out_t = scale * torch.randn(3, 4), scale * torch.randn(3, 4)
    loss = ofa(stages_s, out_s, out_t, torch.zeros(3).long())
    grads = torch.autograd.grad(loss, [*stages_s, *ofa.parameters()])
    assert loss.isfinite() and all(g.isfinite().all() and g.abs().max() < 1e5 for g in grads)


def test_a_batch_of_one():
    out, target = torch.randn(1, 4), torch.tensor([3])

    def call(ofa, *sizes):
        return ofa([torch.randn(1, 2, n, n) for n in sizes], out, out, target)

    single = OFA([(2, 2, 2), (2, 1, 1)], 2, 4)
    with pytest.raises(ValueError, match="samples"):
        call(single, 2, 1)
    assert single.state_dict()["heads.0.0.2.num_batches_tracked"] == 0
    assert call(single.eval(), 2, 1).isfinite()
    assert call(OFA([(2, 4, 4), (2, 2, 2)], 2, 4), 4, 2).isfinite()
    assert call(OFA([(2, 1, 1)], 2, 4), 1).isfinite()


def test_bad_input():
    shapes, target = [(2, 4, 4), (3, 2, 2)], torch.zeros(3, dtype=torch.int64)
    for bad in (dict(T=0.0), dict(eps=0.0), dict(eps=(1.0, 1.0, -1.0))):
        with pytest.raises(ValueError, match=rf"\b{[*bad][0]}\b"):
            OFA(shapes, 4, 4, **bad)
    with pytest.raises(ValueError, match="eps"):
        OFA(shapes, 4, 4, eps=(1.0, 1.0))
    with pytest.raises(ValueError, match="stage"):
        OFA([], 4, 4)
    ofa, out = OFA(shapes, 4, 4), torch.zeros(3, 4)
    fms = torch.zeros(3, 2, 4, 4), torch.zeros(3, 3, 2, 2)
    for bad in (fms[:1], fms[::-1], (fms[0], fms[1][:2]), (fms[0], fms[1][0])):
        with pytest.raises(ValueError, match="channels"):
            ofa(bad, out, out, target)
    for outs in ((out, out[:1]), (out[:, :3], out[:, :3]), (out[:1], out)):
        with pytest.raises(ValueError, match="logits"):
            ofa(fms, *outs, target)
    assert ofa.state_dict()["heads.0.0.2.num_batches_tracked"] == 0
    with pytest.raises(ValueError, match="shape"):  # not a silent broadcast
        ofa_loss(out, out[:1], target)
    with pytest.raises(ValueError, match="shape"):
        ofa_loss(out, out, target[:, None])
