"""Choosing a base model: what is said of it comes from this machine alone, and the verdict follows the memory."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from mole.config import ModelConfig
from mole.core.errors import ModelError
from mole.models import catalog, sizes
from mole.models.catalog import Device, Entry


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may ask the network."""

    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def on(monkeypatch: pytest.MonkeyPatch, gigabytes: float, width: int = 2) -> None:
    """A machine whose device has so much memory."""
    device = Device("a test device", int(gigabytes * 1e9), width)
    monkeypatch.setattr(catalog, "training_device", lambda config: device)


def test_every_suggestion_says_its_size_licence_and_whether_it_is_here(home: Path) -> None:
    suggested = catalog.models()
    assert suggested[0].name == ModelConfig().name
    assert len({entry.name for entry in suggested}) == len(suggested) > 10
    for entry in catalog.KNOWN:
        assert entry.licence in entry.label and entry.licence
        assert entry.parameters > 1e8 and entry.size >= 2 * entry.parameters
        assert "to download" in entry.label or catalog.look(entry.name).cached


def test_a_folder_tells_its_own_weights(tiny_folder: Path) -> None:
    entry = catalog.look(str(tiny_folder))
    file = tiny_folder / "model.safetensors"
    assert entry.cached and entry.kind == "folder" and entry.size == file.stat().st_size
    assert entry.parameters == sizes.parameters([file]) > 1000
    assert "A folder on this machine" in catalog.about(str(tiny_folder))[0]


def test_a_model_in_the_hubs_cache_is_found_without_the_hub(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    repo = tmp_path / "hub" / "models--someone--tiny-llama"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots").mkdir()
    (repo / "snapshots" / ("0" * 40)).symlink_to(tiny_folder, target_is_directory=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (found,) = (entry for entry in catalog.models() if entry.name == "someone/tiny-llama")
    assert found.cached and found.parameters > 1000 and "here" in found.label


@pytest.mark.parametrize("name", ["/nowhere/model", "./model.gguf", "model.gguf", "a/b/c", ""])
def test_what_is_not_there_is_said_in_one_line(name: str, home: Path) -> None:
    with pytest.raises(ModelError) as wrong:
        catalog.look(name)
    assert "\n" not in str(wrong.value)


def test_a_hub_id_that_nobody_knows_here_is_left_to_the_hub(home: Path) -> None:
    words, verdict = catalog.about("someone/some-model")
    assert verdict == "unknown" and "when the run starts" in words


def test_a_gated_model_says_what_to_do_first(home: Path) -> None:
    assert "hf auth login" in catalog.about("meta-llama/Llama-3.1-8B-Instruct")[0]


@pytest.mark.parametrize(
    ("gigabytes", "verdict"), [(80, "fits"), (33.8, "fits"), (33.6, "tight"), (24, "tight"), (16, "too large")]
)
def test_the_verdict_follows_the_memory(monkeypatch: pytest.MonkeyPatch, gigabytes: float, verdict: str) -> None:
    on(monkeypatch, gigabytes)
    fit = catalog.fits(Entry("8b", parameters=8_190_735_360))
    assert fit.verdict == verdict and f"{gigabytes:.1f} GB" in fit.words and "16.4 GB" in fit.words


def test_a_model_of_unknown_size_gets_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, 80)
    assert catalog.fits(Entry("a/b")).verdict == "unknown"


def test_full_precision_takes_twice_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "gpu_of", lambda device: None)
    half, full = (catalog.training_device(ModelConfig(dtype=dtype)) for dtype in ("bfloat16", "float32"))
    assert (half.bytes_per_weight, full.bytes_per_weight) == (2, 4) and half.memory > 0
