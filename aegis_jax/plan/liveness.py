"""How many bytes a program needs while it runs, from its jaxpr alone: an estimate, for where no compiler can be asked.

The model, after what XLA does: operations run in the order in which they were traced; elementwise operations, views and
broadcasts are part of what reads them and take no memory, unless a product, a convolution, a loop or a kernel reads
them, or the program returns them; everything else is written to memory and lies there until it was last read. What it
cannot know is the order that a compiler chooses, what a kernel keeps, and padding.
"""

import math

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

from aegis_jax.erasure.batched import Program

# So many lanes stand for any number of them: a size that this prime divides is a lane's, that many times over.
LANES = 1009
_INLINED = {"pjit", "jit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
# Part of their readers: views, and what computes an element from elements at the same place.
_FUSED = set(
    "broadcast_in_dim reshape squeeze expand_dims transpose convert_element_type copy slice rev pad select_n iota "
    "abs add add_any sub mul div neg sign sqrt rsqrt cbrt square exp exp2 expm1 log log1p logistic tanh sin cos tan "
    "erf erfc erf_inv pow integer_pow max min clamp rem floor ceil round nextafter and or not xor eq ne lt le gt ge "
    "is_finite shift_left shift_right_logical shift_right_arithmetic bitcast_convert_type stop_gradient "
    "reduce_precision copy_p random_wrap random_unwrap".split()
)
# Whose attention kernel is taken. cuDNN's keeps as little, but can be traced only where the GPU is.
_KERNELS = "tpu"
NOTHING = np.zeros(2, np.int64)


def split(nbytes: int) -> np.ndarray:
    """A size as (bytes shared by all lanes, bytes of each lane)."""
    return np.array([0, nbytes // LANES] if nbytes % LANES == 0 else [nbytes, 0], np.int64)


def at(sizes: np.ndarray, lanes: int):
    """Bytes of sizes (..., 2) with that many lanes."""
    return sizes[..., 0] + lanes * sizes[..., 1]


class _Value:
    """What stands for an array: `roots` are the arrays in memory that it is computed from, itself if it is one."""

    __slots__ = ("bytes", "roots", "size", "born", "last")

    def __init__(self, nbytes: np.ndarray, roots=None):
        self.bytes, self.roots, self.size = nbytes, roots, NOTHING
        self.born = self.last = 0


def timeline(program: Program) -> tuple[np.ndarray, list[jax.ShapeDtypeStruct]]:
    """(sizes of temporaries at each of the program's operations in order (T, 2), its results).

    Sizes are `split`. Arguments and results are not among the temporaries.
    """
    jaxpr = needed(program)
    return _Walk().run(jaxpr), [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in jaxpr.outvars]


def peak(temporaries: np.ndarray, lanes: int) -> np.ndarray:
    """The largest size of a timeline with that many lanes."""
    return temporaries[np.argmax(at(temporaries, lanes))] if len(temporaries) else NOTHING


def size(array) -> np.ndarray:
    """What an array, or the shape of one, takes, `split`."""
    itemsize = 8 if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key) else array.dtype.itemsize
    return split(math.prod(array.shape) * itemsize)


def needed(program: Program):
    """The jaxpr of a program without what it computes in vain, which no compiler keeps."""
    jaxpr = jax.make_jaxpr(program.jitted)(*program.args).jaxpr
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)[0]


def inner(equation):
    """The jaxpr of an operation that only stands for others, or None."""
    if equation.primitive.name not in _INLINED:
        return None
    found = next(equation.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in equation.params)
    return getattr(found, "jaxpr", found)


class _Walk:
    def __init__(self):
        self.values: list[_Value] = []  # in memory
        self.extra: list[np.ndarray] = []  # at each operation, what it needs for itself

    def run(self, jaxpr) -> np.ndarray:
        env = {v: self._given() for v in (*jaxpr.invars, *jaxpr.constvars)}
        results = self._walk(jaxpr, env)
        for value in results:  # lies in a buffer of its own, which the caller counts
            self._read(value)
            value.size = NOTHING
        change = np.zeros((len(self.extra) + 2, 2), np.int64)
        for value in self.values:
            change[value.born] += value.size
            change[value.last + 1] -= value.size
        return np.cumsum(change, 0)[: len(self.extra)] + np.array(self.extra, np.int64).reshape(-1, 2)

    def _given(self) -> _Value:
        value = _Value(NOTHING)
        value.roots = {value}
        return value

    def _stored(self, nbytes: np.ndarray) -> _Value:
        value = _Value(nbytes)
        value.roots, value.size = {value}, nbytes
        value.born = value.last = len(self.extra)
        self.values.append(value)
        return value

    def _read(self, value: _Value) -> None:
        for root in value.roots:
            root.last = len(self.extra)

    def _materialise(self, value: _Value) -> None:
        """A value that was part of its readers comes to lie in memory, for a reader that cannot compute it."""
        self._read(value)
        if value.roots != {value}:
            value.roots, value.size = {value}, value.bytes
            value.born = value.last = len(self.extra)
            self.values.append(value)

    def _walk(self, jaxpr, env: dict) -> list[_Value]:
        read = lambda v: self._given() if isinstance(v, core.Literal) else env[v]  # noqa: E731
        for equation in jaxpr.eqns:
            inputs = [read(v) for v in equation.invars]
            outputs = self._equation(equation, inputs)
            env.update(zip(equation.outvars, outputs))
        return [read(v) for v in jaxpr.outvars]

    def _equation(self, equation, inputs: list[_Value]) -> list[_Value]:
        name, sizes = equation.primitive.name, [size(v.aval) for v in equation.outvars]
        if (jaxpr := inner(equation)) is not None:
            return self._inlined(jaxpr, inputs)
        if name == "cond" and (branch := self._branch(equation)) is not None:
            return self._inlined(branch, inputs[1:])
        if name == "optimization_barrier":
            for value in inputs:
                self._materialise(value)
            self.extra.append(NOTHING)
            return inputs
        if name in _FUSED or (name == "concatenate" and len(inputs) == 1):
            roots = set().union(*(value.roots for value in inputs))
            return [_Value(each, roots) for each in sizes]
        reduces = name.startswith(("reduce_", "arg"))  # what it reads it computes itself
        made = [value.roots != {value} for value in inputs]  # for this operation alone
        for value in inputs:
            self._read(value) if reduces else self._materialise(value)
        outputs = [self._stored(each) for each in sizes]
        if name == "scan":  # a carry that was made for the loop is changed in place
            first = equation.params["num_consts"]
            for i in range(equation.params["num_carry"]):
                if made[first + i]:
                    self.values.remove(outputs[i])
                    outputs[i] = inputs[first + i]
        self.extra.append(
            max((self._within(j) for j in _loops(equation.params)), default=NOTHING, key=lambda size: at(size, LANES))
        )
        return outputs

    def _inlined(self, closed, inputs: list[_Value]) -> list[_Value]:
        jaxpr = getattr(closed, "jaxpr", closed)
        constants = {v: self._given() for v in jaxpr.constvars}
        return self._walk(jaxpr, constants | dict(zip(jaxpr.invars, inputs)))

    def _branch(self, equation):
        """Of code that depends on the platform, that with a kernel; None where the branches are a computed choice."""
        platforms = equation.params.get("branches_platforms")
        if platforms is None:
            return None
        found = [n for n, names in enumerate(platforms) if names is not None and _KERNELS in names]
        rest = [n for n, names in enumerate(platforms) if names is None]
        return equation.params["branches"][(found or rest)[0]]

    def _within(self, closed) -> np.ndarray:
        """The most that a loop's body or a branch needs."""
        return peak(_Walk().run(getattr(closed, "jaxpr", closed)), LANES)


def _loops(params: dict) -> list:
    """The jaxprs of a loop's body or of a condition's branches."""
    bodies = [params[key] for key in ("jaxpr", "body_jaxpr") if hasattr(params.get(key), "jaxpr")]
    return [*bodies, *params.get("branches", ())]
