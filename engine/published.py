"""What the published tables are trained with: PROTOCOLS, the training recipes, and SETTINGS, what a
protocol sets for a method, and for a pair of networks, where it differs from the method's row in
`kd_losses/__init__.py`.

    PROTOCOLS["crd"].lr                  # 0.05
    SETTINGS["crd"]["dkd"]["pairs"]      # {("resnet56", "resnet20"): {"beta": 2.0}, ...}
"""

from dataclasses import dataclass, field, replace

from kd_losses import (
    CRD_INIT,
    constant,
    fading_from,
    paraphrase_first,
    preacts_summed,
    transport_on_imagenet,
    warmup,
)

CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
ZOO_CIFAR100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
CRD_CIFAR100 = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
REVIEWKD_CIFAR = tuple(
    tuple(round(v / 255, 6) for v in row) for row in ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TINY_IMAGENET = (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)
ROTATED = "rotated"  # instead of a padding: no crop, but a rotation by up to 20 degrees

LIGHT = ("MobileNetV2", "ShuffleV1", "ShuffleV2")  # trained at a lower rate


@dataclass(frozen=True)
class Protocol:
    """A training recipe.

    milestones: the epochs after which the learning rate is multiplied by 0.1; scales: whether `lr`
    is that of `batch_size` and grows with another; networks: {name: fields that it changes};
    warmup: epochs in which the rate grows linearly to `lr`; label_smoothing: of train_base.py
    alone, for teachers and baselines; img_size: None for that of the data; padding: of the images
    that are cropped, 'reflect' or 'zero', or ROTATED.
    """

    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float
    batch_size: int
    epochs: int
    milestones: tuple[int, ...]
    padding: str
    constants: dict
    networks: dict = field(default_factory=dict)
    scales: bool = False
    warmup: int = 0
    label_smoothing: float = 0.0
    img_size: int | None = None


IMAGENET_RECIPE = Protocol(
    lr=0.2,
    momentum=0.9,
    nesterov=False,
    weight_decay=1e-4,
    batch_size=512,
    scales=True,
    epochs=100,
    milestones=(30, 60, 90),
    padding="zero",
    constants=dict(imagenet=IMAGENET),
    img_size=224,
)


PROTOCOLS = {
    # Knowledge-Distillation-Zoo's scripts
    "kdzoo": Protocol(
        lr=0.1,
        momentum=0.9,
        nesterov=True,
        weight_decay=1e-4,
        batch_size=128,
        epochs=200,
        milestones=(100, 150),
        padding="reflect",
        constants=dict(cifar10=CIFAR10, cifar100=ZOO_CIFAR100, imagenet=IMAGENET),
    ),
    # the CRD benchmark (RepDistiller), which MDistiller's CIFAR-100 configurations follow
    "crd": Protocol(
        lr=0.05,
        networks={name: dict(lr=0.01) for name in LIGHT},
        momentum=0.9,
        nesterov=False,
        weight_decay=5e-4,
        batch_size=64,
        epochs=240,
        milestones=(150, 180, 210),
        padding="zero",
        constants=dict(cifar10=CIFAR10, cifar100=CRD_CIFAR100, imagenet=IMAGENET),
    ),
    # ReviewKD's CIFAR-100 scripts, which lower the rate one epoch later
    "reviewkd": Protocol(
        lr=0.1,
        networks={name: dict(lr=0.02) for name in LIGHT},
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
        batch_size=128,
        epochs=240,
        milestones=(151, 181, 211),
        padding="zero",
        constants=dict(cifar10=REVIEWKD_CIFAR, cifar100=REVIEWKD_CIFAR, imagenet=IMAGENET),
    ),
    # MDistiller's ImageNet configurations; some methods have a smaller batch
    "mdistiller-imagenet": IMAGENET_RECIPE,
    # MDistiller's Tiny-ImageNet configurations; its KD has the weights of its CIFAR-100 ones
    "mdistiller-tiny-imagenet": Protocol(
        lr=0.2,
        momentum=0.9,
        nesterov=False,
        weight_decay=5e-4,
        batch_size=256,
        epochs=200,
        milestones=(60, 120, 160),
        padding=ROTATED,
        constants={"tiny-imagenet": TINY_IMAGENET},
    ),
    # ReviewKD's ImageNet scripts
    "reviewkd-imagenet": replace(IMAGENET_RECIPE, lr=0.1, batch_size=256),
    # KnowledgeReview: CIFAR-100 at 224 pixels, networks trained on ImageNet before
    "knowledgereview": Protocol(
        lr=0.05,
        momentum=0.9,
        nesterov=False,
        weight_decay=1e-4,
        networks={"torchvision/mobilenet_v2": dict(weight_decay=4e-5)},
        batch_size=128,
        epochs=100,
        milestones=(30, 60, 90),
        warmup=5,
        label_smoothing=0.1,
        padding="zero",
        constants=dict(cifar100=((0.45,) * 3, (0.225,) * 3), imagenet=IMAGENET),
        img_size=224,
    ),
}


def scaled(epochs: int, total: int, protocol: Protocol) -> int:
    """`epochs` of the protocol's number, in a run of `total`: at least one."""
    return max(1, round(epochs * total / protocol.epochs))


# --- settings by protocol, then by method, then by pair of networks -------------------------------
# An entry holds fields of the row (lambda_kd, lambda_ce, stages, reduce, adapter, inputs, ramp,
# phases) and flags of the method by name. Besides:
#   batch_size: instead of the protocol's;
#   teacher_bn: "batch": the teacher's batch norms use the statistics of the batch, as in training
# mode;
#   taps: {network: the modules whose maps are its stages};
#   pairs: the same for a (teacher, student), or for a student with any teacher.

# what a protocol does not set is taken from another one
LIKE = {
    "mdistiller-imagenet": "crd",
    "mdistiller-tiny-imagenet": "crd",
    "reviewkd-imagenet": "reviewkd",
    "knowledgereview": "reviewkd",
}

MOBILE = ("torchvision/resnet50", "MobileNetV1")
R34_R18 = ("torchvision/resnet34", "torchvision/resnet18")

# ReviewKD's CIFAR-100 scripts
REVIEWKD_CIFAR100 = dict(
    lambda_kd=5.0,
    pairs={
        ("resnet56", "resnet20"): dict(lambda_kd=0.6),
        ("resnet110", "resnet32"): dict(lambda_kd=1.0),
        ("resnet32x4", "ShuffleV2"): dict(lambda_kd=8.0),
    },
)
# ReviewKD's ImageNet scripts, which MDistiller follows: the student before its activations
REVIEWKD_IMAGENET = dict(
    lambda_kd=1.0,
    teacher_bn="running",
    ramp=constant,
    mid_channel=512,
    s_preact=True,
    pairs={MOBILE: dict(lambda_kd=8.0, mid_channel=256)},
)
# RepDistiller trains the paraphraser at 0.01: a fifth of a ResNet's rate, all of these students'
OTHER_STUDENTS = (
    *("vgg8", "vgg11", "vgg13", "vgg16", "vgg19"),
    *("MobileNetV2", "ShuffleV1", "ShuffleV2"),
)

# KnowledgeReview's stages: the last block but one of a ResNet is a level of its own, and the
# depthwise convolutions are the levels of MobileNetV2
RESNET_BLOCKS = dict(
    **dict.fromkeys(("resnet18",), 2),
    **dict.fromkeys(("resnet34", "resnet50", "resnet101", "resnet152"), 3),
    **dict.fromkeys(("resnext50_32x4d", "resnext101_32x8d"), 3),
)
REVIEWED = {
    f"torchvision/{name}": ("layer1", "layer2", "layer3", f"layer4.{blocks - 2}", "layer4")
    for name, blocks in RESNET_BLOCKS.items()
} | {
    "torchvision/mobilenet_v2": (
        *(f"features.{i}.conv.1" for i in (3, 6, 13, 17)),
        "features.18",
    )
}

SETTINGS = {
    "kdzoo": {},  # the rows themselves
    "crd": {
        # RepDistiller, scripts/run_cifar_distill.sh, train_student.py and distiller_zoo/
        "st": dict(lambda_ce=0.1, lambda_kd=0.9),
        "at": dict(reduce="sum", absolute=False),
        "fitnet": dict(lambda_kd=100.0, stages=(2,), adapter="regressor+relu"),
        "nst": dict(lambda_kd=50.0, stages=None, reduce="sum"),
        "pkt": dict(lambda_kd=30000.0, eps=1e-7),
        "fsp": dict(reduce="sum", phases=CRD_INIT),
        "ft": dict(
            phases=paraphrase_first(0.2),
            adapter="",
            use_bn="translator",
            factor="spatial",
            init="torch",
            pairs={student: dict(phases=paraphrase_first(1.0)) for student in OTHER_STUDENTS},
        ),
        "ab": dict(
            inputs=preacts_summed,
            lambda_kd=0.003,
            reduce="sum",
            adapter="connector",
            phases=CRD_INIT,
            m=1.0,
        ),
        "sp": dict(stages=(-1,)),
        "cc": dict(lambda_kd=0.02, relation="neighbours"),
        "vid": dict(reduce="sum", eps=1e-5, init="torch"),
        "crd": dict(lambda_kd=0.8, nce_t=0.07),
        # MDistiller, configs/cifar100/
        "ofd": dict(
            inputs=preacts_summed,
            lambda_kd=0.001,
            reduce="sum",
            margin="bn",
            teacher_bn="batch",
        ),
        "reviewkd": REVIEWKD_CIFAR100,
        "dkd": dict(
            pairs={
                ("resnet56", "resnet20"): dict(beta=2.0),
                ("resnet110", "resnet32"): dict(beta=2.0),
                ("wrn_40_2", "wrn_16_2"): dict(beta=6.0),
                ("wrn_40_2", "wrn_40_1"): dict(beta=6.0),
                ("vgg13", "vgg8"): dict(beta=6.0),
                ("vgg13", "MobileNetV2"): dict(beta=6.0),
            }
        ),
        # the authors' own code
        "lskd": dict(
            pairs={
                ("vgg13", "vgg8"): dict(T=3.0),
                ("resnet110", "resnet20"): dict(lambda_kd=12.0, T=4.0),
                ("ResNet50", "MobileNetV2"): dict(lambda_kd=1.0, T=3.0),
                ("resnet32x4", "wrn_16_2"): dict(T=3.0),
                ("resnet32x4", "wrn_40_2"): dict(T=3.0),
                "MobileNetV2": dict(T=3.0),  # of every other teacher
            }
        ),
        "ttm": dict(lambda_kd=45.0),
        "wttm": dict(lambda_kd=4.0),
        "itrd": dict(pairs={("wrn_40_2", "wrn_16_2"): dict(lambda_mutual=1.0, power=1.01)}),
        "catkd": dict(
            pairs={
                ("resnet32x4", "resnet8x4"): dict(lambda_kd=15.0),
                ("wrn_40_2", "wrn_16_2"): dict(lambda_kd=12.0),
                ("wrn_40_2", "wrn_40_1"): dict(lambda_kd=1.5),
                ("resnet56", "resnet20"): dict(lambda_kd=0.7),
                ("resnet110", "resnet32"): dict(lambda_kd=1.8),
                ("vgg13", "vgg8"): dict(lambda_kd=4.5),
                ("vgg13", "MobileNetV2"): dict(lambda_kd=15.0, normalize=True),
                ("ResNet50", "MobileNetV2"): dict(lambda_kd=40.0, normalize=True),
                ("wrn_40_2", "ShuffleV1"): dict(lambda_kd=80.0, resolution=4, normalize=True),
                ("resnet32x4", "ShuffleV1"): dict(lambda_kd=600.0, resolution=4, normalize=True),
                ("resnet32x4", "ShuffleV2"): dict(lambda_kd=600.0, resolution=4, normalize=True),
            }
        ),
        "mlkd": dict(lambda_kd=0.9),
        "wkd_l": dict(pairs={("wrn_40_2", "ShuffleV1"): dict(T=6.0, weight=200.0)}),
        "wkd_f": dict(pairs={("wrn_40_2", "ShuffleV1"): dict(lambda_kd=0.3, ratio=3.0, grid=4)}),
        "semckd": dict(lambda_kd=400.0),
    },
    "reviewkd": {
        # ReviewKD's CIFAR-100 code: the first epoch has weight 0, the teacher is in training mode
        "reviewkd": REVIEWKD_CIFAR100 | dict(ramp=warmup(20, first=0), teacher_bn="batch"),
    },
    "knowledgereview": {
        "reviewkd": dict(
            ramp=constant,
            teacher_bn="running",
            taps=REVIEWED,
            s_preact=True,
            pooled=False,
            pairs={
                tuple(f"torchvision/{name}" for name in pair): fields
                for pair, fields in {
                    ("resnet50", "mobilenet_v2"): dict(lambda_kd=7.0, mid_channel=256),
                    ("resnet152", "mobilenet_v2"): dict(lambda_kd=8.0, mid_channel=256),
                    ("resnext101_32x8d", "mobilenet_v2"): dict(lambda_kd=6.0, mid_channel=256),
                    ("resnet50", "resnet18"): dict(lambda_kd=10.0, mid_channel=512),
                    ("resnet152", "resnet50"): dict(lambda_kd=6.0, mid_channel=512),
                    ("resnext101_32x8d", "resnet50"): dict(lambda_kd=6.0, mid_channel=512),
                }.items()
            },
        ),
    },
    "mdistiller-imagenet": {
        # MDistiller, configs/imagenet/
        "st": dict(lambda_ce=0.5, lambda_kd=0.5, T=1.0),
        "ofd": dict(lambda_kd=0.0001, batch_size=128),
        "crd": dict(batch_size=256),
        "reviewkd": REVIEWKD_IMAGENET | dict(batch_size=256),
        "dkd": dict(T=1.0, beta=0.5, ramp=constant, pairs={MOBILE: dict(beta=2.0)}),
        # the authors' own code, in the same recipe
        "dist": dict(T=1.0),
        "nkd": dict(gamma=1.5, T=1.0),
        "rld": dict(ramp=constant, beta=0.5, T=1.0, pairs={MOBILE: dict(beta=2.0)}),
        "ctkd": dict(lambda_kd=1.0, lambda_ce=1.0, loops=5.0),
        "wsld": dict(lambda_kd=2.5, T=2.0),
        "catkd": dict(
            pairs={
                R34_R18: dict(lambda_kd=0.5, resolution=4),
                MOBILE: dict(lambda_kd=10.0, normalize=True),
            }
        ),
        "mlkd": dict(lambda_kd=0.5, lambda_ce=0.5, base=1.0),
        "wkd_l": dict(
            batch_size=256,
            inputs=transport_on_imagenet,
            T=2.0,
            weight=30.0,
            measured="pooled",
            pairs={MOBILE: dict(weight=25.0, sharpen=2.0)},
        ),
        "wkd_f": dict(
            batch_size=256,
            lambda_kd=0.02,
            ramp=fading_from(0.0),
            ratio=2.0,
            grid=4,
            pairs={MOBILE: dict(lambda_kd=0.005, ramp=fading_from(0.3))},
        ),
        "mgd": dict(lambda_kd=0.00007),
    },
    "mdistiller-tiny-imagenet": {},  # those of "crd"
    "reviewkd-imagenet": {
        "reviewkd": REVIEWKD_IMAGENET,
    },
}


def settings_of(mode: str, protocol: str) -> dict[str, tuple]:
    """What a protocol sets for a method: {name: (value, the protocol that says so)}, 'pairs'
    too."""
    found = settings_of(mode, LIKE[protocol]) if protocol in LIKE else {}
    own = SETTINGS[protocol].get(mode, {})
    return found | {name: (value, protocol) for name, value in own.items()}


def settings_of_pair(mode: str, protocol: str, teacher: str, student: str) -> dict[str, tuple]:
    """The same with what it sets for these two networks: {name: (value, origin)}."""
    found = settings_of(mode, protocol)
    pairs, source = found.pop("pairs", ({}, protocol))
    if (teacher, student) in pairs:
        own, origin = pairs[teacher, student], f"{source}, {teacher} -> {student}"
    else:
        own, origin = pairs.get(student, {}), f"{source}, student {student}"
    return found | {name: (value, origin) for name, value in own.items()}
