"""Forms in which a GPU keeps the parameters between steps, so that fewer kernels do the same.

Vectors are joined in one array, which one GPU kernel updates instead of one or two for each. Two thirds of a network's arrays
are biases, scales and the like: a thousandth of its numbers, most of an optimizer's GPU kernels. Only what treats every number
alike, as AdamW does, may be given packed trees. And where a network rounds its convolutions' and matrix products' kernels, what
updates one writes it rounded too.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct


class Packed(struct.PyTreeNode):
    """A tree whose vectors are one array."""

    vector: Any
    """All arrays of one axis, one after the other."""
    others: tuple[Any, ...]
    """All other arrays."""
    lengths: tuple[int | None, ...] = struct.field(pytree_node=False)
    """Of each array of the tree; None for the others."""
    outline: Any = struct.field(pytree_node=False)
    """The tree's structure."""


def pack(state: Any, params: Any) -> Any:
    """`state` with all parts of the structure of `params`, a dict of trees, packed: each tree of the dict for itself.

    >>> encoder = {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2)), "scale": jnp.zeros(2)}
    >>> params = {"encoder": encoder, "log_variance": jnp.ones(())}
    >>> packed = pack({"step": 0, "params": params}, params)
    >>> packed["params"]["encoder"].vector
    Array([1., 1., 0., 0.], dtype=float32)
    >>> jax.tree.structure(unpack(packed)) == jax.tree.structure({"step": 0, "params": params})
    True
    """
    outline: Any = jax.tree.structure(params)

    def alike(node: Any) -> bool:
        return outline == jax.tree.structure(node)

    def change(node: Any) -> Any:
        return {name: _pack(part) for name, part in node.items()} if alike(node) else node

    return jax.tree.map(change, state, is_leaf=alike)


def _pack(tree: Any) -> Any:
    leaves, outline = jax.tree.flatten(tree)
    vectors = [leaf for leaf in leaves if leaf.ndim == 1]
    if len(vectors) < 2:
        return tree
    lengths = tuple(len(leaf) if leaf.ndim == 1 else None for leaf in leaves)
    return Packed(jnp.concatenate(vectors), tuple(leaf for leaf in leaves if leaf.ndim != 1), lengths, outline)


def unpack(tree: Any) -> Any:
    """The tree before `pack`; any other tree as it is."""
    return jax.tree.map(
        lambda node: _unpack(node) if isinstance(node, Packed) else node, tree, is_leaf=lambda node: isinstance(node, Packed)
    )


def _unpack(packed: Packed) -> Any:
    # Split, not sliced: its gradient is one concatenation, not a sum of padded arrays.
    vectors = iter(jax.lax.split(packed.vector, [length for length in packed.lengths if length is not None]))
    others = iter(packed.others)
    leaves = [next(others if length is None else vectors) for length in packed.lengths]
    return jax.tree.unflatten(packed.outline, leaves)


def round_kernels(params: Any, dtype: Any) -> Any:
    """The parameters of a VAE, those of its encoder and decoder that are kernels in another type.

    >>> hidden, prior = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, {"kernel": jnp.ones((2, 2))}
    >>> rounded = round_kernels({"encoder": {"hidden": hidden}, "prior_model": prior}, jnp.bfloat16)
    >>> jax.tree.map(lambda leaf: leaf.dtype.name, rounded)
    {'encoder': {'hidden': {'bias': 'float32', 'kernel': 'bfloat16'}}, 'prior_model': {'kernel': 'float32'}}
    """

    def rounded(path: Any, leaf: Any) -> Any:
        is_kernel = path[0].key in ("encoder", "decoder") and path[-1].key == "kernel"
        return leaf.astype(dtype) if is_kernel else leaf

    return jax.tree.map_with_path(rounded, params)


def in_types_of(tree: Any, other: Any) -> Any:
    """A tree in the types of another."""
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), tree, other)


class Form(NamedTuple):
    """How a program keeps the parameters between its steps."""

    packed: bool = False
    """Their vectors in one array, for an optimizer that treats all numbers alike."""
    kernels: Any = None
    """The type to which the network rounds its kernels, and in which what updates a kernel then writes it as well, so that the
    next step need not; None: it rounds them at every step."""


AS_GIVEN = Form()


def in_form(state: Any, form: Form) -> Any:
    """A `TrainState` whose parameters are kept in a form."""
    if form.kernels is not None:
        state = state.replace(rounded=round_kernels(state.params, form.kernels))
    return pack(state, state.params) if form.packed else state


def as_given(state: Any) -> Any:
    """The `TrainState` before `in_form`."""
    return unpack(state.replace(rounded=None))
