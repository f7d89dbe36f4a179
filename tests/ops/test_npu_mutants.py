"""Wrong calls of torch_npu in our backends: the emulation must catch each of them."""

from functools import cache

import pytest
import torch

from ms_ops import testing
from ms_ops.testing.npu import Readings, emulated_npu
from support.mutation import Mutation

MUTANTS = {
    "rms_norm": [
        ("eps by its short name", "ms_ops.norm.npu:forward", "epsilon=eps", "eps=eps", 2),
        ("dy and x swapped", "ms_ops.norm.npu:backward",
         "(dy.contiguous(), x.contiguous()", "(x.contiguous(), dy.contiguous()", 1),
        ("weight gradient left in fp32", "ms_ops.norm.npu:backward",
         "dweight.to(weight.dtype)", "dweight", 1),
        ("offset dropped", "ms_ops.norm.npu:_scale", "+ offset", "", 1),
    ],
    "dropout_add_norm": [
        ("eps of the kernel's own", "ms_ops.dropout_norm.npu:forward",
         "stream, scale, epsilon=eps", "stream, scale", 1),
        ("eps of the layer norm", "ms_ops.dropout_norm.npu:forward",
         "shift, epsilon=eps", "shift", 1),
        ("sum not asked for", "ms_ops.dropout_norm.npu:forward", ", additional_output=True", "", 1),
        ("mean and rstd exchanged", "ms_ops.dropout_norm.npu:forward",
         "out, mean, rstd, r =", "out, rstd, mean, r =", 1),
        ("sum rounded", "ms_ops.dropout_norm.npu:forward",
         "d, stream, scale, epsilon",
         "d.bfloat16(), stream.bfloat16(), scale.bfloat16(), epsilon", 1),
        ("scale dropped from the stream", "ms_ops.dropout_norm.npu:backward",
         "portable.stream(x, residual, *scales, p)", "portable.stream(x, None, *scales, p)", 1),
        ("gradient of the stream itself", "ms_ops.dropout_norm.npu:backward",
         "if dpre is not None", "if False", 1),
    ],
    "swiglu": [
        ("gradient and input swapped", "ms_ops.activation.npu:backward",
         "(dy.contiguous(), x.contiguous()", "(x.contiguous(), dy.contiguous()", 1),
        ("dimension not passed on", "ms_ops.activation.npu:forward", ", dim=dim", "", 1),
        ("strided input", "ms_ops.activation.npu:forward", "x.contiguous()", "x", 1),
    ],
    "rope": [
        ("mode misspelt", "ms_ops.rope.npu:forward", '"interleave"', '"interleaved"', 1),
        ("modes exchanged", "ms_ops.rope.npu:backward", "if interleaved", "if not interleaved", 1),
        ("cos and sin swapped", "ms_ops.rope.npu:backward", "cos4, sin4, r", "sin4, cos4, r", 1),
        ("rotated in low precision", "ms_ops.rope.npu:_arrange",
         "torch.promote_types(x.dtype, cos.dtype)", "x.dtype", 1),
        ("other channels dropped", "ms_ops.rope.npu:_restore", "== x.shape[-1]", "<= 9999", 1),
    ],
    "grouped_matmul": [
        ("kind of the list", "ms_ops.matmul.npu:forward",
         "group_list_type=0", "group_list_type=1", 1),
        ("axis that is split", "ms_ops.matmul.npu:backward", "group_type=2", "group_type=0", 1),
        ("one output a group", "ms_ops.matmul.npu:forward", "split_item=3", "split_item=0", 1),
        ("bias dropped", "ms_ops.matmul.npu:forward", "bias=rows, ", "", 1),
        ("ends in int32", "ms_ops.matmul.npu_groups:ends_on", "torch.int64", "torch.int32", 1),
    ],
    "grouped_matmul_add_": [
        ("operands swapped", "ms_ops.matmul.npu:grouped_add",
         "acc, x.contiguous(), dy.contiguous()", "acc, dy.contiguous(), x.contiguous()", 1),
        ("not transposed", "ms_ops.matmul.npu:grouped_add",
         "transpose_x=True", "transpose_x=False", 1),
    ],
    "quant_grouped_matmul": [
        ("scales exchanged", "ms_ops.matmul.npu_quant:quant",
         "scale=_list(scale), per_token_scale=_list(per_token_scale)",
         "scale=_list(per_token_scale), per_token_scale=_list(scale)", 1),
        ("activation's number", "ms_ops.matmul.npu_quant:quant",
         "ACTIVATIONS[activation]", "min(ACTIVATIONS[activation], 1)", 1),
        ("result's dtype", "ms_ops.matmul.npu_quant:quant",
         "output_dtype=output_dtype", "output_dtype=None", 1),
        ("bias dropped", "ms_ops.matmul.npu_quant:quant", "bias=_list(bias), ", "", 1),
        ("one group", "ms_ops.matmul.npu_quant:quant",
         "offsets.shape[0] == 1", "offsets.shape[0] == 0", 1),
    ],
    "weight_quant_grouped_matmul": [
        ("offset left out", "ms_ops.matmul.npu_quant:weight_quant",
         "antiquant_offset=_list(shift),", "", 1),
        ("scale of integers", "ms_ops.matmul.npu_quant:weight_quant",
         "antiquant_scale=", "scale=", 1),
        ("bias not widened", "ms_ops.matmul.npu_quant:weight_quant", "bias.float()", "bias", 1),
        ("matrices not turned in backward", "ms_ops.matmul.npu:_weight_quant_backward",
         "None, True", "None, False", 1),
    ],
    "matmul_add_": [
        ("operands swapped", "ms_ops.matmul.npu:add",
         "dy.contiguous(), x.contiguous()", "x.contiguous(), dy.contiguous()", 1),
    ],
    "moe_permute": [
        ("number of rows dropped", "ms_ops.moe.npu:permute", ", rows, False", ", None, False", 1),
        ("tokens and choices swapped", "ms_ops.moe.npu:permute_backward",
         "tokens, dpermuted.dtype, k", "k, dpermuted.dtype, tokens", 1),
    ],
    "moe_unpermute": [
        ("weights dropped", "ms_ops.moe.npu:unpermute", "weights, False", "None, False", 1),
        ("gradient and rows swapped", "ms_ops.moe.npu:unpermute_backward",
         "wide, dout.to(wide.dtype).contiguous()", "dout.to(wide.dtype).contiguous(), wide", 1),
        ("weights rounded", "ms_ops.moe.npu:_alike", "rows.float().contiguous(), probs.float()",
         "rows.contiguous(), probs.to(rows.dtype)", 1),
    ],
    "moe_permute_map": [
        ("number of rows dropped", "ms_ops.moe.npu:permute_map", "num_out_tokens=rows, ", "", 1),
        ("weights dropped", "ms_ops.moe.npu:permute_map", "probs=weights, ", "", 1),
        ("tokens and experts swapped", "ms_ops.moe.npu:permute_map_backward",
         "experts, tokens, False", "tokens, experts, False", 1),
    ],
    "moe_unpermute_map": [
        ("map not given", "ms_ops.moe.npu:unpermute_map",
         "routing_map=routing_map.contiguous()", "routing_map=None", 1),
        ("token of a row", "ms_ops.moe.npu:unpermute_map_backward",
         "(count // dout.shape[0])", "count", 1),
        ("index and tokens exchanged", "ms_ops.moe.npu:unpermute_map_backward",
         "sorted_indices.int(), token", "token, sorted_indices.int()", 1),
    ],
    "scaled_masked_softmax": [
        ("scale dropped", "ms_ops.softmax.npu:forward", "scale, False", "1.0, False", 1),
        ("rows all masked", "ms_ops.softmax.npu:forward",
         "y.masked_fill(out, 0.0)", "y", 1),
        ("gradient and result swapped", "ms_ops.softmax.npu:backward",
         "dy.contiguous(), y,", "y, dy.contiguous(),", 1),
    ],
    "ffn": [
        ("ends for numbers of tokens", "ms_ops.matmul.npu_ffn:ffn",
         "expert_tokens_index=", "expert_tokens=", 1),
        ("first bias twice", "ms_ops.matmul.npu_ffn:ffn", "bias2=second", "bias2=first", 1),
        ("bias not widened", "ms_ops.matmul.npu_ffn:_bias", "bias.float()", "bias", 1),
        ("precision of gated layers", "ms_ops.matmul.npu_ffn:ffn",
         "1 if activation", "0 if activation", 1),
    ],
    "fused_adamw_": [
        ("penalty twice", "ms_ops.optim.npu:adamw",
         "weight_decay, maximize = 0.0", "_, maximize = 0.0", 1),
        ("gradients turned twice", "ms_ops.optim.npu:adamw",
         "weight_decay, maximize = 0.0, False", "weight_decay = 0.0", 1),
        ("largest moments unused", "ms_ops.optim.npu:adamw",
         "amsgrad=bool(max_exp_avg_sqs)", "amsgrad=False", 1),
        ("bias always corrected", "ms_ops.optim.npu:adamw", "not bias_correction or ", "", 1),
        ("strides forgotten", "ms_ops.optim.npu:_serves", "t.is_contiguous() and ", "", 1),
    ],
    "fused_ema_adamw_": [
        ("decay of the other side", "ms_ops.optim.npu:ema_adamw", "1 - ema_decay", "ema_decay", 1),
    ],
    "attention_merge": [
        ("parts exchanged", "ms_ops.attention.merge.npu:forward",
         "outs[0], tops[0], ones, outs[1], tops[1]", "outs[0], tops[1], ones, outs[1], tops[0]", 1),
        ("layout by the packed one's name", "ms_ops.attention.merge.npu:forward",
         'input_layout="SBH"', 'layout="SBH"', 1),
        ("log of the sum dropped", "ms_ops.attention.merge.npu:forward",
         "+ total[..., 0].log()", "", 1),
        ("rows without keys", "ms_ops.attention.merge.npu:forward",
         ".masked_fill(blank, 0.0)", "", 1),
        ("heads and rows exchanged", "ms_ops.attention.merge.npu:_copies",
         "lse.transpose(0, 1).reshape", "lse.reshape", 1),
    ],
    "attention": [
        ("mask polarity", "ms_ops.attention.npu_mask:masking", "(~full)", "full", 1),
        ("bounds by v2's names", "ms_ops.attention.npu:_prepare", '"_v2" else', '"" else', 1),
        ("scale forgotten", "ms_ops.attention.npu:forward", "scale=ready.scale, ", "", 1),
        ("scale's name in backward", "ms_ops.attention.npu:backward", "scale_value", "scale", 1),
        ("key and value swapped", "ms_ops.attention.npu:backward",
         "ready.q, ready.k, ready.v", "ready.q, ready.v, ready.k", 1),
        ("heads of the keys", "ms_ops.attention.npu:_prepare", "heads = q.", "heads = k.", 1),
        ("log of the sum dropped", "ms_ops.attention.npu:forward",
         " + total[..., 0].log()", "", 1),
        ("other corner", "ms_ops.attention.npu_mask:_spec",
         '= "lower_right" if square', '= "lower_right" if 1', 1),
        ("bounds exchanged", "ms_ops.attention.npu:_prepare",
         "(how.pre, how.next)", "(how.next, how.pre)", 1),
        ("layout", "ms_ops.attention.npu:forward", "LAYOUTS[call.layout]", '"BNSD"', 1),
        ("statistics' order", "ms_ops.attention.npu:_prepare",
         'keywords["softmax_layout"] = "TND"', "pass", 1),
        ("lengths swapped", "ms_ops.attention.npu_mask:_packed",
         '"actual_seq_qlen": ends[0]', '"actual_seq_qlen": ends[1]', 1),
        ("bias scaled twice", "ms_ops.attention.npu:_position", "== call.scale", "!= 1e9", 1),
        ("rows without keys", "ms_ops.attention.npu:forward", "empty is not None", "False", 1),
    ],
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _emulated():
    with emulated_npu(Readings(empty_rows="uniform")):
        yield


# Attention has many samples: these tell its mutants.
ENOUGH = {
    "attention": ("sbhd_causal", "gqa_causal", "narrow_v_causal", "lower_right_12x5", "mask",
                  "window_rectangle", "bias_heads", "upper_left_6x12", "thd", "thd_cross"),
}  # fmt: skip


def small_samples(op, dtype):
    names = ENOUGH.get(op)
    for sample in testing.OPERATORS[op].samples(dtype, "cpu"):
        if names and sample.name not in names:
            continue
        small = sum(a.numel() for a in sample.args if isinstance(a, torch.Tensor)) < 5000
        if small and testing.declines(op, sample, "npu") is None:
            yield sample


# Optimizers have no 16-bit form; gated layers are fp16, biases change their dtype beside bf16.
DTYPES = {
    "ffn": (torch.float16, torch.bfloat16),
    "fused_adamw_": (torch.float32,),
    "fused_ema_adamw_": (torch.float32,),
}
WRONG = (AssertionError, IndexError, RuntimeError, TypeError, ValueError)


def check(op):
    for dtype in DTYPES.get(op, (torch.bfloat16,)):
        for sample in small_samples(op, dtype):
            testing.check_values(op, sample, "npu")
            testing.check_fake(op, sample, "npu")


@pytest.fixture(scope="module")
def right():
    """Run an operator's samples on the code as it stands, once."""

    @cache
    def run(op):
        check(op)
        return True

    return run


CASES = [(op, Mutation(*parts)) for op, rows in MUTANTS.items() for parts in rows]


@pytest.mark.parametrize(("op", "mutation"), CASES, ids=[f"{op}-{m.name}" for op, m in CASES])
def test_mutant_is_caught(op, mutation, right):
    assert right(op)
    with mutation.applied(), pytest.raises(WRONG):
        check(op)
