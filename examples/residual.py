"""A small residual network of batch norm, residual add and relu in one, against the same network from torch's parts.

    python examples/residual.py --steps 60

The data are scikit-learn's handwritten digits, 8x8. Both networks start from the same weights and see the same batches;
their losses are printed beside each other, and the time of a step.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fusedtricks


class TorchNormAct(nn.BatchNorm2d):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return torch.relu(y if residual is None else y + residual)


class Block(nn.Module):
    def __init__(self, width: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = norm(width), norm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.norm1(self.conv1(x))), x)


def network(norm: type[nn.Module], width: int, depth: int) -> nn.Sequential:
    torch.manual_seed(0)
    stem = [nn.Conv2d(1, width, 3, padding=1, bias=False), norm(width)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    model = nn.Sequential(*stem, *(Block(width, norm) for _ in range(depth)), *head)
    fusedtricks.recipes.zero_init_residual(m for m in model if isinstance(m, Block))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--depth", type=int, default=3)
    args = parser.parse_args()

    images, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    images = images.float().reshape(-1, 1, 8, 8) / 16
    models = {
        "torch": network(TorchNormAct, args.width, args.depth),
        "fusedtricks": network(fusedtricks.nn.BatchNormAct2d, args.width, args.depth),
    }
    optimizers = {name: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for name, m in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for step in range(args.steps):
        chosen = torch.randint(len(images), (args.batch,), generator=torch.Generator().manual_seed(step))
        losses = {}
        for name, model in models.items():
            start = time.perf_counter()
            loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            seconds[name].append(time.perf_counter() - start)
            losses[name] = loss.item()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step:4}  " + "  ".join(f"{name} {loss:.6f}" for name, loss in losses.items()))
    for name, model in models.items():
        model.eval()
        with torch.no_grad():
            right = (model(images).argmax(1) == labels).float().mean().item()
        print(f"{name:12} {1e3 * statistics.median(seconds[name]):.2f} ms a step, {100 * right:.1f} % right")


if __name__ == "__main__":
    main()
