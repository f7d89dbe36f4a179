"""Models that the training command does not build: latent attention, zero-centred norms."""

from types import SimpleNamespace

import pytest
import torch

from mindspeed.features.ops import latent_attention
from support.ranks import run_ranks

EAGER = {"TORCHDYNAMO_DISABLE": "1"}
SHAPE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "attention_dropout": 0.0}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
    "multi_latent_attention": True,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rotary_scaling_factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.7}
NORMED = {"qk_layernorm": True, "layernorm_zero_centered_gamma": True}
CASES = {
    "mla": {**LATENT, "rope_type": "rope"},
    "mla_yarn": {**LATENT, **YARN, "qk_layernorm": True, "gated_linear_unit": True},
    "rms": {**NORMED, "normalization": "RMSNorm", "num_query_groups": 2},
    "layer": {**NORMED, "normalization": "LayerNorm", "num_query_groups": 2},
}


def plain_attention():
    """A core attention with written-out scores: Megatron's own takes no heads of two sizes."""

    class Plain(torch.nn.Module):
        def __init__(self, *args, softmax_scale=None, **options):
            super().__init__()
            self.scale = softmax_scale

        def forward(self, q, k, v, mask, **options):
            q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
            hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
            scores = (q @ k.transpose(-1, -2) * self.scale).masked_fill(hidden, -torch.inf)
            return (scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(-2)

    return Plain


def build(options, parallel, level):
    """A GPT whose weights depend on their names alone."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.transformer_config import (
        MLATransformerConfig,
        TransformerConfig,
    )

    from mindspeed.train.initial import initialize_by_name

    latent = "kv_lora_rank" in options
    kind = MLATransformerConfig if latent else TransformerConfig
    fixed = {"hidden_dropout": 0.0, "use_cpu_initialization": True, "init_method_std": 0.2}
    config = kind(**SHAPE, **fixed, **options, **parallel, bias_dropout_fusion=False)
    spec = get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
        multi_latent_attention=latent,
    )
    if latent and not level:
        # What level 1 repairs: it is taken for installed when it is not.
        multi_latent_attention.HAVE_TE = False
        spec.submodules.self_attention.submodules.core_attention = plain_attention()
    position = "none" if latent else "rope"
    model = GPTModel(config, spec, 64, 24, position_embedding_type=position)
    initialize_by_name([model], config, 7)
    return model


def step(model, tokens):
    """One step of gradient descent; the loss and, by name, gradients of undivided weights."""
    from megatron.core import parallel_state

    positions = torch.arange(tokens.shape[1] - 1).expand(tokens.shape[0], -1)
    loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
    model.zero_grad()
    loss.backward()
    grads = {}
    for name, weight in model.named_parameters():
        if getattr(weight, "sequence_parallel", False):
            group = parallel_state.get_tensor_model_parallel_group()
            torch.distributed.all_reduce(weight.grad, group=group)
        if not getattr(weight, "tensor_model_parallel", False):
            grads[name] = weight.grad.clone()
        weight.data.sub_(weight.grad, alpha=0.1)
    return loss.item(), grads


def train(rank, world_size, level):
    """Losses, gradients, and module classes of every case."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    import mindspeed
    from mindspeed import device

    device.install()
    mindspeed.activate({"swiglu": True, "normalization": "RMSNorm"}, level=level)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    model_parallel_cuda_manual_seed(3)
    tokens = torch.randint(0, 64, (2, 25), generator=torch.Generator().manual_seed(1))
    parallel = {"tensor_model_parallel_size": world_size, "sequence_parallel": world_size > 1}
    found = {}
    for name, options in CASES.items():
        model = build(options, parallel, level)
        results = [step(model, tokens) for _ in range(2)]
        found[name] = (results, {type(module).__name__ for module in model.modules()})
    return found


def trained(ranks, level):
    return run_ranks(train, ranks, level, preload="megatron", env=EAGER)


def check(found, wanted, names):
    for name in names:
        for (loss, grads), (want, want_grads) in zip(found[name][0], wanted[name][0], strict=True):
            assert loss == pytest.approx(want, rel=2e-6)
            norms = [key for key in grads if "norm" in key]
            assert len(norms) >= 5
            for key in norms:
                torch.testing.assert_close(grads[key], want_grads[key], rtol=2e-4, atol=2e-6)


@pytest.mark.megatron014
def test_level_1_trains_as_level_0():
    (alone,), (plain,) = trained(1, 1), trained(1, 0)
    check(alone, plain, CASES)
    assert len({results[1][0] for results, _ in alone.values()}) == len(CASES)
    for name, (_, classes) in alone.items():
        assert "FusedAttention" in classes - plain[name][1]
        assert "RMSNorm" in classes or name == "layer"
    for found, wanted in zip(trained(2, 1), trained(2, 0), strict=True):
        check(found, wanted, CASES)
        # Not the latent cases: Megatron's divided down-projections have other gradients.
        check(found, plain, ["rms", "layer"])


def test_only_an_engine_without_a_linear_layer_is_doubted():
    def module(present, linear):
        return SimpleNamespace(HAVE_TE=present, TELinear=linear)

    assert latent_attention.engine_has_no_linear(module(True, None))
    assert not latent_attention.engine_has_no_linear(module(False, None))
    assert not latent_attention.engine_has_no_linear(module(True, torch.nn.Linear))


def test_advice():
    assert "nothing changes" in latent_attention.advise(SimpleNamespace())
    given = SimpleNamespace(multi_latent_attention=True)
    assert "two sizes" in latent_attention.advise(given)
