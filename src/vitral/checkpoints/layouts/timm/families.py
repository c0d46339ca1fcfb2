"""What an architecture's name stands for in timm, where neither tensors nor ``model_args`` say it."""

import re
from typing import Any

from vitral.checkpoints.layouts.layout import Draft
from vitral.runtime.settings import deep_merge


def layer(**options: Any) -> Draft:
    return {"layer": options}


def rotary(**options: Any) -> Draft:
    return {"layer": {"attention": {"rotary": options}}}


_EPS_5: Draft = {"norm": {"eps": 1e-5}}

# All rows that match apply, later ones over earlier ones.
FAMILIES: tuple[tuple[str, Draft], ...] = (
    (r"vit_.*_clip_|beit3|aimv2|dinov3|lingbot|vit_pe_", _EPS_5),
    (r"quickgelu", layer(feed_forward={"activation": "quick_gelu"})),
    (r"(patch32_siglip|giantopt_patch16_siglip|so400m_patch16_siglip|large_patch16_siglip(_gap)?_512)",
     layer(feed_forward={"activation": "gelu_tanh"})),
    (r"giantopt", {"num_heads": 16}),
    (r"vit_base_patch16_gap_224", {"num_heads": 16}),
    (r"aimv2_large", {"num_heads": 8}),
    (r"aimv2_huge", {"num_heads": 12}),
    (r"_rpn_", layer(order="residual_post")),
    (r"flexivit|radio", {"embedding": {"resize": "bilinear"}}),
    (r"(base|huge)_patch16_radio_v3", {"embedding": {"resize": "bilinear_corners"}}),
    (r"test_vit3", {"head": {"pool_prefix": True}}),
    (r"^eva02_(tiny|small|base|large)|rope_reg", rotary(reference_grid=(16, 16))),
    (r"^eva02_enormous", layer(order="residual_post")),
    (r"_rope_(ape_)?\d", rotary(column_first=True, temperature=100.0)),
    (r"_rope_mixed", rotary(kind="mixed", column_first=True, temperature=10.0)),
    (r"dinov3|lingbot", rotary(places="centered", temperature=100.0, halves=True)),
    (r"huge_plus_patch16_dinov3", {"num_heads": 20}),
    (r"vit_pe_", rotary(column_first=True, offset=1.0)),
    (r"vit_pe_core", {"head": {"pool_heads": 8, "pool_prefix": True}}),
    (r"vit_pe_core_base", rotary(reference_grid=(14, 14))),
    (r"vit_pe_core_(tiny|small|large)", rotary(reference_grid=(24, 24))),
    (r"vit_pe_(lang|spatial)", rotary(reference_grid=(32, 32))),
    (r"vit_pe_.*gigantic", {"num_heads": 16, **rotary(offset=0.0, reference_grid=(32, 32))}),
)  # fmt: skip


def family_of(architecture: str) -> Draft:
    """Returns what all rows say of an architecture."""
    return deep_merge(*(draft for pattern, draft in FAMILIES if re.search(pattern, architecture)))
