"""Attention by plain matrix products: at 64 tokens its backward is far cheaper on CPUs than the fused kernel's."""

from diffusers.models.attention_processor import Attention
from torch import Tensor


class PlainAttention:
    """A diffusers attention processor for self-attention without masks; computes what the fused one does."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("PlainAttention knows self-attention without a mask only")
        rows, tokens, width = hidden_states.shape

        def heads(x: Tensor) -> Tensor:
            return x.view(rows, tokens, attn.heads, -1).transpose(1, 2)  # (B, H, T, D/H)

        q = heads(attn.to_q(hidden_states)) * attn.scale
        k, v = heads(attn.to_k(hidden_states)), heads(attn.to_v(hidden_states))
        shares = (q @ k.transpose(2, 3)).softmax(-1)  # (B, H, T, T)
        y = (shares.to(v.dtype) @ v).transpose(1, 2).reshape(rows, tokens, width)
        return attn.to_out[0](y)  # (B, T, D)
