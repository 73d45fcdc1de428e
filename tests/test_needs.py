"""What some methods need of the loop beyond features: a second view, the classifiers, the epoch, a
look at all training images, whole batches, parameters without weight decay, a student with the
teacher's classifier, standardised logits."""

import copy
from argparse import Namespace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
import toys
from messages import ends, refused
from PIL import Image

import network
import train_kd
import utils
from engine import schedule
from engine import foreign, stream
from engine.checkpoint import Weights, find_weights
from engine.run import Run
from kd_losses import FADES, METHODS, fading_from
from kd_losses.lskd import standardise
from kd_losses.wkd_l import cka_cost
from tools import eval as eval_tool

CPU = utils.Precision()
PAIR = ["--protocol", "crd", "--kd_mode"]


def step(distiller, batch, weight=1.0):
    phase, weights = distiller.phases[0], toys.weights(distiller, weight)
    optimizer = torch.optim.SGD(distiller.param_groups(phase), lr=0.0)
    batch = distiller.batch(**batch.tensors())
    return train_kd.train_step(distiller, phase, optimizer, batch, weights, CPU)


# --- the classifiers ------------------------------------------------------------------------------


FAMILIES = ["resnet8", "wrn_16_1", "vgg8", "ResNet18", "MobileNetV1", "MobileNetV2"]
FAMILIES += ["ShuffleV1", "ShuffleV2", "torchvision/mobilenet_v2", "torchvision/resnet18"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_classifier_and_what_it_is_fed(name):
    net = Weights(name).build(7, 1, 32)
    x = network.Tapped(net.eval(), ("last", "feat"))(torch.randn(2, 3, 32, 32))
    assert isinstance(x.classifier, torch.nn.Linear)
    torch.testing.assert_close(x.classifier(x.feat), x.out)
    torch.testing.assert_close(x.last.mean((2, 3)), x.feat)


# --- logits, standardised -------------------------------------------------------------------------


def test_logits_are_standardised_first():
    distiller, batch = toys.distiller("st"), toys.batch(dtype=torch.float32)
    distiller.added[0].standardise = True
    s, t = distiller.student(batch.img), distiller.teacher(batch.img)
    found = distiller.added[0](s, t, batch)
    expected = distiller.added[0].loss(standardise(s.out), standardise(t.out))
    torch.testing.assert_close(found, expected)
    assert METHODS["lskd"].build(s, t, None, dict(T=4.0))(s.out, t.out) == expected


def test_logit_stand_is_for_logits(distil, capsys):
    for mode in ("st", "mlkd"):
        distil(mode, "--logit_stand", "--dry_run")
    with ends(capsys, "--logit_stand", "at"):
        distil("st+at", "--logit_stand", "--dry_run")


# --- two views ------------------------------------------------------------------------------------


def test_both_views_are_forwarded_and_have_a_cross_entropy():
    distiller, batch = toys.distiller("mlkd"), toys.batch(dtype=torch.float32, strong=True)
    step(distiller, batch, 0.0)
    found = [p.grad.clone() for p in distiller.student.net.parameters()]
    outs = [distiller.student.net(x) for x in (batch.img, batch.strong)]
    expected = distiller.lambda_ce * sum(F.cross_entropy(out, batch.target) for out in outs)
    expected = torch.autograd.grad(expected, [*distiller.student.net.parameters()])
    torch.testing.assert_close(found, [*expected], rtol=1e-4, atol=1e-6)
    kd = step(distiller, batch)["kd"]
    other = copy.copy(batch)
    other.strong = batch.strong.flip(3)
    assert step(distiller, other)["kd"] != kd


def test_files_read_one_by_one_have_no_second_view(tmp_path, capsys):
    root = tmp_path / "images"
    for split, kind in product(("train", "test"), "ab"):
        (root / split / kind).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (110, 110), (i, 0, 0)).save(root / split / kind / f"{i}.png")
    argv = ["--kd_mode", "crld", "--t_name", "resnet14", "--s_name", "resnet8", "--cuda", "0"]
    argv += ["--data_name", "imagefolder", "--img_root", str(root), "--img_size", "100"]
    net = network.build("resnet14", 2)
    torch.save(dict(net=net.state_dict()), tmp_path / "t.pth")
    argv += ["--t_model", str(tmp_path / "t.pth"), "--save_root", str(tmp_path / "runs")]
    with ends(capsys, "--kd_mode", "crld", 96):
        train_kd.main([*argv, "--batch_size", "2", "--workers", "0"])


# --- the epoch ------------------------------------------------------------------------------------


def test_the_epoch_is_told_in_the_protocol_s_number():
    distiller = toys.distiller("ctkd")
    recipe = Namespace(protocol="crd")
    for done, place in ((0.0, 1), (0.5, 121), (0.999, 240)):
        schedule.loss_weights(distiller, distiller.phases[0], done, recipe)
        assert (distiller.epoch, distiller.epochs) == (place, 240)
    for module in (distiller.student.net, distiller.teacher.net, distiller.added):
        module.double().eval()
    batch, (theta,) = distiller.batch(**toys.batch().tensors()), distiller.added.parameters()
    s, t = (side.net(batch.img) for side in (distiller.student, distiller.teacher))
    loss = copy.deepcopy(distiller.added[0].loss)
    values = []
    for shift in (1e-4, -1e-4):  # the derivative in theta, by differences
        loss.theta.data.fill_(1.0 + shift)
        values.append(loss(s, t, 5.0).item())
    plain = (values[0] - values[1]) / 2e-4
    for place, factor in ((1, -0.0245), (5, -0.5), (10, -1.0), (200, -1.0)):
        distiller.set_epoch(place, 240)
        optimizer = torch.optim.SGD(distiller.param_groups(distiller.phases[0]), lr=0.0)
        distiller.student.net.eval()
        train_kd.train_step(
            distiller, distiller.phases[0], optimizer, batch, toys.weights(distiller), CPU
        )
        assert theta.grad.item() == pytest.approx(factor * plain, rel=1e-2)


def test_only_the_transport_fades():
    distiller, batch = toys.distiller("wkd_l"), toys.batch(dtype=torch.float32)
    kd = distiller.added[0].loss
    kd.cost.copy_(1 - torch.eye(5))
    values = {}
    for place in (1, 150, 195, 240):
        distiller.set_epoch(place, 240)
        values[place] = step(distiller, batch)["kd"].item()
    target = values[240]
    assert values[1] == values[150] > target
    assert values[195] - target == pytest.approx((values[1] - target) / 2, rel=1e-3)
    assert [fading_from(FADES)(x, 240) for x in (1, 150, 195, 240)] == pytest.approx([1, 1, 0.5, 0])


# --- a look at all training images ----------------------------------------------------------------


@pytest.mark.parametrize("what", ["positions", "pooled", "logits"])
def test_distances_of_the_classes(what):
    train = toys.images(n=23)
    distiller = toys.distiller("wkd_l", train=train, argv=["--measured", what])
    lines = []
    distiller.precompute(train, lines.append)
    assert lines == ["wkd_l: distances of the classes from 4 training images each"]
    cost = distiller.added[0].loss.cost
    tapped = network.Tapped(distiller.teacher.net.eval(), ("last", "feat"))
    features = []
    for k in range(5):
        own = [i for i in range(23) if train.labels[i] == k][:4]
        x = tapped(torch.cat([list(stream.test_batches(train, 1))[i][0] for i in own]))
        x = dict(positions=x.last.permute(0, 2, 3, 1).flatten(0, 2), pooled=x.feat, logits=x.out)[
            what
        ]
        features.append(x)
    torch.testing.assert_close(cost, cka_cost(torch.stack(features), 1.0), rtol=1e-4, atol=1e-5)
    assert torch.equal(cost, cost.T) and not cost.diag().any() and (cost >= 0).all()


@pytest.mark.slow
def test_classes_are_looked_at_once(distil, capsys):
    argv = ["wkd_l", "--epochs", "2", "--batch_size", "256"]
    epoch = Run.epoch

    def stop(self, *args, **kwargs):
        epoch(self, *args, **kwargs)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "epoch", stop)
        with pytest.raises(SystemExit):
            distil(*argv)
    distil(*argv, "--resume")
    assert capsys.readouterr().out.count("distances of the classes") == 1


# --- whole batches, no weight decay ---------------------------------------------------------------


def test_a_smaller_batch_is_left_out():
    distiller = toys.distiller("semckd")
    assert step(distiller, toys.batch(dtype=torch.float32))["kd"] > 0
    assert step(distiller, toys.batch(6, dtype=torch.float32))["kd"] == 0
    chosen = toys.parse(["--kd_mode", "semckd+st"], batch=32)[1]
    assert chosen["semckd"].flags["batch"] == 32 and "batch" not in chosen["st"].flags


def test_parameters_that_do_not_decay():
    recipe = Namespace(lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=0)
    distiller = toys.distiller("vkd")
    groups = utils.sgd(distiller.param_groups(distiller.phases[0]), recipe).param_groups
    own = {id(p) for p in distiller.added.parameters()}
    assert [group["weight_decay"] for group in groups] == [5e-4, 0.0]
    assert {id(p) for p in groups[1]["params"]} == own
    assert not own & {id(p) for p in groups[0]["params"]}
    groups = toys.distiller("vid").param_groups(distiller.phases[0])
    assert len(utils.sgd(groups, recipe).param_groups) == 1


# --- a student with the teacher's classifier ------------------------------------------------------


@pytest.mark.slow
def test_the_deployed_student(distil, tmp_path, capsys):
    result = distil("simkd", "--epochs", "2", "--batch_size", "128", "--amp", "off")
    file = f"{result['dir']}/checkpoint.pth.tar"
    log = capsys.readouterr().out
    assert "trained and evaluated: simkd:resnet8:64:64:2:3:3," in log
    found = find_weights(None, file, "net_name", "MODEL")
    assert found.name == "simkd:resnet8:64:64:2:3:3"
    net = found.build(10, 1, 12).eval()
    img = torch.randn(4, 3, 12, 12)
    fm = network.Tapped(net.net, ("last",))(img).last
    torch.testing.assert_close(
        net(img), net.classifier(net.projector.project(fm, (3, 3)).mean((2, 3)))
    )
    names = {key.split(".")[0] for key, _ in net.named_parameters()}
    assert names == {"net", "projector", "classifier"}
    assert not any(key.startswith("net.fc") for key in net.state_dict())
    score = eval_tool.main([file, "--cuda", "0", "--amp", "off"])
    assert score["top1"] == pytest.approx(result["last"], abs=0.01)
    argv = ["--kd_mode", "at+pkt", "--t_model", file, "--s_name", "resnet8", "--cuda", "0"]
    train_kd.main([*argv, "--epochs", "1", "--save_root", str(tmp_path), "--note", "next"])


@pytest.mark.parametrize(
    "name, named",
    [
        ("simkd:resnet8:64", ["simkd:resnet8:64"]),
        ("simkd:resnet8:64:64:2:a:8", ["simkd:resnet8:64:64:2:a:8"]),
        ("simkd:resnet9:64:64:2:8:8", ["resnet9", "resnet8"]),
        ("simkd:resnet8:64:64:0:8:8", ["simkd:resnet8:64:64:0:8:8"]),
    ],
)
def test_a_wrong_name_of_one(name, named):
    with refused(*named):
        foreign.build(name, 10, 32)


# --- what the authors set by pair -----------------------------------------------------------------


@pytest.mark.parametrize(
    "mode, pair, weight, flags",
    [
        ("lskd", ("vgg13", "vgg8"), 9.0, dict(T=3.0)),
        ("lskd", ("resnet110", "resnet20"), 12.0, dict(T=4.0)),
        ("lskd", ("resnet56", "resnet20"), 9.0, dict(T=2.0)),
        ("catkd", ("resnet32x4", "resnet8x4"), 15.0, dict(resolution=2, normalize=False)),
        ("catkd", ("resnet32x4", "ShuffleV2"), 600.0, dict(resolution=4, normalize=True)),
        ("wkd_l", ("resnet32x4", "resnet8x4"), 1.0, dict(T=8.0, weight=600.0)),
        ("wkd_l", ("wrn_40_2", "ShuffleV1"), 1.0, dict(T=6.0, weight=200.0)),
        ("wkd_f", ("resnet32x4", "resnet8x4"), 0.08, dict(ratio=4.0, grid=1)),
        ("wkd_f", ("wrn_40_2", "ShuffleV1"), 0.3, dict(ratio=3.0, grid=4)),
        ("semckd", ("vgg13", "vgg8"), 400.0, {}),
        ("ctkd", ("vgg13", "vgg8"), 0.9, dict(t_end=20.0, loops=10.0)),
        ("nkd", ("vgg13", "vgg8"), 1.0, dict(gamma=3.5, T=3.0)),
    ],
)
def test_settings_by_pair(mode, pair, weight, flags):
    row = toys.parse([*PAIR, mode], *pair)[1][mode]
    assert row.lambda_kd == weight and flags.items() <= row.flags.items()


def test_settings_on_imagenet():
    rows = toys.parse(["--protocol", "mdistiller-imagenet", "--kd_mode", "dist+nkd+rld+wsld"])[1]
    assert rows["dist"].flags["T"] == 1.0 and rows["nkd"].flags["gamma"] == 1.5
    assert rows["rld"].flags["beta"] == 0.5 and rows["rld"].ramp(1, 100) == 1.0
    assert (rows["wsld"].lambda_kd, rows["wsld"].flags["T"]) == (2.5, 2.0)
