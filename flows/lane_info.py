"""What a lane says of itself on the server: in the description of its queue, for people and dispatchers."""

from collections.abc import Iterable
from dataclasses import dataclass

from avatar_core.execution.worker import PACKAGE_VERSION

_SEPARATOR, _END = ": ", ";"
"""The browser shows the lines as one."""


@dataclass(frozen=True)
class LaneInfo:
    """`worker` is the name under which its heartbeats come, another one in each process; `weights` are
    registry entries that its machine has."""

    host: str
    gpu: str
    worker: str
    package: str = PACKAGE_VERSION
    weights: tuple[str, ...] = ()

    def describe(self) -> str:
        lines = {
            "GPU": self.gpu,
            "machine": self.host,
            "avatar-dataset": self.package,
            "weights": ", ".join(self.weights) or "none",
            "lane": self.worker,
        }
        return f"{_END}\n".join(f"{name}{_SEPARATOR}{text}" for name, text in lines.items())

    def lacks(self, weights: Iterable[str]) -> list[str]:
        """Of these names of weights, the entries that its machine does not have; tiny ones it makes."""
        entries = {name.partition("/")[0] for name in weights}
        return sorted(each for each in entries - set(self.weights) if not each.endswith("-tiny"))


def read_description(text: str | None) -> LaneInfo | None:
    """None for a queue that no lane has served."""
    found = [line.removesuffix(_END) for line in (text or "").splitlines()]
    lines = dict(line.split(_SEPARATOR, 1) for line in found if _SEPARATOR in line)
    try:
        weights = lines["weights"]
        return LaneInfo(
            host=lines["machine"],
            gpu=lines["GPU"],
            worker=lines["lane"],
            package=lines["avatar-dataset"],
            weights=() if weights == "none" else tuple(weights.split(", ")),
        )
    except KeyError:
        return None
