"""Generate greedily by several adapters at once.

Shape legend: ``N`` adapters, ``b`` prompts of each, ``M = N b`` rows (adapter after adapter), ``T`` tokens so far.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from seedlora.model.loading import check_token_ids, eval_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STOPPED, LENGTH = "stop", "length"


class Prompt(NamedTuple):
    """A text to go on from, and whether the tokenizer puts its own tokens (a bos, for example) around it."""

    text: str
    add_special_tokens: bool = True


class Generation(NamedTuple):
    """The answer of a model to a prompt: the text before the first stop, its tokens, and why it ended."""

    text: str
    tokens: int
    finish: str


#: Called with an adapter's name, the place of the prompt among its prompts, and what it said.
OnDone = Callable[[str, int, Generation], object]
#: Called with an adapter's name, the place of the prompt among its prompts, and what it has said so far.
OnText = Callable[[str, int, str], object]


class Generator(Protocol):
    """Answers prompts greedily; in this process, or on a server."""

    #: Most prompts of one adapter that should be handed over at once.
    batch_size: int

    def lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        """Return the length of each prompt, in tokens or what stands for them; raises ``ValueError`` for
        one too long.
        """
        ...

    def __call__(
        self,
        prompts: Mapping[str, Sequence[Prompt]],
        *,
        max_new_tokens: int,
        stops: Sequence[str],
        on_done: OnDone,
    ) -> None:
        """Answer each adapter's prompts, of which all adapters have equally many; hand each answer to ``on_done``."""
        ...


class _Limits(NamedTuple):
    """The end of an answer: after so many tokens, or before one of these texts."""

    max_new_tokens: int
    stops: Sequence[str]


class StackGenerator:
    """Generates with the adapters of one model, all of them in one forward.

    Args:
        model: a causal language model of transformers, the adapters' base.
        tokenizer: of the model.
        route: ``route(names)`` says whose rows the blocks of the next forwards are:
            :meth:`seedlora.adapters.stack.AdapterStack.route`, for example.
        frozen: a context in which no adapter changes: :meth:`seedlora.adapters.stack.AdapterStack.frozen`.
        adapters: what each name given to the call is for ``route``.
        mixtures: names that answer by the mean of several adapters' next-token probabilities: their names. Each is a
            pass of its own, in which its adapters read what the mixture said.
        batch_size: prompts of one adapter in one forward.
        adapters_per_forward: adapters in one forward.

    A row is padded on the left to the longest prompt of its batch. Finished rows leave the batch when they are a
    quarter of it; an adapter whose rows end early keeps as many as the slowest, because blocks have equal length.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        route: Callable[[Sequence[str | None]], object],
        frozen: Callable[[], AbstractContextManager[object]] = nullcontext,
        adapters: Mapping[str, str | None],
        mixtures: Mapping[str, Sequence[str]] | None = None,
        batch_size: int = 16,
        adapters_per_forward: int = 8,
    ) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self._adapters_per_forward = adapters_per_forward
        self._mixtures = dict(mixtures or {})
        self._route, self._frozen, self._adapters = route, frozen, adapters
        self._context = int(getattr(model.config, "max_position_embeddings", None) or 2**31)
        config = getattr(model, "generation_config", None)
        ends = getattr(config, "eos_token_id", None)
        self._ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    @property
    def mixtures(self) -> Sequence[str]:
        """Return the names that answer by the mean of several adapters' probabilities."""
        return list(self._mixtures)

    def lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        """Return the tokens of each prompt.

        Raises:
            ValueError: if one leaves no room in the model's context.
        """
        lengths = [len(self._encode(prompt)) for prompt in prompts]
        if (longest := max(lengths, default=0)) >= self._context:
            raise ValueError(f"a prompt has {longest} tokens, but the model's context only {self._context}")
        return lengths

    def __call__(
        self,
        prompts: Mapping[str, Sequence[Prompt]],
        *,
        max_new_tokens: int,
        stops: Sequence[str],
        on_done: OnDone,
        on_text: OnText | None = None,
        pick: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Answer the prompts, as :class:`Generator` says: plain adapters in stacks, then each mixture by itself.

        Args:
            prompts: by adapter.
            max_new_tokens: of one answer.
            stops: texts that end an answer.
            on_done: called with each answer.
            on_text: called with the text of an answer after each of its tokens, an end of half a character left out.
            pick: as in :func:`generate_greedily`, for plain adapters.
        """
        limits = _Limits(max_new_tokens, stops)
        rows = {name: [self._encode(prompt) for prompt in prompts[name]] for name in prompts}
        plain = [name for name in prompts if name not in self._mixtures]
        for start in range(0, len(plain), self._adapters_per_forward):
            names = plain[start : start + self._adapters_per_forward]
            blocks = [rows[name] for name in names]
            self._answer(names, blocks, limits, on_done, names=names, on_text=on_text, pick=pick)
        for name, members in self._mixtures.items():
            if name in prompts:
                pick = partial(most_likely_in_the_mean, blocks=len(members))
                self._answer(members, [rows[name]] * len(members), limits, on_done, names=[name], pick=pick)

    def _answer(
        self,
        adapters: Sequence[str],
        prompts: Sequence[Sequence[list[int]]],
        limits: _Limits,
        on_done: OnDone,
        *,
        names: Sequence[str],
        on_text: OnText | None = None,
        pick: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Go on from each adapter's prompts, all in one stack.

        Args:
            adapters: one for each block of rows.
            prompts: token ids of each adapter's prompts, equally many of each.
            limits: of an answer.
            on_done: called with each answer of the first blocks, as many as there are names.
            names: whose answers these are.
            on_text: called with what was said so far.
            pick: as in :func:`generate_greedily`.
        """
        stops = limits.stops
        per_adapter = len(prompts[0])
        assert all(len(block) == per_adapter for block in prompts)
        rows = [row for block in prompts for row in block]
        # A token is at least a byte, so a stop that was just completed is within this many.
        window = max((len(stop.encode()) for stop in stops), default=0) + 1

        room = [self._context - len(row) for row in rows]

        def ended(row: int, said: list[int]) -> bool:
            if on_text is not None and row // per_adapter < len(names):
                text = self._decode(rows[row], [token for token in said if token not in self._ends])
                on_text(names[row // per_adapter], row % per_adapter, cut_at_stop(text.rstrip("\ufffd"), stops))
            if said[-1] in self._ends or len(said) >= room[row]:
                return True
            return bool(stops) and any(stop in self._decode(rows[row], said, last=window) for stop in stops)

        def done(row: int, said: list[int]) -> None:
            text = self._decode(rows[row], [token for token in said if token not in self._ends])
            cut = cut_at_stop(text, stops)
            finish = STOPPED if said[-1] in self._ends or len(cut) < len(text) else LENGTH
            if row // per_adapter < len(names):
                on_done(names[row // per_adapter], row % per_adapter, Generation(cut, len(said), finish))

        limit = min(limits.max_new_tokens, max(room))
        with eval_mode(self.model), self._frozen():
            self.route(adapters)
            generate_greedily(
                self.model, rows, blocks=len(adapters), max_new_tokens=limit, ended=ended, on_done=done, pick=pick
            )

    def route(self, names: Sequence[str]) -> None:
        """Send the next forwards through these adapters, a block of rows each."""
        self._route([self._adapters[name] for name in names])

    def _encode(self, prompt: Prompt) -> list[int]:
        ids: list[int] = self.tokenizer(prompt.text, add_special_tokens=prompt.add_special_tokens)["input_ids"]
        rows = self.model.get_input_embeddings().weight.shape[0]
        check_token_ids(max(ids, default=0), rows, self.tokenizer.name_or_path)
        # Some tokenizers end every text; the answer would then follow the end.
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids

    def _decode(self, prompt: list[int], said: list[int], *, last: int | None = None) -> str:
        """Return the text of ``said`` as it follows the prompt: some tokenizers drop a space at the start of a text."""
        new = said if last is None else said[-last:]
        context = (prompt + said)[: len(prompt) + len(said) - len(new)][-4:]
        decode = self.tokenizer.decode
        before = decode(context, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        after = decode([*context, *new], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return after[len(before) :]


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first of the stops."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


@torch.no_grad()
def generate_greedily(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    *,
    blocks: int,
    max_new_tokens: int,
    ended: Callable[[int, list[int]], bool],
    on_done: Callable[[int, list[int]], object] = lambda _row, _said: None,
    pick: Callable[[Tensor], Tensor] | None = None,
) -> list[list[int]]:
    """Append the most likely token to each row, again and again.

    What a row says does not depend on the rows beside it, except where two tokens are as likely as each other up to the
    rounding of the products.

    Args:
        model: called with ``input_ids``, ``attention_mask``, ``position_ids`` and a key-value cache.
        rows: token ids of the prompts.
        blocks: the batch is this many blocks of equally many rows, at any time.
        max_new_tokens: at most so many are said.
        ended: ``ended(row, said)`` after each token of a row: whether that was the last one.
        on_done: called with each row's number and tokens as soon as it is complete.
        pick: a token of each row from the logits, of shape (M, V). Default: the most likely.

    Returns:
        The tokens said, the last one included.
    """
    from transformers import DynamicCache

    assert rows
    assert len(rows) % blocks == 0
    device = model.get_input_embeddings().weight.device
    batch = _Batch.of_prompts(rows, device)
    cache = DynamicCache(config=model.config)
    options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    said: list[list[int]] = [[] for _ in rows]
    # Rows that have ended stay in the batch for a while; the model may have no positions for what they would say.
    last = int(getattr(model.config, "max_position_embeddings", None) or 2**31) - 1
    for _ in range(max_new_tokens):
        logits = model(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            position_ids=batch.positions(last),
            past_key_values=cache,
            use_cache=True,
            **options,
        ).logits
        next_M = logits[:, -1].argmax(-1) if pick is None else pick(logits[:, -1])
        for row, token in zip(batch.rows, next_M.tolist(), strict=True):
            if row in batch.alive:
                said[row].append(token)
                if ended(row, said[row]):
                    batch.alive.discard(row)
                    on_done(row, said[row])
        if not batch.alive:
            break
        if (kept := _places_to_keep(batch.rows, batch.alive, blocks)) is not None:
            index = torch.tensor(kept, device=device)
            cache.batch_select_indices(index)
            next_M = next_M[index]
            batch.keep(kept, index)
        batch.append(next_M)
    for row in sorted(batch.alive):
        on_done(row, said[row])
    return said


@dataclass
class _Batch:
    """The rows that are being answered, and what the next forward is given.

    Args:
        ids: tokens that the model has not seen yet, shape (M, 1), of the prompts (M, T).
        mask: over all tokens so far, shape (M, T): 0 where a row is padded.
        rows: the numbers of the rows in the batch, in its order.
        alive: those of them that have not ended.
    """

    ids: Tensor
    mask: Tensor
    rows: list[int]
    alive: set[int]

    @classmethod
    def of_prompts(cls, rows: Sequence[Sequence[int]], device: torch.device) -> _Batch:
        """Put prompts into a batch, padded on the left to the longest."""
        length = max(map(len, rows))
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, length - len(row) :] = torch.tensor(row)
            mask[i, length - len(row) :] = 1
        return cls(ids.to(device), mask.to(device), list(range(len(rows))), set(range(len(rows))))

    def positions(self, last: int) -> Tensor:
        """Return the positions of the new tokens, none above ``last``."""
        return (self.mask.cumsum(1) - 1).clamp(0, last)[:, -self.ids.shape[1] :]

    def keep(self, places: Sequence[int], index: Tensor) -> None:
        """Keep the rows at these places of the batch alone; ``index`` holds them as a tensor."""
        self.mask = self.mask[index]
        self.rows = [self.rows[place] for place in places]

    def append(self, next_M: Tensor) -> None:
        """Go on with one more token of each row."""
        self.ids = next_M[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], dim=1)


def most_likely_in_the_mean(logits_MV: Tensor, *, blocks: int) -> Tensor:
    """Return, for each row of a block, the most likely token in the mean of all blocks' probabilities, for
    all blocks.
    """
    p_NbV = logits_MV.float().softmax(-1).unflatten(0, (blocks, -1))
    return p_NbV.mean(0).argmax(-1).repeat(blocks)


def _places_to_keep(active: Sequence[int], alive: set[int], blocks: int) -> list[int] | None:
    """Return places in the batch to keep, equally many of each block; ``None`` while that saves less than a quarter."""
    size = len(active) // blocks
    places = [range(i * size, (i + 1) * size) for i in range(blocks)]
    needed = max(sum(active[place] in alive for place in block) for block in places)
    if needed > 0.75 * size:
        return None
    kept = []
    for block in places:
        living_first = sorted(block, key=lambda place: active[place] not in alive)
        kept += sorted(living_first[:needed])
    return kept
