"""A training step as a CUDA graph: recorded once, replayed on the batches that follow."""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.distiller import Batch


class CapturedStep:
    """A training step, called like `train_kd.train_step`, without a kernel launch from Python.

    A graph holds the phase, the learning rate, the weights and the batch's shape: where one
    changes, it is recorded again. The first steps of a phase, those after a method's weight has
    changed from or to 0, and a last batch of another size are ordinary ones.
    """

    WARM_UP = (
        3  # ordinary steps in which libraries choose kernels and the optimizer makes its state
    )

    def __init__(self, train_step: Callable[..., dict[str, Tensor]]):
        self.train_step = train_step
        self.active, self.steps, self.recorded, self.graph = None, 0, None, None

    def __call__(self, distiller, phase, optimizer, batch: Batch, weights, *args):
        active = phase, tuple(bool(weight) for weight in weights.values())
        if active != self.active:
            self.active, self.steps, self.recorded, self.graph = active, 0, None, None
        if self.steps < self.WARM_UP or batch.img.shape != self.shape:
            if self.steps == 0:
                self.shape = batch.img.shape
            self.steps += 1
            return self._on_a_side_stream(distiller, phase, optimizer, batch, weights, *args)
        values = optimizer.param_groups[0]["lr"], tuple(weights.values()), batch.img.shape
        if values != self.recorded:
            self.recorded, self.graph = values, torch.cuda.CUDAGraph()
            copies = {name: x.clone() for name, x in batch.tensors().items()}
            self.batch = Batch(**copies, epoch=batch.epoch, epochs=batch.epochs)
            with torch.cuda.graph(self.graph):
                self.terms = self.train_step(
                    distiller, phase, optimizer, self.batch, weights, *args
                )
        with torch.no_grad():  # the images may require gradients
            for name, value in batch.tensors().items():
                getattr(self.batch, name).copy_(value)
        self.graph.replay()
        return self.terms

    def _on_a_side_stream(self, *args):
        """An ordinary step, on a stream of its own: what comes before a capture has to be."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            result = self.train_step(*args)
        torch.cuda.current_stream().wait_stream(side)
        return result
