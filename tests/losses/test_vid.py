import math

import pytest
import torch
import torch.nn.functional as F

from kd_losses.vid import VID
from reference import agree, agree_grads, cases


def build(case):
    hyper = case.hyper
    c_s, c_t = case["in/fm_s"].shape[1], case["in/fm_t"].shape[1]
    vid = VID(c_s, hyper["mid_channels"], c_t, hyper["init_var"], hyper["eps"]).double()
    params = {k: v for k, v in case.group("param/").items() if not k.startswith("alt_")}
    vid.load_state_dict(params)
    return vid


@pytest.mark.parametrize("case", [case for case in cases("vid") if "loss" in case])
def test_reference(case):
    vid, fm_s = build(case), case.leaf("in/fm_s")
    loss = vid(fm_s, case["in/fm_t"])
    agree(loss, case["loss"])
    leaves = {"fm_s": fm_s, **dict(vid.named_parameters())}
    agree_grads(loss, leaves, {"fm_s": case["grad/fm_s"], **case.group("grad_param/")})


def naive(vid, fm_s, fm_t):
    """Equation 6 of the paper without its constant, sample by sample and entry by entry."""
    total, count = 0.0, 0
    w1, w2, w3 = (vid.regressor[i].weight.detach()[:, :, 0, 0] for i in (0, 2, 4))
    for b in range(fm_s.shape[0]):
        for y in range(fm_s.shape[2]):
            for x in range(fm_s.shape[3]):
                mu = w3 @ F.relu(w2 @ F.relu(w1 @ fm_s[b, :, y, x]))
                for c in range(fm_t.shape[1]):
                    var = math.log(1 + math.exp(vid.alpha[c].item())) + vid.eps
                    diff = mu[c].item() - fm_t[b, c, y, x].item()
                    total += 0.5 * (math.log(var) + diff**2 / var)
                    count += 1
    return total / count


def test_naive():
    vid = VID(3, 4, 5, init_var=2.0).double()
    with torch.no_grad():
        vid.alpha.normal_()
    fm_s, fm_t = torch.randn(2, 3, 3, 2).double(), torch.randn(2, 5, 3, 2).double()
    assert vid(fm_s, fm_t).item() == pytest.approx(naive(vid, fm_s, fm_t), rel=1e-12)


def test_gradcheck():
    vid = VID(3, 4, 2).double()
    fm_s, fm_t = torch.randn(2, 3, 2, 2).double(), torch.randn(2, 2, 2, 2).double()
    params = dict(vid.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(vid, dict(zip(params, values)), (x, fm_t))

    assert torch.autograd.gradcheck(call, (fm_s.requires_grad_(), *params.values()))


@pytest.mark.parametrize("init_var", [1e-3, 5.0, 300.0])
def test_variance_at_the_start(init_var):
    vid = VID(3, 4, 2, init_var=init_var)
    var = F.softplus(vid.alpha) + vid.eps
    torch.testing.assert_close(var, torch.full_like(var, init_var), rtol=1e-4, atol=0)


def test_large_alpha_stays_finite():
    vid = VID(3, 4, 2)
    with torch.no_grad():
        vid.alpha.fill_(1000.0)  # log(1 + exp) overflows above 88
    assert vid(torch.randn(2, 3, 2, 2), torch.randn(2, 2, 2, 2)).isfinite()


def test_bad_input():
    with pytest.raises(ValueError, match="init_var"):
        VID(3, 4, 2, init_var=0.0)
    with pytest.raises(ValueError, match="batch"):
        VID(3, 4, 2)(torch.zeros(2, 3, 4, 4), torch.zeros(2, 2, 1, 1))
