"""Images drawn from a trained model, over all devices, in batches that do not depend on how many are wanted."""

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bsvae_jax._io.files import digest, is_used, read_arrays, take_folder, write_atomically
from bsvae_jax.data.image_set import no_images
from bsvae_jax.distributed.mesh import DATA_AXIS, REPLICATED, SHARDED, data_mesh, parallelize, replicate
from bsvae_jax.errors import UserError, shown
from bsvae_jax.evaluation import plots
from bsvae_jax.evaluation.scores import evaluation_batch
from bsvae_jax.evaluation.trained import Restored
from bsvae_jax.models.vae import VAE
from bsvae_jax.random import make_key

BATCH = 500
"""Images per device call; each batch has its own key, so the first images do not depend on how many are drawn."""
MANIFEST = "samples.json"


def to_8_bits(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1], clipped and rounded to uint8."""
    return np.round(np.clip(images, 0.0, 1.0) * 255.0).astype(np.uint8)


def to_stored(run: Restored, means: np.ndarray) -> np.ndarray:
    """Decoder means [N, ...] as they are kept: uint8 where the data are images in [0, 1], else float32."""
    return to_8_bits(means) if run.holds_images else means


def check_png(run: Restored) -> None:
    """Raise a UserError if samples of this run are no images that PNG files could hold."""
    if not run.holds_images:
        raise UserError(
            f"PNG files hold images [H, W, C] in [0, 1], the examples of this run are {no_images(run.image_shape)}; give --out "
            "FILE.npz."
        )
    channels = run.image_shape[2]
    if channels not in (1, 3):
        raise UserError(f"PNG files hold 1 or 3 channels, the model has {channels}; give --out FILE.npz.")


def stretch_contrast(images: np.ndarray) -> np.ndarray:
    """Each image's least value to 0 and its greatest to 1: only for the paper's protocol, whose code does so before FID."""
    low, high = (extreme(images, axis=(1, 2, 3), keepdims=True) for extreme in (np.min, np.max))
    return (images - low) / np.maximum(high - low, 1e-12)


def classes_in_turn(run: Restored, labels: Sequence[int] | np.ndarray = ()) -> np.ndarray:
    """Classes of the samples of a conditional run, which take them in turn: those of `labels`, or all; empty of another run.

    Raises:
      UserError: labels that are out of range, or of a run that is not conditional.
    """
    classes, wanted = run.config.classes, np.asarray(labels)
    if classes is None:
        if wanted.size:
            raise UserError("This run was trained without classes: its samples are of no class; leave the labels out.")
        return wanted
    if not wanted.size:
        return np.arange(classes, dtype=np.int32)
    if wanted.ndim != 1 or wanted.dtype.kind not in "iu" or wanted.min() < 0 or wanted.max() >= classes:
        raise UserError(f"labels must be whole numbers in 0 ... {classes - 1}, the classes of this run, got {shown(labels)}.")
    return wanted.astype(np.int32)


def rows_by_class(images: np.ndarray, classes: int) -> tuple[np.ndarray, int]:
    """Images [N, ...] that take their classes in turn sorted by class, white ones where one has fewer; how many of each."""
    columns = -(-len(images) // classes)
    blank = np.ones((columns * classes - len(images), *images.shape[1:]), images.dtype)
    rows = np.concatenate([images, blank]).reshape(columns, classes, *images.shape[1:]).swapaxes(0, 1)
    return rows.reshape(-1, *images.shape[1:]), columns


def pieces(data_shape: tuple[int, ...]) -> int:
    """Device calls in which a batch is decoded: one, but for large images, of which memory holds fewer."""
    return -(-BATCH // evaluation_batch(data_shape, BATCH))


def _draw(variables: Any, key: Any, labels: Any, piece: Any, *, model: VAE, devices: int, pieces: int) -> Any:
    """This device's share of a piece of a batch of decoder means; every device draws all latents and decodes its part."""
    share = -(-BATCH // (devices * pieces))

    def own(values: Any) -> Any:
        padded = jnp.pad(values, ((0, share * devices * pieces - BATCH), *((0, 0),) * (values.ndim - 1)))
        return jax.lax.dynamic_slice_in_dim(padded, (piece * devices + jax.lax.axis_index(DATA_AXIS)) * share, share)

    z, labels = jax.tree.map(own, (model.apply(variables, key, BATCH, method="sample_latents"), labels))
    decoded: Any = model.apply(variables, z, labels=labels, method="decode")
    return decoded.mean


@functools.cache
def parallelize_sampling(model: VAE, mesh: Mesh, pieces: int) -> Any:
    """The program of one piece: (variables, key, labels, number of the piece) to decoder means, [B, ...] over the devices."""
    draw = functools.partial(_draw, model=model, devices=mesh.shape[DATA_AXIS], pieces=pieces)
    return parallelize(draw, mesh, (REPLICATED,) * 4, SHARDED)


def sample_batches(
    run: Restored, count: int, seed: int = 0, first: int = 0, labels: Sequence[int] | np.ndarray = ()
) -> Iterator[np.ndarray]:
    """Decoder means of samples `first ... count - 1` of the prior, float32 [n, ...], in batches of at most `BATCH`.

    Args:
      run: from `restore`.
      count: where to stop.
      seed: decides the images; the same for any number of devices.
      first: where to start, a multiple of `BATCH`.
      labels: of a conditional run, whose samples are of these classes in turn; all its classes if there are none.
    """
    if first % BATCH:
        raise ValueError(f"first must be a multiple of {BATCH}, got {first}.")
    mesh, number = data_mesh(), pieces(run.image_shape)
    draw, variables = parallelize_sampling(run.model.clone(axis_name=None), mesh, number), replicate(run.variables, mesh)
    root, classes = make_key(seed), classes_in_turn(run, labels)
    for start in range(first, count, BATCH):
        key, wanted = jax.random.fold_in(root, start // BATCH), min(BATCH, count - start)
        own = classes[np.arange(start, start + BATCH) % len(classes)] if len(classes) else None
        calls = (draw(variables, key, own, np.int32(piece)) for piece in range(-(-number * wanted // BATCH)))
        yield np.concatenate([np.asarray(means, np.float32) for means in calls])[:wanted]


def sample_prior(run: Restored, count: int, seed: int = 0, labels: Sequence[int] = ()) -> np.ndarray:
    """Decoder means of `count` samples of the prior, [N, ...], as `to_stored` has them; the first do not depend on `count`."""
    return np.concatenate([to_stored(run, means) for means in sample_batches(run, count, seed, labels=labels)])


# --- Files, continued where they stopped ------------------------------------------------------------------------------


def _identity(run: Restored, seed: int, labels: Sequence[int]) -> dict[str, Any]:
    """What decides the images; of a conditional run with the classes that they take in turn."""
    classes = classes_in_turn(run, labels).tolist()
    return {"parameters": digest(run.variables), "seed": seed} | ({"labels": classes} if classes else {})


def write_folder(
    run: Restored,
    folder: Path,
    count: int,
    seed: int,
    overwrite: bool,
    progress: Callable[[int], None],
    labels: Sequence[int] = (),
) -> int:
    """Write samples as `000000.png`, ... and go on where an earlier call for the same images stopped.

    Args:
      run: from `restore`, of images with 1 or 3 channels.
      folder: empty, or of an earlier call (`samples.json` says of which images).
      count: images wanted.
      seed: decides the images.
      overwrite: replace images of another model or seed.
      progress: told the number of images written since it was told before.
      labels: as for `sample_batches`; `samples.json` holds them.

    Returns:
      The number of images that were there already.

    Raises:
      UserError: no images, the folder holds something else, or cannot be written.
    """
    check_png(run)
    with _open(folder, _identity(run, seed, labels), overwrite, ".png"):
        there = 0
        while (folder / f"{there:06d}.png").is_file() and there < count:
            there += 1
        for start in range(there - there % BATCH, count, BATCH):
            (batch,) = sample_batches(run, min(count, start + BATCH), seed, start, labels)
            for index, image in enumerate(to_8_bits(batch), start):
                if index >= there:
                    plots.save_image(image, folder / f"{index:06d}.png")
            progress(min(count, start + BATCH) - max(start, there))
    return there


def write_npz(
    run: Restored,
    path: Path,
    count: int,
    seed: int,
    overwrite: bool,
    progress: Callable[[int], None],
    labels: Sequence[int] = (),
) -> int:
    """Write samples as one `.npz` (array `images`, [N, ...] of `to_stored`), by way of a folder from which it continues.

    Of a conditional run with the class of each, `labels` [N].

    Arguments, result and errors as for `write_folder`.
    """
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; give another --out, or --overwrite to replace it.")
    identity = _identity(run, seed, labels) | {"count": count}
    partial = path.with_name(f".{path.name}.partial")
    with _open(partial, identity, True, ".npy"):
        there, batches = 0, []
        for start in range(0, count, BATCH):
            part = partial / f"{start:09d}.npy"
            if part.is_file():
                images = read_arrays(part, "delete it, and it is drawn again")[""]
                there += len(images)
            else:
                (means,) = sample_batches(run, min(count, start + BATCH), seed, start, labels)
                images = to_stored(run, means)
                temporary = part.with_suffix(".part")
                with temporary.open("wb") as file:
                    np.save(file, images)
                temporary.replace(part)
                progress(len(images))
            batches.append(images)
        temporary = partial / "images.npz"
        with temporary.open("wb") as file:
            arrays = {"images": np.concatenate(batches)}
            if len(classes := classes_in_turn(run, labels)):
                arrays["labels"] = np.resize(classes, count)
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        temporary.replace(path)
    shutil.rmtree(partial)
    return there


def _open(folder: Path, identity: dict[str, Any], overwrite: bool, suffix: str) -> Any:
    """The locked folder with a manifest of these images; files of others are removed where that is allowed."""
    manifest = folder / MANIFEST
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give another --out.")
    if is_used(folder) and not manifest.is_file() and not overwrite:
        raise UserError(f"{folder} exists and is not empty; give another --out, or --overwrite to replace its samples.")
    lock = take_folder(folder, "drawing samples", "--out")
    try:
        same = json.loads(manifest.read_text()) == identity if manifest.is_file() else False
    except (ValueError, RecursionError):
        same = False
    if not same:
        if manifest.is_file() and not overwrite:
            lock.close()
            raise UserError(f"{folder} holds samples of another model or seed; give another --out, or --overwrite.")
        for old in folder.glob(f"[0-9]*{suffix}"):
            old.unlink()
        write_atomically(manifest, json.dumps(identity, indent=2).encode())
    return lock
