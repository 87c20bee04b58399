"""The parameters of each routing method: one dataclass a method, registered in `ROUTERS`. No torch.

The class that computes a method is in `mole.mixture.routers`, registered under the same name.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from mole.config.fields import check_settings, setting
from mole.core.errors import ConfigError


@dataclass
class RouterParams:
    """Settings every router has: the weights of the auxiliary losses."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str] = ""
    summary: ClassVar[str]

    balance_loss_coef: float = setting(0.0, "Weight of the load-balance loss E · Σ f_i · P_i.", ge=0)
    entropy_loss_coef: float = setting(0.0, "Weight of the mean router entropy (normalised to 0…1).", ge=0)
    z_loss_coef: float = setting(0.0, "Weight of the router z-loss, mean (logsumexp of the logits)².", ge=0)

    def __post_init__(self) -> None:
        check_settings(self, "adapter")


@dataclass
class LoraParams(RouterParams):
    name = "lora"
    title = "LoRA"
    paper = "https://arxiv.org/abs/2106.09685"
    summary = "Plain LoRA: one expert, no router. The base line."


@dataclass
class TopKParams(RouterParams):
    name = "topk"
    title = "Top-k (MoLA, MixLoRA)"
    paper = "https://arxiv.org/abs/2402.08562"
    summary = "The k most probable experts, their probabilities renormalised to sum 1."

    balance_loss_coef: float = setting(1e-3, "Weight of the load-balance loss E · Σ f_i · P_i.", ge=0, from_paper=True)
    top_k: int = setting(2, "Experts used per token (k).", ge=1, from_paper=True)


@dataclass
class TopPParams(RouterParams):
    name = "topp"
    title = "Top-p (MixLoRA-dynamic)"
    paper = "https://arxiv.org/abs/2404.15159"
    summary = "The fewest experts whose probabilities reach top_p, renormalised to sum 1."

    balance_loss_coef: float = setting(1e-3, "Weight of the load-balance loss E · Σ f_i · P_i.", ge=0)
    top_p: float = setting(0.8, "Probability the kept experts must reach together.", gt=0, le=1, from_paper=True)


@dataclass
class ThresholdParams(RouterParams):
    name = "threshold"
    title = "Static threshold"
    paper = "https://arxiv.org/abs/2405.00361"
    summary = "Experts with probability ≥ τ, renormalised; none reaches τ → zero update. AdaMoLE's ablation."

    balance_loss_coef: float = setting(1e-3, "Weight of the load-balance loss E · Σ f_i · P_i.", ge=0)
    threshold: float = setting(0.125, "Smallest probability an expert needs to be used (τ).", ge=0, le=1)


@dataclass
class DenseParams(RouterParams):
    name = "dense"
    title = "Dense (LoRAMoE)"
    paper = "https://arxiv.org/abs/2312.09979"
    summary = "All experts, weighted by the router's softmax."

    cv_loss_coef: float = setting(0.0, "Weight of LoRAMoE's balance loss: CV² of the experts' summed weights.", ge=0)


@dataclass
class AdaMoLEParams(RouterParams):
    name = "adamole"
    title = "AdaMoLE"
    paper = "https://arxiv.org/abs/2405.00361"
    summary = "A threshold network sets, for each token, how probable an expert must be to take part."

    balance_loss_coef: float = setting(1e-3, "Weight of the load-balance loss E · Σ f_i · P_i.", ge=0, from_paper=True)
    max_threshold: float | None = setting(
        None, "Largest threshold τ_max the network can ask for; empty means 1/E, the paper's.", gt=0, le=1
    )
    balance_on_margin: bool = setting(
        False, "Balance the margin p − τ, as the authors' released code does, instead of the probability p."
    )


@dataclass
class DynMoLEParams(RouterParams):
    name = "dynmole"
    title = "DynMoLE"
    paper = "https://arxiv.org/abs/2504.00661"
    summary = "An unsure router (high Tsallis entropy) uses all experts; a sure one only its top-p."

    balance_loss_coef: float = setting(1e-3, "Weight of the load-balance loss E · Σ f_i · P_i.", ge=0, from_paper=True)
    entropy_loss_coef: float = setting(
        1e-2, "Weight of the mean router entropy: it makes the router decide.", ge=0, from_paper=True
    )
    entropy_threshold: float = setting(
        0.9, "Normalised entropy above which a token uses all experts; 1 or more never does.", ge=0, from_paper=True
    )
    entropy_index: float = setting(
        1.1, "Index q of the entropy; 1 is Shannon's, larger stresses the likely experts.", gt=0, le=2, from_paper=True
    )
    entropy_type: str = setting("tsallis", "Family of the entropy.", choices=("tsallis", "renyi"), from_paper=True)
    keep_top_k: int = setting(2, "Experts a sure token keeps at least.", ge=1, from_paper=True)
    top_p: float = setting(0.75, "Probability mass a sure token's experts may have.", gt=0, le=1, from_paper=True)
    inclusive_top_p: bool = setting(
        False, "Also keep the expert that crosses top_p (the usual nucleus; the authors' code drops it)."
    )


@dataclass
class SparsegenParams(RouterParams):
    name = "sparsegen"
    title = "Sparsegen (LD-MoLE)"
    paper = "https://arxiv.org/abs/2509.25684"
    summary = "A projection onto the simplex with a learnt sparsity λ(x): differentiable, at least one expert."

    lambda_hidden: int = setting(16, "Width of the small network that sets the sparsity λ(x).", ge=1)


ROUTERS: dict[str, type[RouterParams]] = {
    params.name: params
    for params in (
        DynMoLEParams,
        AdaMoLEParams,
        TopKParams,
        TopPParams,
        ThresholdParams,
        DenseParams,
        SparsegenParams,
        LoraParams,
    )
}


def params_class(router: str) -> type[RouterParams]:
    """The parameter dataclass of a router. Raises `ConfigError` for an unknown name."""
    if not isinstance(router, str) or router not in ROUTERS:
        raise ConfigError("adapter.router", router, f"one of: {', '.join(ROUTERS)}")
    return ROUTERS[router]


def router_field_names() -> set[str]:
    """Names of all routers' own parameters."""
    return {item.name for params in ROUTERS.values() for item in fields(params)}
