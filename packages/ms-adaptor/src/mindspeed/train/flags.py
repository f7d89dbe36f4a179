"""The table of command-line flags: group, Megatron's flag name, leaf of the configuration, help.

A flag's type follows from the leaf's annotation; `--disable-` and `--no-` flags switch a leaf off.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass

from mindspeed.train.config import TrainConfig


@dataclass(frozen=True)
class Row:
    """One flag.

    Attributes:
        flag: the spelling on the command line.
        leaf: the name in `TrainConfig`.
        help: one phrase.
        choices: allowed values; empty means any.
        off: a switch that turns the leaf off instead of on.
    """

    flag: str
    leaf: str
    help: str
    choices: tuple[str, ...] = ()
    off: bool = False


def _row(leaf: str, text: str, *choices: str, flag: str | None = None, off: bool = False) -> Row:
    return Row(flag or "--" + leaf.replace("_", "-"), leaf, text, choices, off)


GROUPS: dict[str, tuple[Row, ...]] = {
    "model": (
        _row("num_layers", "transformer layers"),
        _row("hidden_size", "width of the residual stream"),
        _row("ffn_hidden_size", "width of the feed-forward block (4h, or 8h/3 with --swiglu)"),
        _row("num_attention_heads", "query heads"),
        _row("num_query_groups", "key and value heads; with --group-query-attention"),
        _row("kv_channels", "size of a head (hidden size / heads)"),
        _row("seq_length", "tokens of a sequence"),
        _row("make_vocab_size_divisible_by", "pad the vocabulary to a multiple of this"),
        _row("normalization", "kind of norm", "LayerNorm", "RMSNorm"),
        _row("layernorm_epsilon", "epsilon of the norms", flag="--norm-epsilon"),
        _row("qk_layernorm", "norm queries and keys"),
        _row("swiglu", "gated feed-forward block"),
        _row("add_bias_linear", "biases in linear layers"),
        _row("add_bias_linear", "no bias in linear layers", flag="--disable-bias-linear", off=True),
        _row("position_embedding_type", "how positions enter", "rope", "learned_absolute", "none"),
        _row("rotary_base", "base of the rotary frequencies"),
        _row("rotary_percent", "share of a head that is rotated"),
        _row("untie_embeddings_and_output_weights", "separate output weights"),
        _row("attention_dropout", "dropout of attention probabilities"),
        _row("hidden_dropout", "dropout before each residual addition"),
        _row("init_method_std", "standard deviation of initial weights"),
    ),
    "mixture of experts": (
        _row("num_experts", "experts in a layer; dense without it"),
        _row("moe_ffn_hidden_size", "width of an expert (that of --ffn-hidden-size)"),
        _row("moe_layer_freq", "every n-th layer has experts"),
        _row("moe_router_topk", "experts a token goes to"),
        _row(
            "moe_router_load_balancing_type",
            "how the router balances",
            "aux_loss",
            "seq_aux_loss",
            "sinkhorn",
            "none",
        ),
        _row("moe_aux_loss_coeff", "weight of the balancing loss"),
        _row("moe_z_loss_coeff", "weight of the z loss"),
        _row("moe_token_dispatcher_type", "how tokens travel", "allgather", "alltoall"),
        _row("moe_grouped_gemm", "all experts of a rank in one matrix product"),
        _row("moe_shared_expert_intermediate_size", "width of an expert that sees every token"),
    ),
    "parallelism": (
        _row("tensor_model_parallel_size", "ranks that divide each layer"),
        _row("sequence_parallel", "divide norms and dropout along the sequence too"),
        _row("pipeline_model_parallel_size", "ranks that divide the layers"),
        _row(
            "virtual_pipeline_model_parallel_size",
            "interleaved chunks of each pipeline rank",
            flag="--num-virtual-stages-per-pipeline-rank",
        ),
        _row("context_parallel_size", "ranks that divide the sequence"),
        _row("expert_model_parallel_size", "ranks that divide the experts"),
        _row("expert_tensor_parallel_size", "ranks that divide each expert"),
        _row(
            "overlap_p2p_communication",
            "batched exchange between virtual stages",
            flag="--no-overlap-p2p-communication",
            off=True,
        ),
    ),
    "recomputation": (
        _row("recompute_granularity", "what is recomputed", "full", "selective"),
        _row("recompute_method", "which layers, with full", "uniform", "block"),
        _row("recompute_num_layers", "layers of a recomputed group or of the block"),
        _row("recompute_modules", "which parts, with selective"),
        _row("distribute_saved_activations", "divide kept inputs among tensor-parallel ranks"),
    ),
    "precision": (
        _row("bf16", "bfloat16 weights and activations, fp32 master weights"),
        _row("fp16", "float16 with loss scaling, fp32 master weights"),
        _row("loss_scale", "a fixed loss scale for --fp16"),
        _row("initial_loss_scale", "where the dynamic loss scale starts"),
        _row("min_loss_scale", "below which it does not fall"),
        _row("loss_scale_window", "steps without overflow before it doubles"),
        _row("hysteresis", "overflows before it halves"),
        _row("accumulate_allreduce_grads_in_fp32", "gradients in fp32; on with --bf16"),
    ),
    "optimizer": (
        _row("optimizer", "which", "adam", "sgd"),
        _row("lr", "highest learning rate"),
        _row("min_lr", "lowest learning rate"),
        _row(
            "lr_decay_style",
            "shape of the decay",
            "constant",
            "linear",
            "cosine",
            "inverse-square-root",
        ),
        _row("lr_decay_iters", "steps of the decay (--train-iters)"),
        _row("lr_warmup_iters", "steps of linear warm-up"),
        _row("weight_decay", "decoupled weight decay"),
        _row("adam_beta1", "decay of the first moment"),
        _row("adam_beta2", "decay of the second moment"),
        _row("adam_eps", "epsilon of the update"),
        _row("sgd_momentum", "momentum of sgd"),
        _row("clip_grad", "largest gradient norm; 0 for none"),
        _row("use_distributed_optimizer", "divide optimizer states among data-parallel ranks"),
        _row("overlap_grad_reduce", "reduce gradients during backward"),
        _row("overlap_param_gather", "gather parameters during forward"),
        _row(
            "align_grad_reduce",
            "pipeline stages reduce independently",
            flag="--no-align-grad-reduce",
            off=True,
        ),
        _row(
            "align_param_gather",
            "pipeline stages gather independently",
            flag="--no-align-param-gather",
            off=True,
        ),
        _row("ddp_bucket_size", "parameters in a bucket of reduced gradients"),
        _row("ddp_average_in_collective", "average inside the collective"),
    ),
    "fusions of Megatron": (
        _row("bias_activation_fusion", "compile bias and activation together"),
        _row("bias_dropout_fusion", "compile bias, dropout and addition together"),
        _row("cross_entropy_loss_fusion", "compile the cross entropy"),
        _row("apply_rope_fusion", "fused rotary positions (level 1 fills this slot)"),
        _row("gradient_accumulation_fusion", "add weight gradients in place (level 1 can)"),
        _row("moe_permute_fusion", "fused token permutation (level 1 can)"),
    ),
    "data": (
        _row("data", "text files, or .jsonl with an entry text a line (built-in English text)"),
        _row("tokenizer", "a tokenizer.json of the tokenizers library (bytes)"),
        _row("split", "weights of training and held-out text"),
        _row("micro_batch_size", "sequences of one forward pass"),
        _row("global_batch_size", "sequences of one optimizer step"),
        _row("eval_iters", "global batches of a validation"),
        _row("eval_interval", "validate every n steps as well as at the end"),
    ),
    "training": (
        _row("train_iters", "optimizer steps"),
        _row("log_interval", "steps between lines of the meters that flags switch on"),
        _row("seed", "of weights, data order and dropout"),
        _row("distributed_timeout", "seconds a rank waits for another", flag="--timeout"),
    ),
}


def leaf_types() -> dict[str, str]:
    """Leaf name to its annotation, as text."""
    out: dict[str, str] = {}
    default = TrainConfig()
    for top in fields(TrainConfig):
        value = getattr(default, top.name)
        leaves = fields(value) if is_dataclass(value) else (top,)
        out.update({leaf.name: str(leaf.type) for leaf in leaves})
    return out
