"""What a network gives: the logits among it, and the class that each logit stands for."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dataset import some
from utils import UserError, brief, named, out_of_memory, shown

# --- the logits in what a network returns ---------------------------------------------------------

NAMES = ("logits", "out", "output")  # what logits are called in a dict or an object


class TakeLogits:
    """A forward hook that gives the logits of a network that returns more than them.

    name: the network's, for messages; num_class: how many logits there are; notes: lines for the
    log. Where they are is found at the first call in each mode, training and eval.
    """

    def __init__(self, name: str, num_class: int):
        self.name, self.num_class = name, num_class
        self.keys, self.notes = {}, []

    def __call__(self, net: nn.Module, args, output) -> Tensor:
        return output if torch.is_tensor(output) else self.take(output, net.training)

    def take(self, output, training: bool) -> Tensor:
        """The logits in what a network returned in this mode."""
        if training not in self.keys:
            self.keys[training] = self._find(output, " in training" if training else "")
        return _parts(output)[self.keys[training]]

    def _find(self, output, when: str) -> str | int:
        parts = _parts(output)
        fits = [
            key
            for key, x in parts.items()
            if torch.is_tensor(x) and x.ndim == 2 and x.shape[1] == self.num_class
        ]
        called = [key for key in fits if key in NAMES]
        picked = ["logits"] if "logits" in called else called or fits
        what = f"{self.name}{when} gives a {type(output).__name__}"
        shape = f"logits of shape (B, {self.num_class})"
        if not picked:
            raise UserError(f"{what}, in which there are no {shape}")
        if any(parts[key] is not parts[picked[0]] for key in picked):
            raise UserError(
                f"{what}, in which {some([str(key) for key in picked])} may all be the {shape}: "
                "return the logits alone, or in a dict with the key 'logits'"
            )
        if picked[0] not in self.keys.values():  # said for the other mode
            self.notes.append(f"{what}: its {shown(str(picked[0]))!r} is taken as the logits")
        return picked[0]


def _parts(output) -> dict:
    """What a network returned, by name or by place."""
    if isinstance(output, dict):
        return output
    if isinstance(output, (tuple, list)):
        return dict(zip(getattr(output, "_fields", range(len(output))), output))
    return {name: getattr(output, name) for name in NAMES if hasattr(output, name)}


def logits_of(net: nn.Module, name: str, output, num_class: int, training: bool = False):
    """The logits in what `net` returned in training or eval mode. Where it returned more, `net`
    gives the logits alone from now on.

    A tensor is returned as it is, whatever its shape. Raises UserError if there are no logits
    (B, num_class), or several and no name that tells.
    """
    if torch.is_tensor(output):
        return output
    take = TakeLogits(name, num_class)
    logits = take.take(output, training)
    net.take_logits = take
    net.register_forward_hook(take)
    return logits


def notes_of(net: nn.Module) -> list[str]:
    """What to say of a network that returns more than its logits."""
    return list(net.take_logits.notes) if hasattr(net, "take_logits") else []


@contextmanager
def on_trial(net: nn.Module, training: bool):
    """Run `net` in training or eval mode without gradients; mode, buffers and torch's generator are
    afterwards as they were."""
    modes = {module: module.training for module in net.modules()}
    buffers = {key: x.clone() for key, x in net.named_buffers()}
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield net.train(training)
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for key, x in net.named_buffers():
                if key in buffers and x.shape == buffers[key].shape:
                    x.copy_(buffers[key])


def forward_logits(
    net: nn.Module, name: str, num_class: int, img_size: int, training: bool = False
) -> Tensor:
    """The logits (2, num_class) of two random images, the same at every call. Raises UserError
    where `net` gives no such logits."""
    img = torch.randn(2, 3, img_size, img_size, generator=torch.Generator().manual_seed(1))
    try:
        with on_trial(net, training):
            out = net(img)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever somebody's network does
        if out_of_memory(error):
            raise
        raise no_such_images(name, img_size, error) from error
    out = logits_of(net, name, out, num_class, training)
    if out.shape != (2, num_class):
        raise UserError(
            f"{name} gives {tuple(out.shape)} for two images, not logits of shape (2, {num_class})"
        )
    return out


def no_such_images(name: str, img_size: int, error: BaseException) -> UserError:
    """What to raise where a network fails on a trial image with `error`."""
    return UserError(
        f"{name} does not take images of {img_size} pixels ({brief(error)}): try another --img_size"
    )


# --- logits in another order, or some of them -----------------------------------------------------


def select_outputs(
    net: nn.Module,
    name: str,
    index: tuple[int, ...],
    num_class: int,
    img_size: int,
    in_classifier: bool = False,
) -> None:
    """Let `net`, of `num_class` logits, give those of `index` alone, in that order.

    The rows of its classifier are selected, which costs nothing in a step; this is tried on two
    images. Where the logits are not those of one layer, they are selected after each pass instead.
    in_classifier: raise UserError in this case.
    """
    before = forward_logits(net, name, num_class, img_size)[:, list(index)]
    take = getattr(net, "take_logits", None)
    for layer in reversed(list(net.modules())):
        if _classes_of(layer) != num_class:
            continue
        old = dict(layer._parameters)
        _keep_rows(layer, {key: x if x is None else x[list(index)] for key, x in old.items()})
        if take:
            take.num_class = len(index)
        try:
            after = forward_logits(net, name, len(index), img_size)
            if torch.allclose(after, before, rtol=1e-4, atol=1e-5 * before.abs().max().item()):
                return
        except UserError:  # the logits are not its own
            pass
        _keep_rows(layer, old)
        if take:
            take.num_class = num_class
    if in_classifier:
        raise UserError(
            f"{name}: its classes cannot be put into another order, since its logits are not those "
            "of one last layer"
        )
    net.register_buffer(
        "selected_outputs", torch.tensor(index)
    )  # of the state: it tells nets apart
    net.register_forward_hook(lambda net, args, out: out.index_select(1, net.selected_outputs))


def _classes_of(layer: nn.Module) -> int | None:
    """The number of outputs of a layer whose rows can be selected."""
    if not isinstance(layer, (nn.Linear, nn.Conv2d)) or getattr(layer, "groups", 1) != 1:
        return None
    if set(layer._parameters) - {"weight", "bias"} or layer._parameters.get("weight") is None:
        return None  # parametrised: its weight is computed
    return len(layer.weight)


def _keep_rows(layer: nn.Module, parameters: dict) -> None:
    for key, x in parameters.items():
        if x is not None and not isinstance(x, nn.Parameter):
            x = nn.Parameter(x.detach().clone(), requires_grad=layer.weight.requires_grad)
        layer._parameters[key] = x
    kind = "out_features" if isinstance(layer, nn.Linear) else "out_channels"
    setattr(layer, kind, len(layer.weight))


# --- the classes of a checkpoint and those of the dataset -----------------------------------------


@dataclass(frozen=True)
class Outputs:
    """What the outputs of a network have to do with the classes of a dataset.

    count: outputs of the network as it is built; index: of each class, its output; None: as they
    are; answers: whether the outputs then stand for the dataset's classes; in_classifier: whether
    the selection has to be one of the classifier's rows; note: a line for the log, or ''; needed:
    whether the network has to give logits.
    """

    count: int
    index: tuple[int, ...] | None = None
    answers: bool = True
    in_classifier: bool = False
    note: str = ""
    needed: bool = True

    @property
    def shown(self) -> int:
        """Outputs of the network after the selection."""
        return self.count if self.index is None else len(self.index)


def match_classes(
    found,
    classes: list[str],
    data_name: str,
    img_size: int,
    flag: str,
    lines: tuple[str, ...] | None = None,
    lines_flag: str = "",
    needed: str = "",
    advice: str = "",
    in_classifier: bool = False,
) -> Outputs:
    """Compare the classes of a network, `found` (checkpoint.Weights), with those of a dataset.

    The same names in another order are mapped. classes, data_name: of the dataset; flag: which
    names the file; lines: for each class of the dataset the network's, by name or index, of the
    flag `lines_flag`; needed: why the classes have to be the same, '' where they need not; advice:
    what else to do. Raises UserError if they have to and are not.
    """
    n, (count, names) = len(classes), found.classes(len(classes), img_size)
    what = f"{flag} {found.path or found.name}".strip()
    if lines is not None:
        if found.state is None and not found.pretrained:
            raise UserError(
                f"{lines_flag}: {found.name} has fresh weights, which have no classes yet"
            )
        index = _chosen(lines, classes, data_name, count, names, lines_flag)
        note = f"{found.name}: its outputs are mapped to the classes of {data_name} ({lines_flag})"
        same = index == tuple(range(count))
        return Outputs(count, None if same else index, True, in_classifier, note)
    compared = names if found.state is not None else None  # a library's own names are worded freely
    if count == n and compared in (None, classes):
        return Outputs(count, needed=bool(needed))
    if count == n and set(names) == set(classes):
        index = tuple(map(names.index, classes))
        moved = sum(i != k for k, i in enumerate(index))
        note = (
            f"{found.path}: its classes are those of {data_name} in another order ({moved} of {n} "
            "moved): its outputs are put into the dataset's"
        )
        return Outputs(count, index, True, in_classifier, note)
    if count != n:
        differ = f"{what} has {count} classes, {data_name} {n}"
    else:
        both = set(names) & set(classes)
        mine, theirs = ([x for x in side if x not in both] for side in (names, classes))
        differ = f"{what} has other classes than {data_name}, {some(mine)} and not {some(theirs)}"
    if needed:
        raise UserError(f"{differ}: " + "; ".join(filter(None, (needed, advice))))
    note = f"{differ}: only its feature maps are used"
    return Outputs(count, None, False, note=note, needed=False)


def _chosen(lines, classes, data_name, count, names, flag) -> tuple[int, ...]:
    """The outputs that the lines of `flag` name, one for each class."""
    if len(lines) != len(classes):
        raise UserError(
            f"{flag}: expected {len(classes)} lines, one for each class of {data_name}, got "
            f"{len(lines)}"
        )
    places = {} if names is None else {name: i for i, name in enumerate(names)}
    index, taken = [], set()
    for i, line in enumerate(lines):
        where = f"{flag}, line {i + 1} (class {shown(classes[i])})"
        if line in places:
            if names.count(line) > 1:
                raise UserError(
                    f"{where}: {shown(line)} is the name of several classes; give its index"
                )
            index.append(places[line])
        elif line.isdecimal() and len(line) < 8:
            if int(line) >= count:
                raise UserError(f"{where}: expected an index from 0 to {count - 1}, got {line}")
            index.append(int(line))
        elif names is None:
            raise UserError(
                f"{where}: {shown(line)} is no index, and the names of the network's {count} "
                "classes are not known: give indices"
            )
        else:
            try:
                named(places, line, "class")
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
        if index[-1] in taken:
            raise UserError(f"{where}: {shown(line)} is already the class of another line")
        taken.add(index[-1])
    return tuple(index)
