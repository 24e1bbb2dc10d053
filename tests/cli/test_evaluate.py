"""``python -m seedlora evaluate`` from the shell, on a tiny model: samples, tables, resume, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from seedlora.adapters.writing import write_adapter
from seedlora.cli.main import main
from seedlora.datamodules import prompts
from seedlora.evaluation.folder_generators import OneByOneGenerator, make_folder_generator
from seedlora.model.loading import load_model, load_tokenizer
from seedlora.model.weight_files import WeightFiles
from tests.helpers.models import built

ROWS = [{"question": f"What is {i} + {i}?", "answer": f"{i} and {i}\n#### {2 * i}"} for i in range(1, 8)]


@pytest.fixture(scope="module")
def adapters(tiny_llama, tmp_path_factory):
    module = built(tiny_llama, 1, 2, 3)
    root = tmp_path_factory.mktemp("adapters")
    for replica, name in zip(module.replicas, ("seed_1", "seed_2", "fused"), strict=True):
        write_adapter(root / name, module.stack.stored_factors(replica.name), module.options.lora_config())
    return root


@pytest.fixture(autouse=True)
def _gsm8k(_own_folder):
    Path("gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def run(adapters, *words, names=("seed_1", "seed_2", "fused"), tokens="12"):
    given = [word for name in names for word in ("--adapter", str(adapters / name))]
    data = ["--task_path", "gsm8k=gsm8k.jsonl"] if "--task" not in words else []
    task = ["--task", "gsm8k"] if "--task" not in words else []
    here = [] if "--endpoint" in words else ["--dtype", "float32"]
    return main(["evaluate", *given, *task, *data, "--max_new_tokens", tokens, *here, *words])


def samples(folder="evaluation"):
    return [json.loads(line) for line in Path(folder, "samples.jsonl").read_text().splitlines()]


def test_adapters_are_scored_end_to_end(adapters, capsys):
    assert run(adapters, "--with_base") == 0
    shown = capsys.readouterr().out
    for text in ("gsm8k: protocol paper, but 12 new tokens, n = 7", "vs mean seed", "no 'The answer is: '", "tokens/s"):
        assert text in " ".join(shown.split()), text
    found = json.loads(Path("evaluation/results.json").read_text())
    assert found["protocol"] == "paper"
    task = found["tasks"]["gsm8k"]
    assert list(task["scores"]) == ["base", "seed_1", "seed_2", "fused"]
    assert task["scores"]["fused"]["n"] == 7
    assert task["differences"]["fused"]["mean seed"]["n"] == 7
    assert (task["max_new_tokens"], task["protocol_max_new_tokens"]) == (12, 512)
    assert set(found["prompt_styles"].values()) == {"alpaca, by choice"}
    assert len(samples()) == 28


def test_an_evaluation_goes_on_where_it_was_killed(adapters, capsys):
    assert run(adapters) == 0
    whole = {(s["adapter"], s["item"]): s["text"] for s in samples()}
    lines = Path("evaluation/samples.jsonl").read_text().splitlines(keepends=True)
    Path("evaluation/samples.jsonl").write_text("".join(lines[:8]) + lines[8][:20])
    capsys.readouterr()
    assert run(adapters, "--batch_size", "3") == 0
    shown = capsys.readouterr().out
    assert "8 of 21 answers are there already" in shown
    assert "generated now: 13 answers" in shown
    assert {(s["adapter"], s["item"]): s["text"] for s in samples()} == whole
    assert run(adapters) == 0
    assert "generated now" not in capsys.readouterr().out


def test_more_items_and_more_adapters_keep_what_is_there(adapters, capsys):
    assert run(adapters, "--limit", "3", names=["seed_1"]) == 0
    before = samples()
    assert run(adapters, "--limit", "5") == 0
    assert samples()[: len(before)] == before
    assert len(samples()) == 15
    assert "3 of 15 answers are there already" in capsys.readouterr().out


def test_a_second_task_keeps_the_results_of_the_first(adapters):
    """And Holm's rule is over both."""
    rows = [{"problem": row["question"], "solution": r"It is $\boxed{1}$."} for row in ROWS]
    Path("math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    math = ["--task_path", "math=math.jsonl"]
    assert run(adapters, "--task", "gsm8k,math", *math, "--task_path", "gsm8k=gsm8k.jsonl", "--out", "once") == 0
    assert run(adapters) == 0
    assert run(adapters, "--task", "math", *math, names=["seed_1", "seed_2", "fused"]) == 0
    found, once = (json.loads(Path(folder, "results.json").read_text()) for folder in ("evaluation", "once"))
    assert found == once
    assert list(found["tasks"]) == ["gsm8k", "math"]


def test_what_was_generated_otherwise_is_not_mixed(adapters, capsys):
    assert run(adapters) == 0
    assert run(adapters, tokens="13") == 2
    assert "tasks.gsm8k.max_new_tokens = 12, now it is 13; repeat" in capsys.readouterr().err
    assert run(adapters, "--prompt_style", "plain") == 2
    assert "prompt" in capsys.readouterr().err
    Path("gsm8k.jsonl").write_text(json.dumps(ROWS[3]) + "\n")
    assert run(adapters) == 2
    assert "to another prompt for item 0 of gsm8k" in capsys.readouterr().err


def test_prompts_are_those_of_training(adapters, tmp_path, capsys, monkeypatch):
    for name in ("seed_1", "seed_2"):
        shutil.copytree(adapters / name, tmp_path / "own" / name)
        record = {"style": "mine", "templates": {"user": "Q: {content}\n", "generation": "A:"}, "eos_token": "<eos>"}
        (tmp_path / "own" / name / "prompt.json").write_text(json.dumps(record | {"add_special_tokens": False}))
    seen = []

    class Spy:
        prompt_record = staticmethod(prompts.prompt_record)

        @staticmethod
        def render(style, turns):
            seen.append(prompts.render(style, turns))
            return seen[-1]

    words = ["--task", "gsm8k", "--task_path", "gsm8k=gsm8k.jsonl", "--max_new_tokens", "2", "--limit", "1"]
    words += ["--adapter", str(tmp_path / "own" / "seed_1"), "--adapter", f"other={adapters / 'seed_2'}"]
    monkeypatch.setattr("seedlora.cli.evaluate.prompts", Spy)
    assert main(["evaluate", *words, "--dtype", "float32"]) == 0
    assert "Q: What is 1 + 1?\nA:" in seen
    assert any(text.endswith("### Instruction:\nWhat is 1 + 1?\n\n### Response:") for text in seen)
    shown = " ".join(capsys.readouterr().out.split())
    assert "mine, of its training (1), alpaca, by choice (1)" in shown
    assert "vs seed_1" in shown


def test_json_is_printed_and_nothing_else(adapters, capsys):
    assert run(adapters, "--json", "--limit", "2", "--against", "seed_1") == 0
    found = json.loads(capsys.readouterr().out)["paper"]
    assert set(found["tasks"]["gsm8k"]["differences"]) == {"seed_2", "fused"}
    assert found["tasks"]["gsm8k"]["differences"]["fused"]["seed_1"]["p_value_holm"] == 1.0


def test_dora_is_scored_one_by_one_as_peft_computes_it(tiny_llama, adapters, tmp_path, capsys):
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, use_dora=True, init_lora_weights=False, target_modules=["v_proj"])
    model = get_peft_model(load_model(tiny_llama, dtype=torch.float32), config).eval()
    model.save_pretrained(tmp_path / "dora")
    assert run(adapters, "--adapter", str(tmp_path / "dora"), "--with_base", names=["seed_1"]) == 0
    assert "one adapter after the other, since they cannot be stacked" in capsys.readouterr().out
    tokenizer = load_tokenizer(tiny_llama)
    for sample in samples():
        if sample["adapter"] == "dora":
            question = ROWS[int(sample["item"])]["question"]
            ids = tokenizer(prompts.render("alpaca", question) + " Let's think step by step.", return_tensors="pt")
            said = model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[
                0, ids["input_ids"].shape[1] :
            ]
            assert sample["text"] == tokenizer.decode(said, skip_special_tokens=True)
    stacked = {(s["adapter"], s["item"]): s["text"] for s in samples()}
    assert run(adapters, "--with_base", "--out", "again", names=["seed_1"]) == 0
    for sample in samples("again"):
        assert stacked[sample["adapter"], sample["item"]] == sample["text"]


@torch.no_grad()
def trained_by_peft(base, folder, seed, **config):
    """A folder that PEFT saved after a step of training, and the logits that its model had then."""
    options = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "up_proj", "down_proj"], **config}
    model = get_peft_model(load_model(base, dtype=torch.float32), LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return model.eval()(input_ids=ASKED).logits


ASKED = torch.arange(24).view(2, 12)
PISSA = {"init_lora_weights": "pissa"}


@torch.no_grad()
@pytest.mark.parametrize(
    ("kinds", "stacked"),
    [
        ([PISSA, PISSA], True),
        ([PISSA, {}, {"init_lora_weights": "olora", "use_rslora": True, "rank_pattern": {"q_proj": 2}}], True),
        ([PISSA, {"use_dora": True}], False),
        ([PISSA | {"use_dora": True, "rank_pattern": {"q_proj": 2}}, PISSA | {"modules_to_save": ["lm_head"]}], False),
    ],
    ids=["two PiSSA", "PiSSA, LoRA, OLoRA", "PiSSA beside DoRA", "PiSSA that is more"],
)
def test_nobody_is_scored_on_a_base_that_another_changed(kinds, stacked, tiny_llama, tmp_path):
    wanted = {"base": load_model(tiny_llama, dtype=torch.float32)(input_ids=ASKED).logits}
    folders = {f"a{i}": tmp_path / str(i) for i in range(len(kinds))}
    for i, (name, folder) in enumerate(folders.items()):
        wanted[name] = trained_by_peft(tiny_llama, folder, i, **kinds[i])
    model, tokenizer = load_model(tiny_llama, dtype=torch.float32).eval(), load_tokenizer(tiny_llama)
    generator = make_folder_generator(model, tokenizer, folders, base=WeightFiles(tiny_llama))
    assert isinstance(generator, OneByOneGenerator) != stacked
    for name in [*wanted, *reversed(wanted)]:
        generator.route([name])
        torch.testing.assert_close(generator.model(input_ids=ASKED).logits, wanted[name], atol=2e-5, rtol=1e-4)
        assert name == "base" or (wanted[name] - wanted["base"]).abs().max() > 0.01


@pytest.mark.parametrize("kind", [{}, PISSA, {"use_dora": True}])
def test_broken_folders_are_not_handed_to_peft(kind, tiny_llama, adapters, tmp_path, capsys):
    trained_by_peft(tiny_llama, tmp_path / "a", 1, **kind)
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0] = float("nan")
    save_file(tensors, file)
    capsys.readouterr()  # bars of the models' saving
    assert run(adapters, "--adapter", str(tmp_path / "a")) == 2
    error = capsys.readouterr().err
    assert "holds NaN or infinity" in error
    assert error.count("\n") == 1
    assert not Path("evaluation").exists()


BAD = [
    (["--task", "gsm9k"], "Unknown task 'gsm9k'; choose from gsm8k, math"),
    (["--task", ""], "--task is missing"),
    (["--limit", "0"], "error: limit must be at least 1, got 0"),
    (["--task", "math", "--task_path", "math=nowhere.jsonl"], "nowhere.jsonl does not exist"),
    (["--task_path", "math=gsm8k.jsonl"], "task_path names 'math', which is not asked for; asked for are gsm8k"),
    (["--task", "boolq"], "task boolq needs its test file; give it by task_path"),
    (["--task", "math", "--task_path", "math=gsm8k.jsonl"], "gsm8k.jsonl, line 1: no text in field 'solution' or"),
    (["--against", "fuse"], "--against 'fuse' is not scored; there are seed_1, seed_2, fused"),
    (["--adapter", "nowhere"], "nowhere is no folder"),
    (["--adapter", "seed_1=."], "adapter name 'seed_1' is given twice; name adapters by --adapter NAME=DIR"),
    (["--prompt_style", "alpacca"], "Unknown prompt style 'alpacca'"),
    (["--base_model", "./nowhere"], "Base model './nowhere' does not exist"),
    (["--without_sandbox"], "add execute_code"),
    (["--batch_size", "0"], "batch_size must be at least 1"),
    (["--concurrency", "4"], "--concurrency would change nothing: only --endpoint reads it"),
    (["--timeout", "5"], "--timeout would change nothing: only --endpoint reads it"),
    (["--lm_eval_path", "."], "--lm_eval_path would change nothing: only --lm_eval reads it"),
    (["--endpoint", "http://x", "--batch_size", "4"], "--batch_size would change nothing: --endpoint asks a server"),
    (["--endpoint", "http://x", "--dtype", "float16"], "--dtype would change nothing: --endpoint asks a serv"),
    (["--endpoint", "localhost:8000"], "is no address of a server; one is http://localhost:8000"),
]


@pytest.mark.parametrize(
    "words",
    [
        ["--max_new_tokens", "9"],
        ["--prompt_style", "plain"],
        ["--execute_code"],
        ["--against", "seed_1"],
    ],
)
def test_options_of_tasks_are_not_taken_for_the_harness(adapters, words, capsys):
    assert main(["evaluate", "--adapter", str(adapters / "seed_1"), "--lm_eval", "mmlu", *words]) == 2
    assert f"{words[0]} would change nothing: only --task reads it" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_input_is_one_sentence(adapters, words, message, capsys):
    assert run(adapters, *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("evaluation").exists()
