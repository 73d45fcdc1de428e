"""Every test runs from the repository's root, whatever the working directory, on one seed."""

import copy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

pytest.register_assert_rewrite("mistakes")

DIGITS = ["--data_name", "digits", "--img_size", "12", "--cuda", "0"]


def pytest_sessionstart(session):
    """scikit-learn's digits are read once for all tests: each reading takes 60 ms."""
    from sklearn import datasets

    digits = datasets.load_digits()
    datasets.load_digits = lambda: copy.deepcopy(digits)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow cases too")
    parser.addoption("--soak", action="store_true", help="and those that repeat others for long")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: only with --slow (make test-all)")
    config.addinivalue_line(
        "markers", "soak: repeats others for long, only with --soak (make soak)"
    )


def pytest_collection_modifyitems(config, items):
    for tier in ("slow", "soak"):
        if not config.getoption(f"--{tier}"):
            left_out = [item for item in items if item.get_closest_marker(tier)]
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker(tier)]


def tiers(cases, *quick):
    """The cases, those not in `quick` marked slow."""
    found = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        found.append(pytest.param(*values, marks=[pytest.mark.slow] * (case not in quick)))
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A trained teacher and a student's initial weights."""
    import train_base

    folder = tmp_path_factory.mktemp("base")
    for name, epochs in (("resnet14", "1"), ("resnet8", "1")):
        argv = ["--net_name", name, "--epochs", epochs, "--save_root", str(folder), "--note", name]
        train_base.main([*DIGITS, *argv])
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The checkpoint of a trained teacher, resnet14 on digits."""
    import train_base

    argv = ["--net_name", "resnet14", *DIGITS, "--epochs", "1", "--note", "t", "--print_freq", "3"]
    root = tmp_path_factory.mktemp("teacher")
    return train_base.main([*argv, "--save_root", str(root)])["dir"] + "/model_best.pth.tar"


@pytest.fixture
def distil(base, tmp_path):
    """A function: (mode, flags of train_kd.py, note) -> what its main returns, between those
    two."""
    import toys
    import train_kd

    def run(mode, *argv, note="r"):
        files = ["--t_model", base / "resnet14" / "model_best.pth.tar"]
        files += ["--s_init", base / "resnet8" / "initial_r8.pth.tar"]
        where = ["--save_root", tmp_path, "--note", note, "--kd_mode", mode, "--cuda", "0"]
        small = toys.small_flags(mode)
        return train_kd.main([str(x) for x in [*files, *where, *small, *argv]])

    return run


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Damaged files and folders: the names that a table may use in braces, and what is there."""
    import mistakes

    return mistakes.make_places(tmp_path_factory.mktemp("bad"))


@pytest.fixture
def fuzz(request):
    """Settings for so many examples, ten times as many with --slow."""
    from hypothesis import HealthCheck, settings

    def make(examples):
        slow = request.config.getoption("--soak")
        return settings(
            max_examples=examples * (10 if slow else 1),
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )

    return make
