"""A function that calls compiled programs, over a leading axis: its programs mapped one by one, as `jax.vmap` would.

`jax.vmap` of a step computes the same, but maps every program anew at each call, and what it maps cannot be compiled
ahead. Here the step is traced once. Each of its equations (a call of a compiled program, or a single operation) becomes
a program of its own, in which `jax.vmap` maps the arguments that have the axis; where none has, it runs once for all.
A result has the axis if it depends on an argument that has: so a predicate that is the same for all stays one, and
`jax.lax.cond` a branch. With a mesh of several devices every program is a `jax.shard_map` over the axis, without
communication, since nothing in it reaches across.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aegis_jax.diffusion.threads import cores, side_by_side


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What an equation of a traced function is by itself: `jitted` of arrays of the shapes `args`, some `donated`."""

    jitted: Any
    args: list
    donated: list[int]

    def compiled(self):
        return self.jitted.lower(*self.args).compile()


@dataclasses.dataclass(frozen=True)
class Call:
    """A program with the variables that it reads and writes, and those that nothing reads after it."""

    name: str
    program: Any  # Program, or jax.stages.Compiled
    inputs: list
    outputs: list
    dead: list


@dataclasses.dataclass(frozen=True)
class Batched:
    """The function over the axis; call it with what `batched` was given, or other arrays of the same shapes.

    What its programs donate (`jax.jit`'s donate_argnums) is gone after a call, as it is after one of the function.
    """

    calls: list[Call]
    constants: dict
    inputs: list
    outputs: list
    structures: tuple  # of arguments and results

    def __call__(self, *args):
        leaves, structure = jax.tree.flatten(args)
        if structure != self.structures[0]:
            raise TypeError(f"called with {structure}, made for {self.structures[0]}")
        values = self.constants | dict(zip(self.inputs, leaves))
        del leaves
        for call in self.calls:
            values |= zip(call.outputs, call.program(*[values[v] for v in call.inputs]))
            for v in call.dead:
                values.pop(v, None)
        return jax.tree.unflatten(self.structures[1], [values[v] for v in self.outputs])


def batched(function: Callable, args: tuple, has_axis: tuple, wanted: Callable, mesh: Mesh | None = None) -> Batched:
    """`function` over a leading axis of some of its arguments, compiled.

    Args:
      args: trees of arrays, or of their shapes. has_axis: the same trees of truths, which arrays have the axis.
      wanted: result's shapes -> a tree of truths, which results shall have it. One that has none by itself is repeated.
      mesh: of one axis, whose devices share the leading axis; None: the default device.

    Raises `TypeError` if a result differs along the axis but shall not have it.
    """
    return _Build(function, args, has_axis, wanted, mesh).compiled()


def traced(function: Callable, args: tuple, has_axis: tuple, wanted: Callable) -> Batched:
    """The same with nothing compiled: its calls have a `Program` each, and it cannot be called itself.

    has_axis may be False throughout: then these are the programs of one call of the function as it stands.
    """
    return _Build(function, args, has_axis, wanted, None).traced()


@dataclasses.dataclass(eq=False)
class _Value:
    """Stands beside a jaxpr's variables, for what is none."""

    aval: Any


class _Build:
    """From a traced function to its `Call`s."""

    def __init__(self, function: Callable, args: tuple, has_axis: tuple, wanted: Callable, mesh: Mesh | None):
        leaves, structure = jax.tree.flatten(args)
        flags = jax.tree.leaves(has_axis)
        single = [jax.ShapeDtypeStruct(x.shape[1:] if flag else x.shape, x.dtype) for x, flag in zip(leaves, flags)]
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*jax.tree.unflatten(structure, single))
        self.size, self.mesh = next((x.shape[0] for x, flag in zip(leaves, flags) if flag), 1), mesh
        self.structures = structure, jax.tree.structure(shapes)
        jaxpr, wanted = closed.jaxpr, jax.tree.leaves(wanted(shapes))
        self.inputs = jaxpr.invars
        self.flags = dict(zip(jaxpr.invars, flags)) | dict.fromkeys(jaxpr.constvars, False)
        self.constants = {v: self._put(x) for v, x in zip(jaxpr.constvars, closed.consts)}
        self.programs: dict = {}  # {key: (Program, which results have the axis)}: what is the same is compiled once
        self.calls: list[tuple] = []  # (name, key of the program, inputs, outputs, dead)
        last = {v: n for n, equation in enumerate(jaxpr.eqns) for v in _variables(equation.invars)}
        last |= dict.fromkeys(_variables(jaxpr.outvars), len(jaxpr.eqns))
        for n, equation in enumerate(jaxpr.eqns):
            self._add(equation, {v for v in _variables(equation.invars) if last[v] == n}, last)
        self.outputs = [self._result(v, want) for v, want in zip(jaxpr.outvars, wanted, strict=True)]

    def _sharding(self, flag: bool):
        return None if self.mesh is None else NamedSharding(self.mesh, self._spec(flag))

    def _spec(self, flag: bool) -> PartitionSpec:
        return PartitionSpec(*self.mesh.axis_names * flag)

    def _put(self, x):
        """A constant, handed over once."""
        return jax.device_put(x, self._sharding(False))

    def _add(self, equation, dead: set, last: dict) -> None:
        inputs = _variables(equation.invars)
        outputs = [v for v in equation.outvars if not isinstance(v, core.DropVar)]
        donated = zip(equation.invars, equation.params.get("donated_invars", ()))
        donated = {v for v, given in donated if given and v in dead} - self.constants.keys()
        key = _key(equation, inputs, self.flags, donated)
        if key not in self.programs:
            self.programs[key] = self._program(equation, inputs, outputs, donated)
        program, flags = self.programs[key]
        self.flags |= zip(outputs, flags)
        if all(v in self.constants for v in inputs):
            self.constants |= zip(outputs, program.compiled()(*[self.constants[v] for v in inputs]))
            return
        unread = [v for v in outputs if v not in last]
        self.calls.append((_name(equation), key, inputs, outputs, [*dead, *unread]))

    def _program(self, equation, inputs, outputs, donated):
        # As it stands, whatever primitive it is: a jaxpr of this equation alone.
        about = core.DebugInfo("jit", _name(equation), None, None)
        jaxpr = core.Jaxpr((), inputs, outputs, [equation], equation.effects, about)
        function = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))
        flags = [self.flags[v] for v in inputs]
        avals = [v.aval for v in inputs]
        results = _results(function, avals, flags) if any(flags) else [False] * len(outputs)
        donated = [i for i, v in enumerate(inputs) if v in donated]
        return self._mapped(function, _name(equation), avals, flags, results, donated), results

    def _mapped(self, function, name: str, avals, flags, results, donated=()) -> Program:
        if any(flags) or any(results):
            size = self.size if self.mesh is None else self.size // self.mesh.size
            axes = [[0 if flag else None for flag in each] for each in (flags, results)]
            function = jax.vmap(function, *axes, axis_size=size)
            if self.mesh is not None:
                specs = [[self._spec(flag) for flag in each] for each in (flags, results)]
                specs = {"in_specs": tuple(specs[0]), "out_specs": specs[1]}
                function = jax.shard_map(function, mesh=self.mesh, check_vma=False, **specs)
        shapes = [
            jax.ShapeDtypeStruct((self.size,) * flag + a.shape, a.dtype, sharding=self._sharding(flag))
            for a, flag in zip(avals, flags)
        ]

        def call(*args):
            return function(*args)

        call.__name__ = name  # in the compiler's logs and in profiles
        shardings = None if self.mesh is None else [self._sharding(flag) for flag in results]
        return Program(jax.jit(call, donate_argnums=donated, out_shardings=shardings), shapes, list(donated))

    def _result(self, v, want: bool):
        """The variable of a result, repeated along the axis where it is to have it."""
        if isinstance(v, core.Literal):
            literal, v = v, _Value(v.aval)
            self.constants[v], self.flags[v] = self._put(literal.val), False
        if self.flags[v] == want:
            return v
        if not want:
            raise TypeError(f"a result of shape {v.aval.shape} differs along the axis, but is to be one for all")
        key = "repeated", v.aval.shape, v.aval.dtype
        if key not in self.programs:
            self.programs[key] = self._mapped(lambda x: [x], "repeated", [v.aval], [False], [True]), [True]
        repeated = _Value(v.aval)
        self.calls.append(("repeated", key, [v], [repeated], []))
        return repeated

    def compiled(self) -> Batched:
        """Every program compiled, on all cores."""
        keys = list(dict.fromkeys(key for _, key, *_ in self.calls))
        return self._done(dict(zip(keys, side_by_side(lambda key: self.programs[key][0].compiled(), keys, cores()))))

    def traced(self) -> Batched:
        return self._done({key: program for key, (program, _) in self.programs.items()})

    def _done(self, programs: dict) -> Batched:
        calls = [Call(name, programs[key], inputs, outputs, dead) for name, key, inputs, outputs, dead in self.calls]
        read = {v for call in calls for v in call.inputs} | set(self.outputs)
        constants = {v: x for v, x in self.constants.items() if v in read}
        return Batched(calls, constants, self.inputs, self.outputs, self.structures)


def _variables(atoms) -> list:
    """Those that are no constants, each once."""
    return list(dict.fromkeys(v for v in atoms if not isinstance(v, core.Literal)))


def _name(equation) -> str:
    return str(equation.params.get("name") or equation.primitive.name)


def _key(equation, inputs, flags, donated) -> tuple:
    """Equal for equations that one program serves: calls of one traced function with the same arguments mapped."""
    if "donated_invars" not in equation.params or any(isinstance(v, core.Literal) for v in equation.invars):
        return (id(equation),)
    places = tuple(inputs.index(v) for v in equation.invars)
    dropped = tuple(isinstance(v, core.DropVar) for v in equation.outvars)
    return id(equation.params["jaxpr"]), places, dropped, *((flags[v], v in donated) for v in inputs)


def _results(function, avals, flags: list[bool]) -> list[bool]:
    """Which results of a function over the axis have it: those that are of a mapped argument's kind while mapped."""
    found = []

    def watched(*args):
        kind = type(args[flags.index(True)])
        results = function(*args)
        found[:] = [isinstance(x, kind) for x in results]
        return results

    shapes = [jax.ShapeDtypeStruct((2,) * flag + a.shape, a.dtype) for a, flag in zip(avals, flags)]
    jax.eval_shape(jax.vmap(watched, [0 if flag else None for flag in flags]), *shapes)
    return found
