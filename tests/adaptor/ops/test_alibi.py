"""ALiBi at level 1: the bias against written-out scores, what is refused, a divided model."""

from argparse import ArgumentParser
from types import SimpleNamespace

import pytest
import torch

import mindspeed
from mindspeed.features.level0 import megatron_lm
from mindspeed.features.ops import alibi
from mindspeed.features.ops.alibi import Alibi, settings
from mindspeed.train.args import parse
from mindspeed.train.config import TrainConfig
from mindspeed.train.validate import check
from support.ranks import run_ranks

EAGER = {"TORCHDYNAMO_DISABLE": "1"}
ALIBI = {"position_embedding_type": "alibi"}


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        ({}, Alibi("signed")),
        ({"square_alibi_mask": True}, Alibi("signed")),
        ({"fill_neg_inf": True}, Alibi("signed", fill=True)),
        ({"alibi_fusion_attn_type": 0}, Alibi("abs")),
        ({"alibi_fusion_attn_type": 0, "alibi_diagonal_opposite": True}, Alibi("signed")),
        ({"alibi_fusion_attn_type": 2, "fill_neg_inf": True}, Alibi("abs", fill=True)),
        ({"alibi_fusion_attn_type": 3}, Alibi("sqrt")),
    ],
)
def test_what_the_flags_ask_for(flags, want):
    assert settings({**ALIBI, **flags}) == want
    mindspeed.plan({**ALIBI, **flags}, level=1)
    config = SimpleNamespace()
    alibi.mark(config, {**ALIBI, **flags})
    assert config.alibi == want


def test_other_positions_know_nothing_of_it():
    assert settings({}) is None
    config = SimpleNamespace()
    alibi.mark(config, {})
    assert not hasattr(config, "alibi")
    assert "ops.alibi" not in mindspeed.plan({}, level=1).features


@pytest.mark.parametrize(
    ("flags", "level", "words"),
    [
        (ALIBI, 0, "--position-embedding-type alibi .* belongs to optimization level 1"),
        ({"fill_neg_inf": True}, 1, "Give --position-embedding-type alibi"),
        ({"alibi_fusion_attn_type": 2}, 1, "Give --position-embedding-type alibi"),
        ({**ALIBI, "alibi_diagonal_opposite": True}, 1, "a form of --alibi-fusion-attn-type 0"),
        (
            {**ALIBI, "alibi_diagonal_opposite": True, "alibi_fusion_attn_type": 2},
            1,
            "a form of --alibi-fusion-attn-type 0",
        ),
        (
            {**ALIBI, "square_alibi_mask": True, "alibi_fusion_attn_type": 0},
            1,
            "--square-alibi-mask is a form of the bias without",
        ),
        ({**ALIBI, "context_parallel_size": 2}, 1, "a divided sequence"),
        ({**ALIBI, "multi_latent_attention": True}, 1, "multi-latent attention"),
        ({**ALIBI, "use_legacy_models": True}, 1, "legacy models"),
    ],
)
def test_refused_before_anything_is_patched(flags, level, words):
    with pytest.raises(mindspeed.PlanError, match=words):
        mindspeed.plan(flags, level=level)


def test_both_entries_take_the_value():
    def add(given):
        given.add_argument("--position-embedding-type", choices=["rope", "none"], default="rope")
        return given

    parser = megatron_lm.wrap_add_arguments(add)(ArgumentParser(allow_abbrev=False))
    words = ["--position-embedding-type", "alibi", "--alibi-fusion-attn-type", "3"]
    args = parser.parse_args(words)
    assert settings(vars(args)) == Alibi("sqrt")
    options = parse(words)
    assert settings(options.config.plan_values()) == Alibi("sqrt")
    check(options.config, 2)


def scores_bias(form, slopes, rows, keys):
    d = torch.arange(keys) - torch.arange(keys - rows, keys).unsqueeze(1)
    table = {"abs": -d.abs(), "sqrt": -d.abs().sqrt(), "signed": d}
    return slopes.view(-1, 1, 1) * table[form]


def written_out(q, k, v, bias, seen):
    """Attention of [s, b, heads, d] tensors in fp64."""
    q, k, v = (t.double().permute(1, 2, 0, 3) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias
    out = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    return out.permute(2, 0, 1, 3).flatten(-2).float()


def module_results(rank, world_size):
    """Pairs (ours, written out) for forms, masks and layouts on heads 4 to 7 of 8, and errors."""
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mindspeed.features.ops.attention_alibi import AlibiBias
    from mindspeed.features.ops.attention_module import FusedAttention

    parallel_state.initialize_model_parallel()
    shape = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
    config = TransformerConfig(**shape, attention_dropout=0.0)
    slopes = torch.tensor([2.0 ** -(i + 1) for i in range(8)])[4:]

    def module(form, kind="causal", fill=False, start=4):
        config.alibi = Alibi(form, fill)
        made = FusedAttention(config, 1, AttnMaskType[kind], "self")
        made.alibi = AlibiBias(config.alibi, 8, start, 4)
        return made

    torch.manual_seed(0)
    q, k, v = (torch.randn(12, 2, n, 8) for n in (4, 2, 2))
    triangle = torch.ones(12, 12, dtype=torch.bool).tril()
    pairs = []
    for form in ("abs", "sqrt", "signed"):
        bias = scores_bias(form, slopes, 12, 12)
        pairs.append((module(form)(q, k, v, None), written_out(q, k, v, bias, triangle)))
        full = torch.ones_like(triangle)
        pairs.append((module(form, "no_mask")(q, k, v, None), written_out(q, k, v, bias, full)))
        last = scores_bias(form, slopes, 1, 12)
        pairs.append((module(form)(q[-1:], k, v, None), written_out(q[-1:], k, v, last, full[-1:])))
    filled = module("signed", "no_mask", fill=True)(q, k, v, None)
    pairs.append((filled, written_out(q, k, v, bias, triangle)))
    starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts)
    one = [t[:, 0] for t in (q, k, v)]
    apart = [
        written_out(*(t[a:b, :1] for t in (q, k, v)), bias[:, a:b, a:b], triangle[a:b, a:b])
        for a, b in ((0, 5), (5, 12))
    ]
    pairs.append((module("signed")(*one, None, packed_seq_params=packed), torch.cat(apart)[:, 0]))
    errors = []

    class Model(torch.nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.position_embedding_type, self.core_attention = kind, torch.nn.Identity()

    for call in (
        lambda: module("signed", "padding")(*one, None, packed_seq_params=packed),
        lambda: module("abs", "padding_causal")(q, k, v, None),
        lambda: alibi.wrap_model(Model.__init__)(Model("rope"), "alibi"),
    ):
        try:
            call()
        except ValueError as error:
            errors.append(str(error))
    alibi.wrap_model(Model.__init__)(Model("rope"), "rope")
    wrong = [module("abs", start=0)(q, k, v, None), module("sqrt")(q, k, v, None)]
    return pairs, errors, wrong


def test_bias_equals_scores_written_out():
    pairs, errors, wrong = run_ranks(module_results, 1, preload="megatron", env=EAGER)[0]
    for ours, wanted in pairs:
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=2e-6)
    # The slopes of other heads, and another form.
    for mutant in wrong:
        assert not torch.allclose(mutant, pairs[0][1], rtol=1e-2, atol=1e-2)
    words = ("need a causal mask", "need one of", "knows no ALiBi")
    assert len(errors) == len(words)
    assert all(word in error for word, error in zip(words, errors, strict=True))


SMALL = {
    "num_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "seq_length": 24,
    "micro_batch_size": 2,
    "global_batch_size": 2,
    "init_method_std": 0.2,
    "optimization_level": 1,
}
CASES = {
    "none": {"position_embedding_type": "none"},
    "eager": ALIBI,
    "square": {**ALIBI, "square_alibi_mask": True, "fill_neg_inf": True},
    "0": {**ALIBI, "alibi_fusion_attn_type": 0},
    "2": {**ALIBI, "alibi_fusion_attn_type": 2},
    "3": {**ALIBI, "alibi_fusion_attn_type": 3},
    "dropout": {**ALIBI, "attention_dropout": 0.5},
}


def losses(rank, world_size, cases, parallel):
    from mindspeed.train.trainer import Trainer

    found = {}
    for name in cases:
        native = {k: v for k, v in CASES[name].items() if k in TrainConfig().flat()}
        flags = tuple(sorted((k, v) for k, v in CASES[name].items() if k not in native))
        config = TrainConfig.of(**SMALL, **parallel, **native, feature_flags=flags)
        with Trainer(config) as trainer:
            found[name] = [result.loss for result in trainer.run(2)]
    return found


@pytest.mark.megatron014
def test_every_type_acts_and_ranks_have_their_heads():
    (alone,) = run_ranks(losses, 1, list(CASES), {}, preload="megatron", env=EAGER)
    halves = {"tensor_model_parallel_size": 2}
    divided = run_ranks(losses, 2, ["eager", "3"], halves, preload="megatron", env=EAGER)
    for same in ("square", "0", "2"):
        assert alone[same] == pytest.approx(alone["eager"], rel=1e-6)
    for other in ("none", "3", "dropout"):
        assert alone[other] != pytest.approx(alone["eager"], rel=1e-5)
    for name in divided[0]:
        assert divided[0][name] == pytest.approx(alone[name], rel=2e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "nothing changes"),
        (ALIBI, "under a causal mask the same model"),
        ({**ALIBI, "alibi_fusion_attn_type": 3}, "the slopes cost no memory"),
    ],
)
def test_advice(options, words):
    assert words in alibi.advise(SimpleNamespace(**options))
