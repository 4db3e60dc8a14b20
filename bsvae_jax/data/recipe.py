"""What is to be decoded, and the name under which the result is kept: everything that changes a pixel takes part in it."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import PIL.features

from bsvae_jax._io.files import cache_folder
from bsvae_jax.data.decoding import Header, Preprocessing
from bsvae_jax.data.image_files import EncodedImages

FORMAT = 2
"""Version of the layout of a prepared set."""


class Recipe(NamedTuple):
    """A set of encoded images and what is to be done to them."""

    name: str
    source: dict[str, Any]
    """JSON values that are others where the images, or the way they are divided, are others."""
    splits: Mapping[str, EncodedImages]
    """Of training, test and, where there is one, validation, in this order."""
    preprocessing: Preprocessing
    label_names: tuple[str, ...] = ()
    """Of classes or attributes; empty: no names."""
    header: Header | None = None
    """Size and channels of all images, where the source promises them."""

    def key(self) -> str:
        """Hash of everything that changes a pixel: source, preprocessing, versions of the decoders."""
        return hashlib.sha256(json.dumps(self._description(), sort_keys=True).encode()).hexdigest()

    def _description(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "name": self.name,
            "source": self.source,
            "preprocessing": self.preprocessing._asdict(),
            "decoders": {
                "pillow": version("pillow"),
                **{codec: PIL.features.version(codec) for codec in ("jpg", "webp", "libtiff") if PIL.features.check(codec)},
            },
        }

    def manifest(self) -> dict[str, Any]:
        """What the manifest says from the beginning."""
        return {**self._description(), "bsvae_jax": version("bsvae_jax"), "label_names": self.label_names}

    def folder(self) -> Path:
        """Where it is, once it is prepared."""
        return cache_folder() / "prepared" / f"{self.name.replace('/', '-')}-{self.key()[:16]}"
