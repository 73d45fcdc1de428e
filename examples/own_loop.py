"""Two copied loss files, at.py and dkd.py, in your own training loop. It takes about ten seconds.

    python examples/own_loop.py

Copy kd_losses/at.py and kd_losses/dkd.py next to this file, and it runs without the repository. One
seed on 300 training images: it shows how to use a loss, not how much a loss helps.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

sys.path.append(str(Path(__file__).resolve().parent.parent / "kd_losses"))  # not with copied files
from at import AT  # noqa: E402
from dkd import DKD  # noqa: E402


def network(width: int) -> nn.Sequential:
    layers = []
    for c_in, c_out in ((1, width), (width, 2 * width)):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, 10))


def train(student, teacher=None, epochs=60):
    """Train the student: on the labels, and with a teacher also on its feature maps and logits."""
    maps = {}  # the hooks write the feature maps of the last forward pass here
    student[5].register_forward_hook(lambda module, args, out: maps.update(student=out))
    if teacher is not None:
        teacher[5].register_forward_hook(lambda module, args, out: maps.update(teacher=out))
    at, dkd = AT(p=2), DKD(alpha=1.0, beta=2.0, T=4.0)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    for epoch in range(epochs):
        for batch in torch.randperm(len(train_img)).split(64):
            img, target = train_img[batch], train_target[batch]
            logits = student(img)
            loss = F.cross_entropy(logits, target)
            if teacher is not None:
                with torch.no_grad():
                    teacher_logits = teacher(img)
                loss = loss + 100 * at(maps["student"], maps["teacher"])
                loss = loss + 0.3 * dkd(logits, teacher_logits, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    accuracy = (student.eval()(test_img).argmax(1) == test_target).float().mean().item()
    print(f"loss {loss.item():.3f}  test accuracy {100 * accuracy:.2f} %")
    return student


torch.manual_seed(0)
digits = load_digits()
images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
labels = torch.from_numpy(digits.target)
train_img, train_target = images[:300], labels[:300]
test_img, test_target = images[300:], labels[300:]

print("teacher   ", end=" ")
teacher = train(network(16), epochs=30)
print("baseline  ", end=" ")
torch.manual_seed(1)
train(network(2))
print("distilled ", end=" ")
torch.manual_seed(1)  # the same initial weights and batches as the baseline
train(network(2), teacher)
