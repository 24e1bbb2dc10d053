"""llama.cpp's script is run where it is, and told where it is not."""

import json

import pytest

from seedlora.cli.main import main
from tests.helpers.adapter_folders import SEVEN, save_adapter

SCRIPT = """
import json, sys
outfile = sys.argv[sys.argv.index("--outfile") + 1]
json.dump(sys.argv[1:], open(outfile, "w"))
"""


@pytest.fixture
def words(tmp_path):
    save_adapter(tmp_path / "a", r=2, lora_alpha=6, target_modules=SEVEN)
    return ["merge", str(tmp_path / "a"), "--method", "soup", "--out", str(tmp_path / "fused"), "--gguf"]


def test_the_script_is_run(words, tmp_path, capsys):
    (tmp_path / "cpp").mkdir()
    (tmp_path / "cpp" / "convert_lora_to_gguf.py").write_text(SCRIPT)
    assert main([*words, str(tmp_path / "cpp")]) == 0
    assert f"converted: {tmp_path / 'fused.gguf'}" in capsys.readouterr().out
    given = json.loads((tmp_path / "fused.gguf").read_text())
    assert given[-3:] == ["--outfile", str(tmp_path / "fused.gguf"), str(tmp_path / "fused")]


def test_without_the_script_the_command_is_printed(words, tmp_path, capsys):
    assert main([*words, str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "no convert_lora_to_gguf.py in" in shown
    assert f"--outfile {tmp_path / 'fused.gguf'} {tmp_path / 'fused'}" in shown


def test_a_script_that_fails_is_said(words, tmp_path, capsys):
    (tmp_path / "convert_lora_to_gguf.py").write_text("import sys; sys.exit('this model is not supported')")
    assert main([*words, str(tmp_path)]) == 2
    assert "this model is not supported" in capsys.readouterr().err
