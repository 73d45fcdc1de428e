"""Write the parts of README and docs that are generated from the table of methods.

    python tools/pages.py            # write README.md's table and docs/methods.md
    python tools/pages.py --check    # change nothing; name stale pages, with exit code 1

The generated text is between two marks. A section of docs/methods.md has the paper, the formula and
the parameters from the loss file, the row of the table, the settings of the protocols, the tables
with published figures, and the cost.
"""

import argparse
import ast
import csv
import functools
import inspect
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)

import torch  # noqa: E402

import network  # noqa: E402
import utils  # noqa: E402
from engine import cli, published  # noqa: E402
from kd_losses import METHODS, Method, Phase, constant  # noqa: E402
from tools import bench_steps  # noqa: E402

MARKS = "<!-- methods -->", "<!-- end of methods -->"
PAGES = ("README.md", "README.zh-CN.md", "docs/methods.md")
CHINESE = {  # replaced in this order: longer phrases before their parts
    "feature maps before the ReLU": "ReLU 之前的特征图",
    "last feature map": "最后的特征图",
    "pooled features": "池化特征",
    "feature maps": "特征图",
    "feature map": "特征图",
    "stem map": "stem 特征图",
    " and their gradients": "及其梯度",
    "logits of two views": "两个视图的 logits",
    "classifiers": "分类器",
    "labels": "标签",
    "sample index": "样本序号",
    " and ": " 和 ",
    ", ": "、",
    "; CE": "；交叉熵",
    "、>10 classes": "；超过 10 类时",
}
READS = dict(
    out="logits",
    stem="stem map",
    stages="feature maps",
    preacts="feature maps before the ReLU",
    last="last feature map",
    feat="pooled features",
)


def parse(argv: list[str]):
    parser = cli.Parser(description=__doc__.split("\n\n")[0])
    check = "change nothing; exit with code 1 if a page is not up to date"
    parser.add_argument("--check", action="store_true", help=check)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    stale = 0
    for name in PAGES:
        path = ROOT / name
        if not path.exists():
            continue
        old = path.read_text(encoding="utf-8")
        text = sections() if name == "docs/methods.md" else table(chinese="zh" in name)
        new = between_marks(old, text)
        if new != old:
            stale += 1
            print(f"{name}: {'not up to date' if args.check else 'written'}")
            if not args.check:
                path.write_text(new, encoding="utf-8")
    return int(args.check and stale > 0)


def between_marks(page: str, text: str) -> str:
    """The page with `text` between its marks."""
    before, mark, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (mark and end):
        raise ValueError(f"{MARKS[0]} or {MARKS[1]} not found in the page; add both marks")
    return f"{before}{mark}\n{text}\n{end}{after}"


# --- README.md ------------------------------------------------------------------------------------


def table(chinese: bool = False) -> str:
    """The method table in four columns."""
    head = "论文 | 输入 | 权重" if chinese else "paper | inputs | weight"
    lines = [f"| `--kd_mode` | {head} |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *(row(mode, chinese) for mode in METHODS)])


def row(mode: str, chinese: bool = False) -> str:
    method, source = METHODS[mode], Source(mode)
    paper, words, number = source.short, inputs(method), weight(method)
    for english, other in CHINESE.items() if chinese else ():
        words, number = words.replace(english, other), number.replace(english, other)
    return f"| [`{mode}`](kd_losses/{mode}.py) | {paper} | {words} | {number} |"


def inputs(method: Method) -> str:
    """The inputs of the loss, in words."""
    fed, words = method.inputs, []
    for name in fed.reads:
        if name == "stages" and "preacts" in fed.reads:
            continue  # "preacts" names these feature maps
        word = READS[name]
        if name in ("stages", "preacts") and method.stages:
            count = len(method.stages)
            word = word.replace("maps", "map") if count == 1 else word
            word += " " + " and ".join(map(str, method.stages))
        words.append(word)
    names = set(fed.feed.__code__.co_names)
    if method.two_views:
        words[0] += " of two views"
    if method.teacher == "grad" and "img" in names:
        words[0] += " and their gradients"
    words += ["classifiers"] * fed.classifier
    words += ["labels"] * (method.reads_labels and "index" not in names)
    words += ["sample index"] * ("index" in names)
    words += ["epoch"] * ("epoch" in names)
    return ", ".join(words)


def weight(method: Method) -> str:
    """lambda_kd, and lambda_ce if it is not 1."""
    found = method.lambda_kd
    text = (
        f"{found:g}" if isinstance(found, float) else f"{found(10):g}, >10 classes {found(100):g}"
    )
    return text + f"; CE {method.lambda_ce:g}" * (method.lambda_ce != 1)


class Source:
    """Title, paper and link from the module docstring of a loss file, and the docstrings of its
    classes."""

    def __init__(self, mode: str):
        tree = ast.parse((ROOT / f"kd_losses/{mode}.py").read_text(encoding="utf-8"))
        head = " ".join(ast.get_docstring(tree).split("\n\n")[0].split())
        found = re.fullmatch(r"(.+?) \(((?:[^()]|\([^()]*\))*)\), (https?://\S+)(.*)", head)
        if found:  # NAME: TITLE (PAPER), LINK
            title, paper, link, rest = found.groups()
            link += rest.strip() * link.endswith("/")  # a link may take two lines
            self.title = re.sub(r"^[a-z ]+\. ", "", title.partition(": ")[2])
            self.paper, self.short = f"[{paper}]({link})", f"[{short(paper)}]({link})"
        else:  # a method without a paper
            self.title, self.paper, self.short = head.rstrip("."), "No paper", "-"
        classes = [x for x in tree.body if isinstance(x, ast.ClassDef) and x.name[0] != "_"]
        loss = METHODS[mode].loss
        own = [x for x in classes if isinstance(loss, type) and x.name == loss.__name__]
        self.classes = own or classes
        self.texts = {x.name: ast.get_docstring(x) or "" for x in self.classes}


def short(paper: str) -> str:
    """First author, venue and year, from 'Author, Author, VENUE YEAR, section 3'."""
    names, venue = [], ""
    for part in paper.split(", "):
        if re.search(r"\b(19|20)\d\d\b", part):
            venue = part
            break
        names.append(part)
    return f"{names[0]} et al., {venue}" if len(names) > 2 else ", ".join([*names, venue])


# --- docs/methods.md ------------------------------------------------------------------------------


def sections() -> str:
    links = ", ".join(f"[{mode}](#{mode})" for mode in METHODS)
    return "\n\n".join([links, *map(section, METHODS)])


def section(mode: str) -> str:
    source = Source(mode)
    file = f"[kd_losses/{mode}.py](../kd_losses/{mode}.py)"
    head = [f"### {mode}", f"{source.title}. {source.paper}. File: {file}."]
    body = []
    for name, text in source.texts.items():
        text = re.sub(r"\n(?=Differs from )", "\n\n", text)
        body += [f"`{name}`"] * (len(source.texts) > 1) + [text]
    facts = [*row_facts(METHODS[mode]), *protocol_facts(mode), *figures(mode), *cost(mode)]
    return "\n\n".join([*head, *body, "\n".join(f"- {x}" for x in facts)])


def row_facts(method: Method) -> list[str]:
    """Inputs, weight, phases and flags."""
    facts = [f"inputs: {inputs(method)}", f"default weight: {weight(method)}"]
    if method.match:
        facts.append(f"the compared maps must agree in {method.match.replace('+', ' and ')}")
    if method.ramp is not constant:
        facts.append(f"weight over the epochs: {ramp(method.ramp)}")
    if len(method.phases) > 1:
        facts.append("phases: " + "; ".join(map(phase, method.phases)))
    for name, flag in method.flags.items():
        choices = f" ({', '.join(flag.choices)})" if flag.choices else ""
        facts.append(f"`--{name}` {shown(flag.default)}: {flag.help}{choices}")
    return facts


def ramp(factor) -> str:
    """The factor of the weight at some of 200 epochs, in words."""
    found = [(e, f"{factor(e, 200):.2g}") for e in (1, 10, 20, 40, 100, 160, 200)]
    kept = [x for x, before in zip(found, [(0, ""), *found]) if x[1] != before[1]]
    return "factor " + ", ".join(f"{value} from epoch {e}" for e, value in kept) + " (of 200)"


def phase(x: Phase) -> str:
    length = f"{x.epochs} epochs" if x.epochs else "all epochs"
    terms = ["cross-entropy"] * x.ce + ["the method's loss"] * x.kd
    return f"{x.name} ({length}: {' and '.join(terms)}; trains {', '.join(x.trainable)})"


def shown(value) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def setting(name: str, value) -> str:
    if name == "phases":
        return "phases " + "; ".join(map(phase, value))
    if name == "ramp":
        return "weight " + ("constant" if value is constant else ramp(value))
    if name == "inputs":
        value = next(k for k, x in inspect.getmembers(__import__("kd_losses")) if x is value)
    return f"{name} {shown(value)}"


def protocol_facts(mode: str) -> list[str]:
    """The settings of each protocol, also those for pairs of networks."""
    facts = []
    for protocol in published.PROTOCOLS:
        own = dict(published.SETTINGS[protocol].get(mode, {}))
        pairs = own.pop("pairs", {})
        taps = "the authors' levels as stages" if own.pop("taps", None) else ""
        parts = [*(setting(*x) for x in own.items()), *[taps] * bool(taps)]
        if parts:
            facts.append(f"`--protocol {protocol}`: {', '.join(parts)}")
        alike = {}
        for pair, values in pairs.items():
            names = " -> ".join(pair) if isinstance(pair, tuple) else f"student {pair}"
            alike.setdefault(", ".join(setting(*x) for x in values.items()), []).append(names)
        for words, names in alike.items():
            facts.append(f"`--protocol {protocol}`, {', '.join(names)}: {words}")
    return facts


def figures(mode: str) -> list[str]:
    """The tables that have published figures of the method."""
    with open(ROOT / "tools/published.csv", encoding="utf-8") as file:
        found = Counter(x["table"] for x in csv.DictReader(file) if x["mode"] == mode)
    if not found:
        return ["published figures: none in tools/published.csv"]
    words = ", ".join(f"{count} in `{name}`" for name, count in found.items())
    return [f"published figures ([tools/published.csv](../tools/published.csv)): {words}"]


def cost(mode: str) -> list[str]:
    """The method's parameters, and its training step relative to a bare one (from
    results/bench/step_all.md)."""
    count = added_parameters(mode)
    learns = f"{count:,} parameters (resnet20 -> resnet8, 10 classes)" if count else "no parameters"
    text = (ROOT / "results/bench/step_all.md").read_text(encoding="utf-8")
    found = re.search(rf"^\| {mode} \|[^|]*\|[^|]*\|[^|]*\| ([\d.]+) \|", text, re.M)
    step = (
        f"{float(found[1]):.2f} times a step without the method's loss" if found else "not measured"
    )
    return [f"adds {learns}", f"training step on two CPU cores ([speed](speed.md)): {step}"]


@functools.cache
def networks():
    args = argparse.Namespace(student="resnet8", teacher="resnet20", num_class=10, batch_size=128)
    torch.manual_seed(0)
    images = bench_steps.random_images(256, 10)
    return args, images, *bench_steps.pair(args, images)


def added_parameters(mode: str) -> int:
    """Number of parameters of the method and its adapter, for resnet20 -> resnet8, 10 classes."""
    args, images, student, teacher = networks()
    device, precision = torch.device("cpu"), utils.Precision()
    build = bench_steps.distillation
    distiller, *_ = build(mode, args, device, precision, images, student, teacher)
    return network.count_parameters(distiller.added)


if __name__ == "__main__":
    sys.exit(main())
