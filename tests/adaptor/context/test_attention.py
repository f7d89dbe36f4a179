"""The core attention of a divided sequence against the whole one: outputs and gradients."""

from importlib.metadata import version

import pytest
import torch

from mindspeed.features.context.settings import ContextSettings, settings
from support.mutation import Mutation
from support.ranks import run_ranks

S, B, H, HK, D, DV = 32, 2, 4, 2, 8, 4
DIVIDED = {"context_parallel_size": 4}
FLAGS = {
    "ulysses": {},
    "ulysses keeps": {"context_parallel_kv_cache_policy": "full"},
    "ring": {"context_parallel_algo": "megatron_cp_algo", "use_cp_send_recv_overlap": True},
    "ring of rings": {
        "context_parallel_algo": "megatron_cp_algo",
        "cp_window_size": 2,
        "context_parallel_kv_cache_policy": "half",
    },
    "hybrid": {"context_parallel_algo": "hybrid_cp_algo", "ulysses_degree_in_cp": 2},
    "gather": {
        "context_parallel_algo": "kvallgather_cp_algo",
        "context_parallel_check_plans": True,
    },
    "adaptive": {"context_parallel_algo": "adaptive_cp_algo"},
    "hybrid adaptive": {
        "context_parallel_algo": "hybrid_adaptive_cp_algo",
        "ulysses_degree_in_cp": 2,
    },
}
KINDS = ("causal", "full", "window", "documents", "packed", "dense", "rows", "alibi", "root")
_HERE = "mindspeed.features.context"
_MODULE = f"{_HERE}.attention_module:MegatronCPAttention"
MUTANTS = [
    (
        "causal",
        Mutation("split", f"{_MODULE}._division", "SeqLayout.zigzag", "SeqLayout.contiguous"),
    ),
    ("causal", Mutation("scale", f"{_MODULE}._options", "self._scale()", "1.0")),
    ("documents", Mutation("documents", f"{_MODULE}._band", "right, documents", "right, ()")),
    ("window", Mutation("window", f"{_MODULE}._band", "window.left", "None")),
    ("root", Mutation("root", f"{_MODULE}._options", 'form == "sqrt"', "False")),
    ("rows", Mutation("mask", f"{_HERE}.masks:_dense", "~attention_mask", "attention_mask")),
    (
        "rows",
        Mutation(
            "rows", f"{_HERE}.masks:_gathered", "layout.unshard(parts, 1)", "torch.cat(parts, 1)"
        ),
    ),
]
SEEDS = Mutation(
    "seeds",
    f"{_MODULE}._draw",
    "torch.randint(2**31 - 1, (2,), dtype=torch.int64, device=device)",
    "torch.tensor([torch.distributed.get_rank(), 1])",
)


def test_what_the_flags_ask_for():
    assert settings({}) is None
    found = {name: settings({**DIVIDED, **flags}) for name, flags in FLAGS.items()}
    assert found["ulysses"] == ContextSettings()
    assert found["ring"].p2p == "dual_group"
    half = settings({**DIVIDED, "context_parallel_kv_cache_policy": "half"})
    assert half.arguments(4)["kv_keep"] == "pre_k"
    wanted = {
        "ulysses": ("ulysses", 4, 1, "last"),
        "ulysses keeps": ("ulysses", 4, 1, "pre"),
        "ring": ("ring", 1, 1, "last"),
        "ring of rings": ("ring", 1, 2, "k"),
        "hybrid": ("usp", 2, 1, "last"),
        "gather": ("allgather_kv", 1, 1, "last"),
        "adaptive": ("tasks", 1, 1, "last"),
        "hybrid adaptive": ("tasks", 2, 1, "last"),
    }
    assert {name: tuple(s.arguments(4).values()) for name, s in found.items()} == wanted
    # A smaller group, which came with a batch.
    assert tuple(found["hybrid"].arguments(2).values()) == ("ulysses", 2, 1, "last")
    assert tuple(found["ring of rings"].arguments(2).values()) == ("ring", 1, 1, "k")


@pytest.mark.parametrize(
    ("interval", "layers"), [(0, [*range(1, 13)]), (1, [1, 3, 5, 7, 9, 11]), (4, [1, 6, 11])]
)
def test_which_layers_keep(interval, layers):
    found = ContextSettings("ring", kv_keep="kv", interval=interval)
    keeps = [n for n in range(1, 13) if found.arguments(4, n)["kv_keep"] == "kv"]
    assert keeps == layers


def documents():
    return torch.tensor([0, 3, 17, 31, 32, 33, 40, 64])


def seen_of(kind):
    """Return bool [B, S, S]."""
    triangle = torch.ones(S, S, dtype=torch.bool).tril().expand(B, S, S)
    if kind in ("full", "root"):
        return torch.ones(B, S, S, dtype=torch.bool)
    if kind == "window":
        return triangle & ~torch.ones(S, S, dtype=torch.bool).tril(-6)
    if kind in ("documents", "packed"):
        number = torch.bucketize(torch.arange(B * S), documents(), right=True).view(B, S, 1)
        return triangle & (number == number.mT)
    if kind in ("dense", "rows"):
        random = torch.rand(B, S, S, generator=torch.Generator().manual_seed(1)) < 0.3
        random |= torch.eye(S, dtype=torch.bool)
        return random if kind == "rows" else random[:1].expand(B, S, S)
    return triangle


def reference(q, k, v, kind):
    """Attention of [S, B, heads, d] tensors by its definition."""
    from ms_ops import alibi_slopes

    k, v = (t.repeat_interleave(H // HK, 2) for t in (k, v))
    scores = torch.einsum("sbhd,tbhd->bhst", q, k) / D**0.5
    if kind in ("alibi", "root"):
        far = (torch.arange(S) - torch.arange(S).unsqueeze(1)).abs().double()
        far = far.sqrt() if kind == "root" else far
        scores = scores - alibi_slopes(H).double().view(-1, 1, 1) * far
    scores = scores.masked_fill(~seen_of(kind).unsqueeze(1), -torch.inf)
    return torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1), v).flatten(-2)


def packing(cut):
    """Return how whole rows become a pack of sequences that divide, and the rank's part."""
    from ms_parallel.context import SeqLayout

    layout = SeqLayout.zigzag_docs(documents().tolist(), 4)
    return lambda t: layout.shard(t.transpose(0, 1).flatten(0, 1), cut, 0)


def differences(rank, world_size):
    """Return the largest error of output and gradients: by algorithm and mask, and of mutants."""
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mindspeed.features.context.attention_module import MegatronCPAttention
    from mindspeed.features.ops.alibi import Alibi
    from ms_parallel.context import SeqLayout

    parallel_state.initialize_model_parallel(context_parallel_size=world_size)
    shape = {"num_layers": 2, "hidden_size": H * D, "num_attention_heads": H}
    torch.manual_seed(0)
    whole = [torch.randn(S, B, n, d).double() for n, d in ((H, D), (HK, D), (HK, DV))]
    gradient = torch.randn(S, B, H * DV).double()
    layout = SeqLayout.zigzag(S, world_size)

    def module(name, kind, **options):
        config = TransformerConfig(
            **shape, num_query_groups=HK, context_parallel_size=world_size, attention_dropout=0.0,
            window_size=(5, 0) if kind == "window" else None, **options,
        )  # fmt: skip
        config.context_attention = settings({**DIVIDED, **FLAGS[name]})
        if kind in ("alibi", "root"):
            config.alibi = Alibi("sqrt" if kind == "root" else "signed")
        mask = "no_mask" if kind in ("full", "root") else "causal"
        made = MegatronCPAttention(config, 1, AttnMaskType[mask], "self", v_channels=DV)
        assert made.config is config
        assert config.context_parallel_size == world_size
        return made

    def mask_of(kind):
        if kind == "documents":
            return documents()
        if kind == "dense":
            return ~seen_of(kind)[:1].unsqueeze(1)
        # The rows of this rank's tokens, as Megatron divides masks.
        return layout.shard(~seen_of(kind).unsqueeze(1), rank, 2) if kind == "rows" else None

    def run(name, kind):
        cut = packing(rank) if kind == "packed" else lambda t: layout.shard(t, rank, 0)
        parts = [cut(t).detach().requires_grad_() for t in whole]
        starts = documents().to(torch.int32)
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts)
        packed = packed if kind == "packed" else None
        out = module(name, kind)(*parts, mask_of(kind), packed_seq_params=packed)
        out.backward(cut(gradient))
        leaves = [t.clone().requires_grad_() for t in whole]
        wanted = reference(*leaves, kind)
        wanted.backward(gradient)
        pairs = [
            (out, cut(wanted)),
            *((p.grad, cut(w.grad)) for p, w in zip(parts, leaves, strict=True)),
        ]
        return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)

    # Megatron 0.14 knows windows of TransformerEngine alone.
    absent = {"window"} if version("megatron-core") < "0.15" else set()
    kinds = [kind for kind in KINDS if kind not in absent]
    found = {(name, kind): run(name, kind) for name in FLAGS for kind in kinds}
    for name in FLAGS:
        found[name, "dropout"] = dropped(rank, module(name, "causal"), whole)
        found[name, "other group"] = of_the_batch(rank, module(name, "packed"), whole)
    caught = {}
    for kind, mutation in [mutant for mutant in MUTANTS if mutant[0] not in absent]:
        with mutation.applied():
            caught[mutation.name] = run("ring of rings", kind)
    with SEEDS.applied():
        caught[SEEDS.name] = dropped(rank, module("ring", "causal"), whole)
    return found, caught, refused(rank, module, whole, layout)


def of_the_batch(rank, attend, whole):
    """Return the error of a pack for which the batch names its own group of ranks."""
    import torch.distributed as dist
    from megatron.core.packed_seq_params import PackedSeqParams

    from ms_parallel.context import SeqLayout

    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    layout = SeqLayout.zigzag_docs(documents().tolist(), 2)

    def cut(t):
        return layout.shard(t.transpose(0, 1).flatten(0, 1), rank % 2, 0)

    starts = documents().to(torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts)
    packed.cp_group = pairs[rank // 2]
    out = attend(*map(cut, whole), None, packed_seq_params=packed)
    return float((out - cut(reference(*whole, "packed"))).abs().max())


def dropped(rank, attend, whole):
    """Return how far dropout on four ranks is from dropout on two, and repeated; 1 if it is off."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from ms_parallel.context import SeqLayout

    attend.attention_dropout.p = 0.4

    def run(group):
        layout = SeqLayout.zigzag(S, group.size())
        parts = [layout.shard(t, group.rank(), 0).float() for t in whole]
        model_parallel_cuda_manual_seed(7, force_reset_rng=True)
        attend.cp_group = group
        out = attend(*parts, None)
        outs = [torch.empty_like(out) for _ in layout.lengths]
        dist.all_gather(outs, out, group=group)
        return layout.unshard(outs, 0)

    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    four, two = run(dist.group.WORLD), run(pairs[rank // 2])
    again = run(dist.group.WORLD)
    attend.eval()
    acts = bool((run(dist.group.WORLD) - four).abs().max() > 0.1)
    return max(float((four - two).abs().max()) - 1e-6, float((four - again).abs().max()), 1 - acts)


def refused(rank, module, whole, layout):
    """Return what is said about inputs that cannot be served."""
    from mindspeed.features.ops.alibi import Alibi

    q, k, v = (layout.shard(t, rank, 0) for t in whole)
    signed = module("ring", "alibi")
    signed.alibi.settings = Alibi("signed")
    attend = module("ring", "causal")
    calls = (
        lambda: attend(q, k, v, None, attention_bias=torch.zeros(1)),
        lambda: attend(q, k[1:], v[1:], None),
        lambda: attend(q, k, v, torch.zeros(1, 1, S, S - 1, dtype=torch.bool)),
        lambda: signed(q, k, v, ~seen_of("dense")[:1].unsqueeze(1)),
    )
    said = []
    for call in calls:
        with pytest.raises(ValueError, match="MegatronCPAttention") as error:
            call()
        said.append(str(error.value))
    return said


@pytest.mark.megatron014
def test_every_algorithm_equals_the_whole_sequence_under_every_mask():
    results = run_ranks(differences, 4, preload="megatron")
    for found, _, said in results:
        assert {key: error for key, error in found.items() if error > 1e-9} == {}
        words = ("attention_bias", "self-attention", "rows of this rank", "need a causal mask")
        assert all(word in text for word, text in zip(words, said, strict=True)), said
    for name in results[0][1]:
        assert max(caught[name] for _, caught, _ in results) > 1e-2, f"not caught: {name}"
