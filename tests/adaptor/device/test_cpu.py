"""The CPU's answers in the place of torch.cuda."""

import pytest
import torch

from mindspeed.device.cpu import CpuRuntime, Event, Stream


@pytest.fixture
def cuda():
    return CpuRuntime()


def test_the_device_has_no_index(cuda):
    assert cuda.current_device() == torch.device("cpu")
    assert torch.empty(1, device=cuda.current_device()).device.type == "cpu"
    assert cuda.device_count() == 1
    assert cuda.is_available()


def test_all_streams_are_one(cuda):
    assert Stream() == cuda.current_stream() == cuda.Stream(priority=-1)
    assert len({Stream(), cuda.default_stream()}) == 1
    with cuda.stream(Stream()), cuda.device(0), Stream():
        assert cuda.current_stream().query()


def test_events_read_the_clock(cuda):
    first, last = cuda.Event(enable_timing=True), Stream().record_event()
    with pytest.raises(RuntimeError, match="recorded"):
        first.elapsed_time(last)
    first.record()
    last.record()
    assert 0 <= first.elapsed_time(last) < 1000
    assert isinstance(last, Event)


def test_the_device_generator_is_the_default_generator(cuda):
    cuda.manual_seed(5)
    state = cuda.get_rng_state()
    drawn = torch.rand(3)
    cuda.random.set_rng_state(state)
    assert torch.equal(torch.rand(3), drawn)
    assert cuda.default_generators[torch.device("cpu")] is torch.default_generator
    assert cuda.default_generators[None] is cuda.default_generators[3]
    assert cuda.initial_seed() == 5


def test_a_lazy_call_runs_at_once(cuda):
    seen = []
    cuda._lazy_call(lambda: seen.append(1))
    assert seen == [1]


def test_memory_figures_are_the_process_own(cuda):
    before = cuda.memory_allocated()
    block = torch.ones(32 << 20)
    assert cuda.memory_allocated() - before > 100 << 20
    assert cuda.max_memory_allocated() >= block.nbytes
    assert cuda.memory_stats()["allocated_bytes.all.current"] > block.nbytes
    assert cuda.memory_stats()["num_ooms"] == 0
    free, total = cuda.mem_get_info()
    assert 0 < free <= total


@pytest.mark.parametrize("name", ["CUDAGraph", "graph", "cudart", "MemPool"])
def test_what_has_no_meaning_names_the_flag(cuda, name):
    with pytest.raises(NotImplementedError, match=rf"{name} has no meaning on the CPU: turn --"):
        getattr(cuda, name)()


def test_unknown_names_fall_through_and_are_recorded(cuda):
    assert cuda.is_current_stream_capturing is torch.cuda.is_current_stream_capturing
    assert cuda.fallthrough == {"is_current_stream_capturing": __name__}
    with pytest.raises(AttributeError):
        _ = cuda.no_such_name


def test_a_random_state_of_another_device_is_skipped_with_a_warning(cuda):
    cuda.manual_seed(3)
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match="16 bytes comes from another kind of device"):
        cuda.set_rng_state(torch.zeros(16, dtype=torch.uint8))
    assert torch.equal(torch.get_rng_state(), before)
