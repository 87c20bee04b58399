"""The mixture as a PEFT method: what people do with adapters works, and a round trip gives the same bits."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import TOKENS, adapt, layers_of, logits, settings, shake
from peft import AutoPeftModelForCausalLM, PeftMixedModel, PeftModel, PeftType, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers import AutoModelForCausalLM

from mole import auxiliary_loss, record_routing
from mole.config import ROUTERS
from mole.core.errors import InputError, MoleError
from mole.mixture.routing_log import find_log

Make = Callable[..., Any]

# ---------------------------------------------------------------------------------------------------------
# Saving and loading


@pytest.mark.parametrize("router", ROUTERS)
def test_a_saved_adapter_comes_back_bit_for_bit(router: str, tiny_model: Make, tmp_path: Path) -> None:
    model = adapt(tiny_model(), router)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not list(tmp_path.glob("*.bin"))
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(tiny_model()))


@pytest.mark.parametrize("router", ["dynmole", "adamole", "sparsegen"])
def test_an_adapter_loads_under_any_name(router: str, tiny_model: Make, tmp_path: Path) -> None:
    model = adapt(tiny_model(), router)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path, adapter_name="weekday")
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "again" / "weekday")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("router", ["dynmole", "adamole", "sparsegen"])
def test_transformers_own_load_adapter(router: str, tiny_model: Make, tmp_path: Path) -> None:
    model = adapt(tiny_model(), router)
    model.save_pretrained(tmp_path)
    native = tiny_model()
    native.load_adapter(str(tmp_path))
    hold_same_adapter(native.eval(), model)


@pytest.mark.parametrize("router", ["dynmole", "adamole", "sparsegen"])
def test_transformers_own_add_adapter(router: str, tiny_model: Make) -> None:
    native = tiny_model()
    native.add_adapter(settings(router))
    assert layers_of(native)
    assert torch.equal(logits(native.eval()), logits(tiny_model()))
    shake(native)
    assert torch.equal(logits(native), logits(adapt(tiny_model(), router)))


def hold_same_adapter(loaded: Any, model: Any) -> None:
    """Same weights bit for bit, and the same logits.

    These loaders leave the weights where they lie in the file, 4 bytes off a cache line behind a bias of one
    element. A matrix product may round differently there, so logits are held to 1e-6 and to the bit once moved.
    """
    ours, theirs = (
        {n.removeprefix("base_model.model."): w for n, w in m.named_parameters() if "mole_studio_" in n}
        for m in (model, loaded)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and len(ours) == len(theirs)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)
    for weight in theirs.values():
        weight.data = weight.data.clone()
    assert torch.equal(logits(loaded), logits(model))


def test_auto_peft_model_finds_the_base_by_itself(tiny_folder: Path, tmp_path: Path) -> None:
    model = adapt(AutoModelForCausalLM.from_pretrained(tiny_folder))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_loading_onto_the_meta_device_first_gives_the_same(tiny_model: Make, tmp_path: Path) -> None:
    model = adapt(tiny_model(), "sparsegen")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path, low_cpu_mem_usage=True)
    hold_same_adapter(loaded, model)


def test_a_loaded_adapter_is_frozen_unless_asked_to_train(tiny_model: Make, tmp_path: Path) -> None:
    adapt(tiny_model()).save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert not any(weight.requires_grad for weight in frozen.parameters())
    training = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True)
    learning = {name for name, weight in training.named_parameters() if weight.requires_grad}
    assert learning and all("mole_studio_" in name for name in learning)


def test_peft_knows_the_adapter_type_when_mole_is_imported_after_it() -> None:
    code = "import peft, mole; print(peft.PeftType('MOLE_STUDIO').name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "MOLE_STUDIO"


def test_the_adapter_type_is_an_attribute_which_is_how_python_finds_it_from_3_12_on() -> None:
    member = PeftType("MOLE_STUDIO")
    assert vars(PeftType)["MOLE_STUDIO"] is member and PeftType["MOLE_STUDIO"] is member and member in PeftType
    assert pickle.loads(pickle.dumps(member)) is member


# ---------------------------------------------------------------------------------------------------------
# Which projections, how many experts

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        ("all-linear", {(layer, name) for layer in (0, 1) for name in PROJECTIONS}),
        (["q_proj", "v_proj"], {(layer, name) for layer in (0, 1) for name in ("q_proj", "v_proj")}),
        (r".*\.1\.mlp\.(up|down)_proj", {(1, "up_proj"), (1, "down_proj")}),
    ],
    ids=["all-linear", "list", "regex"],
)
def test_target_modules(targets: Any, adapted: set[tuple[int, str]], tiny_model: Make, tmp_path: Path) -> None:
    model = adapt(tiny_model(), target_modules=targets)
    found = {(int(layer.name.split(".")[2]), layer.name.split(".")[-1]) for layer in layers_of(model)}
    assert found == adapted
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(model))


def test_the_written_config_names_the_projections_in_order(tiny_model: Make, tmp_path: Path) -> None:
    """`all-linear` becomes a set inside PEFT, whose order would change from process to process."""
    get_peft_model(tiny_model(), settings()).save_pretrained(tmp_path)
    names = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert len(names) == 14 and names == sorted(names)


@pytest.mark.parametrize(
    ("arch", "counts", "by_layer"),
    [
        ("llama", [2, 4, 6, 8], [2, 2, 4, 4, 6, 6, 8, 8]),
        ("gpt2", [2, 4, 6, 8], [2, 2, 4, 4, 6, 6, 8, 8]),
        ("gemma3", [2, 4, 6, 8], [2, 2, 4, 4, 6, 6, 8, 8]),
        ("llama", [8, 2], [8] * 4 + [2] * 4),
        ("llama", 3, [3] * 8),
        ("llama", [5], [5] * 8),
    ],
    ids=str,
)
def test_expert_counts_spread_over_equal_groups_of_layers_from_the_bottom_up(
    arch: str, counts: Any, by_layer: list[int], tiny_model: Make, tmp_path: Path
) -> None:
    model = adapt(tiny_model(arch, layers=8), "topk", num_experts=counts, r=1)
    found = {
        next(int(part) for part in layer.name.split(".") if part.isdigit()): layer.num_experts["default"]
        for layer in layers_of(model)
    }
    assert [found[place] for place in range(8)] == by_layer
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(arch, layers=8), tmp_path)), logits(model))


class Looks(nn.Module):
    """Has the sizes of a linear layer, and computes something else."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.ones(out_features, in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cdist(x, self.weight)


@pytest.mark.parametrize("targets", [["o_proj"], r".*\.o_proj"], ids=["list", "pattern"])
def test_a_module_that_only_looks_linear_is_refused_by_name(targets: Any, tiny_model: Make) -> None:
    model = tiny_model()
    model.model.layers[1].self_attn.o_proj = Looks(32, 32)
    with pytest.raises(InputError, match=r"^[^\n]*layers\.1\.self_attn\.o_proj is a Looks[^\n]*$"):
        get_peft_model(model, settings(target_modules=targets))
    found = get_peft_model(model, settings())
    assert not any(layer.name.endswith("1.self_attn.o_proj") for layer in layers_of(found))


def test_a_module_that_is_no_projection_is_refused_by_name(tiny_model: Make) -> None:
    with pytest.raises(InputError, match=r"embed_tokens.*linear"):
        get_peft_model(tiny_model(), settings(target_modules=["embed_tokens"]))


def test_sparsegen_shares_its_sparsity_network_among_layers_of_one_width(tiny_model: Make, tmp_path: Path) -> None:
    model = adapt(tiny_model(), "sparsegen")
    networks: dict[int, set[int]] = {}
    for layer in layers_of(model):
        networks.setdefault(layer.in_features, set()).add(id(layer.routers["default"].lambda_in.weight))
    assert {width: len(ids) for width, ids in networks.items()} == {32: 1, 64: 1}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------
# Several adapters, switching, disabling


def test_a_deleted_adapter_gives_its_memory_back(tiny_model: Make) -> None:
    model = adapt(tiny_model("llama"))
    model.add_adapter("other", settings("adamole"))
    model.set_adapter("other")
    logits(model)
    kept = [weakref.ref(layer.routers["other"]) for layer in layers_of(model)]
    kept += [weakref.ref(layer.experts["other"][0]) for layer in layers_of(model)]
    model.delete_adapter("other")
    gc.collect()
    assert kept
    assert not any(one() for one in kept)


@pytest.mark.parametrize(("first", "second"), [("dynmole", "topk"), ("sparsegen", "adamole"), ("lora", "sparsegen")])
def test_two_adapters_on_one_base_switch_and_are_deleted(first: str, second: str, tiny_model: Make) -> None:
    alone = [logits(adapt(tiny_model(), first, seed=1)), logits(adapt(tiny_model(), second, seed=2, num_experts=3))]
    model = adapt(tiny_model(), first, seed=1)
    model.add_adapter("other", settings(second, num_experts=3))
    shake(model, seed=2, adapter="other")
    model.eval()
    assert torch.equal(logits(model), alone[0])
    model.set_adapter("other")
    assert torch.equal(logits(model), alone[1])
    model.set_adapter("default")
    assert torch.equal(logits(model), alone[0])
    model.delete_adapter("other")
    assert torch.equal(logits(model), alone[0])
    assert not any("other" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="other"):
        model.set_adapter("other")


def test_only_the_active_adapter_learns(tiny_model: Make) -> None:
    model = get_peft_model(tiny_model(), settings("topk"))
    model.add_adapter("other", settings("adamole"))
    model.set_adapter("other")
    learning = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert learning and all(".other." in name for name in learning)


def test_two_active_adapters_add_their_updates(tiny_model: Make) -> None:
    model = adapt(tiny_model(), "topk", target_modules=["q_proj"])
    model.add_adapter("other", settings("dense", target_modules=["q_proj"]))
    shake(model, seed=2, adapter="other")
    model.base_model.set_adapter(["default", "other"])
    layer, x = layers_of(model)[0].eval(), torch.randn(4, 32)
    both, base = layer(x), layer.base_layer(x)
    updates = []
    for name in ("default", "other"):
        layer.set_adapter(name)
        updates.append(layer(x) - base)
    torch.testing.assert_close(both, base + updates[0] + updates[1])


@pytest.mark.parametrize("router", ROUTERS)
def test_a_disabled_adapter_leaves_the_base_bit_for_bit_and_comes_back(router: str, tiny_model: Make) -> None:
    base, model = logits(tiny_model()), adapt(tiny_model(), router)
    before = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(model.unload()), base)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_fresh_adapter_leaves_the_base_bit_for_bit(router: str, tiny_model: Make) -> None:
    model = get_peft_model(tiny_model(), settings(router)).eval()
    assert torch.equal(logits(model), logits(tiny_model()))


def test_a_second_adapter_on_other_projections_is_recorded_and_has_its_losses(tiny_model: Make) -> None:
    model = adapt(tiny_model(), target_modules=["q_proj"])
    model.add_adapter("other", settings("topk", target_modules=["up_proj"], balance_loss_coef=1.0))
    model.set_adapter("other")
    with record_routing(model) as trace:
        model.train()(input_ids=TOKENS)
    assert [name.split(".")[-1] for name in trace.modules] == ["up_proj"] * 2
    assert len(trace) == TOKENS.shape[1]
    assert auxiliary_loss(model).item() > 0.5


def attributes(model: Any) -> dict[str, Any]:
    """Names of the attributes of every module, and the number of entries in each that has a length, such as hooks."""
    return {
        f"{path}.{name}": len(value) if hasattr(value, "__len__") and name.startswith("_") else None
        for path, module in model.named_modules()
        for name, value in vars(module).items()
    }


@pytest.mark.parametrize("copied", [False, True], ids=["", "copied"])
def test_an_unloaded_model_is_the_plain_base_and_takes_an_adapter_again(
    copied: bool, tiny_model: Make, tmp_path: Path
) -> None:
    plain = attributes(tiny_model())
    model = adapt(tiny_model())
    model.save_pretrained(tmp_path)
    expected = logits(model)
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    base = (copy.deepcopy(model) if copied else model).eval().unload()
    assert attributes(base) == plain and find_log(base) is None
    assert torch.equal(logits(base), logits(tiny_model()))
    again = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(again), expected)
    with record_routing(again) as trace:
        logits(again)
    assert len(trace) == TOKENS.shape[1]


def test_after_its_last_adapter_is_deleted_a_model_has_no_routing_log(tiny_model: Make) -> None:
    """The layers stay, without adapters, as LoRA's do."""
    model = adapt(tiny_model())
    expected = logits(model)
    base = model.get_base_model()
    model.add_adapter("other", settings("topk"))
    model.delete_adapter("other")
    assert torch.equal(logits(model), expected) and find_log(model) is not None
    model.delete_adapter("default")
    assert find_log(model) is None and not base._forward_hooks and not base._forward_pre_hooks
    assert torch.equal(logits(base), logits(tiny_model()))
    model.add_adapter("default", settings())
    shake(model)
    model.set_adapter("default")
    assert torch.equal(logits(model.eval()), expected)
    with record_routing(model) as trace:
        logits(model)
    assert len(trace) == TOKENS.shape[1]


def test_a_pass_after_the_last_native_adapter_was_deleted_leaves_the_plain_model(tiny_model: Make) -> None:
    """transformers' own `delete_adapter` tells the layers, not the model that they belong to."""
    model, plain = tiny_model(), tiny_model()
    for name in ("first", "second"):
        model.add_adapter(settings(), name)
    model.delete_adapter("first")
    model.set_adapter("second")
    with record_routing(model) as trace:
        logits(model)
    assert len(trace) == TOKENS.shape[1] and find_log(model) is not None
    model.delete_adapter("second")
    assert torch.equal(logits(model), logits(plain))
    assert find_log(model) is None and not model._forward_hooks and not model._forward_pre_hooks
    model.add_adapter(settings(), "third")
    with record_routing(model) as trace:
        logits(model)
    assert len(trace) == TOKENS.shape[1]


# ---------------------------------------------------------------------------------------------------------
# What cannot be, and what must not break


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_with_the_reason(merge: str, tiny_model: Make) -> None:
    model = adapt(tiny_model())
    before = logits(model)
    with pytest.raises(MoleError, match=r"cannot be merged.*depend"):
        getattr(model, merge)()
    assert torch.equal(logits(model), before)


def test_what_only_plain_adapters_can_do_is_refused_in_one_line(tiny_model: Make, tmp_path: Path) -> None:
    model = adapt(tiny_model())
    model.save_pretrained(tmp_path)
    with pytest.raises(MoleError, match=r"^add_weighted_adapter is not supported: .*$"):
        model.add_weighted_adapter(["default"], [1.0], "mean")
    with pytest.raises(ValueError, match=r"^Hotswapping only supports LORA.*$"):
        hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    with pytest.raises(ValueError, match=r"^The provided .*MOLE_STUDIO.* not compatible with the `PeftMixedModel`.*$"):
        get_peft_model(tiny_model(), settings(), mixed=True)
    with pytest.raises(ValueError, match=r"^Adapter of type .*MOLE_STUDIO is not supported for mixed models.*$"):
        PeftMixedModel.from_pretrained(tiny_model(), tmp_path)


@pytest.mark.parametrize("router", ["dynmole", "sparsegen"])
def test_a_model_that_has_run_can_be_copied_and_the_copy_lives_its_own_life(router: str, tiny_model: Make) -> None:
    model = adapt(tiny_model(), router).train()
    model(TOKENS, labels=TOKENS).loss.backward()
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin.eval()), logits(model.eval()))
    shake(twin, seed=5)
    assert not torch.equal(logits(twin), logits(model))
    for layer, copied in zip(layers_of(model), layers_of(twin), strict=True):
        assert layer.log is not copied.log
    twin.train()(TOKENS, labels=TOKENS).loss.backward()


def test_only_the_adapter_learns(tiny_model: Make) -> None:
    model = get_peft_model(tiny_model(), settings())
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    for name, weight in model.named_parameters():
        assert weight.requires_grad == ("mole_studio_" in name)
        assert (weight.grad is not None) == weight.requires_grad, name


def test_a_bfloat16_base_keeps_a_float32_router_and_experts(tiny_model: Make) -> None:
    model = get_peft_model(tiny_model().to(torch.bfloat16), settings("adamole"))
    assert {w.dtype for n, w in model.named_parameters() if "mole_studio_" in n} == {torch.float32}
    seen: list[torch.dtype] = []
    with record_routing(model):
        find_log(model).add = lambda name, router, entry: seen.append(entry.routing.weights.dtype)
        assert model(TOKENS).logits.dtype == torch.bfloat16
    assert set(seen) == {torch.float32} and len(seen) == len(layers_of(model))


def test_a_bfloat16_base_round_trips_bit_for_bit(tiny_model: Make, tmp_path: Path) -> None:
    model = adapt(tiny_model().to(torch.bfloat16))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model().to(torch.bfloat16), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_an_adapter_cast_to_bfloat16_still_routes_in_float32(tiny_model: Make) -> None:
    model = adapt(tiny_model()).to(torch.bfloat16)
    router = layers_of(model)[0].routers["default"]
    assert router(torch.randn(3, 32, dtype=torch.bfloat16)).weights.dtype == torch.float32
    assert torch.isfinite(logits(model)).all()
