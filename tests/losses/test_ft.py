import math

import pytest
import torch
import torch.nn.functional as F

from kd_losses.ft import FT, Paraphraser, Translator
from reference import agree, agree_grads, cases

VARIANTS = [
    dict(),
    dict(p2=2),
    dict(factor="spatial"),
    dict(factor="spatial", p2=2),
    dict(factor="spatial", p1=3),
    dict(factor="spatial", p1=1, p2=1.5),
]


@pytest.mark.parametrize("case", cases("ft"))
def test_reference(case):
    factor_s = case.leaf("in/factor_s")
    loss = FT()(factor_s, case["in/factor_t"])
    agree(loss, case["loss"])
    agree_grads(loss, {"factor_s": factor_s}, {"factor_s": case["grad/factor_s"]})


@pytest.mark.parametrize("name, p1, p2", [("", 2, 1), ("p1_2_p2_2/", 2, 2), ("p1_3_p2_1/", 3, 1)])
@pytest.mark.parametrize("case", cases("ft"))
def test_reference_spatial(case, name, p1, p2):
    factor_s, peer = case.leaf("in/factor_s"), f"alt_repdistiller/{name}"
    loss = FT("spatial", p1, p2)(factor_s, case["in/factor_t"])
    agree(loss, case[f"{peer}loss"])
    agree_grads(loss, {"factor_s": factor_s}, {"factor_s": case[f"{peer}grad/factor_s"]})


@pytest.mark.parametrize("case", cases("ft"))
def test_reference_full(case):
    """A forward of the paraphraser in training, then its factor in eval meets the translator's."""
    fm_s, fm_t = case.leaf("in/fm_s"), case["in/fm_t"]
    paraphraser = Paraphraser(fm_t.shape[1], **case.hyper).double()
    paraphraser.load_state_dict(case.group("param/paraphraser."))
    translator = Translator(fm_s.shape[1], fm_t.shape[1], **case.hyper).double()
    translator.load_state_dict(case.group("param/translator."))

    _, reconstruction = paraphraser(fm_t)
    agree(reconstruction, case["paraphraser/train_rec"])
    agree((reconstruction - fm_t).square().mean(), case["paraphraser/train_recon_loss"])
    if case.hyper["use_bn"]:
        for name, value in case.group("after/paraphraser.").items():
            torch.testing.assert_close(paraphraser.state_dict()[name], value, rtol=1e-9, atol=1e-15)
    # in training mode the loss does not depend on the buffers, which it moves once more
    after = {k: v.clone() for k, v in paraphraser.state_dict().items()}
    agree(paraphraser.reconstruction_loss(fm_t), case["paraphraser/train_recon_loss"])
    paraphraser.load_state_dict(after)

    factor_t, factor_s = paraphraser.eval()(fm_t)[0], translator(fm_s)
    assert torch.equal(factor_t, paraphraser.factor(fm_t))
    agree(factor_t, case["full/factor_t_eval"])
    agree(factor_s, case["full/factor_s"])
    loss = FT()(factor_s, factor_t)
    agree(loss, case["full/loss"])
    expected = case.group("full/grad_param/translator.")
    leaves = {"fm_s": fm_s, **dict(translator.named_parameters())}
    agree_grads(loss, leaves, {"fm_s": case["full/grad/fm_s"], **expected})


def naive(factor_s, factor_t):
    """Equation of the transfer loss with p = 1 and a mean, entry by entry."""
    total = 0.0
    for s, t in zip(factor_s.flatten(1).tolist(), factor_t.flatten(1).tolist()):
        norm_s, norm_t = (math.sqrt(sum(v * v for v in x)) for x in (s, t))
        total += sum(abs(a / norm_s - b / norm_t) for a, b in zip(s, t))
    return total / factor_s.numel()


@pytest.mark.parametrize("shape", [(3, 4, 2, 5), (1, 1, 1, 1), (1, 6, 3, 3)])
def test_naive(shape):
    factor_s, factor_t = torch.randn(shape).double(), torch.randn(shape).double()
    assert FT()(factor_s, factor_t).item() == pytest.approx(naive(factor_s, factor_t), rel=1e-12)


@pytest.mark.parametrize("shape", [(3, 4, 2, 5), (1, 1, 1, 1)])
def test_naive_square(shape):
    factor_s, factor_t = torch.randn(shape).double(), torch.randn(shape).double()
    total = 0.0
    for s, t in zip(factor_s.flatten(1).tolist(), factor_t.flatten(1).tolist()):
        norm_s, norm_t = (math.sqrt(sum(v * v for v in x)) for x in (s, t))
        total += sum((a / norm_s - b / norm_t) ** 2 for a, b in zip(s, t))
    expected = total / factor_s.numel()
    assert FT(p2=2)(factor_s, factor_t).item() == pytest.approx(expected, rel=1e-12, abs=1e-15)


def naive_spatial_row(sample, size, p1):
    """One sample's map of channel means, entry by entry, each channel pooled to the size before; a
    window reaches over every entry that it touches."""
    height, width = len(sample[0]), len(sample[0][0])
    row = []
    for i in range(size[0]):
        rows = range(i * height // size[0], -((i + 1) * height // -size[0]))
        for j in range(size[1]):
            columns = range(j * width // size[1], -((j + 1) * width // -size[1]))
            total = 0.0
            for channel in sample:
                entries = [channel[y][x] for y in rows for x in columns]
                total += (sum(entries) / len(entries)) ** p1
            row.append(total / len(sample))
    norm = math.sqrt(sum(v * v for v in row))
    return [v / norm if norm else v for v in row]


def naive_spatial(factor_s, factor_t, p1, p2):
    size = [min(pair) for pair in zip(factor_s.shape[2:], factor_t.shape[2:])]
    total = 0.0
    for sample_s, sample_t in zip(factor_s.tolist(), factor_t.tolist()):
        rows = (naive_spatial_row(sample, size, p1) for sample in (sample_s, sample_t))
        total += sum(abs(a - b) ** p2 for a, b in zip(*rows))
    return total / (len(factor_s) * size[0] * size[1])


PAIRS = {  # shapes of both factors
    "equal": ((3, 4, 2, 5), (3, 4, 2, 5)),
    "one entry": ((1, 1, 1, 1), (1, 1, 1, 1)),
    "one sample": ((1, 6, 3, 3), (1, 6, 3, 3)),
    "channels": ((2, 3, 3, 3), (2, 5, 3, 3)),
    "larger student": ((2, 3, 6, 6), (2, 3, 3, 3)),
    "larger teacher": ((2, 3, 3, 3), (2, 3, 7, 7)),
    "not square": ((2, 3, 5, 2), (2, 4, 3, 4)),
}


@pytest.mark.parametrize("p1, p2", [(2, 1), (2, 2), (3, 1), (1, 1.5), (4, 3)])
@pytest.mark.parametrize("name", PAIRS)
def test_naive_spatial(name, p1, p2):
    factor_s, factor_t = (torch.randn(shape).double() for shape in PAIRS[name])
    expected = naive_spatial(factor_s, factor_t, p1, p2)
    loss = FT("spatial", p1, p2)(factor_s, factor_t)
    assert loss.item() == pytest.approx(expected, rel=1e-10, abs=1e-15)


def naive_layer(conv, bn, x):
    """A 3x3 convolution or transposed one with padding 1, batch norm of trained buffers, LeakyReLU:
    every input entry is sent to the outputs it reaches."""
    transposed = isinstance(conv, torch.nn.ConvTranspose2d)
    width = conv.out_channels
    out = torch.zeros(x.shape[0], width, *x.shape[2:]).double()
    if conv.bias is not None:
        out += conv.bias.detach()[:, None, None]
    for y in range(x.shape[2]):
        for z in range(x.shape[3]):
            for i in range(3):
                for j in range(3):
                    # a convolution looks at (to + offset), a transposed one writes there
                    to = (y + i - 1, z + j - 1) if transposed else (y - i + 1, z - j + 1)
                    if 0 <= to[0] < x.shape[2] and 0 <= to[1] < x.shape[3]:
                        w = conv.weight.detach()[:, :, i, j]
                        w = w.T if transposed else w
                        for b in range(x.shape[0]):
                            out[b, :, to[0], to[1]] += w @ x[b, :, y, z]
    if isinstance(bn, torch.nn.BatchNorm2d):
        for c in range(width):
            scale = bn.weight[c].item() / math.sqrt(bn.running_var[c].item() + bn.eps)
            out[:, c] = (out[:, c] - bn.running_mean[c]) * scale + bn.bias[c].item()
    return torch.where(out > 0, out, 0.1 * out)


def scramble(net):
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5) if name.endswith("running_var") else value.normal_()
    return net.double().eval()


@pytest.mark.parametrize("use_bn", [True, False])
def test_naive_networks(use_bn):
    paraphraser = scramble(Paraphraser(4, 0.5, use_bn))
    translator = scramble(Translator(3, 4, 0.5, use_bn))
    for net, layers, fm, widths in [
        (paraphraser.factor, paraphraser.encoder, torch.randn(2, 4, 3, 2), [4, 2, 2]),
        (paraphraser.decoder, paraphraser.decoder, torch.randn(2, 2, 3, 2), [2, 4, 4]),
        (translator, translator.encoder, torch.randn(2, 3, 3, 2), [3, 2, 2]),
    ]:
        x = fm.double()
        out = net(x)
        for conv, bn, width in zip(layers[::3], layers[1::3], widths):
            x = naive_layer(conv, bn, x)
            assert x.shape[1] == width
        torch.testing.assert_close(out, x, rtol=1e-11, atol=1e-11)


def test_gradcheck():
    factor_s, factor_t = torch.randn(2, 3, 2, 2).double(), torch.randn(2, 3, 2, 2).double()
    assert torch.autograd.gradcheck(lambda x: FT()(x, factor_t), factor_s.requires_grad_())


@pytest.mark.parametrize("p1, p2", [(2, 1), (2, 2), (3, 1), (1, 1.5)])
@pytest.mark.parametrize("name", ["channels", "larger student", "larger teacher", "not square"])
def test_gradcheck_spatial(name, p1, p2):
    factor_s, factor_t = (torch.randn(shape).double() for shape in PAIRS[name])
    ft = FT("spatial", p1, p2)
    assert torch.autograd.gradcheck(lambda x: ft(x, factor_t), factor_s.requires_grad_())


@pytest.mark.parametrize("use_bn", [True, False])
def test_gradcheck_networks(use_bn):
    paraphraser = Paraphraser(2, 0.5, use_bn).double().eval()
    translator = Translator(2, 2, 0.5, use_bn).double().eval()
    fm_s, fm_t = torch.randn(2, 2, 2, 2).double(), torch.randn(2, 2, 2, 2).double()
    factor_t = torch.randn(2, 1, 2, 2).double()
    params_p, params_t = dict(paraphraser.named_parameters()), dict(translator.named_parameters())

    def reconstruct(*values):
        _, out = torch.func.functional_call(paraphraser, dict(zip(params_p, values)), fm_t)
        return F.mse_loss(out, fm_t)

    def transfer(x, *values):
        out = torch.func.functional_call(translator, dict(zip(params_t, values)), x)
        return FT()(out, factor_t)

    assert torch.autograd.gradcheck(reconstruct, tuple(params_p.values()))
    assert torch.autograd.gradcheck(transfer, (fm_s.requires_grad_(), *params_t.values()))


@pytest.mark.parametrize("hyper", VARIANTS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 2, 2), (3, 3, 2, 2)])
def test_degenerate(shape, hyper):
    ft = FT(**hyper)
    some, zero = torch.randn(shape), torch.zeros(shape)
    dead = some.clone()
    dead[0] = 0
    for factor_s, factor_t in [
        (zero, zero),
        (zero, some),
        (some, zero),
        (dead, some),
        (some, dead),
        (some, some),
    ]:
        factor_s, factor_t = (x.clone().requires_grad_() for x in (factor_s, factor_t))
        loss = ft(factor_s, factor_t)
        grad, none = torch.autograd.grad(loss, (factor_s, factor_t), allow_unused=True)
        assert loss.isfinite() and grad.isfinite().all() and none is None
        assert grad.abs().max() < 100
    assert loss == 0 and not grad.any()  # student == teacher


@pytest.mark.parametrize("hyper", VARIANTS, ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1e-9, 1e-12, 1e-22, 1e-30])
def test_tiny(scale, hyper):
    """Squares, and their squares, underflow."""
    factor_s = (torch.randn(2, 3, 2, 2) * scale).requires_grad_()
    loss = FT(**hyper)(factor_s, torch.randn(2, 3, 2, 2))
    (grad,) = torch.autograd.grad(loss, factor_s)
    assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("hyper", VARIANTS, ids=str)
def test_half_types_and_autocast(hyper):
    shape = (3, 4, 6, 6)
    factor_s, factor_t = (torch.randn(shape).bfloat16() for _ in range(2))
    expected = FT(**hyper)(factor_s.double(), factor_t.double()).item()
    factor_t = factor_t.contiguous(memory_format=torch.channels_last)
    for active in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=active):
            loss = FT(**hyper)(factor_s, factor_t)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_teacher_is_a_constant():
    fm_t = torch.randn(2, 4, 3, 3, requires_grad=True)
    paraphraser = Paraphraser(4)
    loss = paraphraser.reconstruction_loss(fm_t)
    *grads, none = torch.autograd.grad(loss, (*paraphraser.parameters(), fm_t), allow_unused=True)
    assert all(grad.any() for grad in grads) and none is None


def test_initialisation():
    """Variance 2 / (9 * out channels) for both kinds of convolution, biases 0."""
    for net in (Paraphraser(64, 0.5, use_bn=False), Translator(64, 32, 1.0, use_bn=False)):
        for name, value in net.named_parameters():
            if name.endswith("bias"):
                assert not value.any()
            else:
                layer = net.get_submodule(name.removesuffix(".weight"))
                expected = math.sqrt(2 / (9 * layer.out_channels))
                assert value.std().item() == pytest.approx(expected, rel=0.05)


def test_bad_input():
    with pytest.raises(ValueError, match="shape"):  # not a silent broadcast
        FT()(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 1, 1))
    with pytest.raises(ValueError, match="batch"):
        FT("spatial")(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="factor"):
        FT("space")
    with pytest.raises(ValueError, match="p1"):  # nan of a negative entry
        FT("spatial", p1=1.5)
    with pytest.raises(ValueError, match="p1"):  # a constant: nothing would learn
        FT("spatial", p1=0)
    with pytest.raises(ValueError, match="p2"):
        FT("spatial", p2=0.5)
    with pytest.raises(ValueError, match=r"\bk\b"):
        Paraphraser(4, 0.2)
    with pytest.raises(ValueError, match=r"\bk\b"):
        Translator(8, 4, 0.2)
