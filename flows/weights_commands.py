"""`avatar weights ...`: the model files of this machine."""

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from avatar_core.errors import ConfigError
from flows.environment import create_console

weights_app = typer.Typer(no_args_is_help=True, help="Model files: what is there, fetch, verify, convert.")
console = create_console()

_SPEECH = "kokoro"
"""Weights of no backend: what says texts serves all of them."""


@weights_app.command("list")
def weights_list() -> None:
    """Every known set of weights and whether it is here."""
    from rich.table import Table

    from avatar_core import weights

    table = Table(header_style="bold", pad_edge=False, box=None)
    for heading in ("name", "here", "licence", "what"):
        table.add_column(heading)
    for name, entry in weights.load_registry().items():
        table.add_row(name, "yes" if weights.present(name) else "no", entry.licence, entry.title)
        for part, files in entry.parts.items() if entry.kind == "huggingface" else ():
            here = "yes" if weights.present(f"{name}/{part}") else "no"
            table.add_row(f"{name}/{part}", here, files.licence, "")
    console.print(table)


@weights_app.command("fetch")
def weights_fetch(name: str) -> None:
    """Download weights into the weights folder and check them."""
    from avatar_core import weights

    weights.fetch(name, lambda line: console.print(Text(line), soft_wrap=True))


@weights_app.command("verify")
def weights_verify(name: Annotated[str | None, typer.Argument()] = None) -> None:
    """Hash the files of one or all weights that are here; note those that were placed by hand."""
    from avatar_core import weights

    names = [name] if name else [n for n in weights.load_registry() if weights.present(n)]
    problems = {n: weights.verify(n) for n in names}
    for checked, found in problems.items():
        verdict = "; ".join(found) or f"ok{weights.provenance(checked)}"
        console.print(Text(f"{checked}: {verdict}"), soft_wrap=True)
    if any(problems.values()):
        raise typer.Exit(1)


@weights_app.command("convert")
def weights_convert(
    name: Annotated[str, typer.Argument(help="For example hunyuan/transformer, or ditto.")],
    dtype: Annotated[
        str | None, typer.Option(help="Cast to bfloat16, float16 or float32; results get other keys.")
    ] = None,
) -> None:
    """Copy a model into files that load faster, or its settings into files that are safe to read."""
    backend = name.partition("/")[0].removesuffix("-tiny")
    copy = _backend_module(backend, "official").convert(name, dtype)
    console.print(Text(f"{name}: copied to {copy}"), soft_wrap=True)


@weights_app.command("tiny")
def weights_tiny(
    backend: Annotated[str, typer.Argument(help="Or kokoro, which says texts.")],
    folder: Annotated[Path | None, typer.Argument(help="Default: where a run looks for it.")] = None,
) -> None:
    """Write random weights in a backend's official file layout, to try everything without the real ones."""
    from avatar_core import weights

    target = folder.expanduser() if folder else weights.folder() / f"{backend}-tiny"
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; give an empty or absent folder")
    _backend_module(backend, "tiny").write_tiny_checkpoint(target)
    console.print(Text(f"random weights for {backend}: in {target}"), soft_wrap=True)


def _backend_module(backend: str, module: str) -> Any:
    """What only backends with models of their own have, and kokoro."""
    from avatar_core import weights
    from avatar_core.optional_packages import hide_broken_packages

    known = [name.removesuffix("-tiny") for name in weights.load_registry() if name.endswith("-tiny")]
    if backend not in known:
        raise ConfigError(f"got backend `{backend}`; backends with such weights: {', '.join(known)}")
    hide_broken_packages()
    name, extra = f"avatar_core.backends.{backend}.{module}", backend
    if backend == _SPEECH:
        if module != "tiny":
            raise ConfigError(f"weights {backend!r} are used as they are, there is nothing to convert")
        name, extra = "avatar_core.media.kokoro_tiny", "tts"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed; run: pip install 'avatar-dataset[{extra}]'"
        ) from error
