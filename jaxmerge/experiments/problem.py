"""The experiments' models and tasks, made from a config."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple  # Any: parameters are nested dicts of arrays.

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh

from jaxmerge import catalog, layouts, methods, processes, shaping, tree
from jaxmerge import mesh as meshes
from jaxmerge.atm import baselines, evaluate, sampling, tune
from jaxmerge.atm.settings import Settings
from jaxmerge.io import atomic, safetensors
from jaxmerge.models import bert, cnn, llama
from jaxmerge.stage import Method
from jaxmerge.tasks import domains, heads, images, text
from jaxmerge.tasks.task import Task


class Problem(NamedTuple):
  """What an experiment runs on.

  Attributes:
    title: one line for the report.
    base: what the base model is called, for the model card.
    apply: (params, inputs, head) -> logits.
    params: the base's parameters.
    tasks: the tasks, with heads.
    layout: matrix views of the leaves.
    save: (folder, params, readme) writes a model that other tools open.
    license: of the base model.
    loss: (outputs, labels) -> [B, ...], whose mean is minimised.
    metric: what models are judged by.
    sharding: rules for a mesh whose model axis splits the weights of a copy; none: it cannot.
  """

  title: str
  base: str
  apply: tune.Apply
  params: Any
  tasks: tuple[Task, ...]
  layout: tuple[tuple[str, str], ...]
  save: Callable[[pathlib.Path, Any, str], None]
  license: str
  loss: tune.Rowwise = tune.cross_entropy
  metric: evaluate.Metric = evaluate.ACCURACY
  sharding: meshes.Rules = ()


# (shapes, how it is made) -> what was trained for the base: made, or what was saved of it.
Keep = Callable[[Any, Callable[[], Any]], Any]


def images4(config: Mapping[str, Any], keep: Keep) -> Problem:
  """Four image tasks and a small CNN that has been pretrained, briefly, on a few rows of each.

  The heads are trained with the base and frozen after that.
  """
  tasks = images.load(config["seed"], **config["data"])
  settings = dict(config["pretrain"])
  like = {
    "params": jax.eval_shape(cnn.init, jax.random.key(0)),
    "heads": [jax.ShapeDtypeStruct((cnn.FEATURES, t.num_classes), np.float32) for t in tasks],
  }

  def trained() -> dict[str, Any]:
    params, own = pretrain(tasks, seed=config["seed"], **settings)
    return {"params": params, "heads": own}

  made = keep(like, trained)
  params, own = made["params"], map(np.asarray, made["heads"])
  tasks = tuple(dataclasses.replace(t, head=h) for t, h in zip(tasks, own, strict=True))

  def save(folder: pathlib.Path, params: Any, readme: str) -> None:
    leaves = {n: np.asarray(v) for n, v in tree.named(params).items()}
    own = {f"head/{t.name}": np.asarray(t.head) for t in tasks}
    with atomic.folder(folder, replace=True) as beside:
      safetensors.save(beside / "model.safetensors", leaves | own)
      (beside / "README.md").write_text(readme, encoding="utf-8")

  return Problem(
    "Four image tasks, one small CNN",
    "a CNN of 0.12 M parameters, pretrained on a few rows of every task",
    cnn.apply,
    params,
    tasks,
    cnn.VIEWS,
    save,
    "apache-2.0",
  )


def pretrain(
  tasks: Sequence[Task], *, seed: int, rows: int, steps: int, learning_rate: float
) -> tuple[Any, list[np.ndarray]]:
  """Trains the CNN and one linear head a task jointly, on the first `rows` rows of each task."""
  few = [
    t.train._replace(inputs=t.train.inputs[:rows], labels=t.train.labels[:rows]) for t in tasks
  ]
  own = tune.stacked(
    [dataclasses.replace(t, train=s) for t, s in zip(tasks, few, strict=True)], "train"
  )
  own = jax.tree.map(jnp.asarray, own)
  wide = max(t.num_classes for t in tasks)
  schedule = optax.cosine_decay_schedule(learning_rate, steps)
  optimizer = optax.adamw(schedule, weight_decay=0.05)
  counts = [len(s.labels) for s in few]
  streams = [
    sampling.stream(t.name, n, seed, 0, steps * 32) for t, n in zip(tasks, counts, strict=True)
  ]
  index = np.stack(streams).reshape(len(tasks), steps, 32).swapaxes(0, 1)

  def loss(both: Any, index: Any) -> Any:
    def task(head: Any, rows: Any, index: Any) -> Any:
      out = tune.outputs(cnn.apply, both[0], rows.inputs[index], head, rows.classes)
      return tune.cross_entropy(out, rows.labels[index]).mean()

    rows = own._replace(head=None)
    return lax.map(lambda each: task(*each), (both[1], rows, index)).sum()

  @jax.jit
  def train(key: Any, index: Any) -> Any:
    both = (cnn.init(key), jnp.zeros((len(tasks), cnn.FEATURES, wide), jnp.float32))

    def step(carry: Any, index: Any) -> Any:
      both, state = carry
      updates, state = optimizer.update(jax.grad(loss)(both, index), state, both)
      return (optax.apply_updates(both, updates), state), None

    return lax.scan(step, (both, optimizer.init(both)), index)[0][0]

  params, made = train(jax.random.key(seed), index)
  return params, [np.asarray(made[i, :, : t.num_classes]) for i, t in enumerate(tasks)]


def minilm8(config: Mapping[str, Any], keep: Keep) -> Problem:
  """Eight text tasks and the real all-MiniLM-L6-v2 encoder, with frozen zero-shot heads."""
  settings = dict(config["model"])
  own, params, folder = bert.minilm(settings["folder"] or None)
  tokenizer, length = bert.tokenizer(folder), settings["length"]
  sizes = dict(config["data"])
  embed = jax.jit(lambda ids, mask: bert.embed(own, params, ids, mask))
  read = text.load(sizes.pop("tasks", None) or None, seed=config["seed"], **sizes)
  prompts = [text.tokens(task.prompts, tokenizer, length) for task in read]
  shapes = [jax.eval_shape(embed, *own).shape[::-1] for own in prompts]
  made = keep(
    {"heads": [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]},
    lambda: {"heads": [heads.zero_shot(embed, *p, scale=settings["head_scale"]) for p in prompts]},
  )
  tasks = [
    text.encode(task, tokenizer, length, np.asarray(head))
    for task, head in zip(read, made["heads"], strict=True)
  ]

  def save(target: pathlib.Path, params: Any, readme: str) -> None:
    bert.save(target, own, params, source=folder, readme=readme, replace=True)

  return Problem(
    f"{len(tasks)} text tasks, all-MiniLM-L6-v2",
    "sentence-transformers/all-MiniLM-L6-v2",
    bert.apply(own, jnp.dtype(config["compute_dtype"])),
    params,
    tuple(tasks),
    bert.VIEWS,
    save,
    "apache-2.0",
  )


def domains6(config: Mapping[str, Any], keep: Keep) -> Problem:
  """Six domains of bytes and a decoder that has been trained on some rows of each, mixed."""
  own, apply = llama.of_fields(config["model"], jnp.dtype(config["compute_dtype"]))
  sizes = dict(config["data"])
  found = domains.load(sizes.pop("domains"), seed=config["seed"], **sizes)
  mixed = jax.tree.map(lambda *xs: np.concatenate(xs), *[d.pretrain for d in found])
  settings = Settings(schedule="cosine", clip_norm=1.0, seed=config["seed"], **config["pretrain"])
  start = functools.partial(llama.init, own, jax.random.key(config["seed"]))
  mixture = Task("mixture", mixed, found[0].task.validation)

  def trained() -> Any:
    return baselines.joint(apply, start(), [mixture], settings, mixed=False)[0]

  params = keep(jax.eval_shape(start), trained)

  def save(folder: pathlib.Path, params: Any, readme: str) -> None:
    length = sizes["length"]
    llama.export(folder, own, params, max_positions=length, readme=readme, replace=True)

  million = sum(x.size for x in jax.tree.leaves(params)) / 1e6
  return Problem(
    f"{len(found)} domains of text, a byte-level decoder",
    f"a decoder of bytes with {million:.1f} M parameters, trained on some rows of every domain",
    apply,
    params,
    tuple(d.task for d in found),
    llama.VIEWS,
    save,
    "apache-2.0",
    metric=evaluate.BITS_PER_BYTE,
    sharding=llama.SHARDING,
  )


MAKERS: Mapping[str, Callable[[Mapping[str, Any], Keep], Problem]] = {
  "images4": images4,
  "minilm8": minilm8,
  "domains6": domains6,
}


def make(config: Mapping[str, Any], keep: Keep = lambda like, made: made()) -> Problem:
  """Makes the model and tasks that the config names.

  Args:
    config: the plain config.
    keep: is given shapes of what is trained for the base, and what trains it; may have it already.

  Raises:
    ValueError: for an experiment that there is not, or that has shapes alone.
  """
  name = config["experiment"]
  if name in MAKERS:
    return MAKERS[name](config, keep)
  if name in shaping.MAKERS:
    raise ValueError(
      f"the experiment {name!r} has shapes alone, no weights and no rows: `jaxmerge compile` "
      "compiles it, and `jaxmerge.tune_and_merge` runs it from Python on yours, see docs/tpu.md."
    )
  raise ValueError(f"experiment must be one of {', '.join(MAKERS)}, got {name!r}.")


def shared(problem: Problem) -> Problem:
  """A problem that each process has made by itself, with the first one's weights and heads."""
  heads = [t.head for t in problem.tasks if t.head is not None]
  params, heads = processes.same((problem.params, heads))
  if heads:
    tasks = zip(problem.tasks, heads, strict=True)
    problem = problem._replace(tasks=tuple(dataclasses.replace(t, head=h) for t, h in tasks))
  return problem._replace(params=params)


def make_like(params: Any, height: int, phase: str, mesh: Mesh) -> Any:
  """The shapes and places of what a phase keeps: a stack of experts, or one model."""
  lead = (height,) if phase.split("_")[0] == "experts" else ()
  even = lead and height % mesh.shape["task"] == 0
  place = meshes.by_task(mesh) if even else meshes.everywhere(mesh)
  return jax.tree.map(
    lambda p: jax.ShapeDtypeStruct((*lead, *p.shape), p.dtype, sharding=place), params
  )


def method_of(settings: Mapping[str, Any]) -> Method:
  """Makes the method that a config names: {"name": "ties", "density": 0.2}."""
  settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
  name = settings.pop("name")
  catalog.check(name, settings)
  return getattr(methods, name)(**settings)


def one_shot_plan(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Returns the settings of a config's one-shot merges by name; the average is always one."""
  asked = {k: dict(v) for k, v in config["baselines"].items() if k in catalog.METHODS}
  return {"average": {}, **asked}


def layout_notes(problem: Problem, params: Any, config: Mapping[str, Any]) -> list[str]:
  """Says of each method of rows or matrices which leaves have which matrix view, and why."""
  named = {n: {"name": n, **settings} for n, settings in one_shot_plan(config).items()}
  named["atm"] = dict(config["method"])
  leaves, notes = tree.named(params), []
  shapes = {n: tuple(x.shape) for n, x in leaves.items() if tree.is_floating(x)}
  for name, settings in named.items():
    settings.pop("scales", None)
    method = method_of(settings)
    table = layouts.settled(method, shapes, problem.layout, names=leaves)
    notes += [f"{name}: {line}" for line in layouts.lines(method, table)]
  return notes


def settings_of(config: Mapping[str, Any]) -> Settings:
  """Returns the loop's settings: the config's keys of the same names."""
  return Settings(**{f.name: config[f.name] for f in dataclasses.fields(Settings)})


def post_hoc(tasks: Sequence[Task]) -> tuple[Task, ...]:
  """Returns tasks for post-hoc ATM: tuned on one half of the validation rows, chosen by the other.

  The halves are drawn at random, the same for every run.
  """
  out = []
  for t in tasks:
    rows = len(t.validation.labels)
    drawn = np.random.default_rng(tree.tag(t.name)).permutation(rows)
    halves = (np.sort(drawn[: -(-rows // 2)]), np.sort(drawn[-(-rows // 2) :]))
    parts = [jax.tree.map(lambda x, own=own: x[own], t.validation) for own in halves]
    out.append(dataclasses.replace(t, train=parts[0], validation=parts[1]))
  return tuple(out)
