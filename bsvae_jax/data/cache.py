"""Images decoded once: a memory map of uint8 pixels and a manifest, found again by everything that changes a pixel.

NAME-KEY/images.npy       [N, H, W, C], the training images first
NAME-KEY/labels.npy       [N] classes or [N, A] attributes, where the source has them
NAME-KEY/manifest.json    where they come from, what was done to them, counts, SHA-256 of both files and of
                          itself, what was skipped, what was lost of images

A folder of this name is whole or not there. While it is made it is called `.NAME-KEY.unfinished`, and `progress.jsonl` in it
says, with checksums, which images are there already, so that an interrupted preparation continues.
"""

import collections
import concurrent.futures
import contextlib
import itertools
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bsvae_jax._io.disk import MARGIN, free_bytes, mebibytes
from bsvae_jax._io.files import digest_of, locked, sha256_of, write_json
from bsvae_jax._io.terminal import ProgressBar, log
from bsvae_jax.data._workers import Decoders
from bsvae_jax.data.decoding import CorruptImageError, Header, read_header
from bsvae_jax.data.image_files import Encoded
from bsvae_jax.data.image_set import SPLITS, ImageSet
from bsvae_jax.data.recipe import FORMAT, Recipe
from bsvae_jax.errors import UserError

CHUNK = 256
"""Images decoded by one thread at a time; what an interruption may cost."""

FEW = 4
"""Chunks that are decoded sooner than processes for it would have started."""


def load_prepared(recipe: Recipe, skip_corrupt: bool = False, progress: bool = True) -> ImageSet:
    """The images of a recipe as memory maps, prepared now unless they are already.

    Another process that prepares the same set is waited for. A prepared set that is damaged is made again.

    Args:
      recipe: what to prepare.
      skip_corrupt: leave out images that cannot be decoded, and list them in the manifest, rather than refuse.
      progress: show a progress bar on stderr.

    Raises:
      UserError: an image that cannot be decoded, images of several sizes or channels where the recipe does not say which, or
        no room on the disk, known before anything is decoded.
    """
    folder = recipe.folder()
    if (images := _open(recipe, progress)) is not None:
        return images
    with locked(folder.with_name(f".{folder.name}.lock"), recipe.name, "set BSVAE_CACHE to a folder for prepared images"):
        # Looked at again: another process may have made it, or made it anew. Only here may it be deleted.
        if (images := _open(recipe, progress)) is not None:
            return images
        if folder.exists():
            log.warning(f"{folder} is damaged; it is made again")
            shutil.rmtree(folder, ignore_errors=True)
        manifest = _Preparation(recipe, folder, skip_corrupt, progress).run()
        return _map(folder, manifest)


# --- Opening ----------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a prepared set, as it was written; None where there is none, or a damaged or changed one."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        digest = manifest.pop("digest")
        return manifest if manifest["format"] == FORMAT and digest == digest_of(manifest) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _open(recipe: Recipe, progress: bool) -> ImageSet | None:
    """A finished set; None where there is none, a damaged one, or one of another recipe."""
    folder = recipe.folder()
    manifest = read_manifest(folder)
    try:
        # Whatever version of the package has made it.
        if manifest is None or digest_of(manifest | recipe.manifest() | {"bsvae_jax": manifest["bsvae_jax"]}) != digest_of(
            manifest
        ):
            return None
        return _map(folder, manifest) if undamaged(folder, manifest["files"], progress) else None
    except FileNotFoundError:  # just deleted by another process, which makes it again
        return None


def _map(folder: Path, manifest: dict[str, Any]) -> ImageSet:
    """The images of a finished set, mapped into memory."""
    if manifest["skipped"]:
        count = len(manifest["skipped"])
        log.warning(f"{manifest['name']}: {count} corrupt images were left out, see {folder / 'manifest.json'}")
    for note, count in manifest["notes"].items():
        log.info(f"{manifest['name']}: {count:,} images {note}")
    images = np.load(folder / "images.npy", mmap_mode="r")
    labels = np.load(folder / "labels.npy") if "labels.npy" in manifest["files"] else None
    return _image_set(manifest, images, labels)


def _starts(sizes: dict[str, int]) -> dict[str, int]:
    """Where each split begins, of `sizes` in this order."""
    return dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))


def _image_set(manifest: dict[str, Any], images: np.ndarray, labels: np.ndarray | None = None) -> ImageSet:
    """The splits of a manifest, which lie one after the other."""
    sizes = {split: manifest["splits"][split] for split in SPLITS if split in manifest["splits"]}
    rows = {split: slice(first, first + sizes[split]) for split, first in _starts(sizes).items()}
    known = {split: labels[where] for split, where in rows.items()} if labels is not None else {}
    held_out = {split: None if (of == -1).all() else of for split, of in known.items()}
    return ImageSet(
        manifest["name"],
        images[rows["train"]],
        images[rows["test"]],
        256,
        known.get("train"),
        held_out.get("test"),
        tuple(manifest["label_names"]),
        manifest.get("fingerprint"),
        validation=images[rows["validation"]] if "validation" in rows else None,
        validation_labels=held_out.get("validation"),
    )


def undamaged(folder: Path, files: dict[str, Any], progress: bool) -> bool:
    """Whether the files of a folder have the sizes and SHA-256 of `files`, by name."""
    sizes = {name: wanted["bytes"] for name, wanted in files.items()}
    if any(not (folder / name).is_file() or (folder / name).stat().st_size != size for name, size in sizes.items()):
        return False
    with _bar(sum(sizes.values()), f"checking {folder.name}", progress and sum(sizes.values()) > 2**30, "B") as bar:
        return all(sha256_of(folder / name, bar.update) == wanted["sha256"] for name, wanted in files.items())


def _bar(total: int, what: str, enabled: bool, unit: str = "images") -> ProgressBar:
    return ProgressBar(total, 0, enabled, unit, what, leave=False)


# --- Preparing --------------------------------------------------------------------------------------------------------


class _Chunk(NamedTuple):
    """Images `start ... stop - 1` of a split, the first of which is number `first` of the whole set."""

    split: str
    start: int
    stop: int
    first: int


class _Decoded(NamedTuple):
    chunk: _Chunk
    checksum: int
    """CRC-32 of pixels and labels as they were written."""
    corrupt: list[tuple[int, str]]
    """Number in the whole set, and why."""
    notes: dict[str, int]
    """What was lost of images, and of how many."""


def _crc(pixels: np.ndarray, labels: np.ndarray | None) -> int:
    """CRC-32 of pixels and labels."""
    checksum = zlib.crc32(np.ascontiguousarray(pixels).data)
    return checksum if labels is None else zlib.crc32(np.ascontiguousarray(labels).data, checksum)


def _write(file: np.memmap, first: int, rows: np.ndarray) -> None:
    """Rows of a mapped `.npy` file, from row `first` on."""
    with open(str(file.filename), "r+b") as target:
        target.seek(file.offset + first * rows[0].nbytes)
        target.write(np.ascontiguousarray(rows).data)


class _Preparation:
    """One preparation, by the only process that does it."""

    def __init__(self, recipe: Recipe, folder: Path, skip_corrupt: bool, progress: bool):
        self.recipe, self.folder, self.skip_corrupt, self.progress = recipe, folder, skip_corrupt, progress
        self.unfinished = folder.with_name(f".{folder.name}.unfinished")
        self.threads = os.cpu_count() or 1
        self.starts = _starts({split: len(files) for split, files in recipe.splits.items()})
        self.count = sum(map(len, recipe.splits.values()))
        self.chunks = [
            _Chunk(split, start, min(start + CHUNK, len(files)), self.starts[split] + start)
            for split, files in recipe.splits.items()
            for start in range(0, len(files), CHUNK)
        ]

    def run(self) -> dict[str, Any]:
        """Leaves the finished folder; its manifest."""
        shape = self._shape()
        self._check_room(shape)
        self.unfinished.mkdir(exist_ok=True)
        self.images = self._array("images.npy", (self.count, *shape), np.dtype(np.uint8))
        self.labels = self._label_map()
        done = self._done_before()
        left = [chunk for chunk in self.chunks if chunk not in done]
        finished = sum(chunk.stop - chunk.start for chunk in done)
        with (
            Decoders(self.threads if len(left) > FEW else 0) as self.decoders,
            (self.unfinished / "progress.jsonl").open("a") as log,
            _bar(self.count, f"preparing {self.recipe.name}", self.progress) as bar,
        ):
            bar.update(finished)
            for decoded in self._in_threads(self._decode, left):
                row = [list(decoded.chunk), *decoded[1:]]
                log.write(json.dumps([*row, digest_of(row)]) + "\n")
                log.flush()
                done[decoded.chunk] = decoded
                bar.update(decoded.chunk.stop - decoded.chunk.start)
        notes = sum((collections.Counter(decoded.notes) for decoded in done.values()), collections.Counter[str]())
        return self._finish({number: why for decoded in done.values() for number, why in decoded.corrupt}, dict(notes))

    def _in_threads(self, work: Callable[[_Chunk], Any], chunks: Iterable[_Chunk]) -> Iterator[Any]:
        """Results in order; a few chunks at a time, so that an error or Ctrl-C ends it soon."""
        with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
            waiting: collections.deque[concurrent.futures.Future] = collections.deque()
            ahead = iter(chunks)
            try:
                while True:
                    waiting.extend(
                        pool.submit(work, chunk) for chunk in itertools.islice(ahead, 2 * self.threads - len(waiting))
                    )
                    if not waiting:
                        return
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    # What is there, and what it will take

    def _shape(self) -> tuple[int, int, int]:
        """Of every prepared image; looks at all the sources' headers where the recipe leaves it open."""
        crop, size, channels = self.recipe.preprocessing
        side = size or crop
        header = self.recipe.header
        if header is not None:
            side_or = (header.height, header.width) if side is None else (side, side)
            return (*side_or, channels or header.channels)
        if side is not None and channels is not None:
            return side, side, channels
        found: collections.Counter[Header] = collections.Counter()
        with _bar(self.count, f"looking at {self.recipe.name}", self.progress) as bar:
            for headers in self._in_threads(self._headers, self.chunks):
                found.update(headers)
                bar.update(len(headers))
        if not found:
            raise UserError(f"{self.recipe.name} holds no image that can be read.")
        if side is None:
            (height, width), *others = self._kinds(found, lambda header: (header.height, header.width))
            if others:
                sizes = self._counts(found, lambda header: f"{header.height} x {header.width}")
                raise UserError(
                    f"{self.recipe.name} holds images of {len(others) + 1} sizes ({sizes}); --size N (in a config: data.size) "
                    "makes them all N x N: the shorter side becomes N, and the center is kept."
                )
        else:
            height = width = side
        if channels is None:
            channels, *others = self._kinds(found, lambda header: header.channels)
            if others:
                kinds = self._counts(found, lambda header: "gray" if header.channels == 1 else "color")
                raise UserError(
                    f"{self.recipe.name} holds gray images and color images ({kinds}); --channels 3 (in a config: "
                    "data.channels) makes all color, --channels 1 all gray."
                )
        return height, width, channels

    @staticmethod
    def _kinds(found: collections.Counter[Header], kind: Callable[[Header], Any]) -> list[Any]:
        return sorted({kind(header) for header in found})

    @staticmethod
    def _counts(found: collections.Counter[Header], kind: Callable[[Header], str]) -> str:
        counts: collections.Counter[str] = collections.Counter()
        for header, count in found.items():
            counts[kind(header)] += count
        shown = [f"{name}: {count:,}" for name, count in counts.most_common(3)]
        return ", ".join(shown) + (" ..." if len(counts) > 3 else "")

    def _headers(self, chunk: _Chunk) -> list[Header]:
        headers = []
        for encoded in self.recipe.splits[chunk.split].read(chunk.start, chunk.stop):
            try:
                name, content, _ = self._readable(encoded)
                headers.append(read_header(content, name))
            except CorruptImageError as error:
                if not self.skip_corrupt:
                    raise self._refusal(error) from error
        return headers

    @staticmethod
    def _readable(encoded: Encoded | CorruptImageError) -> Encoded:
        if isinstance(encoded, CorruptImageError):
            raise encoded
        return encoded

    @staticmethod
    def _refusal(error: CorruptImageError) -> UserError:
        return UserError(
            f"{error} `bsvae prepare --skip-corrupt`, with the same options, leaves such images out, and lists them."
        )

    def _check_room(self, shape: tuple[int, int, int]) -> None:
        needed = self.count * math.prod(shape) + MARGIN
        there = self.unfinished / "images.npy"
        free = free_bytes(self.folder.parent.absolute()) + (there.stat().st_blocks * 512 if there.is_file() else 0)
        if free < needed:
            raise UserError(
                f"The disk of {self.folder.parent} has {mebibytes(free)} free; the {self.count:,} images of "
                f"{self.recipe.name} take {mebibytes(needed)}. Free some space, or set BSVAE_CACHE to a folder on another disk."
            )

    # The files

    def _array(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
        path = self.unfinished / name
        if path.is_file():
            with contextlib.suppress(ValueError, EOFError):  # torn while it was made
                there = np.load(path, mmap_mode="r+")
                if there.shape == shape and there.dtype == dtype:
                    return there
        return np.lib.format.open_memmap(path, "w+", dtype, shape)

    def _label_map(self) -> np.memmap | None:
        for chunk in self.chunks:
            for encoded in self.recipe.splits[chunk.split].read(chunk.start, chunk.stop):
                if not isinstance(encoded, CorruptImageError):
                    if encoded.label is None:
                        return None
                    label = np.asarray(encoded.label)
                    dtype = label.dtype if label.dtype == np.bool_ else np.dtype(np.int64)
                    return self._array("labels.npy", (self.count, *label.shape), dtype)
        return None

    def _checksum(self, chunk: _Chunk) -> int:
        """Of what the files hold of a chunk."""
        rows = slice(chunk.first, chunk.first + chunk.stop - chunk.start)
        return _crc(self.images[rows], None if self.labels is None else self.labels[rows])

    def _done_before(self) -> dict[_Chunk, _Decoded]:
        """Chunks whose images are in the files, by their checksum."""
        done, chunks = {}, set(self.chunks)
        path = self.unfinished / "progress.jsonl"
        for line in path.read_bytes().splitlines() if path.is_file() else []:
            try:
                *row, digest = json.loads(line)
                if digest != digest_of(row):
                    continue
            except (ValueError, TypeError, RecursionError):  # torn by a kill
                continue
            chunk, checksum, corrupt, notes = row
            decoded = _Decoded(_Chunk(*chunk), checksum, [(number, why) for number, why in corrupt], notes)
            if decoded.chunk in chunks and self._checksum(decoded.chunk) == checksum:
                if decoded.corrupt and not self.skip_corrupt:
                    continue  # it will say which
                done[decoded.chunk] = decoded
        if path.is_file() and not path.read_bytes().endswith(b"\n"):
            with path.open("a") as log:
                log.write("\n")
        return done

    def _decode(self, chunk: _Chunk) -> _Decoded:
        corrupt = []
        notes: collections.Counter[str] = collections.Counter()
        pixels = np.zeros((chunk.stop - chunk.start, *self.images.shape[1:]), np.uint8)
        labels = None if self.labels is None else np.zeros((len(pixels), *self.labels.shape[1:]), self.labels.dtype)
        read = self.recipe.splits[chunk.split].read(chunk.start, chunk.stop)
        files = {row: encoded for row, encoded in enumerate(read) if isinstance(encoded, Encoded)}
        decoded = iter(self.decoders.decode([file[:2] for file in files.values()], self.recipe.preprocessing))
        for row, encoded in enumerate(read):
            answer = next(decoded) if isinstance(encoded, Encoded) else encoded
            if isinstance(answer, CorruptImageError) and self.skip_corrupt:
                corrupt.append((chunk.first + row, str(answer)))
                continue
            if isinstance(answer, CorruptImageError):
                raise self._refusal(answer)
            if isinstance(answer, UserError):
                raise answer
            image, lost = answer
            notes.update(lost)
            if image.shape != pixels.shape[1:]:
                raise UserError(
                    f"{files[row].name} has shape {image.shape}, the others {pixels.shape[1:]}; --size N (in a config: "
                    "data.size) makes all images N x N."
                )
            pixels[row] = image
            if labels is not None:
                labels[row] = files[row].label
        # Not through the map, whose pages would be faulted in one by one.
        for array, file in ((pixels, self.images), (labels, self.labels)):
            if array is not None and file is not None:
                _write(file, chunk.first, array)
        return _Decoded(chunk, _crc(pixels, labels), corrupt, dict(notes))

    # The end

    def _finish(self, corrupt: dict[int, str], notes: dict[str, int]) -> dict[str, Any]:
        kept = np.setdiff1d(np.arange(self.count), list(corrupt))
        ends = {split: first + len(self.recipe.splits[split]) for split, first in self.starts.items()}
        splits = {split: int(((kept >= first) & (kept < ends[split])).sum()) for split, first in self.starts.items()}
        if 0 in splits.values():
            raise UserError(f"{self.recipe.name}: of one split no image is left; corrupt: {next(iter(corrupt.values()))}")
        source = self.unfinished
        if corrupt:
            source = self.folder.with_name(f".{self.folder.name}.whole")
            shutil.rmtree(source, ignore_errors=True)
            source.mkdir()
            for name, array in self._arrays().items():
                target = np.lib.format.open_memmap(source / name, "w+", array.dtype, (len(kept), *array.shape[1:]))
                for start in range(0, len(kept), CHUNK):
                    target[start : start + CHUNK] = array[kept[start : start + CHUNK]]
        # Nothing is forced to the disk: what a power cut tears is found out by its hash, and made again.
        images = np.load(source / "images.npy", mmap_mode="r")
        whole = _image_set({**self.recipe.manifest(), "splits": splits}, images)
        with concurrent.futures.ThreadPoolExecutor(1) as beside:
            fingerprint = beside.submit(whole.fingerprint)
            files = {}
            for name in self._arrays():
                files[name] = {"bytes": (source / name).stat().st_size, "sha256": sha256_of(source / name)}
        manifest = {
            **self.recipe.manifest(),
            "shape": list(images.shape[1:]),
            "splits": splits,
            "files": files,
            "fingerprint": fingerprint.result(),
            "skipped": list(corrupt.values()),
            "notes": notes,
        }
        write_json(source / "manifest.json", manifest)
        (source / "progress.jsonl").unlink(missing_ok=True)
        source.rename(self.folder)
        shutil.rmtree(self.unfinished, ignore_errors=True)
        return manifest

    def _arrays(self) -> dict[str, Any]:
        return {"images.npy": self.images} | ({} if self.labels is None else {"labels.npy": self.labels})
