"""The study: cells on a tiny model, resume after a kill, and a summary of made-up lines against numbers by hand."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM

from benchmarks import study
from benchmarks.study import Cell, Setting
from seedlora.adapters.reading import read_adapter
from seedlora.updates.factors import LoRAFactors

TASKS = {
    "chain_sum": {"num_train": 16, "num_val": 6, "num_test": 8},
    "leg_counting": {"task_options": {"max_animals": 3}, "num_train": 16, "num_val": 6, "num_test": 8},
}
CELL = Cell("chain_sum", 1e-2, (1, 2), 1)


@pytest.fixture
def setting(tiny_llama, tmp_path):
    return Setting(tmp_path / "work", tiny_llama, TASKS, Console(quiet=True))


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(study, "ADAPTERS_PER_FORWARD", 3)
    monkeypatch.setattr(study, "JOINT_SIZES", {})
    monkeypatch.setattr("seedlora.training.model_options.fast_dtype", lambda: torch.float32)  # on every machine


def test_a_cell_scores_what_peft_and_transformers_score(setting, tiny_llama, monkeypatch):
    """The loss of a seed, and of the ensemble, against a plain forward of PEFT with each seed's folder."""
    monkeypatch.setattr(study, "asks_all", lambda cell: True)
    line = json.loads(json.dumps(study.run_stack(CELL, setting)))
    assert study.cell_of(line) == CELL
    data = setting.data("chain_sum", setting.module(CELL))
    by_seed = []
    for seed in CELL.seeds:
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, setting.work / CELL.name / f"seed_{seed}").eval()
        losses = []
        for i in range(8):
            ids, labels = data.rows["test"].padded([i])
            with torch.no_grad():
                said = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
            kept = labels[:, 1:] != -100
            losses.append(-said.gather(2, ids[:, 1:, None])[..., 0][kept])
        by_seed.append(torch.cat(losses).double())
    expected = torch.stack(by_seed)
    test = line["test"]
    for seed, losses in zip(CELL.seeds, expected, strict=True):
        assert test[f"seed_{seed}"]["loss"] == pytest.approx(float(losses.mean()), abs=2e-5)
    ensemble = -(torch.exp(-expected).mean(0).log())
    assert test["ensemble"]["loss"] == pytest.approx(float(ensemble.mean()), abs=2e-5)
    assert test["mean seed"]["loss"] == pytest.approx(np.mean([test[f"seed_{s}"]["loss"] for s in (1, 2)]), abs=2e-5)
    assert test["soup"]["vs"]["mean seed"]["loss"][0] == pytest.approx(
        test["soup"]["loss"] - test["mean seed"]["loss"], abs=2e-5
    )
    chosen = line["chosen"]["gain p"]
    assert line["val"][chosen] == min(v for k, v in line["val"].items() if k == "soup" or "seedlora_gain" in k)
    assert not [label for label in test if "x its gain" in label or label.startswith("seed_1 x")]
    assert {"dare", "seed x scale", "agreement", "output gain, one"} <= test.keys()


def test_the_design_asks_each_question_on_each_task():
    cells = study.design()
    assert len(set(cells)) == len(cells) == 35
    assert [cell.task for cell in cells[:3]] == list(study.TASKS)
    assert list(map(study.asks_all, cells[:5])) == [True, True, True, False, False]
    assert sum(map(study.asks_all, cells)) == 4
    assert [cell.controls for cell in cells] == [False] * 32 + [True] * 3
    for turn in (cells[4:7], cells[7:10], cells[10:13]):
        assert {cell.task for cell in turn} == set(study.TASKS)
        assert [(cell.epochs, cell.vary) for cell in turn] == [(3, "both"), (1, "order"), (1, "both")]


def test_controls_are_trained_beside_the_seeds_of_the_same_stack(setting, tiny_llama):
    """Rank, length and score of the controls, the stack's folder shared with the cell without them."""
    plain = study.run_stack(CELL, setting)
    adapter = setting.work / CELL.name / "seed_1" / "adapter_model.safetensors"
    before = adapter.stat().st_mtime_ns
    line = json.loads(json.dumps(study.run_controls(replace(CELL, controls=True), setting)))
    assert adapter.stat().st_mtime_ns == before, "trained seeds are not trained again"
    test = line["test"]
    for label in ("seed_1", "seed_2", "mean seed", "soup", "seedlora"):
        assert test[label]["loss"] == pytest.approx(plain["test"][label]["loss"], abs=2e-5)
    wide = read_adapter(setting.work / "chain_sum_lr0.01_1ep_1_r16" / "seed_1")
    assert {factors.rank for factors in wide.layers.values()} == {16}
    alone = study.run_stack(Cell("chain_sum", 1e-2, (1,), 2), replace(setting, work=setting.work / "long"))
    assert test["long seed"]["loss"] == pytest.approx(alone["test"]["seed_1"]["loss"], abs=2e-5)
    assert test["best on validation"]["loss"] == test[min(line["val"], key=line["val"].get)]["loss"]
    assert set(line["chosen"]["greedy soup"]) <= {1, 2}
    assert test["wide seed"]["vs"]["soup"]["loss"][0] == pytest.approx(
        test["wide seed"]["loss"] - test["soup"]["loss"], abs=2e-5
    )
    with Console(record=True, width=200, quiet=False, file=io.StringIO()) as console:
        study.summary([line], console)
    assert "Controls: chain_sum_lr0.01_1ep_1-2_controls" in console.export_text()


def test_one_session_writes_to_a_file(setting, tmp_path):
    busy, free = tmp_path / "a.jsonl", tmp_path / "b.jsonl"

    def beside(*_):
        assert study.session([], free, setting) == 0, "another file of the same folder is free"
        with pytest.raises(ValueError, match="another session writes to .*a.jsonl"):
            study.session([], busy, setting)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(study, "run_stack", beside)
        study.session([CELL], busy, setting)
    assert study.session([], busy, setting) == 0


def test_a_session_goes_on_where_it_was_killed(setting, tmp_path, monkeypatch):
    results, cells = tmp_path / "results" / "cells.jsonl", [CELL, Cell("joint", 1e-2, (1, 2), 1)]
    real = study.train

    def killed(cell, *rest):
        real(cell, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        study.session(cells, results, setting)
    assert study.read_lines(results) == []
    monkeypatch.setattr(study, "train", real)
    adapter = setting.work / CELL.name / "seed_1" / "adapter_model.safetensors"
    before = adapter.stat().st_mtime_ns
    assert study.session(cells, results, setting, most=1) == 1
    assert adapter.stat().st_mtime_ns == before, "trained seeds are not trained again"
    first = results.read_text()
    assert study.session(cells, results, setting) == 1
    assert results.read_text().startswith(first)
    assert study.session(cells, results, setting) == 0
    joint = study.read_lines(results)[1]
    own = joint["test"]["only chain_sum"]["chain_sum"]
    assert own == {key: study.read_lines(results)[0]["test"]["seed_1"][key] for key in ("loss", "match")}
    assert study.read_lines(results)[0]["seconds"]["train"] is None, "part of it was done in the session before"


def factors(seed=0, n=3, r=2, d=7, k=5):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return LoRAFactors(draw(n, r, k), draw(n, d, r))


def test_agreement_is_the_weighted_svd_of_the_mean():
    stack = factors(k=9)
    updates = stack.dense().numpy()
    u, s, vh = np.linalg.svd(updates.mean(0))
    terms = []
    for i in range(6):
        own = np.array([u[:, i] @ update @ vh[i] for update in updates])
        assert own.mean() == pytest.approx(s[i])
        terms.append(own.mean() ** 2 / (own**2).mean() * s[i] * np.outer(u[:, i], vh[i]))
    weighted = sum(terms)
    for norm, length in (
        ("mean", np.linalg.norm(updates.mean(0))),
        ("seeds", np.mean([np.linalg.norm(update) for update in updates])),
    ):
        expected = weighted * length / np.linalg.norm(weighted)
        assert np.allclose(study.agreement(stack, norm=norm).dense()[0].numpy(), expected, atol=1e-10)


def test_agreement_keeps_the_laws_of_the_methods():
    stack = factors()
    found = study.agreement(stack).dense()[0]
    order, gauge = [2, 0, 1], factors(seed=1, n=3, r=2, d=2, k=2).B
    assert torch.allclose(study.agreement(LoRAFactors(stack.A[order], stack.B[order])).dense()[0], found)
    split = LoRAFactors(gauge @ stack.A, stack.B @ gauge.inverse())
    assert torch.allclose(study.agreement(split).dense()[0], found)
    assert torch.allclose(study.agreement(LoRAFactors(stack.A, -3 * stack.B)).dense()[0], -3 * found)
    same = LoRAFactors(stack.A[:1].expand(3, -1, -1), stack.B[:1].expand(3, -1, -1))
    one = LoRAFactors(stack.A[:1], stack.B[:1])
    for norm in ("mean", "seeds"):
        assert torch.allclose(study.agreement(same, norm=norm).dense(), one.dense())
        assert torch.allclose(study.agreement(one, norm=norm).dense(), one.dense())
    nothing = LoRAFactors(stack.A, 0 * stack.B)
    assert not study.agreement(nothing, norm="seeds").dense().any()


def test_outputs_are_matched_on_the_prompts_alone(setting):
    """The gain of a layer against dense products with the layer's inputs, taken from the model by another hook."""
    module = setting.module(CELL)
    data = setting.data("chain_sum", module)
    stacks = study.stack_of(study.train(CELL, setting, module, data))
    soup = study.merge_stacks(stacks, study.make_rule("soup"))
    ids, labels = data.rows["val"].padded(range(4))
    _, outputs = study.prompt_logits(module, {"soup": soup}, ids, labels, stacks)
    gains = study.output_gains(outputs)
    path = "model.layers.1.mlp.down_proj"
    seen = []
    hook = module.stack.layers[path].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    module.stack.load("soup", soup)
    module.stack.route(["soup"])
    with torch.no_grad():
        module.model(input_ids=ids)
    hook.remove()
    prompts = [seen[0][i, : int((labels[i] != -100).nonzero()[0])] for i in range(4)]
    x = torch.cat(prompts).double()
    updates = stacks[path].dense().double()
    lengths = [(x @ update.T).norm() for update in updates]
    assert gains[path] == pytest.approx(float(sum(lengths) / 2 / (x @ updates.mean(0).T).norm()), rel=2e-2)
    changed = labels.clone()
    changed[labels != -100] = 1
    others = ids.clone()
    others[labels != -100] = 1
    _, same = study.prompt_logits(module, {"soup": soup}, others, changed, stacks)
    assert study.output_gains(same) == pytest.approx(gains, rel=1e-5), "answers take no part"


def line(task, seeds, epochs, mean_seed, soup, seedlora, cosine):
    """A made-up line; losses are given, matches are 1 - loss / 2."""
    losses = {"base": 4.0, "mean seed": mean_seed, "soup": soup, "seedlora": seedlora}
    losses |= {f"seed_{seed}": mean_seed + 0.1 * (i - 1) for i, seed in enumerate(seeds)}
    losses |= dict.fromkeys(study._SHOWN, soup) | {"seedlora": seedlora}

    def versus(label, reference):
        d = losses[label] - losses[reference]
        return {"loss": [d, d - 0.05, d + 0.05], "match": [-d / 2, -d / 2 - 0.1, -d / 2 + 0.1]}

    test = {
        label: {
            "loss": loss,
            "match": 1 - loss / 2,
            "vs": {r: versus(label, r) for r in ("mean seed", "soup") if r != label and not label.startswith("seed_")},
        }
        for label, loss in losses.items()
    }
    cell = {"task": task, "rate": 2e-3, "seeds": list(seeds), "epochs": epochs, "vary": "both"}
    seconds = {"train": 60, "score": 30}
    chosen = {"gain p": "soup", "soup x scale": "soup x 1.25", "output gain": 1.353}
    return {
        **{"cell": cell, "n": {"test": 9}, "seconds": seconds, "cosine": cosine, "test": test},
        **{"rho": 0.64, "chosen": chosen},
    }


LINES = [
    line("chain_sum", (1, 2, 3), 1, 1.0, 0.9, 1.2, 0.1),
    line("chain_sum", (4, 5, 6), 1, 1.2, 1.0, 0.9, 0.3),
    line("leg_counting", (1, 2, 3), 1, 0.8, 0.5, 0.5, 0.5),
    line("chain_sum", (1, 2, 3), 3, 0.7, 0.6, 0.8, 0.2),
]


def test_pooled_differences_by_hand():
    # Clusters: chain_sum with the first triple (two cells), with the second, leg_counting: means -.1, -.2, -.3.
    found = study.compare(LINES, "soup", "mean seed", "loss")
    assert found.mean == pytest.approx(-0.2)
    half = 4.302653 * 0.1 / math.sqrt(3)  # t of 2 degrees of freedom
    assert (found.low, found.high) == pytest.approx((-0.2 - half, -0.2 + half))
    assert (found.clusters, found.cells, found.less, found.more) == (3, 4, 4, 0)
    found = study.compare(LINES, "seedlora", "soup", "loss")
    # .3 and .2 in the first cluster, -.1, 0: the interval over items leaves 0 out where the size is above .05
    assert found.mean == pytest.approx((0.25 - 0.1 + 0) / 3)
    assert (found.less, found.more) == (1, 2)
    assert study.compare(LINES, "soup", "soup", "loss") is None
    alone = study.compare(LINES[:1], "soup", "mean seed", "match")
    assert (alone.mean, alone.low, alone.high) == pytest.approx((0.05, -0.05, 0.15)), "over its items"


def test_expected_seconds_by_hand():
    # three times the epochs of the two cells of one epoch: 3 * 60 + 30, twice; the cell of three epochs took 90
    assert study.seconds_of(Cell("chain_sum", 1e-3, (7, 8, 9), 3), LINES) == 210
    assert study.seconds_of(Cell("gsm_symbolic", 1e-3, (7, 8, 9), 3), LINES) is None


def test_equal_budget_by_hand():
    # only the first triple of chain_sum has both budgets: .9 of soup less .7 of the seeds with all epochs
    mean, low, _, cells = study.against_one_seed(LINES, "soup", "loss")
    assert (mean, cells) == (pytest.approx(0.2), 1)
    assert math.isnan(low)


def test_normalised_scores_by_hand():
    test = {
        "base": {"a": {"loss": 4.0, "match": 0.0}, "b": {"loss": 3.0, "match": 0.0}},
        "only a": {"a": {"loss": 2.0, "match": 0.5}, "b": {"loss": 3.5, "match": 0.0}},
        "only b": {"a": {"loss": 5.0, "match": 0.0}, "b": {"loss": 2.0, "match": 0.0}},
        "soup": {"a": {"loss": 3.0, "match": 0.2}, "b": {"loss": 2.5, "match": 0.1}},
    }
    found = study.normalised(test, "soup")
    assert found["a"] == {"match": pytest.approx(0.4), "kept": pytest.approx(0.5)}
    assert found["b"]["kept"] == pytest.approx(0.5)
    assert math.isnan(found["b"]["match"])
    assert study.normalised(test, "only b")["a"]["kept"] == pytest.approx(-0.5)


def test_cosines_by_what_is_shared_by_hand():
    def vectors(*rows):
        return {"layer": LoRAFactors(torch.tensor(rows)[:, None], torch.ones(len(rows), 1, 1))}

    found = study.cosines_of({"a": vectors([1.0, 0.0], [0.0, 1.0]), "b": vectors([2.0, 0.0], [3.0, 3.0])})
    half = math.sqrt(0.5)
    assert found == {
        "task": pytest.approx((0 + half) / 2, abs=1e-5),  # a0 a1, b0 b1
        "seed": pytest.approx((1 + half) / 2, abs=1e-5),  # a0 b0, a1 b1
        "neither": pytest.approx((half + 0) / 2, abs=1e-5),  # a0 b1, a1 b0
    }


def test_the_summary_prints_and_draws(tmp_path):
    console = Console(record=True, width=200, quiet=False, file=(tmp_path / "out").open("w"))
    study.summary(LINES, console, tmp_path)
    shown = " ".join(console.export_text().split())
    gains, alone = "│ 1.56 │ 1.35 │", "-0.100 [-0.150 to -0.050]"
    for text in ("-0.200 (-0.448 to +0.048)", alone, "1 / 1 of 3", "chain_sum_lr0.002_1ep_1-2-3", gains, "figure:"):
        assert text in shown, text
    first = (tmp_path / "by_cosine.svg").read_bytes()
    assert all(text in first for text in (b"<!-- chain_sum -->", b"<!-- order only -->", b"<!-- seedlora -->"))
    study.summary(LINES, console, tmp_path)
    assert (tmp_path / "by_cosine.svg").read_bytes() == first


def test_the_summary_groups_what_varies_and_pools_the_controls(tmp_path):
    order, init = (line("chain_sum", (1, 2, 3), 1, 1.0, soup, 0.9, 0.5) for soup in (0.8, 0.7))
    order["cell"]["vary"], init["cell"]["vary"] = "order", "init"
    trained = [
        line(task, (1, 2, 3), 1, 1.0, soup, 1.2, 0.1) for task, soup in (("chain_sum", 0.9), ("leg_counting", 0.7))
    ]
    for control in trained:
        control["cell"]["controls"], control["chosen"] = True, {"greedy soup": [2, 1]}
    console = Console(record=True, width=200, file=(tmp_path / "out").open("w"))
    study.summary([order, *LINES, init, *trained], console)
    shown = console.export_text()
    rows = shown[shown.index("What a seed decides") : shown.index("intervals over items", shown.index("What a seed"))]
    alike = [[part.strip() for part in row.split("│")[2:5]] for row in rows.splitlines() if "chain_sum" in row]
    assert alike == [
        ["both", "0.100", "-0.100 [-0.150 to -0.050]"],
        ["init", "0.500", "-0.300 [-0.350 to -0.250]"],
        ["order", "0.500", "-0.200 [-0.250 to -0.150]"],
    ]
    pooled = shown[shown.index("Differences, controls") :]
    half = 12.706205 * 0.1 / 1  # t of 1 degree of freedom; the means are -.1 and -.3
    assert f"-0.200 ({-0.2 - half:+.3f} to {-0.2 + half:+.3f})" in pooled
