"""Make the study's small base model: a Llama of 1.3 million weights, trained on generated tasks other than the study's.

    python -m benchmarks.study.small_base runs/study/base    # about half an hour on one core

A cell of the study at the embedded model's 135 million weights takes an hour on two cores, and a difference between
ways to spend a budget shows in many cells or not at all. This model is a hundred times smaller: many can be had.
It has learned to read the wording of questions, to write digits, words and an end, and some arithmetic, from
:data:`FAMILIES`; the tasks that the study trains are none of them.

The weights follow from the seed, on one machine to the bit; on another they may differ a little, and with them
the study's numbers.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import reasoning_gym
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from seedlora.utils.progress import plain_console

END = "<|im_end|>"
VOCABULARY, WINDOW, ROWS, STEPS, WARM_UP, RATE = 512, 128, 48, 1500, 80, 4e-3
SEED = 20_000_000

#: Families of tasks with the options that keep their items short; none is a task of the study.
FAMILIES: dict[str, dict[str, object]] = {
    "basic_arithmetic": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "calendar_arithmetic": {},
    "count_bits": {"max_n": 1000},
    "count_primes": {"max_n": 200},
    "decimal_chain_sum": {"max_terms": 2, "max_digits": 2, "max_decimal_places": 1},
    "fraction_simplification": {"max_value": 50, "max_factor": 5},
    "gcd": {"max_value": 100},
    "lcm": {"max_value": 50},
    "number_filtering": {"max_numbers": 5},
    "number_sequence": {},
    "prime_factorization": {"max_value": 100},
    "products": {"max_digits": 2},
    "sentence_reordering": {"max_words_in_sentence": 6},
    "simple_geometry": {},
    "syllogism": {},
    "time_intervals": {},
    "word_sequence_reversal": {"max_words": 5},
}


def documents(size: int) -> Iterator[str]:
    """Give question, answer and end of ``size`` items of each family, the families in turns."""
    sets = [reasoning_gym.create_dataset(name, size=size, seed=SEED, **more) for name, more in FAMILIES.items()]
    for i in range(size):
        for items in sets:
            yield f"{items[i]['question']}\n{items[i]['answer']}{END}"


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Learn byte-level pairs from texts; each digit is a token of its own, as in SmolLM2's tokenizer."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, learner)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)


def windows(tokens: Tensor) -> Iterator[Tensor]:
    """Give batches of windows of all documents one behind the other, in a new order in each epoch."""
    rows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    draws = torch.Generator().manual_seed(SEED)
    while True:
        order = torch.randperm(len(rows), generator=draws)
        for start in range(0, len(rows) - ROWS + 1, ROWS):
            yield rows[order[start : start + ROWS]]


def make(folder: Path, *, size: int = 10_000, steps: int = STEPS) -> None:
    """Train tokenizer and model, and save them as Transformers does."""
    console = plain_console()
    texts = list(documents(size))
    tokenizer = train_tokenizer(iter(texts[: len(FAMILIES) * 500]))
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([token for document in ids for token in document])
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    console.print(f"{model.num_parameters():,} weights, {len(tokens):,} tokens, {steps} steps of {ROWS * WINDOW:,}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    for step, rows in zip(range(1, steps + 1), windows(tokens), strict=False):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            console.print(f"step {step}: loss {loss.item():.3f}", highlight=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    make(parser.parse_args().folder)
