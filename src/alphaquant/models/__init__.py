"""Our own model definitions: typed descriptors, one decoder, weights read layer by layer."""

from alphaquant.models.decoder import (
    Decoder,
    attention_half,
    expert_choice,
    head_input,
    head_weight,
    mlp_half,
    rope_for,
    router_input,
)
from alphaquant.models.families import FAMILIES, detect
from alphaquant.models.linear import LayerWeights, as_served
from alphaquant.models.moe import all_scores, route
from alphaquant.models.rotate import Rotation, RotationKind, rotated
from alphaquant.models.spec import MLPSpec, ModelSpec, MoESpec, Parameter, Source
from alphaquant.models.tap import Choice, Routing, Tap
from alphaquant.models.weights import (
    TensorSource,
    check_tensors,
    load_decoder,
    logical,
    read_layer,
    read_outer,
    unfused,
)

__all__ = [
    "FAMILIES",
    "Choice",
    "Decoder",
    "LayerWeights",
    "MLPSpec",
    "MoESpec",
    "ModelSpec",
    "Parameter",
    "Rotation",
    "RotationKind",
    "Routing",
    "Source",
    "Tap",
    "TensorSource",
    "all_scores",
    "as_served",
    "attention_half",
    "check_tensors",
    "detect",
    "expert_choice",
    "head_input",
    "head_weight",
    "load_decoder",
    "logical",
    "mlp_half",
    "read_layer",
    "read_outer",
    "rope_for",
    "rotated",
    "route",
    "router_input",
    "unfused",
]
