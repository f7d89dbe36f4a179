"""The judges judge: each must reject what is wrong and accept what is right."""

import pytest
import torch

from support.oracles import (
    assert_all_equal,
    assert_equal,
    assert_losses_close,
    assert_near_plain,
    error,
    outputs_and_gradients,
)


def test_near_plain_accepts_plain_itself_and_better():
    exact = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain = exact.bfloat16()
    assert_near_plain(plain, plain, exact)
    assert_near_plain(plain, (plain.float() * 1.01).bfloat16(), exact)


def test_near_plain_rejects_three_times_the_error():
    exact = torch.zeros(4, dtype=torch.float64)
    plain = torch.full((4,), 1e-3)
    with pytest.raises(AssertionError, match=r"error 3.000e-03 to fp64, plain torch has 1.000e-03"):
        assert_near_plain(3 * plain, plain, exact)


def test_near_plain_allows_one_rounding_where_plain_is_exact():
    exact = torch.ones(4, dtype=torch.float64)
    rounded = torch.full((4,), 1.0 - 2**-25, dtype=torch.float64).float()
    assert_near_plain(rounded, torch.ones(4), exact)
    with pytest.raises(AssertionError):
        assert_near_plain(torch.full((4,), 1.0 + 2**-22), torch.ones(4), exact)


def test_near_plain_rejects_nan_and_wrong_shape_and_low_precision_reference():
    exact = torch.ones(2, dtype=torch.float64)
    with pytest.raises(AssertionError, match="inf"):
        assert_near_plain(torch.tensor([1.0, float("nan")]), torch.ones(2), exact)
    with pytest.raises(AssertionError, match="shape"):
        assert_near_plain(torch.ones(3), torch.ones(3), exact)
    with pytest.raises(AssertionError, match="float64"):
        assert_near_plain(torch.ones(2), torch.ones(2), exact.float())
    assert error(torch.empty(0), torch.empty(0, dtype=torch.float64)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_equal_sees_one_bit(dtype):
    x = torch.linspace(1, 2, 7).to(dtype)
    assert_equal(x, x.clone())
    y = x.clone()
    y[3] = torch.nextafter(y[3], torch.tensor(9.0, dtype=dtype))
    with pytest.raises(AssertionError, match=r"1 of 7 values differ, first at \(3,\)"):
        assert_equal(y, x)


def test_equal_tells_zeros_apart_and_nan_alike():
    assert_equal(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    with pytest.raises(AssertionError):
        assert_equal(torch.tensor([0.0]), torch.tensor([-0.0]))
    with pytest.raises(AssertionError, match="float64"):
        assert_equal(torch.zeros(1), torch.zeros(1, dtype=torch.float64))
    assert_equal(torch.arange(3), torch.arange(3))
    with pytest.raises(AssertionError):
        assert_equal(torch.arange(3), torch.arange(3).flip(0))


def test_all_equal_names_the_entry():
    with pytest.raises(AssertionError, match="bias"):
        assert_all_equal(
            {"weight": torch.ones(1)}, {"weight": torch.ones(1), "bias": torch.ones(1)}
        )
    with pytest.raises(AssertionError, match="weight"):
        assert_all_equal({"weight": torch.ones(1)}, {"weight": torch.zeros(1)})


def test_outputs_and_gradients_of_a_product():
    a, b = torch.tensor([2.0, 3.0]), torch.tensor([5.0, 7.0])
    found = outputs_and_gradients(torch.mul, [a, b], [torch.tensor([1.0, 10.0])], torch.float64)
    assert found["out0"].tolist() == [10.0, 21.0]
    assert found["grad0"].tolist() == [5.0, 70.0]
    assert found["grad1"].tolist() == [2.0, 30.0]
    assert found["grad0"].dtype == torch.float64
    assert not a.requires_grad


def test_outputs_and_gradients_reports_a_cut_graph():
    with pytest.raises(AssertionError, match="input 1 got no gradient"):
        outputs_and_gradients(lambda a, b: a * b.detach(), [torch.ones(1), torch.ones(1)])


def test_losses_close():
    assert_losses_close([1.0, 0.5], [1.0, 0.5 + 1e-7], 1e-6)
    with pytest.raises(AssertionError, match="step 1"):
        assert_losses_close([1.0, 0.5], [1.0, 0.6], 1e-6)
    with pytest.raises(AssertionError, match="1 steps"):
        assert_losses_close([1.0], [1.0, 0.6], 1e-6)
    with pytest.raises(AssertionError):
        assert_losses_close([float("nan")], [1.0], 1e-6)
