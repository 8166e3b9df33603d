"""Swapping the import changes nothing but the speed: one network, trained twice on handwritten digits.

The data are scikit-learn's copy of the UCI handwritten digits: 1797 images of 8x8. Both trainings start from the same
weights, see the same batches, and differ in one thing: where their parts come from. Their steps alternate, so that
neither is timed on a quieter machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fusedtricks


@dataclass(frozen=True)
class Parts:
    """What the two trainings take from different places. A new operation joins by one line here and one in each set."""

    name: str
    layer_norm: Callable[..., nn.Module]
    rms_norm: Callable[..., nn.Module]


TORCH = Parts("torch", layer_norm=nn.LayerNorm, rms_norm=nn.RMSNorm)
OURS = Parts("fusedtricks", layer_norm=fusedtricks.nn.LayerNorm, rms_norm=fusedtricks.nn.RMSNorm)


class Block(nn.Module):
    """A residual block that mixes features, normalised before and inside."""

    def __init__(self, parts: Parts, width: int):
        super().__init__()
        self.outer, self.inner = parts.layer_norm(width), parts.rms_norm(2 * width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.inner(nn.functional.gelu(self.up(self.outer(x)))))


class Digits(nn.Module):
    """Each of the 8 rows of an image is a token of 8 pixels."""

    def __init__(self, parts: Parts, width: int = 96, depth: int = 3):
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(0.02 * torch.randn(8, width))
        self.blocks = nn.Sequential(*(Block(parts, width) for _ in range(depth)))
        self.norm = parts.layer_norm(8 * width)
        self.head = nn.Linear(8 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.blocks(self.embed(images) + self.position)
        return self.head(self.norm(tokens.flatten(1)))


@dataclass
class Training:
    parts: Parts
    device: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = Digits(self.parts).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=1e-2)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    def step(self, images: Tensor, labels: Tensor) -> None:
        self.synchronize()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.criterion(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        self.synchronize()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        self.model.eval()
        return (self.model(images).argmax(1) == labels).double().mean().item()


def data(device: str) -> list[Tensor]:
    digits = load_digits()
    images = torch.from_numpy(digits.images).float() / 16
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(range(len(labels)), test_size=0.25, random_state=0, stratify=digits.target)
    return [t.to(device) for t in (images[train], labels[train], images[test], labels[test])]


def train(epochs: int, seconds: float, device: str) -> tuple[list[Training], Tensor, Tensor]:
    images, labels, test_images, test_labels = data(device)
    trainings = [Training(parts, device) for parts in (TORCH, OURS)]
    order, batch = torch.Generator().manual_seed(0), 128
    batches = [torch.randperm(len(labels), generator=order).split(batch) for _ in range(epochs)]
    quiet = not sys.stderr.isatty() or bool(os.environ.get("CI"))
    columns = (TextColumn("epoch {task.completed}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        task, stop = bar.add_task("", total=epochs), time.monotonic() + seconds
        for epoch in batches:
            if time.monotonic() > stop:
                break
            for i, rows in enumerate(epoch):
                rows = rows.to(device)
                # Who goes first alternates too: the second finds the batch in the caches.
                for training in trainings[:: 1 if i % 2 else -1]:
                    training.step(images[rows], labels[rows])
            bar.advance(task)
    return trainings, test_images, test_labels


def curves(trainings: list[Training], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", width_ratios=(2, 1))
    for training, style in zip(trainings, ({"lw": 5, "alpha": 0.35}, {"lw": 1.2, "color": "black"}), strict=True):
        left.plot(training.losses, label=training.parts.name, **style)
    left.set(xlabel="step", ylabel="training loss", title="the same curve, drawn twice")
    left.legend(frameon=False)
    names = [t.parts.name for t in trainings]
    steps = [1e3 * statistics.median(t.seconds) for t in trainings]
    right.bar(names, steps, color=("C0", "black"), alpha=0.6, width=0.5)
    right.set(ylabel="ms for one step, median", title="the time of a step")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument(
        "--seconds", type=float, default=75, help="no epoch begins after this; a busy machine sees fewer"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--plot", type=Path, default=Path("out/demo.png"))
    args = parser.parse_args()

    print(f"Handwritten digits on {args.device}: one network, trained with torch's parts and with ours.")
    trainings, images, labels = train(args.epochs, args.seconds, args.device)
    theirs, ours = trainings

    table = Table(header_style="bold")
    for name in ("", "loss", "test accuracy", "ms a step", "90 % below"):
        table.add_column(name, justify="right" if name else "left")
    for t in trainings:
        deciles = statistics.quantiles(t.seconds, n=10)
        row = [f"{statistics.mean(t.losses[-10:]):.6f}", f"{t.accuracy(images, labels):.2%}"]
        table.add_row(t.parts.name, *row, f"{1e3 * deciles[4]:.3f}", f"{1e3 * deciles[8]:.3f}")
    Console().print(table)

    pairs = list(zip(theirs.model.parameters(), ours.model.parameters(), strict=True))
    apart = max((a - b).abs().max().item() for a, b in pairs)
    scale = max(a.abs().max().item() for a, _ in pairs)
    losses = max(abs(a - b) for a, b in zip(theirs.losses, ours.losses, strict=True))
    print(f"Largest difference after {len(ours.losses)} steps:")
    print(f"  parameters {apart:.1e}, where the largest is {scale:.2f}; loss {losses:.1e}.")
    speed = statistics.median(theirs.seconds) / statistics.median(ours.seconds)
    print(f"A whole step with ours takes {1 / speed:.0%} of the time with torch's; the norms are part of it.")
    curves(trainings, args.plot)
    print(f"Loss curves: {args.plot}")


if __name__ == "__main__":
    main()
