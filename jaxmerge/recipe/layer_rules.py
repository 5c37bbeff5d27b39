"""Rules by which classes of transformers 5.24 derive a layer's kind from its number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple  # Any: JSON of a config.


class Layers(NamedTuple):
  """A restacking of layers.

  Attributes:
    num_layers: number of old layers, as stored.
    order: the old number of each new layer.
    counted: number of old layers by the config.
  """

  num_layers: int
  order: tuple[int, ...]
  counted: int | None = None

  def is_list_of(self, value: Sequence[Any]) -> bool:
    """Returns whether a list is long enough to have an entry for each layer."""
    if len(value) not in (self.num_layers, self.counted):
      return False
    if len(value) <= max(self.order, default=0):
      raise ValueError(
        f"the config of the base, or first model, has {list(value)!r:.100}, an entry for each of "
        f"{len(value)} layers, but layer {max(self.order)} of a model is stacked: let one that has "
        "as many layers be the first."
      )
    return True


class Cycle(NamedTuple):
  """A rule by which every n-th layer is of one kind, and the list that can replace it.

  Attributes:
    key: the config key of the distance; optional.
    every: the default distance; 0: no rule by default.
    first: whether layer 0 is of that kind; otherwise the last of each period is.
    list: the key of the list.
    kinds: its entries for layers of that kind and for others; (1, 0): it lists layer numbers.
  """

  key: str
  every: int
  first: bool
  list: str
  kinds: tuple[Any, Any]

  def holds(self, every: int, layer: int) -> bool:
    """Returns whether a layer is of that kind."""
    return (layer if self.first else layer + 1) % every == 0


_SLIDING, _LINEAR = ("full_attention", "sliding_attention"), ("full_attention", "linear_attention")
WINDOWS = "sliding_window_pattern"
BY_KEY = {
  "full_attention_interval": Cycle("full_attention_interval", 4, False, "layer_types", _LINEAR),
  "no_rope_layer_interval": Cycle("no_rope_layer_interval", 4, False, "no_rope_layers", (0, 1)),
  "interleave_moe_layer_step": Cycle("interleave_moe_layer_step", 1, False, "moe_layers", (1, 0)),
  "layer_group_size": Cycle("layer_group_size", 6, False, "layer_types", _LINEAR),
  WINDOWS: Cycle(WINDOWS, 0, False, "layer_types", _SLIDING),
  f"_{WINDOWS}": Cycle(f"_{WINDOWS}", 0, False, "layer_types", _SLIDING),
}
_EVERY_NTH = Cycle("global_attn_every_n_layers", 4, False, "layer_types", _SLIDING)


def _windows(every: int, first: bool = False) -> Cycle:
  return Cycle(WINDOWS, every, first, "layer_types", _SLIDING)


_HYBRID = _windows(6)._replace(kinds=("hybrid", "hybrid_sliding"))
_VISION = _windows(4)._replace(kinds=("full_attention", "window_attention"))
_INDEXED = BY_KEY["full_attention_interval"]._replace(
  kinds=("indexed_attention", "linear_attention")
)
# By model_type: rules that hold whatever the config says.
BY_TYPE = {
  **dict.fromkeys(("gemma2", "vaultgemma", "gpt_oss", "t5_gemma_module"), _windows(2)),
  "ultrabert": _windows(3),
  **dict.fromkeys(("cohere2", "cohere2_moe", "exaone4", "exaone_moe", "olmo3"), _windows(4)),
  **dict.fromkeys(("dory", "muse_glimmer_text", "muse_spark_text"), _windows(4)),
  **dict.fromkeys(("muse_glimmer_vision", "muse_spark_vision"), _VISION),
  **dict.fromkeys(("gemma3n_text", "kolibri1"), _windows(5)),
  **dict.fromkeys(("gemma3_text", "gemma3", "gemma4_text", "gemma4_unified_text"), _windows(6)),
  **dict.fromkeys(("beam", "neomme", "t5gemma2_text", "t5gemma2_decoder"), _windows(6)),
  **dict.fromkeys(("diffusion_gemma_text", "embedding_gemma2_text"), _windows(6)),
  **dict.fromkeys(("inkling_text", "inkling2_text", "inkling2_loop_text"), _HYBRID),
  **dict.fromkeys(("cwm", "granite_swa", "granitemoe_swa"), _windows(4, first=True)),
  **dict.fromkeys(("modernbert", "modernbert-decoder"), _EVERY_NTH._replace(every=3, first=True)),
  "afmoe": _EVERY_NTH,
  "bailing_hybrid": BY_KEY["layer_group_size"],
  **dict.fromkeys(("qwen3_next", "olmo_hybrid"), BY_KEY["full_attention_interval"]),
  **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text"), BY_KEY["full_attention_interval"]),
  **dict.fromkeys(("qwen4_exp_text", "glm5_next_text"), _INDEXED),
  "minimax": Cycle("", 2, True, "layer_types", _LINEAR),
  **dict.fromkeys(
    ("smollm3", "llama4_text", "mistral_large4_text"), BY_KEY["no_rope_layer_interval"]
  ),
}
UNEVEN = {  # By model_type: classes with other rules, and the keys of these.
  **dict.fromkeys(("deepseek_v4", "dots3_note_text", "flint", "lfm3_vl_vision"), ("layer_types",)),
  **dict.fromkeys(("kimi_linear", "mimo_v2_flash"), ("layer_types", "linear_attn_config")),
  **dict.fromkeys(("jamba", "zamba"), ("layers_block_type", "attn_layer_period")),
  **dict.fromkeys(("lara_mini", "lfm3"), ("layer_types",)),
  "recurrent_gemma": ("block_types",),
}


FROM = {  # Layers from a number on are of another kind; with the list that replaces the rule.
  "first_k_dense_replace": ("mlp_layer_types", ("dense", "sparse")),
  "num_dense_layers": (None, (None, None)),
  "max_window_layers": ("layer_types", _SLIDING),
}
# Classes with mlp_layer_types, and their default number of dense layers.
DENSE = {
  **dict.fromkeys(("axk1", "axk2", "ernie4_5_vl_moe_text", "exaone_moe", "glm4_moe_lite"), 1),
  **dict.fromkeys(("hy_v3", "hy_v4", "hy_v4_vl_text", "laguna", "unlimited_ocr_text"), 1),
  **dict.fromkeys(("kimi_linear", "mimo_v2_flash", "mistral_large4_text"), 1),
  **dict.fromkeys(("beam", "deepseek_v32", "glm5_next_text", "glm_moe_dsa", "step3p5"), 3),
  "bailing_hybrid": 2,
  "cohere2_moe": 0,
}
# Classes whose layers from max_window_layers on have a window.
WINDOWED = re.compile(
  r"qwen(2|3)(_vl|_5_vl|_5_omni|_omni_moe)?(_text|_talker\w*)?|dots1|deepseek_ocr2\w*"
)


EVERY = re.compile(
  r"layer\w*(every|interval|period|freq|step)|(every|interval|freq)\w*layer"
  r"|(attn|attention|moe|expert|mamba|dense|sparse)\w*_(every|interval|period|freq)"
)
STEPS = ("cross_attention_frequency", "encoder_sparse_step", "decoder_sparse_step")
EDGE = re.compile(
  r"layer\w*_(start|end|first|last)(_index)?$|(first|skip|dense|moe|sparse|global|local)\w*_layers$"
)
LAST = re.compile(r"gemma4\w*|diffusion_gemma\w*")  # Their last layer has no window.
WRITTEN = {*BY_KEY, *FROM, "num_kv_shared_layers"}


def is_period(key: str) -> bool:
  """Returns whether a rule concerns every n-th layer."""
  return bool(EVERY.search(key) or key in STEPS)
