"""Swapping the import changes nothing but the speed: one network, trained twice on handwritten digits.

The data are scikit-learn's copy of the UCI handwritten digits: 1797 images of 8x8. Both trainings start from the same
weights, see the same batches mixed in the same proportions, and differ in one thing: where their parts come from. Their
steps alternate, so that neither is timed on a quieter machine. Dropout draws masks of its own in each, so the exact
comparison comes first and without it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    batch_norm: Callable[..., nn.Module]
    dropout: Callable[..., nn.Module]
    loss: Callable[..., nn.Module]
    optimizer: Callable[..., torch.optim.Optimizer]
    mix: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Any]]


def mix(images: Tensor, labels: Tensor, lam: Tensor, perm: Tensor) -> tuple[Tensor, Tensor]:
    """mixup as it is written with torch alone: the mixed labels are class probabilities."""
    image_lam, target_lam = lam[:, None, None], lam[:, None]
    target = nn.functional.one_hot(labels, 10).to(images.dtype)
    return (
        image_lam * images + (1 - image_lam) * images[perm],
        target_lam * target + (1 - target_lam) * target[perm],
    )


TORCH = Parts(
    "torch",
    layer_norm=nn.LayerNorm,
    rms_norm=nn.RMSNorm,
    batch_norm=nn.BatchNorm1d,
    dropout=nn.Dropout,
    loss=nn.CrossEntropyLoss,
    optimizer=torch.optim.AdamW,
    mix=mix,
)
OURS = Parts(
    "fusedtricks",
    layer_norm=fusedtricks.nn.LayerNorm,
    rms_norm=fusedtricks.nn.RMSNorm,
    batch_norm=fusedtricks.nn.BatchNorm1d,
    dropout=fusedtricks.nn.Dropout,
    loss=fusedtricks.nn.CrossEntropyLoss,
    optimizer=fusedtricks.optim.AdamW,
    mix=fusedtricks.functional.mixup,
)


class Block(nn.Module):
    """A residual block that mixes features, normalised before and inside."""

    def __init__(self, parts: Parts, width: int, dropout: float):
        super().__init__()
        self.dropout = parts.dropout(dropout)
        self.outer, self.inner = parts.layer_norm(width), parts.rms_norm(2 * width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.dropout(self.inner(nn.functional.gelu(self.up(self.outer(x))))))


class Digits(nn.Module):
    """Each of the 8 rows of an image is a token of 8 pixels."""

    def __init__(self, parts: Parts, dropout: float, width: int = 96, depth: int = 3):
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(0.02 * torch.randn(8, width))
        self.rows = parts.batch_norm(8)
        self.blocks = nn.Sequential(*(Block(parts, width, dropout) for _ in range(depth)))
        self.norm = parts.layer_norm(8 * width)
        self.head = nn.Linear(8 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.blocks(self.rows(self.embed(images)) + self.position)
        return self.head(self.norm(tokens.flatten(1)))


SECTIONS = ("mixup", "forward", "loss", "backward", "optimizer")


@dataclass
class Training:
    parts: Parts
    device: str
    dropout: float
    losses: list[float] = field(default_factory=list)
    seconds: list[list[float]] = field(default_factory=list)  # of each step, by section

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = Digits(self.parts, self.dropout).to(self.device)
        self.optimizer = self.parts.optimizer(self.model.parameters(), lr=1e-3, weight_decay=1e-2)
        self.criterion = self.parts.loss(label_smoothing=0.1)

    def step(self, images: Tensor, labels: Tensor, lam: Tensor, perm: Tensor) -> None:
        self.optimizer.zero_grad()
        times = [self.now()]
        mixed, target = self.parts.mix(images, labels, lam, perm)
        times.append(self.now())
        logits = self.model(mixed)
        times.append(self.now())
        loss = self.criterion(logits, target)
        times.append(self.now())
        loss.backward()
        times.append(self.now())
        self.optimizer.step()
        times.append(self.now())
        self.seconds.append([b - a for a, b in itertools.pairwise(times)])
        self.losses.append(loss.item())

    def now(self) -> float:
        self.synchronize()
        return time.perf_counter()

    def median(self, section: str) -> float:
        """Milliseconds."""
        return 1e3 * statistics.median(step[SECTIONS.index(section)] for step in self.seconds)

    def steps(self) -> list[float]:
        return [1e3 * sum(step) for step in self.seconds]

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


def batches(count: int, epochs: int) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """For each epoch: rows, mixing weights and partners of each batch, lam ~ Beta(0.2, 0.2)."""
    order, beta = torch.Generator().manual_seed(0), torch.distributions.Beta(0.2, 0.2)
    torch.manual_seed(1)
    for _ in range(epochs):
        split = torch.randperm(count, generator=order).split(128)
        yield [(rows, beta.sample(rows.shape), torch.randperm(len(rows), generator=order)) for rows in split]


def train(epochs: int, seconds: float, device: str, dropout: float) -> tuple[list[Training], Tensor, Tensor]:
    images, labels, test_images, test_labels = data(device)
    trainings = [Training(parts, device, dropout) for parts in (TORCH, OURS)]
    quiet = not sys.stderr.isatty() or bool(os.environ.get("CI"))
    columns = (TextColumn("epoch {task.completed}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        task, stop = bar.add_task("", total=epochs), time.monotonic() + seconds
        for epoch in batches(len(labels), epochs):
            if time.monotonic() > stop:
                break
            for i, batch in enumerate(epoch):
                rows, lam, perm = (t.to(device) for t in batch)
                # Who goes first alternates too: the second finds the batch in the caches.
                for training in trainings[:: 1 if i % 2 else -1]:
                    training.step(images[rows], labels[rows], lam, perm)
            bar.advance(task)
    return trainings, test_images, test_labels


def curves(trainings: list[Training], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", width_ratios=(2, 1))
    for training, style in zip(trainings, ({"lw": 5, "alpha": 0.35}, {"lw": 1.2, "color": "black"}), strict=True):
        left.plot(training.losses, label=training.parts.name, **style)
    left.set(xlabel="step", ylabel="training loss", title="two curves, apart by their dropout masks")
    left.legend(frameon=False)
    bottom = [0.0] * len(trainings)
    for section, color in zip(SECTIONS, ("C4", "C0", "C1", "C2", "C3"), strict=True):
        heights = [t.median(section) for t in trainings]
        right.bar([t.parts.name for t in trainings], heights, 0.5, bottom, label=section, color=color, alpha=0.8)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    right.set(ylabel="ms, median", title="the time of a step")
    right.legend(frameon=False, fontsize="small", bbox_to_anchor=(1, 0.5), loc="center left")
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
    exact, _, _ = train(3, args.seconds, args.device, dropout=0.0)
    pairs = list(zip(*(t.model.parameters() for t in exact), strict=True))
    apart = max((a - b).abs().max().item() for a, b in pairs)
    scale = max(a.abs().max().item() for a, _ in pairs)
    losses = max(abs(a - b) for a, b in zip(*(t.losses for t in exact), strict=True))
    print(f"Without dropout, after {len(exact[0].losses)} steps from the same weights, the largest difference is")
    print(f"  {apart:.1e} of a parameter, where the largest is {scale:.2f}; {losses:.1e} of a loss.\n")

    trainings, images, labels = train(args.epochs, args.seconds, args.device, dropout=0.1)
    table = Table("", "loss", "test accuracy", header_style="bold")
    for t in trainings:
        table.add_row(t.parts.name, f"{statistics.mean(t.losses[-10:]):.4f}", f"{t.accuracy(images, labels):.2%}")
    console = Console()
    console.print(table)

    times = Table(header_style="bold", title="one step, median ms", title_justify="left")
    for name in ("", *(t.parts.name for t in trainings), "speed-up"):
        times.add_column(name, justify="right" if name else "left")
    rows = {section: [t.median(section) for t in trainings] for section in SECTIONS}
    rows["step"] = [statistics.median(t.steps()) for t in trainings]
    for name, (theirs, ours) in rows.items():
        times.add_row(name, f"{theirs:.3f}", f"{ours:.3f}", f"{theirs / ours:.2f}x", end_section=name == SECTIONS[-1])
    console.print(times)
    print(
        f"A step with ours takes {ours / theirs:.0%} of the time with torch's; the matrix products are torch's in both."
    )
    curves(trainings, args.plot)
    print(f"Loss curves: {args.plot}")


if __name__ == "__main__":
    main()
