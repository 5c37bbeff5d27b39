"""Models in small: the names and layouts of the files of well-known architectures."""

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

WIDTH, INNER, FEW, WORDS = 8, 16, 4, 16  # Few sizes of tensors, so that few programs are compiled.


class Architecture(NamedTuple):
  """What is in a folder.

  Attributes:
    config: of the model; only what tells of layers and ties.
    shapes: of the tensors with floats, by name.
    stacks: of layers: the beginning of their names, and how many.
    dtype: of the weights.
    integers: shapes of buffers that hold integers, by name.
    equal: heads that are stored though they are the embedding, and what it is called.
    left_out: a head that the config ties to the embedding; files with it and without it are about.
  """

  config: Mapping[str, Any]
  shapes: Mapping[str, tuple[int, ...]]
  stacks: Mapping[str, int]
  dtype: Any = np.float32
  integers: Mapping[str, tuple[int, ...]] = {}
  equal: Mapping[str, str] = {}
  left_out: str | None = None


def dense(name, out=WIDTH, inner=WIDTH, *, bias=True):
  return {f"{name}.weight": (out, inner)} | ({f"{name}.bias": (out,)} if bias else {})


def norms(*names, bias=True):
  ends = ("weight", "bias") if bias else ("weight",)
  return {f"{name}.{end}": (WIDTH,) for name in names for end in ends}


def every(*parts):
  """All shapes of some parts of a model."""
  return {name: shape for part in parts for name, shape in part.items()}


def bert():
  shapes = {
    "bert.embeddings.word_embeddings.weight": (WORDS, WIDTH),
    "bert.embeddings.position_embeddings.weight": (WIDTH, WIDTH),
    "bert.embeddings.token_type_embeddings.weight": (2, WIDTH),
    **norms("bert.embeddings.LayerNorm"),
  }
  for i in range(3):
    layer = f"bert.encoder.layer.{i}"
    attention = [f"{layer}.attention.{n}" for n in ("self.query", "self.key", "self.value")]
    shapes |= every(
      *map(dense, (*attention, f"{layer}.attention.output.dense")),
      norms(f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"),
      dense(f"{layer}.intermediate.dense", INNER),
      dense(f"{layer}.output.dense", WIDTH, INNER),
    )
  shapes |= every(
    dense("bert.pooler.dense"),
    dense("cls.predictions.transform.dense"),
    norms("cls.predictions.transform.LayerNorm"),
    {"cls.predictions.bias": (WORDS,)},
    dense("cls.seq_relationship", 2),
  )
  return Architecture(
    {"model_type": "bert", "num_hidden_layers": 3},
    shapes,
    {"bert.encoder.layer.": 3},
    integers={"bert.embeddings.position_ids": (1, WIDTH)},
    equal={"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"},
  )


def t5():
  shapes = {"shared.weight": (WORDS, WIDTH)}
  for stack, count, attentions in (
    ("encoder", 2, ("SelfAttention",)),
    ("decoder", 3, ("SelfAttention", "EncDecAttention")),
  ):
    for i in range(count):
      for j, attention in enumerate(attentions):
        layer = f"{stack}.block.{i}.layer.{j}"
        parts = [dense(f"{layer}.{attention}.{n}", bias=False) for n in "qkvo"]
        shapes |= every(*parts, norms(f"{layer}.layer_norm", bias=False))
      layer = f"{stack}.block.{i}.layer.{len(attentions)}"
      shapes |= every(
        dense(f"{layer}.DenseReluDense.wi", INNER, bias=False),
        dense(f"{layer}.DenseReluDense.wo", WIDTH, INNER, bias=False),
        norms(f"{layer}.layer_norm", bias=False),
      )
    first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
    shapes |= every(
      dense(first, WIDTH, FEW, bias=False), norms(f"{stack}.final_layer_norm", bias=False)
    )
  return Architecture(
    {"model_type": "t5", "num_layers": 2, "num_decoder_layers": 3, "tie_word_embeddings": True},
    shapes,
    {"encoder.block.": 2, "decoder.block.": 3},
    left_out="lm_head.weight",
  )


def clip():
  def layers(stack, count):
    for i in range(count):
      layer = f"{stack}.layers.{i}"
      yield from (dense(f"{layer}.self_attn.{n}_proj") for n in ("q", "k", "v", "out"))
      yield norms(f"{layer}.layer_norm1", f"{layer}.layer_norm2")
      yield dense(f"{layer}.mlp.fc1", INNER)
      yield dense(f"{layer}.mlp.fc2", WIDTH, INNER)

  shapes = every(
    {"logit_scale": ()},
    {"text_model.embeddings.token_embedding.weight": (WORDS, WIDTH)},
    {"text_model.embeddings.position_embedding.weight": (WIDTH, WIDTH)},
    *layers("text_model.encoder", 2),
    norms("text_model.final_layer_norm"),
    {"vision_model.embeddings.class_embedding": (WIDTH,)},
    {"vision_model.embeddings.patch_embedding.weight": (WIDTH, 3, 2, 2)},
    {"vision_model.embeddings.position_embedding.weight": (WIDTH, WIDTH)},
    *layers("vision_model.encoder", 3),
    norms("vision_model.pre_layrnorm", "vision_model.post_layernorm"),
    dense("text_projection", bias=False),
    dense("visual_projection", bias=False),
  )
  text, vision = {"num_hidden_layers": 2}, {"num_hidden_layers": 3}
  return Architecture(
    {"model_type": "clip", "text_config": text, "vision_config": vision},
    shapes,
    {"text_model.encoder.layers.": 2, "vision_model.encoder.layers.": 3},
    integers={f"{m}_model.embeddings.position_ids": (1, WIDTH) for m in ("text", "vision")},
  )


def whisper():
  def attention(name):
    yield from (dense(f"{name}.{n}_proj") for n in ("q", "v", "out"))
    yield dense(f"{name}.k_proj", bias=False)
    yield norms(f"{name}_layer_norm")

  shapes = {
    "model.encoder.conv1.weight": (WIDTH, FEW, 3),
    "model.encoder.conv1.bias": (WIDTH,),
    "model.encoder.conv2.weight": (WIDTH, WIDTH, 3),
    "model.encoder.conv2.bias": (WIDTH,),
    "model.encoder.embed_positions.weight": (WIDTH, WIDTH),
    "model.decoder.embed_tokens.weight": (WORDS, WIDTH),
    "model.decoder.embed_positions.weight": (WIDTH, WIDTH),
    **norms("model.encoder.layer_norm", "model.decoder.layer_norm"),
  }
  for stack, count in (("encoder", 3), ("decoder", 2)):
    for i in range(count):
      layer = f"model.{stack}.layers.{i}"
      shapes |= every(
        *attention(f"{layer}.self_attn"),
        *(attention(f"{layer}.encoder_attn") if stack == "decoder" else ()),
        dense(f"{layer}.fc1", INNER),
        dense(f"{layer}.fc2", WIDTH, INNER),
        norms(f"{layer}.final_layer_norm"),
      )
  return Architecture(
    {
      "model_type": "whisper",
      "encoder_layers": 3,
      "decoder_layers": 2,
      "tie_word_embeddings": True,
    },
    shapes,
    {"model.encoder.layers.": 3, "model.decoder.layers.": 2},
    left_out="proj_out.weight",
  )


def decoder(layers, mlp, *, bias=False, buffers=False, head=True):
  """Shapes of the decoders that are laid out as Llama is."""
  shapes = {"model.embed_tokens.weight": (WORDS, WIDTH), **norms("model.norm", bias=False)}
  for i in range(layers):
    layer = f"model.layers.{i}"
    shapes |= every(
      dense(f"{layer}.self_attn.q_proj", bias=bias),
      dense(f"{layer}.self_attn.k_proj", FEW, bias=bias),
      dense(f"{layer}.self_attn.v_proj", FEW, bias=bias),
      dense(f"{layer}.self_attn.o_proj", bias=False),
      {f"{layer}.self_attn.rotary_emb.inv_freq": (FEW,)} if buffers else {},
      norms(f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", bias=False),
      mlp(layer),
    )
  return shapes | ({"lm_head.weight": (WORDS, WIDTH)} if head else {})


def gated(layer, names=("gate_proj", "up_proj", "down_proj"), part="mlp"):
  gate, up, down = (f"{layer}.{part}.{n}" for n in names)
  return every(
    dense(gate, INNER, bias=False),
    dense(up, INNER, bias=False),
    dense(down, WIDTH, INNER, bias=False),
  )


def routed(layer):
  experts = [gated(layer, ("w1", "w3", "w2"), f"block_sparse_moe.experts.{e}") for e in range(FEW)]
  return every(dense(f"{layer}.block_sparse_moe.gate", FEW, bias=False), *experts)


def llama():
  config = {"model_type": "llama", "num_hidden_layers": 3, "tie_word_embeddings": False}
  shapes = decoder(3, gated, buffers=True)
  return Architecture(config, shapes, {"model.layers.": 3}, ml_dtypes.bfloat16)


def qwen2():
  config = {"model_type": "qwen2", "num_hidden_layers": 2, "tie_word_embeddings": True}
  shapes = decoder(2, gated, bias=True, head=False)
  stacks = {"model.layers.": 2}
  return Architecture(config, shapes, stacks, ml_dtypes.bfloat16, left_out="lm_head.weight")


def gemma():
  """Its config says nothing of the head, which is the embedding."""
  config = {"model_type": "gemma", "num_hidden_layers": 2}
  equal = {"lm_head.weight": "model.embed_tokens.weight"}
  shapes = decoder(2, gated, head=False)
  return Architecture(config, shapes, {"model.layers.": 2}, ml_dtypes.bfloat16, equal=equal)


def mixtral():
  config = {"model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": FEW}
  shapes = decoder(2, routed)
  return Architecture(config, shapes, {"model.layers.": 2}, ml_dtypes.bfloat16)


ALL = {f.__name__: f() for f in (bert, t5, clip, whisper, llama, qwen2, gemma, mixtral)}


def tensors(own, seed, near=None):
  """Weights of an architecture; those of a fine-tuned model lie near another one's."""
  made = {}
  for name, shape in own.shapes.items():
    rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
    noise = rng.normal(size=shape)
    x = noise if near is None else near[name].astype(np.float64) + noise / 4
    made[name] = np.asarray(x, own.dtype)
    if name.endswith("inv_freq"):
      made[name] = np.asarray(1 / 10 ** np.linspace(0, 4, *shape), np.float32)
  made |= {head: made[embedding] for head, embedding in own.equal.items()}
  return made | {n: np.arange(s[-1]).reshape(s) + seed for n, s in own.integers.items()}
