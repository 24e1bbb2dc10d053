"""What ``inspect`` and ``compare`` show."""

from __future__ import annotations

import json

import pytest

from seedlora.cli.main import main
from tests.helpers.adapter_folders import SEVEN


def test_inspect_and_compare(plain_folders, tmp_path, capsys):
    assert main(["inspect", plain_folders[0], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ranks"] == [2]
    assert len(found["layers"]) == 14
    assert main(["compare", *plain_folders, "--plot", str(tmp_path / "p")]) == 0
    shown = capsys.readouterr().out
    assert "rho" in shown
    assert {f.name for f in (tmp_path / "p").iterdir()} == {
        *("pairs.svg", "cosines.svg", "spectra.svg", "distributions.svg", "gains.svg")
    }
    assert all("currentColor" not in f.read_text() for f in (tmp_path / "p").iterdir())
    assert main(["compare", *plain_folders, "--json", "--method", "soup"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row[i] for i, row in enumerate(found["cosines"])] == pytest.approx([1, 1, 1])
    assert {row["module"] for row in found["modules"]} == set(SEVEN)


@pytest.mark.parametrize("kind", ["rslora", "modules_to_save", "lora_bias", "dora", "alpha_pattern"])
def test_inspect_says_who_serves_an_adapter(kind, adapters_of, tmp_path, capsys):
    case = adapters_of(kind)
    capsys.readouterr()  # libraries that make an adapter speak when they are imported
    assert main(["inspect", str(case.folders[0]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    name = {"rslora": "use_rslora", "dora": "DoRA"}.get(kind, kind)
    assert any(reason.startswith(name) for reason in found["servable"]["vLLM"])
    assert (found["servable"]["LoRAX"] == []) == (kind == "alpha_pattern")
    assert main(["inspect", str(case.folders[0])]) == 0
    assert "what stands in the way" in capsys.readouterr().out
    assert main(["merge", str(case.folders[0]), "--method", "soup", "--rank", "8", "--out", str(tmp_path / "o")]) == 0
    shown = capsys.readouterr().out
    if kind in ("rslora", "dora", "alpha_pattern"):
        assert "served by vLLM, SGLang, LoRAX, TGI, llama.cpp (vLLM: --max-lora-rank 8)" in shown
    else:
        assert f"not by vLLM, SGLang, LoRAX, TGI, llama.cpp ({kind}" in shown


def test_compare_shows_dora_at_a_rank(adapters_of, capsys):
    case = adapters_of("dora")
    assert main(["compare", *map(str, case.folders)]) == 0
    shown = capsys.readouterr().out
    assert "DoRA's updates have full rank; shown is the best rank 64 of each" in " ".join(shown.split())
