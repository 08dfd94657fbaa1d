"""The adapter engine: deltas of weights, in plain PyTorch.

from litflora.adapters import FLoRA, inject, merge, save

report = inject(model, FLoRA(rank=8), train=["head"])
print(report)
"""

from .adalora import AdaLoRA, AdaLoRADelta, orthogonality
from .budget import BudgetSchedule, RankAllocator
from .calibration import Timing, calibrate
from .delta import Delta, WeightInfo
from .dora import DoRA, DoRADelta
from .errors import AdapterError
from .files import check_base, load, save
from .flora import FLoRA, FLoRADelta
from .folder import read_config
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
from .loftq import LoftQ
from .loha import LoHa, LoHaDelta
from .lokr import LoKr, LoKrDelta
from .lora import LoRA, LoRADelta
from .merging import MergeReport, merge, unmerge
from .mora import MoRA, MoRADelta
from .per_module import PerModule
from .selective import BitFit, Frozen, Full, NormTuning, Probe, Selective
from .spectra import SpectraReport, Spectrum, spectra, suggested_ranks
from .starts import OLoRA, PiSSA
from .summary import Summary, summary
from .tuning import DeltaTuning, Parts, Tuning

__all__ = [
    "AdaLoRA",
    "AdaLoRADelta",
    "AdapterError",
    "BitFit",
    "BudgetSchedule",
    "Delta",
    "DeltaTuning",
    "DoRA",
    "DoRADelta",
    "FLoRA",
    "FLoRADelta",
    "Frozen",
    "Full",
    "LoHa",
    "LoHaDelta",
    "LoKr",
    "LoKrDelta",
    "LoRA",
    "LoRADelta",
    "LoftQ",
    "MergeReport",
    "MoRA",
    "MoRADelta",
    "NormTuning",
    "OLoRA",
    "Parts",
    "PerModule",
    "PiSSA",
    "Probe",
    "RankAllocator",
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
    "orthogonality",
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
