"""The comparison, the guards and the poison fail when they must."""

import math

import pytest
import torch
from parity import (
    GRAD_LAYOUTS,
    LAYOUTS,
    Guarded,
    assert_bitwise_equal,
    assert_no_worse,
    poisoned,
    written_everywhere,
)
from torch import Tensor

TRUTH = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 6)


def with_element(value: float, at: tuple[int, ...] = (2, 3)) -> Tensor:
    result = TRUTH.float()
    result[at] = value
    return result


def test_the_same_values_pass() -> None:
    assert_no_worse(TRUTH.float(), TRUTH.float(), TRUTH)


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        pytest.param(TRUTH.float()[:3], "shape", id="shape"),
        pytest.param(TRUTH.float()[:, :, None].squeeze(2)[None], "shape", id="extra dimension"),
        pytest.param(TRUTH, "dtype", id="wider dtype"),
        pytest.param(TRUTH.half(), "dtype", id="narrower dtype"),
        pytest.param(TRUTH.float().t().contiguous().t(), "strides", id="strides"),
        pytest.param(with_element(math.nan), "isnan", id="nan"),
        pytest.param(with_element(math.inf), "isposinf", id="infinity"),
        pytest.param(with_element(-math.inf), "isneginf", id="negative infinity"),
        pytest.param(with_element(TRUTH[2, 3].item() + 1e-6), "off by", id="one element 8 ulps off"),
        pytest.param(with_element(0.0, (3, 5)), "off by", id="last element zero"),
        pytest.param(-TRUTH.float(), "off by", id="sign"),
    ],
)
def test_a_wrong_result_fails(kernel: Tensor, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        assert_no_worse(kernel, TRUTH.float(), TRUTH)


def test_torch_being_wrong_excuses_as_much_and_no_more() -> None:
    torch_result = with_element(TRUTH[2, 3].item() + 1e-3)
    assert_no_worse(with_element(TRUTH[0, 0].item() + 0.9e-3, (0, 0)), torch_result, TRUTH)
    with pytest.raises(AssertionError, match="off by"):
        assert_no_worse(with_element(TRUTH[0, 0].item() + 1.1e-3, (0, 0)), torch_result, TRUTH)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_torch_being_nan_excuses_nothing(value: float) -> None:
    assert_no_worse(TRUTH.float(), with_element(value), TRUTH)
    with pytest.raises(AssertionError):
        assert_no_worse(with_element(value), with_element(value), TRUTH)
    with pytest.raises(AssertionError):
        assert_no_worse(with_element(0.9), with_element(value), TRUTH)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_in_truth_must_not_be_in_the_kernel(value: float) -> None:
    truth = TRUTH.clone()
    truth[2, 3] = value
    assert_no_worse(with_element(value), TRUTH.float(), truth)
    with pytest.raises(AssertionError):
        assert_no_worse(TRUTH.float(), TRUTH.float(), truth)


def test_strides_given_are_those_expected() -> None:
    transposed = TRUTH.float().t().contiguous().t()
    assert_no_worse(transposed, TRUTH.float(), TRUTH, strides=transposed.stride())
    with pytest.raises(AssertionError, match="strides"):
        assert_no_worse(TRUTH.float(), TRUTH.float(), TRUTH, strides=transposed.stride())


def test_strides_of_single_elements_do_not_matter() -> None:
    one = torch.zeros(1, 3)
    assert_no_worse(one.as_strided((1, 3), (99, 1)), one, one.double())
    with pytest.raises(AssertionError, match="strides"):
        assert_no_worse(torch.zeros(6)[::2].view(1, 3), one, one.double())


def test_bitwise_comparison_sees_nan_and_the_sign_of_zero() -> None:
    nan, zero = torch.tensor([math.nan]), torch.tensor([0.0])
    assert_bitwise_equal(nan, nan.clone())
    for other in (nan, -zero):
        with pytest.raises(AssertionError, match="1 of 1"):
            assert_bitwise_equal(zero, other)


@pytest.mark.parametrize("layout", sorted({*LAYOUTS, *GRAD_LAYOUTS}))
@pytest.mark.parametrize("size", [(3, 5), (2, 3, 4), (2, 3, 4, 5), (0, 3), (7,)], ids=str)
def test_guarded_holds_the_values_and_notices_every_write(size: tuple[int, ...], layout: str) -> None:
    values = torch.rand(size) + 1
    guard = Guarded(values, layout)
    assert guard.tensor.shape == values.shape
    guard.check()
    if 0 not in guard.tensor.stride():
        assert torch.equal(guard.tensor, values)
    assert guard.tensor.isfinite().all()
    start = guard.tensor.storage_offset()
    for at in (0, start - 1, start, guard.buffer.numel() - 1):
        guard = Guarded(values, layout)
        guard.buffer[at] = 12345.0
        with pytest.raises(AssertionError, match="1 elements of its memory were written"):
            guard.check()


def test_layouts_are_what_they_say() -> None:
    x = torch.rand(4, 3, 6, 5)
    made = {name: Guarded(x, name).tensor for name in LAYOUTS}
    assert made["plain"].is_contiguous()
    assert made["transposed"].permute(3, 2, 1, 0).is_contiguous()
    assert made["batch swapped"].transpose(0, 1).is_contiguous()
    assert made["channels_last"].is_contiguous(memory_format=torch.channels_last)
    assert made["expanded"].stride(0) == 0
    assert made["offset by one"].data_ptr() % 64 == 4
    assert not made["row-sliced"].is_contiguous()
    assert made["every second row"].stride(0) == 2 * x.stride(0)
    assert Guarded(x, "expanded scalar").tensor.stride() == (0, 0, 0, 0)


def test_a_read_outside_becomes_nan() -> None:
    guard = Guarded(torch.ones(3, 5), "row-sliced")
    wider = guard.tensor.as_strided((3, 6), guard.tensor.stride(), guard.tensor.storage_offset())
    assert wider.sum().isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("missed", range(4))
def test_an_unwritten_element_is_noticed_in_every_dtype_and_place(missed: int, dtype: torch.dtype) -> None:
    def leaves_one_out() -> list[Tensor]:
        out = torch.empty(4, dtype=dtype)
        for i in range(4):
            if i != missed:
                out[i] = 1
        return [out]

    with pytest.raises(AssertionError, match="not written"):
        written_everywhere(leaves_one_out)


def test_an_unwritten_stretch_of_a_large_result_is_noticed() -> None:
    def leaves_tail_out() -> list[Tensor]:
        out = torch.empty_strided((1000, 1001), (1001, 1))
        out[:, :1000] = 1
        return [out]

    with pytest.raises(AssertionError, match="1000 of 1001000"):
        written_everywhere(leaves_tail_out)


def test_scratch_that_is_read_before_it_is_written_is_noticed() -> None:
    with pytest.raises(AssertionError, match="not written"):
        written_everywhere(lambda: [torch.zeros(3) + 0 * torch.empty(3)])


def test_a_result_that_changes_from_run_to_run_is_noticed() -> None:
    with pytest.raises(AssertionError, match="not the same twice"):
        written_everywhere(lambda: [torch.rand(3)])


def test_what_is_written_passes_and_poison_ends_with_its_block() -> None:
    written_everywhere(lambda: [torch.ones(3), None, torch.zeros(0)])
    with poisoned("junk"):
        assert torch.empty(10_000).isnan().all()
    with poisoned("zero"):
        assert (torch.empty(10_000) == 0).all()
