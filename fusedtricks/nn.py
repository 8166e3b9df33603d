"""Drop-in counterparts of torch.nn."""

from fusedtricks.ops.cross_entropy import CrossEntropyLoss as CrossEntropyLoss
from fusedtricks.ops.distillation import DistillationLoss as DistillationLoss
from fusedtricks.ops.layer_norm import LayerNorm as LayerNorm
from fusedtricks.ops.rms_norm import RMSNorm as RMSNorm
