"""The manifest of a directory: sizes and SHA-256 sums of its files. It is written last and shows what is missing."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from rlft.core.errors import CheckpointError

MANIFEST = "manifest.json"


def write(directory: Path) -> None:
    """Write the manifest of a directory's files; all of them are on the disk (fsync) when this returns."""
    manifest = {}
    for path in sorted(directory.iterdir()):
        fsync(path)
        manifest[path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1))
    fsync(directory / MANIFEST)
    fsync(directory)


def verify(path: Path) -> None:
    """Check a checkpoint directory against its manifest; raises `CheckpointError` that names the damaged file."""
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise CheckpointError(f"{path} has no manifest.json: it is not a complete checkpoint")
    try:
        manifest = {name: (one["size"], one["sha256"]) for name, one in json.loads(manifest_path.read_text()).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{manifest_path} is damaged ({error}). Delete {path} to resume from the checkpoint before it"
        ) from error
    for name, (size, sha256) in manifest.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size or _sha256(file) != sha256:
            raise CheckpointError(
                f"{file} is missing or damaged (size or SHA-256 differ from the manifest). Delete {path} to resume "
                f"from the checkpoint before it"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
