"""Memory features on Hugging Face's Llama, as it comes."""

import pytest
import torch

from ms_memory import Session, recompute

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
