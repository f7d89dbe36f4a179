"""A Llama of Hugging Face transformers with our norm, MLP, rotary embedding and attention."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from ms_ops import attention, rms_norm, rope, swiglu


class Norm(LlamaRMSNorm):
    def forward(self, x):
        return rms_norm(x, self.weight, self.variance_epsilon)


class Mlp(LlamaMLP):
    def forward(self, x):
        return self.down_proj(swiglu(torch.cat((self.gate_proj(x), self.up_proj(x)), -1)))


class Attention(LlamaAttention):
    def forward(self, hidden_states, position_embeddings, **_):
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(hidden_states).unflatten(-1, (-1, self.head_dim)) for p in projections)
        cos, sin = (t.unsqueeze(2) for t in position_embeddings)
        out = attention(rope(q, cos, sin), rope(k, cos, sin), v, causal=True, scale=self.scaling)
        return self.o_proj(out.flatten(2)), None


if __name__ == "__main__":
    torch.manual_seed(0)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=344, **heads)
    model, tokens = LlamaForCausalLM(config), torch.randint(256, (2, 64))
    expected = model(tokens, use_cache=False).logits
    ours = {LlamaRMSNorm: Norm, LlamaMLP: Mlp, LlamaAttention: Attention}
    for module in model.modules():
        module.__class__ = ours.get(type(module), type(module))
    torch.testing.assert_close(model(tokens, use_cache=False).logits, expected)
    print("logits are equal")
