"""Vectors of a tree joined in one array, so that a GPU updates them all by one kernel instead of one or two each.

Two thirds of a network's arrays are biases, scales and the like: a thousandth of its numbers, most of an optimizer's kernels.
Only what treats every number alike, as AdamW does, may be given packed trees.
"""

from typing import Any

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
