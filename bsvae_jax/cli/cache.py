"""`bsvae cache`: what is kept between commands, and removing it."""

import shutil
from pathlib import Path

from bsvae_jax.errors import UserError, nearest


def cache(clear: tuple[str, ...] = ()) -> None:
    """List what is kept between commands in $BSVAE_CACHE, or ~/.cache/bsvae_jax, or remove some of it.

    Prepared images, compiled programs and features for FID are made again when they are needed. Images that have changed are
    prepared anew beside what was made of them before, which stays until it is removed here.

    Example: bsvae cache --clear compiled

    Args:
      clear: Names from the list; all removes everything but downloads.
    """
    from bsvae_jax._io.files import cache_folder

    folder = cache_folder()
    entries = _entries(folder)
    unknown = [name for name in clear if name not in (*entries, "all")]
    if unknown:
        raise UserError(
            f"There is no {unknown[0]!r} in {folder}{nearest(unknown[0], entries)}; bsvae cache lists what there is."
        )
    chosen = {name for name in entries if name != "downloads"} if "all" in clear else set()
    for name, path in entries.items():
        removed = name in chosen or name in clear
        print(f"{'removed ' if removed else ''}{_size(path) / 2**20:10,.1f} MiB  {name}")
        if removed:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    print(f"{len(entries)} entries in {folder}")


def _entries(folder: Path) -> dict[str, Path]:
    """What can be removed by itself: each prepared set, and every other file or folder."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    sets = sorted((folder / "prepared").glob("[!.]*"))  # locks stay
    paths = [*sets, *(path for path in found if path.name != "prepared")]
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
