"""Shapes and hard values that layer_norm and rms_norm share: (size, number of trailing dimensions normalised)."""

from __future__ import annotations

import torch
from torch import Tensor

from cases import Adversary, Shape

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

SHAPES: dict[str, Shape] = {
    "one element": ((1, 1), 1),
    **{f"C={c} inside a vector": ((5, c), 1) for c in (2, 3, 5, 7)},
    **{f"C={c} around 16 lanes": ((5, c), 1) for c in (15, 16, 17)},
    **{f"C={c} around 32 lanes": ((5, c), 1) for c in (31, 33)},
    **{f"C={c} around a wavefront": ((5, c), 1) for c in (63, 64, 65)},
    **{f"C={c} around two warps of vectors": ((3, c), 1) for c in (127, 128, 129)},
    **{f"C={c} padded to a power of two": ((3, c), 1) for c in (769, 1000, 1128)},
    "C=4096 full block": ((2, 4096), 1),
    "C=4097 block and one": ((2, 4097), 1),
    "C=20000 longer than a block": ((3, 20000), 1),
    "C=131072 longer than shared memory": ((3, 131072), 1),
    "one row": ((1, 129), 1),
    "one dimension": ((40,), 1),
    "one column": ((9, 1), 1),
    "no rows": ((0, 8), 1),
    "no columns": ((4, 0), 1),
    "no rows in a batch": ((2, 0, 8), 1),
    "rows past a block of rows": ((257, 33), 1),
    "65537 narrow rows, past a 16-bit grid": ((65537, 3), 1),
    "16 MB and more, streamed past the caches": ((4200, 1024), 1),
    "3-D": ((2, 7, 40), 1),
    "4-D": ((2, 3, 4, 18), 1),
    "4-D, images normalised": ((3, 4, 5, 6), 3),
    "two dimensions normalised": ((4, 3, 50), 2),
    "every dimension normalised": ((6, 7), 2),
    "5-D": ((2, 3, 2, 3, 17), 2),
}

SMALL: dict[str, Shape] = {"rows": ((3, 5), 1), "two dimensions": ((2, 3, 4), 2)}
LARGE: dict[str, Shape] = {f"{r}x{c}": ((r, c), 1) for r, c in ((4099, 33), (37, 4097), (3, 100_003))}
# Narrow rows, rows of a warp, an odd tail, rows longer than a block.
GPU: dict[str, Shape] = {
    "narrow": ((257, 17), 1),
    "usual": ((512, 768), 1),
    "odd": ((65, 1001), 1),
    "long": ((3, 20000), 1),
    "odd and long": ((3, 12001), 1),
    # 48 KB of sums: of layer_norm in fp32, of rms_norm in 16 bits.
    "sums of 48 KB": ((3, 6144), 1),
    "16-bit sums of 48 KB": ((3, 12288), 1),
    "strips": ((3, 70000), 1),
}
GROWING: tuple[Shape, ...] = tuple(((rows, 40), 1) for rows in (3, 7, 129))

# The true dx is zero: rstd = 1 / sqrt(eps) times the rounding of g - mean(g), which a contracted multiply-add makes.
AMPLIFIED = {"one element": 320.0, "one column": 320.0}


def randn(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64)


def parameter(size: tuple[int, ...], dims: int) -> Tensor:
    return randn(*size[len(size) - dims :])


def truth_noise(mean: float) -> float:
    """Rows that are constant, or become so in 16 bits: the rounding of a mean in fp64 times 1 / sqrt(eps)."""
    return 3e-13 * (1 + mean)


def shifted(mean: float, columns: int = 769) -> Adversary:
    """A padding lane that enters the sums, or E[x^2] - E[x]^2, shows at a mean far from zero."""
    dtypes = tuple(d for d in DTYPES if mean < torch.finfo(d).max)
    return Adversary(((6, columns), 1), lambda x, *rest: (x + mean, *rest), noise=truth_noise(mean), dtypes=dtypes)


def scaled(scale: float) -> Adversary:
    """Squares overflow fp32 from 1e19 on."""
    return Adversary(((6, 257), 1), lambda x, *rest: (x * scale, *rest), dtypes=(torch.float32, torch.bfloat16))


def some_rows_huge(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    return x * torch.tensor([1.0, 1e25, 1e-3, 1e30, 1e2, 1.0], dtype=x.dtype)[:, None], *rest


def gamma_zero_or_negative(x: Tensor, weight: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """A backward that recovers x^ from y divides by gamma."""
    weight = weight.clone()
    weight[::3], weight[1::6], weight[2::6] = 0, 1e-8, -weight[2::6].abs()
    return x, weight, *rest


def one_outweighs_the_rest(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """Beside its square those of the others are less than half a unit in the last place, and are lost one by one."""
    x = x.clone()
    x[:, 7] = 1e5
    return x, *rest


ADVERSARIES = {
    **{f"mean {mean:.0e}": shifted(mean) for mean in (0, 1e1, 1e2, 1e3, 1e4, 1e5)},
    "mean 1e3 in a short row": shifted(1e3, columns=5),
    "mean 1e5 in narrow rows": shifted(1e5, columns=100),
    "mean 1e4 in a long row": Adversary(
        ((2, 30011), 1), lambda x, *rest: (x + 1e4, *rest), noise=10 * truth_noise(1e4)
    ),
    **{f"rows of {scale:.0e}": scaled(scale) for scale in (1e18, 1e20, 1e25, 1e30)},
    "rows of 1e-12": Adversary(
        ((6, 257), 1), lambda x, *rest: (x * 1e-12, *rest), dtypes=(torch.float32, torch.float64)
    ),
    "some rows huge": Adversary(((6, 257), 1), some_rows_huge, dtypes=(torch.float32, torch.bfloat16)),
    "some narrow rows huge": Adversary(((6, 37), 1), some_rows_huge, dtypes=(torch.float32, torch.bfloat16)),
    "constant rows": Adversary(((6, 769), 1), lambda x, *rest: (x[:, :1].expand_as(x), *rest), noise=truth_noise(10)),
    "constant rows of 1e4": Adversary(
        ((6, 769), 1), lambda x, *rest: ((x[:, :1] + 1e4).expand_as(x), *rest), noise=truth_noise(1e4)
    ),
    "zero rows": Adversary(((6, 129), 1), lambda x, *rest: (x * 0, *rest)),
    "gamma zero or negative": Adversary(((6, 257), 1), gamma_zero_or_negative),
    "fp16 sums past 65504": Adversary(((4, 1000), 1), lambda x, *rest: (x * 300, *rest)),
    "one million columns": Adversary(((2, 1_000_003), 1), lambda x, *rest: (x + 10, *rest), dtypes=(torch.float32,)),
    "one column outweighs four million": Adversary(
        ((2, 4_000_003), 1), one_outweighs_the_rest, dtypes=(torch.float32,)
    ),
    "150000 rows": Adversary(((150_001, 5), 1), lambda x, *rest: (x + 10, *rest), dtypes=(torch.float32,)),
}
