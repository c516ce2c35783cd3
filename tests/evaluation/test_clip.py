"""The CLIP score, with a tiny model of random weights."""

from pathlib import Path

import pytest
import torch

from lrf_nerfstudio.evaluation.clip import ClipScore, PromptSimilarity
from lrf_nerfstudio.guidance.toy_diffusion import write_tokenizer


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A CLIP model in transformers' format."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    write_tokenizer(folder, ["a red cube", "a blue ball"])
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**layers, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 24}
    vision = {**layers, "image_size": 32, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(image_processor=CLIPImageProcessor(**size), tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_every_picture_is_compared_with_every_text(clip):
    pictures = torch.rand(10, 40, 48, 3, generator=torch.Generator().manual_seed(1))
    score = ClipScore(str(clip))
    together = score(pictures, ["a red cube", "a blue ball " * 30])
    assert together.shape == (10, 2)
    assert (together >= 0).all() and (together <= 100).all()
    assert torch.allclose(score(pictures[3:4], ["a red cube"])[0, 0], together[3, 0], atol=1e-3)
    similarity = PromptSimilarity(str(clip), "--clip")
    assert similarity(pictures, "a red cube") == pytest.approx(float(together[:, 0].mean()), abs=1e-3)


def test_a_model_that_is_not_there_is_named_once(tmp_path, capsys):
    with pytest.raises(OSError, match="nobody/nothing"):
        ClipScore("nobody/nothing")
    similarity = PromptSimilarity(str(tmp_path), "--pipeline.model.clip")
    for _ in range(2):
        assert similarity(torch.zeros(1, 8, 8, 3), "a red cube") is None
    assert capsys.readouterr().out.count("--pipeline.model.clip") == 1
