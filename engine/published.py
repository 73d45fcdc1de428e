"""The training recipes of the published tables."""

from dataclasses import dataclass, field, replace

CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


ZOO_CIFAR100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


CRD_CIFAR100 = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


REVIEWKD_CIFAR = tuple(
    tuple(round(v / 255, 6) for v in row) for row in ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
)


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


LIGHT = ("MobileNetV2", "ShuffleV1", "ShuffleV2")  # trained at a lower rate


@dataclass(frozen=True)
class Protocol:
    """A training recipe.

    milestones: the epochs after which the learning rate falls to a tenth; scales: whether `lr` is that
    of `batch_size` and grows with another; networks: {name: fields that it changes}; warmup: epochs in
    which the rate grows linearly to `lr`; label_smoothing: of train_base.py alone, for teachers and
    baselines; img_size: None for that of the data.
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
