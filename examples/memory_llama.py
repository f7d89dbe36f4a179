"""A Llama of transformers that needs more memory than it may use, trained within it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ms_memory import StorageCensus, planner

BUDGET = 5 << 19  # bytes of weights, gradients and activations


def step():
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def train():
    """Most bytes alive in a step, and its gradients."""
    model.zero_grad()
    with StorageCensus([*model.parameters(), *model.buffers()]) as census:
        step().backward()
    return census.peak, [parameter.grad for parameter in model.parameters()]


if __name__ == "__main__":
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
    config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=172, **heads)
    model, tokens = LlamaForCausalLM(config), torch.randint(256, (2, 64))
    needed, expected = train()
    print(f"without a plan: {needed / 2**20:.2f} MiB, {BUDGET / 2**20:.2f} MiB are allowed")
    with planner.plan(model, step, BUDGET) as installed:
        print(installed)
        used, found = train()
    assert used <= BUDGET < needed, f"{used} of {BUDGET} bytes are used, {needed} without a plan"
    assert all(map(torch.equal, found, expected))
    print("within the budget, gradients are equal")
