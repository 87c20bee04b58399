"""The parameters of each routing method: one dataclass a method, registered in `ROUTERS`. No torch.

The class that computes a method is in `mole.mixture.routers`, registered under the same name.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from mole.config.fields import check_settings, setting
from mole.core import limits
from mole.core.errors import ConfigError

BALANCE_HELP = "Coefficient of the load-balancing loss E · Σ f_i · P_i."


@dataclass
class RouterParams:
    """Base of all routers' parameters: the coefficients of the auxiliary losses, added to the language-model loss.

    `name` is the value of `adapter.router`; `title`, `paper` (link) and `summary` describe the method to the user.
    `adaptive` says whether the number of experts depends on the token: an alarm is then raised if all use all experts.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str] = ""
    summary: ClassVar[str]
    adaptive: ClassVar[bool] = False

    balance_loss_coef: float = setting(0.0, BALANCE_HELP, ge=0, le=limits.FACTOR)
    entropy_loss_coef: float = setting(
        0.0, "Coefficient of the mean router entropy (normalised to 0…1).", ge=0, le=limits.FACTOR
    )
    z_loss_coef: float = setting(
        0.0, "Coefficient of the router z-loss, mean (logsumexp of the logits)².", ge=0, le=limits.FACTOR
    )

    def __post_init__(self) -> None:
        check_settings(self, "adapter")


@dataclass
class LoraParams(RouterParams):
    name = "lora"
    title = "LoRA"
    paper = "https://arxiv.org/abs/2106.09685"
    summary = "Plain LoRA: one expert, no router. The baseline."


@dataclass
class TopKParams(RouterParams):
    name = "topk"
    title = "Top-k (MoLA, MixLoRA)"
    paper = "https://arxiv.org/abs/2402.08562"
    summary = "The k most probable experts, their probabilities renormalised to sum to 1; of one expert, as they are."

    balance_loss_coef: float = setting(1e-3, BALANCE_HELP, ge=0, le=limits.FACTOR, from_paper=True)
    top_k: int = setting(
        2,
        "Experts used per token (k); with 1 its weight is its probability, as in Switch.",
        ge=1,
        le=limits.EXPERTS,
        from_paper=True,
        steerable=True,
    )
    renormalize: bool | None = setting(
        None,
        "Whether weights are divided by their sum; empty divides unless k is 1, where the gate would learn nothing.",
    )

    @property
    def renormalized(self) -> bool:
        """Whether the weights are divided by their sum."""
        return self.top_k > 1 if self.renormalize is None else self.renormalize


@dataclass
class TopPParams(RouterParams):
    name = "topp"
    title = "Top-p (MixLoRA-dynamic)"
    paper = "https://arxiv.org/abs/2404.15159"
    summary = "The fewest experts whose probabilities sum to at least top_p, renormalised to sum to 1."
    adaptive = True

    balance_loss_coef: float = setting(1e-3, BALANCE_HELP, ge=0, le=limits.FACTOR)
    top_p: float = setting(
        0.8, "Cumulative probability the selected experts must reach.", gt=0, le=1, from_paper=True, steerable=True
    )


@dataclass
class ThresholdParams(RouterParams):
    name = "threshold"
    title = "Static threshold"
    paper = "https://arxiv.org/abs/2405.00361"
    summary = "Experts with probability ≥ τ, renormalised; no update where none reaches τ. AdaMoLE's ablation."
    adaptive = True

    balance_loss_coef: float = setting(1e-3, BALANCE_HELP, ge=0, le=limits.FACTOR)
    threshold: float = setting(0.125, "Minimum probability for an expert to be used (τ).", ge=0, le=1, steerable=True)


@dataclass
class DenseParams(RouterParams):
    name = "dense"
    title = "Dense (LoRAMoE)"
    paper = "https://arxiv.org/abs/2312.09979"
    summary = "All experts, weighted by the router's softmax."

    cv_loss_coef: float = setting(
        0.0, "Coefficient of LoRAMoE's balance loss: CV² of the experts' summed weights.", ge=0, le=limits.FACTOR
    )


@dataclass
class AdaMoLEParams(RouterParams):
    name = "adamole"
    title = "AdaMoLE"
    paper = "https://arxiv.org/abs/2405.00361"
    summary = "A small network predicts, for each token, the minimum probability for an expert to be used."
    adaptive = True

    balance_loss_coef: float = setting(1e-3, BALANCE_HELP, ge=0, le=limits.FACTOR, from_paper=True)
    max_threshold: float | None = setting(
        None,
        "Largest threshold τ_max the network can predict; empty means 1/E, as in the paper.",
        gt=0,
        le=1,
        steerable=True,
    )
    balance_on_margin: bool = setting(
        False, "Balance the margin p − τ instead of the probability p, as the authors' released code does."
    )


@dataclass
class DynMoLEParams(RouterParams):
    name = "dynmole"
    title = "DynMoLE"
    paper = "https://arxiv.org/abs/2504.00661"
    summary = "All experts where the router is uncertain (high Tsallis entropy), only the top-p where it is certain."
    adaptive = True

    balance_loss_coef: float = setting(1e-3, BALANCE_HELP, ge=0, le=limits.FACTOR, from_paper=True)
    entropy_loss_coef: float = setting(
        1e-2,
        "Coefficient of the mean router entropy, which makes the router more certain.",
        ge=0,
        le=limits.FACTOR,
        from_paper=True,
    )
    entropy_threshold: float = setting(
        0.9,
        "Normalised entropy (0…1) above which a token uses all experts; from 1 on, none does.",
        ge=0,
        le=limits.FACTOR,
        from_paper=True,
        steerable=True,
    )
    entropy_index: float = setting(
        1.1,
        "Index q of the entropy; 1 is Shannon's, larger values emphasise the likely experts.",
        gt=0,
        le=2,
        from_paper=True,
    )
    entropy_type: str = setting("tsallis", "Kind of entropy.", choices=("tsallis", "renyi"), from_paper=True)
    keep_top_k: int = setting(
        2,
        "Minimum number of experts for a token below the entropy threshold.",
        ge=1,
        le=limits.EXPERTS,
        from_paper=True,
        steerable=True,
    )
    top_p: float = setting(
        0.75,
        "Cumulative probability of the experts of a token below the entropy threshold.",
        gt=0,
        le=1,
        from_paper=True,
        steerable=True,
    )
    inclusive_top_p: bool = setting(
        False,
        "Include the expert that crosses top_p (as nucleus sampling does; the authors' code excludes it).",
        steerable=True,
    )


@dataclass
class SparsegenParams(RouterParams):
    name = "sparsegen"
    title = "Sparsegen (LD-MoLE)"
    paper = "https://arxiv.org/abs/2509.25684"
    summary = "A projection onto the simplex with a learned sparsity λ(x): differentiable, at least one expert."
    adaptive = True

    lambda_hidden: int = setting(
        16, "Hidden width of the network that predicts the sparsity λ(x).", ge=1, le=limits.HIDDEN
    )
    lambda_activation: str = setting(
        "gelu", "Activation of that network; the authors' code has relu.", choices=("gelu", "relu")
    )
    sparsity_loss_coef: float = setting(
        0.0, "Coefficient of the sparsity loss, which is 0 where at most sparsity_k experts are used.",
        ge=0, le=limits.FACTOR,
    )  # fmt: skip
    sparsity_k: int = setting(
        2, "Experts per token that the sparsity loss aims at (k).", ge=1, le=limits.EXPERTS, from_paper=True
    )


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
    """The parameter dataclass of a router by its name. Raises `ConfigError` for an unknown name."""
    if not isinstance(router, str) or router not in ROUTERS:
        raise ConfigError("adapter.router", router, f"one of: {', '.join(ROUTERS)}")
    return ROUTERS[router]


def router_field_names() -> set[str]:
    """The parameter names of all routers together."""
    return {item.name for params in ROUTERS.values() for item in fields(params)}
