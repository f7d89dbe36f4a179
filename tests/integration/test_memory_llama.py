"""Memory features on Hugging Face's Llama, as it comes."""

import random

import pytest
import torch

from ms_memory import Session, device, planner, recompute

# In the default environment; that of the oldest megatron-core collects this file and runs nothing.
transformers = pytest.importorskip("transformers")

TOKENS, WIDTH, HIDDEN, LAYERS = 14, 16, 40, 3


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def step(session):
    """Loss and gradients, and the bytes that the graph holds when the head has run."""
    model, held = session.model, []
    ledger = session.ledger
    handle = model.lm_head.register_forward_hook(lambda *_: held.append(ledger.live_bytes))
    tokens = torch.arange(TOKENS).view(2, 7)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    handle.remove()
    return [loss.detach(), *(p.grad for p in model.parameters())], held[0]


# In fp32: the gate's silu and the product; output, normalised input and reciprocal root of a norm.
FREED = {
    recompute.activation: LAYERS * 4 * TOKENS * 2 * HIDDEN,
    recompute.norms: 2 * LAYERS * 4 * TOKENS * (2 * WIDTH + 1),
}


def test_hf_llama_layer():
    """Bytes by formula, gradients bit for bit, one feature and both."""
    with Session(llama()) as session:
        expected, plain = step(session)
    for features in ([recompute.activation], [recompute.norms], list(FREED)):
        with Session(llama()) as session:
            for feature in features:
                feature(session)
            found, held = step(session)
        assert all(map(torch.equal, expected, found))
        assert plain - held == sum(FREED[f] for f in features)
    with Session(llama()) as session:
        recompute.modules(session, "model.layers.?")
        found, held = step(session)
    assert all(map(torch.equal, expected, found))
    assert held < plain / 3


def test_hf_llama_planned():
    """Plans that mix discarding, recomputing and swapping: the peak within 3%, gradients equal."""
    model, tokens = llama(), torch.arange(TOKENS).view(2, 7)

    def step():
        return model(input_ids=tokens, labels=tokens).loss

    def gradients():
        model.zero_grad()
        step().backward()
        return [p.grad.clone() for p in model.parameters()]

    want = gradients()
    with Session(model, device=device.sim()) as session:
        found = planner.profile(session, step, min_bytes=1, steps=1)
    names = {option.name for option in found.layers[1].options}
    assert {"norms + activation + swap attention", "recompute mlp", "recompute"} < names
    generator, problem = random.Random(2), found.problem()
    for _ in range(4):
        pins = {one.name: generator.choice(one.options).name for one in found.layers[1:-1]}
        made = planner.solve(problem, 10**9, pins=pins, explain=False)
        with Session(model, device=device.sim()) as session:
            planner.apply(session, made)
            seen = planner.verify(session, step, made)
            assert abs(seen.measured - seen.predicted) < 0.03 * seen.predicted
            assert all(map(torch.equal, gradients(), want))
