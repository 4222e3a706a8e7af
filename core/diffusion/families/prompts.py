"""Prompts as embeddings: from files that lie beside the base, else by its text encoder."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from core.diffusion.catalog import weight_files
from core.errors import Invalid


class Prompts:
    """The embeddings of a base's prompts, each (n, D) with n its tokens; `tokens` is the most that a prompt may have.

    `prompts/*.safetensors` hold tensors (n, D) under their prompts, the null prompt under the empty one; a folder that
    has all that its jobs ask for needs no text encoder. What the files lack, `text_encoder/` (T5) and `tokenizer/`
    encode, which are loaded when first needed.
    """

    def __init__(self, folder: Path, tokens: int, device: torch.device) -> None:
        self._folder = folder
        self._tokens = tokens
        self._device = device
        self._files: dict[str, tuple[Path, str]] = {}
        self._encoder: tuple[Any, Any] | None = None
        for path in sorted((folder / "prompts").glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self._files |= {normal(name): (path, name) for name in file.keys()}

    def __call__(self, text: str) -> Tensor:
        """(n, D) float32 on the CPU. Raises Invalid for a prompt that is in no file where there is no text encoder."""
        known = self._files.get(normal(text))
        if known is not None:
            with safe_open(known[0], "pt") as file:
                return file.get_tensor(known[1]).float()[: self._tokens]
        if not (self._folder / "text_encoder").is_dir():
            raise Invalid(f"the base has no text encoder, and its files no prompt {text!r}", code="unknown_prompt")
        return self._encode(normal(text))

    @torch.no_grad()
    def _encode(self, text: str) -> Tensor:
        """As diffusers' PixArt pipelines encode it, the padding cut off."""
        if self._encoder is None:
            self._encoder = _load(self._folder, self._device)
        tokenizer, encoder = self._encoder
        asked = {"padding": "max_length", "max_length": self._tokens, "truncation": True, "return_tensors": "pt"}
        found = tokenizer(text, **asked)
        ids, mask = found.input_ids.to(self._device), found.attention_mask.to(self._device)
        return encoder(ids, attention_mask=mask)[0][0, : int(mask.sum())].float().cpu()


def normal(text: str) -> str:
    """What PixArt does to a caption before it is encoded."""
    return text.lower().strip()


def _load(folder: Path, device: torch.device) -> tuple[Any, Any]:
    try:
        from transformers import AutoTokenizer, T5EncoderModel  # noqa: PLC0415 - text bases alone need it
    except ImportError as error:
        raise Invalid("prompts of this base are encoded by the transformers package, which is not installed") from error
    weight_files(folder / "text_encoder")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True, trust_remote_code=False)
    encoder: Any = T5EncoderModel.from_pretrained(folder / "text_encoder", local_files_only=True, use_safetensors=True)
    return tokenizer, encoder.to(device).eval().requires_grad_(False)
