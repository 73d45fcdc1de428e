"""Where the feature maps of an unknown network are: found by a dry pass."""

import math
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.adapter import shape_of
from engine.outputs import forward_logits, logits_of, no_such_images, notes_of
from network import as_map, first_tensor, split_tap
from utils import UserError, brief, named, out_of_memory


@dataclass(eq=False)
class _Call:
    """One call of a module in the dry pass: what went in, what came out, what it called in turn."""

    path: str
    module: nn.Module
    x: Tensor | None
    x_version: int
    inner: list["_Call"] = field(default_factory=list)
    out: Tensor | None = None
    out_version: int = 0

    @property
    def leaf(self) -> bool:
        return not any(True for _ in self.module.children())


POOLING = (
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.LPPool2d,
    nn.FractionalMaxPool2d,
)


ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Softplus,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Tanh,
    nn.Sigmoid,
)


def ensure_taps(
    net: nn.Module,
    name: str,
    num_class: int | None,
    img_size: int,
    stages: tuple[str, ...] | None = None,
) -> list[str]:
    """Let `net` have `taps`: its own, or found by a dry pass. Returns what to print: a table of
    taps.

    `stages`: taps to use as stages, from the shallowest. The dry pass takes two images in eval
    mode. A stage is the last output at each size of the map, the blocks of a transformer four
    evenly spaced ones; before the activation is the input of the activation module whose output the
    stage is, or the stage itself where it has negative values. Raises UserError if nothing is
    found.
    """
    if hasattr(net, "taps") and stages is None:
        if ".py:" in name and num_class is not None:
            forward_logits(net, name, num_class, img_size)
        return []
    given = {key: net.taps[key] for key in ("stem", "feat") if key in getattr(net, "taps", {})}
    in_place = [m for m in net.modules() if getattr(m, "inplace", False)]
    for module in in_place:  # they would overwrite what the hooks catch
        module.inplace = False
    calls = dry_pass(net, name, num_class, img_size)
    found = _find(calls, name, net, stages, backbone=num_class is None)
    net.taps = found | given
    return _table(net, name, calls, len(in_place))


def dry_pass(net: nn.Module, name: str, num_class: int | None, img_size: int) -> list[_Call]:
    """Every call of a module of `net` on two images, in the order in which they ended, `net`'s own
    last.

    From here on `net` gives its logits alone. num_class: None for a network that need not give any.
    Raises UserError if it does not take such images or gives no logits (2, num_class).
    """
    ended, open_calls, times = [], [], Counter()
    root = _Call("", net, None, 0)

    def before(module, args, kwargs):
        x = next((x for x in (*args, *kwargs.values()) if torch.is_tensor(x)), None)
        times[names[module]] += 1
        path = f"{names[module]}#{times[names[module]]}"
        call = _Call(path, module, x, 0 if x is None else x._version)
        (open_calls[-1] if open_calls else root).inner.append(call)
        open_calls.append(call)

    def after(module, args, kwargs, output):
        call, x = open_calls.pop(), first_tensor(output)
        if torch.is_tensor(x):
            call.out, call.out_version = x, x._version
        ended.append(call)

    names = {module: path for path, module in net.named_modules() if path}
    hooks = [m.register_forward_pre_hook(before, with_kwargs=True) for m in names]
    hooks += [m.register_forward_hook(after, with_kwargs=True) for m in names]
    modes = {module: module.training for module in net.modules()}
    # noise, since a network sees whether values are negative; torch's generator stays as it is
    img = torch.randn(2, 3, img_size, img_size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            out = net.eval()(img)
    except (Exception, SystemExit) as error:  # whatever somebody's network does
        if out_of_memory(error):
            raise
        raise no_such_images(name, img_size, error) from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    for call in ended:
        path, number = call.path.split("#")
        call.path = path if times[path] == 1 else f"{path}#{number}"
    if num_class is None:
        root.out = first_tensor(out) if torch.is_tensor(first_tensor(out)) else None
        return [*ended, root]
    out = logits_of(net, name, out, num_class)
    if out.shape != (2, num_class):
        what = tuple(out.shape)
        raise UserError(f"{name} gives {what} for two images, not logits of shape (2, {num_class})")
    root.out = out
    return [*ended, root]


def check_trainable(net: nn.Module, name: str, num_class: int, img_size: int) -> list[str]:
    """Let `net` learn from two images, and leave it as it was, but that it gives its logits alone.
    Returns notes on what else it returns. Raises UserError if it cannot learn."""
    if not any(p.requires_grad for p in net.parameters()):
        raise UserError(f"{name} has no parameters that learn (requires_grad)")
    modes = {module: module.training for module in net.modules()}
    buffers = {key: x.clone() for key, x in net.named_buffers()}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            out = net.train()(torch.randn(2, 3, img_size, img_size))
            out = logits_of(net, name, out, num_class, training=True)
            if out.shape != (2, num_class):
                raise TypeError(f"a {type(out).__name__} that is not logits (2, {num_class})")
            F.cross_entropy(out.float(), torch.tensor([0, 1])).backward()
        if all(p.grad is None for p in net.parameters()):
            raise RuntimeError("no parameter gets a gradient")
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever somebody's network does
        if out_of_memory(error):
            raise
        raise UserError(f"{name} cannot be trained ({brief(error)})") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
        for p in net.parameters():
            p.grad = None
        with torch.no_grad():
            for key, x in net.named_buffers():
                if key in buffers and x.shape == buffers[key].shape:
                    x.copy_(buffers[key])
    return notes_of(net)


def _find(calls: list[_Call], name: str, net: nn.Module, stages, backbone: bool) -> dict:
    """The taps of a network whose calls these are; `calls[-1]` is its own. backbone: whether it may
    have no classifier."""
    linear = [
        call
        for call in calls
        if isinstance(call.module, nn.Linear) and call.x is not None and call.x.ndim == 2
    ]
    taps, lacks, layout, every_call = {}, {}, {}, calls
    if backbone:
        linear = [call for call in linear if call.out is calls[-1].out]
    if backbone and not linear and _pooled_of_backbone(calls):
        taps["feat"] = _pooled_of_backbone(calls)
    elif linear:
        taps["feat"] = f"{linear[-1].path}:in"
        calls = calls[: calls.index(linear[-1])] + calls[-1:]
    else:
        lacks["feat"] = "it does not end in a linear layer, so it has no pooled features"
        convs = [call for call in calls if isinstance(call.module, nn.Conv2d)]
        out = calls[-1].out
        if (
            convs and out is not None and convs[-1].module.out_channels == out.shape[1]
        ):  # classifies
            calls = calls[: calls.index(convs[-1])] + calls[-1:]
    pooled = {id(call.out) for call in calls if isinstance(call.module, POOLING)}
    units = _units(calls[-1], pooled, {id(call) for call in calls})
    stem = _stem(units)
    if stages is None:
        picked = _by_size(units)
        if len(picked) > 1 and picked[0] is stem:
            picked = picked[1:]
        blocks = _blocks(calls) if len(picked) < 2 else []
        if blocks:
            count = min(4, len(blocks))
            picked = [blocks[math.ceil(len(blocks) * i / count) - 1] for i in range(1, count + 1)]
        if not picked:
            raise UserError(
                f"{name}: no feature maps found; name modules with --s_taps or --t_taps"
            )
        ends = [(call.path, call, call.out, call.out_version) for call in picked]
    else:
        ends = [_named_end(path, every_call, name, net) for path in stages]
        order = [every_call.index(call) for path, call, *_ in ends if not path.endswith(":in")]
        if order != sorted(set(order)) or len(set(stages)) < len(stages):
            raise UserError(
                f"{name}: {','.join(stages)}: expected taps from the shallowest to the deepest, "
                "each once"
            )
    taps["stages"] = [path for path, *_ in ends]
    if stem is None:
        lacks["stem"] = "its first feature map was not found"
    else:
        taps["stem"] = stem.path
    side = next(
        (_side(c.out) for c in calls if isinstance(c.module, nn.Conv2d) and _side(c.out)), 0
    )
    preacts, norms = [], []
    for path, call, x, version in ends:
        if x._version != version:
            raise UserError(
                f"{name}: the output of {path} is changed in place later; name another module"
            )
        layout[path] = _layout(x, side, name, path)
        preact = _before_activation(path, x, every_call)
        if x.ndim == 3:
            lacks["preacts"] = "a transformer's tokens have no activation before them"
        elif preact is None:
            lacks["preacts"] = (
                f"no activation module gives its map at {path}: what is before it is unknown: call "
                "nn.ReLU modules there, or name other stages with --s_taps, --t_taps"
            )
        else:
            layout[preact] = layout[path]
            preacts.append(preact)
            norms.append(_norm_before(preact, x, every_call))
    if "preacts" not in lacks:
        taps["preacts"] = preacts
        if all(norms):
            taps["norms"] = norms
    if "stem" in taps:
        layout[taps["stem"]] = _layout(stem.out, side, name, stem.path)
    layout = {path: how for path, how in layout.items() if how is not None}
    return taps | dict(lacks=lacks, layout=layout)


def _pooled_of_backbone(calls: list[_Call]) -> str | None:
    """The module whose output is that of a network without a classifier, pooled features (B, D)."""
    out = calls[-1].out
    ends = [call for call in calls[:-1] if out is not None and out.ndim == 2 and call.out is out]
    return ends[-1].path if ends else None


def _side(x: Tensor | None) -> int:
    """Height of a square map, (B, C, H, W) or (B, H, W, C); 0 if it is not a square map."""
    if x is None or x.ndim != 4:
        return 0
    return x.shape[2] if x.shape[2] in (x.shape[3], x.shape[1]) else 0


def _units(call: _Call, pooled: set[int], known: set[int]) -> list[_Call]:
    """The calls inside `call` that are looked at whole: those that at most halve the map.

    What reduces it further, or ends in a pooling layer, is looked into. Not in it: what is no map
    or overwritten later, pooling, the one-pixel insides of squeeze-and-excitation, what lies behind
    the last linear layer and so is not in `known`.
    """
    units = []

    def look(call):
        for inner in call.inner:
            before, after = _side(inner.x), _side(inner.out)
            fine = after and inner.out._version == inner.out_version and id(inner.out) not in pooled
            # up to 3, since an unpadded stride of 2 makes 2 of 6
            if inner.inner and not (fine and before and before <= 3 * after):
                look(inner)
            elif fine and id(inner) in known:
                if max(before, after) > 1 or any(inner.x is unit.out for unit in units):
                    units.append(inner)

    look(call)
    return units


def _by_size(units: list[_Call]) -> list[_Call]:
    """The last of the units at each size, while the map shrinks; unpadded convolutions, which make
    it a little smaller, begin no new size."""
    last = {}  # by the side at which a size began
    for unit in units:
        side = _side(unit.out)
        began = min(last, default=math.inf)
        if side <= began:
            last[began if side > 0.75 * began else side] = unit
    return list(last.values())


def _stem(units: list[_Call]) -> _Call | None:
    """The first unit, with the normalisation and activation layers that follow it."""
    if not units:
        return None
    stem = units[0]
    for unit in units[1:]:
        extra = isinstance(unit.module, ACTIVATIONS) or "Norm" in type(unit.module).__name__
        extra = extra and not any(isinstance(m, nn.Conv2d) for m in unit.module.modules())
        if not (extra and unit.out.shape == stem.out.shape):
            break
        stem = unit
    return stem


def _blocks(calls: list[_Call]) -> list[_Call]:
    """The blocks of a transformer: the outermost group of like modules that give (B, N, C)."""
    groups = {}
    for call in calls:
        if call.out is not None and call.out.ndim == 3 and not call.leaf:
            groups.setdefault((call.path.rpartition(".")[0], type(call.module)), []).append(call)
    groups = [group for group in groups.values() if len(group) > 1]
    return min(groups, key=lambda g: (g[0].path.count("."), -len(g)), default=[])


def _named_end(path: str, calls: list[_Call], name: str, net: nn.Module):
    """(tap, call, tensor, its version there) of a tap that the user named."""
    modules = dict(net.named_modules())
    try:
        module, number, end = split_tap(path)
        if number is not None and number < 1 or end not in ("", "in"):
            raise ValueError
    except ValueError:
        raise UserError(
            f"{path}: expected MODULE, MODULE#2 (its second call) or MODULE:in"
        ) from None
    named(modules, module, f"module in {name} called")
    hits = [call for call in calls if call.path.split("#")[0] == module]
    if not hits or (number or 1) > len(hits):
        raise UserError(f"{name}: {path} is not a feature map: it is called {len(hits)} times")
    call = hits[-1 if number is None else number - 1]
    x, version = (call.x, call.x_version) if end else (call.out, call.out_version)
    if x is None or x.ndim not in (3, 4):
        shape = "nothing" if x is None else tuple(x.shape)
        raise UserError(f"{name}: {path} is not a feature map, it gives {shape}")
    return call.path + (":in" if end else ""), call, x, version


def _layout(x: Tensor, side: int, name: str, path: str):
    """How a tensor becomes a (B, C, H, W) map: None, 'nhwc' or (tokens before the image's,
    side)."""
    if x.ndim == 4:
        return None if x.shape[2] == x.shape[3] else "nhwc"
    tokens = x.shape[1]
    if not 0 < side * side <= tokens:
        side = math.isqrt(tokens)
    if side < 2:
        raise UserError(
            f"{name}: {path} returns {tuple(x.shape)}: its tokens do not form a square map"
        )
    return tokens - side * side, side


def _before_activation(path: str, x: Tensor, calls: list[_Call]) -> str | None:
    """The tap before the activation whose output `x` is; `path` where `x` has had none."""
    for call in calls:
        if isinstance(call.module, ACTIVATIONS) and call.out is x and call.x is not None:
            return f"{call.path}:in" if call.x._version == call.x_version else None
    return path if (x < 0).any() else None


def _norm_before(preact: str, x: Tensor, calls: list[_Call]) -> str | None:
    """The batch norm of that width that runs last before the tap `preact`, with no layer
    between."""
    place = next(i for i, call in enumerate(calls) if call.path == preact.removesuffix(":in"))
    for call in reversed(calls[: place + 1]):
        if isinstance(call.module, nn.BatchNorm2d):
            fits = call.module.num_features == x.shape[1]
            return call.path.split("#")[0] if fits else None
        if isinstance(call.module, (nn.Conv2d, nn.Linear)):
            return None
    return None


def _table(net: nn.Module, name: str, calls: list[_Call], in_place: int) -> list[str]:
    """The taps of `net` in lines: what, where, channels x height x width."""
    caught = {}
    for call in calls[:-1]:
        caught[f"{call.path}:in"], caught[call.path] = call.x, call.out
        caught[call.path.split("#")[0]] = call.out

    def line(what, path):
        x, how = caught[path], net.taps["layout"].get(path)
        return f"  {what:<8} {path:<{width}} {shape_of(x if how is None else as_map(x, how))}"

    width = max(map(len, net.taps["stages"])) + 8

    lines = [
        f"{name}: feature maps found by a trial forward pass (--s_taps and --t_taps select others)"
    ]
    if in_place:
        lines[0] += f"; {in_place} in-place activations made out of place"
    taps = net.taps
    lines += [line("stem", taps["stem"])] if "stem" in taps else []
    preacts = taps.get("preacts") or [None] * len(taps["stages"])
    for i, (stage, preact) in enumerate(zip(taps["stages"], preacts), 1):
        lines.append(line(f"stage {i}", stage) + (f"  before: {preact}" if preact else ""))
    lines += [line("feat", taps["feat"])] if "feat" in taps else []
    return lines + [f"  without {kind}: {reason}" for kind, reason in taps["lacks"].items()]
