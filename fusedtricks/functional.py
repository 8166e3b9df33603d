"""Drop-in counterparts of torch.nn.functional."""

from fusedtricks.ops.cross_entropy import cross_entropy as cross_entropy
from fusedtricks.ops.distillation import distillation_loss as distillation_loss
from fusedtricks.ops.layer_norm import layer_norm as layer_norm
from fusedtricks.ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from fusedtricks.ops.rms_norm import rms_norm as rms_norm
