"""BatchNorm behaves as torch's: state, running statistics, errors, torch's own inputs, layouts of the residual."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
from typing import Any

import pytest
import torch
from cases import CASES
from cases.batch_norm import ACTIVATIONS, eager
from parity import GRAD_LAYOUTS, INPUT_LAYOUTS, Guarded, assert_no_worse
from sweep import INTERPRETED, Target, forced, targets
from torch.testing._internal import common_methods_invocations, common_modules

from fusedtricks import functional, nn
from fusedtricks._op import Op

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the public surface does not depend on the interpreter")
close = torch.testing.assert_close
DIMS = {1: (6, 4, 5), 2: (3, 4, 5, 6), 3: (2, 4, 3, 2, 5)}
PAIRS = [(getattr(nn, f"BatchNorm{d}d"), getattr(torch.nn, f"BatchNorm{d}d"), size) for d, size in DIMS.items()]
MODULES = pytest.mark.parametrize(("ours", "theirs", "size"), PAIRS, ids=[p[0].__name__ for p in PAIRS])
TARGETS = pytest.mark.parametrize("target", targets(CASES["batch_norm"]), ids=str)


def test_signatures() -> None:
    assert inspect.signature(functional.batch_norm).parameters.keys() == {
        *inspect.signature(torch.nn.functional.batch_norm).parameters
    }
    for ours, theirs, _ in PAIRS:
        assert inspect.signature(ours) == inspect.signature(theirs)
        assert repr(ours(4, momentum=None)) == repr(theirs(4, momentum=None))
    assert repr(nn.BatchNormAct2d(4)).endswith("activation=relu)")


@MODULES
def test_state_copies_and_version(ours: type, theirs: type, size: tuple[int, ...]) -> None:
    a, b = ours(4), theirs(4)
    assert list(a.state_dict()) == list(b.state_dict())
    assert a._version == b._version
    b.load_state_dict(a.state_dict())
    x = torch.randn(size)
    for again in (copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
        assert type(again) is ours
        close(again(x), b(x))


@MODULES
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("tracked", [True, False])
def test_running_statistics_over_steps(
    ours: type, theirs: type, size: tuple[int, ...], momentum: float | None, tracked: bool
) -> None:
    for dtype in (torch.float32, torch.float64):
        options = {"momentum": momentum, "track_running_stats": tracked, "dtype": dtype}
        a, b = ours(4, **options), theirs(4, **options)
        for step in range(4):
            x = torch.randn(size, dtype=dtype) * 3 + step
            if step == 2:
                x = x[:0]
            for training in (True, False):
                a.train(training), b.train(training)
                if x.numel() or training:
                    close(a(x), b(x))
            close(a.state_dict(), b.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_running_statistics_of_16_bits(dtype: torch.dtype) -> None:
    a, b = nn.BatchNorm1d(4, dtype=dtype), torch.nn.BatchNorm1d(4)
    x = torch.randn(9, 4).to(dtype)
    a(x), b(x.float())
    close(a.running_mean, b.running_mean.to(dtype))
    close(a.running_var, b.running_var.to(dtype))


@TARGETS
def test_back_ends_agree_on_what_they_update(target: Target) -> None:
    x = torch.randn(7, 5, 3, 6) + 3
    module, other = nn.BatchNorm2d(5, momentum=None), torch.nn.BatchNorm2d(5, momentum=None)
    for _ in range(3):
        with forced(target):
            module(x)
        other(x)
        x = x * 1.5
    close(module.state_dict(), other.state_dict())


def test_a_changed_running_statistic_is_noticed() -> None:
    """What autograd saved elsewhere must not be changed behind its back."""
    module = nn.BatchNorm1d(3)
    used = module.running_mean * torch.ones(3, requires_grad=True)
    module(torch.randn(5, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        used.sum().backward()


@MODULES
def test_module_db(ours: type, theirs: type, size: tuple[int, ...]) -> None:
    info = next(i for i in common_modules.module_db if i.module_cls is theirs)
    for training, dtype in itertools.product((True, False), (torch.float32, torch.float64)):
        for given in info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training):
            arguments = given.constructor_input
            results = []
            for cls in (ours, theirs):
                torch.manual_seed(0)
                module = cls(*arguments.args, **arguments.kwargs).to(dtype).train(training)
                with torch.no_grad():
                    for p in module.parameters():
                        p.normal_()
                x = copy.deepcopy(given.forward_input.args[0])
                y = module(x)
                grads = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
                results.append([y, *grads, *module.buffers()])
            close(*results)
    for error in info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    ):
        inputs = error.module_error_input
        with pytest.raises(error.error_type, match=error.error_regex):
            ours(*inputs.constructor_input.args, **inputs.constructor_input.kwargs)(*inputs.forward_input.args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_op_db(dtype: torch.dtype) -> None:
    infos = [i for i in common_methods_invocations.op_db if i.name == "nn.functional.batch_norm"]
    assert infos
    for info in infos:
        for given in info.sample_inputs("cpu", dtype):
            results = []
            for fn in (functional.batch_norm, torch.nn.functional.batch_norm):
                args = [a.clone() if isinstance(a, torch.Tensor) else a for a in given.args]
                results.append(
                    [fn(given.input, *args, **given.kwargs), *(a for a in args if isinstance(a, torch.Tensor))]
                )
            close(*results)


def residuals(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    layouts = [n for n in INPUT_LAYOUTS if n != "expanded"]
    grads = [*GRAD_LAYOUTS]
    return [(layouts[i % len(layouts)], layouts[(i * 3 + 1) % len(layouts)], grads[i % len(grads)]) for i in range(12)]


@TARGETS
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [(4, 6, 5, 7), (3, 24, 2, 2), (5, 8, 17, 3), (3, 12, 1, 1)], ids=str)
def test_residual_of_any_layout(target: Target, activation: str, size: tuple[int, ...]) -> None:
    """Its gradient has its own strides' format, and nothing outside of any tensor is touched."""
    weight, bias = torch.randn(2, size[1], dtype=torch.float64)
    for layouts in residuals(torch.float64):
        guards = [Guarded(torch.randn(size, dtype=torch.float64), layout) for layout in layouts]
        x, residual, dy = (g.tensor for g in guards)
        results = []
        for fn in (functional.batch_norm_act, eager):
            leaves = [t.detach().requires_grad_() for t in (x, residual, weight, bias)]
            with forced(target):
                y = fn(leaves[0], None, None, leaves[2], leaves[3], leaves[1], True, activation=activation)
                results.append([y, *torch.autograd.grad(y, leaves, dy)])
        close(*results, rtol=1e-6 if activation == "gelu" else 1e-9, atol=1e-9)
        for guard in guards:
            guard.check()


# Size, activation, dtype, is there a residual?
LARGE = {
    "planes": ((1, 3, 840, 840), "identity", torch.float32, True),
    "planes, with a mask": ((1, 3, 840, 840), "relu", torch.float32, True),
    "planes off the boundary": ((53, 2, 141, 141), "identity", torch.float32, True),
    "planes of 16 bits": ((81, 8, 80, 81), "identity", torch.bfloat16, True),
    "rows, the last one shorter": ((1, 3, 1, 841, 840), "identity", torch.float32, True),
    "rows, with a mask": ((1, 3, 1, 841, 840), "relu", torch.float32, True),
    "rows of 16 bits": ((1, 3, 1, 1183, 1185), "identity", torch.bfloat16, True),
    "wide rows": ((4100, 528), "identity", torch.float32, True),
    # Several groups of channels, whose chunks are of 5 and of 2 runs.
    "groups of channels": ((7, 17, 52, 60), "identity", torch.float32, False),
    "groups of channels, rectified": ((7, 17, 52, 60), "leaky_relu", torch.float32, False),
    "groups of channels, with a mask": ((7, 17, 52, 60), "relu", torch.float32, True),
    "groups of channels, whose planes end anywhere": ((7, 17, 53, 61), "relu", torch.float32, True),
    "groups of channels, past the caches": ((75, 9, 52, 60), "relu", torch.float32, True),
    "short planes": ((1340, 32, 7, 7), "identity", torch.float32, True),
    "short planes, rectified": ((1340, 32, 7, 7), "relu", torch.float32, False),
    "short planes off the boundary": ((4300, 10, 7, 7), "identity", torch.float32, True),
    "short planes of 16 bits": ((2680, 32, 7, 7), "identity", torch.bfloat16, False),
}


@pytest.mark.parametrize("reason", LARGE)
def test_batches_past_the_caches(reason: str) -> None:
    """What no cache could hold is stored past them, which only whole registers on a boundary can be."""
    size, activation, dtype, added = LARGE[reason]
    memory = torch.channels_last_3d if len(size) == 5 else torch.contiguous_format
    x, dy, other = (torch.randn(size).to(dtype).contiguous(memory_format=memory) for _ in range(3))
    tensors = (x, *torch.randn(2, size[1]).to(dtype), *[other][:added])

    def run(fn: Any, dtype: torch.dtype, activation: str) -> list[torch.Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        y = fn(leaves[0], None, None, *leaves[1:3], *(leaves[3:] or [None]), True, activation=activation)
        return [y, *torch.autograd.grad(y, leaves, dy.to(dtype))]

    # Where rounding decides about the sign of z, nothing is to be learned.
    dy.masked_fill_(run(eager, torch.float64, "identity")[0].abs() < 1e-4, 0.0)
    theirs, truths = (run(eager, d, activation) for d in (dtype, torch.float64))
    for target in targets(CASES["batch_norm"]):
        if not target.backend.startswith("cpu:"):
            continue
        with forced(target):
            found = run(functional.batch_norm_act, dtype, activation)
        for i, (ours, torch_s, truth) in enumerate(zip(found, theirs, truths, strict=True)):
            assert_no_worse(ours, torch_s, truth, name=f"{reason}, {target}, result {i}")


def test_what_is_saved() -> None:
    """BN + ReLU saves nothing beyond x; with a residual one bit per element more."""
    x = torch.randn(8, 16, 8, 8, requires_grad=True)

    def saved(residual: torch.Tensor | None) -> int:
        sizes: dict[int, int] = {}
        note = lambda t: sizes.update({t.data_ptr(): t.nbytes}) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            functional.batch_norm_act(x, None, None, torch.ones(16), torch.zeros(16), residual, training=True)
        return sum(sizes.values()) - x.nbytes

    statistics = 4 * 16 * 4 + 2 * 16 * 4
    assert saved(None) <= statistics
    assert saved(torch.randn_like(x)) <= statistics + x.numel() // 8


X = torch.randn(3, 4, 5)
ONES = torch.ones(4)
ERRORS: dict[str, tuple[tuple, dict, str]] = {
    "running_mean of another length": ((X, ONES[:3], ONES), {"training": True}, "running_mean should contain 4"),
    "running_var of another length": ((X, ONES, ONES[:3]), {"training": True}, "running_var should contain 4"),
    "weight of another length": ((X, None, None, ONES[:3]), {"training": True}, "weight should contain 4"),
    "bias of another length": ((X, None, None, None, ONES[:3]), {"training": True}, "bias should contain 4"),
    "no statistics in evaluation": ((X, None, None), {}, "running_mean must be defined"),
    "no variance in evaluation": ((X, ONES, None), {}, "running_var must be defined"),
    "a mean without a variance": ((X, ONES, None), {"training": True}, "both None"),
    "one value per channel": ((X[:1, :, :1], None, None), {"training": True}, "more than 1 value per channel"),
    "eps of zero in training": ((X, None, None), {"training": True, "eps": 0.0}, "must be positive"),
    "negative eps": ((X, ONES, ONES), {"eps": -1.0}, "must be non-negative"),
    "one dimension": ((X[0, 0], None, None), {"training": True}, "at least 2 dimensions"),
    "integers": ((X.long(), None, None), {"training": True}, "not implemented for"),
    "complex": ((X + 0j, None, None), {"training": True}, "not implemented for"),
    "a list": (([1.0, 2.0], None, None), {"training": True}, "Tensor"),
    "a list as weight": ((X, None, None, [1.0] * 4), {"training": True}, "weight.*must be Tensor"),
    "weight elsewhere": ((X, None, None, ONES.to("meta")), {"training": True}, "same device"),
}


@pytest.mark.parametrize("reason", ERRORS)
def test_errors_are_of_torch_s_type(reason: str) -> None:
    args, kwargs, said = ERRORS[reason]
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        torch.nn.functional.batch_norm(*args, **kwargs)
    with pytest.raises(theirs.type, match=said):
        functional.batch_norm(*args, **kwargs)


def test_errors_of_the_residual_and_the_activation() -> None:
    run = lambda residual, **options: functional.batch_norm_act(X, None, None, None, None, residual, True, **options)  # noqa: E731
    with pytest.raises(ValueError, match="activation to be one of"):
        run(None, activation="tanh")
    with pytest.raises(ValueError, match="activation to be one of"):
        nn.BatchNormAct1d(4, activation="tanh")
    with pytest.raises(RuntimeError, match="residual of the input's shape"):
        run(X[:1])
    with pytest.raises(RuntimeError, match="residual of the input's dtype"):
        run(X.double())
    with pytest.raises(TypeError, match="must be Tensor, not list"):
        run([1.0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_act_modules(activation: str) -> None:
    for d, size in DIMS.items():
        module = getattr(nn, f"BatchNormAct{d}d")(4, activation=activation)
        x, residual = torch.randn(2, *size)
        for training in (True, False):
            module.train(training)
            state = [module.running_mean.clone(), module.running_var.clone()]
            close(module(x, residual), eager(x, *state, None, None, residual, training, activation=activation))
        assert list(module.state_dict()) == list(torch.nn.BatchNorm2d(4).state_dict())


def test_empty_batches_and_no_channels() -> None:
    for size in ((0, 4, 3), (2, 4, 0)):
        module, x = nn.BatchNorm1d(4), torch.randn(size, requires_grad=True)
        grads = torch.autograd.grad(module(x).sum(), [x, *module.parameters()])
        assert [g.abs().sum() for g in grads] == [0, 0, 0]
        assert module.num_batches_tracked == 1
        close(module.running_var, torch.ones(4))
    assert functional.batch_norm(torch.randn(2, 0, 3), None, None, training=True).shape == (2, 0, 3)


def test_no_host_synchronisation_with_a_cumulative_average() -> None:
    """On the meta device any read of a value raises."""
    module = nn.BatchNorm1d(4, momentum=None, device="meta")
    assert module(torch.empty(3, 4, device="meta")).shape == (3, 4)


def test_masks_of_every_back_end_are_the_same() -> None:
    op = Op.registry["batch_norm_fwd"]
    sizes = (
        (4, 6, 5, 7),
        (3, 24, 2, 2),
        (65, 3),
        (5, 8, 33, 1),
        (2, 1, 7, 5),
        (3, 37, 7, 7),
        (2, 131, 17),
        (3, 70, 14, 14),
    )
    for size in sizes:
        for layout in ("plain", "transposed"):
            x, residual = (Guarded(torch.randn(size), layout).tensor for _ in range(2))
            args = (x, residual, None, None, None, None, None, None, 1e-5, 1, 0.0, True, True)
            wanted = op.implementation("reference")(*args)[2]
            for backend in op.kernels:
                if backend.startswith("cpu:"):
                    got = op.implementation(backend)(*args)[2]
                    assert got.shape == wanted.shape
                    assert torch.equal(got, wanted), f"{backend} {size} {layout}"


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.uint8, torch.bfloat16], ids=str)
def test_counters_of_other_dtypes(dtype: torch.dtype, momentum: float | None) -> None:
    """As a checkpoint that averages models may bring them."""
    modules = [m.BatchNorm1d(5, momentum=momentum) for m in (nn, torch.nn)]
    memory = torch.zeros(16, dtype=dtype)
    for module, at in zip(modules, (3, 8), strict=True):
        module.num_batches_tracked = memory[at]
    for _ in range(3):
        x = torch.randn(8, 5)
        for module in modules:
            module(x)
    assert memory.nonzero().flatten().tolist() == [3, 8]
    assert memory[3] == memory[8] == 3
    torch.testing.assert_close(modules[0].running_mean, modules[1].running_mean)
    torch.testing.assert_close(modules[0].running_var, modules[1].running_var)
    wrong = torch.tensor(0, dtype=torch.int32)
    op = Op.registry["batch_norm_fwd"].implementation("cpu")
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        op(x, None, None, None, None, None, wrong, 0.1, 1e-5, 0, 0.0, True, False)
