"""The settings of a run: each declared once, with its default, bounds and help text.

`schema` holds the sections of `run.yaml` and `RunConfig`; `router_params` the parameters of each routing method;
`fields` how a setting is declared, checked and converted from text; `yaml_loader` reads YAML; `presets` names complete
configurations. The command line, the form in the browser, `MoleConfig` and the documentation follow from these. No
torch.
"""

from mole.config.fields import LARGEST, Spec, build, check, coerce, options_of, setting, spec_of, unknown_setting
from mole.config.router_params import (
    ROUTERS,
    AdaMoLEParams,
    DenseParams,
    DynMoLEParams,
    LoraParams,
    RouterParams,
    SparsegenParams,
    ThresholdParams,
    TopKParams,
    TopPParams,
    router_field_names,
    router_params,
)
from mole.config.schema import (
    SECTIONS,
    AdapterConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    apply_overrides,
    check_sections,
)
from mole.config.yaml_loader import PlainSettings, parse_yaml, read_yaml

__all__ = [
    "LARGEST", "ROUTERS", "SECTIONS", "AdaMoLEParams", "AdapterConfig", "DataConfig", "DenseParams", "DynMoLEParams",
    "LoraParams", "ModelConfig", "PlainSettings", "RouterParams", "RunConfig", "SparsegenParams", "Spec",
    "ThresholdParams", "TopKParams", "TopPParams", "TrainingConfig", "apply_overrides", "build", "check",
    "check_sections", "coerce", "options_of", "parse_yaml", "read_yaml", "router_field_names", "router_params",
    "setting", "spec_of", "unknown_setting",
]  # fmt: skip
