"""Reading compiled programs: who talks to whom, and what is refused."""

import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_tasks
from hypothesis import given
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from marking import some_fast

from jaxmerge import methods
from jaxmerge.core import interpreter, layouts, tree
from jaxmerge.parallel import mesh as meshes
from jaxmerge.tasks import batch, losses
from jaxmerge.training import local_steps, optimizers, outer_optimizers, schedule, settings
from jaxmerge.training import round as rounds
from jaxmerge.xla import communication, cost, hlo_text, replica_groups

AXES = ("task", "data", "model")


@st.composite
def spans(draw):
  """Sizes of a mesh, and some of its axes."""
  sizes = draw(st.tuples(*[st.sampled_from([1, 2, 3, 4, 8])] * 3))
  chosen = draw(st.sets(st.integers(0, 2), min_size=1))
  return sizes, tuple(sorted(chosen))


def grid(sizes, chosen):
  """The groups over some axes, as rows of device numbers."""
  others = [i for i in range(3) if i not in chosen]
  ids = np.arange(math.prod(sizes)).reshape(sizes).transpose([*others, *chosen])
  return ids.reshape(-1, math.prod(sizes[i] for i in chosen)), [*others, *chosen]


def words(numbers):
  return ",".join(str(n) for n in numbers)


def spelled(sizes, chosen):
  """The same groups in every syntax."""
  rows, order = grid(sizes, chosen)
  named = ",".join(f"'axis_{i}'={n}" for i, n in enumerate(sizes))
  over = ",".join(f"'axis_{i}'" for i in chosen)
  turned = ",".join(f"'axis_{i}'={sizes[k]}" for i, k in enumerate(order))
  last = ",".join(f"'axis_{i}'" for i in range(3 - len(chosen), 3))
  flat = f"'all'={math.prod(sizes)}"
  return {
    "listed": "{" + ",".join("{" + words(row) + "}" for row in rows) + "}",
    "counted": f"[{words(rows.shape)}]<=[{words(sizes)}]T({words(order)})",
    "of mesh": f"mesh[{named}] {{{over}}}",
    "of a turned mesh": f"mesh[{turned}], device_ids=([{words(sizes)}]T({words(order)})) "
    f"{{{last}}}",
    "with ids": f"mesh[{flat}], device_ids=({words(rows.ravel())}) {{'all':"
    f"({rows.shape[0]}){rows.shape[1]}}}",
  }


@given(spans())
def test_groups_in_every_syntax_span_the_axes_they_were_made_of(drawn):
  sizes, chosen = drawn
  shape = dict(zip(AXES, sizes, strict=True))
  wanted = tuple(AXES[i] for i in chosen if sizes[i] > 1)
  rows = tuple(tuple(row) for row in grid(sizes, chosen)[0].tolist())
  for name, spelling in spelled(sizes, chosen).items():
    line = f"channel_id=1, replica_groups={spelling}, use_global_device_ids=true"
    found = replica_groups.replica_groups(line, math.prod(sizes))
    assert found == rows, name
    assert replica_groups.axes(found, shape) == wanted, name


@given(spans())
def test_shifts_along_an_axis_span_it(drawn):
  sizes, chosen = drawn
  rows, _ = grid(sizes, chosen)
  pairs = ",".join(
    f"{{{a},{b}}}" for row in rows for a, b in zip(row, np.roll(row, 1), strict=True)
  )
  found = replica_groups.pairs(f"channel_id=1, source_target_pairs={{{pairs}}}", math.prod(sizes))
  shape = dict(zip(AXES, sizes, strict=True))
  assert set(replica_groups.axes(found, shape)) == {AXES[i] for i in chosen if sizes[i] > 1}


def test_parts_of_axes():
  line = "replica_groups=mesh['a'=8] {'a':(2)2}"
  assert replica_groups.replica_groups(line, 8) == ((0, 2), (1, 3), (4, 6), (5, 7))
  # As a TPU program has it: device numbers of their own order.
  line = (
    "channel_id=5, replica_groups=mesh['axis_0'=4,'axis_1'=2,'axis_2'=1,'axis_3'=2], "
    "device_ids=([2,2,2,2]T(0,2,1,3)) {'axis_0':(2)2}, dimensions={0}"
  )
  found = replica_groups.replica_groups(line, 16)
  assert found == tuple((i, i + 2) for i in (0, 1, 4, 5, 8, 9, 12, 13))
  assert replica_groups.axes(found, dict(task=2, data=4, model=2)) == ("data",)
  assert replica_groups.replica_groups("replica_groups={}", 3) == ((0, 1, 2),)


@pytest.mark.parametrize(
  "value",
  [
    "{{0,1},{2,3}",
    "{{0,1},{2,a}}",
    "[2,2]<=[4]T(0)U(1)",
    "[2,2]<=(4)",
    "<<0,1>,<2,3>>",
    "mesh['a'=4] {'a':[2]2}",
    "mesh['a'=2,'b'=2] {a}",
    "mesh['a'=2,'b'=2], ids=(0) {'a'}",
    "mesh['a'=2,'b'=2]",
    "{{0,1},{2,3}}T",
  ],
)
def test_unknown_syntax_is_an_error(value):
  with pytest.raises(ValueError, match="unknown syntax"):
    replica_groups.replica_groups(f"channel_id=1, replica_groups={value}", 4)


@pytest.mark.parametrize(
  ("value", "words"),
  [
    ("{{0,1}}", "do not hold each of 4 devices once"),
    ("{{0,1},{1,2}}", "do not hold each of 4 devices once"),
    ("{{0,1},{2,9}}", "do not hold each of 4 devices once"),
    ("[2,2]<=[8]", "do not fit together"),
    ("mesh['a'=2,'b'=4] {'a'}", "do not hold each of 4 devices once"),
    ("mesh['a'=2,'b'=2] {'c'}", "do not fit together"),
    ("mesh['a'=4] {'a':(3)2}", "do not fit together"),
  ],
)
def test_groups_that_leave_devices_out_are_an_error(value, words):
  with pytest.raises(ValueError, match=words):
    replica_groups.replica_groups(f"channel_id=1, replica_groups={value}", 4)


def test_missing_groups_and_bad_pairs_are_errors():
  with pytest.raises(ValueError, match="no replica groups"):
    replica_groups.replica_groups("channel_id=1", 4)
  with pytest.raises(ValueError, match="no pairs that can be read"):
    replica_groups.pairs("source_target_pairs=[2,2]<=[4]", 4)
  with pytest.raises(ValueError, match="beyond 4"):
    replica_groups.pairs("source_target_pairs={{0,4}}", 4)


def program(line, head="HloModule m, num_partitions=4"):
  """A program of one collective over four devices."""
  return f"""{head}

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {{
  %x = f32[8,4]{{1,0:T(8,128)S(1)}} parameter(0), sharding={{devices=[4,1]<=[4]}}
  {line}
}}
"""


GROUPS = "channel_id=1, replica_groups=[2,2]<=[4], use_global_device_ids=true"
MESH = meshes.make(2, 2, 1, devices=jax.devices()[:4])


@pytest.mark.parametrize(
  ("line", "wanted"),
  [
    (f"ROOT %y = f32[8,4]{{1,0}} all-reduce(%x), {GROUPS}, to_apply=%add", (128, 128.0)),
    (f"ROOT %y = (f32[8,4]{{1,0}}) all-reduce-start(%x), {GROUPS}, to_apply=%add", (128, 128.0)),
    (f"ROOT %y = f32[16,4]{{1,0}} all-gather(%x), {GROUPS}, dimensions={{0}}", (256, 128.0)),
    (f"ROOT %y = (f32[8,4], f32[16,4]) all-gather-start(%x), {GROUPS}", (256, 128.0)),
    (f"ROOT %y = f32[4,4] reduce-scatter(%x), {GROUPS}, to_apply=%add", (128, 64.0)),
    ("ROOT %y = f32[8,4] all-to-all(%x), channel_id=2, replica_groups={{0,1},{2,3}}", (128, 64.0)),
    (
      "ROOT %y = (f32[8,4], f32[8,4], u32[]{:S(2)}) collective-permute-start(%x), channel_id=2, "
      "source_target_pairs={{0,1},{1,0},{2,3},{3,2}}",
      (128, 128.0),
    ),
  ],
)
def test_kinds_and_bytes(line, wanted):
  (found,) = communication.collectives(program(line), MESH)
  assert found.axes == ("data",)
  assert (found.bytes, found.bytes_sent) == wanted


@pytest.mark.parametrize(
  ("line", "words"),
  [
    ("ROOT %y = f32[8,4] all-reduce(%x), replica_groups={{0}}, to_apply=%add", "names replicas"),
    ("ROOT %y = f32[8,4] all-reduce(%x), channel_id=1, replica_groups={{0}}", "names replicas"),
    ("ROOT %y = (f32[8,4], u32[], token[]) send(%x), channel_id=1", "cannot be attributed"),
    (f"ROOT %y = f32[8,4] all-reduce(%x), {GROUPS.replace('[2,2]<=', '2x2:')}", "unknown syntax"),
    ("ROOT %y = q3[8,4] negate(%x)\n  %z = f32[] all-to-all(%y), channel_id=1, replica_groups={}",
     "dtype 'q3'"),
  ],
)  # fmt: skip
def test_what_cannot_be_attributed_is_an_error(line, words):
  with pytest.raises(ValueError, match=words):
    communication.collectives(program(line), MESH)


def chained(first):
  """A collective that a TPU begins in one fusion and goes on with in another."""
  part = GROUPS.replace("channel_id=1", "channel_id=7") + ', frontend_attributes={chain_id="3"}'
  begin = 'custom_call_target="AsyncCollectiveStart"' if first else 'custom_call_target="Other"'
  return f"""HloModule m, num_partitions=4

%begin (p: f32[8,4]) -> f32[16,4] {{
  %p = f32[8,4]{{1,0}} parameter(0)
  %g = f32[16,4]{{1,0}} all-gather(%p), {part}
  ROOT %c = f32[16,4]{{1,0}} custom-call(%g), {begin}
}}

%go_on (q: f32[8,4]) -> f32[16,4] {{
  %q = f32[8,4]{{1,0}} parameter(0)
  %h = f32[16,4]{{1,0}} all-gather(%q), {part}
  ROOT %d = f32[16,4]{{1,0}} custom-call(%h), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (x: f32[8,4]) -> f32[16,4] {{
  %x = f32[8,4]{{1,0}} parameter(0)
  %y = f32[16,4]{{1,0}} fusion(%x), kind=kCustom, calls=%begin
  ROOT %z = f32[16,4]{{1,0}} fusion(%x), kind=kCustom, calls=%go_on
}}
"""


def test_a_collective_in_parts_counts_once():
  (found,) = communication.collectives(chained(True), MESH)
  assert (found.kind, found.axes, found.times, found.bytes_sent) == (
    "all-gather",
    ("data",),
    1,
    128.0,
  )
  with pytest.raises(ValueError, match="goes on that has not begun: h"):
    communication.collectives(chained(False), MESH)


class Device:
  """A device of a slice, as TPUs have them."""

  def __init__(self, number, index):
    self.id, self.slice_index = number, index
    self.platform, self.process_index = "tpu", index


def two_slices(order=range(8)):
  """Two slices of four devices."""
  devices = np.empty(8, object)
  devices[:] = [Device(100_000 * (s + 1) + i, s) for s in (0, 1) for i in range(4)]
  return jax.sharding.Mesh(devices[list(order)].reshape(4, 2), ("task", "data"))


def sent(target, kind):
  hosts = '_xla_host_transfer_handler_name="xla_megascale_runtime"'
  told = f'{hosts},_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"'
  return program(
    f"%y = f32[8,4]{{1,0}} all-reduce(%x), {GROUPS}, to_apply=%add\n"
    f"  %s = (f32[8,4]{{1,0}}, u32[], token[]) send(%y, %x), channel_id=2, "
    f"frontend_attributes={{{told}}}\n"
    f"  ROOT %r = (f32[8,4]{{1,0}}, u32[], token[]) recv(%x), channel_id=3, "
    f"frontend_attributes={{{hosts}}}"
  )


@pytest.mark.parametrize(
  ("target", "kind", "wanted"),
  [
    ('"{1,2}x{0:3}"', "ALL_REDUCE", ("all-reduce", ("task",), 128, 2, 1, True)),
    ('"{1,2}x{0:3}"', "ALL_GATHER", ("all-gather", ("task",), 256, 2, 1, True)),
    (
      "{{100000->200001},{200001->100000}}",
      "ONE_TO_ONE",
      ("collective-permute", ("task", "data"), 128, 2, 1, True),
    ),
  ],
)
def test_what_is_sent_between_slices(target, kind, wanted):
  inside, outside = communication.collectives(sent(target, kind), two_slices())
  assert inside == ("all-reduce", ("data",), 128, 2, 1, False)
  assert outside == wanted


@pytest.mark.parametrize(
  ("target", "kind", "words"),
  [
    ('"{1,2}x{0:3}"', "ALL_TO_ALL", "cannot be attributed"),
    ('"everyone"', "ALL_REDUCE", "cannot be attributed"),
    ("{{100000->300001}}", "ONE_TO_ONE", "names device 300001, which is not in the mesh"),
  ],
)
def test_what_is_sent_elsewhere_is_an_error(target, kind, words):
  with pytest.raises(ValueError, match=words):
    communication.collectives(sent(target, kind), two_slices())


def test_slices_that_are_mixed_are_an_error():
  mesh = two_slices([0, 4, 1, 5, 2, 6, 3, 7])
  with pytest.raises(ValueError, match="slice by slice"):
    communication.collectives(sent('"{1,2}x{0:3}"', "ALL_REDUCE"), mesh)


def test_other_texts_are_errors():
  good = program(f"ROOT %y = f32[8,4] all-reduce(%x), {GROUPS}")
  with pytest.raises(ValueError, match="for 4 devices, the mesh has 8"):
    communication.collectives(good, meshes.make(8))
  with pytest.raises(ValueError, match="not the text of a compiled program"):
    communication.collectives("module @jit_f {}", MESH)
  with pytest.raises(ValueError, match="replicas beside partitions"):
    hlo_text.read(good.replace("num_partitions=4", "replica_count=2, num_partitions=4"))
  hidden = good.replace("ROOT %c = f32[] add(%a, %b)", f"ROOT %c = f32[] all-reduce(%a), {GROUPS}")
  with pytest.raises(ValueError, match="not reached: c"):
    communication.collectives(hidden, MESH)


def compiled(function, *arguments):
  return jax.jit(function).lower(*arguments).compile().as_text()


def abstract(mesh, shape, *spec, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def test_loops_are_counted():
  mesh = meshes.make(2, 2, 2)
  layers = abstract(mesh, (5, 8, 16), None, None, "model")
  back = abstract(mesh, (5, 16, 8), None, "model", None)
  x = abstract(mesh, (4, 8), "data")

  def forward(layers, back, x, times):
    def layer(x, own):
      return x + jnp.maximum(x @ own[0], 0) @ own[1], None

    def once(_, x):
      return jax.lax.scan(layer, x, (layers, back))[0]

    return jax.lax.fori_loop(0, times, once, x)

  own = compiled(forward, layers, back, x, abstract(mesh, (), dtype=jnp.int32))
  found = communication.collectives(own, mesh, trips=3)
  assert {(c.kind, c.axes, c.bytes, c.times) for c in found} == {
    ("all-reduce", ("model",), 2 * 8 * 4, 15)
  }
  assert communication.by_axis(found) == {("all-reduce", ("model",)): (15, 15 * 64.0)}
  # Two products of [2, 8] with [8, 8] a layer on each device.
  assert cost.count(own, trips=3).flops == 15 * 2 * (2 * 2 * 8 * 8)


def parts_of(mesh, tasks=4):
  own = settings.Settings(rounds=2, epochs=4.0, batch_size=4)
  params = small_tasks.weights()
  local = optimizers.local(own, params)
  step = local_steps.step(small_tasks.network, losses.cross_entropy, own, local)
  rest = dict(tasks=tasks, slots=tasks, keeps_states=False, layout=layouts.NONE, mesh=mesh)
  return (
    rounds.Parts(step, local, outer_optimizers.optimizer(own, params), methods.ties(), **rest),
    own,
    params,
  )


def arguments(mesh, own, params, tasks=4):
  given = [small_tasks.classified(f"t{i}", 12) for i in range(tasks)]
  rows = batch.stack(given, "train", num_slots=tasks)
  plan = schedule.plan([t.name for t in given], [12] * tasks, own, 0, rounds=2)
  shapes = {n: v.shape for n, v in tree.named(params).items()}
  ready = interpreter.prepare(methods.ties(), shapes, tasks, {}, [t.name for t in given])

  def put(x, place):
    return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=place), x)

  everywhere, by_task = meshes.replicated(mesh), meshes.task_sharding(mesh)
  return put(params, everywhere), put(rows, by_task), put(plan, by_task), ready


def to_host(program):
  """Operations of a compiled program that hand arrays to the host, or ask it for some."""
  ops = [step.op for step in hlo_text.steps(hlo_text.read(program))]
  kinds = ("infeed", "outfeed", "send", "send-start", "recv", "recv-start")
  return [op.name for op in ops if op.kind in kinds or "callback" in op.attributes]


def test_what_goes_to_the_host_is_seen():
  def told(x):
    jax.debug.callback(lambda x: None, x)
    return x + 1

  assert to_host(compiled(told, jnp.ones(4)))


@pytest.mark.parametrize("data", some_fast([1, 2], [2]))
def test_a_round_talks_over_tasks_when_it_merges_and_not_before(data):
  mesh = meshes.make(4, data)
  parts, own, params = parts_of(mesh)
  params, rows, plan, ready = arguments(mesh, own, params)

  def tuned(params, rows, plan):
    return rounds.tune(parts, params, (), rows, plan)

  found = communication.collectives(compiled(tuned, params, rows, plan), mesh)
  assert {axis for c in found for axis in c.axes} == ({"data"} if data > 1 else set())
  state = rounds.State(params, (), ())
  given = (state, (), params, rows, plan, ready, np.float32(1))
  whole = compiled(rounds.function(parts), *given)
  found = communication.collectives(whole, mesh)
  assert {"all-reduce", "all-gather"} & {c.kind for c in found if "task" in c.axes}
  assert not to_host(whole)
