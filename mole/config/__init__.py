"""The settings of a run: each declared once, with its default, bounds and help text.

`schema` holds the sections of `run.yaml` and `RunConfig`; `router_params` the parameters of each routing method;
`data_sources` the files and data sets that `data.path` names; `fields` how a setting is declared, checked and converted
from text; `yaml_loader` reads YAML; `presets` names complete configurations. The command line, the form in the browser,
`MoleConfig` and the documentation follow from these. No torch.
"""

from mole.config.adapter_config import ALL_LINEAR, OF_RUNS, AdapterConfig
from mole.config.data_sources import DataSource, parse_sources
from mole.config.fields import (
    MAX_INTEGER,
    Spec,
    build_settings,
    check_settings,
    coerce,
    setting,
    spec_of,
    union_members,
    unknown_setting,
)
from mole.config.presets import (
    BUILT_IN_PRESETS,
    Preset,
    all_presets,
    delete_preset,
    find_preset,
    merge_preset,
    preset_path,
    presets_dir,
    save_preset,
    saved_presets,
)
from mole.config.router_params import ROUTERS, RouterParams, params_class, router_field_names
from mole.config.schema import (
    SECTIONS,
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    apply_overrides,
    check_sections,
)
from mole.config.yaml_loader import TextLoader, parse_yaml, read_yaml

__all__ = [
    "ALL_LINEAR", "BUILT_IN_PRESETS", "MAX_INTEGER", "OF_RUNS", "ROUTERS", "SECTIONS", "AdapterConfig", "DataConfig",
    "DataSource", "ModelConfig", "Preset", "RouterParams", "RunConfig", "Spec", "TextLoader", "TrainingConfig",
    "all_presets", "apply_overrides", "build_settings", "check_sections", "check_settings", "coerce", "delete_preset",
    "find_preset", "merge_preset", "params_class", "parse_sources", "parse_yaml", "preset_path", "presets_dir",
    "read_yaml", "router_field_names", "save_preset", "saved_presets", "setting", "spec_of", "union_members",
    "unknown_setting",
]  # fmt: skip
