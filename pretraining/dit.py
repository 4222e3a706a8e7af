"""The base's transformer: diffusers' DiT with what its class lacks, adaLN-zero init and one embedder for all blocks.

diffusers holds a copy of the timestep and class embedders in every block (`transformer_blocks[i].norm1.emb`). In
training all blocks share one; `untied_state` writes it out as equal copies, which the service relies on.
"""

from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor, nn

from pretraining.attention import PlainAttention
from pretraining.classes import NULL_CLASS

CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,  # no learned sigma
    "patch_size": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "num_layers": 8,
    "num_embeds_ada_norm": NULL_CLASS,  # the table has one row more: the null class
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
}


def make_scheduler() -> DDIMScheduler:
    """Cosine schedule (arXiv 2102.09672), v-prediction (arXiv 2202.00512), ending in pure noise."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def make_dit(config: dict[str, Any] = CONFIG) -> DiTTransformer2DModel:
    """A tied DiT with the paper's initialisation (arXiv 2212.09748, section 3.2): it starts out as zero."""
    dit = DiTTransformer2DModel(**config)
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    projection = dit.pos_embed.proj
    nn.init.xavier_uniform_(projection.weight.data.flatten(1))
    nn.init.zeros_(projection.bias)
    embedder = dit.transformer_blocks[0].norm1.emb
    for weight in (
        embedder.class_embedder.embedding_table.weight,
        embedder.timestep_embedder.linear_1.weight,
        embedder.timestep_embedder.linear_2.weight,
    ):
        nn.init.normal_(weight, std=0.02)
    gates = [block.norm1.linear for block in dit.transformer_blocks]
    for layer in (*gates, dit.proj_out_1, dit.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return tie(dit)


def tie(dit: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Let every block use block 0's embedder, which no longer drops labels (the trainer does), and cheap attention."""
    embedder = dit.transformer_blocks[0].norm1.emb
    embedder.class_embedder.dropout_prob = 0.0
    for block in dit.transformer_blocks:
        block.norm1.emb = embedder
        block.attn1.set_processor(PlainAttention())
    return dit


def untied_state(dit: DiTTransformer2DModel) -> dict[str, Tensor]:
    """A state dict with its own float16 tensor under every name, embedder copies bit-equal, as diffusers saves it."""
    return {name: value.detach().to(torch.float16).contiguous().clone() for name, value in dit.state_dict().items()}


def untied(dit: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """A plain diffusers model in float16, ready for `save_pretrained`."""
    plain = DiTTransformer2DModel.from_config(dit.config).half()
    plain.load_state_dict(untied_state(dit))
    return plain.eval()


def drop_labels(labels: Tensor, share: float = 0.1) -> Tensor:
    """(B,) labels with about `share` of them replaced by the null class, for classifier-free guidance."""
    return torch.where(torch.rand(labels.shape) < share, NULL_CLASS, labels)
