"""Prompts by view, and their embeddings on disk."""

import warnings

import pytest
import torch
from oracle import embed_names
from tiny_diffusion import make_diffusion

from lrf_nerfstudio.guidance import DiffusionConfig, DiffusionModel, PromptConfig, TextEmbedder, ViewPrompts, view_of
from lrf_nerfstudio.utils.errors import UserError


@pytest.mark.parametrize(
    ("azimuth", "elevation", "view"),
    [
        (0, 0, "front"),
        (44, 0, "front"),
        (-44, 30, "front"),
        (316, 0, "front"),
        (46, 0, "side"),
        (-90, -20, "side"),
        (134, 0, "side"),
        (136, 0, "back"),
        (180, 0, "back"),
        (-136, 0, "back"),
        (540, 0, "back"),
        (0, 61, "overhead"),
        (170, 80, "overhead"),
        (0, 59, "front"),
    ],
)
def test_views_by_angle(azimuth, elevation, view):
    assert view_of(azimuth, elevation, PromptConfig()) == view


def test_thresholds_are_options():
    config = PromptConfig(front_angle=30, back_angle=60, overhead_angle=40)
    assert [view_of(*angles, config) for angles in ((35, 0), (125, 0), (0, 45))] == ["side", "back", "overhead"]


class Recorded:
    """Embeds by position, and remembers what it was asked for."""

    def __init__(self):
        self.texts = []

    def __call__(self, texts):
        self.texts.append(list(texts))
        return torch.arange(len(texts) * 6.0).view(len(texts), 3, 2)


def test_every_text_is_embedded_once():
    embed = Recorded()
    prompts = ViewPrompts(PromptConfig(prompt=" a corgi ", negative_prompt="blurry"), embed)
    conditions = prompts.conditions([0.0, 100.0, 180.0, 0.0], [0.0, 0.0, 0.0, 70.0])
    assert embed.texts == [[*(f"a corgi, {view} view" for view in ("front", "side", "back", "overhead")), "blurry", ""]]
    everything = torch.arange(36.0).view(6, 3, 2)
    assert torch.equal(conditions.prompt, everything[:4])
    assert torch.equal(conditions.negative, everything[4].expand(4, 3, 2))
    assert torch.equal(conditions.empty, everything[5].expand(4, 3, 2))
    assert conditions.repelling == ()


def test_without_views_there_is_one_prompt():
    embed = Recorded()
    prompts = ViewPrompts(PromptConfig(prompt="a corgi", view_dependent=False, perp_neg=True), embed)
    conditions = prompts.conditions([0.0, 180.0], [0.0, 0.0])
    assert embed.texts == [["a corgi", "", ""]]
    assert torch.equal(conditions.prompt[0], conditions.prompt[1])
    assert conditions.repelling == ()


@pytest.mark.parametrize("prompt", ["", "  "])
def test_no_prompt_is_said(prompt):
    with pytest.raises(UserError, match="--prompt"):
        ViewPrompts(PromptConfig(prompt=prompt), Recorded())


def weights_of(conditions, index):
    """Names of the repelled views of a camera and their weights."""
    names = ["front", "side", "back", "overhead"]
    return {
        names[int(embedding[index, 0].argmax())]: float(weight[index]) for embedding, weight in conditions.repelling
    }


def test_perp_neg_interpolates_between_views():
    names = ["front", "side", "back", "overhead"]
    prompts = ViewPrompts(PromptConfig(prompt="a corgi", perp_neg=True), embed_names(names))
    conditions = prompts.conditions([0.0, 30.0, -90.0, 135.0, 180.0, 0.0], [0.0] * 5 + [75.0])
    expected = [[1, 0, 0, 0], [2 / 3, 1 / 3, 0, 0], [0, 1, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    torch.testing.assert_close(conditions.prompt[:, 0], torch.tensor(expected))
    assert all(weight.shape == (6, 1, 1, 1) and (weight <= 0).all() for _, weight in conditions.repelling)

    # Whoever looks at the front must see no side, and the other way round; in between a little of both is kept away.
    front, between, side, _, back, overhead = (weights_of(conditions, index) for index in range(6))
    assert front == pytest.approx({"front": 0.0, "side": -1.574}, abs=2e-3)
    assert between["side"] < between["front"] < 0
    # A side view is kept from showing a front, a back view still more.
    assert side["front"] == pytest.approx(-1.574, abs=2e-3)
    assert back == pytest.approx({"front": -1.967, "side": -0.394}, abs=2e-3)
    assert overhead == {"front": 0.0, "side": 0.0}


# ------------------------------------------------------------------------------------------------ embeddings


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> DiffusionModel:
    return DiffusionConfig(source=str(make_diffusion(tmp_path_factory.mktemp("diffusion")))).setup()


def test_embeddings_are_those_of_the_text_encoder(model, tmp_path):
    tokenizer, encoder = model.load_text_encoder("cpu")
    texts = ["a red cube, front view", ""]
    embeddings = TextEmbedder(model, cache_folder=tmp_path)(texts)
    tokens = tokenizer(texts, padding="max_length", max_length=24, return_tensors="pt").input_ids
    torch.testing.assert_close(embeddings, encoder(tokens).last_hidden_state)
    assert embeddings.shape == (2, 24, 16)
    assert not torch.allclose(embeddings[0], embeddings[1])


def test_the_second_start_needs_no_text_encoder(model, tmp_path, monkeypatch):
    first = TextEmbedder(model, cache_folder=tmp_path)(["a red cube", "a blue ball"])
    monkeypatch.setattr(DiffusionModel, "load_text_encoder", None)
    assert torch.equal(TextEmbedder(model, cache_folder=tmp_path)(["a blue ball", "a red cube"]), first.flip(0))


def test_the_text_encoder_is_loaded_once_and_then_freed(model, tmp_path, monkeypatch):
    loads, load = [], DiffusionModel.load_text_encoder
    monkeypatch.setattr(DiffusionModel, "load_text_encoder", lambda *args: loads.append(args) or load(*args))
    embedder = TextEmbedder(model, cache_folder=tmp_path)
    embedder(["a red cube", "a blue ball", "a red cube", ""])
    assert len(loads) == 1
    assert embedder._encoder is None


def test_another_text_encoder_has_other_embeddings(model, tmp_path):
    other = DiffusionConfig(source=str(make_diffusion(tmp_path / "other"))).setup()
    assert other.text_identity() == model.text_identity()  # the same weights in another folder
    config = tmp_path / "other" / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace("quick_gelu", "gelu"))
    assert other.text_identity() != model.text_identity()
    embeddings = [TextEmbedder(which, cache_folder=tmp_path / "cache")(["a red cube"]) for which in (model, other)]
    assert not torch.equal(*embeddings)


def test_a_prompt_that_is_too_long_says_what_is_cut(model, tmp_path):
    text = "a red cube on a blue ball on a red cube on a blue ball on a red cube on a blue ball, front view"
    for _ in range(2):  # computed, and from the cache
        with pytest.warns(UserWarning, match="takes 24 tokens") as said:
            TextEmbedder(model, cache_folder=tmp_path)([text, ""])
        (message,) = [str(warning.message) for warning in said]
        cut = message.split("does not read '")[1].split("'")[0]
        assert cut.endswith("front view")
        assert text.replace(" ", "").endswith(cut.replace(" ", ""))
        assert "--prompt" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TextEmbedder(model, cache_folder=tmp_path)(["a red cube, front view"])


def test_a_cache_that_cannot_be_written_names_its_option(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--pipeline.prompt-cache-dir"):
        TextEmbedder(model, cache_folder=tmp_path / "file")(["a red cube"])


def test_without_transformers_the_extra_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match=r"lrf-nerfstudio\[text\]"):
        TextEmbedder(model, cache_folder=tmp_path)(["a red cube"])
