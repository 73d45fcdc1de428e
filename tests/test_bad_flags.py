"""Flags that cannot be: each is refused in one line, and nothing is written. Then random flags."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from messages import named
from mistakes import DIGITS, cases, missing, refused

import train_base
import train_kd
from engine import cli, kd_cli
from kd_losses import METHODS
from utils import UserError

LONG = "x" * 300
SHOWN = "x" * 40 + "*"  # what a message must show of it, at least

# --- the tables: flags, then what the message must name; flags alone: the last of them ------------

# train_base.py --net_name resnet8 --data_name digits --img_size 12 --save_root {runs} --cuda 0 ...
BASE = [
    # types and ranges
    ("--epochs -1", "--epochs", "-1"),
    "--epochs 1.5",
    "--epochs 1e3",
    "--epochs 0x10",
    "--epochs ''",
    "--epochs 99999999999999999999",
    f"--epochs {'9' * 5000}",
    "--batch_size 1",
    ("--batch_size 1298", "--batch_size", "1298"),
    "--batch_size 99999999999999999999",
    *(f"--lr {x}" for x in "0 -0 -0.1 nan inf 1e999 1e300 0,1".split()),
    "--lr=",
    "--momentum 1.5",
    "--momentum -1",
    "--weight_decay=-1e-4",
    "--weight_decay inf",
    "--nesterov 2",
    "--nesterov yes",
    "--seed -1",
    "--seed 4294967296",
    "--print_freq 0",
    "--workers -1",
    "--workers 100000",
    "--cuda 2",
    "--cuda -1",
    "--flip maybe",
    ("--amp fp8", "--amp", "fp8"),
    *(f"--wandb {x}" for x in ("''", "a/b", "a#b", "a:b", "x" * 129)),
    ("--device tpu", "--device", "tpu"),
    ("--device cuda:x", "--device", "cuda"),
    ("--device cpu --cuda 1", "--device", "--cuda"),
    ("--cuda_graph 2", "--cuda_graph"),
    ("--cuda_graph", "--cuda_graph"),
    ("--protocol mine", "--protocol", "mine"),
    "--protocol ''",
    "--num_class 1",
    "--num_class 9223372036854775808",
    ("--num_class 7", "--num_class", "7"),
    ("--channels 2", "--channels", "2"),
    ("--channels grey", "--channels", "grey"),
    ("--channels 1 --net_name {nets}:Empty", "--channels", "{nets}:Empty"),
    *(f"--val {x}" for x in "0 -1 1.0 1.5 -0.1 nan inf 1e999 0.0 ten 1,2 ''".split()),
    ("--val 1288", "--val", "1288", "1287"),
    ("--val 0.999", "--val", "0.999"),
    ("--unlabeled {img}/size6", "--unlabeled"),
    ("--fit squash", "--fit", "digits"),
    ("--fit stretch", "--fit", "stretch"),
    ("--data_name imagefolder --img_root {img}/size6 --val 4", "--val", "4", "2"),
    ("--val", "--val"),
    "--img_size 4",
    "--img_size 1000000",
    ("--net_name vgg8 --img_size 5", "vgg8", "--img_size"),
    ("--net_name torchvision/inception_v3", "torchvision/inception_v3", "--img_size"),
    "--mean_std 1,2,3",
    "--mean_std 0,0,0,1,1,0",
    "--mean_std 0,0,0,1,1,nan",
    "--mean_std 125,123,114,63,62,67",
    "--mean_std 0,0,0,1e-300,1,1",
    "--mean_std cifar",
    ("--epochs 9 --milestones 3,2", "--milestones", "3,2"),
    ("--epochs 9 --milestones 3,3", "--milestones", "3,3"),
    ("--epochs 9 --milestones 150,180", "--milestones", "150,180"),
    "--milestones 3,",
    "--milestones 0",
    # combinations
    ("--momentum 0", "--momentum", "--nesterov"),
    ("--pretrained", "resnet8", "pretrained"),
    ("--resume", "{runs}/base-digits-resnet8"),
    # flags that do not exist
    "--lamda 1",
    "--net resnet8",
    ("--epoch 3", "--epoch", "--epochs"),
    "--kd_mode at",
    ("--dry_run=1", "--dry_run", "1"),
    ("--resume yes", "yes"),
    ("stray", "stray"),
    ("-- stray", "--"),
    "--epochs",
    "--net_name",
    "--note -x",
    # names
    ("--net_name resnet9", "resnet9", "resnet8"),
    "--net_name ''",
    ("--net_name torchvision/", "torchvision/"),
    ("--net_name torchvision/qqq", "torchvision", "qqq"),
    ("--net_name gone.py:net", "gone.py"),
    (f"--net_name {LONG}/a.py:net", SHOWN),
    ("--net_name {exits}:net", "{exits}"),
    ("--net_name {nets}:leaves", "{nets}", "leaves"),
    ("--net_name {nets}:long", "{nets}", "long", "\\x1b[31mx*"),
    ("--net_name {nets}:ExitsEarly", "{nets}:ExitsEarly", "at once"),
    ("--net_name {nets}:Empty", "{nets}:Empty"),
    ("--net_name {nets}:Still", "{nets}:Still"),
    ("--net_name {nets}:Detached", "{nets}:Detached"),
    ("--net_name {nets}:Raises", "{nets}:Raises", "only in training"),
    ("--net_name {nets}:TwoOfOne", "{nets}:TwoOfOne", "tuple", "logits", "0", "1"),
    ("--net_name {nets}:NoneOfThem", "{nets}:NoneOfThem", "dict", "logits"),
    ("--net_name hf/", "hf/"),
    ("--net_name {nets}:Exits", "{nets}:Exits"),
    (f"--net_name {'simkd:' * 3000}resnet8{':1' * 15_000}", "simkd:simkd:*"),
    (f"--net_name simkd:resnet8:{'9' * 5000}:1:1:1:1", "simkd:resnet8:999*"),
    ("--net_name simkd:resnet8:0:1:1:1:1", "simkd:resnet8:0:1:1:1:1"),
    ("--net_name {file}.py:", "{file}.py"),
    ("--data_name digit", "digit", "digits"),
    ("--data_name hf/", "hf/"),
    ("--data_name hf/{img}/size6", "{img}/size6"),
    ("--data_name hf/{img}/size6 --fit crop --img_size 12", "{img}/size6"),
    ("--data_name tiny-imagenet --img_root {img}/size6", "{img}/size6"),
    ("--data_name tiny-imagenet --img_root {file}", "--img_root", "{file}"),
    ("--data_name tiny-imagenet --fit crop", "--fit", "tiny-imagenet"),
    "--data_name ''",
    # where it is written
    ("--save_root {file}", "{file}"),
    ("--save_root {file}/deeper", "{file}"),
    "--save_root ''",
    "--save_root 'a\0b'",
    "--save_root '\udce4'",
    (f"--save_root {{runs}}/{LONG}", "{runs}/" + SHOWN),
    ("--save_root /proc/none", "/proc/none"),
    "--note ''",
    *(("--note " + x, "--note", x) for x in ("a/b", "..", ".", "../out", "{root}/out")),
    "--note 'a\nb'",
    (f"--note {LONG}", "{runs}/" + SHOWN),
    ("--note taken", "{runs}/taken", "--note"),
    # going on with a run
    ("--epochs 1 --batch_size 1297 --resume --note base --lr 0.2", "--resume", "--lr", "0.2"),
    ("--epochs 2 --batch_size 1297 --resume --note base", "--resume", "--epochs", "2"),
    ("--resume --note at", "--resume", "{runs}/at"),
    *(
        (f"--resume --note {name}", "--resume", f"{{runs}}/{name}")
        for name in ("gone", "taken", "args_list", "args_number")
    ),
    *(
        (f"--epochs 1 --batch_size 1297 --resume --note {run}", f"{{runs}}/{run}/{FILE}", *names)
        for FILE in ["checkpoint.pth.tar"]
        for run, *names in (
            ("cut",),
            ("best", "flags"),
            ("no_net", "net"),
            ("half_net",),
            ("no_groups",),
            ("momentum", "optimizer"),
            ("rng",),
            ("history", "3"),
            ("flags",),
            ("inside",),
        )
    ),
]
# train_kd.py --kd_mode at --t_model {t} --s_init {s} --save_root {runs} --cuda 0 ...
KD = [
    # flags of the methods
    ("--lamda_kd 1", "--lamda_kd", "--lambda_kd"),
    "--lambda 1",
    "--kd_mode",
    "--kd_mode ''",
    ("--kd_mode fitnets", "--kd_mode", "fitnets", "fitnet"),
    ("--kd_mode qqq", "--kd_mode", "qqq", "logits", "ofa"),
    "--kd_mode at+",
    ("--kd_mode at,", "--kd_mode", "at,"),
    ("--kd_mode at,at", "--kd_mode", "at,at"),
    ("--kd_mode at,stt", "--kd_mode", "stt"),
    ("--kd_mode at,st --T 2", "--T", "--at.T"),
    ("--kd_mode at,st --lambda_kd 1,2", "--lambda_kd", "--at.lambda_kd"),
    ("--kd_mode at,st --dkd.beta 2", "--dkd.beta"),
    ("--kd_mode at,st --at.beta 2", "--beta", "at"),
    ("--kd_mode at,st --at.lr 1", "--at.lr", "--lr"),
    ("--kd_mode at,st --help", "--help", "--kd_mode at"),
    ("--kd_mode at,none --none.lambda_ce 2", "--lambda_ce", "none"),
    ("--kd_mode none --lambda_kd 2", "--lambda_kd"),
    ("--kd_mode none", "--t_model", "none"),
    ("--kd_mode none+at", "--kd_mode", "none"),
    ("--kd_mode none,at --none.t_model {t}", "--none.t_model", "--t_model"),
    ("--kd_mode AT", "--kd_mode", "AT"),
    ("--kd_mode st --p 2", "--p", "--kd_mode at"),
    ("--p 0", "--kd_mode at", "p"),
    "--p -2",
    "--p two",
    ("--p 1e6", "--kd_mode at"),
    "--absolute 2",
    "--net_name resnet8",
    ("--kd_mode crd --mode loose", "--mode", "loose"),
    "--kd_mode crd --nce_n 1000000000",
    ("--kd_mode crd --feat_dim 0", "--kd_mode crd", "feat_dim"),
    ("--kd_mode vid --init_var 0", "--kd_mode vid", "init_var"),
    ("--kd_mode cc --P_order 5000", "--kd_mode cc", "P_order"),
    ("--kd_mode cc --gamma 0", "--kd_mode cc", "gamma"),
    "--kd_mode dkd --alpha -1",
    ("--kd_mode st --T 0", "--kd_mode st", "T"),
    ("--kd_mode st --T 1e-300", "--kd_mode st"),
    ("--kd_mode reviewkd --mid_channel 0", "--kd_mode reviewkd", "mid_channel"),
    ("--kd_mode ft --k 0.001", "--kd_mode ft", "k", "0.001"),
    ("--kd_mode kdsvd --stages 3", "--kd_mode kdsvd"),
    ("--kd_mode ofd --margin none", "--margin", "none"),
    ("--kd_mode at+at", "--kd_mode", "at+at"),
    ("--kd_mode st+fsp", "--kd_mode", "fsp"),
    # of the newer ones
    ("--kd_mode lskd --T 0", "--kd_mode lskd", "T"),
    "--kd_mode dist --T -1",
    ("--kd_mode nkd --T 0", "--kd_mode nkd", "T"),
    ("--kd_mode wsld --T 0", "--kd_mode wsld", "T"),
    ("--kd_mode ttm --gamma 0", "--kd_mode ttm", "gamma"),
    ("--kd_mode wttm --gamma 0", "--kd_mode wttm", "gamma"),
    ("--kd_mode rld --alpha_T 0", "--kd_mode rld", "alpha_T"),
    ("--kd_mode ctkd --loops 0", "--kd_mode ctkd", "loops"),
    "--kd_mode ctkd --t_end nan",
    ("--kd_mode srrl --project pooled", "--project", "pooled"),
    ("--kd_mode simkd --factor 100", "--kd_mode simkd", "factor", "100"),
    ("--kd_mode simkd --lambda_kd 0", "--lambda_kd", "distil"),
    ("--kd_mode simkd+st", "--kd_mode", "simkd"),
    ("--kd_mode itrd --power 0", "--kd_mode itrd", "power"),
    ("--kd_mode pefd --n 0", "--kd_mode pefd", "0"),
    ("--kd_mode vkd --map qr", "--map", "qr"),
    ("--kd_mode catkd --resolution 0", "--kd_mode catkd", "resolution"),
    ("--kd_mode mlkd --base 0", "--kd_mode mlkd", "0.0"),
    ("--kd_mode mlkd --base 2", "--kd_mode mlkd", "2.0"),
    ("--kd_mode mlkd --form paper", "--form", "paper"),
    ("--kd_mode wkd_l --eps 0", "--kd_mode wkd_l", "eps"),
    ("--kd_mode wkd_l --measured maps", "--measured", "maps"),
    ("--kd_mode wkd_f --grid 50", "--kd_mode wkd_f", "grid", "50"),
    ("--kd_mode sdd --scales 1,x", "--scales", "1,x"),
    ("--kd_mode sdd --inner at", "--inner", "at"),
    ("--kd_mode mgd --lam 1", "--kd_mode mgd", "lam"),
    ("--kd_mode crld --tau_w 2", "--kd_mode crld", "tau_w"),
    ("--kd_mode semckd --batch_size 3", "--kd_mode semckd", "3"),
    ("--kd_mode ofa --eps 0", "--kd_mode ofa", "eps"),
    "--logit_stand",
    "--kd_mode st+at --logit_stand",
    "--kd_mode st --gather",
    # weights and stages
    "--kd_mode st+at --lambda_kd 1",
    "--lambda_kd 1,2",
    "--lambda_kd 1,",
    "--lambda_kd -1",
    "--lambda_kd inf",
    "--lambda_ce nan",
    ("--lambda_kd 0 --lambda_ce 0", "--lambda_kd", "--lambda_ce", "distil"),
    ("--kd_mode ab --lambda_kd 0", "--lambda_kd", "init"),
    ("--kd_mode ab --lambda_ce 0", "--lambda_ce", "train"),
    ("--stages 4", "--stages", "4"),
    ("--stages 0", "--stages", "0"),
    "--stages 1.5",
    "--stages ''",
    ("--stages 1,1", "--stages", "1,1"),
    ("--stages 1,-3", "--stages", "1,-3"),
    ("--stages 3,1", "--stages", "3,1"),
    ("--reduce max", "--reduce", "max"),
    ("--adapter big", "--adapter", "big"),
    "--t_taps ''",
    "--t_taps layer1,",
    ("--t_taps layr1", "layr1", "layer1"),
    *(
        (f"--s_taps {x}", x)
        for x in "fc layer1#0 layer1#-1 layer1#9 layer1:out layer1,layer1 layer3,layer1".split()
    ),
    "--cuda_graph",
    # several teachers
    ("--t_model {t},{t}", "--t_model", "{t}"),
    ("--t_model {t},", "--t_model", "2"),
    ("--t_model ,", "--t_model", "2"),
    ("--t_model {t},{ck}/gone.pth", "{ck}/gone.pth"),
    ("--t_model {ck}/a,b.pth", "--t_model", "{ck}/a,b.pth"),
    ("--t_model {t},{s} --t_name resnet14", "--t_name", "resnet14", "2"),
    ("--t_model {t},{s} --t_name resnet14,resnet8,resnet8", "--t_name", "2"),
    ("--t_model {t},{s} --t_name resnet14,", "--t_name", "2"),
    ("--t_model {t},{s} --t_name resnet14,resnet20", "--t_name", "resnet20", "{s}"),
    ("--t_model {t},{s} --t_taps layer1,layer2", "--t_taps", "2"),
    ("--t_model {t},{s} --t_taps layer1+", "--t_taps", "2"),
    ("--t_model {t},{s} --t_taps layer1+layr1", "layr1", "layer1"),
    ("--t_model {t},{s} --t_key ema", "--t_key", "ema"),
    ("--t_model {t},{ck}/hundred.pth --kd_mode st", "{ck}/hundred.pth", "100"),
    ("--t_model {t},{ck}/wolves.pth --kd_mode st", "{ck}/wolves.pth", "wolf"),
    ("--t_model {t},{ck}/sized.pth", "--img_size", "{t}", "12", "{ck}/sized.pth", "16"),
    ("--t_model {t},{s} --kd_mode dml", "--t_model", "dml"),
    ("--t_model {t},{s} --kd_mode simkd", "--t_model", "simkd"),
    ("--t_model {t},{s} --kd_mode wkd_l", "--t_model", "wkd_l"),
    ("--t_model {t},{s} --kd_mode st --teacher_cache {root}/cache", "--teacher_cache", "st"),
    ("--t_model {t},{s} --kd_mode bss --ensemble confidence", "bss", "--ensemble", "confidence"),
    (
        "--t_model {t},{s} --kd_mode st --ensemble confidence --unlabeled {img}/size6",
        "--ensemble",
        "confidence",
        "--unlabeled",
    ),
    ("--t_model {t},{s} --ensemble probs", "--ensemble", "probs", "at"),
    ("--t_model {t},{s} --kd_mode at,sp --ensemble probs", "--ensemble", "probs", "at"),
    ("--t_model {t},{s} --kd_mode st --ensemble mean", "--ensemble", "mean"),
    ("--t_model {t},{s} --kd_mode st --ensemble", "--ensemble"),
    ("--kd_mode st --ensemble logits", "--ensemble", "logits"),
    ("--kd_mode dml --ensemble logits", "--ensemble", "logits"),
    # what the checkpoints know
    ("--t_name resnet20", "--t_name", "resnet20", "{t}"),
    ("--s_name resnet20", "--s_name", "resnet20", "{s}"),
    "--t_name ''",
    ("--num_class 100", "--num_class", "100"),
    ("--channels 1", "--channels", "1", "3"),
    ("--channels 0", "--channels", "0"),
    ("--val 5000", "--val", "5000", "1297"),
    ("--unlabeled {root}/gone", "--unlabeled", "{root}/gone"),
    ("--unlabeled {file}", "--unlabeled", "{file}"),
    ("--unlabeled {img}/no_classes", "--unlabeled", "{img}/no_classes"),
    ("--unlabeled {img}/text", "{img}/text/train/cat/0.png"),
    ("--unlabeled {img}/zero", "{img}/zero/train/cat/0.png"),
    (f"--unlabeled {LONG}", SHOWN),
    "--unlabeled ''",
    "--unlabeled",
    ("--kd_mode dkd --unlabeled {img}/size6", "--unlabeled", "dkd"),
    ("--kd_mode st+crd --unlabeled {img}/size6", "--unlabeled", "crd"),
    ("--kd_mode at,none --unlabeled {img}/size6", "--unlabeled", "none"),
    ("--fit stretch", "--fit", "stretch"),
    ("--fit squash", "--fit", "digits"),
    ("--kd_mode at,st --at.val 5", "--at.val", "--val"),
    ("--data_name cifar10", "--data_name", "cifar10"),
    ("--img_size 16", "--img_size", "16", "12"),
    ("--s_init {ck}/hundred.pth", "{ck}/hundred.pth", "100"),
    ("--s_pretrained", "{s}", "pretrained"),
    ("--kd_mode dml --t_model {s}", "weights"),
    "--batch_size 1",
    ("--batch_size 5000", "--batch_size", "5000"),
    ("--note taken", "{runs}/taken", "--note"),
    ("--note a/b", "--note", "a/b"),
    ("--resume", "--resume", "{runs}/at-digits-resnet14-resnet8"),
    ("--resume --note base", "--resume", "{runs}/base"),
    ("--resume --note at2", "--resume", "{runs}/at2"),
    ("--resume --note at --seed 5", "--resume", "--batch_size"),
    ("--resume --note cut", "{runs}/cut/checkpoint.pth.tar"),
]
# train_kd.py and nothing but these
BARE_KD = [
    ("", "--kd_mode"),
    ("--kd_mod at", "--kd_mode"),
    ("--kd_mode at --s_init {s}", "--t_model"),
    ("--kd_mode at --t_model {t}", "--s_name", "--s_init"),
    ("--kd_mode at --t_model {t} --s_name resnet9", "resnet9"),
    ("--kd_mode at --s_init {s} --t_pretrained", "--t_name", "--t_model"),
    ("--kd_mode at --t_model {t} --s_name resnet8 --s_key net", "--s_key", "net"),
    ("--kd_mode dml --s_init {s} --t_name resnet8 --t_key net", "--t_key", "net"),
    ("--kd_mode at --t_model {t} --s_name hf/", "hf/"),
    ("--kd_mode dml --s_init {s} --t_name resnet8 --t_classes {lines}/ten.txt", "--t_classes"),
    ("--kd_mode dml --s_name {nets}:TwoOfOne " + DIGITS, "{nets}:TwoOfOne", "tuple", "logits"),
    ("--kd_mode at --s_init {s} --t_pretrained --t_name resnet8", "resnet8", "pretrained"),
    ("--kd_mode dml --s_name resnet8", "--data_name"),
    (f"--kd_mode none --s_name resnet8 --ensemble probs {DIGITS}", "--ensemble", "none"),
    ("--kd_mode st --s_name resnet8 --t_pretrained --t_name resnet8,", "--t_name", "2"),
    *(
        (f"--kd_mode {mode} --s_name {{nets}}:Exits {more} {DIGITS}", "{nets}:Exits")
        for mode, more in dict(dml="--t_name resnet8", st="--t_model {t}").items()
    ),
    (f"--kd_mode dml --s_name resnet8 --t_name {{nets}}:Raises {DIGITS}", "{nets}:Raises"),
]
BARE_BASE = [
    ("", "--net_name"),
    ("--net_name resnet8", "--data_name"),
    (
        "--net_name resnet8 --data_name imagefolder --img_root {img}/wide --fit squash",
        "--fit",
        "--img_size",
    ),
]

RUN = "--save_root {runs} --cuda 0 "
CASES = [
    *cases(train_base.main, f"--net_name resnet8 {DIGITS} {RUN}", BASE),
    *cases(train_base.main, RUN, BARE_BASE),
    *cases(train_kd.main, RUN + "--kd_mode at --t_model {t} --s_init {s} ", KD),
    *cases(train_kd.main, RUN, BARE_KD),
]


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
@pytest.mark.parametrize("main, argv, wanted", CASES)
def test_one_line_and_nothing_written(places, monkeypatch, capfd, main, argv, wanted):
    refused(places, monkeypatch, capfd, main, argv, wanted)


def test_what_a_message_names():
    """Whole words only, or the tables would prove nothing."""
    assert (
        named("--lr", "error: --lr: no") and named("p", "the --p is 0") and named("--", "no --: x")
    )
    assert named("abc*", "it is abcd") and named("/x/a.pth", "error: /x/a.pth is a folder")
    assert not named("--lr", "error: --lr_x or lr") and not named("p", "stop, --p_order or a-p-b")
    assert named(".", "error: . is a folder") and not named(".", "x.pth is a folder.")
    assert not named("--", "no --lr") and not named("7", "17 or 75") and not named("/x", "/x-y")
    assert missing(["1", "a"], "/tmp/a-1: no", "/tmp/a-1") == ["1", "a"]


# --- at random ------------------------------------------------------------------------------------

ODD = [
    *(
        "0 -0 -1 1 2 10 0.5 1e999 -1e999 nan -nan inf 0x10 1_0 1e3".split()
        + ".5 5. + - -- = , ,, 1,2 1,,2".split()
    ),
    *("2,1 measured cifar10 0,0,0,1,1,1 0,0,0,0,0,0 at st+at + at+ at++st None True []".split()),
    *"٣ ½ ¹ \u200b1 1\u00a0 \0 \n \udce4 ../x a/b".split(" "),
    *"{} {0} %s %(prog)s * ~ $HOME -5 -x @x".split(),
    *("", " ", "9" * 400, "9" * 5000, "x" * 5000, "1e" + "9" * 50, "--lr", "--help=1", "-h"),
]


@pytest.mark.slow
@pytest.mark.parametrize("script", [train_kd, train_base])
def test_random_flags(fuzz, capsys, script):
    own = ["--kd_mode", "at"] if script is train_kd else ["--net_name", "resnet8"]
    parse = train_base.parse if script is train_base else lambda argv: kd_cli.parse(argv, "")
    known = vars(parse(own))
    flags = {f"--{name}" for name in known} | {
        f"--{x}" for row in METHODS.values() for x in row.flags
    }
    flags = sorted(flags | {"--help", "-h", "--net1_init", "--"})
    flag = st.sampled_from(flags)
    near = st.builds(lambda x, i: x[:i] + x[i + 1 :], flag, st.integers(0, 12))
    near |= st.builds(lambda x, i: x[:i] + x[i - 1 :], flag, st.integers(1, 12))
    value = st.sampled_from(ODD) | st.sampled_from([*METHODS]) | st.text(max_size=6)
    value |= st.integers().map(str) | st.floats().map(str)
    word = st.one_of(
        st.tuples(flag, value),
        st.builds(lambda x, y: (f"{x}={y}",), flag | near, value),
        st.tuples(flag | near | value),
    )

    @fuzz(400)
    @given(st.booleans(), st.lists(word, max_size=5))
    def check(whole, words):
        argv = [*(own if whole else []), *(x for pair in words for x in pair)]
        began = time.process_time()
        try:
            args = parse(argv)
            cli.resolve(args, "resnet8", {})
            if script is train_kd:
                kd_cli.settings_of(args, "", "", 10)
        except UserError as error:
            assert str(error)
        except SystemExit as stop:
            assert stop.code == 0 and any(x.startswith(("--help", "-h")) for x in argv)
        assert time.process_time() - began < 2
        capsys.readouterr()

    check()
