"""Adapters as GGUF files: read back by the ``gguf`` package, and against what attention makes of them."""

from __future__ import annotations

import json
import math
import stat
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import rotate_half

from seedlora.adapters.gguf_file import interleave_rows
from seedlora.adapters.modelfile import find_wrapping
from seedlora.cli.main import main
from seedlora.datamodules.prompts import STYLES, Turn, render
from tests.helpers.adapter_folders import save_adapter as save_lora
from tests.helpers.adapter_folders import small_gpt2
from tests.serving.models import CONFIGS, save_adapter, save_model

PREFIX = "base_model.model."


def field(reader: GGUFReader, key: str) -> object:
    return reader.get_field(key).contents()


def tensors(file: Path) -> dict[str, torch.Tensor]:
    return {t.name: torch.from_numpy(np.array(t.data)) for t in GGUFReader(file).tensors}


def by_hand(path: str) -> str:
    """llama.cpp's name of a layer, written down apart from the gguf package."""
    leaves = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "qkv_proj": "attn_qkv"}
    leaves |= {"o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    leaves |= {"gate_up_proj": "ffn_up"}
    parts = path.split(".")
    return f"blk.{parts[2]}.{leaves[parts[-1]]}.weight"


def rows_of_llama_cpp(heads: int, size: int) -> list[int]:
    """Which row of a projection stands where: the first of each half of a head, then the second of each, ..."""
    return [head * size + half * (size // 2) + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_factor_is_in_the_file(kind, tmp_path):
    base = save_model(tmp_path / "base", kind)
    adapter = save_adapter(tmp_path / "adapter", base)
    assert main(["export", str(adapter), "--gguf", str(tmp_path / "a.gguf")]) == 0
    reader, config = GGUFReader(tmp_path / "a.gguf"), AutoConfig.from_pretrained(base)
    assert field(reader, "general.architecture") == {"Mistral": "llama"}.get(kind, kind.lower())
    assert field(reader, "general.type") == "adapter"
    assert field(reader, "adapter.type") == "lora"
    assert field(reader, "adapter.lora.alpha") == 4.0
    given = load_file(adapter / "adapter_model.safetensors")
    found = tensors(tmp_path / "a.gguf")
    assert len(found) == len(given)
    for key, tensor in given.items():
        path, _, factor = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(path.split(".")[-1])
        if kind in ("Llama", "Mistral") and factor == "lora_B" and heads:
            tensor = tensor[rows_of_llama_cpp(heads, tensor.shape[0] // heads)]
        assert torch.equal(found[f"{by_hand(path)}.{factor.lower()}"], tensor), key


def test_reordered_rows_rotate_as_llama_cpp_rotates():
    """transformers turns a head's first half with its second, llama.cpp neighbours: the same scores come out."""
    heads, size, tokens = 3, 8, 5
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(heads * size, tokens, generator=generator).double() for _ in range(2))
    angles = torch.arange(tokens)[None] * (10000.0 ** (-torch.arange(0, size, 2).double() / size))[:, None]

    def halves(x):
        x = x.view(heads, size, tokens).transpose(1, 2)
        cos, sin = (f(angles).repeat(2, 1).T for f in (torch.cos, torch.sin))
        return x * cos + rotate_half(x) * sin

    def neighbours(x):
        x = interleave_rows(x, heads).view(heads, size // 2, 2, tokens)
        real, imaginary = x[:, :, 0], x[:, :, 1]
        turned = [real * angles.cos() - imaginary * angles.sin(), real * angles.sin() + imaginary * angles.cos()]
        return torch.stack(turned, 2).view(heads, size, tokens).transpose(1, 2)

    scores = [turn(q) @ turn(k).transpose(1, 2) for turn in (halves, neighbours)]
    assert torch.allclose(*scores, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 10},
        {"r": 4, "lora_alpha": 10, "use_rslora": True},
        {"r": 4, "lora_alpha": 10, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"up_proj": 3}},
    ],
)
def test_the_scaling_is_that_of_peft(options, tmp_path):
    base = save_model(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, **options)
    assert main(["export", str(adapter), "--gguf", str(tmp_path / "a.gguf")]) == 0
    alpha = field(GGUFReader(tmp_path / "a.gguf"), "adapter.lora.alpha")
    given, found = load_file(adapter / "adapter_model.safetensors"), tensors(tmp_path / "a.gguf")
    for module in ("v_proj", "up_proj", "down_proj"):
        path = f"model.layers.1.{'self_attn' if module == 'v_proj' else 'mlp'}.{module}"
        a, b = (given[f"{PREFIX}{path}.lora_{part}.weight"].double() for part in "AB")
        rank = options.get("rank_pattern", {}).get(module, options["r"])
        scale = options.get("alpha_pattern", {}).get(module, options["lora_alpha"])
        scale /= math.sqrt(rank) if options.get("use_rslora") else rank
        a_file, b_file = (found[f"{by_hand(path)}.lora_{part}"].double() for part in "ab")
        assert torch.allclose(alpha / b_file.shape[1] * b_file @ a_file, scale * b @ a, rtol=1e-5, atol=1e-6)


def refused(words, capsys) -> str:
    assert main(words) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return line


def test_what_llama_cpp_would_not_load_is_refused(tmp_path, capsys):
    base = save_model(tmp_path / "base", tie_word_embeddings=True)
    out = ["--gguf", str(tmp_path / "a.gguf")]
    kinds = {
        "dora": ({"use_dora": True}, "use_dora is set"),
        "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "the adapter holds factors of an embedding"),
        "head": ({"target_modules": ["q_proj", "lm_head"]}, "'lm_head' is tied to the input embedding"),
    }
    for name, (options, said) in kinds.items():
        adapter = save_adapter(tmp_path / name, base, **options)
        assert said in refused(["export", str(adapter), *out], capsys)
    plain = save_adapter(tmp_path / "plain", base)
    (plain / "base.json").write_text('{"quantization": "nf4"}')
    assert "belongs on its base model in nf4 alone" in refused(["export", str(plain), *out], capsys)
    (plain / "base.json").unlink()
    smaller = save_model(tmp_path / "smaller", num_hidden_layers=1)
    line = refused(["export", str(plain), *out, "--base", smaller], capsys)
    assert "llama of 1 layers has no adapter for 'model.layers.1" in line
    odd = save_model(tmp_path / "odd", num_attention_heads=32, num_key_value_heads=32, head_dim=8)
    assert "32 heads of an even size do not share" in refused(["export", str(plain), *out, "--base", odd], capsys)
    assert not (tmp_path / "a.gguf").exists()


def test_what_is_asked_is_checked_first(tmp_path, capsys):
    base = save_model(tmp_path / "base")
    adapter = str(save_adapter(tmp_path / "adapter", base))
    taken = tmp_path / "notes.gguf"
    taken.write_text("mine")
    out = ["--gguf", str(tmp_path / "a.gguf")]
    words = {
        "is there and is no GGUF file": [adapter, "--gguf", str(taken)],
        "takes a file that ends in .gguf": [adapter, "--gguf", str(tmp_path / "a.bin")],
        "--quantize Q4_K_M is for whole models": [adapter, *out, "--quantize", "Q4_K_M"],
        "Unknown quantisation 'Q4KM'; choose one of": [adapter, *out, "--into_base", "--quantize", "Q4KM"],
        "--into_base is not used": [base, *out, "--into_base"],
        "does not exist": [adapter, *out, "--base", str(tmp_path / "nowhere")],
        "names no base model; give --base MODEL": [str(nameless(adapter, tmp_path)), *out],
    }
    for said, given in words.items():
        assert said in refused(["export", *given], capsys)
    assert taken.read_text() == "mine"


def nameless(adapter: str, tmp_path: Path) -> Path:
    folder = tmp_path / "nameless"
    folder.mkdir()
    for file in Path(adapter).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def tool(file: Path, program: str) -> None:
    """A stand-in for a tool of llama.cpp."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!{sys.executable}\n{program}")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


CONVERT = """
import pathlib, sys
from transformers import AutoModelForCausalLM
out = sys.argv[sys.argv.index("--outfile") + 1]
weight = AutoModelForCausalLM.from_pretrained(sys.argv[1]).model.layers[0].mlp.up_proj.weight
pathlib.Path(out).write_bytes(b"GGUF" + weight.detach().numpy().tobytes() + sys.argv[-1].encode())
"""
QUANTISE = """
import pathlib, sys
pathlib.Path(sys.argv[2]).write_bytes(pathlib.Path(sys.argv[1]).read_bytes()[:8] + sys.argv[3].encode())
"""


def test_a_whole_model_by_llama_cpps_tools(tmp_path, capsys):
    base = save_model(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    tool(tmp_path / "cpp/convert_hf_to_gguf.py", CONVERT)
    tool(tmp_path / "cpp/build/bin/llama-quantize", QUANTISE)
    out = tmp_path / "new" / "model.gguf"
    words = ["export", str(adapter), "--gguf", str(out), "--into_base", "--llama_cpp", str(tmp_path / "cpp")]
    assert main(words) == 0
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"{PREFIX}model.layers.0.mlp.up_proj.lora_{part}.weight"] for part in "AB")
    weight = AutoModelForCausalLM.from_pretrained(base).model.layers[0].mlp.up_proj.weight.detach() + b @ a
    assert out.read_bytes()[-3:] == b"f32"
    written = torch.from_numpy(np.frombuffer(out.read_bytes()[4:-3], dtype=np.float32).copy()).view_as(weight)
    assert torch.allclose(written, weight, atol=1e-6)
    assert main([*words, "--quantize", "q4_k_m"]) == 0
    assert out.read_bytes().endswith(b"Q4_K_M")
    assert sorted(file.name for file in out.parent.iterdir()) == ["model.Modelfile", "model.gguf"]
    assert "FROM ./model.gguf\n" in (out.parent / "model.Modelfile").read_text()
    assert "ADAPTER" not in (out.parent / "model.Modelfile").read_text()
    assert main(["export", base, "--gguf", str(out), "--llama_cpp", str(tmp_path / "cpp")]) == 0
    tool(tmp_path / "cpp/convert_hf_to_gguf.py", "import sentencepiece_that_is_not_there")
    capsys.readouterr()
    line = refused(words, capsys)
    assert line.endswith(
        "No module named 'sentencepiece_that_is_not_there' (pip install sentencepiece_that_is_not_there)"
    )


def test_without_the_tools_the_commands_are_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    base = save_model(tmp_path / "base")
    adapter = save_adapter(tmp_path / "an adapter", base)
    out = tmp_path / "m.gguf"
    assert main(["export", str(adapter), "--gguf", str(out), "--into_base", "--quantize", "Q4_K_M"]) == 2
    shown = capsys.readouterr()
    merge, convert, quantise = shown.out.splitlines()
    assert merge == (
        f"python -m seedlora merge '{adapter}' --method soup --into_base {base} --out {tmp_path / 'm-merged'}"
    )
    assert convert == (
        f"python convert_hf_to_gguf.py {tmp_path / 'm-merged'} --outfile {tmp_path / 'm-f32.gguf'} --outtype f32"
    )
    assert quantise == f"llama-quantize {tmp_path / 'm-f32.gguf'} {out} Q4_K_M"
    assert "convert_hf_to_gguf.py and llama-quantize of llama.cpp are not among the commands" in shown.err
    assert not out.exists()


def test_other_architectures_take_llama_cpps_script(tmp_path, capsys):
    small_gpt2().save_pretrained(tmp_path / "base")
    config = {"r": 2, "lora_alpha": 2, "target_modules": ["c_fc"], "fan_in_fan_out": True}
    save_lora(tmp_path / "a", small_gpt2, **config)
    out = tmp_path / "a.gguf"
    words = ["export", str(tmp_path / "a"), "--base", str(tmp_path / "base"), "--gguf", str(out)]
    assert main(words) == 2
    shown = capsys.readouterr()
    assert f"--outfile {out} {tmp_path / 'a'}" in shown.out
    assert "adapters of Gemma2, Gemma3, Llama, Mistral, Phi3, Qwen2, Qwen3 are written here" in shown.err
    assert "GPT2LMHeadModel takes llama.cpp's convert_lora_to_gguf.py" in shown.err
    tool(
        tmp_path / "cpp/convert_lora_to_gguf.py",
        "import sys; open(sys.argv[sys.argv.index('--outfile') + 1], 'w').write('GGUF')",
    )
    assert main([*words, "--llama_cpp", str(tmp_path / "cpp")]) == 0
    assert out.read_text() == "GGUF"
    save_lora(
        tmp_path / "b", small_gpt2, r=2, lora_alpha=2, target_modules=["c_fc"], fan_in_fan_out=True, use_rslora=True
    )
    words[1] = str(tmp_path / "b")
    assert "would not read all of" in refused([*words, "--llama_cpp", str(tmp_path / "cpp")], capsys)


CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ bos_token + '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
RECORDS = {name: {"style": name, "templates": asdict(style), "eos_token": "</s>"} for name, style in STYLES.items()}
SPECIAL = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
RECORDS["chat"] = {
    "style": "chat",
    "templates": {"chat_template": CHATML, "special_tokens": SPECIAL},
    "eos_token": "<|im_end|>",
}
CONVERSATIONS = [
    [("user", "Why?")],
    [("system", "Be brief."), ("user", "Why {not}?")],
    [("user", "Why?"), ("assistant", "Because."), ("user", "Really?\nWhy?"), ("assistant", "Yes."), ("user", "Hm.")],
]


def filled(template: str, turns: list[tuple[str, str]]) -> str:
    """What Go makes of a template of our form, by its own rules: an independent reading of it."""
    import re

    header = re.match(r"\{\{ if not \.System \}\}(.*?)\{\{ end \}\}", template, re.S)
    body = template[header.end() :] if header else template
    loop = re.fullmatch(
        r'\{\{ range \.Messages \}\}\{\{ if eq \.Role "system" \}\}(.*)\{\{ else if eq \.Role "user" \}\}(.*)'
        r"\{\{ else \}\}(.*)\{\{ end \}\}\{\{ end \}\}",
        body,
        re.S,
    )
    parts = dict(zip(("system", "user", "assistant"), loop.groups(), strict=True))
    text = header[1] if header and turns[0][0] != "system" else ""
    return text + "".join(parts[role].replace("{{ .Content }}", content) for role, content in turns)


@pytest.mark.parametrize("name", RECORDS)
def test_the_template_of_ollama_is_the_prompt_of_the_training(name):
    record = RECORDS[name]

    def prompt(turns):
        return render(record, [Turn(*turn) for turn in turns])

    found = find_wrapping(prompt, bos="<s>")
    if name == "alpaca_split":  # it splits what is said, which no template does
        assert found is None
        return
    for turns in CONVERSATIONS:
        assert filled(found.template(), turns) == prompt(turns).removeprefix("<s>")


def test_a_template_that_cannot_be_said():
    assert find_wrapping(lambda turns: "".join(content for _, content in turns) + str(len(turns))) is None
    assert find_wrapping(lambda turns: "{{ x }}" + "".join(content for _, content in turns)) is None
    assert find_wrapping(lambda turns: "no word of it") is None


def test_the_modelfile_beside_an_adapter(tmp_path, capsys):
    base = save_model(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    out = tmp_path / "Fused.gguf"
    words = ["export", str(adapter), "--gguf", str(out)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert f"llama-server --model base.gguf --lora {out}" in shown
    assert f"ollama create fused -f {tmp_path / 'Fused.Modelfile'} && ollama run fused" in shown
    text = (tmp_path / "Fused.Modelfile").read_text()
    assert f"FROM {base}\nADAPTER ./Fused.gguf\n" in text
    assert "TEMPLATE" not in text
    assert "The prompt of the training is not known" in text
    (adapter / "prompt.json").write_text(json.dumps(RECORDS["alpaca"]))
    assert main([*words, "--base_gguf", str(tmp_path / "b.gguf"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["gguf"] == str(out)
    assert told["commands"][0] == f"llama-server --model {tmp_path / 'b.gguf'} --lora {out}"
    text = (tmp_path / "Fused.Modelfile").read_text()
    assert text.startswith(f'FROM {tmp_path / "b.gguf"}\nADAPTER ./Fused.gguf\nTEMPLATE """')
    assert "{{ range .Messages }}" in text
    assert 'PARAMETER stop "</s>"' in text
    (adapter / "prompt.json").write_text(json.dumps(RECORDS["alpaca_split"]))
    assert main(words) == 0
    assert "(alpaca_split) cannot be said in a Go template" in (tmp_path / "Fused.Modelfile").read_text()
