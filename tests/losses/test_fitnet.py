import pytest
import torch

from kd_losses.fitnet import Hint
from reference import agree, agree_grads, cases


@pytest.mark.parametrize("case", [case for case in cases("fitnet") if "loss" in case])
def test_reference(case):
    fm_s = case.leaf("in/fm_s")
    loss = Hint()(fm_s, case["in/fm_t"])
    agree(loss, case["loss"])
    agree_grads(loss, {"fm_s": fm_s}, {"fm_s": case["grad/fm_s"]})


@pytest.mark.parametrize(
    "case", [case for case in cases("fitnet") if "alt_mdistiller/loss" in case]
)
def test_reference_on_a_regressed_map(case):
    """The CRD benchmark feeds the loss a regressor's output."""
    agree(Hint()(case["alt_mdistiller/regressed"], case["in/fm_t"]), case["alt_mdistiller/loss"])


def test_naive():
    fm_s, fm_t = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3, 4, 5).double()
    pairs = list(zip(fm_s.flatten().tolist(), fm_t.flatten().tolist()))
    expected = sum((a - b) ** 2 for a, b in pairs) / len(pairs)
    assert Hint()(fm_s, fm_t).item() == pytest.approx(expected, rel=1e-12)


def test_gradcheck():
    fm_s, fm_t = torch.randn(2, 3, 2, 2).double(), torch.randn(2, 3, 2, 2).double()
    assert torch.autograd.gradcheck(lambda x: Hint()(x, fm_t), fm_s.requires_grad_())


def test_bad_input():
    with pytest.raises(ValueError, match="shape"):  # not a silent broadcast
        Hint()(torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4))
