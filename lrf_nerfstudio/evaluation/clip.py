"""How well pictures fit a text, by CLIP (Radford et al., arXiv 2103.00020; the score of Hessel et al., 2104.08718)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from lrf_nerfstudio.utils.pretrained import first_line, quiet

BATCH = 8
"""Pictures that are embedded at a time."""


class ClipScore:
    """100 times the cosine of the embeddings of pictures and texts, never below 0.

    torchmetrics' class of this name does not run with transformers 5.
    """

    def __init__(self, source: str, device: torch.device | str = "cpu") -> None:
        """Load a model that is on this machine.

        Args:
            source: a folder with a CLIP model and its processor in transformers' format, weights as safetensors, or a
                Hugging Face id whose files are in the hub's cache.
            device: where it computes.

        Raises:
            OSError: if the model or transformers is not on this machine, or the model is damaged.
        """
        try:
            from transformers import CLIPModel, CLIPProcessor
        except ImportError as error:
            raise OSError("transformers is not installed: pip install 'lrf-nerfstudio[text]'") from error
        folder = Path(source).expanduser()
        try:
            if not folder.is_dir():
                from huggingface_hub import snapshot_download

                folder = Path(snapshot_download(source, local_files_only=True))
            with quiet():
                model = CLIPModel.from_pretrained(folder, use_safetensors=True, local_files_only=True)
                self._processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # missing and damaged files surface as many types, from several libraries
            raise OSError(f"CLIP model {source!r} is not on this machine, or damaged: {first_line(error)}") from error
        self._model = model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, pictures: Tensor, texts: Sequence[str]) -> Tensor:
        """Return the scores [N, T] of N pictures for T texts, on the CPU.

        Args:
            pictures: [N, H, W, 3], RGB in [0, 1].
            texts: cut where they are longer than the model takes.
        """
        device = self._model.device
        tokens = self._processor(text=list(texts), return_tensors="pt", padding=True, truncation=True).to(device)
        scores = []
        for part in (255 * pictures.clamp(0, 1)).round().byte().cpu().permute(0, 3, 1, 2).split(BATCH):
            pixels = self._processor(images=list(part), return_tensors="pt").to(device)
            output = self._model(**pixels, **tokens)
            scores.append(100 * output.image_embeds @ output.text_embeds.T)
        return torch.cat(scores).clamp_min(0).float().cpu()


class PromptSimilarity:
    """The CLIP score of pictures of a prompt where a model is on this machine; where it is not, that is said once."""

    def __init__(self, source: str, option: str) -> None:
        """Load nothing yet.

        Args:
            source: of :class:`ClipScore`.
            option: how a user names the source.
        """
        self._source, self._option = source, option
        self._score: ClipScore | None = None
        self._is_missing = False

    def __call__(self, pictures: Tensor, prompt: str) -> float | None:
        """Return the mean score of pictures [N, H, W, 3] in [0, 1], or None without a model."""
        if self._score is None and not self._is_missing:
            try:
                self._score = ClipScore(self._source, pictures.device)
            except OSError as error:
                self._is_missing = True
                Console().print(f"[yellow]The CLIP score is left out: {error}. {self._option} names another.")
        return None if self._score is None else float(self._score(pictures, [prompt]).mean())
