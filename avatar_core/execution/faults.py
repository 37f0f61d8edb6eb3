"""What may go wrong beside the items themselves, and whose fault it is."""

import builtins
from collections import Counter
from dataclasses import dataclass, field

from avatar_core import errors
from avatar_core.errors import BackendError, StoreError
from avatar_core.execution.worker_process import JobResult
from avatar_core.stages.base import ItemSpec


@dataclass
class Trouble:
    """What went wrong so far: whose fault it was, and what is set aside until the next pass."""

    deaths: Counter[str] = field(default_factory=Counter)  # by item key, or queue name
    given_up: int = 0  # shards, since the last one that went well
    damaged: set[str] = field(default_factory=set)  # `<stage>:<key>` of stored results
    fatal: errors.AvatarError | None = None


def owners(spec: ItemSpec) -> set[str]:
    """The stored results that an item reads."""
    owners = {f"{stage}:{key}" for stage, keys in spec.inputs.items() for key in keys}
    return owners | {f"ingest:{asset.key}" for assets in spec.assets.values() for asset in assets}


def passes_by_itself(result: JobResult) -> bool:
    """Trouble with a network or disk; not damage, bad weights, or a fault of the code."""
    if result.error is None or result.keys or result.cancelled or result.died or result.hung:
        return False
    kind = getattr(builtins, result.error_type or "", None)
    return result.error_type == StoreError.__name__ or (isinstance(kind, type) and issubclass(kind, OSError))


def raised(result: JobResult) -> errors.AvatarError:
    kind = getattr(errors, result.error_type or "", BackendError)
    return kind(result.error) if issubclass(kind, errors.AvatarError) else BackendError(result.error)
