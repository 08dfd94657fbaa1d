"""`litflora merge`: an adapter and its base as one file, without a trace of adapters."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from . import out

if TYPE_CHECKING:
    from ..classes import ClassesModule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the adapter, the file to write and where the base may have moved."""
    parser.add_argument("adapter", type=Path, help="folder that a fit has saved")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--weights", help="base weights, if they are not where the fit found them")
    out.add_force(parser)


def run(args: argparse.Namespace) -> None:
    """Merges, writes the file and says how to load it."""
    out.check(args.out, args.force)

    from safetensors.torch import save

    from ..adapters import adapter_names, merge
    from ..adapters.replacing import replacing
    from ..module import from_adapter

    module = from_adapter(args.adapter, **({"weights": args.weights} if args.weights else {}))
    module.configure_model()
    # Full tuning and its like leave no delta: what they trained is in place already.
    report = merge(module.net, unload=True) if adapter_names(module.net) else "nothing to merge"
    state = {key: value.contiguous() for key, value in module.net.state_dict().items()}
    with replacing(args.out) as temporary:
        temporary.write_bytes(save(state, metadata=_header(module)))
    imports, made = module.plain_code()
    print(f"{report}\n{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, loads so:")
    print(f"    import safetensors.torch, {imports}")
    print(f"    {made}.load_state_dict(safetensors.torch.load_file({str(args.out)!r}))")


def _header(module: ClassesModule) -> dict[str, str]:
    """What a person needs to use the weights; safetensors keeps strings only."""
    return {
        "format": "pt",
        "code": module.plain_code()[1],
        "class_names": json.dumps(module.class_names),
        "mean": json.dumps(module.mean.flatten().tolist()),
        "std": json.dumps(module.std.flatten().tolist()),
    }
