"""The task ``rows``: rows of a user's own, scored by the answer that they hold and by its loss."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from seedlora.datamodules.conversations import Composed, Turn, check_turns
from seedlora.datamodules.prompts import compose, prompt_record
from seedlora.datamodules.row_forms import conversation_of, tools_of
from seedlora.datamodules.rows import IGNORED, TokenRows, joined, tokenise_in_chunks
from seedlora.evaluation.generate import StackGenerator
from seedlora.model.loading import eval_mode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Question(NamedTuple):
    """Hold what a row asks, and the answer that it has.

    Args:
        turns: all before the last answer.
        answer: the last one that is trained on.
    """

    turns: tuple[Turn, ...]
    answer: str


def question_of(row: Mapping[str, Any]) -> Question:
    """Return what a row asks, in any form that training reads.

    Raises:
        ValueError: if it holds no conversation, or one with tools, which cannot be asked here.
    """
    if tools_of(row):
        raise ValueError("column 'tools': a task of rows cannot hand tools to the model")
    *before, last = check_turns(conversation_of(row))
    return Question(tuple(before), last.content)


def token_f1(said: str, right: str) -> float:
    """Return the F1 of the words of two texts, as SQuAD counts it: without case, punctuation and articles.

    By torchmetrics.

    Example:
        >>> round(token_f1("The cat sat.", "a cat"), 4)
        0.6667
    """
    from torchmetrics.functional.text import squad

    given = [{"prediction_text": said, "id": "0"}]
    wanted = [{"answers": {"answer_start": [0], "text": [right]}, "id": "0"}]
    return squad(given, wanted)["f1"].item() / 100


def rouge_l(said: str, right: str) -> float:
    """Return ROUGE-L, the F-measure of the longest common subsequence of words.

    By torchmetrics, without stemming. Its own words are of a to z and digits alone; here they are of letters and digits
    of any script, so that a text in Greek has some.

    Example:
        >>> round(rouge_l("the cat sat", "The cat"), 4)
        0.8
    """
    from torchmetrics.functional.text import rouge_score

    found = rouge_score(said, right, rouge_keys="rougeL", normalizer=str.lower, tokenizer=_words)
    return found["rougeL_fmeasure"].item()


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text)


class AnswerLoss(NamedTuple):
    """Hold the loss of an answer: the sum over its tokens, the end token among them, and how many these are."""

    total: float
    tokens: int


@torch.no_grad()
def answer_losses(
    generator: StackGenerator, name: str, record: Mapping[str, Any] | str, questions: Sequence[Question]
) -> list[AnswerLoss]:
    """Return the loss of the right answers under one adapter, worded and masked as in training.

    Args:
        generator: holds model, tokenizer and adapters.
        name: of the adapter.
        record: of its prompt, or the name of a style.
        questions: with the answers.

    Raises:
        ValueError: if the style cannot write a question.
    """
    rows = _tokenised(questions, record, generator.tokenizer)
    losses, size = [], generator.batch_size
    device = generator.model.get_input_embeddings().weight.device
    with eval_mode(generator.model):
        for start in range(0, len(rows), size):
            ids, labels = rows.padded(range(start, min(start + size, len(rows))))
            generator.route([name])
            logits = generator.model(input_ids=ids.to(device)).logits[:, :-1].float()
            targets = labels[:, 1:].to(device)
            each = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
            ).view_as(targets)
            counts = targets.ne(IGNORED).sum(1)
            losses += [AnswerLoss(*pair) for pair in zip(each.double().sum(1).tolist(), counts.tolist(), strict=True)]
    return losses


def _tokenised(
    questions: Sequence[Question], record: Mapping[str, Any] | str, tokenizer: PreTrainedTokenizerBase
) -> TokenRows:
    """Tokenise questions with their answers; the last answer alone is scored."""
    if isinstance(record, str):
        record = prompt_record(record, tokenizer)
    texts = []
    for number, question in enumerate(questions):
        composed = compose(record, (*question.turns, Turn("assistant", question.answer)))
        texts.append((number, Composed(composed.text, composed.spans[-1:])))
    longest = int(np.iinfo(np.int32).max)
    return joined(tokenise_in_chunks(texts, tokenizer, record, max_length=longest))
