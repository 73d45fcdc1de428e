"""The values that public implementations produce (tests/data/losses), and how to compare with them.

A file holds some cases; under `case0/` lie `hyper` (JSON), `in/*`, `param/*`, `loss`, `grad/*`,
`grad_param/*`, `after/*`, `extra/*` and the same of other implementations under `alt_*/`.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

DATA = Path(__file__).parent / "data"


class Case:
    """One case of one method, its floating arrays as float64 tensors."""

    def __init__(self, arrays: dict):
        self.arrays = arrays
        self.hyper = json.loads(str(arrays["hyper"]))

    def __getitem__(self, key: str) -> torch.Tensor:
        value = torch.from_numpy(np.array(self.arrays[key]))
        return value.double() if value.is_floating_point() else value

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """Everything below `prefix`, by the rest of its name."""
        found = {k.removeprefix(prefix): self[k] for k in self.arrays if k.startswith(prefix)}
        assert found, f"nothing is called {prefix}*"
        return found

    def leaf(self, key: str) -> torch.Tensor:
        """An input that requires grad."""
        return self[key].requires_grad_()


class TwoConv(nn.Module):
    """The network of the reference values of sobolev, lwm and bss; counts its calls."""

    def __init__(self, cin, c1, c2, k, act):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, c1, 3, padding=1)
        self.conv2 = nn.Conv2d(c1, c2, 3, stride=2, padding=1)
        self.fc = nn.Linear(c2, k)
        self.act = dict(relu=F.relu, softplus=F.softplus, tanh=torch.tanh)[act]
        self.calls = 0

    @classmethod
    def of(cls, case: Case, name: str) -> "TwoConv":
        """The case's network of that name with its weights, in float64."""
        net = cls(**case.hyper[name]).double()
        net.load_state_dict(case.group(f"param/{name}."))
        return net

    def bottom(self, img):
        return self.act(self.conv1(img))

    def top(self, fm):
        return self.fc(self.act(self.conv2(fm)).mean((2, 3)))

    def forward(self, img):
        self.calls += 1
        return self.top(self.bottom(img))


def cases(method: str) -> list[Case]:
    """All the cases of a method."""
    with np.load(DATA / "losses" / f"{method}.npz") as file:
        names = sorted({key.split("/")[0] for key in file.files})
        return [
            Case({k.split("/", 1)[1]: file[k] for k in file.files if k.startswith(name + "/")})
            for name in names
        ]


def agree(value: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-9) -> None:
    """Equal to `rtol` of the largest expected entry."""
    assert value.dtype == torch.float64
    scale = expected.abs().max().item()
    torch.testing.assert_close(value.detach(), expected, rtol=0, atol=rtol * scale + 1e-300)


def agree_grads(loss: torch.Tensor, leaves: dict, expected: dict, rtol: float = 1e-9) -> None:
    """The gradients of `loss` in `leaves` are the `expected` ones, of the same names."""
    assert leaves.keys() == expected.keys()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for (name, leaf), grad in zip(leaves.items(), grads):
        grad = torch.zeros_like(leaf) if grad is None else grad  # some are zero by construction
        agree(grad, expected[name], rtol)
