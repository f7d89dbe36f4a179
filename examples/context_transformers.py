"""A Llama of transformers on half of a sequence each: torchrun --nproc-per-node 2 FILE."""

from itertools import pairwise

import torch
import torch.distributed as dist
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from ms_parallel.context import AttnMask, CPTopology, SeqLayout, plan_attention
from ms_parallel.context import transformers_attention as attention

LENGTH = 96


def main():
    rank, size = dist.get_rank(), dist.get_world_size()
    AttentionInterface.register("context", attention(CPTopology()))
    torch.manual_seed(0)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=344, **heads)
    model, tokens = LlamaForCausalLM(config), torch.randint(256, (1, LENGTH))
    for documents in ((), (0, 30, 31, LENGTH)):  # one sequence, then three packed ones
        mask = AttnMask.causal(documents)
        layout = SeqLayout.zigzag(LENGTH, size)
        plan = plan_attention(layout, mask, heads=(8, 2), head_dims=(16, 16))
        model.set_attn_implementation("context")
        mine, at = layout.shard(tokens, rank, 1), layout.position_ids(rank, documents)[None]
        got = model(mine, position_ids=at, context_plan=plan, use_cache=False).logits
        model.set_attn_implementation("sdpa")
        parts = [tokens[:, a:b] for a, b in pairwise(documents or (0, LENGTH))]
        whole = torch.cat([model(part, use_cache=False).logits for part in parts], 1)
        torch.testing.assert_close(got, layout.shard(whole, rank, 1))
    print(f"rank {rank}: logits are equal")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
