"""Answer prompts by an adapter of the stack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from seedlora.evaluation.generate import Generation, Prompt, StackGenerator

if TYPE_CHECKING:
    from peft import PeftModel

    from seedlora.adapters.stack import AdapterStack
    from seedlora.datamodules.rows import AskedRow


class Answer(TypedDict):
    """Hold the answer of an adapter to one row.

    Attributes:
        item: number of the row.
        adapter: who answers.
        prompt: what it was asked, as text.
        expected: the answer that the row holds.
        answer: what the adapter said, greedily.
        finish: `stop` if it ended by itself, `length` if it was cut.
    """

    item: int
    adapter: str
    prompt: str
    expected: str
    answer: str
    finish: str


@dataclass(frozen=True)
class Answerer:
    """Answers rows greedily by one adapter.

    Args:
        model: with the adapters.
        stack: of them.
        tokenizer: of the model.
        label: the adapter's name in answers.
        adapter: its name in the stack; None is the base model.
        max_new_tokens: of one answer.
    """

    model: PeftModel
    stack: AdapterStack
    tokenizer: Any
    label: str
    adapter: str | None
    max_new_tokens: int

    def __call__(self, rows: Sequence[AskedRow]) -> list[Answer]:
        """Answer rows, in their order.

        Raises:
            ValueError: if a prompt leaves no room in the model's context.
        """
        generator = StackGenerator(
            self.model.get_base_model(),
            self.tokenizer,
            route=self.stack.route,
            frozen=self.stack.frozen,
            adapters={self.label: self.adapter},
        )
        prompts = [Prompt(self._text(row.prompt, whole=True), ids=tuple(row.prompt.tolist())) for row in rows]
        generator.lengths(prompts)
        said: dict[int, Generation] = {}
        generator(
            {self.label: prompts},
            max_new_tokens=self.max_new_tokens,
            stops=(),
            on_done=lambda _, i, answer: said.update({i: answer}),
        )
        return [
            {
                "item": row.item,
                "adapter": self.label,
                "prompt": prompts[i].text,
                "expected": self._text(row.answer),
                "answer": said[i].text,
                "finish": said[i].finish,
            }
            for i, row in enumerate(rows)
        ]

    def _text(self, ids: np.ndarray, *, whole: bool = False) -> str:
        """Return the text of tokens, with the special ones if it is to be whole."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=not whole, clean_up_tokenization_spaces=False)
        return text
