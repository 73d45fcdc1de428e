"""Every setting that a run resolves: methods x protocols x published pairs, as recorded in
tests/data/settings.json.gz; where each comes from; flags that would have no effect.

A published setting that changes on purpose: `python tests/test_settings.py` records again, and
docs/methods.md says what it was before.
"""

import gzip
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import toys  # noqa: E402

import train_kd  # noqa: E402
from engine import cli, published  # noqa: E402
from engine.settings import batch_size, settings  # noqa: E402
from kd_losses import METHODS  # noqa: E402

FILE = ROOT / "tests" / "data" / "settings.json.gz"
EPOCHS = (1, 2, 5, 10, 11, 20, 21, 30, 31, 63, 64, 80, 100)


def pairs() -> list[tuple[str, str]]:
    """Every pair of networks that a protocol names, the pairs of the tables, an unknown one."""
    found = {("resnet14", "resnet8"), ("torchvision/resnet34", "torchvision/resnet18")}
    for by_mode in published.SETTINGS.values():
        for fields in by_mode.values():
            for pair in fields.get("pairs", {}):
                found.add(pair if isinstance(pair, tuple) else ("resnet110", pair))
    tables = "resnet56 resnet20, resnet110 resnet20, resnet110 resnet32, resnet32x4 resnet8x4"
    tables += ", ResNet50 vgg8, resnet32x4 ShuffleV1, resnet32x4 ShuffleV2, wrn_40_2 resnet8x4"
    tables += ", wrn_40_2 MobileNetV2, resnet110 resnet110, resnet20 resnet20"
    return sorted(found | {tuple(pair.split()) for pair in tables.split(", ")})


def resolved(mode: str, protocol: str, teacher: str, student: str) -> dict:
    """What a run would have, as plain values."""
    few, many = (settings(mode, protocol, teacher, student, n) for n in (10, 100))
    size = batch_size([mode], protocol)
    epochs = published.PROTOCOLS[protocol].epochs
    flags = {name: value for name, value in few.flags.items() if name != "batch"}
    phases = [
        [
            *(p.name, p.epochs, p.ce, p.kd, p.inputs and p.inputs.feed.__name__, p.weight),
            *(p.trainable, p.lr, p.nesterov),
        ]
        for p in few.phases
    ]
    found = dict(
        lambda_kd=[few.lambda_kd, many.lambda_kd],
        lambda_ce=few.lambda_ce,
        stages=few.stages,
        reduce=few.reduce,
        adapter=few.adapter,
        inputs=few.inputs.feed.__name__,
        phases=phases,
        ramp=[few.ramp(epoch, epochs) for epoch in (*EPOCHS, epochs)],
        teacher_bn=few.teacher_bn,
        taps=dict(few.taps),
        flags=flags,
        recipe=cli.recipe_defaults(protocol, student, size),
    )
    return json.loads(json.dumps(found))


def everything() -> dict:
    """{mode: {protocol: {'': settings, 'teacher -> student': what differs}}}."""
    found = {}
    for mode in METHODS:
        for protocol in published.PROTOCOLS:
            plain = resolved(mode, protocol, "", "")
            own = found.setdefault(mode, {})[protocol] = {"": plain}
            for pair in pairs():
                changed = resolved(mode, protocol, *pair)
                changed = {k: v for k, v in changed.items() if v != plain[k]}
                if changed:
                    own[" -> ".join(pair)] = changed
    return found


@pytest.fixture(scope="module")
def recorded():
    return json.loads(gzip.decompress(FILE.read_bytes()))


def test_no_published_setting_changes_by_accident(recorded):
    now = everything()
    assert set(recorded) <= set(now)
    for mode, by_protocol in recorded.items():
        for protocol, by_pair in by_protocol.items():
            assert now[mode][protocol] == by_pair, (mode, protocol)


def test_every_value_says_where_it_comes_from():
    found = settings("dkd", "crd", "wrn_40_2", "wrn_16_2", 100, dict(T=3.0))
    assert found.flags == dict(alpha=1.0, beta=6.0, T=3.0)
    origin = {name: found.origin[name] for name in ("alpha", "beta", "T", "lambda_kd")}
    assert origin == dict(
        alpha="default", beta="crd, wrn_40_2 -> wrn_16_2", T="flag", lambda_kd="default"
    )
    assert settings("crd", "kdzoo", "", "", 10).origin["lambda_kd"] == "10 classes"
    lskd = settings("lskd", "crd", "resnet8", "MobileNetV2", 100)
    assert (lskd.flags["T"], lskd.origin["T"]) == (3.0, "crd, student MobileNetV2")
    assert settings("ofd", "mdistiller-imagenet", "", "", 1000).origin["margin"] == "crd"


def test_the_log_and_args_json_say_it_too(distil, tmp_path):
    folder = Path(distil("dkd", "--epochs", "1", "--protocol", "crd", "--T", "3")["dir"])
    args = json.loads((folder / "args.json").read_text())
    assert args["origins"]["dkd"] == dict(
        lambda_kd="default", lambda_ce="default", alpha="default", beta="default", T="flag"
    )
    assert "T 3.0 (flag)" in (folder / "log.txt").read_text()


def test_settings_do_not_change():
    found = settings("dkd", "crd", "", "", 100)
    with pytest.raises(TypeError):
        found.flags["T"] = 1.0
    with pytest.raises(AttributeError):
        found.lambda_kd = 1.0


def help_of(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as stop:
        train_kd.main([*argv, "--help"])
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_shows_the_defaults_that_would_run(capsys, base):
    argv = ["--kd_mode", "dkd", "--protocol", "crd", "--s_name", "resnet20"]
    text = help_of(capsys, *argv, "--t_name", "resnet56")
    assert "(default 2.0: crd, resnet56 -> resnet20)" in text
    assert "(default 0.05)" in text and "(default 64)" in text
    text = help_of(capsys, *argv, "--t_name", "resnet110")
    assert "(default 8.0)" in text and "crd," not in text.split("--kd_mode dkd:")[1].split(" --")[2]
    teacher = str(base / "resnet14" / "model_best.pth.tar")
    text = help_of(capsys, "--kd_mode", "crd", "--t_model", teacher, "--s_name", "resnet8")
    assert "(default 0.2: 10 classes)" in text
    text = help_of(capsys, "--kd_mode", "st+at")
    assert "--st.T" not in text.replace("--T X, --st.T", "") and "(default 1.0: several" in text


@pytest.mark.parametrize(
    "argv, names",
    [
        ("--kd_mode cc+dist --gamma 0.9", ("--gamma", "--cc.gamma", "--dist.gamma")),
        ("--kd_mode srrl+wkd_l --weight 1", ("--srrl.weight", "--wkd_l.weight")),
        ("--kd_mode at+sp --stages 2", ("--at.stages", "--sp.stages")),
        ("--kd_mode st --stages 2", ("--stages", "st")),
        ("--kd_mode st --reduce sum", ("--reduce", "st")),
        ("--kd_mode irg --reduce sum", ("--reduce", "irg")),
        ("--kd_mode st --adapter regressor", ("--adapter", "st")),
        ("--kd_mode st+dkd --adapter size", ("--adapter", "st")),
        ("--kd_mode simkd --lambda_ce 3", ("--lambda_ce", "simkd")),
        ("--kd_mode cc --feat_dim 3", ("--feat_dim", "--relation")),
        ("--kd_mode cc --protocol crd --gamma 3", ("--gamma", "--relation")),
        ("--kd_mode sdd --beta 3", ("--beta", "--inner")),
        ("--kd_mode ft --stages 1,2", ("--stages", "ft")),
        ("--kd_mode at --T 3", ("--T", "st", "dkd")),
    ],
)
def test_a_flag_that_would_have_no_effect_is_refused(argv, names, distil, capsys):
    mode, *flags = argv.split()[1:]
    with pytest.raises(SystemExit) as stop:
        distil(mode, *flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert all(name in error for name in names), error


def test_a_flag_of_one_method_of_several():
    argv = ["--kd_mode", "cc+dist+at", "--cc.gamma", "0.9", "--p", "3", "--at.stages", "2"]
    chosen = toys.parse(argv)[1]
    assert chosen["cc"].flags["gamma"] == 0.9 and chosen["dist"].flags["gamma"] == 1.0
    assert chosen["at"].flags["p"] == 3.0 and chosen["at"].stages == (2,)
    assert chosen["cc"].lambda_ce == chosen["dist"].lambda_ce == 1.0


if __name__ == "__main__":
    text = json.dumps(everything(), separators=(",", ":"), sort_keys=True)
    FILE.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{FILE}: {FILE.stat().st_size} bytes")
