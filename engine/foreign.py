"""Networks by name: ours, torchvision's, timm's, one of somebody's own file, and SimKD's
students."""

import importlib.util
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.channels import give_one_channel
from engine.find_taps import ensure_taps
from network import NETWORKS, Tapped, classifier_of
from utils import UserError, brief, first_line, named, printable, shown


def build(
    name: str, num_class: int, img_size: int | None = None, pretrained: bool = False
) -> nn.Module:
    """The network `name` with `num_class` outputs and fresh weights from torch's generator.

    `name`: one of NETWORKS, `torchvision/NAME`, `timm/NAME`, `hf/NAME_OR_FOLDER` or
    `path/to/file.py:function`, called as `function(num_class)`. `img_size`: for networks that
    must know it. `pretrained`: with the library's own weights; their classifier is replaced where
    it has another number of classes.
    Raises UserError if there is no such network, with the similar names.
    """
    return constructor(name)(num_class, img_size, pretrained)


def constructor(name: str, auxiliary: bool = False):
    """The function (num_class, img_size, pretrained) -> nn.Module behind a name; see `build`.

    auxiliary: GoogLeNet and Inception of torchvision with the classifiers that they have for
    training alone.
    """
    library, _, model = name.partition("/")
    if name.startswith("simkd:"):  # whatever network is in it
        return _of_simkd(name)
    if ".py:" in name:
        return _of_file(*name.rsplit(":", 1))
    if library == "torchvision" and model:
        return _of_torchvision(model, auxiliary)
    if library in LIBRARIES and model:
        return LIBRARIES[library](model)
    own = named(NETWORKS, name, "network")

    def make(num_class, img_size, pretrained):
        if pretrained:
            raise UserError(
                f"{name} has no pretrained weights; only torchvision/, timm/ and hf/ networks have "
                "them"
            )
        return own(num_class)

    return make


def behead(net: nn.Module) -> None:
    """Take the classifier away, once: the network then returns its pooled features."""
    if not isinstance(net.get_submodule(classifier_of(net)), nn.Identity):
        net.set_submodule(classifier_of(net), nn.Identity())


class Reusing(nn.Module):
    """A network whose last map goes through a projector and another network's classifier (SimKD).

    net: it loses its own classifier; projector: with `predict(fm, classifier)`.
    """

    def __init__(self, net: nn.Module, projector: nn.Module, classifier: nn.Module):
        super().__init__()
        behead(net)
        self.net, self.projector, self.classifier = net, projector, classifier
        self.tapped = Tapped(net, ("last",))
        self.taps = dict(feat="classifier:in")
        for key in ("stem", "stages", "preacts"):  # its `last` is the projector's
            path = net.taps.get(key)
            if path:
                inside = [f"net.{x}" for x in path] if isinstance(path, list) else f"net.{path}"
                self.taps[key] = inside
        self.taps["last"] = "projector.projector"
        self.taps["layout"] = {f"net.{x}": how for x, how in net.taps.get("layout", {}).items()}

    def forward(self, img: Tensor) -> Tensor:
        return self.projector.predict(self.tapped(img).last, self.classifier)


def reusing_name(name: str, spec: tuple[int, ...]) -> str:
    """What `build` calls a Reusing of the network `name`, whose projector has the `spec`."""
    return ":".join(map(str, ("simkd", name, *spec)))


def _of_simkd(name: str):
    """simkd:NETWORK:S_DIM:T_DIM:FACTOR:HEIGHT:WIDTH, a Reusing."""
    from kd_losses.simkd import SimKD

    _, _, rest = name.partition(":")
    inner, *numbers = rest.rsplit(":", 5)
    if len(numbers) < 5 or not all(x.isdecimal() and len(x) < 6 and int(x) for x in numbers):
        raise UserError(
            f"unknown network {shown(name)!r}; expected simkd:NETWORK and five ints from 1 to 99999"
        )
    if inner.count("simkd:") > 3:
        raise UserError(f"unknown network {shown(name)!r}; simkd networks are nested too deeply")
    s_dim, t_dim, factor, *size = map(int, numbers)
    own = constructor(inner)

    def make(num_class, img_size, pretrained):
        net = own(num_class, img_size, pretrained)
        ensure_taps(net, inner, num_class, img_size)
        try:
            projector = SimKD(s_dim, t_dim, factor, tuple(size))
        except ValueError as error:
            raise UserError(f"{shown(name)}: {first_line(error)}") from error
        return Reusing(net, projector, nn.Linear(t_dim, num_class))

    return make


def file_name(name: str) -> str:
    """A network's name as a part of file names: torchvision-resnet18, my_net-build, hf-vit."""
    if name.startswith("hf/"):
        return f"hf-{Path(name).name}"
    return re.sub(r"^(.*/)?([^/]+)\.py:", r"\2-", name).replace("/", "-")


def library_classes(name: str) -> tuple[int | None, list[str] | None]:
    """How many classes the weights of a library's network know, and their names; None if the
    library does not say it."""
    library, _, model = name.partition("/")
    if ".py:" in name or not model:
        return None, None
    constructor(name)  # or say that there is no such network
    if library == "torchvision":
        names = list(_weights_of(model).meta["categories"])
        return len(names), names
    if library == "timm":
        import timm

        found = timm.models.get_pretrained_cfg(model)
        return getattr(found, "num_classes", None), None
    if library == "hf":
        config = _hf_config(model)
        names = config.id2label
        if not any(
            "ImageClassification" in x for x in config.architectures or ["ImageClassification"]
        ):
            return 0, None  # a backbone: its classifier would be a fresh one
        return len(names), [str(names[i]) for i in range(len(names))]
    return None, None


def _weights_of(name: str):
    """torchvision's first weights of a network: those of the published tables."""
    from torchvision import models

    known = models.get_model_weights(name)
    return getattr(known, "IMAGENET1K_V1", known.DEFAULT)


def _of_torchvision(name: str, auxiliary: bool = False):
    from torchvision import models

    named(dict.fromkeys(models.list_models(module=models)), name, "network of torchvision")
    # logits alone, in training too
    wishes = dict(aux_logits=auxiliary) if name in ("googlenet", "inception_v3") else {}

    def make(num_class, img_size, pretrained):
        if not pretrained:
            fresh = dict(init_weights=True) if wishes else {}
            if name.startswith("vit_") and img_size:
                fresh = dict(image_size=img_size)
            return models.get_model(name, weights=None, num_classes=num_class, **wishes, **fresh)
        weights = _weights_of(name)
        net = downloaded(lambda: models.get_model(name, weights=weights, **wishes), name)
        if num_class != len(weights.meta["categories"]):
            _new_classifier(net, len(weights.meta["categories"]), num_class)
        return net

    return make


def _of_timm(name: str):
    try:
        import timm
    except ImportError:
        raise UserError(f"timm/{name} needs timm: pip install timm") from None
    known = timm.list_models() + timm.list_pretrained()
    known += [model.split(".")[0] for model in known]
    named(dict.fromkeys(known), name, "network of timm")

    def make(num_class, img_size, pretrained):
        def create(**wishes):
            return timm.create_model(name, pretrained=pretrained, num_classes=num_class, **wishes)

        try:
            return downloaded(lambda: create(img_size=img_size), name)
        except TypeError:  # most networks take any size and no such argument
            return downloaded(create, name)

    return make


def _of_hf(name: str):
    classifier = _transformers(name).AutoModelForImageClassification

    def make(num_class, img_size, pretrained):
        if not pretrained:
            config = _hf_config(name)
            config.num_labels = num_class
            if img_size and isinstance(getattr(config, "image_size", None), int):
                config.image_size = img_size
            try:
                return give_one_channel(classifier.from_config(config, trust_remote_code=False))
            except (ValueError, KeyError, ImportError) as error:
                raise UserError(f"hf/{name}: {first_line(error)}") from error
        wishes = dict(num_labels=num_class, ignore_mismatched_sizes=True)
        try:
            found = classifier.from_pretrained(name, trust_remote_code=False, **wishes)
            return give_one_channel(found)
        except (OSError, RuntimeError, ValueError, KeyError, ImportError) as error:
            raise UserError(
                f"the weights of hf/{name} cannot be loaded ({first_line(error)}): the name of an "
                "image classifier on huggingface.co, or a folder that save_pretrained wrote, is "
                "needed"
            ) from error

    return make


def _transformers(name: str):
    try:
        import transformers
    except ImportError:
        raise UserError(f"hf/{name} needs transformers: pip install transformers") from None
    transformers.utils.logging.set_verbosity_error()  # of a classifier that is replaced
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _hf_config(name: str):
    try:
        return _transformers(name).AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"unknown network hf/{name} ({first_line(error)}); expected the name of an image "
            "classifier on "
            "huggingface.co, or a folder with its config.json"
        ) from error


LIBRARIES = {"torchvision": _of_torchvision, "timm": _of_timm, "hf": _of_hf}


def downloaded(create, name: str) -> nn.Module:
    """`create()`, which may fetch weights."""
    try:
        return create()
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"the weights of {name} cannot be loaded ({first_line(error)}): a network connection "
            f"is needed, or the file in {torch.hub.get_dir()}/checkpoints"
        ) from error


def _new_classifier(net: nn.Module, old_class: int, num_class: int) -> None:
    """Replace the last layer with `old_class` outputs: N(0, 0.01) and 0, as KnowledgeReview
    does."""
    name, old = [
        (name, module)
        for name, module in net.named_modules()
        if getattr(module, "out_features", getattr(module, "out_channels", None)) == old_class
    ][-1]
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, num_class)
    else:
        new = nn.Conv2d(old.in_channels, num_class, old.kernel_size, old.stride, old.padding)
    nn.init.normal_(new.weight, std=0.01)
    nn.init.zeros_(new.bias)
    net.set_submodule(name, new)


def _of_file(path: str, function: str):
    file = Path(path)
    try:
        there = file.is_file()
    except (OSError, ValueError) as error:
        raise UserError(f"{printable(path)}: {first_line(error)}") from error
    if not there:
        raise UserError(
            f"{printable(path)}: no such file (path/to/file.py:function names a network)"
        )
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever somebody's file does
        raise UserError(f"{path} cannot be imported ({brief(error)})") from error
    functions = {key: f for key, f in vars(module).items() if callable(f) and key[0] != "_"}
    make = named(functions, function, f"function in {path} called")

    def call(num_class, img_size, pretrained):
        if pretrained:
            raise UserError(
                f"{path}:{function} loads its weights itself: pretrained is for libraries"
            )
        try:
            net = make(num_class)
        except (Exception, SystemExit) as error:
            raise UserError(f"{path}: {function}({num_class}) failed ({brief(error)})") from error
        if not isinstance(net, nn.Module):
            raise UserError(f"{path}: {function} returns a {type(net).__name__}, not an nn.Module")
        return give_one_channel(net)

    return call
