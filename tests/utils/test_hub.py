"""The hub is asked once whether it is there; its libraries would ask six times for each file."""

from __future__ import annotations

import socket
import time

import pytest

from seedlora.model.loading import load_config
from seedlora.utils.hub import hub, local_folder

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def nobody(monkeypatch):
    """A hub whose address refuses connections."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return address


def test_a_hub_that_does_not_answer_is_said_at_once(nobody, caplog):
    started = time.monotonic()
    with pytest.raises(OSError, match=f"'some/model' is no local folder .* from the hub: {nobody} does not answer"):
        load_config("some/model")
    with pytest.raises(ValueError, match=f"some/adapter is no local folder .* from the hub: {nobody} does not answer"):
        local_folder("some/adapter", "PEFT adapter folder", ["*.json"])
    assert time.monotonic() - started < 20  # the libraries' own attempts take 23 s each
    assert not caplog.records
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_what_is_on_this_machine_is_still_read(nobody):
    with hub():
        assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_model_in_a_folder_asks_nobody(tiny_llama, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_session", None)
    assert load_config(tiny_llama).hidden_size == 32


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """A snapshot of owner/name at the branch v2, as the hub's library keeps it."""
    commit, repository = "0123456789" * 4, tmp_path / "models--owner--name"
    folder = repository / "snapshots" / commit
    (folder / "checkpoint-10").mkdir(parents=True)
    (folder / "checkpoint-10" / "adapter_config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "v2").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return folder


def test_a_revision_and_a_folder_of_a_repository(snapshot):
    def found(name):
        return local_folder(name, "PEFT adapter folder", ["*.json"], cached=True)

    assert found("owner/name@v2") == snapshot
    assert found("owner/name@v2:checkpoint-10") == snapshot / "checkpoint-10"
    with pytest.raises(ValueError, match="owner/name has no folder checkpoint-20 at v2"):
        found("owner/name@v2:checkpoint-20")
    for odd in ("owner/name@v2:../other", "owner/name:/etc", "owner/name@", "owner/name:"):
        with pytest.raises(ValueError, match="is no folder; give a PEFT adapter folder or a hub id"):
            found(odd)
