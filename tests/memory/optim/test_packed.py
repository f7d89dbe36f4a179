"""Packed masters: the bits, the trajectory, the bytes, what is refused, what is saved."""

import pytest
import torch

from ms_memory.errors import MemoryFeatureError
from ms_memory.optim import PackedAdamW, PackedMaster, bits, packed
from ms_ops import fused_adamw_

ROUNDINGS = bits.ROUNDINGS
NO_TIES = torch.empty(0, dtype=torch.int64)
SHAPES = ((7, 33), (130,), (), (0, 5), (64, 3))


def edge_masters():
    """Every high half with low halves around zero, one half, and the end: 393,216 numbers."""
    high = torch.arange(1 << 16, dtype=torch.int64) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    both = (high.unsqueeze(1) | low).reshape(-1)
    return torch.where(both >= 1 << 31, both - (1 << 32), both).to(torch.int32).view(torch.float32)


def halves(n):
    return torch.empty(n, dtype=torch.bfloat16), torch.empty(n, dtype=torch.int16)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_split_join_sampled(rounding):
    master = edge_masters()
    weight, residue = halves(master.numel())
    ties = bits.split_(master, [weight], residue, rounding)
    ties = NO_TIES if ties is None else ties
    back = bits.join([weight], residue, ties, torch.empty_like(master))
    number = ~master.isnan()
    assert torch.equal(back.view(torch.int32)[number], master.view(torch.int32)[number])
    assert back[~number].isnan().all()
    assert weight[~number].isnan().all()


@pytest.mark.nightly
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_exhaustive(rounding):
    """Every number of 32 bits comes back, and NaN stays NaN."""
    weight, residue = halves(1 << 24)
    away = 0
    for start in range(-1 << 31, 1 << 31, 1 << 24):
        pattern = torch.arange(start, start + (1 << 24), dtype=torch.int32)
        master = pattern.view(torch.float32)
        ties = bits.split_(master, [weight], residue, rounding)
        ties = NO_TIES if ties is None else ties
        back = bits.join([weight], residue, ties, torch.empty_like(master))
        nan = master.isnan()
        assert bool(((back.view(torch.int32) == pattern) | nan).all()), start
        assert bool(((back.isnan() & weight.isnan()) == nan).all()), start
        cast = master.to(torch.bfloat16)
        away += int(((weight.view(torch.int16) != cast.view(torch.int16)) & ~nan).sum())
    assert away == {"rna": 32_640, "rne": 0}[rounding]


def test_rne_equals_cast():
    master = edge_masters()
    master = master[~master.isnan()]
    weight, residue = halves(master.numel())
    ties = bits.split_(master, [weight], residue, "rne")
    cast = master.to(torch.bfloat16).view(torch.int16)
    assert torch.equal(weight.view(torch.int16), cast)
    bits.split_(master, [weight], residue, "rna")
    away = weight.view(torch.int16) != cast
    assert torch.equal(away.nonzero().squeeze(1), ties)  # exact halves above an even number
    assert int(away.sum()) == 32_640  # of the 2^32 numbers, all are here


def test_a_residue_alone_cannot_hold_the_tie():
    master = torch.tensor([0x3F808000, 0x3F7F8000], dtype=torch.int32).view(torch.float32)
    weight, residue = halves(2)
    ties = bits.split_(master, [weight], residue, "rne")
    assert weight[0] == weight[1]
    assert residue[0] == residue[1]
    assert ties.tolist() == [0]
    lost = bits.join([weight], residue, NO_TIES, torch.empty(2))
    assert lost[0] != master[0]


def make_params(seed=3):
    torch.manual_seed(seed)
    return [torch.randn(s).to(torch.bfloat16).requires_grad_() for s in SHAPES]


def gradients(step, dtype):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(s, generator=generator).to(dtype) for s in SHAPES]


def rounded(master, rounding):
    if rounding == "rne":
        return master.to(torch.bfloat16)
    weight, residue = halves(master.numel())
    bits.split_(master.reshape(-1), [weight], residue, "rna")
    return weight.view(master.shape)


def reference(steps, rounding, dtype, skipped):
    """AdamW on fp32 masters, the weights rounded after each step."""
    masters = [p.detach().float() for p in make_params()]
    moments = [[torch.zeros_like(m) for m in masters] for _ in range(2)]
    counts = [0] * len(masters)
    for step in range(steps):
        for i, grad in enumerate(gradients(step, dtype)):
            if masters[i].numel() and (step, i) not in skipped:
                counts[i] += 1
                one = [masters[i]], [grad.float()], [moments[0][i]], [moments[1][i]]
                fused_adamw_(*one, torch.tensor(float(counts[i])), lr=1e-2, weight_decay=0.1)
    return masters, [rounded(m, rounding) for m in masters]


def train(optimizer, params, steps, dtype, skipped=(), first=0):
    for step in range(first, first + steps):
        for i, (p, grad) in enumerate(zip(params, gradients(step, dtype), strict=True)):
            skip = (step, i) in skipped
            if dtype is torch.bfloat16:
                p.grad = None if skip else grad
            else:
                p.decoupled_grad = None if skip else grad
        optimizer.step()


def equal(mine, other):
    assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize(("rounding", "dtype"), [("rna", torch.bfloat16), ("rne", torch.float32)])
def test_trajectory_100(rounding, dtype):
    skipped = {(2, 0), (3, 0), (50, 1)}
    params = make_params()
    optimizer = PackedAdamW(params, 1e-2, weight_decay=0.1, rounding=rounding, block=64)
    train(optimizer, params, 100, dtype, skipped)
    masters, weights = reference(100, rounding, dtype, skipped)
    equal([p.detach() for p in params], weights)
    with optimizer.packed[0].masters() as mine:
        equal(mine, masters)


def test_a_lost_tie_changes_the_trajectory(monkeypatch):
    """Masters on ties whose list is lost come back one step of bf16 away."""
    tie = torch.tensor([0x3F808000], dtype=torch.int32).view(torch.float32)
    p = torch.ones(1, dtype=torch.bfloat16)
    kept = PackedMaster([p], rounding="rne")
    kept.set_master(0, tie)
    assert kept.master(0) == tie
    kept._ties = NO_TIES
    assert kept.master(0) != tie


def test_tie_at_zero_moment():
    """A tie is kept apart from the moments, so that a second moment of zero loses nothing."""
    tie = torch.tensor([0x3F808000], dtype=torch.int32).view(torch.float32)
    p = torch.ones(1, dtype=torch.bfloat16).requires_grad_()
    optimizer = PackedAdamW([p], 0.0, weight_decay=0.0, rounding="rne")
    optimizer.packed[0].set_master(0, tie)
    p.grad = torch.zeros(1, dtype=torch.bfloat16)
    optimizer.step()
    assert optimizer.state[p]["exp_avg_sq"] == 0
    assert optimizer.packed[0].master(0) == tie


def test_nan_policy():
    master = torch.tensor([float("nan"), 1.0, float("inf"), -float("inf")])
    master.view(torch.int32)[0] = 0x7FFFFFFF  # all ones: a carry would make it negative zero
    p = torch.zeros(4, dtype=torch.bfloat16)
    kept = PackedMaster([p])
    kept.set_master(0, master)
    assert p.isnan().tolist() == [True, False, False, False]
    assert kept.master(0).isnan().tolist() == [True, False, False, False]
    assert kept.master(0)[1:].tolist() == [1.0, float("inf"), -float("inf")]


def test_skipped_step():
    """Between steps the weights are bf16 numbers: a step that does not come changes nothing."""
    params = make_params()
    optimizer = PackedAdamW(params, 1e-2)
    train(optimizer, params, 2, torch.float32)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.decoupled_grad = None
    optimizer.step()
    equal(before, [p.detach() for p in params])


def test_empty_shard():
    params = [torch.empty(0, dtype=torch.bfloat16), torch.ones(4, dtype=torch.bfloat16)]
    optimizer = PackedAdamW(params, 1e-2)
    for p in params:
        p.decoupled_grad = torch.ones(p.shape)
    optimizer.step()
    assert (params[1] < 1).all()


def test_bytes_per_param():
    p = torch.randn(1000).to(torch.bfloat16).requires_grad_()
    optimizer = PackedAdamW([p], rounding="rna")
    p.grad = torch.randn(1000).to(torch.bfloat16)
    optimizer.step()
    assert optimizer.nbytes() == 1000 * (2 + 4 + 4)
    assert optimizer.packed[0].nbytes() == 2000


def test_no_fp32_copy_beyond_a_block(monkeypatch):
    sizes = []
    right = packed.PackedMaster.join
    monkeypatch.setattr(
        packed.PackedMaster,
        "join",
        lambda s, run: sizes.append(sum(p.numel for p in run)) or right(s, run),
    )
    params = make_params()
    optimizer = PackedAdamW(params, block=100)
    train(optimizer, params, 1, torch.float32)
    assert sum(sizes) == sum(p.numel() for p in params)
    assert max(sizes) <= 100
    assert len(sizes) < len(SHAPES) + 5


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_resume(rounding):
    params, block = make_params(), 64
    optimizer = PackedAdamW(params, 1e-2, rounding=rounding, block=block)
    train(optimizer, params, 5, torch.float32)
    saved = {
        "state": {
            i: {k: v.clone() for k, v in s.items()}
            for i, s in optimizer.state_dict()["state"].items()
        },
        "param_groups": optimizer.state_dict()["param_groups"],
    }
    assert {t.dtype for s in saved["state"].values() for t in s.values()} == {torch.float32}
    train(optimizer, params, 5, torch.float32, first=5)
    # Another rounding, another block, other weights: all that counts is in the state dict.
    for other in ROUNDINGS:
        again = make_params(seed=9)
        resumed = PackedAdamW(again, 1.0, rounding=other, block=90)
        resumed.load_state_dict(saved)
        train(resumed, again, 5, torch.float32, first=5)
        with resumed.packed[0].masters() as mine, optimizer.packed[0].masters() as theirs:
            equal(mine, theirs)


def test_slices_of_one_buffer():
    buffer = torch.ones(8, dtype=torch.bfloat16)
    parts = [buffer[:3], buffer[3:]]
    optimizer = PackedAdamW(parts, 1e-2)
    for _ in range(2):
        for p in parts:
            p.decoupled_grad = torch.ones(p.shape)
        optimizer.step()
    assert (buffer < 1).all()
    buffer.zero_()
    assert code(optimizer.step) == "E-M40"


def test_runs_follow_each_other():
    kept = PackedMaster(make_params(), block=100)
    runs = [[(s.index, s.start, s.stop) for s in run] for run in kept.runs([0, 2, 4])]
    assert runs == [
        [(0, 0, 64)],
        [(0, 64, 128)],
        [(0, 128, 192)],
        [(0, 192, 231)],
        [(2, 0, 1)],
        [(4, 0, 64)],
        [(4, 64, 128)],
        [(4, 128, 192)],
    ]


def test_low_precision_moments():
    params = make_params()
    optimizer = PackedAdamW(params, 1e-2, state_dtype=torch.bfloat16)
    train(optimizer, params, 3, torch.float32)
    assert optimizer.state[params[0]]["exp_avg"].dtype is torch.bfloat16
    assert optimizer.state[params[0]]["exp_avg"].any()


def code(call):
    with pytest.raises(MemoryFeatureError) as caught:
        call()
    assert caught.value.code in str(caught.value)
    return caught.value.code


def test_refused():
    whole = torch.zeros(8, dtype=torch.bfloat16)
    assert code(lambda: PackedMaster([torch.zeros(3)])) == "E-M40"
    assert code(lambda: PackedMaster([whole[:5], whole[4:]])) == "E-M40"
    assert code(lambda: PackedMaster([whole.view(4, 2).t()])) == "E-M40"
    kept = PackedMaster([whole[:4], whole[4:]])
    whole[0] = 3.0
    assert code(lambda: kept.master(0)) == "E-M40"
    kept.adopt_weights()
    assert kept.master(0)[0] == 3.0
    with kept.masters():
        assert code(lambda: kept.masters().__enter__()) == "E-M41"
    optimizer = PackedAdamW([torch.zeros(3, dtype=torch.bfloat16)])
    state = {"state": {0: {}}, "param_groups": optimizer.state_dict()["param_groups"]}
    assert code(lambda: optimizer.load_state_dict(state)) == "E-M42"
    with pytest.raises(ValueError, match="groups of"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    with pytest.raises(ValueError, match="rounding"):
        PackedMaster([], rounding="up")
    with pytest.raises(ValueError, match="block"):
        PackedMaster([], block=63)
    with pytest.raises(ValueError, match="state_dtype"):
        PackedAdamW([whole], state_dtype=torch.float16)


def test_an_exception_stores_nothing():
    p = torch.ones(4, dtype=torch.bfloat16)
    kept = PackedMaster([p])

    def fail():
        with kept.masters() as found:
            found[0].zero_()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert kept.master(0).tolist() == [1.0] * 4
