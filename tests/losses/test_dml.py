import math

import pytest
import torch

from kd_losses.dml import DML
from reference import agree, agree_grads, cases


@pytest.mark.parametrize("case", cases("dml"))
def test_reference(case):
    """Both learners: each call with the other's logits in second place."""
    out1, out2 = case.leaf("in/out1"), case.leaf("in/out2")
    for out, peer, name, prefix in ((out1, out2, "out1", ""), (out2, out1, "out2", "net2/")):
        loss = DML()(out, peer)
        agree(loss, case[f"{prefix}loss"])
        agree_grads(loss, {name: out}, {name: case[f"{prefix}grad/{name}"]})


def test_the_peer_is_a_constant():
    out1, out2 = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    assert torch.autograd.grad(DML()(out1, out2), out2, allow_unused=True) == (None,)


def test_naive():
    out_s, out_t = 3 * torch.randn(4, 6).double(), 3 * torch.randn(4, 6).double()
    total = 0.0
    for s, t in zip(out_s.tolist(), out_t.tolist()):
        p_s, p_t = ([math.exp(z) / sum(map(math.exp, row)) for z in row] for row in (s, t))
        total += sum(b * math.log(b / a) for a, b in zip(p_s, p_t))
    assert DML()(out_s, out_t).item() == pytest.approx(total / 4, rel=1e-10)


def test_gradcheck():
    out_s, out_t = torch.randn(3, 5).double(), torch.randn(3, 5).double()
    assert torch.autograd.gradcheck(lambda x: DML()(x, out_t), out_s.requires_grad_())
