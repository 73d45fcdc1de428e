"""The accuracy of a network on a split; after the training, that of the last and the best epoch on
the test set, where the best was chosen on a validation set."""

import torch

import utils
from dataset import Data
from engine import distributed, stream
from engine.checkpoint import read_checkpoint
from engine.run import Run
from utils import UserError


def evaluate(net: torch.nn.Module, data: Data, split: str, precision: utils.Precision) -> dict:
    """{SPLIT_loss, SPLIT_top1, SPLIT_top5} of a network. split: 'test' or 'val'."""
    batches = stream.test_batches(data.splits[split], share=utils.share())
    return utils.evaluate(net, batches, precision, split)


def final_tests(
    run: Run, nets: dict[str, torch.nn.Module], data: Data, precision: utils.Precision
) -> dict[str, dict] | None:
    """{'last', 'best': metrics on the test set}, of the weights in the run's two checkpoints; None
    where the epochs themselves are evaluated on the test set. A run that is stopped in here does it
    again when it is resumed.

    nets: {entry of a checkpoint: network}: the student and perhaps its peer; their weights are
    changed.
    """
    if data.val is None:
        return None
    files = dict(last=run.checkpoint, best=run.dir / "model_best.pth.tar")
    found = {}
    for which, path in files.items():
        if utils.rank() == 0:
            saved = read_checkpoint(path)
            for key, net in nets.items():
                _load(net, saved, key, path)
        distributed.broadcast_parameters(*nets.values())
        found[which] = {}
        for prefix, net in zip(("", "peer_"), nets.values()):
            score = evaluate(net, data, "test", precision)
            found[which] |= {prefix + name: value for name, value in score.items()}
    return found


def _load(net: torch.nn.Module, saved: dict, key: str, path) -> None:
    try:
        net.load_state_dict(saved[key])
    except (KeyError, RuntimeError, TypeError) as error:
        raise UserError(
            f"{path} is damaged, or from another run ({utils.first_line(error)}): start again"
        ) from error
