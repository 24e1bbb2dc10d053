"""The table for a bug report: it is there where something is broken, and holds no secret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from seedlora.cli.doctor import EXTRAS, Finding, markdown
from seedlora.cli.main import main
from tests.helpers.hub_stand_in import TOKEN, hub_stand_in

ROOT = Path(__file__).parents[2]
RUN = "from seedlora.cli.doctor import run_doctor; run_doctor({'json': True})"


def doctor(tmp_path: Path, **environment: str) -> dict[str, dict[str, str]]:
    """The findings of a process of its own."""
    given = {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    kept = {key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH") if key in os.environ}
    words = [sys.executable, "-c", RUN]
    done = subprocess.run(words, env=kept | given, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_says_what_is_there_and_no_secret(tmp_path):
    cache = tmp_path / "home" / "cache"
    cache.mkdir(parents=True)
    (cache / "file").write_bytes(b"x" * 3 * 2**20)
    with hub_stand_in() as hub:
        address = hub.url.replace("//", "//me:secret@")
        found = doctor(tmp_path, HF_ENDPOINT=address, HF_TOKEN=TOKEN, SEEDLORA_CACHE=str(cache))
    text = json.dumps(found)
    for secret in (TOKEN, "secret", str(tmp_path / "home")):
        assert secret not in text
    assert found["versions"]["torch"].startswith("2.")
    assert found["versions"]["vllm"] == "not installed"
    assert found["devices"]["auto dtype"].startswith(("float32", "bfloat16"))
    assert "GPU" in found["devices"] or "GPU 0" in found["devices"]
    assert "GiB" in found["memory"]["free"]
    assert found["sandbox"]["bubblewrap"].startswith(("no: ", "works: "))
    assert found["caches"]["seedlora"].startswith("~/cache: 3.0 MiB, writable, ")
    assert found["caches"]["hub"].startswith("~/.cache/huggingface/hub: not there yet, writable, ")
    assert found["hub"] == {"address": hub.url, "token": "there is one", "answers": found["hub"]["answers"]}
    assert found["hub"]["answers"].startswith("yes, 200 after ")
    assert found["environment"]["HF_ENDPOINT"] == hub.url
    assert {*found["extras"]} == {*EXTRAS}


def test_what_is_broken_is_a_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    start = time.monotonic()
    found = doctor(tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}", HF_ENDPOINT="http://127.0.0.1:9")
    assert found["devices"] == {"cannot be told": "ImportError: libcudart.so.12: cannot open shared object file"}
    assert found["versions"]["python"].startswith("3.")
    assert found["hub"]["answers"].startswith("no (ConnectError); ")
    assert found["hub"]["token"].startswith("none; ")
    assert time.monotonic() - start < 30
    assert doctor(tmp_path, HF_HUB_OFFLINE="1")["hub"]["answers"] == "not asked: HF_HUB_OFFLINE is set"


def test_a_cache_that_cannot_be_written_is_said(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    (tmp_path / "shut").mkdir(mode=0o500)
    found = doctor(tmp_path, SEEDLORA_CACHE=str(tmp_path / "shut" / "cache"))
    assert "not there yet, NOT writable" in found["caches"]["seedlora"]


def test_nothing_heavy_is_imported_before_it_is_needed():
    program = (
        "import sys, seedlora.cli.doctor; print([n for n in ('torch', 'rich', 'huggingface_hub') if n in sys.modules])"
    )
    words = [sys.executable, "-c", program]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_extras_are_those_of_the_package():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {*EXTRAS} == {*extras} - {"dev"}


def test_the_table_can_be_pasted(capsys):
    assert markdown([Finding("a", "b", "x | y\nz"), Finding("longer", "c", "w")]).splitlines() == [
        "| what      | found |",
        "|-----------|-------|",
        "| a: b      | x \\| y z |",
        "| longer: c | w |",
    ]
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("| what ")
    assert len({line.index("|", 1) for line in shown}) == 1
