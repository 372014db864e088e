"""The names that Hugging Face models give to the parts of a layer: module paths, as plain text.

`lm.ports` finds modules by these names; `interop.names` recognises them in other tools' files.
"""

PROJECTIONS = (
    "self_attn.o_proj",  # Llama and most others
    "attention.dense",  # GPT-NeoX
    "attn.c_proj",  # GPT-2
    "attention.output.dense",  # BERT
    "attention.out_lin",  # DistilBERT
    "attn.Wo",  # ModernBERT
    "self_attn.out_proj",  # OPT
    "self_attn.dense",  # Phi
    "self_attention.dense",  # Falcon and BLOOM
    "attn.attention.out_proj",  # GPT-Neo
    "attn.out_proj",  # GPT-J and MPT
)
"""The projection of attention's output onto the residual stream, within a layer."""

MLPS = (
    "mlp.dense_4h_to_h",  # BLOOM, whose `mlp` adds the residual stream itself
    "mlp",  # most others
    "output.dense",  # BERT
    "ffn.lin2",  # DistilBERT
    "ffn.down_proj",  # MPT
    "feed_forward",  # Llama 4, LFM2, and hybrids such as Jamba, Bamba and Falcon-H1
    "block_sparse_moe",  # Granite's mixtures of experts
    "ffn",  # DBRX
)
"""The module whose output the MLP adds to the residual stream, within a layer."""

MLP_INPUTS = (
    "mlp",  # most
    "ffn",  # DistilBERT and MPT
    "intermediate",  # BERT
    "feed_forward",  # Llama 4, LFM2, Jamba, Bamba, Falcon-H1
    "block_sparse_moe",  # Granite's mixtures of experts
)
"""The module whose input is the input of the MLP, after the norm, within a layer."""
