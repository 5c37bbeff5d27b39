"""Shapes of recipes that people have published: methods, keys and values, on models of any names.

Each is as short as it can be and still has the structure that one in public has: models are called
`b` (the base), `m0`, `m1`, ..., adapters `a0`, `a1`; layers are counted as there.
"""

from typing import NamedTuple


class Shape(NamedTuple):
  """A recipe as people write it.

  Attributes:
    text: the YAML.
    layers: of the models that it is for.
    refused: what the error says; empty: it runs.
    notes: how many keys have no effect.
  """

  text: str
  layers: int = 4
  refused: str = ""
  notes: int = 0


def listed(*models):
  """Models of a list: a name, or (name, parameters)."""
  rows = [m if isinstance(m, tuple) else (m, "") for m in models]
  return "models:\n" + "".join(
    f"  - {{model: {m}{f', parameters: {{{p}}}' if p else ''}}}\n" for m, p in rows
  )


def sliced(*slices, extra=""):
  """Slices: tuples of sources, (model, first, last) or (model, first, last, parameters)."""
  out = "slices:\n"
  for sources in slices:
    out += "- sources:\n"
    for model, first, last, *rest in sources:
      own = f", parameters: {{{rest[0]}}}" if rest else ""
      out += f"  - {{model: {model}, layer_range: [{first}, {last}]{own}}}\n"
    out += f"  {extra}\n" if extra else ""
  return out


def default(text):
  """The form in which mergekit writes out slices."""
  return "modules:\n  default:\n" + "".join(f"    {line}\n" for line in text.splitlines())


T = "{t: [{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}, {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}, {value: 0.5}]}"  # noqa: E501
PAIR40, PAIR32 = [(("m0", 0, n), ("m1", 0, n)) for n in (40, 32)]
HALF = "density: 0.5, weight: 0.5"


def made(method, inputs, *rest, base=""):
  """A recipe of its parts."""
  head = f"merge_method: {method}\n" + (f"base_model: {base}\n" if base else "")
  return head + inputs + "".join(f"{line}\n" for line in rest)


RUN = {
  # The examples of mergekit.
  "fusion": Shape(made("arcee_fusion", listed("b", "m0"), "dtype: bfloat16", base="b")),
  "bio": Shape(
    made(
      "ties",
      listed(("m0", HALF), ("m1", HALF)),
      "parameters: {normalize: false, int8_mask: true}",
      "dtype: float16",
      base="b",
    )
  ),
  "gradient slerp": Shape(
    made("slerp", sliced(PAIR40), f"parameters: {T}", "dtype: float16", base="m0"), 40
  ),
  "linear": Shape(
    made(
      "linear",
      listed(("m0", "weight: 1.0"), ("m1", "weight: 0.3"), ("m2", "weight: 0.5")),
      "dtype: float16",
    )
  ),
  "44 layers": Shape(
    made("passthrough", sliced([("m0", 0, 24)], [("m1", 20, 40)]), "dtype: float16"), 40
  ),
  "ties with gradients": Shape(
    made(
      "ties",
      listed(
        ("m0", "density: [1, 0.7, 0.1], weight: 1.0"),
        ("m1", "density: 0.5, weight: [0, 0.3, 0.7, 1]"),
        ("m2", "density: 0.33, weight: [{filter: mlp, value: 0.5}, {value: 0}]"),
      ),
      "parameters: {normalize: true, int8_mask: true}",
      base="b",
    )
  ),
  "three stages": Shape(
    made("linear", listed("m0", "m1"), "name: first-merge", "parameters: {weight: 0.5}")
    + "---\n"
    + made("slerp", listed("m2"), "name: second-merge", "parameters: {t: 0.5}", base="first-merge")
    + "---\n"
    + made(
      "dare_ties", listed(("second-merge", "density: 0.6, weight: 0.5"), ("m3", HALF)), base="b"
    )
  ),
  "two stages, both named": Shape(
    made("slerp", sliced(PAIR40), f"parameters: {T}", "name: gs", base="m0")
    + "---\n"
    + made(
      "ties",
      listed(("gs", "density: [1, 0.7, 0.1], weight: 1.0"), ("m2", HALF)),
      "name: gst",
      base="b",
    ),
    40,
  ),
  # DARE.
  "daredevil": Shape(
    made(
      "dare_ties",
      listed(
        "b",
        ("m0", "density: 0.53, weight: 0.4"),
        ("m1", "density: 0.53, weight: 0.3"),
        ("m2", "density: 0.53, weight: 0.3"),
      ),
      "parameters: {int8_mask: true}",
      "dtype: bfloat16",
      base="b",
    )
  ),
  "base with a weight": Shape(
    made(
      "dare_ties",
      listed(("b", "weight: 0.2"), ("m0", "weight: 0.2"), ("m1", "weight: 0.2")),
      "parameters: {density: 0.3}",
      "tokenizer: {source: union}",
      "chat_template: auto",
      base="b",
    ),
    notes=0,
  ),
  "dtype among the parameters": Shape(
    made(
      "dare_ties",
      listed(("m0", "density: 0.6, weight: 0.4"), ("m1", "density: 0.6, weight: 0.6")),
      "parameters: {int8_mask: true, dtype: bfloat16}",
      base="b",
    ),
    notes=1,
  ),
  "no rescale": Shape(
    made(
      "dare_ties",
      listed(("m0", "weight: 1.0, density: 1.0"), ("m1", "weight: 0.846, density: 1.0")),
      "dtype: bfloat16",
      "parameters: {lambda: 1.0, rescale: false}",
      base="b",
    )
  ),
  "weights over depth": Shape(
    made(
      "dare_ties",
      listed(
        "b",
        ("m0", "weight: [0.22, 0.113, 0.113, 0.113, 0.113, 0.113], density: 0.61"),
        ("m1", "weight: [0.02, 0.081, 0.081, 0.081, 0.081, 0.081], density: 0.59"),
      ),
      "tokenizer_source: union",
      "parameters: {int8_mask: true}",
      "dtype: bfloat16",
      "name: 4kmerge-v2",
      base="b",
    ),
    12,
  ),
  "int_space": Shape(
    made(
      "dare_ties", listed(("m0", HALF), ("m1", HALF)), 'parameters: {int_space: "cs"}', base="b"
    ),
    notes=1,
  ),
  "tokenizer of a model": Shape(
    made(
      "dare_ties",
      listed(("m0", "weight: 1.0, density: 0.7"), ("m1", "weight: 0.4, density: 0.7")),
      "parameters: {normalize: false, int8_mask: true}",
      "tokenizer: {source: m0}",
      "chat_template: auto",
      base="b",
    )
  ),
  "weight for all": Shape(
    made("dare_linear", listed("m0", "m1"), "parameters: {weight: 1.0}", "dtype: float16", base="b")
  ),
  "dare of one": Shape(
    made("dare_linear", listed("b", ("m0", "weight: 0.8, density: 0.1")), base="b")
  ),
  "dare of one, no base listed": Shape(
    made("dare_linear", listed(("m0", "weight: 1.0, density: 0.3")), "dtype: bfloat16", base="b")
  ),
  "old tokenizer source": Shape(
    made(
      "dare_linear",
      listed("b", ("m0", "weight: 0.6, density: 0.85"), ("m1", "weight: 0.4, density: 0.9")),
      "dtype: float16",
      "tokenizer_source: model:m0",
      base="b",
    )
  ),
  "epsilon of another method": Shape(
    made(
      "dare_linear",
      listed(("m0", "weight: 0.7"), ("m1", "weight: 0.3")),
      "parameters: {density: 0.4, epsilon: 0.01}",
      "tokenizer_source: union",
      base="b",
    ),
    notes=1,
  ),
  "density beside the model": Shape(
    made(
      "dare_ties",
      "models:\n- {model: m0, density: 0.5, parameters: {weight: 0.4}}\n"
      "- {model: m1, density: 0.5, parameters: {weight: 0.3}}\n",
      base="b",
    ),
    notes=2,
  ),
  # Model stock.
  "weights of stock": Shape(
    "dtype: float32\nout_dtype: bfloat16\n"
    + made(
      "model_stock",
      listed(
        ("m0", "weight: [{filter: mlp, value: [2, 1]}, {value: 1}]"),
        ("m1", "weight: [{filter: mlp, value: [1, 2]}, {value: 1}]"),
      ),
      base="b",
    ),
    notes=2,
  ),
  "stock with a name": Shape(
    made(
      "model_stock",
      listed("m0", "m1", "m2", "m3"),
      "name: Athena-Apollo-exp",
      "dtype: bfloat16",
      "tokenizer_source: b",
      base="b",
    )
  ),
  "stock, base among them": Shape(
    made("model_stock", listed("m0", "b", "m1", "m2"), "dtype: bfloat16", base="b")
  ),
  "stock of slices": Shape(
    made(
      "model_stock",
      sliced([("b", 0, 32), ("m0", 0, 32), ("m1", 0, 32)]),
      "dtype: bfloat16",
      base="b",
    ),
    32,
  ),
  "stock of adapters": Shape(
    made("model_stock", listed("b+a0", "b+a1", "m0"), "dtype: bfloat16", base="b+a2")
  ),
  # SCE.
  "sce on an adapter": Shape(
    made(
      "sce",
      listed("m0", "m1", "m2"),
      "dtype: bfloat16",
      "parameters: {normalize: true, select_topk: 0.5}",
      base="b+a0",
    ),
    notes=1,
  ),
  "sce at the top": Shape(
    made("sce", listed("m0", "m1"), "select_topk: .15", "tokenizer: {source: base}", base="b"),
    notes=1,
  ),
  "sce with leftovers": Shape(
    made(
      "sce",
      listed(("m0", "weight: 1.0, density: 0.9"), ("m1", "weight: 1.0, density: 0.9")),
      "parameters: {normalize: true, int8_mask: true, rescale: true, filter_wise: false, "
      "smooth: false, allow_negative_weights: false, lambda: 1.0, select_topk: 0.1}",
      "tokenizer: {source: union}",
      "chat_template: auto",
      "dtype: bfloat16",
      "out_dtype: bfloat16",
      base="b",
    ),
    notes=10,
  ),
  "sce with weights": Shape(
    made(
      "sce",
      listed(("m0", "weight: 0.3"), ("m1", "weight: 0.7")),
      "parameters: {lambda: 0.5, select_topk: 0.7}",
      base="b",
    ),
    notes=3,
  ),
  # DELLA and breadcrumbs.
  "della in mergekit's form": Shape(
    made(
      "della_linear",
      default(
        sliced(
          [
            ("m0", 0, 40, "density: 0.5, epsilon: 0.4, weight: [0.9, 0.2, 0.2, 0.2, 0.95]"),
            ("m1", 0, 40, "density: 0.5, epsilon: 0.4, weight: [0.1, 0.9, 1.0, 0.95, 0.4]"),
            ("b", 0, 40),
          ]
        )
      ),
      "parameters: {lambda: 1.0, normalize: 1.0}",
      "tokenizer: {}",
      "dtype: bfloat16",
      base="b",
    ),
    40,
  ),
  "della, epsilon of each": Shape(
    made(
      "della_linear",
      listed(
        ("m0", "weight: 0.2, density: 0.5, epsilon: 0.4"),
        ("m1", "weight: 0.4, density: 0.4, epsilon: 0.3"),
      ),
      "parameters: {lambda: 0.9, normalize: true}",
      "dtype: bfloat16",
      "tokenizer: {source: union}",
      base="b",
    )
  ),
  "della, weights by part": Shape(
    made(
      "della_linear",
      listed(
        (
          "m0",
          "density: 0.6, weight: [{filter: self_attn, value: 0.3}, {filter: mlp, value: 0.15}, "
          "{value: 0.2}]",
        ),
        ("m1", "density: 0.7, weight: [{filter: mlp, value: 0.35}, {value: 0.25}]"),
      ),
      'chat_template: "chatml"',
      "tokenizer_source: union",
      "parameters: {normalize: true, int8_mask: true, epsilon: 0.05, lambda: 1}",
      base="b",
    )
  ),
  "della, tokenizer of the base": Shape(
    made(
      "della_linear",
      listed(("m0", "weight: 0.1, density: 0.4"), ("m1", "weight: 0.33, density: 0.8")),
      "parameters: {epsilon: 0.05, lambda: 1}",
      "tokenizer_source: base",
      base="b",
    )
  ),
  "della, base listed": Shape(
    made(
      "della",
      listed("b", ("m0", "density: 0.6, weight: 1.0, epsilon: 0.1")),
      "parameters: {lambda: 1.0}",
      base="b",
    )
  ),
  "della, normalized": Shape(
    made(
      "della",
      listed(("m0", "weight: 0.5"), ("m1", "weight: 0.6")),
      "parameters: {density: 0.8, normalize: true, int8_mask: true}",
      "dtype: float16",
      base="b",
    )
  ),
  "della, wide": Shape(
    made(
      "della",
      listed(("m0", "weight: 0.5"), ("m1", "weight: 0.5")),
      "parameters: {density: 0.5, normalize: true, epsilon: 0.4, lambda: 1}",
      "tokenizer_source: union",
      'chat_template: "llama3"',
      base="b",
    )
  ),
  "breadcrumbs": Shape(
    made(
      "breadcrumbs",
      listed(("m0", "weight: 1.0"), ("m1", "weight: 0.5")),
      "parameters: {density: 0.9, gamma: 0.01}",
      "dtype: float16",
      base="b",
    )
  ),
  "breadcrumbs with a template": Shape(
    made(
      "breadcrumbs",
      listed(("m0", "weight: 0.5"), ("m1", "weight: 0.7")),
      "parameters: {lambda: 0.5, density: 0.9, gamma: 0.01}",
      'chat_template: "alpaca"',
      base="b",
    )
  ),
  "breadcrumbs_ties": Shape(
    made(
      "breadcrumbs_ties",
      listed(
        ("m0", "gamma: 0.01, density: 0.9, weight: [0.0825, 0.0825, 0.33, 0.0825, 0.0825]"),
        ("m1", "gamma: 0.01, density: 0.9, weight: [0.33, 0.0825, 0.0825, 0.0825, 0.0825]"),
      ),
      "parameters: {normalize: false, int8_mask: true}",
      base="b",
    )
  ),
  "breadcrumbs_ties, lambda": Shape(
    made(
      "breadcrumbs_ties",
      listed(("m0", "weight: 0.3"), ("m1", "weight: 0.7")),
      "parameters: {lambda: 0.5, density: 0.9, gamma: 0.01}",
      base="b",
    )
  ),
  # On the sphere.
  "slerp of whole models": Shape(
    made("slerp", listed("m0", "m1"), "parameters: {t: 0.5}", "dtype: bfloat16", base="m0")
  ),
  "slerp of the base and one": Shape(
    made("slerp", listed("m0"), "parameters: {t: 0.45}", "dtype: bfloat16", base="b")
  ),
  "slerp with a long gradient": Shape(
    made(
      "slerp",
      listed("m0", "m1"),
      "parameters: {t: [{filter: self_attn, value: [0.5, 0.3, 0.7, 0.5, 0.7, 0.3, 0.5, 0.3, 0.7, "
      "0.5, 0.7, 0.3, 0.5]}, {filter: mlp, value: [0.5, 0.7, 0.3]}, {value: 0.5}]}",
      base="m0",
    ),
    32,
  ),
  "slerp, normalize": Shape(
    made(
      "slerp",
      listed("m0", "m1"),
      "parameters: {normalize: true, t: [0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.6, 0.5, 0.6]}",
      base="m0",
    ),
    notes=1,
  ),
  "slerp and a union": Shape(
    made(
      "slerp",
      sliced([("m0", 0, 48), ("m1", 0, 48)]),
      f"parameters: {T}",
      "tokenizer_source: union",
      "dtype: float16",
      base="m1",
    ),
    48,
  ),
  "slerp, embeddings apart": Shape(
    made(
      "slerp",
      listed("b", "m0"),
      "parameters: {t: [{filter: embed_tokens, value: 0.7}, {filter: lm_head, value: 0.7}, "
      "{value: 0.5}]}",
      base="b",
    )
  ),
  "slerp, all in the slice": Shape(
    made(
      "slerp",
      sliced(PAIR32, extra="merge_method: slerp\n  base_model: m0\n  parameters: {t: 0.5}"),
      "dtype: float16",
    ),
    32,
    notes=1,
  ),
  "slerp, a filter beside t": Shape(
    made(
      "slerp",
      sliced(
        [("m0", 0, 16), ("m1", 0, 16)],
        [("m0", 16, 31), ("m1", 16, 31)],
        extra="parameters: {t: 0.7, filter: self_attn}",
      ),
      "parameters: {t: 0.5}",
      base="m0",
    ),
    32,
    notes=2,
  ),
  "nuslerp, base and switches": Shape(
    made(
      "nuslerp",
      listed(("m0", "weight: 0.5"), ("m1", "weight: 0.5")),
      "parameters: {nuslerp_flatten: true, nuslerp_row_wise: false}",
      "dtype: bfloat16",
      base="b",
    )
  ),
  "nuslerp over depth": Shape(
    made(
      "nuslerp",
      listed(("m0", "weight: [0.1, 0.3, 0.1]"), ("m1", "weight: [0.9, 0.7, 0.9]")),
      "dtype: float32",
      "out_dtype: bfloat16",
      "tokenizer: {source: m1}",
    )
  ),
  "stages into a stack": Shape(
    made("nuslerp", listed(("m0", "weight: 0.4"), ("m1", "weight: 0.6")), "name: core")
    + "---\n"
    + made("nuslerp", listed(("m2", "weight: 0.6"), ("m3", "weight: 0.4")), "name: blend")
    + "---\n"
    + made(
      "passthrough",
      sliced([("m0", 0, 5)], [("m1", 5, 14)], [("core", 14, 22)], [("blend", 22, 40)]),
    ),
    40,
  ),
  "multislerp, weights of each layer": Shape(
    made(
      "multislerp",
      listed(
        ("m0", "weight: [1.000, 1.000, 0.744, 0.256, 0.000, 0.000, 0.15]"),
        ("m1", "weight: [0.000, 0.000, 0.256, 0.744, 1.000, 1.000, 0.85]"),
      ),
    ),
    40,
  ),
  "multislerp, normalize": Shape(
    made(
      "multislerp",
      listed(("m0", "weight: 0.5"), ("m1", "weight: 0.5"), ("m2", "weight: 0.5")),
      "tokenizer: {source: base}",
      "chat_template: chatml",
      "parameters: {normalize: true}",
      base="b",
    ),
    notes=1,
  ),
  "multislerp, keys at the top": Shape(
    made(
      "multislerp",
      listed(("m0", "weight: [0.5]"), ("m1", "weight: [0.7]")),
      "tokenizer: {source: base}",
      "chat_template: llama3",
      "parameters: {normalize_weights: false, eps: 1e-8}",
      "pad_to_multiple_of: 8",
      "int8_mask: true",
      base="b",
    ),
    notes=2,
  ),
  "karcher of many, one twice": Shape(
    made(
      "karcher",
      listed("m0", "m1", "m2", "m3", "m1"),
      "parameters: {tol: 1e-10, max_iter: 999}",
      "tokenizer: {source: union}",
    ),
    notes=1,
  ),
  "karcher in mergekit's form": Shape(
    made(
      "karcher",
      default(sliced([("m0", 0, 40), ("m1", 0, 40)])),
      "parameters: {max_iter: 9999, tol: 1e-9}",
    ),
    40,
  ),
  "karcher": Shape(
    made("karcher", listed("m0", "m1"), "dtype: bfloat16", "parameters: {max_iter: 10, tol: 1e-5}")
  ),
  "nearswap, then karcher": Shape(
    made(
      "nearswap",
      listed("m1"),
      "name: First",
      "parameters: {t: 0.0008}",
      "tokenizer: {source: m0}",
      base="m0",
    )
    + "---\n"
    + made("nearswap", listed("m3"), "name: Second", "parameters: {t: 0.0008}", base="m2")
    + "---\n"
    + made(
      "karcher",
      listed("First", "Second"),
      "parameters: {tol: 1e-9, max_iter: 20000}",
      "tokenizer: {source: First}",
    )
  ),
  "nearswap over depth": Shape(
    made(
      "nearswap",
      listed("m0"),
      "dtype: bfloat16",
      "out_dtype: bfloat16",
      "parameters: {t: [0.0001, 0.0003, 0.0005, 0.0003, 0.0001]}",
      base="b",
    )
  ),
  "nearswap, base listed": Shape(
    made("nearswap", listed("b", "m0"), "dtype: bfloat16", "parameters: {t: 0.001}", base="b")
  ),
  "fusion, weights": Shape(
    "dtype: float32\nout_dtype: bfloat16\n"
    + made(
      "arcee_fusion",
      listed(
        ("b", "weight: [{filter: mlp, value: [1, 2]}, {value: 1}]"),
        ("m0", "weight: [{filter: lm_head, value: 1}, {value: [1, 0.5]}]"),
      ),
      base="b",
    ),
    notes=2,
  ),
  # Sums.
  "linear and a union": Shape(
    made(
      "linear",
      listed(("m0", "weight: 1.0"), ("m1", "weight: 1.0"), ("m2", "weight: 1.0")),
      "tokenizer_source: union",
      "dtype: float16",
    )
  ),
  "linear of checkpoints": Shape(
    made(
      "linear",
      listed(("m0", "weight: 1"), ("m1", "weight: 2"), ("b", "weight: 3")),
      "parameters: {normalize: true}",
      "dtype: float32",
      "out_dtype: bfloat16",
      base="b",
    )
  ),
  "linear, base": Shape(
    made("linear", listed(("b", "weight: 1.0"), ("m0", "weight: 0.5")), base="b")
  ),
  "arithmetic of an adapter": Shape(
    made(
      "task_arithmetic",
      sliced([("b+a0", 0, 4, "weight: 1.0")]),
      "parameters: {normalize: false}",
      "dtype: bfloat16",
      base="b+a0",
    )
  ),
  "arithmetic": Shape(
    made(
      "task_arithmetic",
      listed(("m0", "weight: 1.0"), ("m1", "weight: 1.0")),
      "dtype: bfloat16",
      base="b",
    )
  ),
  "arithmetic, small weights": Shape(
    made(
      "task_arithmetic",
      listed("b", ("m0", "weight: 1.0"), ("m1", "weight: 0.01"), ("m2", "weight: 0.02")),
      "dtype: float16",
      base="b",
    )
  ),
  "arithmetic, evolved": Shape(
    made(
      "task_arithmetic",
      sliced([("b", 0, 28), ("m0", 0, 28, "weight: 0.5"), ("m1", 0, 28, "weight: 0.5")]),
      "dtype: bfloat16",
      "parameters: {lambda: 0.5676097213578511, normalize: 1.0}",
      base="b",
    ),
    28,
  ),
  "ties, base weighted": Shape(
    made(
      "ties",
      listed(("b", "density: 0.7, weight: 1.0"), ("m0", "density: 0.7, weight: 1.0")),
      "parameters: {normalize: true, int8_mask: true}",
      "dtype: bfloat16",
      "tokenizer_source: union",
      base="b",
    )
  ),
  "ties, all at the top": Shape(
    made("ties", listed("m0", "m1"), "parameters: {weight: 0.5, density: 0.5}", base="b")
  ),
  "ties, lambda": Shape(
    made(
      "ties",
      listed(("b", "weight: 0.4"), ("m0", "weight: 0.35"), ("m1", "weight: 0.25")),
      "parameters: {density: 0.6, lambda: 1.0}",
      "tokenizer: {source: union}",
      base="b",
    )
  ),
  # Stacks.
  "a revision beside the model": Shape(
    made(
      "passthrough",
      "slices:\n- sources: [{model: m0, revision: dpo-v0, layer_range: [0, 24]}]\n"
      "- sources: [{model: m0, layer_range: [8, 32]}]\n",
      "dtype: bfloat16",
    ),
    32,
    notes=1,
  ),
  "9B": Shape(made("passthrough", sliced([("m0", 0, 32)], [("m1", 24, 32)])), 32),
  "interleaved": Shape(
    made(
      "passthrough",
      sliced([("m0", 0, 13)], [("m1", 3, 22)], [("m0", 14, 27)], [("m1", 23, 40)]),
      "dtype: float16",
    ),
    40,
  ),
  "many pieces of one": Shape(
    made(
      "passthrough",
      sliced(*([("m0", i, min(i + 8, 32))] for i in range(0, 28, 4))),
      "dtype: float16",
    ),
    32,
  ),
  "grown, new layers silent": Shape(
    made(
      "passthrough",
      sliced(
        [("m0", 0, 4)],
        [
          (
            "m0",
            3,
            4,
            "scale: [{filter: q_proj, value: 0.0}, {filter: up_proj, value: 0.0}, {value: 1.0}]",
          )
        ],
      ),
    )
  ),
  "adapter as a model": Shape(made("passthrough", listed("b+a0"), "dtype: bfloat16")),
}

# What mergekit does not run either, or not as meant.
REFUSED = {
  "a key misspelt": Shape(
    made("sce", listed("m0", "m1"), "dype: float32", base="b"),
    refused="unknown key 'dype' in the recipe; did you mean 'dtype'?",
  ),
  "no models": Shape(
    made("slerp", "", "parameters: {t: 0.5}", base="b"), refused="needs one of models, slices, mod"
  ),
  "no base": Shape(
    made("ties", "models:\n- {model: m0, density: 1.0, weight: 0.6}\n"), refused="ties needs base_m"
  ),
  "slerp without a base": Shape(
    made("slerp", listed("m0", "m1"), "parameters: {t: 0.5}"), refused="slerp needs base_model"
  ),
  "slerp of three": Shape(
    made("slerp", listed("m0", "m1"), "parameters: {t: 0.5}", base="b"),
    refused="slerp merges 1 and the base, got 2 beside the base: m0, m1.",
  ),
  "t at the models": Shape(
    made("slerp", listed(("m0", "t: 0.5"), ("b", "t: 0.5")), base="b"),
    refused="slerp needs t; give it in the parameters of the slice or the recipe.",
  ),
  "slices without ranges": Shape(
    made(
      "dare_linear",
      "slices:\n- sources:\n  - {model: b, glorious_base: true}\n"
      "  - {model: m0, parameters: {density: 0.5, weight: 0.4}}\n",
      base="b",
    ),
    refused="needs the key layer_range",
  ),
  "slices without the base": Shape(
    made("ties", sliced(PAIR32), "parameters: {weight: 0.5, density: 0.5}", base="b"),
    32,
    refused="the base 'b' is not among the sources of this slice",
  ),
  "tokenizer as a word": Shape(
    made("linear", listed("m0", "m1"), "parameters: {weight: 1}", "tokenizer: union"),
    refused="tokenizer must be a mapping",
  ),
  "an unknown method": Shape(
    made("dare", listed("m0"), "parameters: {density: 0.4}", base="b"), refused="density"
  ),
  "a dtype of others": Shape(
    made("linear", listed("m0", "m1"), "parameters: {weight: 1}", "dtype: q4_k_m"),
    refused="dtype cannot be 'q4_k_m'",
  ),
  "experts": Shape(
    "base_model: b\ngate_mode: hidden\nexperts: [{source_model: m0}]\n",
    refused="this is a recipe of mergekit-moe",
  ),
}
