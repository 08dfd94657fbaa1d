"""The adapter engine: deltas of weights, in plain PyTorch.

from litflora.adapters import FLoRA, inject, merge, save

report = inject(model, FLoRA(rank=8), train=["head"])
print(report)
"""

from .calibration import Timing, calibrate
from .delta import Delta, WeightInfo
from .errors import AdapterError
from .files import check_base, load, read_config, save
from .flora import FLoRA, FLoRADelta
from .inject import (
    activate,
    adapter_names,
    delete,
    disabled,
    inject,
    route,
    trainable_parameters,
    unload,
)
from .lora import LoRA, LoRADelta
from .merging import MergeReport, merge, unmerge
from .per_module import PerModule
from .selective import BitFit, Frozen, Full, NormTuning, Probe, Selective
from .spectra import SpectraReport, Spectrum, spectra, suggested_ranks
from .summary import Summary, summary
from .tuning import DeltaTuning, Parts, Tuning

__all__ = [
    "AdapterError",
    "BitFit",
    "Delta",
    "DeltaTuning",
    "FLoRA",
    "FLoRADelta",
    "Frozen",
    "Full",
    "LoRA",
    "LoRADelta",
    "MergeReport",
    "NormTuning",
    "Parts",
    "PerModule",
    "Probe",
    "Selective",
    "SpectraReport",
    "Spectrum",
    "Summary",
    "Timing",
    "Tuning",
    "WeightInfo",
    "activate",
    "adapter_names",
    "calibrate",
    "check_base",
    "delete",
    "disabled",
    "inject",
    "load",
    "merge",
    "read_config",
    "route",
    "save",
    "spectra",
    "suggested_ranks",
    "summary",
    "trainable_parameters",
    "unload",
    "unmerge",
]
