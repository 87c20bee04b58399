"""A mixture-of-experts base keeps its experts in 3-D parameters: what an adapter leaves out there is said."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from adapting import settings
from architectures import MIXTURES, build
from peft import PeftModel, get_peft_model

from mole import runs
from mole.config import RunConfig
from mole.core.errors import ConfigError, MoleNotice
from mole.mixture.coverage import covered_share, uncovered_experts
from mole.preflight import estimate
from mole.training.trainer import train


def notices(make: Any) -> list[str]:
    """The notices that are given while something is made."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    return [str(entry.message) for entry in caught if entry.category is MoleNotice]


def test_the_share_is_that_of_the_weights_between_embeddings_and_head() -> None:
    model = get_peft_model(build("mixtral"), settings()).get_base_model()
    attention = 2 * (16 * 16 * 2 + 16 * 8 * 2)  # q and o, k and v, in both layers
    experts = 2 * 4 * 3 * 16 * 24
    others = 2 * (4 * 16 + 2 * 16) + 16  # routers and norms
    assert covered_share(model, "default") == attention / (attention + experts + others)
    assert sum(uncovered_experts(model).values()) == experts


@pytest.mark.parametrize("name", MIXTURES)
def test_one_notice_says_what_share_is_covered_when_it_is_made_and_none_when_it_is_loaded(
    name: str, tmp_path: Path
) -> None:
    model: Any = None

    def make() -> None:
        nonlocal model
        model = get_peft_model(build(name), settings())

    (notice,) = [line for line in notices(make) if "3-D" in line]
    share = covered_share(model.get_base_model(), "default")
    assert notice.startswith(f"The adapter covers {share:.0%} of the base model's weights") and 0.1 < share < 0.7
    assert "down_proj, gate_up_proj" in notice
    model.save_pretrained(tmp_path)
    assert not notices(lambda: PeftModel.from_pretrained(build(name), tmp_path))


def test_nothing_is_said_of_a_model_that_is_covered() -> None:
    assert not notices(lambda: get_peft_model(build("llama"), settings()))


@pytest.mark.filterwarnings("always::mole.core.errors.MoleNotice")
def test_preflight_and_training_say_it_too(
    tmp_path: Path, home: Path, tiny_tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    build("mixtral").save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    model = {"name": str(tmp_path / "model"), "device": "cpu", "dtype": "float32"}
    data = {"path": str(tmp_path / "rows.jsonl")}
    config = RunConfig.from_dict({"model": model, "data": data, "training": {"max_steps": 1}})
    found = estimate.estimate(config)
    assert found.notes[0].startswith("The adapter covers 14% of the base model's weights") and found.memory
    run = runs.create(config)
    capfd.readouterr()
    train(run)
    assert f"Note: {found.notes[0]}\n" in capfd.readouterr().err and run.state == "finished"


def test_parameters_as_targets_are_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"adapter.target_parameters is .*beside linear layers") as error:
        settings(target_parameters=["mlp.experts.gate_up_proj"])
    assert "\n" not in str(error.value)
