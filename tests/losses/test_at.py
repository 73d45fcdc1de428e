import pytest
import torch

from kd_losses.at import AT
from reference import agree, agree_grads, cases


@pytest.mark.parametrize("case", cases("at"))
def test_reference(case):
    fm_s = case.leaf("in/fm_s")
    loss = AT(**case.hyper)(fm_s, case["in/fm_t"])
    agree(loss, case["loss"])
    agree_grads(loss, {"fm_s": fm_s}, {"fm_s": case["grad/fm_s"]})


@pytest.mark.parametrize("case", cases("at"))
def test_reference_of_the_crd_benchmark(case):
    """No absolute value; there the norm is cut off at 1e-12 where 1e-6 is added here."""
    fm_s = case.leaf("in/fm_s")
    loss = AT(**case.hyper, absolute=False)(fm_s, case["in/fm_t"])
    agree(loss, case["alt_repdistiller/loss"], 1e-5)
    agree_grads(loss, {"fm_s": fm_s}, {"fm_s": case["alt_repdistiller/grad/fm_s"]}, 1e-5)


def naive(fm_s, fm_t, p):
    """Equation 2 of the paper, squared and averaged, entry by entry."""
    maps = []
    for fm in (fm_s.tolist(), fm_t.tolist()):
        batch = []
        for sample in fm:
            power = [
                sum(abs(channel[y][x]) ** p for channel in sample)
                for y in range(len(sample[0]))
                for x in range(len(sample[0][0]))
            ]
            norm = sum(value**2 for value in power) ** 0.5 + 1e-6
            batch += [value / norm for value in power]
        maps.append(batch)
    return sum((a - b) ** 2 for a, b in zip(*maps)) / len(maps[0])


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_naive(p):
    fm_s, fm_t = torch.randn(3, 4, 2, 5).double(), torch.randn(3, 6, 2, 5).double()
    assert AT(p)(fm_s, fm_t).item() == pytest.approx(naive(fm_s, fm_t, p), rel=1e-12)


@pytest.mark.parametrize("p", [2.0, 3.0])
def test_gradcheck(p):
    fm_s, fm_t = torch.randn(2, 3, 2, 2).double(), torch.randn(2, 3, 2, 2).double()
    assert torch.autograd.gradcheck(lambda x: AT(p)(x, fm_t), fm_s.requires_grad_())


def test_bad_input():
    with pytest.raises(ValueError, match=r"\bp\b"):
        AT(0.5)
    with pytest.raises(ValueError, match=r"\bp\b"):
        AT(1.5, absolute=False)
    with pytest.raises(ValueError, match="batch"):  # not a silent broadcast
        AT()(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 1, 1))
