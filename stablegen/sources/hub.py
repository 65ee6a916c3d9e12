"""Checkpoints from the hub, downloaded once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stablegen.errors import CheckpointError, HubError
from stablegen.sources.files import weight_files

_PATTERNS = ["*.json", "*.safetensors"]
_ATTEMPTS = 4
_TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2")


def download(repo: str, revision: str | None) -> Path:
    """Return the directory of a hub repository's snapshot, downloaded once; raise ``HubError`` where it fails."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    def fetch(*, offline: bool) -> Path:
        found = snapshot_download(repo, revision=revision, allow_patterns=_PATTERNS, local_files_only=offline)
        return Path(found)

    try:
        directory = fetch(offline=True)
        if weight_files(directory) and all((directory / f).is_file() for f in ("config.json", "tokenizer.json")):
            return directory
    except (LocalEntryNotFoundError, CheckpointError):
        pass
    except HFValidationError as error:
        raise HubError(f"{repo!r} is neither a directory nor a hub name", accepted="'gpt2', 'owner/name'") from error
    try:
        return with_retries(lambda: fetch(offline=False))
    except Exception as error:  # the hub client raises its HTTP library's exceptions as well as its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        at = "" if revision is None else f" at revision {revision}"
        raise HubError(
            f"the model {repo!r}{at} could not be downloaded from the hub: {reason}",
            hint=f"Check name, revision and network. Offline: download it elsewhere (`hf download {repo}`) and pass "
            "its directory, or name no model to use the embedded model",
        ) from error


def with_retries(action: Callable[[], Path]) -> Path:
    """Run a download, up to four times while the network fails, with growing pauses."""
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

    retrying = Retrying(
        retry=retry_if_exception(is_network_error),
        wait=wait_random_exponential(multiplier=0.5, max=8.0),
        stop=stop_after_attempt(_ATTEMPTS),
        reraise=True,
    )
    return retrying(action)


def is_network_error(error: BaseException) -> bool:
    """Return whether trying again may help: connections, timeouts and server errors, not 401 or 404.

    The hub client wraps what its HTTP library raised, so the causes of an error are checked too.
    """
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return bool(status == 429 or status >= 500)
    transport = any(kind.__module__.split(".")[0] in _TRANSPORTS for kind in type(error).__mro__)
    if transport or isinstance(error, ConnectionError | TimeoutError):
        return True
    return error.__cause__ is not None and is_network_error(error.__cause__)
