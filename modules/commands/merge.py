"""`litflora merge`: an adapter and its base as one, without a trace of adapters."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from . import out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the adapter, what to write and where the base may have moved."""
    parser.add_argument("adapter", type=Path, help="folder that a fit has saved")
    parser.add_argument(
        "--out", type=Path, required=True, help="safetensors file or folder to write"
    )
    parser.add_argument("--weights", help="base weights, if they are not where the fit found them")
    out.add_force(parser)


def run(args: argparse.Namespace) -> None:
    """Merges, writes the file or folder and says how to load it."""
    out.check(args.out, args.force)

    from ..adapters import adapter_names, merge
    from ..adapters.replacing import replacing
    from ..module import from_adapter
    from ..nf4 import dequantize

    module = from_adapter(args.adapter, **({"weights": args.weights} if args.weights else {}))
    module.configure_model()
    lost = dequantize(module.net)
    # Full tuning and its like leave no delta: what they trained is in place already.
    report = merge(module.net, unload=True) if adapter_names(module.net) else "nothing to merge"
    with replacing(args.out) as temporary:
        module.write_merged(temporary)
    if lost:
        print(_told(lost))
    print(f"{report}\n{args.out}: {_bytes(args.out) / 1e6:.1f} MB, loads so:")
    print(textwrap.indent(module.loading_code(args.out), "    "))


def _told(lost: dict[str, float]) -> str:
    worst, mean = max(lost, key=lost.__getitem__), sum(lost.values()) / len(lost)
    return (
        f"{len(lost)} weights were trained on in NF4 and are written so: of a weight this lost "
        f"{mean:.1%} on average, {lost[worst]:.1%} at most ({worst})"
    )


def _bytes(path: Path) -> int:
    """Of a file, or of all files in a folder."""
    return sum(each.stat().st_size for each in (path, *path.rglob("*")) if each.is_file())
