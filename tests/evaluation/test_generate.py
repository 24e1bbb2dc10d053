"""Stacked generation against transformers' own, with PEFT's own forward, one adapter and one prompt at a time."""

from __future__ import annotations

import pytest
import torch

from seedlora.evaluation.generate import LENGTH, STOPPED, Prompt, StackGenerator, cut_at_stop, generate_greedily
from seedlora.model.loading import eval_mode
from tests.helpers.models import built

SEEDS = (11, 42, 202)
PROMPTS = ["a", "What is 12 + 30?\n", "x" * 40, "Say it again.", "é ü"]


@pytest.fixture(scope="module")
def module(tiny_llama):
    found = built(tiny_llama, *SEEDS)
    # A random model repeats itself; an end token that is likely makes rows end at different times.
    with torch.no_grad():
        found.model.get_base_model().lm_head.weight[0] *= 3
    return found


def stacked(module, *, batch_size=16):
    names = {"base": None, **{f"seed_{seed}": f"seed_{seed}" for seed in SEEDS}}
    base = module.model.get_base_model()
    stack = module.stack
    return StackGenerator(
        base, module.tokenizer, route=stack.route, frozen=stack.frozen, adapters=names, batch_size=batch_size
    )


def texts(module, prompts, **options):
    found = {name: [None] * len(asked) for name, asked in prompts.items()}

    def put(name, i, generation):
        assert found[name][i] is None
        found[name][i] = generation

    stacked(module)(prompts, **options, on_done=put)
    return found


def tokens_of(module, names, rows, **options):
    module.stack.route(names)
    ended = lambda _row, said: said[-1] == 0  # noqa: E731
    with eval_mode(module.model):
        return generate_greedily(module.model.get_base_model(), rows, blocks=len(names), ended=ended, **options)


def peft_tokens(module, name, row, max_new_tokens):
    """transformers' generate with PEFT's forward."""
    layers = module.stack.layers.values()
    saved = [vars(layer).pop("forward") for layer in layers]
    try:
        with eval_mode(module.model), torch.no_grad():
            ids = torch.tensor([row])
            options = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": 0, "use_cache": True}
            if name is None:
                with module.model.disable_adapter():
                    out = module.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            else:
                module.model.set_adapter(name)
                out = module.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            return out[0, len(row) :].tolist()
    finally:
        for layer, forward in zip(layers, saved, strict=True):
            vars(layer)["forward"] = forward


def test_tokens_equal_transformers_generate_with_peft(module):
    names = [None, *(f"seed_{seed}" for seed in SEEDS)]
    rows = [module.tokenizer(text)["input_ids"] for text in PROMPTS]
    found = tokens_of(module, names, rows * len(names), max_new_tokens=40)
    wanted = [peft_tokens(module, name, row, 40) for name in names for row in rows]
    assert found == wanted
    lengths = {len(said) for said in found}
    assert len(lengths) > 3, "rows must end at different times, or leaving the batch is not tested"
    assert len({tuple(said) for said in found}) > 10, "the adapters must differ"


def test_what_a_row_says_does_not_depend_on_its_batch(module):
    rows = [module.tokenizer(text)["input_ids"] for text in PROMPTS]
    together = tokens_of(module, ["seed_11", "seed_42"], rows * 2, max_new_tokens=30)
    for name, block in (("seed_11", together[:5]), ("seed_42", together[5:])):
        for row, said in zip(rows, block, strict=True):
            assert tokens_of(module, [name], [row], max_new_tokens=30) == [said]
    reversed_ = tokens_of(module, ["seed_42", "seed_11"], rows[::-1] * 2, max_new_tokens=30)
    assert reversed_ == together[:4:-1] + together[4::-1]


def test_texts_are_given_by_adapter(module):
    prompts = {"base": [Prompt(t) for t in PROMPTS[:3]], "seed_42": [Prompt(t) for t in PROMPTS[1:4]]}
    found = texts(module, prompts, max_new_tokens=20, stops=())
    for name, asked in prompts.items():
        for prompt, generation in zip(asked, found[name], strict=True):
            said = peft_tokens(module, None if name == "base" else name, module.tokenizer(prompt.text)["input_ids"], 20)
            assert generation.text == module.tokenizer.decode(said, skip_special_tokens=True)
            assert generation.tokens == len(said)
            assert generation.finish == (STOPPED if said[-1] == 0 else LENGTH)


def test_a_stop_ends_the_row_and_is_cut_off(module):
    asked = {name: [Prompt(text) for text in PROMPTS] for name in ("base", "seed_11", "seed_42", "seed_202")}
    free = texts(module, asked, max_new_tokens=20, stops=())
    name, i = next((n, i) for n, said in free.items() for i, g in enumerate(said) if g.finish == LENGTH)
    whole = free[name][i].text
    found = texts(module, asked, max_new_tokens=20, stops=(whole[4:6],))[name][i]
    assert found.text == whole[: whole.index(whole[4:6])]
    assert found.finish == STOPPED
    assert found.tokens < 20
    assert cut_at_stop("one two three", ["three", "two"]) == "one "
    assert cut_at_stop("one", ["two"]) == "one"


def test_modes_return_and_the_random_state_is_untouched(module):
    module.model.train()
    module.model.get_base_model().lm_head.eval()
    modes, state = [m.training for m in module.model.modules()], torch.get_rng_state()
    texts(module, {"base": [Prompt("a")]}, max_new_tokens=2, stops=())
    assert [m.training for m in module.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert any(modes)


def test_a_prompt_longer_than_the_context_is_refused_before_generating(module):
    generate = stacked(module)
    generate._context = 10
    with pytest.raises(ValueError, match="a prompt has 40 tokens, but the model's context only 10"):
        generate.lengths([Prompt("a"), Prompt("x" * 40)])
    found = []
    prompts = {"seed_11": [Prompt("x" * 7)]}
    generate(prompts, max_new_tokens=20, stops=(), on_done=lambda name, i, generation: found.append(generation))
    assert found[0].tokens <= 3


def test_the_room_of_a_row_is_its_own(module):
    """Whatever is beside it in the batch, also where the model has no position after its context."""
    generate = stacked(module)
    generate._context = 45
    found = {}
    asked = [Prompt(text) for text in ("x" * 43, *PROMPTS)]
    generate({"seed_11": asked}, max_new_tokens=40, stops=(), on_done=lambda _, i, said: found.__setitem__(i, said))
    for i, prompt in enumerate(asked):
        row = module.tokenizer(prompt.text)["input_ids"]
        said = peft_tokens(module, "seed_11", row, min(40, 45 - len(row)))
        assert (found[i].tokens, found[i].text) == (
            len(said),
            module.tokenizer.decode(said, skip_special_tokens=True),
        )
    assert max(said.tokens for said in found.values()) > 2, "or the longest would do for all"


def test_rows_that_ended_need_no_positions_beyond_the_model_s(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8)).eval()
    rows = [[1, 2, 3, 4, 5, 6], [1]] * 2
    ended = lambda row, said: len(said) >= 8 - len(rows[row])  # noqa: E731
    said = generate_greedily(model, rows, blocks=1, max_new_tokens=7, ended=ended)
    assert [len(tokens) for tokens in said] == [2, 7, 2, 7]


def test_a_mixture_says_the_most_likely_token_of_the_mean(module):
    """Against one forward of every member over all that was said so far, token by token."""
    members = [f"seed_{seed}" for seed in SEEDS]
    generator = stacked(module)
    generator._mixtures = {"mean": members}
    found = {name: [None] * len(PROMPTS) for name in ("mean", "seed_42")}
    asked = {name: [Prompt(text) for text in PROMPTS] for name in found}
    put = lambda name, i, generation: found[name].__setitem__(i, generation)  # noqa: E731
    generator(asked, max_new_tokens=12, stops=(), on_done=put)
    assert [g.text for g in found["seed_42"]] == [
        g.text for g in texts(module, {"seed_42": asked["seed_42"]}, max_new_tokens=12, stops=())["seed_42"]
    ]
    for text, generation in zip(PROMPTS, found["mean"], strict=True):
        row = module.tokenizer(text)["input_ids"]
        said = []
        while len(said) < 12 and 0 not in said:
            p = 0
            with eval_mode(module.model), torch.no_grad():
                for name in members:
                    module.stack.route([name])
                    ids = torch.tensor([row + said])
                    p = p + module.model.get_base_model()(input_ids=ids).logits[0, -1].double().softmax(-1)
            said.append(int(p.argmax()))
        assert generation.tokens == len(said)
        assert generation.text == module.tokenizer.decode([t for t in said if t], skip_special_tokens=True)
