"""Flags of MindSpeed in their old spelling: each acts, is superfluous, or is refused."""

import sys
from argparse import ArgumentParser, Namespace
from types import SimpleNamespace

import pytest
import torch

import mindspeed
from mindspeed.features.level0 import megatron_lm
from mindspeed.features.ops import alibi, attention_window
from mindspeed.features.ops.alibi import Alibi
from mindspeed.train.args import parse
from support.ranks import run_ranks

EAGER = {"TORCHDYNAMO_DISABLE": "1"}
OLD = [
    *("--use-flash-attn", "--use-fusion-attn-v2", "--use-fused-swiglu", "--use-fused-rmsnorm"),
    *("--use-fused-rotary-pos-emb", "--shape-order", "SBH", "--pre-tockens", "64"),
    *("--next-tockens", "0", "--sparse-mode", "0", "--attention-mask-type", "causal", "--swiglu"),
    *("--normalization", "RMSNorm", "--position-embedding-type", "rope"),
]


def test_an_old_command_line_is_taken_by_both_entries():
    values = parse([*OLD, "--no-gradient-accumulation-fusion"]).config.plan_values()
    assert values["use_flash_attn"]
    assert values["use_fusion_attn_v2"]
    assert values["gradient_accumulation_fusion"] is False
    assert attention_window.window(values) == (64, 0)
    assert "ops.switches" in mindspeed.plan(values, level=1).features

    def add(given):
        given.add_argument("--use-flash-attn", action="store_true")
        for flag in ("--swiglu", "--normalization", "--position-embedding-type"):
            given.add_argument(flag, nargs="?")
        return given

    parser = megatron_lm.wrap_add_arguments(add)(ArgumentParser(allow_abbrev=False))
    args = vars(parser.parse_args(OLD))
    assert args["use_flash_attn"]
    assert attention_window.window(args) == (64, 0)


@pytest.mark.parametrize(
    ("config", "level", "words"),
    [
        ({"use_flash_attn": True}, 0, "--use-flash-attn .* belongs to optimization level 1"),
        ({"use_fusion_attn_v2": True}, 0, "--use-fusion-attn-v2 .* level 1"),
        ({"shape_order": "BSND"}, 1, "in the layout that Megatron's layers give, SBH"),
        ({"use_flash_attn": True, "use_legacy_models": True}, 1, "legacy models is not replaced"),
        ({"attention_mask_type": "general"}, 0, "--attention-mask-type .* level 1"),
        (
            {"attention_mask_type": "general", "create_attention_mask_in_dataloader": False},
            1,
            "the data loader makes none",
        ),
    ],
)
def test_what_cannot_act_is_refused(config, level, words):
    with pytest.raises(mindspeed.PlanError, match=words):
        mindspeed.plan(config, level=level)


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ({}, False),
        ({"reset_attention_mask": True}, True),
        (
            {"reset_attention_mask": True, "context_parallel_size": 2, "optimization_level": 2},
            False,
        ),
        ({"attention_mask_type": "general"}, True),
    ],
)
def test_batches_bring_masks_only_where_they_say_more_than_the_triangle(given, made, monkeypatch):
    monkeypatch.setattr(mindspeed, "activate", lambda args: None)
    seen = []

    def add(parser):
        parser.add_argument(
            "--no-create-attention-mask-in-dataloader",
            dest="create_attention_mask_in_dataloader",
            action="store_false",
        )
        return parser

    parser = megatron_lm.wrap_add_arguments(add)(ArgumentParser(allow_abbrev=False))
    args = parser.parse_args([], Namespace(**given))
    megatron_lm.wrap_validate(lambda args: seen.append(vars(args).copy()))(args)
    assert seen[0]["create_attention_mask_in_dataloader"] is made


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({}, {}),
        ({"pre_tokens": 8}, {"window_size": (8, 0)}),
        (
            {"attention_mask_type": "general", "pre_tokens": 3},
            {"window_size": (3, 0), "masks_beside_windows": True},
        ),
        ({"position_embedding_type": "alibi"}, {"alibi": Alibi("signed")}),
    ],
)
def test_flags_of_a_script_reach_the_configuration_when_it_is_made(arguments, found, monkeypatch):
    """Also with builders that took their names from Megatron before the arguments were parsed."""
    made = []
    init = attention_window.wrap_post_init(alibi.wrap_post_init(lambda self: made.append(self)))
    init(SimpleNamespace())
    script = SimpleNamespace(_GLOBAL_ARGS=SimpleNamespace(**arguments))
    monkeypatch.setitem(sys.modules, "megatron.training.global_vars", script)
    init(SimpleNamespace())
    assert [vars(config) for config in made] == [{}, found]


def masked_results(rank, world_size):
    """A window of 3 with a mask of two documents: the window alone, and both."""
    from megatron.core import parallel_state
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mindspeed.features.ops.attention_module import FusedAttention

    parallel_state.initialize_model_parallel()
    shape = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4}
    config = TransformerConfig(**shape, attention_dropout=0.0, window_size=(3, 0))
    module = FusedAttention(config, 1, AttnMaskType.causal, "self")
    document = torch.arange(12) >= 7
    mask = document[:, None] != document[None, :]
    torch.manual_seed(0)
    q, k, v = (torch.randn(12, 1, 4, 8) for _ in range(3))
    window = module(q, k, v, mask)
    config.masks_beside_windows = True
    both = module(q, k, v, mask)
    parts = [module(*(t[a:b] for t in (q, k, v)), None) for a, b in ((0, 7), (7, 12))]
    return window, both, torch.cat(parts)


def test_a_general_mask_counts_beside_a_window():
    window, both, apart = run_ranks(masked_results, 1, preload="megatron", env=EAGER)[0]
    torch.testing.assert_close(both, apart, rtol=1e-5, atol=1e-6)
    assert torch.equal(both[:7], window[:7])
    assert not torch.allclose(both[7:10], window[7:10], atol=1e-3)
