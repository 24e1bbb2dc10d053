"""What ``serve`` starts, by stand-ins of the servers that say how they were started, and what it prints."""

from __future__ import annotations

import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from seedlora.adapters.server_commands import ServedAdapter, llama_cpp_command, shown, vllm_command
from seedlora.cli.main import main
from seedlora.merge.adapter_folders import merge_folders
from tests.serving.models import save_adapter, save_model

ROOT = Path(__file__).parents[2]
SERVER = """
import json, os, signal, sys, time
with open(os.environ["STARTED"] + ".tmp", "w") as file:
    json.dump({"words": sys.argv[1:], "pid": os.getpid()}, file)
os.rename(os.environ["STARTED"] + ".tmp", os.environ["STARTED"])
if os.environ.get("STAYS"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    time.sleep(60)
"""


@pytest.fixture
def base(tmp_path):
    return save_model(tmp_path / "base")


@pytest.fixture
def run(tmp_path, base):
    """A run with an awkward name."""
    run = tmp_path / "my run's"
    sources = [save_adapter(run / f"seed_{seed}", base, r=r, lora_alpha=r) for seed, r in ((2, 5), (11, 5))]
    (run / "run.json").write_text("{}")
    for name in ("fused", "soup"):
        merge_folders(sources, run / name, method="soup")
    (run / "checkpoints").mkdir()
    return run


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """No server is among the commands."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def split(text: str) -> list[str]:
    """The words of a command that goes over lines, which shlex does not join."""
    return shlex.split(text.replace(" \\\n", " "))


def install(folder: Path, name: str) -> None:
    (folder / name).write_text(f"#!{sys.executable}\n{SERVER}")
    (folder / name).chmod((folder / name).stat().st_mode | stat.S_IXUSR)


def test_a_run_is_served_with_all_its_adapters(run, base, bare, capsys):
    assert main(["serve", str(run)]) == 0
    shown_ = capsys.readouterr()
    assert split(shown_.out) == [
        *("vllm", "serve", base, "--enable-lora", "--max-lora-rank", "16", "--max-loras", "4", "--lora-modules"),
        *(f"{name}={run / name}" for name in ("fused", "soup", "seed_2", "seed_11")),
    ]
    assert '# ask for the model "fused"; also served: soup, seed_2, seed_11' in shown_.err
    assert "# vllm is not on this machine; where it is, run:" in shown_.err


def test_what_is_printed_can_be_pasted(run, bare, capsys):
    """A shell makes the same words of it."""
    (run / "fused" / "chat_template.jinja").write_text("{{ messages }}")
    assert main(["serve", str(run), "--dry_run", "--options", "--port", "8001", "--served", "a b;$HOME"]) == 0
    text = capsys.readouterr().out
    assert text.count(" \\\n    --") == 7
    words = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))"]
    done = subprocess.run(["/bin/sh", "-c", f"{shlex.join(words)} {text}"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found == split(text)
    assert f"fused={run / 'fused'}" in found
    assert found[-6:] == [
        *("--chat-template", str(run / "fused" / "chat_template.jinja")),
        *("--port", "8001", "--served", "a b;$HOME"),
    ]


def test_what_the_run_advises_comes_first(run, bare, capsys):
    (run / "report.json").write_text(json.dumps({"advice": {"better": "seed_11", "sentences": []}}))
    (run / "seed_11" / "prompt.json").write_text(json.dumps({"style": "alpaca"}))
    assert main(["serve", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"] == "seed_11"
    modules = told["command"][told["command"].index("--lora-modules") + 1 :]
    assert [module.partition("=")[0] for module in modules] == ["seed_11", "fused", "soup", "seed_2"]
    assert told["notes"][0] == 'ask for the model "seed_11", which the run advises; also served: fused, soup, seed_2'
    assert told["notes"][1].startswith("it was trained with the prompt style alpaca: send that text to /v1/completions")


def test_one_adapter(run, base, bare, capsys):
    assert main(["serve", str(run / "seed_2"), "--base", "owner/name"]) == 0
    words = split(capsys.readouterr().out)
    assert words == [
        *("vllm", "serve", "owner/name", "--enable-lora", "--max-lora-rank", "8", "--lora-modules"),
        f"seed_2={run / 'seed_2'}",
    ]
    assert main(["serve", base]) == 0
    assert split(capsys.readouterr().out) == ["vllm", "serve", base, "--served-model-name", "base"]


@pytest.mark.parametrize("server", ["vllm", "llama.cpp"])
def test_the_server_takes_the_place_of_the_process(server, run, base, tmp_path):
    """Its process id is that of the command, so it gets the signals, and its exit code is the command's."""
    (tmp_path / "bin").mkdir()
    install(tmp_path / "bin", {"vllm": "vllm", "llama.cpp": "llama-server"}[server])
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "STARTED": str(tmp_path / "started.json"),
        "STAYS": "1",
        "PYTHONPATH": str(ROOT),
    }
    words = [sys.executable, "-m", "seedlora", "serve", str(run), "--server", server]
    words += ["--base_gguf", str(tmp_path / "base.gguf")] if server == "llama.cpp" else []
    process = subprocess.Popen([*words, "--options", "--port", "1"], env=environment, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "started.json").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        started = json.loads((tmp_path / "started.json").read_text())
        assert started["pid"] == process.pid
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 7
    finally:
        process.kill()
    if server == "vllm":
        assert started["words"][:3] == ["serve", base, "--enable-lora"]
        assert started["words"][-2:] == ["--port", "1"]
        return
    names = ("fused", "soup", "seed_2", "seed_11")
    assert started["words"] == [
        *("--model", str(tmp_path / "base.gguf"), "--lora-scaled"),
        ",".join(f"{run / name}.gguf:{int(name == 'fused')}" for name in names),
        *("--cache-ram", "0", "--alias", "fused", "--port", "1"),
    ]
    for name in names:
        assert (run / f"{name}.gguf").read_bytes()[:4] == b"GGUF"


def test_llama_cpp_needs_files_in_its_format(run, base, bare, tmp_path, capsys):
    assert main(["serve", str(run / "fused"), "--server", "llama.cpp"]) == 0
    lines = capsys.readouterr().out.replace(" \\\n    ", " ").splitlines()
    assert [shlex.split(line) for line in lines] == [
        ["python", "convert_hf_to_gguf.py", base, "--outfile", "base.gguf"],
        ["python", "-m", "seedlora", "export", str(run / "fused"), "--gguf", str(run / "fused.gguf")],
        ["llama-server", "--model", "base.gguf", "--lora", str(run / "fused.gguf"), "--alias", "fused"],
    ]
    install(bare, "llama-server")
    assert main(["serve", str(run / "fused"), "--server", "llama.cpp"]) == 2
    assert "give --base_gguf FILE, made of" in capsys.readouterr().err
    assert main(["serve", str(run / "fused"), "--server", "llama.cpp", "--base_gguf", str(tmp_path / "no")]) == 2
    assert "is no file" in capsys.readouterr().err


def test_what_cannot_be_served_is_left_out_or_refused(run, base, bare, tmp_path, capsys):
    config = run / "soup" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    (run / "seed_2" / "base.json").write_text(json.dumps({"quantization": "nf4"}))
    assert main(["serve", str(run)]) == 0
    shown_ = capsys.readouterr()
    assert "soup=" not in shown_.out
    assert "# soup is left out: DoRA: its update depends on the base weights" in shown_.err
    assert "# seed_2 is left out: it belongs on its base model in nf4 alone" in shown_.err
    for words, said in {
        (str(run / "soup"),): "vLLM serves none of these adapters: soup is left out: DoRA",
        (str(run / "checkpoints"),): "it has no adapter_config.json",
        (str(run), "--base_gguf", "x"): "--base_gguf is for --server llama.cpp",
        (base, "--base", "x"): "--base is not used",
        (base, "--server", "llama.cpp"): "is a whole model: python -m seedlora export",
        (str(run), "--server", "tgi"): "invalid choice: 'tgi'",
    }.items():
        assert main(["serve", *words]) == 2
        assert said in capsys.readouterr().err
    config = run / "seed_11" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "other/base"}))
    assert main(["serve", str(run)]) == 2
    assert "the adapters do not name one base model (fused: " in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "run.json").write_text("{}")
    assert main(["serve", str(empty)]) == 2
    assert "has no adapter yet" in capsys.readouterr().err


def test_paths_that_a_server_would_split():
    odd = [ServedAdapter("a", Path("/x,y=z/a"), 8), ServedAdapter("b", Path("/x/b"), 24)]
    words = vllm_command("base", odd)
    assert json.loads(words[words.index("--lora-modules") + 1]) == {"name": "a", "path": "/x,y=z/a"}
    assert words[words.index("--max-lora-rank") + 1] == "32"
    with pytest.raises(ValueError, match="takes several adapters from paths without"):
        llama_cpp_command("llama-server", Path("b.gguf"), odd)
    assert split(shown(words)) == words
    with pytest.raises(ValueError, match="rank 513 is over"):
        vllm_command("base", [ServedAdapter("a", Path("a"), 513)])
