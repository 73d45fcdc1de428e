"""The two networks of a run: what the teacher's classes and the images have to do with them.

found_t: what is known of the teacher, or of several (`teachers.each`); None without one.
"""

from argparse import Namespace
from dataclasses import replace

from engine import kd_cli, outputs
from engine.channels import check_channels, check_grey
from engine.ensemble import nets_of
from engine.teachers import agreed, each
from kd_losses import METHODS
from utils import UserError, shown


def known_data(args: Namespace, found_t, found_s) -> dict:
    """What the checkpoints know of the data: the teacher's, or else the student's.

    Where the teacher's classes need not be the dataset's, because no method reads them or
    --t_classes maps them, flags have precedence over the teacher's checkpoint. How many classes the
    teacher has is compared later, by `match_classes`. Raises UserError if --data_name
    contradicts a checkpoint.
    """
    several = [x for x in each(found_t) if set(x.meta) - {"num_class"}]
    if len(several) > 1:
        return agreed([(x.path, known_data(args, x, found_s)) for x in several], args)
    found_t = next(iter(several), None)
    known = found_t.meta if found_t else {}
    knows = {key: x for key, x in known.items() if key != "num_class"}
    if not knows:
        return dict(found_s.meta)
    needed, advice = needed_classes(kd_cli.modes_of(args.kd_mode))
    given = {k: getattr(args, k) for k in ("data_name", "img_size") if getattr(args, k) is not None}
    for key, value in given.items():
        known, mine = (found.meta.get(key, value) for found in (found_t, found_s))
        if mine != value:
            raise UserError(f"--{key} {value} contradicts {found_s.path}, which says {shown(mine)}")
        if known != value and needed and not args.t_classes:
            raise UserError(
                f"--{key} {value} contradicts {found_t.path}, which says {shown(known)}"
                + f": {needed}; {advice}" * (key == "data_name")
            )
        if known != value:
            knows.pop("img_root" if key == "data_name" else key, None)
    return knows | given


def needed_classes(modes: list[str]) -> tuple[str, str]:
    """Why the teacher's classes have to be the dataset's ('' where they need not), and what else
    to do."""
    reading = [mode for mode in modes if METHODS[mode].reads_answers]
    if not reading:
        return "", ""
    others = [mode for mode, method in METHODS.items() if not method.reads_answers]
    few = ", ".join([mode for mode in ("at", "fitnet", "crd", "rkd", "sp") if mode in others])
    why = f"--kd_mode {'+'.join(reading)} reads the teacher's logits or its classifier"
    more = f"{few} and {len(others) - 5} more methods compare only feature maps"
    return why, f"--t_classes FILE maps the teacher's outputs to the dataset's classes; {more}"


def match_outputs(args: Namespace, found_t, found_s, data) -> None:
    """Compare the classes of both networks (checkpoint.Weights) with the dataset's, and fill in
    their `outputs` and `channels`. found_t: None without a teacher. Raises UserError: see
    `outputs.match_classes`."""
    modes = kd_cli.modes_of(args.kd_mode)
    where = data.train.classes, data.name, data.train.size
    trained = any(METHODS[mode].teacher == "trained" for mode in modes)
    fresh = outputs.Outputs(data.train.num_class)  # of a library, whose classifier is replaced
    for found in each(found_t):
        found.outputs, found.channels = fresh, args.channels if trained else None
        if trained and found.pretrained:
            continue
        found.outputs = outputs.match_classes(
            *(found, *where, "--t_model" if found.path else "--t_pretrained"),
            *(args.t_classes, "--t_classes", *needed_classes(modes)),
            in_classifier=trained or any(METHODS[mode].reads_classifier for mode in modes),
        )
    found_s.outputs, found_s.channels = fresh, args.channels
    if not found_s.pretrained:
        found_s.outputs = outputs.match_classes(
            *(found_s, *where, "--s_init"),
            needed="a student must start from weights for its own classes; leave --s_init out",
            in_classifier=True,
        )


def check_images(args: Namespace, found_t, found_s, teacher, student, data, batch_norms) -> None:
    """Whether both networks can see the images, and give logits in training mode where they are in
    it; what there is to say becomes their notes. teacher, student: the networks, the teacher None
    without one; batch_norms: whether the teacher's use the statistics of a batch. Raises UserError
    where they cannot."""
    check_channels(student, found_s.name, args.channels)
    found_s.say(check_grey(student, found_s.name, data.train))
    for found, net in zip(each(found_t), nets_of(teacher)):
        found.say(check_grey(net, found.name, data.train))
        if batch_norms and found.outputs.answers:
            count = found.outputs.shown
            outputs.forward_logits(net, found.name, count, data.train.size, training=True)


def take_over(found_t, first, teacher, img_size: int) -> None:
    """Let a student have the teacher that was built for another student.

    found_t, first: the teacher (checkpoint.Weights) as this student and as the other one found it;
    teacher: the network. Raises UserError if it lacks what this student's methods read.
    """
    found_t.notes = first.notes
    if not found_t.outputs.needed:
        found_t.outputs = replace(found_t.outputs, answers=first.outputs.answers)
        return
    if not first.outputs.answers:
        outputs.forward_logits(teacher, found_t.name, found_t.outputs.shown, img_size)
    if found_t.outputs.in_classifier and hasattr(teacher, "selected_outputs"):
        raise UserError(
            f"{found_t.name}: its classes cannot be put into another order, since its logits are "
            "not those of one last layer"
        )
