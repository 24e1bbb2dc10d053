"""The chunked losses of a frozen head, against autograd through all logits."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from seedlora.model import head_losses as head_file
from seedlora.model.head_losses import head_losses, is_frozen_matrix
from tests.helpers.models import make_module
from tests.helpers.precision import SAME

S, H, V = 23, 12, 50


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rows", [1, 4, S, 100], ids=lambda rows: f"chunks of {rows}")
@pytest.mark.parametrize("bias", [False, True])
def test_losses_and_gradients_are_those_of_all_logits(rows, bias, monkeypatch):
    monkeypatch.setattr(head_file, "_CHUNK_LOGITS", rows * V)
    torch.manual_seed(0)
    head = nn.Linear(H, V, bias=bias).requires_grad_(False)
    hidden, targets, share = torch.randn(S, H), torch.randint(V, (S,)), torch.rand(S)
    mine, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    losses, likely = head_losses(mine, head, targets, greedy=True)
    logits = head(theirs)
    wanted = cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses, wanted, rtol=SAME, atol=SAME)
    assert torch.equal(likely, logits.argmax(-1))
    (losses * share).sum().backward()
    (wanted * share).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=SAME, atol=SAME)


def test_without_a_gradient_none_is_computed(monkeypatch):
    monkeypatch.setattr(torch, "mm", None)
    head = nn.Linear(H, V).requires_grad_(False)
    with torch.no_grad():
        losses, likely = head_losses(torch.randn(S, H), head, torch.randint(V, (S,)), greedy=False)
    assert losses.shape == (S,)
    assert likely is None


def test_bfloat16_is_as_close_as_autograd():
    torch.manual_seed(0)
    head = nn.Linear(H, V, bias=False).bfloat16().requires_grad_(False)
    hidden, targets = torch.randn(S, H).bfloat16(), torch.randint(V, (S,))

    def gradient(loss_of, head, x):
        (loss_of(x.requires_grad_(), head) / S).sum().backward()
        return x.grad.double()

    def all_logits(x, head):
        logits = head(x)
        return cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="none")

    exact = gradient(all_logits, copy.deepcopy(head).double(), hidden.double())
    autograd = gradient(all_logits, head, hidden.clone())
    chunks = gradient(lambda x, head: head_losses(x, head, targets, greedy=False)[0], head, hidden.clone())
    assert (chunks - exact).norm() < 1.5 * (autograd - exact).norm()


def test_a_trained_or_adapted_head_is_not_plain():
    head = nn.Linear(H, V)
    assert not is_frozen_matrix(head)
    assert is_frozen_matrix(head.requires_grad_(False))
    assert not is_frozen_matrix(nn.Sequential(head))
    head.weight = nn.Parameter(torch.empty(0), requires_grad=False)  # as DeepSpeed leaves it between two layers
    assert not is_frozen_matrix(head)


@pytest.fixture
def capped(tmp_path, tiny_llama):
    """A model that caps its logits behind the head."""
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        final_logit_softcapping=0.05,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("family", ["tiny_llama", "capped"])
def test_the_module_sees_what_follows_the_head(family, request):
    module = make_module(request.getfixturevalue(family))
    module.setup()
    with torch.no_grad():
        for name, parameter in module.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    (replica,) = module.replicas
    module.stack.route([replica.name])
    wanted = cross_entropy(module.model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    parameters = module.stack.parameters(replica.name)
    gradients = torch.autograd.grad(wanted, parameters)
    for _ in range(2):  # the first forward finds out, the second knows
        losses, _, keep, _ = module.token_losses(ids, ids)
        assert module.token_losses.head_is_last is (family == "tiny_llama")
        loss = losses.sum() / keep.sum()
        torch.testing.assert_close(loss, wanted, rtol=SAME, atol=0)
        for mine, theirs in zip(torch.autograd.grad(loss, parameters), gradients, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=SAME, atol=SAME)
