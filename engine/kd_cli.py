"""The flags of train_kd.py: strict, and --help shows the defaults that would run."""

from argparse import Namespace

from engine import cli
from engine.checkpoint import find_weights
from engine.ensemble import KINDS
from engine.settings import ADAPTERS, Settings, batch_size, settings, uses
from engine.teachers import takes_ensemble
from kd_losses import METHODS, Flag
from utils import UserError, named

SHARED = ("stages", "reduce", "adapter")  # flags of every method that can use them
NONE = "none"  # --kd_mode of a student without a method: the baseline
OF_THE_METHODS = {
    "lambda_kd",
    "lambda_ce",
    *SHARED,
    *(x for m in METHODS.values() for x in m.flags),
}
PLACE = {"note", "save_root"}
OF_THE_TEACHER = {f"{name}_{side}" for name in ("t", "net1") for side in ("model", "init", "name")}
OF_THE_TEACHER |= {"t_pretrained", "t_taps", "t_key", "t_classes", "teacher_cache", "ensemble"}


# --- several students -----------------------------------------------------------------------------


def command_lines(argv: list[str]) -> dict[str, list[str]]:
    """{student: its own command line}. Of `--kd_mode at,dkd --dkd.beta 6 --note x` these are
    `--kd_mode at --note at-x` and `--kd_mode dkd --beta 6 --note dkd-x`: each student is trained as
    this command alone would train it.

    Raises UserError for a flag that only some students can have and that names none of them.
    """
    kd_mode = _first_pass(argv).kd_mode or ""
    students = kd_mode.split(",")
    if len(students) == 1:
        return {kd_mode: argv}
    if "" in students or len(set(students)) < len(students):
        raise UserError(f"--kd_mode {kd_mode}: expected different students, separated by commas")
    if {"-h", "--help"} & set(argv):
        raise UserError(f"--help shows one student at a time: --kd_mode {students[0]} --help")
    of_logits = [x for x in students if any(map(takes_ensemble, modes_of(x)))]
    lines = {student: [] for student in students}
    found = [(*_owner_of(words[0], students), words) for words in _flags_with_values(argv)]
    own = {(owner, inner) for owner, inner, _ in found}
    for owner, inner, words in found:
        name = f"{owner}.{inner}" if owner else inner
        base = inner.split(".")[-1]
        if owner is None and base in OF_THE_METHODS:
            raise UserError(
                f"--{name}: there are several students; give it for one of them: "
                f"--{students[0]}.{name}"
            )
        if owner and base not in OF_THE_METHODS | PLACE | {"logit_stand", "gather", "ensemble"}:
            raise UserError(f"--{name}: all students share --{base}")
        for student in [owner] if owner else students:
            if student == NONE and owner is None and inner in OF_THE_TEACHER | {"s_taps"}:
                continue
            if name == "ensemble" and student not in of_logits and of_logits:
                continue
            if owner is None and (student, inner) in own:
                continue  # it has one of its own
            lines[student] += _words_for(student, words, owner, inner)
    return lines


def _owner_of(word: str, students: list[str]) -> tuple[str | None, str]:
    """The student that a flag names, or None, and the flag without it."""
    name = word.removeprefix("--").partition("=")[0]
    for student in students:
        if name.startswith(f"{student}."):
            return student, name[len(student) + 1 :]
    return None, name


def _flags_with_values(argv: list[str]) -> list[list[str]]:
    """The words of a command line, each flag with its values."""
    found = []
    for word in argv:
        if word.startswith("--") or not found:
            found.append([])
        found[-1].append(word)
    return found


def _words_for(student: str, words: list[str], owner: str | None, inner: str) -> list[str]:
    """A flag with its values as `student` alone is given it."""
    flag, equals, value = words[0].partition("=")
    values = [value, *words[1:]] if equals else words[1:]
    flag = f"--{inner}" if owner else flag
    if flag == "--kd_mode":
        values = [student]
    if flag == "--note" and not owner:
        values = [f"{student}-{value}" for value in values]
    return [f"{flag}={values[0]}"] if equals else [flag, *values]


# --- the flags of one student ---------------------------------------------------------------------


def parse(argv: list[str], description: str) -> Namespace:
    """The flags. First --kd_mode, --protocol and the networks, then all flags, the methods' own
    too.

    Raises UserError for a flag that is unknown, of another method, or of two methods at once.
    """
    early = _first_pass(argv)
    modes = modes_of(early.kd_mode)
    defaults = _defaults(early, modes) if {"-h", "--help"} & set(argv) else {}
    parser = cli.Parser(prog="train_kd.py", description=description)
    _add_distillation_flags(parser, modes, defaults)
    for mode in modes:
        group = parser.add_argument_group(f"--kd_mode {mode}")
        for name, flag in METHODS[mode].flags.items():
            text = flag.help + _default_text(defaults, mode, name)
            _add_flag(group, modes, mode, name, help=text, **_kind_of(flag))
    recipe = cli.recipe_defaults(
        early.protocol, early.s_name or "", batch_size(modes, early.protocol)
    )
    cli.add_common_flags(parser, recipe)
    args = parser.parse_args(argv, owner=lambda flag: _owner(flag, modes))
    if not modes:
        _check_baseline(args)
    if args.lambda_kd and len(args.lambda_kd) != len(modes):
        raise UserError(
            f"--lambda_kd: expected one weight per method of --kd_mode ({len(modes)}), got "
            f"{len(args.lambda_kd)}"
        )
    return args


def modes_of(kd_mode: str | None) -> list[str]:
    """The methods of one student's --kd_mode, [] of the baseline. Raises UserError for an unknown
    one, or those that cannot be combined."""
    modes = kd_mode.split("+") if kd_mode and kd_mode != NONE else []
    for mode in modes:
        method = named(METHODS, mode, "--kd_mode")
        if len(modes) > 1 and (len(method.phases) > 1 or method.deploys_projector):
            own = "deploys its own network" if method.deploys_projector else "has its own phases"
            raise UserError(f"--kd_mode {kd_mode}: {mode} {own} and cannot be combined")
    if len(set(modes)) < len(modes):
        raise UserError(f"--kd_mode {kd_mode}: a method appears twice")
    return modes


def _check_baseline(args: Namespace) -> None:
    """Raise UserError for what has no effect on a student that is trained without a teacher."""
    names = ("lambda_kd", "lambda_ce", "gather", "logit_stand", "s_taps", "unlabeled")
    for name in (*names, *sorted(OF_THE_TEACHER)):
        if vars(args).get(name) not in (None, False):
            raise UserError(f"--{name} has no effect with --kd_mode {NONE}: leave it out")


def given_flags(args: Namespace, modes: list[str]) -> dict[str, dict]:
    """{mode: {flag: value}}: what was given on the command line for each method."""
    given = {}
    for i, mode in enumerate(modes):
        flags = {}
        for name in (*METHODS[mode].flags, *SHARED):
            owners = _owners(name, modes)
            if mode in owners or (not owners and i == 0):  # which says that it has no effect
                flags[name] = vars(args)[_dest(name, mode, modes)]
        if flags.get("adapter") is not None:
            flags["adapter"] = ADAPTERS[flags["adapter"]]
        flags["lambda_ce"] = args.lambda_ce
        flags["lambda_kd"] = args.lambda_kd[i] if args.lambda_kd else None
        given[mode] = {name: value for name, value in flags.items() if value is not None}
    return given


def settings_of(
    args: Namespace, teacher: str, student: str, num_class: int, micro_batch: int | None = None
) -> dict[str, Settings]:
    """{mode: its settings} between two networks, as these flags have them."""
    modes = modes_of(args.kd_mode)
    given, composed = given_flags(args, modes), len(modes) > 1
    where = args.protocol, teacher, student, num_class
    return {mode: settings(mode, *where, given[mode], composed, micro_batch) for mode in modes}


def resolve(args: Namespace, student: str, knows: dict) -> Namespace:
    """`cli.resolve`, with the batch size that the protocol has for the methods."""
    own = batch_size(modes_of(args.kd_mode), args.protocol)
    return cli.resolve(args, student, knows, own)


def _first_pass(argv: list[str]) -> Namespace:
    parser = cli.Parser(add_help=False)
    for name in ("kd_mode", "t_name", "s_name", "t_model", "s_init"):
        alias = {"t_": "--net1_", "s_": "--net2_"}.get(name[:2])
        aliases = [alias + ("name" if name.endswith("name") else "init")] if alias else []
        parser.add_argument(f"--{name}", *aliases, type=cli.filled)
    parser.add_argument("--protocol", choices=cli.PROTOCOLS, default="kdzoo")
    return parser.parse_known_args(argv)[0]


def _defaults(early: Namespace, modes: list[str]) -> dict[str, Settings]:
    """The settings that would run, for --help: of these networks, where they are known."""
    names, num_class = {}, 100
    for side, file in (("t", "t_model"), ("s", "s_init")):
        names[side], path = getattr(early, f"{side}_name") or "", getattr(early, file)
        if path:
            paths = path.split(",") if side == "t" else [path]
            name = names[side] if len(paths) == 1 else None
            try:
                found = [find_weights(name or None, x, f"{side}_name", file) for x in paths]
            except UserError:  # --help does not need the file
                continue
            names[side] = found[0].name if len({x.name for x in found}) == 1 else ""
            num_class = found[0].meta.get("num_class", num_class)
    composed = len(modes) > 1
    return {m: settings(m, early.protocol, *names.values(), num_class, {}, composed) for m in modes}


def _default_text(defaults: dict[str, Settings], mode: str, name: str) -> str:
    if mode not in defaults:
        return ""
    found = defaults[mode]
    value = found.flags[name] if name in found.flags else getattr(found, name)
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    elif isinstance(value, bool):
        value = int(value)
    origin = found.origin[name]
    value = {"": "none", None: "all"}.get(value, value)
    return f" (default {value}{'' if origin == 'default' else f': {origin}'})"


def _add_distillation_flags(parser: cli.Parser, modes: list[str], defaults: dict) -> None:
    group = parser.add_argument_group("distillation")
    add = group.add_argument
    add(
        "--kd_mode",
        required=True,
        metavar="MODE",
        help="one method; or several joined by + (st+at: the loss of one student is their sum); or "
        f"several students separated by commas (at,dkd,{NONE}; {NONE}: cross-entropy alone). "
        "Methods: " + ", ".join(METHODS),
    )
    name = dict(type=cli.filled, metavar="NAME")
    file = dict(type=cli.filled, metavar="FILE")
    files = dict(type=cli.filled, metavar="FILE[,FILE]")
    add(
        "--t_model",
        "--net1_init",
        **files,
        help="checkpoint of the teacher, or several separated by commas",
    )
    add(
        "--s_init",
        "--net2_init",
        **file,
        help="initial weights of the student (default: random)",
    )
    add("--t_name", "--net1_name", **name, help="teacher network (default: from the checkpoint)")
    add("--s_name", "--net2_name", **name, help="student network (default: from the checkpoint)")
    add(
        "--ensemble",
        choices=KINDS,
        help="several teachers, methods that read logits: mean of the teachers' probabilities "
        "(default probs), mean of their logits, or logits weighted by each teacher's "
        "cross-entropy; other methods sum their loss over the teachers",
    )
    add(
        "--t_classes",
        type=cli.class_lines,
        metavar="FILE",
        help="text file that maps the teacher's outputs to the dataset's classes: one line per "
        "class, with the name or index of the teacher's class",
    )
    for side, who in (("t", "teacher"), ("s", "student")):
        add(
            f"--{side}_key",
            type=cli.filled,
            metavar="KEY",
            help=f"entry of the checkpoint with the {who}, such as model_ema (default: detected)",
        )
        add(
            f"--{side}_pretrained",
            action="store_true",
            help=f"load the library's weights into the {who} (torchvision/, timm/ and hf/NAME)",
        )
        add(
            f"--{side}_taps",
            type=cli.comma(cli.filled),
            metavar="M[,M]",
            help=f"modules that give the {who}'s feature maps, shallow to deep (default: detected)"
            + "; separate several teachers by +" * (side == "t"),
        )
    add(
        "--unlabeled",
        type=cli.filled,
        metavar="DIR",
        help="also train on the images in DIR and its subfolders, without labels (methods that do "
        "not read labels); no labels are needed at all with --lambda_ce 0",
    )
    add(
        "--gather",
        action="store_true",
        help="several processes: relational methods compare the images of all processes",
    )
    add(
        "--logit_stand",
        action="store_true",
        help="standardise the logits of both networks first (LSKD), for logit methods",
    )
    add(
        "--teacher_cache",
        type=cli.filled,
        metavar="DIR",
        help="store the teacher's logits and pooled features of each augmented image there, and "
        "read them instead of running the teacher again (images up to 96 pixels, methods that "
        "read only logits or pooled features)",
    )
    weight = cli.number(float, 0)
    text = _default_text(defaults, modes[0], "lambda_kd") if modes else ""
    if len(defaults) > 1:
        text = f" (default {','.join(str(x.lambda_kd) for x in defaults.values())})"
    add(
        "--lambda_kd",
        type=cli.comma(weight),
        metavar="X[,X]",
        help="weight of each method's loss" + text,
    )
    text = _default_text(defaults, modes[0], "lambda_ce") if modes else ""
    add("--lambda_ce", type=weight, metavar="X", help="weight of the cross-entropy" + text)
    shared = dict(
        stages=dict(
            type=cli.comma(cli.number(int)),
            metavar="I[,I]",
            help="stages to compare: 1 is the shallowest, -1 the deepest",
        ),
        reduce=dict(
            choices=("mean", "sum"), help="combine the losses of the stages by mean or sum"
        ),
        adapter=dict(choices=ADAPTERS, help="layer that fits the student's maps to the teacher's"),
    )
    for name, fields in shared.items():
        owners = _owners(name, modes)
        for mode in owners or modes[:1]:
            text = fields["help"] + (_default_text(defaults, mode, name) if owners else "")
            _add_flag(group, modes, mode, name, **fields | dict(help=text))


def _add_flag(group, modes: list[str], mode: str, name: str, **fields) -> None:
    """Add --NAME; of several methods also --MODE.NAME, and that alone where two of them have it."""
    names = [f"--{name}"] if len(_owners(name, modes)) < 2 else []
    names += [f"--{mode}.{name}"] if len(modes) > 1 else []
    group.add_argument(*names, dest=_dest(name, mode, modes), **fields)


def _dest(name: str, mode: str, modes: list[str]) -> str:
    return name if len(_owners(name, modes)) < 2 else f"{mode}.{name}"


def _owners(name: str, modes: list[str]) -> list[str]:
    """The methods among `modes` on which the flag has an effect."""
    if name in SHARED:
        return [m for m in modes if uses(METHODS[m], METHODS[m].inputs, name)]
    return [m for m in modes if name in METHODS[m].flags]


def _kind_of(flag: Flag) -> dict:
    """What argparse is told of a method's flag."""
    if flag.kind is str:
        return dict(choices=flag.choices)
    if flag.kind is bool:
        return dict(type=lambda text: bool(cli.number(int, 0, 1)(text)), metavar="0|1")
    most = 100_000 if flag.kind is int else 1e6
    return dict(type=cli.number(flag.kind, 0, most), metavar="X")


def _owner(flag: str, modes: list[str]) -> str | None:
    """The reason why a flag is unknown, where some method has it."""
    name = flag.lstrip("-").split(".")[-1]
    own = _owners(name, modes)
    if len(own) > 1 or (own and "." in flag):
        return f"{' and '.join(own)} have it: give " + " or ".join(f"--{m}.{name}" for m in own)
    others = [mode for mode, method in METHODS.items() if name in method.flags]
    if others:
        return f"it belongs to --kd_mode {' or '.join(others)}, not to {'+'.join(modes)}"
