"""`litflora recipes`: the shipped YAML files by name, to list, show and copy.

A recipe's name is its path below `configs/` without the suffix. Its first comment line says what
it is, the second how to run it.
"""

from __future__ import annotations

import argparse
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

ROOT = Path(str(files("litflora.configs")))


def names() -> list[str]:
    """The names of all shipped recipes, those of a folder together."""
    found = (path.relative_to(ROOT).with_suffix("").as_posix() for path in ROOT.rglob("*.yaml"))
    return sorted(found, key=lambda name: (name.count("/"), name))


def find(config: str) -> Path:
    """The file that ``--config`` means: a path, or the name of a shipped recipe.

    Raises:
        FileNotFoundError: If it is neither; says which names are near.
    """
    if Path(config).is_file():
        return Path(config)
    name = config.removesuffix(".yaml")
    if name in names():
        return ROOT / f"{name}.yaml"
    raise FileNotFoundError(f"there is no file or recipe called {config!r}\n{_near(name)}")


def _near(name: str) -> str:
    by_last = {known.rsplit("/", 1)[-1]: known for known in names()}
    near = get_close_matches(name, names(), n=3, cutoff=0.5)
    near += [by_last[last] for last in get_close_matches(name.rsplit("/", 1)[-1], by_last, n=2)]
    if not near:
        return "`litflora recipes` lists those that are shipped"
    return "did you mean " + " or ".join(dict.fromkeys(near)) + "? `litflora recipes` lists all"


def comment(name: str) -> list[str]:
    """The comment lines that open a recipe: what it is, then how to run it."""
    lines = []
    for line in (ROOT / f"{name}.yaml").read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds list, show and copy."""
    actions = parser.add_subparsers(dest="action", metavar="list|show|copy")
    actions.add_parser("list", help="what each recipe is and how to run it (the default)")
    show = actions.add_parser("show", help="print a recipe")
    show.add_argument("name")
    copy = actions.add_parser("copy", help="copy a recipe to a file of your own")
    copy.add_argument("name")
    copy.add_argument("dest", nargs="?", type=Path, help="a file or folder (default: here)")
    copy.add_argument("--force", action="store_true", help="overwrite DEST")


def run(args: argparse.Namespace) -> None:
    """Lists, shows or copies."""
    if args.action == "show":
        print(find(args.name).read_text(), end="")
    elif args.action == "copy":
        _copy(find(args.name), args.dest or Path(), args.force)
    else:
        _list()


def _list() -> None:
    for name in names():
        print(name, *comment(name), sep="\n    ")


def _copy(source: Path, dest: Path, force: bool) -> None:
    if dest.is_dir():
        dest /= source.name
    if dest.exists() and not force:
        raise FileExistsError(f"{dest} exists already: give another name, or --force to overwrite")
    if not dest.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {dest.parent} to copy to: make it first")
    from ..adapters.replacing import replacing  # which loads torch, as no other command here does

    with replacing(dest) as temporary:
        temporary.write_bytes(source.read_bytes())
    print(f"{dest}: run it with  litflora fit --config {dest}")
