"""Recomputed activations and norms in Megatron's own modules: bytes and gradients."""

import contextlib
import io

import pytest

from mindspeed.train.config import TrainConfig
from support.mutation import Mutation
from support.ranks import run_ranks

pytestmark = pytest.mark.megatron014

FLAGS = {"recompute_norm": True, "recompute_activation_function": True}
S, B, H, F, LAYERS, W = 16, 2, 32, 48, 2, 4
SMALL = {
    "num_layers": LAYERS,
    "hidden_size": H,
    "ffn_hidden_size": F,
    "num_attention_heads": 4,
    "seq_length": S,
    "micro_batch_size": B,
    "global_batch_size": 8,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
    "optimization_level": 2,
}
GATED = {"swiglu": True, "normalization": "RMSNorm", "add_bias_linear": False}
MOE = {
    **GATED,
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "moe_aux_loss_coeff": 0.1,
}
ROWS = W * S * B * LAYERS
EXPERTS = 2 * 24 + 40
GROUPED = {**MOE, "moe_grouped_gemm": True, "bf16": True}
# Name -> (options, bytes of the activation outputs, of the norms' outputs and statistics).
KINDS = {
    "gelu": ({}, ROWS * F, 2 * ROWS * (H + 2)),
    "fused gelu": ({"bias_activation_fusion": True}, ROWS * F, 2 * ROWS * (H + 2)),
    "swiglu": (GATED, ROWS * F, 2 * ROWS * (H + 1)),
    "experts": (MOE, ROWS * EXPERTS, 2 * ROWS * (H + 1)),
    # In bf16, but the statistics.
    "grouped experts": (GROUPED, ROWS // 2 * EXPERTS, 2 * ROWS * (H // 2 + 1)),
}


def config(options):
    leaves = TrainConfig().flat()
    native = {name: value for name, value in options.items() if name in leaves}
    flags = tuple(sorted((k, v) for k, v in options.items() if k not in leaves))
    return TrainConfig.of(**{**SMALL, **native}, feature_flags=flags)


def step(model, ledger):
    """Return the bytes between forward and backward, and every gradient."""
    import torch
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model.zero_grad()
    model_parallel_cuda_manual_seed(3)
    torch.manual_seed(2)
    tokens = torch.randint(0, 60, (B, S + 1))
    places = torch.arange(S).expand(B, -1)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    loss = model(inputs, places, None, labels=labels).sum()
    kept = ledger.live_bytes
    loss.backward()
    after = torch.get_rng_state()
    assert ledger.live_bytes == 0
    return kept, [loss.detach(), after, *(p.grad for p in model.parameters())]


def same(left, right):
    import torch

    def equal(a, b):
        return a is b if a is None or b is None else torch.equal(a, b)

    return all(map(equal, left, right))


def compared(model, plain, settings):
    """Return how many bytes some settings save; gradients and random states must be equal."""
    from mindspeed.features.memory.session import open_session

    with open_session(model, settings) as session:
        kept, found = step(model, session.ledger)
    assert same(plain[1], found), settings
    return plain[0] - kept


def plain_step(model):
    from ms_memory import Session

    with Session(model) as session:
        return step(model, session.ledger)


NEVER_RELEASED = Mutation(
    "the activation is never emptied",
    "mindspeed.features.memory.recompute.layers:_discarding",
    "discard.release(until=out)",
    "pass",
)
NO_BIAS = Mutation(
    "the activation is computed without its bias",
    "mindspeed.features.memory.recompute.layers:_activation",
    "_Between(mlp, x, bias)",
    "_Between(mlp, x, None)",
)


def kinds(rank, world_size):
    """Return saved bytes by kind of model: activations, norms, both."""
    import torch
    from megatron.core import parallel_state

    import mindspeed
    from mindspeed.features.memory.session import close_sessions, open_sessions
    from mindspeed.features.memory.settings import MemorySettings
    from mindspeed.train.model import build_chunks

    parallel_state.initialize_model_parallel()
    wanted = (MemorySettings(True), MemorySettings(norm=True), MemorySettings(True, None, True))
    found = {}
    for name, (options, _, _) in KINDS.items():
        made = config({**options, **FLAGS})
        with mindspeed.activate(made.plan_values(), level=2):
            from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

            model_parallel_cuda_manual_seed(1)
            (model,) = build_chunks(made)
            (opened,) = open_sessions()
            features = [action.feature for action in opened.report().actions]
            assert features.count("recompute.norms") == 2 * LAYERS
            close_sessions()
            plain = plain_step(model)
            found[name] = [compared(model, plain, each) for each in wanted]
            if name == "gelu":
                with NO_BIAS.applied(), pytest.raises(AssertionError):
                    compared(model, plain, wanted[0])
                model.decoder.layers[0].mlp.linear_fc1.requires_grad_(False)
                model.decoder.layers[1].requires_grad_(False)
                assert compared(model, plain_step(model), wanted[2]) > 0
            if name == "swiglu":
                with NEVER_RELEASED.applied():
                    assert compared(model, plain, wanted[0]) == 0
                model.config.bias_activation_fusion = False
                adds = hasattr(model.config, "glu_linear_offset")
                found["eager"] = compared(model, plain_step(model), wanted[0]), adds
                assert torch.equal(*in_eval(model))
    return found


def in_eval(model):
    """Return outputs without gradients, in a session and without."""
    import torch

    from mindspeed.features.memory.session import open_session
    from mindspeed.features.memory.settings import MemorySettings

    model.eval()
    tokens, places = torch.arange(B * S).view(B, S), torch.arange(S).expand(B, -1)
    with torch.no_grad():
        plain = model(tokens, places, None)
        with open_session(model, MemorySettings(True, None, True)):
            return plain, model(tokens, places, None)


def test_bytes_and_gradients_of_every_kind():
    (found,) = run_ranks(kinds, 1, preload="megatron")
    for name, (_, activations, norms) in KINDS.items():
        assert found[name] == [activations, norms, activations + norms], name
    # silu(gate) and the product; later Megatrons add an offset to the other half, a tensor too.
    saved, adds = found["eager"]
    assert saved == (3 if adds else 2) * ROWS * F


def latent(rank, world_size):
    """Return what multi-latent attention, experts with a bias and a region with a fork save."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import (
        get_cuda_rng_tracker,
        model_parallel_cuda_manual_seed,
    )

    import mindspeed
    from mindspeed.features.memory.session import open_session, open_sessions
    from mindspeed.features.memory.settings import MemorySettings
    from ms_memory import Discard

    handle = mindspeed.activate({**FLAGS, "memory_fragmentation": True}, level=2)
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    config = MLATransformerConfig(
        num_layers=2, hidden_size=H, num_attention_heads=4, multi_latent_attention=True,
        q_lora_rank=16, kv_lora_rank=12, qk_head_dim=8, qk_pos_emb_head_dim=4, v_head_dim=6,
        ffn_hidden_size=F, use_cpu_initialization=True, bias_dropout_fusion=False,
    )  # fmt: skip
    config.memory_settings = MemorySettings(True, 1, True, 1)
    spec = get_gpt_layer_local_spec(multi_latent_attention=True)
    model = GPTModel(config, spec, 64, S, position_embedding_type="none")
    (session,) = open_sessions()
    assert [a.module for a in session.report().actions] == [
        "decoder.layers.0.mlp",
        "decoder.layers.0.input_layernorm",
        "decoder.layers.0.pre_mlp_layernorm",
    ]
    kept, found = step(model, session.ledger)
    session.close()
    plain = plain_step(model)
    assert same(plain[1], found)
    saved = plain[0] - kept
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        for _ in range(2):
            torch.optim.SGD(model.parameters()).step()
    assert said.getvalue().count("deprecated and sets nothing: the processor's memory") == 1
    session = open_session(model, config.memory_settings)
    sources = session.sources

    def gradient(discard):
        def noisy(x):
            with get_cuda_rng_tracker().fork():
                return torch.nn.functional.dropout(x, 0.5)

        x = torch.ones(64, requires_grad=True)
        y = noisy(x) if discard is None else discard(noisy, x)
        out = y.square()
        if discard is not None:
            discard.release(until=out)
        torch.rand(3)
        out.sum().backward()
        return x.grad, get_cuda_rng_tracker().get_states()["model-parallel-rng"]

    model_parallel_cuda_manual_seed(4)
    plain = gradient(None)
    model_parallel_cuda_manual_seed(4)
    assert all(map(torch.equal, plain, gradient(Discard(sources=sources))))
    model_parallel_cuda_manual_seed(4)
    assert not torch.equal(plain[0], gradient(Discard(sources=sources[:1]))[0])
    assert refused(model) == ["E-M22", "E-M05", "E-M22"]
    forwards = [m for m in model.modules() if "forward" in vars(m)]
    handle.undo()
    assert forwards
    assert not open_sessions()
    assert not [m for m in model.modules() if "forward" in vars(m)]
    assert not any("_ms_memory" in key for m in model.modules() for key in vars(m))
    return saved


def refused(model):
    """Return the codes for layers without norms, and for MLPs that cannot be looked into."""
    import torch
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    from mindspeed.features.memory.session import open_session, session_of
    from mindspeed.features.memory.settings import MemorySettings
    from ms_memory import MemoryFeatureError

    session_of(model).close()
    experts = TEGroupedMLP.__new__(TEGroupedMLP)
    torch.nn.Module.__init__(experts)
    layers, codes = model.decoder.layers, []
    layers[0].input_layernorm = IdentityOp()
    with open_session(model, MemorySettings(norm=True)) as session:
        assert len(session.report().actions) == 3  # the identity is left alone
    layers[0].pre_mlp_layernorm = IdentityOp()
    for mlp, settings in (
        (layers[0].mlp, MemorySettings(norm=True, norm_layers=1)),
        (experts, MemorySettings(activation=True)),
        (torch.nn.Linear(1, 1), MemorySettings(activation=True)),
    ):
        layers[0].mlp = mlp
        with pytest.raises(MemoryFeatureError) as error:
            open_session(model, settings)
        codes.append(error.value.code)
        assert session_of(model) is None
    open_session(model, MemorySettings(norm=True))
    return codes


def test_latent_attention_streams_and_undo():
    (saved,) = run_ranks(latent, 1, preload="megatron")
    assert saved == W * S * B * (F + 2 * (H + 1))


def uniform_groups(rank, world_size):
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlock

    import mindspeed

    parallel_state.initialize_model_parallel()
    options = {"use_cpu_initialization": True, "bias_dropout_fusion": False}
    config = TransformerConfig(num_layers=3, hidden_size=8, num_attention_heads=1, **options)
    model_parallel_cuda_manual_seed(1)
    block = TransformerBlock(config, get_gpt_layer_local_spec())

    def gradients():
        block.zero_grad()
        model_parallel_cuda_manual_seed(1)
        torch.manual_seed(2)
        block(torch.randn(4, 1, 8, requires_grad=True), None).square().sum().backward()
        return [p.grad.clone() for p in block.parameters()]

    method = {"recompute_granularity": "full", "recompute_method": "uniform"}
    numbered = {**method, "recompute_num_layers": 2}
    vars(config).update(numbered)
    with pytest.raises(IndexError):
        gradients()
    with mindspeed.activate(numbered, level=2):
        found = gradients()
        vars(config).update(dict.fromkeys(numbered))
        with pytest.raises(IndexError):
            block._get_layer(3)
        return same(gradients(), found)


def test_uniform_groups_that_do_not_divide_the_layers():
    assert run_ranks(uniform_groups, 1, preload="megatron") == [True]
