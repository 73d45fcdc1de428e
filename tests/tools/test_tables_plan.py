import json
import shutil

import pytest
import toys
from messages import refused
from PIL import Image

import train_base
import utils
from engine import cli, folders, kd_cli, published, schedule
from tools import tables, tables_plan


# --- published.csv --------------------------------------------------------------------------------


def figure(table, teacher, student, method, data="cifar100"):
    return [
        row["value"]
        for row in tables_plan.figures_of(table)
        if [tables_plan.short(row[side]) for side in tables_plan.SIDES] == [teacher, student]
        and row["method"] == method
        and (row["data"], row["metric"]) == (data, "top1")
    ]


@pytest.mark.parametrize(
    "where, value",
    [
        (("kdzoo-r20-r20", "resnet20", "resnet20", "AT", "cifar10"), "92.89"),
        (("kdzoo-dml", "resnet110", "resnet20", "DML (net1)", "cifar10"), "94.45"),
        (("kdzoo-dml", "resnet110", "resnet20", "DML (net2)", "cifar10"), "92.92"),
        (("crd", "wrn_40_2", "wrn_16_2", "CRD"), "75.48"),
        (("crd", "wrn_40_2", "wrn_40_1", "FSP"), "N/A"),
        (("crd", "resnet32x4", "resnet8x4", "Teacher"), "79.42"),
        (("mdistiller", "resnet32x4", "ShuffleV2", "DKD"), "77.07"),  # printed as MobileNet-V2
        (
            ("knowledgereview", "resnet50", "resnet18", "ReviewKD, weight 10"),
            "83.130",
        ),
        (("imagenet-r50-mv1", "resnet50", "MobileNetV1", "ReviewKD", "imagenet"), "72.56"),
        (("sota", "resnet32x4", "resnet8x4", "MLKD"), "77.08"),
        (("sota", "wrn_40_2", "ShuffleV1", "WKD-F"), "77.36"),
        (("sota", "ResNet50", "MobileNetV2", "ITRD"), "71.34"),
        (("sota", "resnet32x4", "wrn_40_2", "KD+LS"), "77.92"),
        (("sota", "vgg13", "vgg8", "ICKD-C without KD"), "73.42"),
        (("sota", "resnet32x4", "ShuffleNetV2_1.5", "SimKD, factor 8"), "78.96"),
    ],
)
def test_published_figures(where, value):
    assert figure(*where)[0] == value


def test_a_row_that_repeats_another_is_corrected_with_a_note():
    pair = "resnext101_32x8d", "mobilenet_v2", "ReviewKD, weight 6"
    assert figure("knowledgereview", *pair)[0] == "84.200"
    rows = tables_plan.figures_of("knowledgereview")
    rows = [r for r in rows if (r["value"], tables_plan.short(r["teacher"])) == ("84.520", pair[0])]
    assert rows and all("repeats" in row["note"] for row in rows)


def test_the_numbers_of_pairs():
    pairs = {
        name: len({row[:2] for row in tables_plan.rows_of(name, "cifar100", None, None) if row[0]})
        for name in ("crd", "mdistiller", "knowledgereview", "sota")
    }
    assert pairs == dict(crd=13, mdistiller=11, knowledgereview=6, sota=17)


# --- recipes --------------------------------------------------------------------------------------


def dry(capsys, name, *flags) -> dict:
    """{folder: (recipe, command)} of `run --dry_run`."""
    tables.main(["run", name, "--dry_run", *flags])
    lines = capsys.readouterr().out.splitlines()
    commands = [line.split() for line in lines[1::2]]
    notes = [c[c.index("--save_root") + 1].split("/")[-1] + "/" + c[-1] for c in commands]
    return {n: (recipe, " ".join(c)) for n, recipe, c in zip(notes, lines[::2], commands)}


KDZOO = ["lr 0.1, falls after (100, 150)", "(Nesterov)", "weight decay 0.0001", "batch 128"]
CRD = [
    "240 epochs",
    "falls after (150, 180, 210), momentum 0.9,",
    "weight decay 0.0005",
    "batch 64",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "table, row, parts",
    [
        ("kdzoo-r20-r20", "cifar10-200ep/base-resnet20-1", ["200 epochs", *KDZOO, "reflect"]),
        ("kdzoo-r20-r20", "resnet20-resnet20/st-1", ["lambda_kd 0.1, lambda_ce 1.0, T 4.0"]),
        ("kdzoo-r20-r20", "resnet20-resnet20/at-1", ["1000.0", "stages all, reduce mean"]),
        ("kdzoo-r20-r20", "resnet20-resnet20/crd-1", ["lambda_kd 0.2", "nce_t 0.1", "nce_n 16384"]),
        ("kdzoo-r20-r20", "resnet20-resnet20/sp-1", ["3000.0", "stages all, reduce mean"]),
        ("kdzoo-r20-r20", "resnet20-resnet20/fitnet-1", ["lambda_kd 0.1", "stages (-1,)"]),
        ("kdzoo-r20-r20", "resnet20-resnet20/fsp-1", ["phases init 50 + train 200"]),
        ("kdzoo-r20-r20", "resnet20-resnet20/ft-1", ["phases paraphrase 30 + distil 200"]),
        ("kdzoo-r20-r20", "resnet20-resnet20/bss-1", ["lambda_kd 2.0", "T 3.0", "attack_size 32"]),
        (
            "crd",
            "resnet32x4-resnet8x4/st-1",
            [*CRD, "lr 0.05", "lambda_kd 0.9, lambda_ce 0.1", "zero"],
        ),
        ("crd", "resnet32x4-ShuffleV1/st-1", [*CRD, "lr 0.01"]),
        ("crd", "vgg13-MobileNetV2/crd-1", [*CRD, "lr 0.01", "lambda_kd 0.8", "nce_t 0.07"]),
        ("crd", "resnet56-resnet20/sp-1", ["3000.0", "stages (-1,)"]),
        ("crd", "resnet56-resnet20/at-1", ["1000.0", "absolute False", "stages all, reduce sum"]),
        ("crd", "resnet56-resnet20/nst-1", ["lambda_kd 50.0", "stages all, reduce sum"]),
        ("crd", "resnet56-resnet20/fitnet-1", ["lambda_kd 100.0", "stages (2,)"]),
        ("crd", "resnet56-resnet20/pkt-1", ["lambda_kd 30000.0"]),
        (
            "crd",
            "resnet56-resnet20/cc-1",
            ["lambda_kd 0.02", "relation neighbours", "feat_dim 128"],
        ),
        ("crd", "resnet56-resnet20/ft-1", ["factor spatial", "paraphrase 30 + distil 240"]),
        ("crd", "resnet56-resnet20/ab-1", ["init 30 + train 240", "m 1.0", "reduce sum"]),
        ("mdistiller", "resnet56-resnet20/dkd-1", ["alpha 1.0, beta 2.0, T 4.0"]),
        ("mdistiller", "resnet32x4-resnet8x4/dkd-1", ["beta 8.0"]),
        ("mdistiller", "vgg13-MobileNetV2/dkd-1", ["lr 0.01", "beta 6.0"]),
        ("mdistiller", "ResNet50-MobileNetV2/dkd-1", ["beta 8.0"]),
        ("sota", "resnet32x4-resnet8x4/wkd_l-1", [*CRD, "weight 600.0", "measured positions"]),
        ("sota", "wrn_40_2-ShuffleV1/wkd_f-1", ["lambda_kd 0.3", "ratio 3.0, grid 4", "lr 0.01"]),
        ("sota", "resnet32x4-ShuffleV1/catkd-1", ["lambda_kd 600.0", "4, normalize True"]),
        (
            "reviewkd",
            "resnet56-resnet20/reviewkd-1",
            ["lambda_kd 0.6", "(151, 181, 211)", "batch 128"],
        ),
        ("reviewkd", "resnet32x4-ShuffleV2/reviewkd-1", ["lambda_kd 8.0", "lr 0.02", "(Nesterov)"]),
        ("reviewkd", "wrn_40_2-wrn_16_2/reviewkd-1", ["lambda_kd 5.0", "lr 0.1", "0.0005"]),
    ],
)
def test_recipes_as_published(table, row, parts, capsys):
    recipe, _ = dry(capsys, table)[row]
    for part in parts:
        assert part in recipe


IMAGENET = ["100 epochs", "falls after (30, 60, 90), momentum 0.9,", "weight decay 0.0001"]
KNOWLEDGE = ["100 epochs", "lr 0.05", "falls after (30, 60, 90)", "batch 128, warm-up 5"]


@pytest.mark.parametrize(
    "table, row, parts",
    [
        ("r34-r18", "st", [*IMAGENET, "lr 0.2", "batch 512", "kd 0.5, lambda_ce 0.5, T 1.0"]),
        ("r34-r18", "at", [*IMAGENET, "lr 0.2", "batch 512", "lambda_kd 1000.0", "p 2.0"]),
        ("r34-r18", "dkd", [*IMAGENET, "batch 512", "alpha 1.0, beta 0.5, T 1.0"]),
        ("r34-r18", "crd", [*IMAGENET, "lr 0.1", "batch 256", "lambda_kd 0.8", "nce_t 0.07"]),
        ("r34-r18", "reviewkd", ["lr 0.1", "batch 256", "lambda_kd 1.0", "512, s_preact True"]),
        ("r50-mv1", "st", [*IMAGENET, "lr 0.2", "batch 512", "kd 0.5, lambda_ce 0.5, T 1.0"]),
        ("r50-mv1", "dkd", [*IMAGENET, "lr 0.2", "batch 512", "beta 2.0, T 1.0"]),
        ("r50-mv1", "ofd", ["lr 0.05", "batch 128", "lambda_kd 0.0001", "margin bn", "reduce sum"]),
        ("r50-mv1", "crd", ["lr 0.1", "batch 256", "lambda_kd 0.8", "nce_t 0.07"]),
        ("r50-mv1", "reviewkd", ["lr 0.1", "batch 256", "lambda_kd 8.0", "mid_channel 256"]),
    ],
)
def test_imagenet_recipes(table, row, parts, capsys):
    teacher = "torchvision/resnet34" if table == "r34-r18" else "torchvision/resnet50"
    found = dry(capsys, f"imagenet-{table}", "--methods", row)
    ((recipe, command),) = found.values()
    assert f"--t_name {teacher}" in command and "--t_pretrained" in command
    assert "Nesterov" not in recipe and "warm-up" not in recipe
    for part in parts:
        assert part in recipe


@pytest.mark.parametrize(
    "row, parts",
    [
        ("base-resnet50-1", [*KNOWLEDGE, "label smoothing 0.1", "weight decay 0.0001"]),
        ("resnet50-mobilenet_v2/reviewkd-1", [*KNOWLEDGE, "lambda_kd 7.0", "weight decay 4e-05"]),
        ("resnet152-mobilenet_v2/reviewkd-1", ["lambda_kd 8.0", "weight decay 4e-05"]),
        ("resnext101_32x8d-mobilenet_v2/reviewkd-1", ["lambda_kd 6.0"]),
        ("resnet50-resnet18/reviewkd-1", ["lambda_kd 10.0", "weight decay 0.0001"]),
        ("resnet152-resnet50/reviewkd-1", ["lambda_kd 6.0"]),
        ("resnext101_32x8d-resnet50/reviewkd-1", ["lambda_kd 6.0"]),
    ],
)
def test_knowledgereview_s_recipes(row, parts, capsys):
    found = {
        key.removeprefix("cifar100-100ep/"): x for key, x in dry(capsys, "knowledgereview").items()
    }
    recipe, command = found[row]
    for part in parts:
        assert part in recipe
    assert ("label smoothing" in recipe) == row.startswith("base")
    assert "pretrained" in command and "Nesterov" not in recipe


def test_protocols_at_224_pixels():
    """ReviewKD's ImageNet scripts: learning rate by batch size, image size, constants, no ramp."""
    argv = ["--kd_mode", "reviewkd", "--protocol", "reviewkd-imagenet", "--data_name", "imagenet"]
    args, rows = toys.parse(argv, "torchvision/resnet50", "MobileNetV1")
    recipe = toys.cfg(args, "MobileNetV1")
    assert (recipe.lr, recipe.batch_size, recipe.epochs, recipe.img_size) == (0.1, 256, 100, 224)
    assert recipe.mean_std == published.IMAGENET
    row = rows["reviewkd"]
    assert (row.lambda_kd, row.flags["mid_channel"], row.ramp(1, 100)) == (8.0, 256, 1.0)
    _, rows = toys.parse(argv, "torchvision/resnet34", "torchvision/resnet18")
    assert (rows["reviewkd"].lambda_kd, rows["reviewkd"].flags["mid_channel"]) == (1.0, 512)
    # eight GPUs with 64 images each
    args, rows = toys.parse([*argv, "--batch_size", "512"], "x", "y")
    assert toys.cfg(args, "y").lr == pytest.approx(0.2)
    args, rows = toys.parse(["--kd_mode", "dkd", "--protocol", "mdistiller-imagenet"], "x", "y")
    assert rows["dkd"].ramp(1, 100) == 1.0
    argv = ["--net_name", "torchvision/resnet18", "--data_name", "cifar100"]
    recipe = train_base.resolve(train_base.parse([*argv, "--protocol", "knowledgereview"]))
    assert recipe.img_size == 224 and recipe.mean_std == ((0.45,) * 3, (0.225,) * 3)
    rates = [utils.step_decay(0.05, e, recipe.milestones, recipe.warmup) for e in (1, 5, 30, 31)]
    assert rates == pytest.approx([0.01, 0.05, 0.05, 0.005])


def test_crd_lacks_nesterov_and_teaches_from_the_last_epoch(capsys):
    recipe, command = dry(capsys, "crd")["resnet56-resnet20/st-1"]
    assert "Nesterov" not in recipe and "base-resnet56-1/checkpoint.pth.tar" in command
    _, command = dry(capsys, "kdzoo-r110-r20")["resnet110-resnet20/st-1"]
    assert "base-resnet110-1/model_best.pth.tar" in command


def test_ft_s_first_phase_has_the_learning_rate_of_the_student(capsys):
    """RepDistiller: 0.01 for ResNets, the student's learning rate for others."""
    for student, lr in (("resnet8x4", 0.01), ("ShuffleV1", 0.01), ("vgg8", 0.05)):
        argv = ["--kd_mode", "ft", "--protocol", "crd", "--data_name", "cifar100"]
        args, rows = toys.parse(argv, "resnet32x4", student)
        recipe = cli.resolve(args, student, {})
        phase = rows["ft"].phases[0]
        assert schedule.learning_rate(phase, 3, 30, recipe) == pytest.approx(lr)
        args, rows = toys.parse([*argv[:1], "ab", *argv[2:]], "resnet32x4", student)
        rate = schedule.learning_rate(rows["ab"].phases[0], 29, 30, recipe)
        assert rate == recipe.lr  # constant; KD-Zoo's learning rate falls


@pytest.mark.slow
def test_the_scripts_accept_every_command_of_a_dry_run(capsys):
    for name, table in tables_plan.TABLES.items():
        flags = [] if table.data else ["--data", "digits"]
        if table.protocol is None:
            continue
        for _, command in dry(capsys, name, *flags).values():
            script, *argv = command.split()[1:]
            kd_cli.parse(argv, "") if script == "train_kd.py" else train_base.parse(argv)


def test_given_flags_beat_the_pair_s():
    argv = ["--kd_mode", "dkd", "--protocol", "crd", "--beta", "3"]
    assert toys.parse(argv, "vgg13", "vgg8")[1]["dkd"].flags["beta"] == 3
    argv = ["--kd_mode", "reviewkd", "--protocol", "crd", "--lambda_kd", "2"]
    assert toys.parse(argv, "resnet56", "resnet20")[1]["reviewkd"].lambda_kd == 2
    assert toys.parse(["--kd_mode", "dkd"], "vgg13", "vgg8")[1]["dkd"].flags["beta"] == 8


# --- data -----------------------------------------------------------------------------------------


def pictures(root, color=0):
    for split in ("train", "test"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in range(2):
                image = Image.new("RGB", (6, 6), (color, i, 0))
                image.save(root / split / name / f"{color}-{i}.png")
    return root


def test_two_image_folders_of_one_name_are_two_data_sets(tmp_path):
    """A folder that was moved is still the same data set."""
    one, other = pictures(tmp_path / "one" / "imgs"), pictures(tmp_path / "other" / "imgs", 9)

    def name(root):
        argv = ["run", "small", "--data", "imagefolder", "--img_root", str(root), "--epochs", "2"]
        return tables_plan.setting(tables.parse(argv), tables_plan.TABLES["small"])

    names = name(one), name(other)
    assert names[0] != names[1] and names[0].startswith("imgs-") and names[0].endswith("-2ep")
    moved = shutil.copytree(one, tmp_path / "moved" / "imgs")
    assert name(moved) == names[0]
    (moved / "train" / "a" / "more.png").write_bytes((one / "train/a/0-0.png").read_bytes())
    assert name(moved) not in names


def test_another_imagenet_is_refused(tmp_path):
    one, other = pictures(tmp_path / "one"), pictures(tmp_path / "other", 9)
    folder = tmp_path / "runs" / "base-x-1"
    folder.mkdir(parents=True)
    data = folders.folder_identity(one, folders.VALIDATED)
    (folder / "args.json").write_text(json.dumps(dict(sources=dict(data=data))))
    tables_plan.same_images(tmp_path / "runs", str(one))
    with refused(tmp_path / "runs", other, "--runs"):
        tables_plan.same_images(tmp_path / "runs", str(other))
