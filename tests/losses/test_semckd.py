import math

import pytest
import torch
import torch.nn.functional as F

from kd_losses.semckd import SemCKD
from reference import agree, agree_grads, cases


def lists(case):
    """The case's maps of student and teacher."""
    inputs = case.group("in/")
    return [[inputs[f"f{x}{i}"] for i in (1, 2, 3) if f"f{x}{i}" in inputs] for x in "st"]


def ours(params):
    """The authors' names of the used layers, as ours, and their values."""
    found = {}
    for name, value in params.items():
        owner, *rest = name.split(".")
        if owner.startswith("regressor"):
            found[f"projections.{owner[-2]}.{owner[-1]}.{'.'.join(rest[1:])}"] = value
        elif rest[0] != "regressor":
            group = dict(query="queries", key="keys")[owner[:-2]]
            found[f"{group}.{owner[-1]}.{dict(linear1=0, linear2=2)[rest[0]]}.{rest[1]}"] = value
    return found


def build(case):
    dims = [[fm.shape[1] for fm in fms] for fms in lists(case)]
    semckd = SemCKD(*dims, case.hyper["batch_size"], case.hyper["soft"]).double()
    semckd.load_state_dict(ours(case.group("param/")))
    return semckd


@pytest.mark.parametrize("case", cases("semckd"))
def test_reference(case):
    semckd, (fms_s, fms_t) = build(case), lists(case)
    fms_s = [fm.requires_grad_() for fm in fms_s]
    loss = semckd(fms_s, fms_t)
    agree(loss, case["loss"])
    agree(semckd.attention(fms_s, fms_t), case["extra/attention"])
    leaves = {f"fs{i + 1}": fm for i, fm in enumerate(fms_s)} | dict(semckd.named_parameters())
    expected = case.group("grad/") | ours(case.group("grad_param/"))
    if semckd.batch == 4:
        # embeddings of one number are its sign: their layers' gradients are 0 but for rounding
        names = [name for name in leaves if name.startswith(("queries", "keys"))]
        grads = torch.autograd.grad(loss, [leaves.pop(name) for name in names], retain_graph=True)
        assert all(grad.abs().max() < 1e-13 for grad in grads)
        assert all(expected.pop(name).abs().max() < 1e-13 for name in names)
    agree_grads(loss, leaves, expected)


def test_unused_layers_have_no_gradient():
    """What is left out here learns nothing there."""
    for case in cases("semckd"):
        grads = case.group("grad_param/")
        unused = [k for k in grads if k.startswith(("query", "key")) and ".regressor." in k]
        assert unused and all(grads[k].count_nonzero() == 0 for k in unused)


def naive(semckd, fms_s, fms_t):
    """Sample by sample and pair by pair, but for the projections, which need the whole batch."""
    b = len(fms_s[0])

    def unit(embed, fm):
        rows = []
        for i in range(b):
            gram = [sum((fm[i] * fm[k]).flatten().tolist()) for k in range(b)]
            x = torch.tensor(gram, dtype=torch.float64)
            first, second = embed[0], embed[2]
            x = second.weight @ (first.weight @ x + first.bias).clamp(min=0) + second.bias
            rows.append([v / math.hypot(*x.tolist()) for v in x.tolist()])
        return rows

    queries = [unit(embed, fm) for embed, fm in zip(semckd.queries, fms_s)]
    keys = [unit(embed, fm) for embed, fm in zip(semckd.keys, fms_t)]
    total = 0.0
    for i, fm_s in enumerate(fms_s):
        diffs = []
        for j, fm_t in enumerate(fms_t):
            side = min(fm_s.shape[2], fm_t.shape[2])
            x = semckd.projections[i][j](F.avg_pool2d(fm_s, fm_s.shape[2] // side))
            diffs.append(x - F.avg_pool2d(fm_t, fm_t.shape[2] // side))
        for n in range(b):
            power = [
                math.exp(sum(q * k for q, k in zip(queries[i][n], key[n])) / semckd.soft)
                for key in keys
            ]
            for p, diff in zip(power, diffs):
                square = [v * v for v in diff[n].flatten().tolist()]
                total += p / sum(power) * sum(square) / len(square)
    return total / (b * len(fms_s))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("batch, soft", [(4, 1.0), (9, 0.5), (13, 2.0)])
@pytest.mark.parametrize(
    "s, t", [([(3, 8), (2, 4)], [(2, 8), (4, 4), (3, 1)]), ([(2, 2)], [(3, 4), (3, 2)])]
)
def test_naive(s, t, batch, soft, train):
    semckd = SemCKD([c for c, _ in s], [c for c, _ in t], batch, soft).double().train(train)
    fms_s, fms_t = ([torch.randn(batch, c, n, n).double() for c, n in x] for x in (s, t))
    with torch.no_grad():
        expected = naive(semckd, fms_s, fms_t)
    assert semckd(fms_s, fms_t).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("train", [True, False])
def test_gradcheck(train):
    semckd = SemCKD([2, 1], [1, 2], batch=8).double().train(train)
    with torch.no_grad():
        for name, param in semckd.projections.named_parameters():
            if name.endswith("bias"):
                param.normal_()  # away from the corner of ReLU, where dead units leave their bias
    fms_s = [torch.randn(8, c, n, n).double().requires_grad_() for c, n in ((2, 2), (1, 1))]
    fms_t = [torch.randn(8, c, n, n).double() for c, n in ((1, 2), (2, 1))]
    params = dict(semckd.named_parameters())

    def call(x, y, *values):
        # in training mode the value depends on no buffer, so that their moving is harmless
        return torch.func.functional_call(semckd, dict(zip(params, values)), ([x, y], fms_t))

    assert torch.autograd.gradcheck(call, (*fms_s, *params.values()), fast_mode=True)


def finite(semckd, fms_s, fms_t, limit=math.inf):
    fms_s = [fm.requires_grad_() for fm in fms_s]
    fms_t = [fm.requires_grad_() for fm in fms_t]
    loss = semckd(fms_s, fms_t)
    grads = torch.autograd.grad(loss, [*fms_s, *semckd.parameters()])
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads)
    assert all(grad.abs().max() < limit for grad in grads)
    assert not any(torch.autograd.grad(semckd(fms_s, fms_t), fms_t, allow_unused=True))
    return loss


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("scale_s, scale_t", [(0, 0), (0, 1), (1, 0), (1e4, 1e4), (1e-20, 1e-20)])
def test_degenerate(scale_s, scale_t, train):
    semckd = SemCKD([2, 3], [3, 3], batch=8).train(train)
    fms_s = [torch.randn(8, 2, 4, 4) * scale_s, torch.randn(8, 3, 1, 1) * scale_s]
    fms_t = [torch.randn(8, 3, 2, 2) * scale_t, torch.randn(8, 3, 1, 1) * scale_t]
    finite(semckd, fms_s, fms_t, math.inf if scale_s == 1e4 else 1e6)


def test_student_equal_to_teacher_and_duplicates():
    fms = [torch.randn(8, 3, 4, 4)[:1].expand(8, -1, -1, -1).clone()]
    finite(SemCKD([3], [3], batch=8), fms, [fm.detach().clone() for fm in fms], 1e6)


@pytest.mark.parametrize("value", [0.0, 1e-20, 1e-12])
def test_embeddings_of_zeros(value):
    """No direction: the attention is uniform, and its gradient finite."""
    semckd = SemCKD([2, 2], [3, 3, 3], batch=8)
    with torch.no_grad():
        for embed in (*semckd.queries, *semckd.keys):
            embed[2].weight.zero_()
            embed[2].bias.fill_(value)
    fms_s = [torch.randn(8, 2, 4, 4) for _ in range(2)]
    fms_t = [torch.randn(8, 3, 4, 4) for _ in range(3)]
    attention = semckd.attention(fms_s, fms_t)
    torch.testing.assert_close(attention, torch.full((8, 2, 3), 1 / 3))
    finite(semckd, fms_s, fms_t, 1e6)


def test_one_map_of_the_teacher_takes_all():
    semckd = SemCKD([2], [3], batch=4).double().eval()
    fm_s, fm_t = torch.randn(4, 2, 2, 2).double(), torch.randn(4, 3, 2, 2).double()
    expected = F.mse_loss(semckd.projections[0][0](fm_s), fm_t)
    torch.testing.assert_close(semckd([fm_s], [fm_t]), expected)


def test_nothing_moves_in_eval_mode():
    semckd = SemCKD([2], [3], batch=4).eval()
    before = {k: v.clone() for k, v in semckd.state_dict().items()}
    semckd([torch.randn(4, 2, 2, 2)], [torch.randn(4, 3, 2, 2)])
    assert all(torch.equal(v, before[k]) for k, v in semckd.state_dict().items())


def test_half_precision():
    semckd = SemCKD([8, 8], [6, 8], batch=8)
    fms_s = [torch.randn(8, 8, n, n).bfloat16() for n in (8, 4)]
    fms_t = [torch.randn(8, c, n, n).bfloat16() for c, n in ((6, 8), (8, 4))]
    expected = semckd([x.float() for x in fms_s], [x.float() for x in fms_t]).item()
    fms_s = [x.contiguous(memory_format=torch.channels_last) for x in fms_s]
    exact = semckd.attention([x.float() for x in fms_s], [x.float() for x in fms_t])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = semckd(fms_s, fms_t)
        attention = semckd.attention([x.float() for x in fms_s], [x.float() for x in fms_t])
    torch.testing.assert_close(attention, exact)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-2)
    assert semckd(fms_s, fms_t).item() == pytest.approx(expected, rel=1e-6)


def test_bad_input():
    for args in (([], [3], 8), ([3], [], 8)):
        with pytest.raises(ValueError, match="map"):
            SemCKD(*args)
    for batch, soft in ((3, 1.0), (8, 0.0)):
        with pytest.raises(ValueError, match="soft"):
            SemCKD([3], [3], batch, soft)
    semckd, fm = SemCKD([3], [3], batch=8), torch.zeros(8, 3, 2, 2)
    for fms_s, fms_t, match in (
        ([fm, fm], [fm], "student"),
        ([fm], [fm[:, :2]], "teacher"),
        ([fm[:3]], [fm[:3]], r"\b8\b"),
        ([fm], [fm[:1]], r"\b8\b"),  # not a silent broadcast
    ):
        with pytest.raises(ValueError, match=match):
            semckd(fms_s, fms_t)
