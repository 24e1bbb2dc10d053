"""``generate`` and ``chat`` answer as transformers does over PEFT's own model, alone and side by side."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from seedlora.adapters.writing import write_adapter
from seedlora.cli import chat
from seedlora.cli.generate import NO_TEXT
from seedlora.cli.main import main
from seedlora.cli.speakers import Speakers
from seedlora.datamodules.conversations import Turn
from seedlora.datamodules.prompts import prompt_record, render
from tests.helpers.models import built

TOKENS = 9
GREEDY = ["--dtype", "float32", "--max_new_tokens", str(TOKENS)]


@pytest.fixture(scope="module")
def run(tiny_llama, tmp_path_factory):
    """A run of two seeds that were trained in the style tulu, and what was merged of them."""
    module = built(tiny_llama, 1, 2, 3, 4)
    folder = tmp_path_factory.mktemp("runs") / "run"
    record = json.dumps(prompt_record("tulu", module.tokenizer))
    for replica, name in zip(module.replicas, ("seed_1", "seed_2", "fused", "long_seed_ema"), strict=True):
        factors = module.stack.stored_factors(replica.name)
        write_adapter(folder / name, factors, module.options.lora_config(), files={"prompt.json": record})
    (folder / "run.json").write_text("{}")
    return folder


def reference(base, folder, turns, style="tulu"):
    """The answer of transformers' own greedy generation, with the adapter through PEFT."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder)
    ids = tokenizer(render(prompt_record(style, tokenizer), turns), return_tensors="pt")["input_ids"]
    said = model.eval().generate(input_ids=ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(said, skip_special_tokens=True)


def test_one_answer_is_streamed(run, tiny_llama, capsys):
    assert main(["generate", str(run), "--prompt", "Hello", *GREEDY]) == 0
    assert capsys.readouterr().out == reference(tiny_llama, run / "fused", "Hello") + "\n"


def test_side_by_side(run, tiny_llama, capsys):
    words = ["generate", str(run), "--prompt", "Hello", "--prompt", "And you?", "--compare", "seed_1,base", *GREEDY]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["messages"][-1]["content"] for row in found] == ["Hello", "And you?"]
    for row in found:
        request = row["messages"][-1]["content"]
        assert list(row["answers"]) == ["fused", "seed_1", "base"]
        for name, text in row["answers"].items():
            assert text == reference(tiny_llama, None if name == "base" else run / name, request), name
    assert main(words) == 0
    assert f"seed_1: {found[1]['answers']['seed_1']}" in capsys.readouterr().out


def test_an_answer_without_text_is_said_to_be_one(run, capsys, monkeypatch):
    """The model's first token is its end: nothing else would be printed."""
    answer = Speakers.answer

    def ends_at_once(self, conversations, on_text=None):
        said = answer(self, conversations)
        return {name: [each._replace(text="") for each in of] for name, of in said.items()}

    monkeypatch.setattr(Speakers, "answer", ends_at_once)
    assert main(["generate", str(run), "--prompt", "Hello", *GREEDY]) == 0
    assert capsys.readouterr() == ("\n", f"{NO_TEXT}\n")
    assert main(["generate", str(run), "--prompt", "Hello", "--compare", "base", *GREEDY]) == 0
    assert f"fused: {NO_TEXT}\nbase: {NO_TEXT}\n" in capsys.readouterr().out


def test_whatever_a_run_has_can_be_named(run, tiny_llama, capsys):
    words = ["generate", str(run), "--prompt", "Hello", "--compare", "long_seed_ema", *GREEDY, "--json"]
    assert main(words) == 0
    answers = json.loads(capsys.readouterr().out)[0]["answers"]
    assert list(answers) == ["fused", "long_seed_ema"]
    assert answers["long_seed_ema"] == reference(tiny_llama, run / "long_seed_ema", "Hello")


def test_requests_of_a_file(run, tiny_llama, capsys, monkeypatch):
    turns = [("user", "1 + 1"), ("assistant", "2"), ("user", "And one more?"), ("assistant", "3")]
    rows = [{"prompt": "Hello"}, {"messages": [{"role": role, "content": text} for role, text in turns]}]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert main(["generate", str(run), "--file", "rows.jsonl", "--json", "--system", "Be kind.", *GREEDY]) == 0
    first, second = json.loads(capsys.readouterr().out)
    system = Turn("system", "Be kind.")
    assert first["answers"]["fused"] == reference(tiny_llama, run / "fused", [system, Turn("user", "Hello")])
    talk = [system, *(Turn(*turn) for turn in turns[:3])]
    assert second["answers"]["fused"] == reference(tiny_llama, run / "fused", talk)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    assert main(["generate", str(run), "--file", "-", *GREEDY]) == 0
    assert capsys.readouterr().out == reference(tiny_llama, run / "fused", "Hello") + "\n"


def test_the_same_seed_draws_the_same(run, capsys):
    def answer(*words):
        assert main(["generate", str(run), "--prompt", "Hello", *GREEDY, *words]) == 0
        return capsys.readouterr().out

    assert answer("--temperature", "2") == answer("--temperature", "2")
    assert answer("--temperature", "2") != answer("--temperature", "2", "--seed", "1")
    assert answer("--temperature", "2", "--top_k", "1") == answer()


def test_an_adapter_of_an_unknown_style_is_told(run, tiny_llama, tmp_path, capsys):
    adapter = tmp_path / "elsewhere"
    adapter.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / file).write_bytes((run / "seed_2" / file).read_bytes())
    assert main(["generate", str(adapter), "--prompt", "Hello", *GREEDY]) == 0
    shown = capsys.readouterr()
    assert shown.out == reference(tiny_llama, adapter, "Hello", "plain") + "\n"
    assert "does not say in which style it was trained; it is asked in the style plain" in " ".join(shown.err.split())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "nothing to answer: give --prompt TEXT or --file FILE"),
        (["--prompt", "x", "--top_k", "3"], "top_k and top_p limit what is drawn at random; give a temperature"),
        (["--prompt", "x", "--temperature", "-1"], "temperature must be a number of at least 0, got -1"),
        (["--prompt", "x", "--max_new_tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (
            ["--prompt", "x", "--compare", "nobody"],
            "--compare nobody is neither one of fused, seed_1, seed_2, base nor a folder",
        ),
        (["--file", "bad.jsonl"], "bad.jsonl, line 2: "),
        (["--file", "none.jsonl"], "none.jsonl: No such file"),
    ],
)
def test_what_cannot_be_answered_is_said(run, capsys, words, reason):
    Path("bad.jsonl").write_text('{"prompt": "x"}\n["x"]\n')
    assert main(["generate", str(run), *words]) == 2
    assert reason in capsys.readouterr().err


def test_a_conversation_goes_on(run, tiny_llama, monkeypatch):
    lines = iter(["Hello", "And you?", "/what", "/system Be kind.", "Hello", "/new", "x" * 5000, "/quit", "never"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    shown = Console(file=io.StringIO(), width=200)
    given = {"source": str(run), "compare": "base", "base": None, "dtype": "float32", "prompt_style": None}
    sampling = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    chat.talk({**given, **sampling, "system": None, "max_new_tokens": TOKENS}, shown)
    text = shown.file.getvalue()
    talk = [Turn("user", "Hello"), Turn("assistant", ""), Turn("user", "And you?")]
    for name, folder in (("fused", run / "fused"), ("base", None)):
        talk[1] = Turn("assistant", reference(tiny_llama, folder, "Hello"))
        second = reference(tiny_llama, folder, talk)
        kind = reference(tiny_llama, folder, [Turn("system", "Be kind."), Turn("user", "Hello")])
        for answer in (talk[1].content, second, kind):
            for line in filter(str.strip, answer.splitlines()):
                assert line.strip() in text, name
    assert "there is no /what; /new begins a new conversation" in text
    assert "but the model's context only" in text
    assert next(lines) == "never"
