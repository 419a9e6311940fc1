"""The gradient of an update by a schedule, as a function of arrays on the mesh."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_jax.parallel.executor.device import DeviceProgram
from moe_jax.parallel.executor.interface import PIPE, Arguments, Result, Stages, Tree
from moe_jax.parallel.executor.placement import from_places, piece_numbers, to_places
from moe_jax.parallel.gradient_split import Saveable, everything
from moe_jax.parallel.schedules import PipelineSchedule


def make_gradient(
    schedule: PipelineSchedule,
    stages: Stages,
    mesh: Mesh,
    specs: Arguments,
    saveable: Saveable = everything,
) -> Callable[[Arguments], Result]:
    """The gradient of an update by this schedule, over the axis `pipe` of the mesh.

    `specs` is the layout of the arguments: specs, or trees of them. Layers are split over `pipe`.
    A parameter may be split over other axes as well, and its gradient then is. All axes of the mesh
    are manual inside. Each device runs the stages on its own rows, and the losses that `layer` and
    `last` return are sums over the whole batch, which they take themselves (lax.psum). Their
    collectives must be over axes other than `pipe`: its devices do different steps in a tick. None
    may be a ppermute: beside stages that do other steps it gives wrong numbers on CPUs.
    """
    placement = piece_numbers(schedule)
    axes = tuple(mesh.axis_names)

    def of_device(arguments: Arguments) -> Result:
        return DeviceProgram.of(schedule, stages, saveable, axes, arguments).run()

    whole: Any = P()
    # [layers, …] is [devices · chunks, layers of a piece, …] inside (placement.to_places).
    layers = jax.tree.map(lambda spec: P(PIPE, None, *spec[1:]), specs.layers, is_leaf=_is_spec)
    spec: Any = specs._replace(layers=layers)
    out = Result(whole, specs.shared, layers, P(PIPE), whole)
    local = jax.shard_map(
        of_device, mesh=mesh, in_specs=(spec,), out_specs=out, axis_names=set(axes)
    )

    def gradient(arguments: Arguments) -> Result:
        def placed(tree: Tree) -> Tree:
            return jax.tree.map(lambda a: to_places(a, placement), tree)

        def collected(tree: Tree) -> Tree:
            return jax.tree.map(lambda a: from_places(a, placement), tree)

        placed_arguments = arguments._replace(
            layers=placed(arguments.layers), own=placed(arguments.own)
        )
        result = local(placed_arguments)
        return result._replace(layers=collected(result.layers), others=collected(result.others))

    return gradient


def _is_spec(node: Any) -> bool:
    return isinstance(node, P)
