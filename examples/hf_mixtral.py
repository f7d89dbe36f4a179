"""A Mixtral of Hugging Face transformers whose experts run as grouped products of ms_ops."""

import torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from ms_ops import grouped_matmul, moe_permute, moe_unpermute, swiglu


class Experts(MixtralExperts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        rows, order = moe_permute(hidden_states, top_k_index)
        sizes = torch.bincount(top_k_index.flatten(), minlength=self.num_experts)
        by_expert = {"group_sizes": sizes, "transpose_weight": True}
        inner = swiglu(grouped_matmul(rows, self.gate_up_proj, **by_expert))
        rows = grouped_matmul(inner, self.down_proj, **by_expert)
        return moe_unpermute(rows, order, top_k_weights)


if __name__ == "__main__":
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_local_experts": 4}
    config = MixtralConfig(vocab_size=256, **sizes, **heads)
    model, tokens = MixtralForCausalLM(config), torch.randint(256, (2, 64))
    expected = model(tokens, use_cache=False).logits
    for module in model.modules():
        if type(module) is MixtralExperts:
            module.__class__ = Experts
    torch.testing.assert_close(model(tokens, use_cache=False).logits, expected)
    print("logits are equal")
