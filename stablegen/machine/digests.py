"""SHA-256 digests of files, remembered between runs."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path


class DigestMemory:
    """SHA-256 of files, remembered by path, size and modification time in one JSON file.

    A memory that cannot be read or written costs time, not correctness.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, str] = {}
        if path is not None and path.exists():
            try:
                loaded = json.loads(path.read_text(encoding="utf-8"))
                self._known = {str(k): str(v) for k, v in loaded.items()}
            except (OSError, ValueError, AttributeError):
                self._known = {}

    def digest(self, file: Path) -> str:
        """Return a file's SHA-256 in hexadecimal."""
        stat = file.stat()
        name = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if name not in self._known:
            with file.open("rb") as stream:
                self._known[name] = hashlib.file_digest(stream, "sha256").hexdigest()
            self._save()
        return self._known[name]

    def _save(self) -> None:
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            draft = self._path.with_name(f"{self._path.name}.{os.getpid()}")
            draft.write_text(json.dumps(self._known), encoding="utf-8")
            draft.replace(self._path)
        except OSError:
            return
