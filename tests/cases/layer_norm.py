import torch

import fusedtricks
from cases import Case
from cases._norm import ADVERSARIES, AMPLIFIED, GPU, GROWING, LARGE, SHAPES, SMALL, parameter, randn

CASE = Case(
    fn=fusedtricks.functional.layer_norm,
    torch_fn=torch.nn.functional.layer_norm,
    names=("x", "weight", "bias"),
    optional=("weight", "bias"),
    inputs=lambda size, dims: (randn(*size), parameter(size, dims), parameter(size, dims)),
    call=lambda fn, t, dims, eps=1e-5: fn(t[0], t[0].shape[t[0].dim() - dims :], *t[1:], eps),
    shapes=SHAPES,
    amplified=AMPLIFIED,
    shape="3-D",
    layout_shapes=("rows past a block of rows", "3-D", "4-D, images normalised"),
    small=SMALL,
    large=LARGE,
    growing=GROWING,
    gpu=GPU,
    family="norm",
    options={"eps=0.3": {"eps": 0.3}},
    adversaries=ADVERSARIES,
    modules=((fusedtricks.nn.LayerNorm, torch.nn.LayerNorm),),
    op_db=("nn.functional.layer_norm", "native_layer_norm"),
)
